"""What cached features depend on besides the images, and whether an encoder would still make the same."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import Any, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from gmail_lightning.models.base import DualEncoder, ImageEncoder
from gmail_lightning.models.branches.fingerprint import (
    fingerprint,
    fingerprint_difference,
    fingerprint_digest,
    fixed_image,
    probe_difference,
)
from gmail_lightning.models.branches.modality import ModalityEncoder
from gmail_lightning.types import Modality


def feature_record(encoder: ImageEncoder, modalities: Collection[Modality], layer: int | None) -> dict[str, Any]:
    """Describes the features of an encoder in plain values.

    Args:
        encoder: Makes the features.
        modalities: Of the images.
        layer: Of the patch tokens, None for pooled features.

    Returns:
        ``fingerprint`` of the plain tower, ``branches``: per modality a digest of what its branch adds to the tower,
        None for nothing; ``layer`` and ``image_spec``; ``probe``: per modality the features (D,) of a fixed image, of
        tokens (T, W) their mean (W,), through the branch of each.
    """
    return {
        "fingerprint": fingerprint(encoder, ("image",)),
        "branches": {which.name.lower(): _digest(encoder, which, layer) for which in sorted(modalities)},
        "layer": layer,
        "image_spec": {**asdict(encoder.image_spec), "size": list(encoder.image_spec.size)},
        "probe": {which.name.lower(): _probe(encoder, which, layer) for which in sorted(modalities)},
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
    own = feature_record(encoder, {Modality[name.upper()] for store in stores for name in store["branches"]}, layer)
    for store in stores:
        where = f"{store['path']} cannot be used here: "
        for name in ("layer", "image_spec"):
            if store[name] != own[name]:
                raise MisconfigurationException(
                    f"{where}it was written with {name} {store[name]}, and {own[name]} is needed. Write another."
                )
        difference = fingerprint_difference(store["fingerprint"], own["fingerprint"])
        if difference is not None:
            raise MisconfigurationException(
                f"{where}its features are of another encoder. The store has fingerprint "
                f"{fingerprint_digest(store['fingerprint'])}, this {type(encoder).__name__} has "
                f"{fingerprint_digest(own['fingerprint'])}; they differ in {difference}. Write a store for this one."
            )
        for name in store["branches"]:
            if trains and _changes(encoder, Modality[name.upper()], layer):
                raise MisconfigurationException(
                    f"{where}it holds {name} images, and this run trains the branch that makes their features. Give "
                    "their pixels: the data set without its store."
                )
            if store["branches"][name] != own["branches"][name]:
                raise MisconfigurationException(
                    f"{where}the features of its {name} images are of the branch {_say(store['branches'][name])}, and "
                    f"this encoder has {_say(own['branches'][name])}. Write a store with the same aligned=."
                )
            difference = probe_difference(store["probe"][name], own["probe"][name])
            if difference is not None:
                raise MisconfigurationException(
                    f"{where}its features are of another encoder. The {name} features of a fixed image {difference}, "
                    "though the weights of the tower agree. Write a store for this encoder."
                )


def _probe(encoder: ImageEncoder, which: Modality, layer: int | None) -> list[float]:
    """Features of a fixed image, in eval mode and without autocast, to six digits."""
    image = fixed_image(encoder)
    branch = {"modality": torch.tensor([which], device=image.device)} if isinstance(encoder, ModalityEncoder) else {}
    training = [module for module in encoder.modules() if module.training]
    encoder.eval()
    try:
        with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
            if layer is None:
                features = encoder.encode_image(image, **branch)
            else:
                features = encoder.image_tokens(image, layer=layer, **cast(Any, branch))
    finally:
        for module in training:
            module.training = True
    return [float(f"{value:.6g}") for value in features.double().flatten(0, -2).mean(dim=0).tolist()]


def _say(digest: str | None) -> str:
    return "plain tower" if digest is None else digest


def _branch(encoder: ImageEncoder, which: Modality, layer: int | None) -> dict[str, Tensor]:
    """What the branch of a modality adds to the plain tower; the projections take no part in patch tokens."""
    if not isinstance(encoder, ModalityEncoder):
        return {}
    return dict(encoder.branch_adapters(which, pooled=layer is None))


def _changes(encoder: ImageEncoder, which: Modality, layer: int | None) -> bool:
    """Whether the run trains what makes the features: the branch of the modality, or the tower below it."""
    plain = encoder.encoder if isinstance(encoder, ModalityEncoder) else encoder
    tower = [value for name, value in plain.named_parameters() if not name.startswith("lora.")]
    return any(v.requires_grad for v in [*_without_text(plain, tower), *_branch(encoder, which, layer).values()])


def _without_text(encoder: ImageEncoder, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """Those of the image tower; all where the encoder does not say which are of the text tower."""
    try:
        text = {id(value) for value in encoder.text_parameters()} if isinstance(encoder, DualEncoder) else set()
    except NotImplementedError:
        text = set()
    return [value for value in parameters if id(value) not in text]


def _digest(encoder: ImageEncoder, which: Modality, layer: int | None) -> str | None:
    tensors = _branch(encoder, which, layer)
    if not tensors:
        return None
    assert isinstance(encoder, ModalityEncoder)
    digest = hashlib.sha256(repr(encoder.settings["alpha"]).encode())
    for name, value in sorted(tensors.items()):
        digest.update(name.encode() + value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]
