"""What a captioner and an image generator of one's own must hold."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from gmail_lightning.models.generative import Captioner, ImageGenerator
from gmail_lightning.testing.faults import CAPTIONS, outcome, plain_faults, reload_faults, report, require
from gmail_lightning.types import CaptionSpec

RECIPE = ("generator", "revision", "scheduler", "steps", "guidance", "size")


def check_captioner(captioner: Captioner, image_dim: int = 16, tokens: int = 5) -> None:
    """Checks a ``Captioner``: ids, loss, gradients, weights of rows, captions, determinism, a state that reloads.

    Args:
        captioner: With tiny weights.
        image_dim: Width of the features to give, where the captioner accepts any.
        tokens: Patch tokens per image, where it reads these.

    Raises:
        AssertionError: With one sentence per fault.
    """
    require(captioner, Captioner)
    shape = (len(CAPTIONS), *((tokens,) if captioner.reader.gives_tokens else ()), captioner.image_dim or image_dim)
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    report(captioner, _captioner_faults(copy.deepcopy(captioner), features))


def check_generator(generator: ImageGenerator) -> None:
    """Checks an ``ImageGenerator``: images that depend on caption and seed alone, and the recipe that it tells.

    Raises:
        AssertionError: With one sentence per fault.
    """
    require(generator, ImageGenerator)
    report(generator, _generator_faults(generator))


def _captioner_faults(captioner: Captioner, features: Tensor) -> Iterator[str]:
    captioner.eval()
    yield from _caption_spec_faults(captioner)
    ids, faults = outcome("encode", lambda: captioner.encode(CAPTIONS))
    yield from faults
    if faults:
        return
    loss, faults = outcome("loss", lambda: captioner.loss(features, ids))
    yield from faults
    if faults:
        return
    if loss.ndim or not loss.isfinite():
        yield f"loss returns {loss.tolist()}: return one finite number, the mean over the tokens."
        return
    trained = {name: p for name, p in captioner.named_parameters() if p.requires_grad}
    if trained:
        loss.backward()
        dead = [name for name, p in trained.items() if p.grad is None]
        if dead:
            yield f"{len(dead)} trainable parameters get no gradient, such as {dead[0]}: freeze what loss does not use."
    without, faults = outcome("loss of two rows", lambda: captioner.loss(features[:2], captioner.encode(CAPTIONS[:2])))
    yield from faults
    weighed, more = outcome(
        "loss with weight", lambda: captioner.loss(features, ids, weight=torch.tensor([1.0, 1.0, 0.0]))
    )
    yield from more
    if not faults and not more and not torch.allclose(without, weighed, rtol=1e-3, atol=1e-5):
        yield "a row of weight 0 changes loss: pass weight on to losses.caption_loss."

    def write() -> list[str]:
        return captioner.generate(features, num_beams=2, max_new_tokens=4)

    captions, faults = outcome("generate", write)
    yield from faults
    if not faults:
        if len(captions) != len(features) or not all(isinstance(caption, str) for caption in captions):
            yield f"generate returns {captions!r} for 3 images: return 3 texts."
        if captions != write():
            yield "generate writes other captions for the same features: draw nothing at random."
        asked = captioner.encode_questions([""] * len(features))
        if captions != captioner.generate(features, asked, num_beams=2, max_new_tokens=4):
            yield "generate writes other captions without prompts: encode empty questions where they are None."
    yield from reload_faults(captioner, lambda: captioner.loss(features, ids).detach())
    yield from plain_faults(captioner.describe())


class _WithoutModel(pickle.Pickler):
    """Refuses what no worker should be sent."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, nn.Module):
            raise TypeError(f"it holds a {type(obj).__name__}, which every worker would copy: hold the tokenizer alone")
        return NotImplemented


def _sent(spec: CaptionSpec) -> CaptionSpec:
    """As a worker process that is spawned gets it."""
    file = io.BytesIO()
    _WithoutModel(file).dump(spec)
    return cast(CaptionSpec, pickle.loads(file.getvalue()))


def _caption_spec_faults(captioner: Captioner) -> Iterator[str]:
    """Whether a data worker can make the ids that the captioner itself makes."""
    questions = [""] * len(CAPTIONS)

    def made(spec: CaptionSpec) -> dict[str, Any]:
        return {**spec.encode(CAPTIONS, questions), **spec.encode_questions(questions)}

    ids, faults = outcome("caption_spec", lambda: made(captioner.caption_spec))
    sent, more = outcome("caption_spec, sent to a worker process,", lambda: made(_sent(captioner.caption_spec)))
    yield from faults or more
    if faults or more:
        return
    for key in ("caption_labels", "prompt_ids"):
        found = ids.get(key)
        if not isinstance(found, Tensor) or found.dtype != torch.int64 or found.shape[:1] != (len(CAPTIONS),):
            yield f"caption_spec returns no {key} for 3 texts: return it, int64 of shape (3, L)."
        elif not torch.equal(found, sent[key]):
            yield f"caption_spec gives other {key} in a worker process: let it hold all that they depend on."


def _generator_faults(generator: ImageGenerator) -> Iterator[str]:
    seeds = [3, 5, 7]
    made, faults = outcome("generate", lambda: generator.generate(CAPTIONS, seeds))
    yield from faults
    if faults:
        return
    image = made.image
    if image.ndim != 4 or tuple(image.shape[:2]) != (3, 3) or image.dtype != torch.float32:
        shape = tuple(image.shape)
        yield f"generate returns {image.dtype} of shape {shape} for 3 captions: return float32 (3, 3, H, W)."
        return
    if not image.isfinite().all() or image.min() < 0 or image.max() > 1:
        yield "generate returns pixels outside of [0, 1]: scale and clamp them."
    if len(made.flagged) != 3:
        yield f"generate returns {len(made.flagged)} flags for 3 captions: return one each, False without a checker."
    single = torch.cat([generator.generate([c], [s]).image for c, s in zip(CAPTIONS, seeds, strict=True)])
    if not torch.allclose(single.cpu(), image.cpu(), atol=0.02):
        yield "an image depends on the batch that it is made in: draw its noise from its own seed, on the CPU."
    if torch.equal(generator.generate(CAPTIONS[:1], [4]).image.cpu(), image[:1].cpu()):
        yield "the seed changes nothing: draw the noise from it."
    recipe = generator.describe()
    yield from plain_faults(recipe)
    if lacking := [name for name in RECIPE if name not in recipe]:
        yield f"describe lacks {', '.join(lacking)}: say all that images depend on, None where there is no such thing."
    if len(generator.truncated(CAPTIONS)) != 3:
        yield "truncated does not say of each caption whether it is cut: return one bool each."
