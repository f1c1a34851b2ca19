"""What every data module of images and texts does: named evaluation sets, prediction, and loaders that fit the task."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, ClassVar, cast

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from gmail_lightning.datamodules.classes import agreed_classes
from gmail_lightning.datamodules.collate import RowTable, as_is
from gmail_lightning.datamodules.rows import EvaluationRows
from gmail_lightning.datasets.base import DataError, ImageTextDataset
from gmail_lightning.samplers.mixed_modality import UnpaddedDistributedSampler
from gmail_lightning.types import Classes, ImageTextBatch, InputSpec


class ImageTextDataModule(LightningDataModule):
    """Feeds evaluation with named sets, and prediction; a subclass adds what it trains on.

    What a batch holds (image sizes, texts, tokeniser) is read from the task's ``input_spec``. Each image is shown once,
    with all its captions, and no row is padded: what every process sees adds up to the set.

    Args:
        val: Named evaluation sets for ``fit`` and ``validate``.
        test: Named evaluation sets for ``test``; those of ``val`` by default.
        predict: Data sets for ``predict``.
        eval_batch_size: Images per device in evaluation and prediction.
        num_workers: Worker processes of each loader.
        input_spec: For use without a task.
    """

    #: Arguments that hold data sets, by the verbs that read them.
    DATASETS: ClassVar[dict[str, tuple[str, ...]]] = {
        "val": ("fit", "validate"), "test": ("test",), "predict": ("predict",)
    }  # fmt: skip

    def __init__(
        self,
        val: dict[str, list[ImageTextDataset]] | None = None,
        test: dict[str, list[ImageTextDataset]] | None = None,
        predict: list[ImageTextDataset] | ImageTextDataset | None = None,
        eval_batch_size: int = 64,
        num_workers: int = 0,
        input_spec: InputSpec | None = None,
    ) -> None:
        super().__init__()
        #: Data sets by argument; those of the evaluation are in ``evaluation``.
        self.datasets = {"predict": as_list(predict)}
        val = {name: as_list(datasets) for name, datasets in (val or {}).items()}
        test = val if test is None else {name: as_list(datasets) for name, datasets in test.items()}
        self.evaluation: dict[str, dict[str, list[ImageTextDataset]]] = {"val": val, "test": test}
        self.eval_batch_size, self.num_workers, self.input_spec = eval_batch_size, num_workers, input_spec
        self._choose: Callable[[], np.ndarray] | None = None

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

    @property
    def evaluation_sets(self) -> dict[str, list[ImageTextDataset]]:
        """The data sets of ``val`` and ``test``, each once, by the name of the set."""
        sets: dict[str, list[ImageTextDataset]] = {}
        for stage in self.evaluation.values():
            for name, datasets in stage.items():
                known = sets.setdefault(name, [])
                known += [dataset for dataset in datasets if not any(dataset is other for other in known)]
        return sets

    def has_classes(self, name: str) -> bool:
        """Whether every data set of an evaluation set has classes."""
        datasets = self.evaluation_sets.get(name, [])
        return bool(datasets) and all(dataset.class_names is not None for dataset in datasets)

    def has_captions(self, name: str) -> bool:
        """Whether captions of an evaluation set say more than the names of classes."""
        return any(not dataset.captions_are_classes for dataset in self.evaluation_sets.get(name, []))

    def classes(self, name: str | None = None) -> Classes:
        """Returns the names of the classes of an evaluation set, or of the training sets, and the prompts for them.

        Raises:
            DataError: If the data sets have no classes, or not the same.
        """
        if name is None:
            return agreed_classes(self.datasets.get("train", []), "train")
        sets = self.evaluation_sets
        if name not in sets:
            raise DataError(f"No evaluation set is called {name!r}. Known: {', '.join(sets) or 'none'}.")
        return agreed_classes(sets[name], name)

    @property
    def feature_stores(self) -> list[dict[str, Any]]:
        """What the cached features of the data sets were made with, each store once, with its ``path``."""
        sets = [*self.datasets.values(), *self.evaluation_sets.values()]
        stores = [dataset.feature_store for datasets in sets for dataset in datasets]
        return list({store["path"]: store for store in stores if store is not None}.values())

    @property
    def spec(self) -> InputSpec:
        """What a batch holds.

        Raises:
            ValueError: If the data module was not set up.
        """
        if self.input_spec is None:
            raise ValueError("The data module was not set up: call setup(), or give input_spec.")
        return self.input_spec

    def replicas(self) -> tuple[int, int]:
        """Returns the number of processes, and the number of this one."""
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)

    def setup(self, stage: str) -> None:
        """Reads what the task asks for.

        Raises:
            MisconfigurationException: If the trainer would replace the samplers.
            ValueError: If there is neither a task nor an ``input_spec``.
        """
        if self.trainer is not None and self.trainer.overfit_batches:  # type: ignore[attr-defined]
            raise MisconfigurationException(
                "overfit_batches would replace the samplers, which keep pairs and shares together and repeat no image. "
                "To train on a few batches over and over, set trainer.limit_train_batches and limit the data sets "
                "instead."
            )
        if self.trainer is not None and self.input_spec is None:
            self.input_spec = cast(InputSpec, self.trainer.lightning_module.input_spec)
        if self.input_spec is None:
            raise ValueError("Without a task the data module needs input_spec=InputSpec(...).")

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
        choose, self._choose = self._choose, None  # for this loader alone, whatever becomes of its run
        return self._loader(rows if choose is None else Subset(rows, choose().tolist()), None)

    def predict_only(self, choose: Callable[[], np.ndarray]) -> None:
        """Leaves the next loader of ``predict`` with some of its images, where a writer has the others.

        Args:
            choose: Returns their numbers in ``predict_rows``, shape (n,); asked when the loader is made, after the
                weights of a checkpoint were loaded.
        """
        self._choose = choose

    def predict_rows(self) -> EvaluationRows:
        """Returns the images of ``predict``, each once; ``row_id`` of a batch is their number.

        Raises:
            DataError: If there are no data sets.
        """
        if not self.datasets["predict"]:
            raise DataError("Nothing to predict: give the data module data sets under predict.")
        return EvaluationRows(RowTable(self.datasets["predict"]), self.spec)

    def _evaluation_loader(self, datasets: list[ImageTextDataset], name: str) -> DataLoader[ImageTextBatch]:
        tell(datasets)
        return self._loader(EvaluationRows(RowTable(datasets), self.spec, name), name)

    def _loader(self, rows: EvaluationRows | Subset[ImageTextBatch], name: str | None) -> DataLoader[ImageTextBatch]:
        num_replicas, rank = self.replicas()
        if len(rows) < num_replicas:
            raise DataError(
                f"Evaluation set {name!r} has {len(rows)} images for {num_replicas} devices: use fewer devices."
            )
        sampler = UnpaddedDistributedSampler(len(rows), num_replicas=num_replicas, rank=rank)
        return DataLoader(
            rows, batch_size=self.eval_batch_size, sampler=sampler, **self.loader_settings(persistent_workers=False)
        )

    def loader_settings(self, persistent_workers: bool) -> dict[str, Any]:
        """Arguments of a ``DataLoader`` whose data set makes whole batches.

        Args:
            persistent_workers: Whether the workers live from one epoch to the next.
        """
        return {
            "collate_fn": as_is,
            "num_workers": self.num_workers,
            "persistent_workers": persistent_workers,
            "pin_memory": self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
        }

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Moves the tensors of the batch; the lists of strings stay, and are not walked through."""
        if device.type == "cpu" or not isinstance(batch, dict):
            return batch
        return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


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


def as_list(datasets: Sequence[ImageTextDataset] | ImageTextDataset | None) -> list[ImageTextDataset]:
    """Returns the data sets that an argument gives: one, several, or none."""
    if datasets is None:
        return []
    return [datasets] if isinstance(datasets, ImageTextDataset) else list(datasets)
