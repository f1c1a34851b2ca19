"""One data module for every task: real and generated rows in one stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal, cast

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from torch.utils.data import DataLoader

from gmail_lightning.datamodules.base import ImageTextDataModule, as_list, tell
from gmail_lightning.datamodules.collate import RowTable
from gmail_lightning.datamodules.rows import TrainRows
from gmail_lightning.datamodules.training import as_module, refuse_no_share, seed_or_default, tell_broken
from gmail_lightning.datasets.base import DataError, ImageTextDataset
from gmail_lightning.leakage.check import AllowedOverlap, check_on_one_process, refuse_unknown_sets
from gmail_lightning.samplers.mixed_modality import MixedModalitySampler
from gmail_lightning.types import ImageTextBatch, InputSpec


class TrainLoader(DataLoader[ImageTextBatch]):
    """Begins to read when the first batch is asked for.

    Lightning asks for the iterator before it has told the sampler which epoch a resumed run is in, and workers would
    begin with another one. The two state methods say that resuming in mid-epoch is exact here; the state itself is the
    data module's, because Lightning restores a loader's only if nothing has asked for the number of steps before.
    """

    def __iter__(self) -> Iterator[ImageTextBatch]:  # type: ignore[override]
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Returns nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Does nothing."""


class MixedModalityDataModule(ImageTextDataModule):
    """Feeds training with an exact share of generated rows, and evaluation with named sets.

    What a batch holds (image size, texts, tokeniser) is read from the task's ``input_spec``. Training draws one caption
    per row; evaluation shows each image once, with all its captions. Random augmentation depends on the seed, the epoch
    and the position alone, so a resumed run goes on with the very same pixels, whatever the number of workers or
    processes, as long as the global batch stays the same.

    Args:
        train: Data sets for ``fit``; rows of different data sets are paired by ``pair_id``.
        val: Named evaluation sets for ``fit`` and ``validate``.
        test: Named evaluation sets for ``test``; those of ``val`` by default.
        predict: Data sets for ``predict``.
        batch_size: Rows per device and training step, generated and real together.
        mode: ``paired`` feeds generated rows beside their real ones; ``mixture`` any rows, in a fixed share.
        generated_fraction: Share of generated rows in each batch of a ``mixture``; pairs are always half and half.
        augmentation: Applied to training images, float (3, h, w) in [0, 1] after the resize; several in a row as
            ``torch.nn.Sequential``, or in YAML as a list. The two images of a pair get the same random draw, so that
            they still show the same thing. Where a task asks for several views of a picture, the decoded picture is
            augmented, once, before it is resized to each.
        generated_augmentation: Applied to generated images after it.
        eval_batch_size: Images per device in evaluation and prediction; by default ``batch_size``.
        num_workers: Worker processes of each loader.
        max_replaced_fraction: Training stops once more than this share of an epoch's images did not decode.
        seed: Of the order, the captions drawn and the augmentation; by default that of ``seed_everything``, else 0.
        allow_overlap: By name of an evaluation set, what it shares with ``train`` on purpose (``caption``,
            ``image_id``, ``pixels``) and why; anything else that it shares is an error in ``fit``.
        input_spec: For use without a task.
    """

    #: ``fit`` compares its rows with those of ``test``, too.
    DATASETS: ClassVar[dict[str, tuple[str, ...]]] = {
        "train": ("fit",), **ImageTextDataModule.DATASETS, "test": ("fit", "test")
    }  # fmt: skip

    def __init__(
        self,
        train: list[ImageTextDataset] | ImageTextDataset | None = None,
        val: dict[str, list[ImageTextDataset]] | None = None,
        test: dict[str, list[ImageTextDataset]] | None = None,
        predict: list[ImageTextDataset] | ImageTextDataset | None = None,
        batch_size: int = 64,
        mode: Literal["paired", "mixture"] = "paired",
        generated_fraction: float = 0.5,
        augmentation: nn.Module | list[nn.Module] | None = None,
        generated_augmentation: nn.Module | list[nn.Module] | None = None,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        max_replaced_fraction: float = 0.01,
        seed: int | None = None,
        allow_overlap: dict[str, AllowedOverlap] | None = None,
        input_spec: InputSpec | None = None,
    ) -> None:
        super().__init__(val, test, predict, eval_batch_size or batch_size, num_workers, input_spec)
        refuse_no_share(max_replaced_fraction)
        self.datasets = {"train": as_list(train), **self.datasets}
        self.batch_size, self.max_replaced_fraction = batch_size, max_replaced_fraction
        self.mode: Literal["paired", "mixture"] = mode
        self.generated_fraction = generated_fraction
        self.augmentation, self.generated_augmentation = as_module(augmentation), as_module(generated_augmentation)
        self.seed = seed_or_default(seed)
        self.allow_overlap = dict(allow_overlap or {})
        refuse_unknown_sets(self.allow_overlap, self.evaluation_sets)
        self._sampler: MixedModalitySampler | None = None
        self._progress = _fresh_progress()

    def setup(self, stage: str) -> None:
        """Reads what the task asks for, and looks for what training shares with the evaluation sets.

        Raises:
            DataError: If an evaluation set shares what it does not allow, or a training set is not for training.
        """
        super().setup(stage)
        if stage == "fit":
            self._sampler, self._progress = None, _fresh_progress()
            check_on_one_process(self.trainer, self.datasets["train"], self.evaluation_sets, self.allow_overlap)

    def train_dataloader(self) -> TrainLoader:
        """Returns the loader of mixed batches.

        Raises:
            DataError: If there are no training data, pairs are broken, or there is less than one global batch.
        """
        if not self.datasets["train"]:
            raise DataError("No training data: give the data module data sets under train.")
        tell(self.datasets["train"])
        table = RowTable(self.datasets["train"])
        num_replicas, rank = self.replicas()
        try:
            sampler = MixedModalitySampler(
                table.modality,
                table.pair_id,
                batch_size=self.batch_size,
                mode=self.mode,
                generated_fraction=self.generated_fraction,
                seed=self.seed,
                num_replicas=num_replicas,
                rank=rank,
                describe=table.describe,
            )
        except DataError:
            raise
        except ValueError as error:  # a setting, not the data
            raise MisconfigurationException(str(error)) from error
        self._sampler = sampler
        self._seek()
        generated = sampler.generated_per_batch
        rank_zero_info(
            f"Batch: {self.batch_size} rows per device x {num_replicas} = {sampler.global_batch_size}; each device "
            f"sees {generated} generated and {self.batch_size - generated} real rows ({self.mode}); "
            f"{sampler.steps_per_epoch} batches per epoch."
        )
        if sampler.pairs is not None and sampler.pairs.num_unpaired_real:
            rank_zero_warn(
                f"{sampler.pairs.num_unpaired_real} real training rows have no generated row of their pair_id and are "
                f"not seen in mode 'paired'; {len(sampler.pairs.real)} have."
            )
        rows = TrainRows(
            table,
            self.spec,
            seed=self.seed,
            pairs=sampler.pairs,
            augmentation=self.augmentation,
            generated_augmentation=self.generated_augmentation,
        )
        settings = self.loader_settings(persistent_workers=self.num_workers > 0)
        return TrainLoader(rows, batch_size=self.batch_size, sampler=sampler, **settings)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Counts the batches that training has consumed, and the rows that were replaced."""
        batch = super().on_before_batch_transfer(batch, dataloader_idx)
        if self._sampler is not None and self.trainer is not None and self.trainer.training:
            self._count(cast(ImageTextBatch, batch), self._sampler)
        return batch

    def _count(self, batch: ImageTextBatch, sampler: MixedModalitySampler) -> None:
        progress = self._progress
        if progress["epoch"] != sampler.epoch:
            progress.update(epoch=sampler.epoch, step=0, replaced=0)
        elif progress["step"] and progress["global_batch_size"] != sampler.global_batch_size:
            raise MisconfigurationException(
                f"The checkpoint was written at batch {progress['step']} of epoch {progress['epoch']}, with "
                f"{progress['global_batch_size']} rows in a global batch; now they are {sampler.global_batch_size}. "
                "Choose batch_size such that batch_size x devices is the same, or resume from the end of an epoch."
            )
        progress["step"] += 1
        progress["global_batch_size"] = sampler.global_batch_size
        if not batch["replaced_reason"]:
            return
        before, progress["replaced"] = progress["replaced"], progress["replaced"] + len(batch["replaced_reason"])
        summary = (
            f"{progress['replaced']} of {len(sampler)} training images of epoch {sampler.epoch} on this device had to "
            f"be replaced, the last since: {batch['replaced_reason'][-1]}"
        )
        tell_broken(
            summary,
            "repair or remove such images",
            before=before,
            count=progress["replaced"],
            total=len(sampler),
            max_replaced_fraction=self.max_replaced_fraction,
        )

    def state_dict(self) -> dict[str, int]:
        """What a resume needs: the batches consumed by training, not those handed to workers ahead of it."""
        return dict(self._progress)

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Lets the next training loader begin where the checkpoint was written."""
        self._progress = dict(state_dict)
        self._seek()

    def _seek(self) -> None:
        if self._sampler is not None:
            steps = self._sampler.steps_per_epoch
            epoch, step = max(self._progress["epoch"], 0), min(self._progress["step"], steps)
            self._sampler.start_batch = epoch * steps + step


def _fresh_progress() -> dict[str, int]:
    return {"epoch": -1, "step": 0, "global_batch_size": 0, "replaced": 0}
