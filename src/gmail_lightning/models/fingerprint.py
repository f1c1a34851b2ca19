"""Fingerprint of a base: enough statistics to tell whether an adapter was trained on these very weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gmail_lightning.models.base import ROLES, ImageEncoder, Tower
from gmail_lightning.models.lora import plain_parameter

#: Relative to the standard deviation of a matrix; rounding to bf16 moves the statistics by about a tenth of it.
TOLERANCE = 2**-7
STATISTICS = ("mean", "standard deviation", "wave")


def fingerprint(encoder: ImageEncoder, towers: Sequence[Tower] = ("image",)) -> dict[str, Any]:
    """Describes the stored weights of an encoder in plain values; LoRA does not count, merged or not.

    Each matrix gives its mean, its standard deviation and its *wave*, the sum of all n entries times cos(0), cos(1),
    ... over sqrt(n / 2): the first two are alike for any two models of a kind, the wave is not. Fused and separate
    projections, and so the open_clip and Hugging Face forms of one tower, have the same fingerprint.

    Args:
        encoder: The encoder, adapted or plain.
        towers: Towers to describe.

    Returns:
        ``activation``, ``mean`` and ``std`` of the pixels, ``towers``, and ``weights``: three numbers per
        ``<tower>.<block>.<role>``.
    """
    matrices = {
        f"{tower}.{target.block}.{target.role}": plain_parameter(target.module, target.parameter).detach()[
            target.start : target.stop
        ]
        for tower in towers
        for target in encoder.lora_targets(ROLES, tower)
    }
    return {
        "activation": encoder.activation,
        "mean": [float(value) for value in encoder.mean],
        "std": [float(value) for value in encoder.std],
        "towers": list(towers),
        "weights": _statistics(matrices),
    }


def frozen_weights(module: nn.Module, count: int = 8, size: int = 2**20) -> dict[str, list[float]]:
    """Statistics, as in ``fingerprint``, of matrices that do not train: what a checkpoint without them leans on.

    Args:
        module: A part of a task that is no encoder, such as a language model.
        count: At most so many matrices, evenly spread over the module.
        size: At most so many entries of each.
    """
    frozen = [(name, p) for name, p in module.named_parameters() if p.ndim == 2 and not p.requires_grad]
    chosen = frozen[:: max(1, -(-len(frozen) // count))]
    return _statistics({name: p.detach().flatten()[:size] for name, p in chosen})


def _statistics(matrices: dict[str, Tensor]) -> dict[str, list[float]]:
    waves: dict[int, Tensor] = {}
    found = {}
    for name, matrix in matrices.items():
        values = matrix.float().cpu().flatten()
        if len(values) not in waves:
            waves[len(values)] = torch.arange(len(values), dtype=torch.float64).cos().float()
        wave = (values @ waves[len(values)]) * (2 / len(values)) ** 0.5
        found[name] = [float(value) for value in (values.mean(), values.std(), wave)]
    return found


def fingerprint_difference(first: dict[str, Any], second: dict[str, Any]) -> str | None:
    """Says in one sentence how two fingerprints differ beyond bf16 rounding; None if they do not."""
    if _family(first["activation"]) != _family(second["activation"]):
        return f"activation {first['activation']!r} against {second['activation']!r}"
    for name in ("mean", "std"):
        if any(abs(a - b) > 1e-3 for a, b in zip(first[name], second[name], strict=True)):
            return f"pixel {name} {first[name]} against {second[name]}"
    return weights_difference(first["weights"], second["weights"])


def weights_difference(first: dict[str, list[float]], second: dict[str, list[float]]) -> str | None:
    """Says in one sentence how the statistics of matrices differ beyond bf16 rounding; None if they do not."""
    if first.keys() != second.keys():
        only = sorted(first.keys() ^ second.keys())
        return f"{len(only)} matrices that only one of them has: {', '.join(only[:6])}"
    differing = [
        (abs(a - b) / max(first[key][1], second[key][1], 1e-12), key, name, a, b)
        for key in first
        for name, a, b in zip(STATISTICS, first[key], second[key], strict=True)
    ]
    beyond = [entry for entry in differing if not entry[0] <= TOLERANCE]
    if not beyond:
        return None
    _, key, name, a, b = max(beyond)
    count = len({entry[1] for entry in beyond})
    return f"{count} of {len(first)} matrices, most in {key}: {name} {a:.5g} against {b:.5g}"


def fingerprint_digest(value: dict[str, Any]) -> str:
    """Returns twelve characters that stand for a fingerprint in a message."""
    rounded = {key: [f"{number:.2e}" for number in numbers] for key, numbers in value["weights"].items()}
    text = json.dumps([value["activation"], value["mean"], value["std"], rounded], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _family(activation: str) -> str:
    """SigLIP runs with the exact GELU in timm and with its tanh form in transformers: one tower all the same."""
    return "gelu" if activation == "gelu_tanh" else activation
