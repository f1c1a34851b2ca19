"""Ids of captions and questions, made in worker processes, and what the task does with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_tasks import emoji_data, quiet_trainer, tiny_encoder
from torch.utils.data import DataLoader

from gmail_lightning.datamodules.collate import RowTable, as_is
from gmail_lightning.datamodules.rows import EvaluationRows, TrainRows
from gmail_lightning.datasets import EmojiDataset
from gmail_lightning.models import Captioner, ClipCap, Llava
from gmail_lightning.tasks import CaptioningTask

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
         "num_attention_heads": 2}  # fmt: skip


class Riddles(EmojiDataset):
    """Asks of every other drawing."""

    has_questions = True

    def question(self, index: int) -> str | None:
        return f"What is number {index}?" if index % 2 else None


def captioner(kind: str) -> Captioner:
    torch.manual_seed(0)
    if kind == "clipcap":
        return ClipCap(16, GPT2, "emoji", prefix_length=2)
    return Llava(language_model=LLAMA, tokenizer="emoji", image_dim=32, tune="full")


def task(kind: str) -> CaptioningTask:
    return CaptioningTask(tiny_encoder(), captioner(kind), num_beams=1, max_new_tokens=4, min_unique_captions=0.0)


def same(found: Any, expected: dict[str, Any]) -> None:
    assert expected
    for key, value in expected.items():
        assert torch.equal(found[key], value) if isinstance(value, torch.Tensor) else found[key] == value, key


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clipcap", "llava"])
def test_a_worker_that_is_spawned_makes_the_ids_of_the_captioner(kind: str) -> None:
    made = task(kind)
    table = RowTable([(Riddles if kind == "llava" else EmojiDataset)("noto", "novel")])
    for rows, items in (
        (TrainRows(table, made.input_spec), [(n, 0, n) for n in range(9)]),
        (EvaluationRows(table, made.input_spec, "novel"), list(range(9))),
    ):
        loader = DataLoader(
            rows, batch_size=9, sampler=items, collate_fn=as_is, num_workers=1, multiprocessing_context="spawn"
        )
        (batch,) = loader
        questions = batch.get("question", [""] * 9)
        assert (len(set(questions)) > 1) == (kind == "llava")
        if isinstance(rows, TrainRows):
            same(batch, made.captioner.encode(batch["caption"], questions))
            assert "prompt_ids" not in batch
        else:
            same(batch, made.captioner.encode_questions(questions))
            assert "caption_labels" not in batch


@pytest.mark.parametrize("kind", ["clipcap", "llava"])
def test_no_string_becomes_ids_in_the_main_process(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training with workers and in evaluation."""
    made, here = task(kind), []
    for name in ("encode", "encode_questions"):
        given = getattr(made.captioner, name)
        monkeypatch.setattr(made.captioner, name, lambda *a, given=given, name=name: (here.append(name), given(*a))[1])
    trainer = quiet_trainer(tmp_path, max_steps=2, val_check_interval=2, limit_val_batches=1, num_sanity_val_steps=0)
    trainer.fit(made, emoji_data(num_workers=1))
    assert made.results["novel"].captions
    assert not here


def test_a_batch_made_by_hand_is_encoded_by_the_task() -> None:
    made = task("llava").eval()
    batch = {"image": torch.rand(2, 3, 32, 32), "modality": torch.tensor([0, 1]), "caption": ["a cat", "two red dogs"]}
    asked = {**batch, "question": ["Who?", ""]}
    for given in (batch, asked):
        ids = made.captioner.encode(given["caption"], given.get("question"))
        loss = made.compute_losses(given)["loss"]
        assert torch.equal(loss, made.compute_losses({**given, "caption": ["", ""], **ids})["loss"])
        prompts = made.captioner.encode_questions(given.get("question", ["", ""]))
        assert made.write(given) == made.write({**given, "question": ["x", "y"], **prompts})
    assert not torch.equal(made.compute_losses(batch)["loss"], made.compute_losses(asked)["loss"])


def test_a_caption_that_says_nothing_is_refused_in_the_worker(tmp_path: Path) -> None:
    class Blank(EmojiDataset):
        def captions(self, index: int) -> list[str]:
            return [" "]

    made = CaptioningTask(tiny_encoder(), ClipCap(16, GPT2, "emoji", prefix_length=2, stop="."))
    rows = TrainRows(RowTable([Blank("noto", "novel")]), made.input_spec)
    with pytest.raises(ValueError, match=r"2 of 2 rows have no token to learn: .* as that of ' '"):
        next(iter(DataLoader(rows, batch_size=2, sampler=[(0, 0, 0), (1, 0, 1)], collate_fn=as_is, num_workers=1)))
