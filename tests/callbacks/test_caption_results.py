"""Captions in COCO's result format: every image once, in order, on any number of processes, after any interruption."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from echo_task import EchoTask
from lightning.fabric.utilities.exceptions import MisconfigurationException
from pycocoevalcap.eval import COCOEvalCap
from pycocotools.coco import COCO
from tiny_tasks import quiet_trainer
from torch.utils.data import DataLoader

from gmail_lightning.callbacks import CaptionGallery, CocoResultWriter
from gmail_lightning.datamodules import MixedModalityDataModule
from gmail_lightning.datasets import CocoCaptions, DataError, EmojiDataset


def coco(folder: Path, ids: list[int]) -> tuple[Path, CocoCaptions]:
    """Grey pictures with two captions each, and their annotations in COCO's own form."""
    from PIL import Image

    images = [{"id": i, "file_name": f"{i}.png"} for i in ids]
    captions = [
        {"id": 10 * i + number, "image_id": i, "caption": f"picture {i}, {number}"} for i in ids for number in (1, 2)
    ]
    for i in ids:
        Image.new("RGB", (30, 30), (i % 256,) * 3).save(folder / f"{i}.png")
    path = folder / "captions.json"
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": captions}))
    return path, CocoCaptions(path, folder)


def predicted(task: Any, datasets: list[Any], folder: Path, writer: CocoResultWriter, **settings: Any) -> Any:
    data = MixedModalityDataModule(predict=datasets, eval_batch_size=3)
    return quiet_trainer(folder, callbacks=[writer], **settings).predict(task, data)


def test_cocos_own_tools_read_the_file(tmp_path: Path) -> None:
    ids = [900, 3, 391895, 42, 7]
    annotations, dataset = coco(tmp_path, ids)
    returned = predicted(EchoTask(lambda key, step: f"picture {key.split('/')[0]}, 1"), [dataset], tmp_path,
                         CocoResultWriter(str(tmp_path / "new" / "out.json")))  # fmt: skip
    assert sum(len(batch["caption"]) for batch in returned) == 5  # what predict returns is left alone
    path = tmp_path / "new" / "out.json"
    rows = json.loads(path.read_text())
    assert rows == [{"image_id": i, "caption": f"picture {i}, 1"} for i in sorted(ids)]
    assert [file.name for file in path.parent.iterdir()] == ["out.json"]
    reference = COCO(str(annotations))
    results = reference.loadRes(str(path))
    assert sorted(results.getImgIds()) == sorted(ids) == sorted(COCOEvalCap(reference, results).params["image_id"])
    assert results.imgToAnns[42][0]["caption"] == reference.imgToAnns[42][0]["caption"]


def test_hard_captions_stay_one_line_each(tmp_path: Path) -> None:
    _, dataset = coco(tmp_path, [1, 2, 3, 4])
    hard = {"1": 'a "quoted"\r\n dog\u2028\x0b|||', "2": "", "3": "一只狗 🐶 \ud83d", "4": "\\u0041</script>"}
    predicted(
        EchoTask(lambda key, step: hard[key.split("/")[0]]), [dataset], tmp_path, CocoResultWriter(sample_keys=True)
    )
    file = tmp_path / "captions.json"
    rows = json.loads(file.read_text())
    assert [row["caption"] for row in rows] == ['a "quoted" dog |||', "", "一只狗 🐶 \ud83d", "\\u0041</script>"]
    assert [row["sample_key"] for row in rows] == [dataset.sample_key(i) for i in (0, 2, 4, 6)]
    assert file.read_text().count("\n") == 6


def test_an_older_file_is_replaced_and_a_trial_run_leaves_it(tmp_path: Path) -> None:
    _, dataset = coco(tmp_path, [1, 2])
    file = tmp_path / "out.json"
    file.write_text("old")
    predicted(EchoTask(), [dataset], tmp_path, CocoResultWriter(str(file)), fast_dev_run=True)
    assert file.read_text() == "old"
    predicted(EchoTask(), [dataset], tmp_path, CocoResultWriter(str(file)))
    assert [row["image_id"] for row in json.loads(file.read_text())] == [1, 2]


