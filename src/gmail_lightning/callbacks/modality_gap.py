"""Before and after: the modality gap as a table, a figure and a JSON file."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn import functional as F

from gmail_lightning.distributed import on_first_rank
from gmail_lightning.metrics import ModalityGap
from gmail_lightning.tasks import BaseTask
from gmail_lightning.tasks.results import values_by_set

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TABLE = {
    "g2r_R@1": "generated->real R@1",
    "g2r_R@5": "generated->real R@5",
    "g2r_R@10": "generated->real R@10",
    "margin": "cosine margin (paired - shuffled)",
    "paired_cosine": "paired cosine",
    "shuffled_cosine": "shuffled cosine",
    "centroid_distance": "centroid distance",
    "probe_accuracy": "linear probe real/generated",
    "generated_i2t_R@1": "generated image->text R@1",
    "real_i2t_R@1": "real image->text R@1",
}
Pairs = tuple[Tensor, Tensor]  # generated and real features, (N, D) each, unit norm


def require_validation_before(callback: Callback, trainer: Trainer) -> None:
    """Refuses a fit whose sets are not validated as a whole before the first step, for what compares with that.

    Raises:
        MisconfigurationException: If ``trainer.num_sanity_val_steps`` is not -1.
    """
    if not cast(Any, trainer).fast_dev_run and trainer.num_sanity_val_steps != float("inf"):
        raise MisconfigurationException(
            f"{type(callback).__name__} compares with the state before training: set trainer.num_sanity_val_steps=-1 "
            f"(got {trainer.num_sanity_val_steps}), or drop the callback."
        )


class ModalityGapReport(Callback):
    """Compares the validation before training with the last one; needs ``num_sanity_val_steps: -1``.

    Writes ``modality_gap.png`` and ``modality_gap.json`` into the run folder, the figure to TensorBoard, and the table
    to the terminal. The figure's PCA basis is fitted once, on the features before training, and kept in checkpoints, so
    that both panels show the same plane. When alignment works the two clouds of the second panel overlap, and the
    paired cosines move away from the shuffled ones.

    Args:
        figure_set: Evaluation set that is drawn; the first one by default.
        max_pairs: Pairs that are drawn, the first by ``image_id``.
    """

    def __init__(self, figure_set: str | None = None, max_pairs: int = 1000) -> None:
        self.figure_set, self.max_pairs = figure_set, max_pairs
        self.before: dict[str, dict[str, float]] = {}
        self._before_pairs: Pairs | None = None
        self._pairs: Pairs | None = None
        self._folder = Path()
        self._step: int | None = None  # of the last validation after the first step

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses a run without validation before the first step."""
        if stage == "fit":
            require_validation_before(self, trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Asks for the run folder, which is a collective, on every rank."""
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the pairs of the drawn set while the metric still holds them."""
        task = cast(BaseTask, pl_module)
        sets = [key.removeprefix("val/") for key in task.metrics if key.startswith("val/")]
        name = self.figure_set or sets[0]
        if name not in sets:
            raise MisconfigurationException(f"figure_set={name!r} is no evaluation set; there are {', '.join(sets)}.")
        gap = cast(Any, task.metrics[f"val/{name}"])["gap"]
        if not isinstance(gap, ModalityGap):
            raise MisconfigurationException(f"{type(pl_module).__name__} measures no modality gap.")
        with gap.sync_context():
            generated, real, _ = gap.pairs()
        pairs = (generated[: self.max_pairs], real[: self.max_pairs])
        self._pairs = tuple(F.normalize(x, dim=-1).cpu() for x in pairs)  # type: ignore[assignment]
        if trainer.sanity_checking:
            self._before_pairs = self._pairs

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps the values from before the first step, and remembers when the last ones were taken."""
        if trainer.sanity_checking:
            self.before = values_by_set(cast(BaseTask, pl_module).results)
        else:
            self._step = trainer.global_step

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the table, draws the figure, writes the JSON file."""
        if not cast(Any, trainer).fast_dev_run:
            on_first_rank(partial(self._report, trainer, cast(BaseTask, pl_module)), trainer)

    def _report(self, trainer: Trainer, task: BaseTask) -> None:
        if self._step is None or self._before_pairs is None or self._pairs is None:
            rank_zero_warn(
                "No comparison of before and after: there was no validation after the first step. Let one fall on the "
                "last step by trainer.val_check_interval or check_val_every_n_epoch."
            )
            return
        if self._step != trainer.global_step:
            rank_zero_warn(f"The last validation was at step {self._step} of {trainer.global_step}.")
        after = values_by_set(task.results)
        rank_zero_info(format_table(self.before, after))
        folder = self._folder
        folder.mkdir(parents=True, exist_ok=True)
        values = {"step": self._step, "before": self.before, "after": after}
        (folder / "modality_gap.json").write_text(json.dumps(values, indent=2))
        figure = draw(self._before_pairs, self._pairs)
        figure.savefig(folder / "modality_gap.png", dpi=120)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure("modality_gap", figure, trainer.global_step)
        rank_zero_info(f"Figure: {folder / 'modality_gap.png'}")

    def state_dict(self) -> dict[str, Any]:
        """The state before training, so that a resumed run compares with the true beginning."""
        pairs = self._before_pairs
        return {"before": self.before, "pairs": None if pairs is None else [x.half() for x in pairs]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See ``state_dict``."""
        self.before, pairs = state_dict["before"], state_dict["pairs"]
        self._before_pairs = None if pairs is None else (pairs[0].float(), pairs[1].float())


def format_table(before: dict[str, dict[str, float]], after: dict[str, dict[str, float]]) -> str:
    """Before and after of every set as aligned text."""
    lines = []
    for name, values in after.items():
        lines += ["", f"{name:<36}{'before':>9}{'after':>9}{'change':>9}"]
        for key, label in TABLE.items():
            if key in values and key in before.get(name, {}):
                old, new = before[name][key], values[key]
                lines.append(f"  {label:<34}{old:>9.3f}{new:>9.3f}{new - old:>+9.3f}")
    return "\n".join(lines)


def draw(before: Pairs, after: Pairs) -> Figure:
    """Both states in the plane of one PCA, and the cosines of paired and shuffled images."""
    from matplotlib.figure import Figure

    union = torch.cat(before)
    mean = union.mean(dim=0)
    basis = torch.linalg.svd(union - mean, full_matrices=False).Vh[:2].T  # (D, 2)
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    axes = figure.subplots(1, 3)
    planes = [[(x - mean) @ basis for x in pairs] for pairs in (before, after)]
    low = torch.cat([torch.cat(p) for p in planes]).amin(dim=0)
    high = torch.cat([torch.cat(p) for p in planes]).amax(dim=0)
    for axis, title, (generated, real) in zip(axes, ("before alignment", "after alignment"), planes, strict=False):
        axis.scatter(*real.T, s=6, color="tab:blue", alpha=0.6, label="real (frozen branch)")
        axis.scatter(*generated.T, s=6, color="tab:orange", alpha=0.6, label="generated")
        axis.set(title=title, xlim=(low[0], high[0]), ylim=(low[1], high[1]), xlabel="PC 1", ylabel="PC 2")
        axis.plot(*torch.stack([x.mean(dim=0) for x in (generated, real)]).T, "k-", lw=2, label="between the centroids")
    axes[0].legend(loc="best", fontsize=8)
    bins = torch.linspace(-0.6, 1, 65).tolist()
    for (generated, real), style, state in ((before, "--", "before"), (after, "-", "after")):
        cosine = generated @ real.T
        off = ~torch.eye(len(cosine), dtype=torch.bool)
        for values, colour, name in ((cosine.diagonal(), "tab:green", "paired"), (cosine[off], "tab:grey", "shuffled")):
            axes[2].hist(
                values.tolist(), bins, density=True, histtype="step", color=colour, ls=style, label=f"{name}, {state}"
            )
    axes[2].set(title="cosine of generated and real", xlabel="cosine", ylabel="density")
    axes[2].legend(loc="best", fontsize=8)
    return figure
