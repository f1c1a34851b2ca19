"""What a branch of one's own must hold."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch

from gmail_lightning.models.base import ImageEncoder
from gmail_lightning.models.branches.branch import Branch
from gmail_lightning.models.branches.modality import ModalityEncoder
from gmail_lightning.testing.faults import outcome, report, require
from gmail_lightning.types import Modality


def check_branch(branch: Branch, encoder: ImageEncoder) -> None:
    """Checks a ``Branch`` that belongs to no encoder yet, on a copy of one.

    Settings that a checkpoint can hold and that build it again, features of the right shape, the frozen real side bit
    for bit, gradients for all its tensors and for nothing else, and a state that reloads.

    Args:
        branch: As it is written in a recipe, before a router has it.
        encoder: A plain one that it fits.

    Raises:
        AssertionError: With one sentence per fault.
    """
    require(branch, Branch)
    report(branch, _faults(branch, encoder))


def _faults(branch: Branch, encoder: ImageEncoder) -> Iterator[str]:
    image = torch.rand(3, 3, *encoder.image_spec.size, generator=torch.Generator().manual_seed(0))
    generated = torch.full((3,), int(Modality.GENERATED))
    plain = copy.deepcopy(encoder).requires_grad_(False).eval()
    kind, given = type(branch), branch.settings
    router, faults = outcome("attach", lambda: ModalityEncoder(copy.deepcopy(encoder), branch=branch))
    yield from faults
    if faults:
        return
    with torch.no_grad():
        expected = plain.encode_image(image)
        if not torch.equal(router.encode_image(image), expected):
            yield "real images are seen otherwise than by the plain encoder: take back in off() what changes it."
    features, faults = outcome("encode_image", lambda: router.encode_image(image, generated))
    yield from faults
    if faults:
        return
    if features.shape != expected.shape:
        yield f"encode_image returns shape {tuple(features.shape)}: return (3, embed_dim={encoder.embed_dim})."
        return
    if not torch.allclose(features.detach(), expected, atol=1e-4, rtol=1e-3):
        yield "at first it sees generated images otherwise than the plain tower: begin with a map that changes nothing."
    adapters = dict(router.image_adapters())
    features.square().sum().backward()
    if dead := [name for name, p in adapters.items() if p.requires_grad and p.grad is None]:
        yield f"{len(dead)} of its tensors get no gradient, such as {dead[0]}: leave out what is not used."
    if held := [name for name, p in router.named_parameters() if p.grad is not None and name not in adapters]:
        yield f"{held[0]} gets a gradient, and is no tensor of the branch: leave the encoder frozen."
    again, faults = outcome("the class with its own settings", lambda: kind(**given))
    yield from faults
    if faults:
        return
    with torch.no_grad():
        for parameter in adapters.values():
            parameter.add_(0.05)
        reloaded = ModalityEncoder(copy.deepcopy(encoder), branch=again)
        reloaded.load_state_dict(router.state_dict())
        if not torch.allclose(
            reloaded.encode_image(image, generated), router.encode_image(image, generated), atol=1e-5
        ):
            yield "built again from settings and state it answers otherwise: keep every tensor as a parameter."
