"""A long caption is cut before its end token, which CLIP reads the text off at."""

import pytest

from gmail_lightning.metrics.clip_score import fills_context
from gmail_lightning.models import OpenCLIPEncoder


@pytest.mark.parametrize("kind", ["open_clip", "quick_gelu", "hf_clip", "hf_siglip", "emoji"])
def test_a_caption_of_200_words_keeps_its_end(kind: str, tiny) -> None:
    encoder = OpenCLIPEncoder(pretrained="emoji") if kind == "emoji" else tiny(kind)
    spec = encoder.text_spec
    short, long = spec.encode(["a fox", "a fox by the river " * 40])
    end = short[(short == short[-1]).int().argmax()] if kind.startswith("hf_") else short.max()
    assert long.shape == (spec.context_length,)
    assert long[-1] == end == long.max()
    assert (long[:-1] != end).all()
    assert fills_context(spec.encode, ["a fox", "a fox by the river " * 40]).tolist() == [False, True]
