"""ClipCap against hand computations, an exhaustive search and the public layout of weights."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gmail_lightning.models import ClipCap
from gmail_lightning.models.restoring import restoring

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2
}  # fmt: skip


def tiny(seed: int = 0, **settings: Any) -> ClipCap:
    torch.manual_seed(seed)
    given = {"image_dim": 12, "language_model": GPT2, "tokenizer": "emoji", "prefix_length": 3, "clip_length": 2}
    return ClipCap(**{**given, "num_layers": 2, **settings}).eval()


def log_probabilities(model: ClipCap, feature: Tensor, tokens: list[int]) -> Tensor:
    """Log-probability of each token after the prefix and the tokens before it, one position at a time."""
    table, values = model.gpt.get_input_embeddings().weight, []
    sequence = model.prefix(feature[None])
    for token in tokens:
        logits = model.gpt(inputs_embeds=sequence).logits[0, -1]
        values.append(logits.double().log_softmax(-1)[token])
        sequence = torch.cat([sequence, table[token].view(1, 1, -1)], dim=1)
    return torch.stack(values)


@pytest.mark.parametrize("language_model", [GPT2, LLAMA])
@pytest.mark.parametrize("mapper", ["mlp", "transformer", "linear"])
def test_loss_equals_a_hand_computation(mapper: Any, language_model: dict[str, Any]) -> None:
    model = tiny(mapper=mapper, language_model=language_model)
    features = torch.randn(3, 12)
    captions = ["grinning face", "a cat with a very long tail", "x"]  # unequal lengths: padding must not count
    terms = []
    for feature, caption in zip(features, captions, strict=True):
        ids = [*model.tokenizer(caption).input_ids, model.tokenizer.eos_token_id]
        terms.append(-log_probabilities(model, feature, ids))
    given = model.loss(features, model.encode(captions))
    torch.testing.assert_close(given.double(), torch.cat(terms).mean(), atol=1e-5, rtol=1e-5)
    weighted = model.loss(features, model.encode(captions), weight=torch.tensor([1.0, 0.0, 2.0]))
    expected = (terms[0].sum() + 2 * terms[2].sum()) / (len(terms[0]) + 2 * len(terms[2]))
    torch.testing.assert_close(weighted.double(), expected, atol=1e-5, rtol=1e-5)


def test_mappers_follow_the_published_formulas() -> None:
    feature = torch.randn(2, 12)
    mlp = tiny(mapper="mlp").clip_project.model
    assert [tuple(layer.weight.shape) for layer in (mlp[0], mlp[2])] == [(48, 12), (96, 48)]  # D, W P / 2, W P
    hidden = torch.tanh(feature @ mlp[0].weight.T + mlp[0].bias)
    torch.testing.assert_close(
        tiny(mapper="mlp").prefix(feature), (hidden @ mlp[2].weight.T + mlp[2].bias).view(2, 3, 32)
    )

    mapper = tiny(mapper="transformer").clip_project
    x = torch.cat([mapper.linear(feature).view(2, 2, 32), mapper.prefix_const.expand(2, 3, 32)], dim=1)
    for layer in mapper.transformer["layers"]:
        y = layer.norm1(x)
        q = (y @ layer.attn.to_queries.weight.T).view(2, 5, 8, 4)
        k, v = (y @ layer.attn.to_keys_values.weight.T).view(2, 5, 2, 8, 4).unbind(2)
        share = (torch.einsum("bnhd,bmhd->bhnm", q, k) / 4**0.5).softmax(-1)
        x = x + layer.attn.project(torch.einsum("bhnm,bmhd->bnhd", share, v).reshape(2, 5, 32))
        x = x + layer.mlp["fc2"](F.relu(layer.mlp["fc1"](layer.norm2(x))))
    torch.testing.assert_close(tiny(mapper="transformer").prefix(feature), x[:, 2:], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_beam_search_equals_an_exhaustive_search(seed: int, length_penalty: float) -> None:
    """On a vocabulary of four tokens, all other logits barred, every text of at most three tokens is scored."""
    model = tiny(seed)
    allowed, end = [0, 10, 20, 30], 0
    bar = torch.full((2048,), -torch.inf)
    bar[allowed] = 0.0
    head = model.gpt.lm_head.forward
    model.gpt.lm_head.forward = lambda x: 8 * head(x) + bar  # sharper, so that the lengths differ
    features = torch.randn(4, 12)
    with torch.no_grad():
        texts = [
            (*body, end) if len(body) < 3 else body
            for length in range(4)
            for body in itertools.product(allowed[1:], repeat=length)
        ]
        texts += [(*body, end) for body in itertools.product(allowed[1:], repeat=2)]
        expected = []
        for feature in features:
            scores = {
                t: log_probabilities(model, feature, list(t)).sum().item() / len(t) ** length_penalty
                for t in set(texts)
            }
            best = max(scores, key=scores.get)
            expected.append(model.tokenizer.decode([token for token in best if token != end]).strip())
    assert model.generate(features, num_beams=32, max_new_tokens=3, length_penalty=length_penalty) == expected


def beam_search(model: ClipCap, feature: Tensor, allowed: list[int], width: int, steps: int, penalty: float) -> str:
    """The textbook's: of the extensions of ``width`` texts the best ``width`` stay; those that end are set aside.

    It always runs to the last step, so that nothing rests on a bound for what unfinished texts can still reach.
    """
    table, end = model.gpt.get_input_embeddings().weight, allowed[0]
    running: list[tuple[float, list[int]]] = [(0.0, [])]
    finished = []
    for step in range(steps):
        extended = []
        for total, text in running:
            sequence = torch.cat([model.prefix(feature[None]), table[text][None]], dim=1)
            values = model.gpt(inputs_embeds=sequence).logits[0, -1].double().log_softmax(-1)
            extended += [(total + values[token].item(), [*text, token]) for token in allowed]
        extended.sort(reverse=True)
        ended = [item for item in extended[:width] if item[1][-1] == end or step == steps - 1]
        finished += [(total / len(text) ** penalty, text) for total, text in ended]
        running = [item for item in extended if item[1][-1] != end][:width]
    best = max(finished)[1]
    return " ".join(model.tokenizer.decode([token for token in best if token != end]).split())


@pytest.mark.slow
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.0])
def test_narrow_beams_prune_as_the_textbook_does(length_penalty: float) -> None:
    model, allowed, steps = tiny(4), [0, 10, 20, 30, 40, 50], 6
    for parameter in model.gpt.parameters():  # far from the start, so that the next word depends on all before it
        torch.nn.init.normal_(parameter, std=0.4)
    bar = torch.full((2048,), -torch.inf)
    bar[allowed] = 0.0
    head = torch.randn(2048, 32) / 4  # not tied, or one word would follow upon itself
    model.gpt.lm_head.forward = lambda x: F.layer_norm(x, (32,)) @ head.T + bar
    features, found = torch.randn(12, 12), {}
    for width in (2, 3, 16):
        found[width] = model.generate(features, num_beams=width, max_new_tokens=steps, length_penalty=length_penalty)
    with torch.no_grad():
        for width in (2, 3):
            assert found[width] == [beam_search(model, f, allowed, width, steps, length_penalty) for f in features]
    assert found[2] != found[16]  # pruning changed captions


def test_captions_do_not_depend_on_the_batch() -> None:
    model, features = tiny(), torch.randn(5, 12)
    together = model.generate(features, num_beams=3, max_new_tokens=6)
    assert together == [model.generate(f[None], num_beams=3, max_new_tokens=6)[0] for f in features]
    assert model.generate(features[:0]) == []


def public_file(model: ClipCap, path: Path) -> Path:
    """The state dict as the public weights have it: with GPT-2's old mask buffers and the tied head."""
    state = {key: value + 1.0 for key, value in model.state_dict().items()}
    state["gpt.lm_head.weight"] = state["gpt.transformer.wte.weight"]
    for block in range(2):
        state[f"gpt.transformer.h.{block}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
        state[f"gpt.transformer.h.{block}.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save(state, path)
    return path


@pytest.mark.parametrize(("mapper", "names"), [
    ("mlp", {f"clip_project.model.{i}.{name}" for i in (0, 2) for name in ("weight", "bias")}),
    ("transformer", {"clip_project.linear.weight", "clip_project.linear.bias", "clip_project.prefix_const"} | {
        f"clip_project.transformer.layers.{i}.{name}" for i in range(2) for name in (
            "norm1.weight", "norm1.bias", "attn.to_queries.weight", "attn.to_keys_values.weight", "attn.project.weight",
            "attn.project.bias", "norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight",
            "mlp.fc2.bias",
        )
    }),
])  # fmt: skip
def test_public_layout_is_loaded(mapper: Any, names: set[str], tmp_path: Path) -> None:
    model = tiny(mapper=mapper)
    assert {key for key in model.state_dict() if key.startswith("clip_project.")} == names
    path = public_file(model, tmp_path / "coco_weights.pt")
    loaded = tiny(seed=1, mapper=mapper, pretrained=str(path), stop=".")
    assert loaded.pretrained
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[key] + 1.0), key
    with pytest.raises(ValueError, match=r"coco_weights.pt does not fit.*prefix_length"):
        tiny(mapper=mapper, prefix_length=4, pretrained=str(path))


def test_a_stop_token_ends_captions_and_is_not_appended() -> None:
    model, feature = tiny(stop="."), torch.randn(1, 12)
    ids = model.tokenizer("a cat.").input_ids
    expected = -log_probabilities(model, feature[0], ids).mean()
    torch.testing.assert_close(model.loss(feature, model.encode(["a cat."])).double(), expected, atol=1e-5, rtol=1e-5)
    bias = torch.zeros(2048)
    bias[model.end_id] = 1e4
    head = model.gpt.lm_head.forward
    model.gpt.lm_head.forward = lambda x: head(x) + bias
    assert model.generate(feature) == ["."]
    with pytest.raises(ValueError, match=r"stop='the end of it' is \d tokens"):
        tiny(stop="the end of it")


def test_long_captions_are_cut_and_counted() -> None:
    model, feature = tiny(max_length=4), torch.randn(2, 12)
    cut = model.tokenizer("smiling face with sunglasses and a hat").input_ids[:4]
    short = [*model.tokenizer("cat").input_ids, 0]
    terms = [log_probabilities(model, f, ids) for f, ids in zip(feature, (cut, short), strict=True)]
    with pytest.warns(UserWarning, match="more than max_length=4 tokens is cut"):
        given = model.loss(feature, model.encode(["smiling face with sunglasses and a hat", "cat"]))
    torch.testing.assert_close(given.double(), -torch.cat(terms).mean(), atol=1e-5, rtol=1e-5)
    assert model.truncated == 1


@pytest.mark.parametrize("num_beams", [1, 3])
def test_prefix_and_caption_stay_within_the_positions_of_the_language_model(num_beams: int) -> None:
    model, feature = tiny(language_model={**GPT2, "n_positions": 8}), torch.randn(2, 12)
    assert model.max_length == 5
    caption = "smiling face with sunglasses and a hat"
    ids = model.tokenizer(caption).input_ids[:5]
    with pytest.warns(UserWarning, match="more than max_length=5 tokens is cut"):
        given = model.loss(feature[:1], model.encode([caption]))
    torch.testing.assert_close(given.double(), -log_probabilities(model, feature[0], ids).mean(), atol=1e-5, rtol=1e-5)
    bias = torch.zeros(2048)
    bias[0] = -1e4  # no text ends by itself
    head = model.gpt.lm_head.forward
    model.gpt.lm_head.forward = lambda x: head(x) + bias
    limited = model.generate(feature, num_beams=num_beams, max_new_tokens=5)
    assert model.generate(feature, num_beams=num_beams, max_new_tokens=67) == limited
    assert model.generate(feature, num_beams=num_beams, max_new_tokens=2) != limited
    with pytest.raises(ValueError, match="prefix_length=8 takes all positions"):
        tiny(language_model={**GPT2, "n_positions": 8}, prefix_length=8)


def test_the_loss_keeps_no_cache() -> None:
    model, outputs = tiny(), []
    model.gpt.register_forward_hook(lambda module, given, output: outputs.append(output))
    model.loss(torch.randn(1, 12), model.encode(["a"]))
    assert [output.past_key_values for output in outputs] == [None]


def test_what_a_checkpoint_replaces_and_what_no_tensor_shows(tmp_path: Path) -> None:
    assert tiny().describe() == {"normalize_prefix": False, "stop": None}
    assert tiny(normalize_prefix=True, stop=".").describe() == {"normalize_prefix": True, "stop": "."}
    path = str(public_file(tiny(), tmp_path / "weights.pt"))
    with restoring({}):
        tiny(pretrained=f"{path}.gone")  # the checkpoint brings all of it
        with pytest.raises(FileNotFoundError):  # it lacks the language model
            tiny(pretrained=f"{path}.gone", tune_language_model=False)


def test_normalised_prefixes_ignore_the_length_of_a_feature() -> None:
    feature = torch.randn(2, 12)
    assert not torch.allclose(tiny().prefix(feature), tiny().prefix(3 * feature))
    model = tiny(normalize_prefix=True)
    torch.testing.assert_close(model.prefix(feature), model.prefix(3 * feature))
    wide, usual = (m.clip_project.model[0].weight for m in (model, tiny()))
    torch.testing.assert_close(wide, 12**0.5 * usual)


def test_a_language_model_that_is_kept_stays_in_eval_and_unchanged(tmp_path: Path) -> None:
    tiny().gpt.save_pretrained(tmp_path)
    tiny().tokenizer.save_pretrained(tmp_path)
    model = tiny(seed=1, language_model=str(tmp_path), tokenizer=None, tune_language_model=False).train()
    assert not any(module.training for module in model.gpt.modules())
    assert model.clip_project.training
    model.loss(torch.randn(2, 12), model.encode(["a", "b"])).backward()
    assert all(p.grad is None for p in model.gpt.parameters())
    assert all(p.grad is not None for p in model.clip_project.parameters())
    with pytest.raises(ValueError, match="needs a language model with weights"):
        tiny(tune_language_model=False)


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="give its model_type, and a tokenizer"):
        tiny(tokenizer=None)
    with pytest.raises(ValueError, match="no multiple"):
        tiny(mapper="transformer", language_model={**GPT2, "n_embd": 20, "n_head": 2})
    with pytest.raises(ValueError, match="give mlp, transformer or linear"):
        tiny(mapper="perceiver")
    with pytest.raises(ValueError, match="ClipCap answers no questions"):
        tiny().encode(["a"], ["what?"])
    with pytest.raises(ValueError, match="ClipCap answers no questions"):
        tiny().encode_questions(["", "what?"])
    with pytest.raises(ValueError, match="no token to learn"):
        tiny(stop=".").encode([""])
