"""Fingerprint of a base: enough statistics to tell whether an adapter was trained on these very weights."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from gmail_lightning.models.base import ImageEncoder, Tower
from gmail_lightning.models.branches.lora import lora_disabled
from gmail_lightning.models.branches.tensor_names import stored_tensors
from gmail_lightning.models.weights import plain_names

#: Relative to the root mean square of a tensor; rounding to bf16 moves the statistics by about a sixth of it.
TOLERANCE = 0.01
SMALLEST = 1e-5  # root mean square; below it fp16 has few digits, and no feature depends on it
STATISTICS = ("mean", "standard deviation", "wave 1", "wave 2", "wave 3", "wave 4")
EARLIER = "is of an earlier release and covers some matrices only, which proves nothing. Run again what wrote it"
POSITIONS = ("text.positional_embedding", "text.positional_embedding_res")
PERIOD = 65521  # of the waves; a prime, so that no row length divides it
#: What rounding to bf16 and another device leave of a feature: the smallest cosine, the largest change of the norm.
COSINE, NORM = 0.999, 0.02


def fingerprint(
    encoder: ImageEncoder, towers: Sequence[Tower] = ("image",), kept: Collection[str] = ()
) -> dict[str, Any]:
    """Describes the stored weights of an encoder in plain values; LoRA does not count, merged or not.

    Every tensor gives its mean, its standard deviation and four *waves*, sums of its n entries times cos(f i) over
    sqrt(n / 2): the first two are alike for any two models of a kind, the waves are not. Fused and separate
    projections, and so the open_clip and Hugging Face forms of one tower, have the same fingerprint.

    Args:
        encoder: The encoder, adapted or plain.
        towers: Towers to describe.
        kept: Keys of the plain encoder's state dict to leave out, because they train.

    Returns:
        ``activation``, ``mean`` and ``std`` of the pixels; ``dual``, whether there is a text tower, and its
        ``context_length``; ``towers``, those with anything to describe; ``weights``: the statistics by the names of
        ``stored_tensors``; ``trained``: the names left out; ``probe``: features of a fixed image, None where the image
        tower is not described in full.
    """
    plain = encoder.plain
    tensors = {n: entry for n, entry in stored_tensors(plain).items() if n.partition(".")[0] in towers}
    weights = tensor_statistics({name: tensor for name, (key, tensor) in tensors.items() if key not in kept})
    trained = sorted(tensors.keys() - weights.keys())
    found = {name.partition(".")[0] for name in weights}
    whole = "image" in found and not any(name.startswith("image.") for name in trained)
    return {
        "activation": plain.activation,
        "mean": [float(value) for value in plain.mean],
        "std": [float(value) for value in plain.std],
        "dual": plain.text_spec is not None,
        "context_length": None if plain.text_spec is None else plain.text_spec.context_length,
        "towers": [tower for tower in towers if tower in found],
        "weights": weights,
        "trained": trained,
        "probe": _probe(encoder) if whole else None,
    }


def tensor_statistics(tensors: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """The numbers of ``STATISTICS`` of each tensor."""
    found = {}
    for name, tensor in tensors.items():
        values = tensor.detach().float().flatten()
        rows = len(values) // PERIOD
        folded = values.new_zeros(PERIOD) if rows == 0 else values[: rows * PERIOD].view(rows, PERIOD).sum(dim=0)
        folded[: len(values) - rows * PERIOD] += values[rows * PERIOD :]
        waves = (_waves().to(values.device) @ folded) * (2 / max(len(values), 1)) ** 0.5
        found[name] = [*map(float, (values.mean(), values.std(correction=0))), *waves.tolist()]
    return found


@cache
def _waves() -> Tensor:
    frequencies = torch.tensor([1.0, 2.0, 3.0, 5.0], dtype=torch.float64).sqrt()
    return (frequencies[:, None] * torch.arange(PERIOD)).cos().float()


def frozen_weights(module: nn.Module) -> dict[str, list[float]]:
    """``tensor_statistics`` of the parameters that do not train: what a checkpoint without them leans on.

    Args:
        module: A part of a task that is no encoder, such as a language model.
    """
    frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad}
    return tensor_statistics(plain_names(frozen))


def fixed_image(encoder: ImageEncoder) -> Tensor:
    """An image (1, 3, H, W) that depends on nothing but its size."""
    height, width = encoder.image_spec.size
    # Of faint texture: a strong one hides the scale of the patch embedding behind the norm that follows it.
    pixels = 0.5 + 0.1 * torch.arange(3 * height * width, dtype=torch.float64).cos()
    return pixels.view(1, 3, height, width).to(encoder.plain.get_buffer("pixel_mean"))


def _probe(encoder: ImageEncoder) -> list[float]:
    plain, image = encoder.plain, fixed_image(encoder)
    training = [module for module in plain.modules() if module.training]
    plain.eval()
    try:
        with (
            torch.no_grad(),
            torch.autocast(image.device.type, enabled=False),
            encoder.plain_only(),
            lora_disabled(plain),
        ):
            features = plain.encode_image(image)
    finally:
        for module in training:
            module.training = True
    return [float(f"{value:.6g}") for value in features.double().flatten().tolist()]


def probe_difference(first: Sequence[float], second: Sequence[float]) -> str | None:
    """Says how the features of the fixed image differ beyond rounding; None if they do not."""
    if len(first) != len(second):
        return f"have width {len(first)} there and {len(second)} here"
    a, b = torch.tensor(first, dtype=torch.float64), torch.tensor(second, dtype=torch.float64)
    cosine, ratio = float(a @ b / (a.norm() * b.norm())), float(b.norm() / a.norm())
    if cosine >= COSINE and abs(math.log(ratio)) <= NORM:
        return None
    return f"have cosine {cosine:.4f} between there and here, and {ratio:.4g} times the norm here"


def fingerprint_difference(first: dict[str, Any], second: dict[str, Any]) -> str | None:
    """Says in one sentence how two fingerprints differ beyond bf16 rounding; None if they do not.

    An image tower alone is compared with that of a dual encoder without the joint space, which it does not have, and a
    text tower whose context was stretched with the one before without the positions.
    """
    if "trained" not in first or "trained" not in second:
        return f"their form: one {EARLIER}"
    if _family(first["activation"]) != _family(second["activation"]):
        return f"activation {first['activation']!r} against {second['activation']!r}"
    for name in ("mean", "std"):
        if any(abs(a - b) > 1e-3 for a, b in zip(first[name], second[name], strict=True)):
            return f"pixel {name} {first[name]} against {second[name]}"
    towers = set(first["towers"]) & set(second["towers"])
    if not towers:
        return f"the towers that are described, {first['towers']} against {second['towers']}"
    alone = first["dual"] != second["dual"]
    left_out = {*first["trained"], *second["trained"], *(("image.proj", "image.proj.bias") if alone else ())}
    if first.get("context_length") != second.get("context_length"):
        left_out |= {name for each in (first, second) for name in each["weights"] if name in POSITIONS}
    weights = [
        {n: value for n, value in each["weights"].items() if n.partition(".")[0] in towers and n not in left_out}
        for each in (first, second)
    ]
    difference = weights_difference(*weights)
    if difference is None and not alone and first["probe"] is not None and second["probe"] is not None:
        difference = probe_difference(first["probe"], second["probe"])
        difference = None if difference is None else f"the features of a fixed image, which {difference}"
    return difference


def weights_difference(first: dict[str, list[float]], second: dict[str, list[float]]) -> str | None:
    """Says in one sentence how the statistics of tensors differ beyond bf16 rounding; None if they do not."""
    both = sorted(first.keys() & second.keys())
    if short := [key for key in both if {len(first[key]), len(second[key])} != {len(STATISTICS)}]:
        return f"the form of {short[0]}: one {EARLIER}"
    if first.keys() != second.keys():
        only = sorted(first.keys() ^ second.keys())
        return f"{len(only)} tensors that only one of them has: {', '.join(only[:6])}"
    differing = [
        (abs(a - b) / max(math.hypot(*first[key][:2]), math.hypot(*second[key][:2]), SMALLEST), key, name, a, b)
        for key in first
        for name, a, b in zip(STATISTICS, first[key], second[key], strict=True)
        if a != b and not (math.isnan(a) and math.isnan(b))  # a causal mask is infinite in both
    ]
    beyond = [entry for entry in differing if not entry[0] <= TOLERANCE]
    if not beyond:
        return None
    _, key, name, a, b = max(beyond)
    count = len({entry[1] for entry in beyond})
    return f"{count} of {len(first)} tensors, most in {key}: {name} {a:.5g} against {b:.5g}"


def fingerprint_digest(value: dict[str, Any]) -> str:
    """Returns twelve characters that stand for a fingerprint in a message."""
    rounded = {key: [f"{number:.2e}" for number in numbers] for key, numbers in value["weights"].items()}
    text = json.dumps([value["activation"], value["mean"], value["std"], rounded], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _family(activation: str) -> str:
    """SigLIP runs with the exact GELU in timm and with its tanh form in transformers: one tower all the same."""
    return "gelu" if activation == "gelu_tanh" else activation
