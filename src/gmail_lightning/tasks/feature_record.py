"""What cached features depend on besides the images, and whether an encoder would still make the same."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from gmail_lightning.models.base import ROLES, ImageEncoder
from gmail_lightning.models.fingerprint import fingerprint, fingerprint_difference, fingerprint_digest
from gmail_lightning.models.lora import plain_parameter
from gmail_lightning.models.modality import ModalityEncoder
from gmail_lightning.types import Modality


def feature_record(encoder: ImageEncoder, modalities: Collection[Modality], layer: int | None) -> dict[str, Any]:
    """Describes the features of an encoder in plain values.

    Args:
        encoder: Makes the features.
        modalities: Of the images.
        layer: Of the patch tokens, None for pooled features.

    Returns:
        ``fingerprint`` of the plain tower, ``branches``: per modality a digest of what its branch adds to the tower,
        None for nothing; ``layer`` and ``image_spec``.
    """
    return {
        "fingerprint": fingerprint(encoder, ("image",)),
        "branches": {which.name.lower(): _digest(encoder, which, layer) for which in sorted(modalities)},
        "layer": layer,
        "image_spec": {**asdict(encoder.image_spec), "size": list(encoder.image_spec.size)},
    }


def refuse_other_features(
    encoder: ImageEncoder, stores: Sequence[dict[str, Any]], layer: int | None, trains: bool
) -> None:
    """Refuses features that this encoder would not make.

    Args:
        encoder: The encoder in use.
        stores: Records of the stores, each with its ``path``.
        layer: Of the patch tokens that the task reads, None for pooled features.
        trains: Whether the run changes trainable tensors.

    Raises:
        MisconfigurationException: Naming the store and the difference.
    """
    for store in stores:
        modalities = [Modality[name.upper()] for name in store["branches"]]
        own, where = feature_record(encoder, modalities, layer), f"{store['path']} cannot be used here: "
        difference = fingerprint_difference(store["fingerprint"], own["fingerprint"])
        if difference is not None:
            raise MisconfigurationException(
                f"{where}its features are of another encoder. The store has fingerprint "
                f"{fingerprint_digest(store['fingerprint'])}, this {type(encoder).__name__} has "
                f"{fingerprint_digest(own['fingerprint'])}; they differ in {difference}. Write a store for this one."
            )
        for name in ("layer", "image_spec"):
            if store[name] != own[name]:
                raise MisconfigurationException(
                    f"{where}it was written with {name} {store[name]}, and {own[name]} is needed. Write another."
                )
        for which in modalities:
            name = which.name.lower()
            if trains and _changes(encoder, which, layer):
                raise MisconfigurationException(
                    f"{where}it holds {name} images, and this run trains the branch that makes their features. Give "
                    "their pixels: the data set without its store."
                )
            if store["branches"][name] != own["branches"][name]:
                raise MisconfigurationException(
                    f"{where}the features of its {name} images are of the branch {_say(store['branches'][name])}, and "
                    f"this encoder has {_say(own['branches'][name])}. Write a store with the same aligned=."
                )


def _say(digest: str | None) -> str:
    return "plain tower" if digest is None else digest


def _branch(encoder: ImageEncoder, which: Modality, layer: int | None) -> dict[str, Tensor]:
    """What the branch of a modality adds to the plain tower; the projections take no part in patch tokens."""
    if not isinstance(encoder, ModalityEncoder):
        return {}
    parts = [f"{which.name.lower()}_projection."] if layer is None else []
    if which is Modality.GENERATED or encoder.real_path == "adapted":
        parts.append("encoder.lora.image.")
    return {name: value for name, value in encoder.image_adapters() if name.startswith(tuple(parts))}


def _changes(encoder: ImageEncoder, which: Modality, layer: int | None) -> bool:
    matrices = [plain_parameter(t.module, t.parameter) for t in encoder.lora_targets(ROLES, "image")]
    return any(value.requires_grad for value in [*matrices, *_branch(encoder, which, layer).values()])


def _digest(encoder: ImageEncoder, which: Modality, layer: int | None) -> str | None:
    tensors = _branch(encoder, which, layer)
    if not tensors:
        return None
    assert isinstance(encoder, ModalityEncoder)
    digest = hashlib.sha256(repr(encoder.settings["alpha"]).encode())
    for name, value in sorted(tensors.items()):
        digest.update(name.encode() + value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]
