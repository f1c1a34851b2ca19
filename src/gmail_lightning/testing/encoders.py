"""What an encoder of one's own must hold."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gmail_lightning.models.base import ROLES, DualEncoder, ImageEncoder
from gmail_lightning.models.branches.adapters import LoRA
from gmail_lightning.models.branches.modality import ModalityEncoder
from gmail_lightning.testing.faults import CAPTIONS, outcome, reload_faults, report, require
from gmail_lightning.types import Modality


def check_encoder(encoder: ImageEncoder) -> None:
    """Checks an ``ImageEncoder`` or ``DualEncoder``.

    Shapes and dtypes, no rows, rows that do not depend on one another, determinism, a state that reloads, what goes to
    the data workers, LoRA targets, the frozen branch bit for bit, and gradients of the generated one. An encoder that
    lists no LoRA targets passes: it can be probed and evaluated, not aligned.

    Raises:
        AssertionError: With one sentence per fault.
    """
    require(encoder, ImageEncoder)
    report(encoder, _encoder_faults(copy.deepcopy(encoder).eval()))


def _encoder_faults(encoder: ImageEncoder) -> Iterator[str]:
    image = torch.rand(3, 3, *encoder.image_spec.size, generator=torch.Generator().manual_seed(0))
    given = image.clone()
    features, faults = outcome("encode_image", lambda: encoder.encode_image(image).detach())
    yield from faults
    if faults:
        return
    yield from _feature_faults("encode_image", features, encoder, lambda rows: encoder.encode_image(image[rows]))
    if not torch.equal(image, given):
        yield "encode_image changes the pixels that it is given: work on a copy, as normalize_pixels does."
    if torch.allclose(features.norm(dim=1), torch.ones(3), atol=1e-4):
        yield "encode_image returns features of length 1: leave them as they are, for losses and metrics normalise."
    yield from reload_faults(encoder, lambda: encoder.encode_image(image).detach())
    if isinstance(encoder, DualEncoder):
        yield from _text_faults(encoder)
    yield from _lora_faults(encoder, image)


def _feature_faults(
    name: str, features: Tensor, encoder: ImageEncoder, encode: Callable[[slice], Tensor]
) -> Iterator[str]:
    if tuple(features.shape) != (3, encoder.embed_dim):
        yield f"{name} returns shape {tuple(features.shape)} for 3 rows: return (3, embed_dim={encoder.embed_dim})."
    if not features.is_floating_point() or not features.isfinite().all():
        yield f"{name} returns {features.dtype}, or values that are not finite: return finite floating-point features."
    if not torch.equal(features, encode(slice(3)).detach()):
        yield f"{name} returns other features for the same input: draw nothing at random in eval mode."
    single = torch.cat([encode(slice(i, i + 1)).detach() for i in range(3)])
    if single.shape == features.shape and not torch.allclose(single, features, rtol=1e-3, atol=1e-4):
        yield f"{name} gives a row other features beside other rows: use nothing of the batch, such as its statistics."
    none, faults = outcome(f"{name} of no rows", lambda: encode(slice(0)))
    yield from faults
    if not faults and tuple(none.shape) != (0, *features.shape[1:]):
        yield f"{name} returns shape {tuple(none.shape)} for no rows: return (0, {encoder.embed_dim})."


def _text_faults(encoder: DualEncoder) -> Iterator[str]:
    spec = encoder.text_spec
    text, faults = outcome("text_spec.encode", lambda: pickle.loads(pickle.dumps(spec)).encode(CAPTIONS))
    yield from faults  # the specification goes to worker processes, which are spawned
    if faults:
        return
    if text.dtype != torch.int64 or tuple(text.shape) != (3, spec.context_length):
        yield (
            f"text_spec.encode returns {text.dtype} of shape {tuple(text.shape)} for 3 texts: return int64 of shape "
            f"(3, context_length={spec.context_length})."
        )
        return
    features, faults = outcome("encode_text", lambda: encoder.encode_text(text).detach())
    yield from faults
    if not faults:
        yield from _feature_faults("encode_text", features, encoder, lambda rows: encoder.encode_text(text[rows]))
        yield from _text_token_faults(encoder, text, features)
    scale = encoder.logit_scale.detach()
    if scale.numel() != 1 or not float(scale) > 0:
        yield f"logit_scale is {scale.tolist()}: return one positive number, already exponentiated."


def _text_token_faults(encoder: DualEncoder, text: Tensor, features: Tensor) -> Iterator[str]:
    """Of an encoder that has ``text_tokens``, which is no duty."""
    try:
        tokens = encoder.text_tokens(text).detach()
    except NotImplementedError:
        return
    if tokens.ndim != 3 or tokens.shape[:2] != text.shape:
        yield f"text_tokens returns shape {tuple(tokens.shape)} for ids {tuple(text.shape)}: one row for each id."
    both, faults = outcome("text_features_and_tokens", lambda: encoder.text_features_and_tokens(text))
    yield from faults
    for name, alone, together in zip(("encode_text", "text_tokens"), (features, tokens), both or (), strict=False):
        if together.shape != alone.shape or not torch.allclose(together.detach(), alone, rtol=1e-4, atol=1e-5):
            yield f"text_features_and_tokens gives other values than {name}: return what the two give by themselves."


def _lora_faults(encoder: ImageEncoder, image: Tensor) -> Iterator[str]:
    targets, faults = outcome("lora_targets", lambda: encoder.lora_targets(ROLES))
    yield from faults
    own = {id(parameter) for parameter in encoder.parameters()}
    for target in targets or []:
        weight: Any = getattr(target.module, target.parameter, None)
        if id(weight) not in own or not 0 <= target.start < target.stop <= len(weight):
            yield (
                f"lora_targets lists {target.role} of block {target.block} as rows {target.start}:{target.stop} of "
                f"{target.parameter}: name a parameter of the encoder and rows that it has."
            )
            return
    if not targets:
        return
    encoder.requires_grad_(False)  # as the router does: attention may take another path where gradients are asked for
    with torch.no_grad():
        plain = encoder.encode_image(image)
    roles = sorted({target.role for target in targets})
    router, faults = outcome(
        "ModalityEncoder", lambda: ModalityEncoder(copy.deepcopy(encoder), branch=LoRA(2, targets=roles))
    )
    yield from faults
    if not faults:
        yield from _branch_faults(router, image, plain)


def _branch_faults(router: ModalityEncoder, image: Tensor, plain: Tensor) -> Iterator[str]:
    generated = torch.full((len(image),), int(Modality.GENERATED))
    factors = dict(router.image_adapters())
    for name, factor in factors.items():
        if name.endswith(".B"):
            nn.init.normal_(factor, std=0.1)
    if not torch.equal(router.encode_image(image).detach(), plain):
        yield "real images change when LoRA is added: read every weight that lora_targets lists through its module."
    features = router.encode_image(image, generated)
    if torch.allclose(features.detach(), plain, rtol=1e-4, atol=1e-6):
        yield "LoRA changes nothing for generated images: encode_image does not read what lora_targets lists."
        return
    _, faults = outcome("the backward through LoRA", lambda: features.square().sum().backward())
    yield from faults
    if faults:
        return
    dead = [name for name, factor in factors.items() if factor.grad is None or not factor.grad.any()]
    if dead:
        yield f"{len(dead)} LoRA factors get no gradient, such as {dead[0]}: list only blocks that the features read."
    held = [name for name, p in router.named_parameters() if p.grad is not None and name not in factors]
    if held:
        yield f"{held[0]} gets a gradient though it is frozen: do not switch requires_grad on in encode_image."
