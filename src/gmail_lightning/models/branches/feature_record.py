"""What cached features depend on besides the images, and whether an encoder would still make the same."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from gmail_lightning.models.base import ImageEncoder, ImageReader
from gmail_lightning.models.branches.adapters import adapter_ids
from gmail_lightning.models.branches.fingerprint import (
    fingerprint,
    fingerprint_difference,
    fingerprint_digest,
    fixed_image,
    probe_difference,
)
from gmail_lightning.models.branches.modality import ModalityEncoder
from gmail_lightning.types import Modality


def feature_record(encoder: ModalityEncoder, modalities: Collection[Modality], reader: ImageReader) -> dict[str, Any]:
    """Describes the features of an encoder in plain values.

    Args:
        encoder: Makes the features.
        modalities: Of the images.
        reader: What is read of an image.

    Returns:
        ``fingerprint`` of the plain tower, ``branches``: per modality a digest of what its branch adds to the tower,
        None for nothing; ``layer`` and ``image_spec``; ``probe``: per modality the features (D,) of a fixed image, of
        tokens (T, W) their mean (W,), through the branch of each.
    """
    return {
        "fingerprint": fingerprint(encoder, ("image",)),
        "branches": {which.name.lower(): _digest(encoder, which, reader) for which in sorted(modalities)},
        "layer": reader.layer,
        "image_spec": {**asdict(encoder.image_spec), "size": list(encoder.image_spec.size)},
        "probe": {which.name.lower(): _probe(encoder, which, reader) for which in sorted(modalities)},
    }


def refuse_other_features(
    encoder: ModalityEncoder, stores: Sequence[dict[str, Any]], reader: ImageReader, trains: bool
) -> None:
    """Refuses features that this encoder would not make.

    Args:
        encoder: The encoder in use.
        stores: Records of the stores, each with its ``path``.
        reader: What the task reads of an image.
        trains: Whether the run changes trainable tensors.

    Raises:
        MisconfigurationException: Naming the store and the difference.
    """
    own = feature_record(encoder, {Modality[name.upper()] for store in stores for name in store["branches"]}, reader)
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
                f"{fingerprint_digest(store['fingerprint'])}, this {type(encoder.plain).__name__} has "
                f"{fingerprint_digest(own['fingerprint'])}; they differ in {difference}. Write a store for this one."
            )
        for name in store["branches"]:
            if trains and _changes(encoder, Modality[name.upper()], reader):
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


def _probe(encoder: ModalityEncoder, which: Modality, reader: ImageReader) -> list[float]:
    """Features of a fixed image, in eval mode and without autocast, to six digits."""
    image = fixed_image(encoder)
    modality = torch.tensor([which], device=image.device)
    training = [module for module in encoder.modules() if module.training]
    encoder.eval()
    try:
        with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
            features = encoder.route(reader.read, image, modality)
    finally:
        for module in training:
            module.training = True
    return [float(f"{value:.6g}") for value in features.double().flatten(0, -2).mean(dim=0).tolist()]


def _say(digest: str | None) -> str:
    return "plain tower" if digest is None else digest


def _branch(encoder: ModalityEncoder, which: Modality, reader: ImageReader) -> dict[str, Tensor]:
    """What the branch of a modality adds to the plain tower; the projections take no part in patch tokens."""
    return dict(encoder.branch_adapters(which, pooled=reader.layer is None))


def _changes(encoder: ModalityEncoder, which: Modality, reader: ImageReader) -> bool:
    """Whether the run trains what makes the features: the branch of the modality, or the tower below it."""
    adapters = adapter_ids(encoder)
    tower = [value for value in encoder.plain.parameters() if id(value) not in adapters]
    return any(v.requires_grad for v in [*_without_text(encoder, tower), *_branch(encoder, which, reader).values()])


def _without_text(encoder: ImageEncoder, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """Those of the image tower; all where the encoder does not say which are of the text tower."""
    try:
        text = {id(value) for value in encoder.text_parameters()}
    except NotImplementedError:
        text = set()
    return [value for value in parameters if id(value) not in text]


def _digest(encoder: ModalityEncoder, which: Modality, reader: ImageReader) -> str | None:
    tensors = _branch(encoder, which, reader)
    if not tensors:
        return None
    digest = hashlib.sha256(repr(encoder.branch.unseen_settings if encoder.branch else None).encode())
    for name, value in sorted(tensors.items()):
        digest.update(name.encode() + value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]
