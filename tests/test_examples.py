"""The examples run as their first lines say."""

import json
from pathlib import Path

import pytest

from gmail_lightning.main import main, recipes_folder

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_an_encoder_of_ones_own_is_aligned_by_one_override(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = EXAMPLES / "custom_encoder.py"
    assert len(path.read_text().splitlines()) <= 40
    override = path.read_text().splitlines()[1].split(" --model.")[1].split()
    monkeypatch.chdir(EXAMPLES)
    short = ["--trainer.max_steps=20", "--trainer.val_check_interval=20"]
    recipe = ["--config", str(recipes_folder() / "emoji/align.yaml"), f"--trainer.default_root_dir={tmp_path}"]
    assert main(["fit", *recipe, f"--model.{override[0]}", override[1], *short]) == 0
    gap = json.loads((tmp_path / "modality_gap.json").read_text())
    assert gap["after"]["paired"]["g2r_R@5"] > gap["before"]["paired"]["g2r_R@5"]
