"""Language models of Hugging Face as captioners use them: their precision, their own settings, their limits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gmail_lightning.models import ClipCap, Llava
from gmail_lightning.models.captioners.language_model import build_language_model, causal_mask, max_positions

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 1024,
}  # fmt: skip
OTHERS = {  # each of these alone changes captions
    "repetition_penalty": {"repetition_penalty": 9.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "suppress_tokens": {"suppress_tokens": list(range(5, 2000))},
    "sequence_bias": {"sequence_bias": [[[7], 50.0]]},
}


def saved(folder: Path, settings: dict[str, Any], std: float = 0.2, **generation: Any) -> str:
    """A language model as a directory, far from the start, with generation settings of its own."""
    torch.manual_seed(0)
    model, tokenizer, _ = build_language_model(settings, "emoji")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    model.generation_config.update(**generation)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_rotary_frequencies_stay_in_fp32_and_the_loss_is_that_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = saved(tmp_path, LLAMA, std=0.8)  # attention that is sharp shows where its words stand
    ours = Llava(language_model=path, image_dim=8, dtype="bfloat16").eval()
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    buffers = dict(ours.language_model.named_buffers())
    assert {b.dtype for b in buffers.values()} == {torch.float32}
    for name, buffer in theirs.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    assert {p.dtype for p in ours.language_model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in ours.projector.parameters()} == {torch.float32}

    tokens = torch.randn(2, 500, 8, generator=torch.Generator().manual_seed(1))
    questions, captions = ["Which of " + "the two " * 40, "Who?"], ["a red hand", "two cats and a dog " * 20]
    with torch.no_grad():
        ids = ours.encode(captions, questions)
        loss = ours.loss(tokens, ids).item()
        inputs = ours._inputs(ids, 500)
        embeddings = ours._embed(inputs.ids, ids["caption_image_column"], tokens)
        given = {"inputs_embeds": embeddings, "attention_mask": inputs.mask.long()}
        assert int((inputs.labels != -100).nonzero()[:, 1].min()) > 500
        assert loss == pytest.approx(theirs(**given, labels=inputs.labels).loss.item(), rel=1e-5)
        rounded = theirs.to(torch.bfloat16)(**given, labels=inputs.labels).loss.item()  # buffers, too
    assert abs(rounded - loss) > 1e-4 * loss


def test_a_new_model_in_half_precision_keeps_its_buffers() -> None:
    model, _, _ = build_language_model(LLAMA, "emoji", "bfloat16")
    expected, _, _ = build_language_model(LLAMA, "emoji")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for (name, buffer), other in zip(model.named_buffers(), expected.buffers(), strict=True):
        assert torch.equal(buffer, other), name


@pytest.mark.parametrize("name", OTHERS)
def test_captions_do_not_depend_on_generation_settings_that_a_model_was_saved_with(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    plain, other = saved(tmp_path / "a", GPT2), saved(tmp_path / "b", GPT2, **OTHERS[name])
    features = torch.randn(3, 12, generator=torch.Generator().manual_seed(1))
    texts = []
    for path in (plain, other):
        torch.manual_seed(2)
        model = ClipCap(12, path, prefix_length=3).eval()
        texts.append([model.generate(features, num_beams=beams, max_new_tokens=12) for beams in (1, 3)])
    assert texts[0] == texts[1]
    model.gpt.generation_config = AutoModelForCausalLM.from_pretrained(other).generation_config
    assert [model.generate(features, num_beams=beams, max_new_tokens=12) for beams in (1, 3)] != texts[0]


@pytest.mark.parametrize("kind", ["openai-gpt", "ctrl"])
def test_a_model_that_generates_from_ids_alone_is_refused_when_it_is_built(kind: str) -> None:
    tiny = {"n_embd": 16, "n_layer": 1, "n_head": 2, "dff": 16}
    with pytest.raises(ValueError, match=f"is a {kind}: transformers generates with it from token ids only"):
        build_language_model({"model_type": kind, **tiny}, "emoji")


def test_positions() -> None:
    assert max_positions(build_language_model(GPT2, "emoji")[0]) == 64
    bloom = {"model_type": "bloom", "hidden_size": 16, "n_layer": 1, "n_head": 2}  # knows no limit
    assert max_positions(build_language_model(bloom, "emoji")[0]) is None


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2"])
def test_the_causal_mask_is_what_transformers_makes_of_the_padding(kind: str) -> None:
    config = {
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 50, "embd_pdrop": 0.0},
        "llama": {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "vocab_size": 50,
        },
    }  # fmt: skip
    torch.manual_seed(0)
    settings = AutoConfig.for_model(kind, **config.get(kind, {**config["llama"], "num_key_value_heads": 2}))
    model = AutoModelForCausalLM.from_config(settings).eval()
    embeddings = torch.randn(3, 7, 32)
    seen = torch.arange(7) < torch.tensor([7, 4, 1])[:, None]
    mask = causal_mask(model, seen)
    assert mask.shape == (3, 1, 7, 7)
    expected = model(inputs_embeds=embeddings, attention_mask=seen.long()).logits
    assert torch.equal(model(inputs_embeds=embeddings, attention_mask=mask).logits[seen], expected[seen])
    model.config._attn_implementation = "eager"
    assert torch.equal(causal_mask(model, seen), seen.long())


@pytest.mark.parametrize("window", [None, 4])
def test_a_window_is_left_to_transformers(window: int | None) -> None:
    settings = AutoConfig.for_model(**{**LLAMA, "model_type": "mistral"}, num_key_value_heads=2, vocab_size=50)
    settings.sliding_window = window
    model, seen = AutoModelForCausalLM.from_config(settings), torch.ones(2, 7, dtype=torch.bool)
    assert causal_mask(model, seen).ndim == (4 if window is None else 2)
    model.config.model_type = "of one's own"
    assert causal_mask(model, seen).ndim == 2
