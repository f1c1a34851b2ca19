"""Tar shards as training streams of the data module: pairs, exact resume, weights, and what may not train."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from recorder import SPEC, Recorder, trainer
from tar_fixtures import picture, sample, store_row, write_store, write_tar
from torch import Tensor, nn
from torchvision.transforms import v2

from gmail_lightning.datamodules import MixedModalityDataModule, StreamingDataModule
from gmail_lightning.datasets import DataError, Filter, ImageFolder, ManifestDataset, TarShards
from gmail_lightning.tasks import BaseTask
from gmail_lightning.types import InputSpec


def real_and_generated(folder: Path, number: int = 22, **arguments: Any) -> tuple[ManifestDataset, TarShards]:
    """Real row n shows ``picture(1000 + n)``, its generated partner ``picture(n)``; one generated row is rejected."""
    rows = [store_row(n) for n in range(number)]
    rows[1] |= {"status": "rejected", "reason": "duplicate"}
    store = write_store(folder / "store", rows)
    lines = ["image,caption,pair_id,image_id"]
    for n in range(number):
        buffer = io.BytesIO()
        Image.fromarray(picture(1000 + n)).save(buffer, "PNG")
        (folder / f"{n}.png").write_bytes(buffer.getvalue())
        lines.append(f"{n}.png,caption {n},{n},{1000 + n}")
    (folder / "real.csv").write_text("\n".join(lines))
    return ManifestDataset(folder / "real.csv", modality="real"), TarShards(store, **arguments)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:1 real training rows have no generated")
def test_pairs_from_tars_resume_in_mid_epoch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train = list(real_and_generated(tmp_path))

    def module(workers: int) -> MixedModalityDataModule:
        noise = v2.ColorJitter(brightness=0.5)
        return MixedModalityDataModule(train, batch_size=8, num_workers=workers, augmentation=noise)

    straight, first, second = Recorder(), Recorder(), Recorder()
    with caplog.at_level("INFO"):
        trainer(tmp_path, max_steps=10).fit(straight, module(0))
    assert [record.message for record in caplog.records].count(train[1].summary) == 1
    saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=7, save_top_k=-1)
    trainer(tmp_path, max_steps=7, callbacks=[saver]).fit(first, module(2))  # 5 batches an epoch
    (path,) = (tmp_path / "saved").glob("*.ckpt")
    trainer(tmp_path, max_steps=10).fit(second, module(2), ckpt_path=path)
    for batch, expected in zip(first.seen + second.seen, straight.seen, strict=True):
        assert batch["sample_key"] == expected["sample_key"]
        assert torch.equal(batch["image"], expected["image"])
        assert torch.equal(batch["pair_id"][::2], batch["pair_id"][1::2])
        assert batch["modality"].tolist() == [1, 0] * 4
        assert 1 not in batch["pair_id"]
        assert "weight" not in batch


@pytest.mark.filterwarnings("ignore:1 real training rows have no generated")
def test_pixels_and_weights_of_a_batch(tmp_path: Path) -> None:
    real, generated = real_and_generated(tmp_path, weight="clip_score")
    held_out = TarShards(write_store(tmp_path / "val", [store_row(50, split="val")]), weight="clip_score")
    module = MixedModalityDataModule([real, generated], {"x": [held_out]}, batch_size=8, input_spec=SPEC)
    module.setup("fit")
    for batch in module.train_dataloader():
        assert batch["weight"].dtype == torch.float32
        for row, number in enumerate(batch["pair_id"].tolist()):
            is_generated = batch["modality"][row] == 1
            expected = picture(number if is_generated else 1000 + number)
            assert np.array_equal((batch["image"][row] * 255).round().byte().permute(1, 2, 0).numpy(), expected)
            assert batch["weight"][row].item() == pytest.approx(0.5 + number / 100 if is_generated else 1.0)
            assert batch["source"][row] == ("sd15" if is_generated else "real")
    (batch,) = module.val_dataloader()[0]
    assert batch["sample_key"] == ["k050"]
    assert "weight" not in batch  # it is of training alone


def test_weights_follow_the_row_that_stands_in(tmp_path: Path) -> None:
    scores = [0.1, 0.2, 0.3, 0.4, 0.5]
    folder = write_store(tmp_path / "store", [store_row(n, shard="s", clip_score=s) for n, s in enumerate(scores)])
    members = [m for n in range(5) for m in sample(f"k{n:03d}", n, "x")]
    write_tar(folder / "s.tar", [(k, b"broken") if k == "k002.png" else (k, d) for k, d in members])
    data = TarShards(folder, weight="clip_score")
    settings: dict[str, Any] = {"batch_size": 5, "mode": "mixture", "generated_fraction": 1.0, "input_spec": SPEC}
    module = MixedModalityDataModule([data], **settings)
    module.setup("fit")
    (batch,) = list(module.train_dataloader())
    assert batch["replaced"].sum() == 1
    expected = [scores[int(key[1:])] for key in batch["sample_key"]]
    assert batch["weight"].tolist() == pytest.approx(expected)


def test_rejected_rows_are_no_training_data(tmp_path: Path) -> None:
    real, generated = real_and_generated(tmp_path, filter=Filter(statuses=["ok", "rejected"]))
    module = MixedModalityDataModule([real, generated], batch_size=8, input_spec=SPEC)
    module.setup("fit")
    with pytest.raises(DataError, match=r"cannot be trained on: .*store is read with rejected images. Leave"):
        module.train_dataloader()
    module = MixedModalityDataModule(val={"x": [generated]}, batch_size=8, input_spec=SPEC)
    module.setup("validate")
    assert sum(len(b["modality"]) for b in module.val_dataloader()[0]) == 22  # to look at them is allowed


def test_data_sets_without_weights_give_none(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for n in range(4):
            Image.fromarray(picture(n)).save(tmp_path / name / f"{n}.png")
    data = ImageFolder(tmp_path)
    settings: dict[str, Any] = {"batch_size": 4, "mode": "mixture", "generated_fraction": 0.0, "input_spec": SPEC}
    module = MixedModalityDataModule([data], **settings)
    module.setup("fit")
    assert "weight" not in next(iter(module.train_dataloader()))


class Plain(BaseTask):
    """A task that ignores weights; its subclass does not."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(1, 1)
        self.weights: list[Tensor] = []

    @property
    def input_spec(self) -> InputSpec:
        return InputSpec()

    def compute_losses(self, batch: Any) -> dict[str, Tensor]:
        self.weights.append(batch["weight"])
        return {"loss": self.encoder(batch["weight"][:, None]).mean()}


