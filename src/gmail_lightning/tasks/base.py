"""``BaseTask``: one step, metrics per evaluation set, small checkpoints that load."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torchmetrics import Metric

from gmail_lightning.models.weights import plain_names
from gmail_lightning.optim import WarmupCosine, parameter_groups
from gmail_lightning.tasks.averaged import AveragedWeights
from gmail_lightning.tasks.results import EvaluationResult, set_key
from gmail_lightning.types import ImageTextBatch, InputSpec, modality_rows


def paired_rows(batch: ImageTextBatch) -> tuple[Tensor, Tensor]:
    """Numbers of the generated rows (N,) and of the real rows (N,) of a batch of pairs, pair by pair in the same order.

    Raises:
        MisconfigurationException: If the batch is not made of pairs.
    """
    rows = batch if "paired" in batch else modality_rows(batch)
    if not rows["paired"]:
        raise MisconfigurationException(
            "The batch is not made of pairs, as this task needs: say mode='paired' for MixedModalityDataModule."
        )
    return rows["generated_row"], rows["real_row"]


class BaseTask(AveragedWeights, ABC):
    """What every task shares; a subclass says what is computed, not how it is logged, stored or resumed.

    Subclasses implement ``input_spec`` and, to be fitted, ``compute_losses``; to be evaluated, ``build_metrics`` and
    ``update_metrics``. Checkpoints hold trainable tensors, adapters and projections. A task around an
    image encoder is an ``EncoderTask``.

    Args:
        optimizer: Called with the parameter groups of ``optim.parameter_groups``. Default: AdamW, lr 1e-4, weight
            decay 0.01 (GMAIL, section 4.1).
        scheduler: Called with the optimizer, stepped every batch. Default: ``WarmupCosine`` over ``trainer.max_steps``
            where that is set, else a constant rate.
        warmup_steps: Of the default schedule.
        allow_small_negatives: Accept gradient accumulation with a batch-contrastive loss.
        learning_rates: Rates of their own for parts of the model, by how the names of their parameters begin, such as
            ``{encoder: 1.0e-5}``; see ``optim.parameter_groups``. The schedule scales each.
    """

    #: True where the loss contrasts rows of one batch, so that accumulating gradients does not enlarge the batch.
    batch_contrastive: bool = False
    #: True where ``compute_losses`` weighs the rows by ``batch["weight"]``.
    uses_weights: ClassVar[bool] = False
    #: True where evaluating writes captions, which ``result_of`` then shows batch by batch.
    writes_captions: ClassVar[bool] = False
    #: Arguments that training does not read: a run may be evaluated, or resumed, with others.
    evaluation_only: ClassVar[frozenset[str]] = frozenset()

    def __init__(
        self,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
        warmup_steps: int = 0,
        allow_small_negatives: bool = False,
        learning_rates: dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.strict_loading = False  # frozen tensors are not in the checkpoint; on_load_checkpoint checks the rest
        self.optimizer, self.scheduler, self.warmup_steps = optimizer, scheduler, warmup_steps
        self.allow_small_negatives, self.learning_rates = allow_small_negatives, learning_rates
        self.metrics = nn.ModuleDict()
        #: What the last evaluation of every set has found: what the callbacks draw and print.
        self.results: dict[str, EvaluationResult] = {}
        self._gradients_checked = False
        self._seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        self._replaced: Tensor | int = 0  # rows that stood in for others so far; on the device until it is logged

    # What a subclass says

    @property
    @abstractmethod
    def input_spec(self) -> InputSpec:
        """What the data module must deliver; from configuration, before any weight is built."""

    def compute_losses(self, batch: ImageTextBatch) -> dict[str, Tensor]:
        """Every term by name, the total under ``loss``."""
        raise NotImplementedError(f"{type(self).__name__} cannot be fitted: it defines no compute_losses.")

    def build_metrics(self, eval_set: str) -> dict[str, Metric]:
        """Fresh metrics for the evaluation set of this name; their values are logged under ``<stage>/<set>/``."""
        return {}

    def update_metrics(self, metrics: Mapping[str, Any], batch: ImageTextBatch) -> None:
        """Adds one evaluation batch to the metrics of its set."""
        raise NotImplementedError(f"{type(self).__name__} defines no update_metrics.")

    def result_of(self, eval_set: str) -> EvaluationResult:
        """The result of a set; an empty one, which is then kept, where it has not been evaluated."""
        return self.results.setdefault(set_key(eval_set), EvaluationResult())

    def complete_result(self, name: str, result: EvaluationResult, metrics: Mapping[str, Any]) -> None:
        """Adds what a task finds of a set besides values.

        Args:
            name: ``set_key`` of the set.
            result: Its values.
            metrics: The metrics that gave them, reset already.
        """

    @property
    def pretrained(self) -> bool:
        """False where evaluating without a checkpoint would evaluate random weights."""
        return True

    # Steps and logging

    def setup(self, stage: str) -> None:
        """Refuses settings that would train silently wrong, and builds the metrics of the evaluation sets."""
        super().setup(stage)
        trainer = self.trainer
        schedules = [c.scheduling for c in cast(Any, trainer).callbacks if isinstance(c, GradientAccumulationScheduler)]
        accumulate = max([trainer.accumulate_grad_batches, *(max(s.values()) for s in schedules)])
        if stage == "fit" and self.batch_contrastive and accumulate != 1 and not self.allow_small_negatives:
            chunks = " and set contrastive_chunk_size to fit it into memory" * hasattr(self, "contrastive_chunk_size")
            raise MisconfigurationException(
                f"accumulate_grad_batches={accumulate} gives a batch-contrastive loss no further negatives. Raise "
                f"batch_size{chunks}, or set allow_small_negatives=True to accept the smaller batch."
            )
        if stage != "predict":
            verb = "test" if stage == "test" else "val"
            sets = getattr(getattr(trainer, "datamodule", None), "eval_sets", None)
            for name in ["eval"] if sets is None else sets.get(verb, []):
                self.metrics[f"{verb}/{set_key(name)}"] = nn.ModuleDict(self.build_metrics(name))
        # Frozen modules have constant buffers; leaving them out keeps evaluation steps free of collectives under DDP.
        trained = self._trained_buffers()
        self._ddp_params_and_buffers_to_ignore = [n for n, b in self.named_buffers() if id(b) not in trained]

    def on_fit_start(self) -> None:
        """Compares cached features with the encoder, whose weights are restored by now."""
        super().on_fit_start()
        self._check_feature_stores(trains=True)

    def on_validation_start(self) -> None:
        """As ``on_fit_start``."""
        if self.trainer.state.fn != TrainerFn.FITTING:
            self._check_feature_stores(trains=False)

    def on_test_start(self) -> None:
        """As ``on_fit_start``."""
        self._check_feature_stores(trains=False)

    def on_predict_start(self) -> None:
        """As ``on_fit_start``."""
        self._check_feature_stores(trains=False)

    def _check_feature_stores(self, trains: bool) -> None:
        stores = getattr(getattr(self.trainer, "datamodule", None), "feature_stores", [])
        if stores:
            self.check_feature_stores(stores, trains)

    def check_feature_stores(self, stores: list[dict[str, Any]], trains: bool) -> None:
        """Refuses cached features that are not those of the task's encoder, here of a task that has none.

        Args:
            stores: What each store in use was made with.
            trains: Whether the run fits.
        """
        raise MisconfigurationException(
            f"{type(self).__name__} reads pixels and has no encoder that cached features could be of. Give the data "
            f"set of {stores[0]['path']} without its store."
        )

    def draws(self) -> torch.Generator:
        """Random numbers of one training batch, on the CPU; the same in a resumed run, others on every rank."""
        number = 0 if self._trainer is None else self.trainer.fit_loop.epoch_loop.total_batch_idx
        digest = hashlib.blake2b(f"{self._seed} {number} {self.global_rank}".encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

    def _step(self, batch: ImageTextBatch, stage: str) -> Tensor:
        if "weight" in batch and not self.uses_weights:
            raise MisconfigurationException(
                f"{type(self).__name__} does not weigh rows, but a training data set has weights: leave out its "
                "weight, or use a task whose uses_weights is True."
            )
        losses = self.compute_losses(batch)
        if "replaced" in batch:
            self._replaced = self._replaced + batch["replaced"].sum()
        every = cast(Any, self.trainer).log_every_n_steps
        if every and (self.trainer.global_step + 1) % every == 0:
            if not torch.isfinite(losses["loss"]):
                terms = ", ".join(f"{k}={v.item():.4g}" for k, v in losses.items())
                raise RuntimeError(f"The loss is not finite at step {self.trainer.global_step}: {terms}.")
            values = {f"{stage}/{k}": v.detach() for k, v in losses.items()}
            self.log_dict(values, batch_size=len(batch["modality"]), prog_bar=True)
            self.log(f"{stage}/replaced", float(self._replaced), sync_dist=True, reduce_fx="sum", batch_size=1)
        return losses["loss"]

    def training_step(self, batch: ImageTextBatch, batch_idx: int) -> Tensor:
        """One optimisation step."""
        return self._step(batch, "train")

    def validation_step(self, batch: ImageTextBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds a batch to the metrics of its set; no collective, so ranks may have unequal numbers of batches."""
        self._evaluate(batch, "val")

    def test_step(self, batch: ImageTextBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """As ``validation_step``."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: ImageTextBatch, stage: str) -> None:
        metrics = self.metrics[f"{stage}/{set_key(batch.get('eval_set', 'eval'))}"]
        self.update_metrics(cast(Any, metrics), batch)

    def on_validation_epoch_end(self) -> None:
        """Computes and logs the metrics of every set."""
        super().on_validation_epoch_end()
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Computes and logs the metrics of every set."""
        super().on_test_epoch_end()
        self._log_metrics("test")

    def _log_metrics(self, stage: str) -> None:
        for key, metrics in self.metrics.items():
            if not key.startswith(f"{stage}/"):
                continue
            values: dict[str, Tensor] = {}
            for metric in cast(list[Metric], list(metrics.children())):
                values.update(metric.compute())
                metric.reset()
            name = key.removeprefix(f"{stage}/")
            result = EvaluationResult({k: float(v) for k, v in values.items()}, captions=self.result_of(name).captions)
            self.complete_result(name, result, cast(Any, metrics))
            self.results[name] = result
            # The metric has already been reduced over ranks.
            self.log_dict({f"{key}/{k}": v for k, v in values.items()}, batch_size=1)

    def on_after_backward(self) -> None:
        """After the first backward, names trainable tensors that no loss reaches: DDP would hang or drop them."""
        if self._gradients_checked:
            return
        self._gradients_checked = True
        without = [name for name, p in self.named_parameters() if p.requires_grad and p.grad is None]
        if without:
            names = ", ".join(without[:8]) + (" ..." if len(without) > 8 else "")
            raise RuntimeError(
                f"{len(without)} trainable tensors got no gradient: {names}. "
                "Freeze them with requires_grad_(False), or let a loss reach them."
            )

    def configure_optimizers(self) -> Any:
        """The user's optimizer and schedule, or AdamW with ``WarmupCosine``."""
        in_state = {id(tensor): name for name, tensor in self.state_dict(keep_vars=True).items()}
        named = {in_state.get(id(p), name): p for name, p in self.named_parameters()}
        groups = parameter_groups(plain_names(named).items(), self.learning_rates)
        if not groups:
            raise MisconfigurationException(f"{type(self).__name__}: nothing is trainable.")
        build: Callable[..., Optimizer] = self.optimizer or (lambda p: AdamW(p, lr=1e-4, weight_decay=0.01))
        optimizer = build(groups)
        if self.scheduler is not None:
            schedule = self.scheduler(optimizer)
            length, steps = getattr(schedule, "max_steps", None), self.trainer.max_steps
            if length is not None and steps > 0 and length != steps:
                rank_zero_warn(
                    f"The schedule is {length} steps long and the run {steps}: set both (scheduler.max_steps)."
                )
        elif self.trainer.max_steps > 0:
            schedule = WarmupCosine(optimizer, self.trainer.max_steps, self.warmup_steps)
        elif self.warmup_steps:
            raise MisconfigurationException(
                f"warmup_steps={self.warmup_steps} needs trainer.max_steps, which is not set."
            )
        else:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
