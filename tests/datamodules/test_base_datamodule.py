"""What all data modules of images and texts share: evaluation and prediction without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recorder import SPEC, Recorder, trainer
from torch import Tensor

from gmail_lightning.datamodules import ImageTextDataModule, MixedModalityDataModule, StreamingDataModule
from gmail_lightning.datasets import DataError, EmojiDataset, ImageTextDataset

HELD: dict[str, list[ImageTextDataset]] = {"novel": [EmojiDataset("noto", "novel")], "de": [EmojiDataset(locale="de")]}


def seen(data: ImageTextDataModule) -> list[dict[str, Any]]:
    data.setup("validate")
    return [batch for loader in data.val_dataloader() for batch in loader]


def test_evaluation_needs_no_module_that_trains() -> None:
    alone = seen(ImageTextDataModule(HELD, eval_batch_size=50, input_spec=SPEC))
    mixed = seen(MixedModalityDataModule(val=HELD, eval_batch_size=50, input_spec=SPEC))
    assert len(alone) == len(mixed) > 2
    for one, other in zip(alone, mixed, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert torch.equal(value, other[key]) if isinstance(value, Tensor) else value == other[key]


def test_it_serves_a_trainer_and_cannot_train(tmp_path: Path) -> None:
    data = ImageTextDataModule({"novel": HELD["novel"]}, predict=HELD["novel"], eval_batch_size=100)
    task = Recorder()
    trainer(tmp_path, limit_val_batches=1).validate(task, data, verbose=False)
    assert [batch["eval_set"] for batch in task.evaluated] == ["novel"]
    rows = [row for batch in data.predict_dataloader() for row in batch["row_id"].tolist()]
    assert rows == list(range(len(HELD["novel"][0])))
    data.predict_only(lambda: np.array([3, 1]))
    assert [batch["row_id"].tolist() for batch in data.predict_dataloader()] == [[3, 1]]
    with pytest.raises(DataError, match="train: no data sets, so no classes"):
        data.classes()


def test_a_stream_has_neither_pairs_nor_a_share_nor_a_state(tmp_path: Path) -> None:
    stream = StreamingDataModule("x-{0..3}.tar", "real", 5, 8, val=HELD, input_spec=SPEC)
    assert not isinstance(stream, MixedModalityDataModule)
    assert {"mode", "generated_fraction", "generated_augmentation", "allow_overlap"}.isdisjoint(vars(stream))
    assert (stream.eval_batch_size, stream.state_dict()) == (8, {})
    assert stream.eval_sets == {"val": ["novel", "de"], "test": ["novel", "de"]}


def test_each_module_says_what_a_verb_reads() -> None:
    known = {"train", "val", "test", "predict"}
    for kind, fit in ((MixedModalityDataModule, {"train", "val", "test"}), (StreamingDataModule, {"val"})):
        assert set(kind.DATASETS) - set(kind.unread("fit", known)) == fit
        assert set(kind.DATASETS) - set(kind.unread("test", known)) == {"test"}
        assert set(kind.DATASETS) - set(kind.unread("test", {"val"})) == {"val", "test"}