class Weighing(Plain):
    uses_weights = True


def test_a_task_does_not_ignore_weights_in_silence(tmp_path: Path) -> None:
    _, generated = real_and_generated(tmp_path, weight="clip_score")
    settings: dict[str, Any] = {"batch_size": 7, "mode": "mixture", "generated_fraction": 1.0}
    with pytest.raises(MisconfigurationException, match="Plain does not weigh rows, but a training data set"):
        trainer(tmp_path, max_epochs=1).fit(Plain(), MixedModalityDataModule([generated], **settings))
    task = Weighing()
    trainer(tmp_path, max_epochs=1).fit(task, MixedModalityDataModule([generated], **settings))
    assert generated.weight is not None
    assert sorted(torch.cat(task.weights).tolist()) == pytest.approx(sorted(generated.weight.tolist()))


def test_the_command_line_builds_both(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", [store_row(n) for n in range(20)])
    write_tar(tmp_path / "a.tar", sample("a", 0, "x"))
    (tmp_path / "mixed.yaml").write_text(f"""
data:
  class_path: MixedModalityDataModule
  init_args:
    batch_size: 8
    mode: mixture
    generated_fraction: 1.0
    train:
      - class_path: TarShards
        init_args: {{path: {store}, filter: {{min_clip_score: 0.55, statuses: [ok]}}, weight: clip_score}}
""")
    (tmp_path / "stream.yaml").write_text(f"""
data:
  class_path: StreamingDataModule
  init_args: {{urls: "{tmp_path}/{{a,a}}.tar", modality: real, steps_per_epoch: 2, num_workers: 0}}
""")
    modules = []
    for name in ("mixed", "stream"):
        parser = ArgumentParser()
        parser.add_subclass_arguments(LightningDataModule, "data")
        modules.append(parser.instantiate(parser.parse_path(tmp_path / f"{name}.yaml")).data)
    mixed, stream = modules
    assert isinstance(mixed, MixedModalityDataModule)
    assert mixed.datasets["train"][0].pair_id.tolist() == list(range(5, 20))
    assert isinstance(stream, StreamingDataModule)
    assert stream.urls == [f"{tmp_path}/a.tar"] * 2
