"""The examples run as their first lines say."""

import csv
from pathlib import Path

import pytest

from gmail_lightning.command.main import main
from gmail_lightning.command.recipes import recipes_folder

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_an_encoder_of_ones_own_is_aligned_by_one_override(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = EXAMPLES / "custom_encoder.py"
    assert len(path.read_text().splitlines()) <= 40
    override = path.read_text().splitlines()[1].split(" --model.")[1].split()
    monkeypatch.chdir(EXAMPLES)
    short = ["--trainer.max_steps=20", "--trainer.val_check_interval=20", "--trainer.log_every_n_steps=1"]
    recipe = ["--config", str(recipes_folder() / "emoji/align.yaml"), f"--trainer.default_root_dir={tmp_path}"]
    assert main(["fit", *recipe, f"--model.{override[0]}", override[1], *short]) == 0
    assert (tmp_path / "modality_gap.png").exists()
    rows = csv.DictReader((tmp_path / "csv/version_0/metrics.csv").open())
    losses = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    assert len(losses) == 20
    assert max(losses[-5:]) < min(losses[:5])
