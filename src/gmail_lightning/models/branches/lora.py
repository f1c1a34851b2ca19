"""Low-rank adaptation as a parametrization that leaves the weights alone, so one tower is two exact branches.

LoRA: Hu et al., https://arxiv.org/abs/2106.09685. ``W`` becomes ``W + alpha / rank * B @ A`` whenever it is read, the
stored ``W`` never changes, and with LoRA off the stored parameter itself is read.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gmail_lightning.models.base import ROLES, ImageEncoder, LoRATarget, Tower
from gmail_lightning.models.branches.state import rename_state

# Where each role lives in a block of open_clip, timm or transformers: (path of the module, name of the parameter).
_FUSED = (("attn", "in_proj_weight"), ("attn.qkv", "weight"))
_SINGLE = {
    "q": ("attn.q_proj", "self_attn.q_proj"),
    "k": ("attn.k_proj", "self_attn.k_proj"),
    "v": ("attn.v_proj", "self_attn.v_proj"),
    "out": ("attn.out_proj", "attn.proj", "self_attn.out_proj"),
    "fc1": ("mlp.c_fc", "mlp.fc1"),
    "fc2": ("mlp.c_proj", "mlp.fc2"),
}
_ORIGINAL = re.compile(r"parametrizations\.(\w+)\.original$")


def add_lora(
    encoder: ImageEncoder,
    *,
    rank: int = 4,
    alpha: float = 8.0,
    targets: Collection[str] = ("q", "v"),
    tower: Tower = "image",
) -> None:
    """Adds LoRA to one tower, in place and switched on, and freezes all else but LoRA of the other tower.

    The new tensors stand in ``encoder.lora`` and in its state dict as ``lora.<tower>.<block>.<role>.A`` and ``.B``;
    all other keys stay those of the plain encoder.

    Args:
        encoder: Encoder with weights in fp32.
        rank: Rows of ``A``.
        alpha: ``B @ A`` is scaled by ``alpha / rank``.
        targets: Roles to adapt, some of ``q k v out fc1 fc2``.
        tower: ``image`` or ``text``.

    Raises:
        ValueError: If a role is unknown or the tower does not offer it, if the tower has LoRA already, or if its
            weights are in half precision.
    """
    matched = _match(encoder, targets, tower)
    if rank < 1:
        raise ValueError(f"rank={rank}: LoRA needs a rank of at least 1.")
    container = getattr(encoder, "lora", None)
    if not isinstance(container, LoRAContainer):
        container = encoder.lora = LoRAContainer()
        rename_state(encoder, _plain_name, _stored_name)
    if tower in container:
        raise ValueError(f"The {tower} tower of this {type(encoder).__name__} has LoRA already.")

    blocks = container[tower] = nn.ModuleDict()
    weights: dict[tuple[int, str], LoRAWeight] = {}
    for target in matched:
        weight = plain_parameter(target.module, target.parameter)
        if torch.finfo(weight.dtype).bits < 32:
            raise ValueError(
                f"{tower} block {target.block}, {target.role}: LoRA needs weights in fp32, got {weight.dtype}. "
                "Load the encoder in fp32 and use autocast (precision: bf16-mixed)."
            )
        factors = LowRank(target.stop - target.start, weight.shape[1], rank, weight)
        if str(target.block) not in blocks:
            blocks[str(target.block)] = nn.ModuleDict()
        cast(nn.ModuleDict, blocks[str(target.block)])[target.role] = factors
        key = (id(target.module), target.parameter)
        if key not in weights:
            weights[key] = LoRAWeight(alpha / rank, container.switch)
            parametrize.register_parametrization(target.module, target.parameter, weights[key])
        weights[key].slices.append((target.start, target.stop, factors))

    adapters = {id(parameter) for parameter in container.parameters()}
    for parameter in encoder.parameters():
        if id(parameter) not in adapters:
            parameter.requires_grad_(False)


@contextmanager
def lora_disabled(encoder: ImageEncoder) -> Iterator[None]:
    """Inside, every adapted weight reads as the stored parameter itself: the plain encoder, bit for bit.

    Keep backward passes outside: what activation checkpointing recomputes must see the branch that it saw first.
    """
    container = getattr(encoder, "lora", None)
    if not isinstance(container, LoRAContainer):
        yield
        return
    before, container.switch.enabled = container.switch.enabled, False
    try:
        yield
    finally:
        container.switch.enabled = before


def merge_lora(encoder: ImageEncoder) -> dict[str, Tensor]:
    """Returns the state dict of the plain model with ``W + alpha / rank * B @ A`` in place of ``W``.

    The encoder is not changed. Keys are those of ``encoder.wrapped``: the open_clip or Hugging Face model inside, or
    the encoder itself where it wraps none.

    Raises:
        ValueError: If the encoder has no LoRA.
    """
    if not isinstance(getattr(encoder, "lora", None), LoRAContainer):
        raise ValueError(
            f"This {type(encoder).__name__} has no LoRA: call add_lora first (of a ModalityEncoder: .encoder)."
        )
    return merged_state(encoder)


def merged_state(encoder: ImageEncoder) -> dict[str, Tensor]:
    """As ``merge_lora``; without LoRA, in one tower or in both, their weights as they are."""
    model = encoder.wrapped
    merged = {}
    for key, tensor in model.state_dict().items():
        if key.startswith("lora."):
            continue
        key = _plain_name(model, key)  # the wrapped model itself has no hooks: its keys are those of torch
        path, _, name = key.rpartition(".")
        module = model.get_submodule(path)
        if parametrize.is_parametrized(module, name):
            with torch.no_grad():
                tensor = getattr(module, name)
        merged[key] = tensor
    return merged


def lora_blocks(encoder: ImageEncoder, tower: Tower = "image") -> dict[int, dict[str, LowRank]]:
    """Returns the factors of a tower by block and role; empty where it has no LoRA."""
    container = getattr(encoder, "lora", None)
    blocks: Any = container[tower] if isinstance(container, LoRAContainer) and tower in container else {}
    return {int(number): dict(roles.items()) for number, roles in blocks.items()}


def block_targets(blocks: Iterable[nn.Module], roles: Collection[str]) -> list[LoRATarget]:
    """Finds the matrices of the given roles in transformer blocks of open_clip, timm or transformers.

    Roles that a block does not have are left out.
    """
    found = []
    for index, block in enumerate(blocks):
        for role in (role for role in ROLES if role in roles):
            fused = next((target for target in _FUSED if _has(block, *target)), None) if role in "qkv" else None
            if fused is not None:
                module = block.get_submodule(fused[0])
                rows = plain_parameter(module, fused[1]).shape[0] // 3
                start = rows * "qkv".index(role)
                found.append(LoRATarget(index, role, module, fused[1], start, start + rows))
                continue
            path = next((path for path in _SINGLE[role] if _has(block, path, "weight")), None)
            if path is not None:
                module = block.get_submodule(path)
                rows = plain_parameter(module, "weight").shape[0]
                found.append(LoRATarget(index, role, module, "weight", 0, rows))
    return found


def plain_parameter(module: nn.Module, name: str) -> Tensor:
    """Returns a stored parameter, whether it is adapted or not."""
    if parametrize.is_parametrized(module, name):
        return cast(Tensor, cast(Any, module).parametrizations[name].original)
    return cast(Tensor, getattr(module, name))


def _has(block: nn.Module, path: str, parameter: str) -> bool:
    module: Any = block
    for name in path.split("."):
        module = getattr(module, name, None)
    if not isinstance(module, nn.Module):
        return False
    return parametrize.is_parametrized(module, parameter) or isinstance(getattr(module, parameter, None), nn.Parameter)


def _match(encoder: ImageEncoder, targets: Collection[str], tower: Tower) -> list[LoRATarget]:
    if isinstance(targets, str):
        raise ValueError(f"targets={targets!r}: give a list of roles, such as {list(targets.split())}.")
    unknown = sorted(set(targets) - set(ROLES))
    if unknown or not targets:
        raise ValueError(f"targets={list(targets)}: unknown or no role {unknown}. Known roles: {', '.join(ROLES)}.")
    matched = encoder.lora_targets(targets, tower)
    missing = set(targets) - {target.role for target in matched}
    if missing:
        roles = {target.role for target in encoder.lora_targets(ROLES, tower)}
        offered = ", ".join(role for role in ROLES if role in roles) or "none (it has no transformer blocks)"
        raise ValueError(
            f"targets={list(targets)}: the {tower} tower of this {type(encoder).__name__} has no "
            f"{', '.join(sorted(missing))}. It offers: {offered}."
        )
    return matched


def _plain_name(encoder: nn.Module, name: str) -> str:
    """``...parametrizations.weight.original`` is ``...weight`` in a state dict."""
    return _ORIGINAL.sub(r"\1", name)


def _stored_name(encoder: nn.Module, name: str) -> str:
    """The way back, where the matrix of this name is adapted."""
    path, _, last = name.rpartition(".")
    host: Any = encoder
    for part in path.split(".") if path else ():
        host = getattr(host, part, None)
    is_stored_apart = isinstance(host, nn.Module) and parametrize.is_parametrized(host, last)
    return f"{path}.parametrizations.{last}.original".removeprefix(".") if is_stored_apart else name


@dataclass
class Switch:
    """Whether the LoRA of one encoder is on; shared by all its weights."""

    enabled: bool = True


class LoRAContainer(nn.ModuleDict):
    """The adapters of one encoder: tower, block, role."""

    def __init__(self) -> None:
        super().__init__()
        self.switch = Switch()


class LowRank(nn.Module):
    """The factors of one matrix: A (rank, in) is random with variance 1 / in, B (out, rank) is zero."""

    def __init__(self, rows: int, columns: int, rank: int, like: Tensor) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.randn(rank, columns, device=like.device, dtype=like.dtype) * columns**-0.5)
        self.B = nn.Parameter(torch.zeros(rows, rank, device=like.device, dtype=like.dtype))


class LoRAWeight(nn.Module):
    """Parametrization of one stored matrix, whose row slices may each have factors of their own."""

    def __init__(self, scale: float, switch: Switch) -> None:
        super().__init__()
        self.scale, self.switch = scale, switch
        self.slices: list[tuple[int, int, LowRank]] = []  # a plain list: the factors are registered in encoder.lora

    def forward(self, weight: Tensor) -> Tensor:
        """Maps the stored matrix (out, in) to the effective one."""
        if not self.switch.enabled:
            return weight
        if torch.finfo(weight.dtype).bits < 32:
            raise TypeError(f"LoRA needs weights in fp32, got {weight.dtype}: use autocast (precision: bf16-mixed).")
        with torch.autocast(weight.device.type, enabled=False):  # the sum is formed in fp32, and rounded once
            rows, end = [], 0
            for start, stop, factors in self.slices:
                rows.append(weight[end:start])
                rows.append(torch.addmm(weight[start:stop], factors.B, factors.A, alpha=self.scale))
                end = stop
            rows.append(weight[end:])
            rows = [part for part in rows if len(part)]
            return torch.cat(rows) if len(rows) > 1 else rows[0]
