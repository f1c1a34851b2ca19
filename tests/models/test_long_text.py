"""Stretched contexts against Long-CLIP's formula row by row, and training that leaves the kept rows alone."""

import copy
import pickle
from pathlib import Path

import open_clip
import pytest
import safetensors.torch
import torch
from torch import nn

from gmail_lightning.models import LoRA, ModalityEncoder, OpenCLIPEncoder, add_lora, merge_lora
from gmail_lightning.models.encoders.long_text import (
    is_cut,
    is_long_clip,
    long_clip_state_dict,
    read_long_clip,
    stretch_context,
    stretch_positional_embedding,
)
from gmail_lightning.optim import parameter_groups

KINDS = ("open_clip", "timm", "hf_clip", "hf_siglip")


def by_row(old: torch.Tensor, factor: int, keep: int) -> torch.Tensor:
    """Every row as Long-CLIP's description gives it (repo beichenzbc/Long-CLIP), in float64."""
    old = old.double()
    rows, last = list(old[:keep]), len(old) - 1
    for i in range(keep, last):
        rows += [(1 - j / factor) * old[i] + (j / factor) * old[i + 1] for j in range(factor)]
    rows += [old[last] + (j / factor) * (old[last] - old[last - 1]) for j in range(factor)]
    return torch.stack(rows)


def table(encoder) -> torch.Tensor:
    model = encoder.model
    if hasattr(model, "text_model"):
        return model.text_model.embeddings.position_embedding.weight
    return getattr(model, "text", model).positional_embedding


