"""Branches for generated images: LoRA on the tower, a full copy of it, and a map behind it."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager
from typing import Any, Self

import torch
from torch import Tensor, nn

from gmail_lightning.models.base import ImageEncoder
from gmail_lightning.models.branches.arguments import TextSide
from gmail_lightning.models.branches.branch import Branch
from gmail_lightning.models.branches.lora import (
    LoRAContainer,
    add_lora,
    lora_blocks,
    lora_disabled,
    merge_lora,
    merged_state,
)


class LoRA(Branch):
    """Low-rank matrices on the tower's own (arXiv 2106.09685): GMAIL's branch, and one set of weights for both.

    Its tensors stand in the encoder, as ``add_lora`` puts them.

    Args:
        rank: Rank of the matrices.
        alpha: They are scaled by ``alpha / rank``.
        targets: Roles of the adapted matrices, some of ``q k v out fc1 fc2``.
    """

    def __init__(self, rank: int = 4, alpha: float = 8.0, targets: Collection[str] = ("q", "v")) -> None:
        super().__init__()
        self.rank, self.alpha, self.targets = rank, alpha, targets

    def attach(self, encoder: ImageEncoder) -> None:
        """Adds LoRA to the image tower; raises as ``add_lora``."""
        super().attach(encoder)
        add_lora(encoder, rank=self.rank, alpha=self.alpha, targets=self.targets)

    def image_features_and_tokens(self, image: Tensor, layer: int = -2) -> tuple[Tensor, Tensor]:
        """Both as the adapted tower gives them, in one pass where it can."""
        return self.tower.image_features_and_tokens(image, layer=layer)

    def off(self) -> AbstractContextManager[None]:
        """Inside, the encoder reads its stored weights."""
        return lora_disabled(self.encoder)

    @property
    def settings(self) -> dict[str, Any]:
        """Rank, alpha and targets."""
        return {"rank": self.rank, "alpha": self.alpha, "targets": list(self.targets)}

    @property
    def unseen_settings(self) -> float:
        """Rank and targets show in the tensors, alpha does not."""
        return self.alpha

    def behind(self, block: int) -> Iterator[nn.Module | nn.Parameter]:
        """The matrices of later blocks."""
        for number, roles in lora_blocks(self.encoder).items():
            if number > block:
                yield from roles.values()

    def adapters(self) -> Iterator[nn.Module]:
        """The matrices, block by block."""
        return (factors for roles in lora_blocks(self.encoder).values() for factors in roles.values())

    def merged(self) -> dict[str, Tensor]:
        """See ``merge_lora``."""
        return merge_lora(self.encoder)

    def __repr__(self) -> str:
        return f"LoRA of rank {self.rank}"


class FullCopy(Branch):
    """A second tower that is trained in full: the row "full fine-tuning" of GMAIL's table 11.

    It starts from the weights of the plain one and shares its text tower. Weights, gradients and the state of the
    optimizer take the memory of another tower, and so does every checkpoint.
    """

    def attach(self, encoder: ImageEncoder) -> None:
        """Copies the image tower."""
        super().attach(encoder)
        try:
            shared = {id(parameter): parameter for parameter in encoder.text_parameters()}
        except NotImplementedError as error:
            raise ValueError(
                f"FullCopy copies the image tower alone, and {type(encoder).__name__} does not say what is not of it: "
                "implement text_parameters."
            ) from error
        self.copied = copy.deepcopy(encoder, dict[int, Any](shared)).eval()
        for parameter in self._own_parameters():
            parameter.requires_grad_(True)

    def _own_parameters(self) -> Iterator[nn.Parameter]:
        shared = {id(parameter) for parameter in self.encoder.parameters()}
        return (parameter for parameter in self.copied.parameters() if id(parameter) not in shared)

    def train(self, mode: bool = True) -> Self:
        """The copy stays in eval, as the plain tower does."""
        super().train(mode)
        for module in self.children():
            module.eval()
        return self

    @property
    def tower(self) -> ImageEncoder:
        """The copy."""
        return self.copied

    def image_features_and_tokens(self, image: Tensor, layer: int = -2) -> tuple[Tensor, Tensor]:
        """Both as the copy gives them, in one pass where it can."""
        return self.tower.image_features_and_tokens(image, layer=layer)

    @property
    def settings(self) -> dict[str, Any]:
        """None."""
        return {}

    def merged(self) -> dict[str, Tensor]:
        """The image tower of the copy, beside the text tower of the encoder."""
        own = {id(parameter) for parameter in self._own_parameters()}
        own |= {id(buffer) for buffer in self.copied.buffers()}
        copied = self.copied.wrapped.state_dict(keep_vars=True)
        images = {name: tensor.detach() for name, tensor in copied.items() if id(tensor) in own}
        return {**merged_state(self.encoder), **images}

    def __repr__(self) -> str:
        return "full copy"


class Projection(nn.Linear):
    """A map D to D behind a tower, without bias, from the identity."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, bias=False)
        nn.init.eye_(self.weight)

    def forward(self, features: Tensor) -> Tensor:
        """Maps (B, D) to (B, D), in fp32, so that the identity changes nothing under autocast either."""
        with torch.autocast(features.device.type, enabled=False):
            return super().forward(features.float()).to(features.dtype)


def open_text_side(encoder: ImageEncoder, text_side: TextSide, rank: int, targets: Collection[str]) -> None:
    """Adds what of the text tower is trained within it, and lets it train.

    Raises:
        TypeError: If there is no text tower.
    """
    if text_side != "frozen" and encoder.text_spec is None:
        raise TypeError(f"{type(encoder).__name__} has no text tower: leave text_side out, or give a DualEncoder.")
    if text_side == "lora":
        add_lora(encoder, rank=rank, alpha=2.0 * rank, targets=targets, tower="text")
    elif text_side == "full":
        for parameter in encoder.text_parameters():
            parameter.requires_grad_(True)


#: Modules whose tensors a checkpoint always holds.
ADAPTERS = (LoRAContainer, Branch, Projection)


def adapter_ids(module: nn.Module) -> set[int]:
    """Identities of the tensors, buffers too, that adapters within a module hold and no other part of it does."""
    inside = {id(t) for m in module.modules() if isinstance(m, ADAPTERS) for t in (*m.parameters(), *m.buffers())}
    return inside - {id(tensor) for tensor in _beside_adapters(module)}


def adapter_keys(module: nn.Module) -> set[str]:
    """Names of these tensors in the state dict of a module."""
    with torch.enable_grad():  # as ``state_dict`` is read elsewhere: parametrized tables are put together in it
        state = module.state_dict(keep_vars=True)
    ids = adapter_ids(module)
    return {name for name, tensor in state.items() if id(tensor) in ids}


def _beside_adapters(module: nn.Module) -> Iterator[Tensor]:
    yield from (*module.parameters(recurse=False), *module.buffers(recurse=False))
    for child in module.children():
        if not isinstance(child, ADAPTERS):
            yield from _beside_adapters(child)