def test_images_that_would_come_twice_are_refused_before_the_first_batch(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(EchoTask, "predict_step", lambda *args: pytest.fail("a batch came first"))
    hands = [EmojiDataset(hand, "novel") for hand in ("noto", "fluent_flat")]
    both = len({*hands[0].image_id.tolist()} & {*hands[1].image_id.tolist()})
    with pytest.raises(DataError, match=rf"'noto/.*'\) and .*'fluent_flat/.* same image_id \d+ \({both} such images\)"):
        predicted(EchoTask(), hands, tmp_path, CocoResultWriter())


def test_an_image_that_comes_twice_from_a_loader_of_ones_own_is_told(tmp_path: Path, recwarn: Any) -> None:
    class Own(EchoTask):
        written = staticmethod(lambda batch: batch["caption"])

    batches = [(5, 2, 5), (2, 1)]
    captions = [("five", "two", "5"), ("two", "one")]
    made = [
        {"image_id": torch.tensor(ids), "caption": list(texts), "sample_key": list(texts)}
        for ids, texts in zip(batches, captions, strict=True)
    ]
    quiet_trainer(tmp_path, callbacks=[CocoResultWriter()]).predict(Own(), DataLoader(made, batch_size=None))
    rows = json.loads((tmp_path / "captions.json").read_text())
    assert rows == [
        {"image_id": 1, "caption": "one"}, {"image_id": 2, "caption": "two"}, {"image_id": 5, "caption": "five"}
    ]  # fmt: skip
    told = [str(warning.message) for warning in recwarn if "came before" in str(warning.message)]
    assert len(told) == 1
    assert told[0].startswith("2 captions are of an image_id that came before, such as 5; 1 of them differ")


def test_other_tasks_and_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path='out.txt': COCO results are a .json file"):
        CocoResultWriter("out.txt")

    class Features(EchoTask):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return {"image_features": batch["image"]}

    _, dataset = coco(tmp_path, [1])
    with pytest.raises(MisconfigurationException, match="Features predicts none: predict_step must return a dict"):
        predicted(Features(), [dataset], tmp_path, CocoResultWriter())


def test_two_processes_write_one_file_and_one_gallery(tmp_path: Path) -> None:
    """The ranks have unequal numbers of batches; the evaluation must not wait for a page that one of them draws."""

    class Counted(EchoTask):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
            (tmp_path / f"batch-{self.global_rank}-{batch_idx}").write_text(str(len(batch["sample_key"])))
            return super().predict_step(batch, batch_idx)

    noto = EmojiDataset("noto", "novel")
    data = MixedModalityDataModule(val={"novel": [noto]}, predict=[noto], eval_batch_size=len(noto) // 2)
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp_fork", logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, callbacks=[CocoResultWriter(), CaptionGallery(4)],
    )  # fmt: skip
    trainer.validate(Counted(), data, verbose=False)
    trainer.predict(Counted(), data)
    half = len(noto) // 2
    seen = {path.name: int(path.read_text()) for path in tmp_path.glob("batch-*")}
    assert seen == {"batch-0-0": half, "batch-0-1": 1, "batch-1-0": half}
    keys = {int(image_id): noto.sample_key(row) for row, image_id in enumerate(noto.image_id)}
    rows = json.loads((tmp_path / "captions.json").read_text())
    assert rows == [{"image_id": i, "caption": f"{keys[i]} at 0"} for i in sorted(keys)]
    (page,) = (tmp_path / "captions").iterdir()
    assert page.name == "novel-validate.html"
    assert page.read_text().count("<article") == 4


# Interruptions

NOTO = EmojiDataset("noto", "novel")


class Counted(EchoTask):
    """Tells in files which images it has captioned."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        super().__init__(**settings)
        self.folder = folder

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        made = self.folder / f"made-{self.global_rank}-{batch_idx}"
        made.write_text("\n".join(batch["sample_key"]))
        return super().predict_step(batch, batch_idx)


def made(folder: Path) -> list[str]:
    """Keys of the images that were captioned since this was last asked."""
    paths = list(folder.glob("made-*"))
    keys = [key for path in paths for key in path.read_text().split("\n")]
    for path in paths:
        path.unlink()
    return keys


def caption(folder: Path, task: EchoTask, data: Any = None, ckpt_path: str | None = None, **settings: Any) -> None:
    data = data or MixedModalityDataModule(predict=[NOTO], eval_batch_size=50)
    writer = CocoResultWriter(str(folder / "out.json"), sample_keys=True, seconds=0.0)
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, callbacks=[writer], **settings,
    )  # fmt: skip
    trainer.predict(task, data, ckpt_path=ckpt_path)
    if data.input_spec is not None:  # set up in this process
        assert len(data.predict_dataloader().dataset) == len(data.predict_rows())  # nothing is left out any more


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("whole")
    caption(folder, EchoTask())
    keys = {int(image_id): NOTO.sample_key(row) for row, image_id in enumerate(NOTO.image_id)}
    whole = (folder / "out.json").read_bytes()
    assert json.loads(whole) == [
        {"image_id": i, "caption": f"{keys[i]} at 0", "sample_key": keys[i]} for i in sorted(keys)
    ]
    return whole


def test_a_run_cut_short_goes_on_at_another_world_size(tmp_path: Path, uninterrupted: bytes) -> None:
    caption(tmp_path, Counted(tmp_path), limit_predict_batches=3)
    first = made(tmp_path)
    rows = json.loads((tmp_path / "out.json").read_text())
    assert sorted(row["sample_key"] for row in rows) == sorted(first)  # what there is, is told
    assert len(first) == 150
    caption(tmp_path, Counted(tmp_path), devices=2, strategy="ddp_fork")
    second = made(tmp_path)
    assert sorted(first + second) == sorted(NOTO.sample_key(row) for row in range(len(NOTO)))  # none twice
    assert (tmp_path / "out.json").read_bytes() == uninterrupted
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_a_termination_loses_nothing(tmp_path: Path, uninterrupted: bytes) -> None:
    class Terminated(Counted):
        is_armed = True

        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
            if self.is_armed and batch_idx == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().predict_step(batch, batch_idx)

    with pytest.raises(SystemExit) as left:
        caption(tmp_path, Terminated(tmp_path))
    assert left.value.code == 143
    assert len(made(tmp_path)) == 150
    assert not (tmp_path / "out.json").exists()
    Terminated.is_armed = False
    caption(tmp_path, Terminated(tmp_path), limit_predict_batches=2)
    assert len(made(tmp_path)) == 100
    caption(tmp_path, Terminated(tmp_path))
    assert len(made(tmp_path)) == len(NOTO) - 250
    assert (tmp_path / "out.json").read_bytes() == uninterrupted


def test_an_error_loses_nothing(tmp_path: Path, uninterrupted: bytes) -> None:
    gone = []

    def write(key: str, step: int) -> str:
        gone.append(key)
        if len(gone) == 130:
            raise ConnectionError("the machine is gone")
        return f"{key} at {step}"

    with pytest.raises(ConnectionError):
        caption(tmp_path, EchoTask(write))
    caption(tmp_path, EchoTask(write))
    assert len(gone) == 130 + len(NOTO) - 100
    assert (tmp_path / "out.json").read_bytes() == uninterrupted


@pytest.mark.parametrize("changed", ["weights", "checkpoint", "images", "task"])
def test_captions_of_something_else_are_made_anew(tmp_path: Path, uninterrupted: bytes, changed: str) -> None:
    checkpoint = tmp_path / "echo.ckpt"

    def saved(weight: float) -> str:
        task = EchoTask()
        torch.nn.init.constant_(task.weight, weight)
        trainer = pl.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
        trainer.strategy.connect(task)
        trainer.save_checkpoint(checkpoint)
        return str(checkpoint)

    given = {"ckpt_path": saved(1.0)} if changed == "checkpoint" else {}
    before = {"data": MixedModalityDataModule(predict=[EmojiDataset("noto")])} if changed == "images" else {}
    task = Counted(tmp_path) if changed == "task" else EchoTask()
    caption(tmp_path, task, **before, **given, limit_predict_batches=1)
    made(tmp_path)
    if changed == "checkpoint":
        saved(1.0)
        os.utime(checkpoint, ns=(0, 0))
    task = EchoTask()
    if changed == "weights":
        torch.nn.init.constant_(task.weight, 2.0)
    with pytest.warns(UserWarning, match=rf"captions of another run are removed \({changed}: "):
        caption(tmp_path, task, **given)
    assert (tmp_path / "out.json").read_bytes() == uninterrupted
