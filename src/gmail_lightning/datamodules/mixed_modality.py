"""One data module for every task: real and generated rows in one stream."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from fractions import Fraction
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from gmail_lightning.datamodules.classes import agreed_classes
from gmail_lightning.datamodules.collate import RowTable, as_is
from gmail_lightning.datamodules.leakage import AllowedOverlap, check_on_one_process, refuse_unknown_sets
from gmail_lightning.datamodules.rows import EvaluationRows, TrainRows
from gmail_lightning.datasets.base import DataError, ImageTextDataset
from gmail_lightning.samplers.mixed_modality import MixedModalitySampler, UnpaddedDistributedSampler
from gmail_lightning.types import Classes, ImageTextBatch, InputSpec

Datasets = ImageTextDataset | list[ImageTextDataset]


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


class MixedModalityDataModule(LightningDataModule):
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
            they still show the same thing.
        generated_augmentation: Applied to generated images after it.
        eval_batch_size: Images per device in evaluation and prediction; by default ``batch_size``.
        num_workers: Worker processes of each loader.
        max_replaced_fraction: Training stops once more than this share of an epoch's images did not decode.
        seed: Of the order, the captions drawn and the augmentation; by default that of ``seed_everything``, else 0.
        allow_overlap: By name of an evaluation set, what it shares with ``train`` on purpose (``caption``,
            ``image_id``, ``pixels``) and why; anything else that it shares is an error in ``fit``.
        input_spec: For use without a task.
    """

    #: Arguments that hold data sets, by the verbs that read them; ``fit`` compares its rows with those of ``test``.
    DATASETS: ClassVar[dict[str, tuple[str, ...]]] = {
        "train": ("fit",), "val": ("fit", "validate"), "test": ("fit", "test"), "predict": ("predict",)
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
        super().__init__()
        self.datasets = {"train": _as_list(train), "predict": _as_list(predict)}
        val = {name: _as_list(datasets) for name, datasets in (val or {}).items()}
        test = val if test is None else {name: _as_list(datasets) for name, datasets in test.items()}
        self.evaluation: dict[str, dict[str, list[ImageTextDataset]]] = {"val": val, "test": test}
        if not 0 <= max_replaced_fraction <= 1:
            raise ValueError(f"max_replaced_fraction is {max_replaced_fraction}, but it is a share between 0 and 1.")
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self.mode: Literal["paired", "mixture"] = mode
        self.generated_fraction = generated_fraction
        self.augmentation = _as_module(augmentation)
        self.generated_augmentation = _as_module(generated_augmentation)
        self.num_workers, self.max_replaced_fraction = num_workers, max_replaced_fraction
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        self.allow_overlap = dict(allow_overlap or {})
        refuse_unknown_sets(self.allow_overlap, self._evaluation_sets())
        self.input_spec = input_spec
        self._choose: Callable[[], np.ndarray] | None = None
        self._sampler: MixedModalitySampler | None = None
        self._progress = _fresh_progress()

    @classmethod
    def unread(cls, verb: str, given: Collection[str]) -> list[str]:
        """Names of the arguments whose data sets a verb does not read, so that the command line does not build them.

        Args:
            verb: ``fit``, ``validate``, ``test`` or ``predict``.
            given: Names of the arguments that are not None.
        """
        names = [name for name, verbs in cls.DATASETS.items() if verb not in verbs]
        return [name for name in names if not (verb == "test" and name == "val" and "test" not in given)]

    @property
    def eval_sets(self) -> dict[str, list[str]]:
        """Names of the evaluation sets of ``val`` and of ``test``."""
        return {stage: list(sets) for stage, sets in self.evaluation.items()}

    def classes(self, name: str | None = None) -> Classes:
        """Returns the names of the classes of an evaluation set, or of the training sets, and the prompts for them.

        Raises:
            DataError: If the data sets have no classes, or not the same.
        """
        if name is None:
            return agreed_classes(self.datasets["train"], "train")
        sets = self._evaluation_sets()
        if name not in sets:
            raise DataError(f"No evaluation set is called {name!r}. Known: {', '.join(sets) or 'none'}.")
        return agreed_classes(sets[name], name)

    @property
    def feature_stores(self) -> list[dict[str, Any]]:
        """What the cached features of the data sets were made with, each store once, with its ``path``."""
        sets = [*self.datasets.values(), *self._evaluation_sets().values()]
        stores = [dataset.feature_store for datasets in sets for dataset in datasets]
        return list({store["path"]: store for store in stores if store is not None}.values())

    def setup(self, stage: str) -> None:
        """Reads what the task asks for, and looks for what training shares with the evaluation sets.

        Raises:
            DataError: If an evaluation set shares what it does not allow, or a training set is not for training.
        """
        if self.trainer is not None and self.trainer.overfit_batches:  # type: ignore[attr-defined]
            raise MisconfigurationException(
                "overfit_batches would replace the sampler that keeps pairs and shares together. To train on a few "
                "batches over and over, set trainer.limit_train_batches and limit the data sets instead."
            )
        if self.trainer is not None and self.input_spec is None:
            self.input_spec = cast(InputSpec, self.trainer.lightning_module.input_spec)
        if self.input_spec is None:
            raise ValueError("Without a task the data module needs input_spec=InputSpec(...).")
        if stage == "fit":
            self._sampler, self._progress = None, _fresh_progress()
            check_on_one_process(self.trainer, self.datasets["train"], self._evaluation_sets(), self.allow_overlap)

    def _evaluation_sets(self) -> dict[str, list[ImageTextDataset]]:
        """The data sets of ``val`` and ``test``, each once, by name."""
        sets: dict[str, list[ImageTextDataset]] = {}
        for stage in self.evaluation.values():
            for name, datasets in stage.items():
                known = sets.setdefault(name, [])
                known += [dataset for dataset in datasets if not any(dataset is other for other in known)]
        return sets

    def _replicas(self) -> tuple[int, int]:
        """Number of processes and number of this one."""
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)

    def train_dataloader(self) -> TrainLoader:
        """Returns the loader of mixed batches.

        Raises:
            DataError: If there are no training data, pairs are broken, or there is less than one global batch.
        """
        if not self.datasets["train"]:
            raise DataError("No training data: give the data module data sets under train.")
        tell(self.datasets["train"])
        table = RowTable(self.datasets["train"])
        num_replicas, rank = self._replicas()
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
            self._spec(),
            seed=self.seed,
            pairs=sampler.pairs,
            augmentation=self.augmentation,
            generated_augmentation=self.generated_augmentation,
        )
        return TrainLoader(rows, batch_size=self.batch_size, sampler=sampler, **self._settings(self.num_workers > 0))

    def val_dataloader(self) -> list[DataLoader[ImageTextBatch]]:
        """Returns one loader per set of ``val``, in the order of the names."""
        return [self._evaluation_loader(sets, name) for name, sets in self.evaluation["val"].items()]

    def test_dataloader(self) -> list[DataLoader[ImageTextBatch]]:
        """Returns one loader per set of ``test``, in the order of the names."""
        return [self._evaluation_loader(sets, name) for name, sets in self.evaluation["test"].items()]

    def predict_dataloader(self) -> DataLoader[ImageTextBatch]:
        """Returns the loader of ``predict``."""
        rows = self.predict_rows()
        tell(self.datasets["predict"], need_captions=False)
        return self._loader(rows if self._choose is None else Subset(rows, self._choose().tolist()), None)

    def predict_only(self, choose: Callable[[], np.ndarray] | None) -> None:
        """Leaves ``predict`` with some of its images, where a writer has the others.

        Args:
            choose: Returns their numbers in ``predict_rows``, shape (n,); asked when the loader is made, after the
                weights of a checkpoint were loaded. None takes all.
        """
        self._choose = choose

    def predict_rows(self) -> EvaluationRows:
        """Returns the images of ``predict``, each once; ``row_id`` of a batch is their number.

        Raises:
            DataError: If there are no data sets.
        """
        if not self.datasets["predict"]:
            raise DataError("Nothing to predict: give the data module data sets under predict.")
        return EvaluationRows(RowTable(self.datasets["predict"]), self._spec())

    def _evaluation_loader(self, datasets: list[ImageTextDataset], name: str) -> DataLoader[ImageTextBatch]:
        tell(datasets)
        return self._loader(EvaluationRows(RowTable(datasets), self._spec(), name), name)

    def _loader(self, rows: EvaluationRows | Subset[ImageTextBatch], name: str | None) -> DataLoader[ImageTextBatch]:
        num_replicas, rank = self._replicas()
        if len(rows) < num_replicas:
            raise DataError(
                f"Evaluation set {name!r} has {len(rows)} images for {num_replicas} devices: use fewer devices."
            )
        sampler = UnpaddedDistributedSampler(len(rows), num_replicas=num_replicas, rank=rank)
        return DataLoader(rows, batch_size=self.eval_batch_size, sampler=sampler, **self._settings(False))

    def _settings(self, persistent_workers: bool) -> dict[str, Any]:
        return {
            "collate_fn": as_is,
            "num_workers": self.num_workers,
            "persistent_workers": persistent_workers,
            "pin_memory": self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
        }

    def _spec(self) -> InputSpec:
        if self.input_spec is None:
            raise ValueError("The data module was not set up: call setup(), or give input_spec.")
        return self.input_spec

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Moves the tensors of the batch; the lists of strings stay, and are not walked through."""
        if device.type == "cpu" or not isinstance(batch, dict):
            return batch
        return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Counts the batches that training has consumed, and the rows that were replaced."""
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
        if is_above(progress["replaced"], self.max_replaced_fraction, len(sampler)):
            raise DataError(
                f"{summary}. That is more than max_replaced_fraction={self.max_replaced_fraction}: repair or remove "
                "such images, or raise the fraction."
            )
        if before < 5:
            rank_zero_warn(summary)

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


def tell(datasets: list[ImageTextDataset], need_captions: bool = True) -> None:
    """Shows what the data sets have left out.

    Raises:
        DataError: If captions are needed and a data set has none.
    """
    for dataset in datasets:
        if need_captions and dataset.no_captions is not None:
            raise DataError(dataset.no_captions)
        if dataset.summary is not None:
            rank_zero_info(dataset.summary)


def _fresh_progress() -> dict[str, int]:
    return {"epoch": -1, "step": 0, "global_batch_size": 0, "replaced": 0}


def _as_list(datasets: Sequence[ImageTextDataset] | ImageTextDataset | None) -> list[ImageTextDataset]:
    if datasets is None:
        return []
    return [datasets] if isinstance(datasets, ImageTextDataset) else list(datasets)


def is_above(count: int, share: float, total: int) -> bool:
    """Whether a count is more than a share of the total, exactly: 29 of 100 are not more than 0.29."""
    return count > Fraction(str(share)) * total


def _as_module(augmentation: nn.Module | list[nn.Module] | None) -> nn.Module | None:
    return nn.Sequential(*augmentation) if isinstance(augmentation, list) else augmentation
