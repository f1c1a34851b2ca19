"""The checks of models in ``gmail_lightning.testing``: ours pass them, and each names the fault that was put in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import build
from torch import Tensor, nn

from gmail_lightning.models import ClipCap, DiffusersGenerator, GeneratedImages, Llava, OpenCLIPEncoder
from gmail_lightning.testing import check_captioner, check_encoder, check_generator
from gmail_lightning.types import CaptionSpec, TextSpec

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "layers": 2, "width": 32, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 6348, "width": 16, "heads": 2, "layers": 1},
}


def faults(check: Callable[[Any], None], subject: Any) -> str:
    with pytest.raises(AssertionError) as caught:
        check(subject)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["open_clip", "quick_gelu", "timm", "hf_clip", "hf_siglip"])
def test_our_encoders(tiny: Callable[..., Any], kind: str) -> None:
    check_encoder(tiny(kind))


@pytest.mark.parametrize("check", [check_encoder, check_captioner, check_generator])
def test_another_class_is_told(check: Callable[[Any], None]) -> None:
    assert "Linear is no " in faults(check, nn.Linear(3, 3))


def test_an_encoder_without_lora_targets_passes() -> None:
    class Plain(OpenCLIPEncoder):
        def lora_targets(self, roles, tower="image"):
            return []

    check_encoder(Plain(config=TINY, merges="emoji"))


def normalized(self: Any, image: Tensor, encode: Any) -> Tensor:
    return nn.functional.normalize(encode(image), dim=1)


def in_place(self: Any, image: Tensor, encode: Any) -> Tensor:
    return encode(image.clamp_(max=0.5))


def of_the_batch(self: Any, image: Tensor, encode: Any) -> Tensor:
    features = encode(image)
    return features - features.mean(dim=0)


def at_random(self: Any, image: Tensor, encode: Any) -> Tensor:
    return nn.functional.dropout(encode(image), 0.5)


def too_wide(self: Any, image: Tensor, encode: Any) -> Tensor:
    return encode(image).repeat(1, 2)


def no_rows(self: Any, image: Tensor, encode: Any) -> Tensor:
    return torch.stack([encode(row[None])[0] for row in image])


def detached(self: Any, image: Tensor, encode: Any) -> Tensor:
    return encode(image).detach()


def raising(self: Any, image: Tensor, encode: Any) -> Tensor:
    raise KeyError("weights")


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (normalized, "features of length 1"),
        (in_place, "changes the pixels"),
        (of_the_batch, "use nothing of the batch"),
        (at_random, "draw nothing at random"),
        (too_wide, r"return (3, embed_dim=16)"),
        (no_rows, "encode_image of no rows raises"),
        (detached, "does not require grad"),
        (raising, "encode_image raises KeyError: 'weights'"),
    ],
)
def test_faults_of_an_image_tower(fault: Callable[..., Tensor], told: str) -> None:
    class Faulty(OpenCLIPEncoder):
        def encode_image(self, image):
            return fault(self, image, super().encode_image)

    torch.manual_seed(0)
    assert told in faults(check_encoder, Faulty(config=TINY, merges="emoji"))


def test_faults_of_a_text_tower() -> None:
    class Wordy(OpenCLIPEncoder):
        text_spec = TextSpec(lambda texts: torch.zeros(len(texts), 9), 16)

    assert "text_spec.encode raises" in faults(check_encoder, Wordy(config=TINY, merges="emoji"))  # no pickle

    class Cold(OpenCLIPEncoder):
        logit_scale = torch.tensor(-1.0)

    assert "one positive number" in faults(check_encoder, Cold(config=TINY, merges="emoji"))

    class Apart(OpenCLIPEncoder):
        def text_features_and_tokens(self, text):
            features, tokens = super().text_features_and_tokens(text)
            return features, tokens + 1

    told = faults(check_encoder, Apart(config=TINY, merges="emoji"))
    assert "text_features_and_tokens gives other values than text_tokens" in told
    assert "than encode_text" not in told

    class Pooled(OpenCLIPEncoder):
        def text_tokens(self, text):
            return super().text_tokens(text)[:, :1]

    assert "text_tokens returns shape (3, 1, 16) for ids (3, 16)" in faults(
        check_encoder, Pooled(config=TINY, merges="emoji")
    )


def test_faults_of_lora_targets() -> None:
    class Elsewhere(OpenCLIPEncoder):
        def lora_targets(self, roles, tower="image"):
            return [t._replace(stop=10**6) for t in super().lora_targets(roles, tower)]

    assert "rows that it has" in faults(check_encoder, Elsewhere(config=TINY, merges="emoji"))

    class Unread(OpenCLIPEncoder):
        def lora_targets(self, roles, tower="image"):
            return [
                t._replace(module=self.decoy, parameter="weight", start=0, stop=4)
                for t in super().lora_targets({"q"}, tower)[:1]
            ]

    encoder = Unread(config=TINY, merges="emoji")
    encoder.decoy = nn.Linear(4, 4)
    assert "does not read what lora_targets lists" in faults(check_encoder, encoder)


def clipcap(cls: type[ClipCap] = ClipCap) -> ClipCap:
    torch.manual_seed(0)
    return cls(image_dim=16, language_model=GPT2, tokenizer="emoji", prefix_length=2)


def test_our_captioners() -> None:
    check_captioner(clipcap())
    check_captioner(Llava(language_model=GPT2, tokenizer="emoji", image_dim=8, tune="full"))


class Held(CaptionSpec):
    """Holds what it should not, and says other things than it should."""

    def __init__(self, held: Any, captions: Any = None, after: Any = None) -> None:
        self.held, self.captions, self.after = held, captions, after

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.captions = self.captions if self.after is None else self.after

    def encode(self, captions, questions):
        return self.captions

    def encode_questions(self, questions):
        return {"prompt_ids": torch.zeros(len(questions), 0, dtype=torch.long)}


LABELS = {"caption_labels": torch.ones(3, 2, dtype=torch.long), "caption_length": [2, 2, 2]}


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        (Held(nn.Linear(1, 1), LABELS), "it holds a Linear, which every worker would copy"),
        (Held(None, LABELS, {"caption_labels": LABELS["caption_labels"] + 1}), "other caption_labels in a worker"),
        (Held((i for i in ()), LABELS), "sent to a worker process, raises TypeError"),
        (Held(None, {"caption_ids": LABELS["caption_labels"]}), "no caption_labels for 3 texts"),
        (Held(None, {"caption_labels": torch.ones(3, 2)}), "no caption_labels for 3 texts: return it, int64"),
    ],
)
def test_faults_of_a_caption_spec(spec: Held, told: str) -> None:
    class Faulty(ClipCap):
        caption_spec = spec

    assert told in faults(check_captioner, clipcap(Faulty))


@pytest.mark.parametrize(
    ("method", "fault", "told"),
    [
        ("loss", lambda given, *args, weight=None, **more: given(*args, **more), "a row of weight 0 changes loss"),
        ("loss", lambda given, *args, **more: given(*args, **more) * float("nan"), "one finite number"),
        ("loss", lambda given, *args, **more: given(*args, **more).detach().requires_grad_(), "get no gradient"),
        ("generate", lambda given, *args, **more: given(*args, **more)[:1], "return 3 texts"),
        ("generate", lambda given, *args, **more: [f"{torch.rand(1)}"] * 3, "draw nothing at random"),
        ("describe", lambda given: {"prompt": {1, 2}}, "describe as JSON raises TypeError"),
    ],
)
def test_faults_of_a_captioner(method: str, fault: Callable[..., Any], told: str) -> None:
    def faulty(self: ClipCap, *args: Any, **more: Any) -> Any:
        return fault(getattr(super(cls, self), method), *args, **more)

    cls = type("Faulty", (ClipCap,), {method: faulty})
    assert told in faults(check_captioner, clipcap(cls))


def test_our_generator(tmp_path: Path) -> None:
    made = DiffusersGenerator(str(build("sd", tmp_path)), num_inference_steps=2, guidance_scale=3.0)
    check_generator(made)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (lambda made, captions, seeds: made._replace(image=made.image * 2), "outside of [0, 1]"),
        (lambda made, captions, seeds: made._replace(image=made.image.double()), "return float32"),
        (lambda made, captions, seeds: made._replace(flagged=[]), "0 flags for 3 captions"),
        (lambda made, captions, seeds: made._replace(image=made.image * len(captions) / 3), "depends on the batch"),
        (lambda made, captions, seeds: made._replace(image=torch.ones_like(made.image)), "the seed changes nothing"),
    ],
)
def test_faults_of_a_generator(tmp_path: Path, fault: Callable[..., GeneratedImages], told: str) -> None:
    class Faulty(DiffusersGenerator):
        def generate(self, captions, seeds):
            return fault(super().generate(captions, seeds), captions, seeds)

    made = Faulty(str(build("sd", tmp_path)), num_inference_steps=2, guidance_scale=3.0)
    assert told in faults(check_generator, made)
