"""Captions by the command: fit, predict and validate of the embedded recipe, and its checkpoint by itself."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from gmail_lightning.callbacks import CocoResultWriter
from gmail_lightning.command.main import main
from gmail_lightning.command.recipes import recipes_folder
from gmail_lightning.datasets import EmojiDataset
from gmail_lightning.tasks import CaptioningTask
from gmail_lightning.transforms import resize

SHORT = [
    "--trainer.accelerator=cpu", "--data.init_args.num_workers=0", "--data.init_args.batch_size=16",
    "--model.init_args.num_beams=1", "--model.init_args.max_new_tokens=4", "--trainer.default_root_dir=runs/captions",
]  # fmt: skip
CLIPCAP = ["--config", str(recipes_folder() / "emoji/caption_clipcap.yaml"), *SHORT]
ALIGN = [
    "--config", str(recipes_folder() / "emoji/align.yaml"), "--trainer.max_steps=1", "--trainer.limit_val_batches=0",
    "--trainer.num_sanity_val_steps=0", "--trainer.accelerator=cpu", "--data.init_args.batch_size=16",
    "--data.init_args.num_workers=0", "--trainer.callbacks=null",
]  # fmt: skip


@pytest.mark.slow
def test_fit_predict_and_validate_write_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GMAIL_LIGHTNING_RUN_DIR", raising=False)
    assert main(["fit", *ALIGN]) == 0
    steps = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.limit_val_batches=1"]
    assert main(["fit", *CLIPCAP, *steps]) == 0
    run = tmp_path / "runs/captions"
    fitted = json.loads((run / "results.json").read_text())
    assert fitted["step"] == 2
    assert {"CIDEr", "unique_captions"} <= fitted["results"]["novel"].keys()
    assert set(fitted["tokenizers"].values()) <= {"java", "python"}
    assert {p.name for p in (run / "captions").iterdir()} == {"novel-step-000002.html", "paired-step-000002.html"}

    shutil.rmtree(tmp_path / "runs/emoji-align")  # its adapters are in the checkpoint
    (checkpoint,) = (run / "checkpoints").glob("last.ckpt")
    monkeypatch.delenv("GMAIL_LIGHTNING_RUN_DIR", raising=False)
    sets = json.dumps([{"class_path": "EmojiDataset", "init_args": {"concept_set": "novel"}}])
    given = ["--ckpt_path", str(checkpoint), "--data.init_args.predict", sets, "--trainer.limit_predict_batches=1"]
    kept: list[bool] = []
    write = CocoResultWriter.on_predict_end
    monkeypatch.setattr(
        CocoResultWriter, "on_predict_end",
        lambda self, trainer, task: (kept.append(trainer.predict_loop.return_predictions), write(self, trainer, task)),
    )  # fmt: skip
    assert main(["predict", *CLIPCAP, *given]) == 0
    assert kept == [False]  # Lightning would keep all captions until the end
    (path,) = run.rglob("captions.json")
    rows = json.loads(path.read_text())
    images = EmojiDataset(concept_set="novel")
    assert [row["image_id"] for row in rows] == sorted(images.image_id[:200].tolist())

    task = CaptioningTask.load_from_checkpoint(checkpoint).eval()
    pixels = torch.stack([resize(images.image(i), task.encoder.image_spec) for i in range(3)])
    batch = {"image": pixels, "image_row": torch.arange(3), "modality": torch.zeros(3, dtype=torch.long)}
    written = dict(zip(images.image_id[:3].tolist(), task.write(batch), strict=True))
    assert {row["image_id"]: row["caption"] for row in rows if row["image_id"] in written} == written

    monkeypatch.delenv("GMAIL_LIGHTNING_RUN_DIR", raising=False)
    assert main(["validate", *CLIPCAP, "--ckpt_path", str(checkpoint), "--trainer.limit_val_batches=1"]) == 0
    (values,) = run.rglob("validate_results.json")
    assert json.loads(values.read_text())["checkpoint"] == str(checkpoint)


@pytest.mark.slow
def test_an_untrained_captioner_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GMAIL_LIGHTNING_RUN_DIR", raising=False)
    assert main(["validate", *CLIPCAP, "--model.encoder.aligned=null"]) == 2
    assert "CaptioningTask" in capsys.readouterr().err