@pytest.mark.parametrize(
    ("rows", "length", "keep", "factor"), [(77, 248, 20, 4), (32, 68, 20, 4), (32, 44, 20, 2), (16, 16, 8, 1)]
)
def test_the_table_is_interpolated_as_published(rows: int, length: int, keep: int, factor: int) -> None:
    weight = torch.randn(rows, 12, generator=torch.Generator().manual_seed(0))
    stretched = stretch_positional_embedding(weight, length, keep)
    assert stretched.shape == (length, 12)
    assert torch.equal(stretched[:keep], weight[:keep])
    assert torch.equal(stretched[keep::factor], weight[keep:])
    torch.testing.assert_close(stretched.double(), by_row(weight, factor, keep), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("length", "keep", "match"),
    [
        (250, 20, "57 positions behind the first 20 .* Give 248, 305 or"),
        (20, 20, "length=20"),
        (248, 76, "at least two"),
        (248, -1, "at least two"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(length: int, keep: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        stretch_positional_embedding(torch.zeros(77, 4), length, keep)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stretched_tower_reads_long_texts(kind: str, tiny) -> None:
    encoder, plain = tiny(kind), tiny(kind)
    short, long = ["a fox"], ["a fox by the river " * 2 + "a fox", "a fox by the river " * 2 + "a cat"]
    stretch_context(encoder, 32, keep=8)
    assert encoder.text_spec.context_length == 32
    assert encoder.text_spec.encode(long).shape == (2, 32)
    ids = encoder.text_spec.encode(long)
    assert not torch.equal(ids[0], ids[1])  # they differ behind the old end
    torch.testing.assert_close(table(encoder).double(), by_row(table(plain).detach(), 3, 8), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        got, features = encoder.encode_text(ids), encoder.encode_text(encoder.text_spec.encode(short))
        expected = plain.encode_text(plain.text_spec.encode(short))
    assert (got[0] - got[1]).norm() > 1e-3
    if kind != "hf_siglip":  # causal, and the text ends within the kept rows
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    spec = pickle.loads(pickle.dumps(encoder.text_spec))  # for the data workers
    assert torch.equal(spec.encode(long), ids)
    with pytest.raises(ValueError, match="context length 32"):
        encoder.encode_text(plain.text_spec.encode(short))


@pytest.mark.parametrize("kind", KINDS)
def test_kept_rows_do_not_train(kind: str, tiny) -> None:
    encoder = tiny(kind)
    stretch_context(encoder, 32, keep=8)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    assert before.keys() == tiny(kind).state_dict().keys()
    optimizer = torch.optim.AdamW(parameter_groups(encoder.named_parameters()), lr=0.1, weight_decay=0.5)
    ids = encoder.text_spec.encode(["a fox by the river " * 2, "a cat"])
    for _ in range(3):
        optimizer.zero_grad()
        encoder.encode_text(ids).square().sum().backward()
        optimizer.step()
    after = encoder.state_dict()
    key = next(key for key, value in after.items() if value.shape == (32, 64) and "visual" not in key)
    assert torch.equal(after[key], table(encoder))
    assert torch.equal(after[key][:8], before[key][:8])
    assert (after[key][8:] - before[key][8:]).abs().min(dim=1).values.max() > 0.01

    again = tiny(kind, seed=1)
    stretch_context(again, 32, keep=8)
    again.load_state_dict(after)
    assert torch.equal(table(again), table(encoder))
    with torch.no_grad():
        assert torch.equal(again.encode_text(ids), encoder.encode_text(ids))


@pytest.mark.parametrize("first", ["stretch", "lora"])
def test_it_goes_with_lora_and_its_merge(first: str, tiny) -> None:
    encoder = tiny()
    if first == "lora":
        add_lora(encoder, rank=2, tower="text")
    stretch_context(encoder, 32, keep=8)
    if first == "stretch":
        add_lora(encoder, rank=2, tower="text")
    assert not table(encoder).requires_grad
    state = {key: value.clone() for key, value in encoder.state_dict().items()}
    encoder.load_state_dict(state)
    assert all(torch.equal(value, state[key]) for key, value in encoder.state_dict().items())
    merged = merge_lora(encoder)
    assert torch.equal(merged["positional_embedding"], table(encoder))
    fresh = open_clip.CLIP(**encoder.model_config)
    fresh.load_state_dict(merged)
    ids = encoder.text_spec.encode(["a fox by the river " * 2])
    with torch.no_grad():
        torch.testing.assert_close(fresh.eval().encode_text(ids), encoder.encode_text(ids))


def test_a_modality_encoder_trains_the_rest_of_the_table(tiny) -> None:
    plain = tiny()
    stretch_context(plain, 32, keep=8)
    encoder = ModalityEncoder(plain, text_side="full")
    assert table(plain).requires_grad
    copied = copy.deepcopy(encoder)
    assert torch.equal(table(copied.encoder), table(plain))
    keys = {key for key, value in encoder.state_dict(keep_vars=True).items() if value.requires_grad}
    assert "positional_embedding" in {key.removeprefix("model.") for key in keys}


def test_stretching_twice_and_keeping_only(tiny) -> None:
    encoder = tiny()
    stretch_context(encoder, 16, keep=8)
    assert torch.equal(table(encoder), table(tiny()))
    names = {name for name, _ in encoder.named_parameters()}
    assert "model.parametrizations.positional_embedding.original" in names
    stretch_context(encoder, 24, keep=8)
    torch.testing.assert_close(table(encoder).double(), by_row(table(tiny()).detach(), 2, 8), rtol=1e-5, atol=1e-6)
    assert encoder.state_dict().keys() == tiny().state_dict().keys()


def test_the_small_clip_of_the_package_stretches() -> None:
    encoder, plain = OpenCLIPEncoder(pretrained="emoji"), OpenCLIPEncoder(pretrained="emoji")
    stretch_context(encoder, 68)
    assert encoder.text_spec.context_length == 68
    with torch.no_grad():
        texts = ["grinning face", "red apple"]
        torch.testing.assert_close(
            encoder.encode_text(encoder.text_spec.encode(texts)), plain.encode_text(plain.text_spec.encode(texts))
        )


@pytest.mark.parametrize("kind", ["open_clip", "hf_clip", "hf_siglip", "stretched open_clip", "stretched hf_clip"])
def test_cut_texts_are_told_from_those_that_fit_to_the_token(kind: str, tiny) -> None:
    encoder = tiny(kind.removeprefix("stretched "))
    if kind.startswith("stretched"):
        stretch_context(encoder, 24, keep=8)
    length = encoder.text_spec.context_length
    cut = is_cut(encoder.text_spec, ["a " * words for words in range(1, 30)]).tolist()  # "a" is one token
    assert cut == [2 + words > length for words in range(1, 30)]  # beside start and end
    assert is_cut(encoder.text_spec, []).tolist() == []


def test_another_encoder_is_refused(tiny) -> None:
    with pytest.raises(TypeError, match="not ModalityEncoder"):
        stretch_context(ModalityEncoder(tiny(), branch=LoRA()), 32)
    with pytest.raises(ValueError, match="must fit a whole number of times"):
        stretch_context(tiny(), 250, keep=8)


@pytest.mark.slow
def test_published_long_clip_weights_load(tmp_path: Path) -> None:
    """A synthetic state dict of the public layout: 20 rows of one table count, 228 of the other."""
    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16, "head_width": 64}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text, "quick_gelu": True}
    encoder = OpenCLIPEncoder(config=config)
    state = {key: torch.randn_like(value) for key, value in encoder.model.state_dict().items()}
    public = {**state, **{f"positional_embedding{name}": torch.randn(248, 64) for name in ("", "_res")}}
    assert (is_long_clip(state), is_long_clip(public)) == (False, True)
    stretch_context(encoder)
    encoder.model.load_state_dict(long_clip_state_dict(public))  # strict
    mask = nn.functional.pad(torch.ones(20, 1), (0, 0, 0, 228))
    expected = public["positional_embedding"] * mask + public["positional_embedding_res"] * (1 - mask)
    assert torch.equal(table(encoder), expected)
    whole = open_clip.CLIP(**{**config, "text_cfg": {**text, "context_length": 248}})
    whole.load_state_dict(long_clip_state_dict(public))
    ids = encoder.text_spec.encode(["a red fox runs along the river bank and " * 20, "a fox"])
    with torch.no_grad():
        torch.testing.assert_close(encoder.encode_text(ids), whole.eval().encode_text(ids))
    assert "positional_embedding_res" in public  # the given dict is not changed
    torch.save(public, tmp_path / "longclip.pt")
    torch.save(state, tmp_path / "clip.pt")
    safetensors.torch.save_file(state, tmp_path / "clip.safetensors")
    read = read_long_clip(tmp_path / "longclip.pt")
    assert torch.equal(read["positional_embedding"], expected)
    assert read.keys() == state.keys()
    assert read_long_clip(tmp_path / "clip.pt") is read_long_clip(tmp_path / "clip.safetensors") is None
    with pytest.raises(ValueError, match="no key positional_embedding_res"):
        long_clip_state_dict(state)
    with pytest.raises(ValueError, match=r"\(248, 64\) and \(100, 64\)"):
        long_clip_state_dict({**public, "positional_embedding_res": torch.randn(100, 64)})

    # The file alone says it all; a context that does not fit it is refused, and so are plain weights of another one.
    loaded = OpenCLIPEncoder(config=config, pretrained=str(tmp_path / "longclip.pt"))
    assert loaded.text_spec.context_length == 248
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval().encode_text(ids), whole.encode_text(ids))
    with pytest.raises(ValueError, match="context length 248, not 134"):
        OpenCLIPEncoder(config=config, pretrained=str(tmp_path / "longclip.pt"), context_length=134)
    stretched = OpenCLIPEncoder(config=config, pretrained=str(tmp_path / "clip.pt"), context_length=248)
    assert torch.equal(table(stretched), stretch_positional_embedding(state["positional_embedding"]))
    torch.save(long_clip_state_dict(public), tmp_path / "plain248.pt")
    with pytest.raises(ValueError, match="has 248 text positions and the model 77"):
        OpenCLIPEncoder(config=config, pretrained=str(tmp_path / "plain248.pt"))
