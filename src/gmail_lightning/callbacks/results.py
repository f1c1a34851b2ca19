"""Values of an evaluation as a file, and an end to runs that destroy what they started from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from gmail_lightning.callbacks.modality_gap import ModalityGapReport, require_validation_before
from gmail_lightning.distributed import on_first_rank
from gmail_lightning.tasks import BaseTask
from gmail_lightning.tasks.results import EvaluationResult, values_by_set

Results = dict[str, dict[str, float]]  # value by evaluation set and name


class CollapseError(RuntimeError):
    """Training has destroyed the score that it started from."""


class ResultsWriter(Callback):
    """Writes the values of every evaluation set to ``results.json`` in the run folder.

    ``validate`` and ``test`` write ``validate_results.json`` and ``test_results.json``, with their ``checkpoint``.
    ``results`` holds the values of the last evaluation and ``step`` when it was; ``before`` those from before training,
    where ``trainer.num_sanity_val_steps`` is -1; ``classes`` the accuracy of every class, from tasks that classify;
    from tasks that caption, ``reasons``, what could not be computed and why, and ``tokenizers``, which one split the
    captions of each set, ``java`` or ``python``. A value that is not a number is null.
    """

    def __init__(self) -> None:
        self.before: Results = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps the values from before the first step, writes later ones."""
        if trainer.sanity_checking:
            if trainer.num_sanity_val_steps == float("inf"):
                self.before = values_by_set(cast(BaseTask, pl_module).results)
        else:
            self._write(trainer, cast(BaseTask, pl_module))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows the values of the real images, and where all are."""
        found, running = cast(BaseTask, pl_module).results, cast(Any, trainer)
        results = values_by_set(found)
        shown_elsewhere = any(isinstance(callback, ModalityGapReport) for callback in running.callbacks)
        if not results and trainer.enable_validation and not running.fast_dev_run:
            rank_zero_warn(
                "No evaluation was run: there is no results.json. Set trainer.val_check_interval below the steps."
            )
        if running.fast_dev_run or not results or shown_elsewhere:
            return
        lines = []
        for name, values in results.items():
            shown = {key: value for key, value in values.items() if not key.startswith(("generated_", "num_"))}
            before = self.before.get(name, {})
            lines += ["", f"{name:<28}{'before':>9}{'after':>9}" if before else f"{name:<28}"]
            lines += [
                f"  {k:<26}" + (f"{before[k]:>9.3f}" if k in before else "") + f"{v:>9.3f}" for k, v in shown.items()
            ]
        lines += ["", *_lines(reasons)] if (reasons := _reasons(found)) else []
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        rank_zero_info("\n".join([*lines, f"All values: {folder / 'results.json'}"]))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the values."""
        self._write(trainer, cast(BaseTask, pl_module))

    def _write(self, trainer: Trainer, task: BaseTask) -> None:
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # a collective: on every rank
        if not cast(Any, trainer).fast_dev_run:
            on_first_rank(partial(self._write_into, folder, trainer, task), trainer)

    def _write_into(self, folder: Path, trainer: Trainer, task: BaseTask) -> None:
        verb = cast(TrainerFn, trainer.state.fn)
        of_fit = verb == TrainerFn.FITTING
        when = {"step": trainer.global_step} if of_fit else {"checkpoint": str(trainer.ckpt_path or "")}
        content: dict[str, Any] = {**when, "results": values_by_set(task.results)}
        if self.before:
            content["before"] = self.before
        if classes := {name: found.class_accuracy for name, found in task.results.items() if found.class_accuracy}:
            content["classes"] = classes
        if tokenizers := {name: found.tokenizer for name, found in task.results.items() if found.tokenizer}:
            content["tokenizers"] = tokenizers
        if reasons := _reasons(task.results):
            content["reasons"] = reasons
        folder.mkdir(parents=True, exist_ok=True)
        name = "results.json" if of_fit else f"{verb.value}_results.json"
        (folder / name).write_text(json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")
        if reasons and not of_fit:  # a fit tells them at its end
            rank_zero_warn("\n".join(["Not all could be computed.", *_lines(reasons)]))

    def state_dict(self) -> dict[str, Any]:
        """The state before training, so that a resumed run compares with the true beginning."""
        return {"before": self.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See ``state_dict``."""
        self.before = state_dict["before"]


def _reasons(results: Mapping[str, EvaluationResult]) -> dict[str, dict[str, str]]:
    """What could not be computed and why, by set and name; without the sets that lack nothing."""
    return {name: found.reasons for name, found in results.items() if found.reasons}


def _lines(reasons: dict[str, dict[str, str]]) -> list[str]:
    return [f"{name}: {key}: {reason}" for name, missing in reasons.items() for key, reason in missing.items()]


def _finite(content: Any) -> Any:
    """The same with None in the place of NaN and infinity, which JSON does not know."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    return None if isinstance(content, float) and not math.isfinite(content) else content


class CollapseGuard(Callback):
    """Stops a run whose score falls far below that of the untouched encoder; needs ``num_sanity_val_steps: -1``.

    Fine-tuning can destroy a CLIP within a few hundred steps (mlfoundations/open_clip#1093), so let the first
    validation come early.

    Args:
        metric: Name of a value that is better when higher, such as ``accuracy`` or ``i2t_R@1``: that of real images,
            which take the frozen branch.
        eval_set: Evaluation set; the first one by default.
        max_drop: Share of the score before training that may be lost.

    Raises:
        CollapseError: At the end of a validation below that, on every rank alike.
    """

    def __init__(self, metric: str = "accuracy", eval_set: str | None = None, max_drop: float = 0.3) -> None:
        if not 0 < max_drop < 1:
            raise ValueError(f"max_drop={max_drop} is a share between 0 and 1.")
        self.metric, self.eval_set, self.max_drop = metric, eval_set, max_drop
        self.before: float | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses a run without validation before the first step."""
        if stage == "fit":
            require_validation_before(self, trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compares with the state before training."""
        results = values_by_set(cast(BaseTask, pl_module).results)
        name = self.eval_set or next(iter(results), None)
        if name not in results or self.metric not in results[name]:
            known = {key: sorted(values) for key, values in results.items()}
            raise MisconfigurationException(f"CollapseGuard: no {self.metric!r} of set {name!r}. There are: {known}.")
        score = results[name][self.metric]
        if trainer.sanity_checking:
            self.before = score
        elif self.before is not None and score < (1 - self.max_drop) * self.before:
            raise CollapseError(
                f"{name}/{self.metric} fell from {self.before:.3f} before training to {score:.3f} at step "
                f"{trainer.global_step}, below what CollapseGuard(max_drop={self.max_drop}) keeps. "
                "Training destroys what the encoder knew: lower the learning rate, train less of it "
                "(text_side: lora or projection), or stop earlier. What was saved before is kept."
            )

    def state_dict(self) -> dict[str, Any]:
        """The score before training, so that a resumed run compares with the true beginning."""
        return {"before": self.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See ``state_dict``."""
        self.before = state_dict["before"]
