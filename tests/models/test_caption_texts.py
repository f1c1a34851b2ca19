"""Ids of captions: what the worker makes, and the image's place, which is widened where it is known how wide."""

import random
from typing import Any

import pytest
import torch
from host_syncs import HostSyncs
from torch import Tensor

from gmail_lightning.models import ClipCap, Llava
from gmail_lightning.models.captioners.chat import ImageChat
from gmail_lightning.models.captioners.placeholder import expand, put_image

LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
         "num_attention_heads": 2}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
WORDS = ["a", "cat", "and", "two", "red", "dogs", "on", "the", "green", "hill", "of", "an", "old", "grinning", "man"]
IMAGE, PADDING = -7, -100  # ids


def on_device(ids: Any) -> list[Tensor]:
    """What of the ids a device would hold."""
    return [value for value in ids.values() if isinstance(value, Tensor)]


@pytest.mark.parametrize("seed", range(20))
def test_an_image_in_its_place_is_that_of_masked_scatter(seed: int) -> None:
    """Rows expanded as lists, and the tokens put there by a mask: the same values and gradients, bit for bit."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    size, patches, left = draw.randint(1, 6), draw.randint(1, 9), bool(seed % 2)
    rows = [[draw.randint(1, 99) for _ in range(draw.randint(1, 12))] for _ in range(size)]
    for row in rows:
        row[draw.randrange(len(row))] = IMAGE
    length = max(map(len, rows))
    padded = [[PADDING] * (length - len(r)) + r if left else r + [PADDING] * (length - len(r)) for r in rows]
    ids, column = torch.tensor(padded), torch.tensor([row.index(IMAGE) for row in padded])
    table = torch.randn(100, 4, generator=generator)
    tokens = torch.randn(size, patches, 4, generator=generator)

    plain = torch.tensor([[t for i in row for t in ([i] * patches if i == IMAGE else [i])] for row in padded])
    found = []
    for words_of, place in (
        (lambda: plain, lambda words, given: words.masked_scatter((plain == IMAGE)[..., None], given)),
        (lambda: expand(ids, column, patches), lambda words, given: put_image(words, column, given)),
    ):
        embedding, given = table.clone().requires_grad_(), tokens.clone().requires_grad_()
        expanded = words_of()
        out = place(torch.nn.functional.embedding(expanded.clamp(min=0), embedding), given)
        (out * torch.arange(out.numel()).view_as(out)).sum().backward()
        found.append((expanded, out.detach(), embedding.grad, given.grad))
    for expected, value in zip(*found, strict=True):
        assert torch.equal(value, expected)
    with HostSyncs([ids, column, table, tokens]) as mode:
        put_image(table[expand(ids, column, patches).clamp(min=0)], column, tokens)
    assert mode.found == []


def sentence(draw: random.Random) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(1, 15)))


def by_lists(
    chat: ImageChat, captions: list[str], questions: list[str], patches: int, max_length: int
) -> tuple[Tensor, Tensor, int]:
    """Ids and labels of rows that are laid out and cut one by one, as lists; and how many are cut."""
    rows, starts, cut = [], [], 0
    for prompt, answer in chat.tokens(questions, captions):
        start = [token for i in prompt for token in ([i] * patches if i == chat.image_id else [i])]
        rows.append(start + answer[: max(max_length - len(start), 0)])
        starts.append(len(start))
        cut += len(start) + len(answer) > max_length
    ids = torch.full((len(rows), max(map(len, rows))), PADDING)
    labels = ids.clone()
    for i, (row, first) in enumerate(zip(rows, starts, strict=True)):
        ids[i, : len(row)] = torch.tensor(row)
        labels[i, first : len(row)] = ids[i, first : len(row)]
    return ids, labels, cut


@pytest.mark.filterwarnings("ignore:max_length")
def test_a_llava_reads_the_rows_that_lists_give() -> None:
    model = Llava(language_model=LLAMA, tokenizer="emoji", image_dim=8, tune="full")
    draw, cuts = random.Random(0), 0
    for _ in range(40):
        size, patches = draw.randint(1, 5), draw.randint(1, 20)
        captions = [sentence(draw) for _ in range(size)]
        questions = [draw.choice(["", sentence(draw)]) for _ in range(size)]
        model.truncated = 0
        longest = max(len(prompt) for prompt, _ in model.chat.tokens(questions, None))
        model.max_length = longest + patches - 1 + draw.randint(1, 20)
        ids, labels, cut = by_lists(model.chat, captions, questions, patches, model.max_length)
        given = model.encode(captions, questions)
        with HostSyncs(on_device(given)) as mode:
            inputs = model._inputs(given, patches)
        assert mode.found == []
        assert torch.equal(inputs.ids, ids)
        assert torch.equal(inputs.labels, labels)
        assert torch.equal(inputs.mask, ids != PADDING)
        assert model.truncated == cut
        cuts += cut
        prompts = model.encode_questions(questions)
        for row, column, (prompt, _) in zip(
            prompts["prompt_ids"].tolist(),
            prompts["prompt_image_column"].tolist(),
            model.chat.tokens(questions, None),
            strict=True,
        ):
            assert row == [PADDING] * (len(row) - len(prompt)) + prompt
            assert row[column] == model.chat.image_id
    assert 10 < cuts < 100


def test_nothing_waits_between_the_ids_and_the_embeddings() -> None:
    model = Llava(language_model=LLAMA, tokenizer="emoji", image_dim=8, tune="full")
    given = model.encode(["a cat", "two red dogs"], ["", "Who?"])
    features = torch.randn(2, 5, 8)
    with HostSyncs([*on_device(given), features, *model.parameters()]) as mode:
        inputs = model._inputs(given, 5)
        model._embed(inputs.ids, given["caption_image_column"], features)
    assert mode.found == []


def test_a_caption_without_room_is_named() -> None:
    model = Llava(language_model=LLAMA, tokenizer="emoji", image_dim=8, tune="full", prompt="Who?")
    ids = model.encode(["a cat", "two red dogs"], ["", "Which of the " * 9])
    model.max_length = ids["caption_start"][1] + 3
    model.truncated = 1  # it was told
    assert model.loss(torch.randn(2, 2, 8), ids).isfinite()
    with pytest.raises(ValueError, match=r"1 of 2 rows have no token.*that of 'two red dogs'\. .*: raise max_length"):
        model.loss(torch.randn(2, 4, 8), ids)
    model.max_length = ids["caption_start"][1]  # too short for any image: the worker knows
    with pytest.raises(ValueError, match=r"1 of 2 rows have no token.*'two red dogs'"):
        model.encode(["a cat", "two red dogs"], ["", "Which of the " * 9])


def test_ids_of_a_clipcap() -> None:
    model = ClipCap(12, GPT2, "emoji", prefix_length=3, max_length=4)
    ids = model.encode(["  a cat ", "smiling face with sunglasses and a hat"])
    tokens = [model.tokenizer(text).input_ids for text in ("a cat", "smiling face with sunglasses and a hat")]
    assert ids["caption_labels"].tolist() == [[*tokens[0], model.end_id, -100], tokens[1][:4]]
    assert ids["caption_length"] == [3, len(tokens[1]) + 1]
    assert model.encode_questions(["", ""])["prompt_ids"].shape == (2, 0)
