"""Features become a store that other runs read in place of images."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pyarrow.compute as pc
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from gmail_lightning.callbacks.resumption import begin, end, stop_if_told
from gmail_lightning.datamodules.base import ImageTextDataModule
from gmail_lightning.datasets.base import DataError
from gmail_lightning.datasets.store_files import FEATURES
from gmail_lightning.generation.array_store import ArrayStore
from gmail_lightning.generation.parts import Record, first_difference, with_work_for_all
from gmail_lightning.generation.rows import store_columns
from gmail_lightning.models.branches.fingerprint import fingerprint_difference, probe_difference
from gmail_lightning.tasks.embedding import EmbeddingTask
from gmail_lightning.types import Modality


class FeatureWriter(Callback):
    """Writes what ``EmbeddingTask`` predicts, each image once, into a store that ``datasets.FeatureStore`` reads.

    Every process writes parts of its own; when all rows are there the first one makes one memory-mapped array of them
    and the store valid. Killed, the same command goes on with the rows that are missing, on any number of devices.

    Args:
        out: The folder; all nodes must see it.
        dtype: Of the stored features, ``float16`` or ``float32``.
        overwrite: Replace a finished store, or parts that were made with something else.
        seconds: Most time between two parts, and so what a kill loses.

    Raises:
        ValueError: If the dtype is unknown.
    """

    def __init__(
        self, out: str, dtype: Literal["float16", "float32"] = "float16", overwrite: bool = False, seconds: float = 60.0
    ) -> None:
        if dtype not in ("float16", "float32"):
            raise ValueError(f"Unknown dtype {dtype!r}: use float16 or float32.")
        self.folder, self.dtype, self.overwrite, self.seconds = Path(out), dtype, overwrite, seconds
        self._store: ArrayStore | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lets the data module ask which rows are missing.

        Raises:
            MisconfigurationException: If the folder holds a finished store, one that is being made with something else,
                or other files.
            DataError: If an image is real in one row and generated in another.
        """
        data = getattr(trainer, "datamodule", None)
        if not (isinstance(pl_module, EmbeddingTask) and isinstance(data, ImageTextDataModule)):
            raise MisconfigurationException(
                "FeatureWriter writes what EmbeddingTask makes of the predict data sets of a data module, "
                f"with predict; here are {type(pl_module).__name__} and {type(data).__name__}."
            )
        cast(Any, trainer).predict_loop.return_predictions = False  # they would be kept until the end
        images = data.predict_rows()
        rows = store_columns([images.table.locate(row) for row in images.first.tolist()])
        modalities = [Modality(value) for value in pc.unique(rows["modality"]).to_pylist()]
        record = {**pl_module.record(modalities), "dtype": self.dtype, "precision": str(trainer.precision)}
        self._store = ArrayStore(
            self.folder,
            FEATURES,
            rows,
            record,
            overwrite=self.overwrite,
            seconds=self.seconds,
            compare=features_difference,
        )
        data.predict_only(partial(self._missing, trainer, self._store))

    def _missing(self, trainer: Trainer, store: ArrayStore) -> np.ndarray:
        """Looks at the folder; it is asked for when Lightning knows whether there is a checkpoint."""
        if trainer.ckpt_path:
            raise MisconfigurationException(
                "EmbeddingTask takes no ckpt_path: give the checkpoint of the alignment as model.encoder.aligned."
            )
        missing = begin(store.begin, trainer)
        rank_zero_info(f"{self.folder}: {len(store.rows)} images, of which {len(missing)} are to be embedded.")
        return with_work_for_all(missing, len(store.rows), trainer.world_size)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps the features of a batch, and writes a part now and then.

        Raises:
            DataError: If a feature is not finite in the dtype of the store.
        """
        assert self._store is not None
        features = self._stored(outputs["image_features"], batch["sample_key"])
        self._store.parts.add(batch["row_id"].cpu().numpy(), {self._store.column: features.numpy()})
        stop_if_told(trainer)

    def _stored(self, features: Tensor, keys: list[str]) -> Tensor:
        features = features.float().cpu()
        stored = features.to(getattr(torch, self.dtype))
        bad = ~torch.isfinite(stored).flatten(1).all(dim=1)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise DataError(
                f"The features of {keys[row]!r} are not finite in {self.dtype}; the largest is "
                f"{features[row].abs().max():.4g}. If that is a number, set dtype: float32."
            )
        return stored

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Writes what is done."""
        if self._store is not None:
            self._store.parts.flush()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Waits for all processes; the first then makes the store."""
        assert self._store is not None
        rank_zero_info(end(self._store.parts, self._store.finish, trainer))


def features_difference(before: Record, now: Record) -> str | None:
    """Says in what the records of two feature stores differ; encoders are compared as far as devices round alike."""
    for name, value in now.items():
        if name == "fingerprint":
            difference = fingerprint_difference(before[name], value)
            difference = difference and f"another encoder: {difference}"
        elif name == "probe":
            difference = _probes_difference(before[name], value)
        else:
            difference = first_difference(before, {name: value})
        if difference is not None:
            return difference
    return None


def _probes_difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    for branch, features in now.items():
        difference = probe_difference(before[branch], features)
        if difference is not None:
            return f"another encoder: the {branch} features of a fixed image {difference}"
    return None
