"""``gmail-lightning predict`` as the generation stage: flags, refusals, exit status."""

import json
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from gmail_lightning.command.main import main

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
import generation_ranks

TEXTS = [f"thing {i}" for i in range(10)]
CONFIG = """
model:
  class_path: ImageGenerationTask
  init_args:
    generator: {class_path: generation_ranks.StubGenerator}
data:
  class_path: PromptDataModule
  init_args:
    captions:
      - {class_path: generation_ranks.Captions, init_args: {texts: TEXTS}}
    evaluation: {}
trainer:
  accelerator: cpu
  logger: false
  callbacks:
    - {class_path: DatasetWriter, init_args: {out: set, shard_size: 4, licences: {captions: CC-BY-4.0}}}
"""


def status(args: list[str]) -> int:
    try:
        return main(args)
    except SystemExit as error:
        return int(error.code or 0)


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GMAIL_LIGHTNING_RUN_DIR", raising=False)
    (tmp_path / "generate.yaml").write_text(CONFIG.replace("TEXTS", json.dumps(TEXTS)))
    return ["predict", "--config", "generate.yaml"]


@pytest.mark.slow
def test_workers_then_the_card(
    config: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    assert status([*config, "--worker", "0/2"]) == 0
    assert "1 of 3 shards are missing, such as train-000001" in caplog.text
    assert {p.name for p in (tmp_path / "set").glob("*.tar")} == {"train-000000.tar", "train-000002.tar"}
    assert status([*config, "--worker=1/2", "--mode=incremental"]) == 0
    assert "images 4/4" in capfd.readouterr().out
    assert pq.read_table(tmp_path / "set/manifest.parquet").num_rows == 10
    assert "CC-BY-4.0" in (tmp_path / "set/README.md").read_text()
    assert not list(tmp_path.rglob("predictions-*.pt"))


@pytest.mark.slow
def test_images_that_fail_are_status_4(config: list[str], tmp_path: Path) -> None:
    path = tmp_path / "generate.yaml"
    path.write_text(path.read_text().replace("thing 3", "nan").replace("thing 4", "black"))
    assert status([*config, "--dry_run", "true"]) == 4
    assert not (tmp_path / "set").exists()
    assert status(config) == 4
    assert status(config) == 4  # as long as there are such rows
    assert "not_finite" in (tmp_path / "set/README.md").read_text()


@pytest.mark.slow
def test_refusals(config: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    steps = "--model.init_args.generator.init_args.steps=3"
    assert status(config) == 0
    assert status([*config, steps]) == 2
    assert "--mode extend" in capfd.readouterr().err
    assert status([*config, steps, "--mode", "extend"]) == 0
    assert status([*config, steps, "--mode", "overwrite"]) == 0
    assert pq.read_table(tmp_path / "set/manifest.parquet").num_rows == 10
    assert status([*config, "--worker", "2/2"]) == 2
    assert "worker='2/2'" in capfd.readouterr().err
    assert status([*config, "--data.init_args.evaluation", "null"]) == 3
    assert status([*config, "--trainer.callbacks", "null", "--dry_run", "true"]) == 2
    assert "--dry_run is for the callback DatasetWriter" in capfd.readouterr().err


def test_a_generator_without_weights_is_refused(config: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation_ranks.StubGenerator, "pretrained", False)
    assert status(config) == 2
    assert not Path("set").exists()
