"""What an evaluation leaves as a file: values, what is missing and why, in JSON that every reader takes."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from echo_task import EchoTask
from tiny_tasks import emoji_data, quiet_trainer
from torch import Tensor
from torchmetrics import Metric

from gmail_lightning.callbacks import ResultsWriter
from gmail_lightning.tasks.results import EvaluationResult

JAVA = "java was not found: install a Java runtime"


class Scores(Metric):
    """What a metric with a missing tool gives."""

    def update(self) -> None:
        pass

    def compute(self) -> dict[str, Tensor]:
        return {"CIDEr": torch.tensor(0.75), "METEOR": torch.tensor(torch.nan), "length": torch.tensor(-torch.inf)}


class Scored(EchoTask):
    def __init__(self, reasons: dict[str, dict[str, str]]) -> None:
        super().__init__()
        self.missing = reasons

    def build_metrics(self, eval_set: str) -> dict[str, Metric]:
        return {"scores": Scores()}

    def complete_result(self, name: str, result: EvaluationResult, metrics: Any) -> None:
        super().complete_result(name, result, metrics)
        result.reasons = self.missing.get(name, {})


def read(file: Path) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(file.read_text(), parse_constant=refuse)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric Scores was called before")
def test_a_fit_writes_and_shows_what_is_missing_and_why(tmp_path: Path, caplog: Any) -> None:
    told = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    told.addHandler(caplog.handler)
    settings = {"max_steps": 1, "val_check_interval": 1, "num_sanity_val_steps": -1}
    task = Scored({"novel": {"METEOR": JAVA}, "paired": {}})
    quiet_trainer(tmp_path, callbacks=[ResultsWriter()], **settings).fit(task, emoji_data())
    told.removeHandler(caplog.handler)
    content = read(tmp_path / "results.json")
    values = {"CIDEr": 0.75, "METEOR": None, "length": None}
    assert content == {
        "step": 1, "results": {"novel": values}, "before": {"novel": values}, "reasons": {"novel": {"METEOR": JAVA}}
    }  # fmt: skip
    shown = caplog.records[-1].getMessage().splitlines()
    assert f"  {'CIDEr':<26}{0.75:>9.3f}{0.75:>9.3f}" in shown
    assert f"novel: METEOR: {JAVA}" in shown
    assert not any(line.startswith("paired") for line in shown)


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric Scores was called before")
@pytest.mark.parametrize("verb", ["validate", "test"])
@pytest.mark.parametrize("reasons", [{"novel": {"METEOR": JAVA, "SPICE": "no jar"}}, {"novel": {}}, {}])
def test_an_evaluation_writes_and_tells_them(verb: str, reasons: Any, tmp_path: Path, recwarn: Any) -> None:
    trainer = quiet_trainer(tmp_path, callbacks=[ResultsWriter()])
    getattr(trainer, verb)(Scored(reasons), emoji_data(), verbose=False)
    content = read(tmp_path / f"{verb}_results.json")
    assert content["results"]["novel"] == {"CIDEr": 0.75, "METEOR": None, "length": None}
    some = {name: missing for name, missing in reasons.items() if missing}
    assert content.get("reasons", {}) == some
    told = [str(warning.message) for warning in recwarn if "Not all could be computed" in str(warning.message)]
    expected = f"Not all could be computed.\nnovel: METEOR: {JAVA}\nnovel: SPICE: no jar"
    assert told == ([expected] if some else [])


def test_a_fit_that_ends_before_its_first_evaluation_says_so(tmp_path: Path) -> None:
    settings = {"max_steps": 1, "val_check_interval": 2, "num_sanity_val_steps": 0}
    with pytest.warns(UserWarning, match="No evaluation was run"):
        quiet_trainer(tmp_path, callbacks=[ResultsWriter()], **settings).fit(EchoTask(), emoji_data())
    assert not (tmp_path / "results.json").exists()
