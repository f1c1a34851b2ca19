"""Features become a store that other runs read in place of images."""

from __future__ import annotations

import hashlib
import signal
import time
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from gmail_lightning.datamodules.base import ImageTextDataModule
from gmail_lightning.datasets.base import DataError
from gmail_lightning.datasets.feature_files import (
    PARTS,
    RECORD,
    clear,
    finished_rows,
    merge_parts,
    read_record,
    remove_temporary,
    store_columns,
    write_part,
    write_record,
)
from gmail_lightning.distributed import on_first_rank
from gmail_lightning.models.branches.fingerprint import fingerprint_difference, probe_difference
from gmail_lightning.tasks.embedding import EmbeddingTask
from gmail_lightning.types import Modality

PART_BYTES = 2**26


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
        self._record: dict[str, Any] = {}
        self._rows = pa.table({})
        self._row_ids: list[np.ndarray] = []
        self._features: list[np.ndarray] = []
        self._last = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Looks at the folder, and tells the data module which rows are missing.

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
        if trainer.ckpt_path:
            raise MisconfigurationException(
                "EmbeddingTask takes no ckpt_path: give the checkpoint of the alignment as model.encoder.aligned."
            )
        cast(Any, trainer).predict_loop.return_predictions = False  # they would be kept until the end
        self._rows = _columns(data)
        modalities = [Modality(value) for value in pc.unique(self._rows["modality"]).to_pylist()]
        self._record = {
            **pl_module.record(modalities),
            "dtype": self.dtype,
            "precision": str(trainer.precision),
            "count": len(self._rows),
            "images": _digest(self._rows),
        }
        self._refuse_folder()  # on every rank alike
        trainer.strategy.barrier("FeatureWriter: the folder was looked at")
        on_first_rank(self._prepare_folder, trainer)
        missing = np.flatnonzero(~finished_rows(self.folder, len(self._rows)))
        trainer.strategy.barrier("FeatureWriter: the parts were counted")
        rank_zero_info(f"{self.folder}: {len(self._rows)} images, of which {len(missing)} are to be embedded.")
        if len(missing) < trainer.world_size:  # no process without a batch, whose hooks would not be called
            missing = np.union1d(missing, np.arange(min(trainer.world_size, len(self._rows))))
        data.only_predict = missing
        self._last = time.monotonic()

    def _refuse_folder(self) -> None:
        if self.overwrite or not self.folder.exists():
            return
        if read_record(self.folder) is not None:
            raise MisconfigurationException(
                f"{self.folder} holds a finished feature store. Set overwrite: true to replace it, or choose another "
                "folder."
            )
        pending = read_record(self.folder / PARTS)
        if pending is None and any(self.folder.iterdir()):
            raise MisconfigurationException(
                f"{self.folder} holds files that are no feature store: choose another folder."
            )
        difference = None if pending is None else _difference(pending, self._record)
        if difference is not None:
            raise MisconfigurationException(
                f"{self.folder} holds parts of a store that is made with something else ({difference}). Set overwrite: "
                "true to begin anew, or choose another folder."
            )

    def _prepare_folder(self) -> None:
        pending = read_record(self.folder / PARTS)
        if read_record(self.folder) is not None or (pending and _difference(pending, self._record)):
            clear(self.folder)
        remove_temporary(self.folder)
        (self.folder / PARTS).mkdir(parents=True, exist_ok=True)
        write_record(self.folder / PARTS, self._record)

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
        features = outputs["image_features"].float().cpu()
        stored = features.to(getattr(torch, self.dtype))
        bad = ~torch.isfinite(stored).flatten(1).all(dim=1)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise DataError(
                f"The features of {batch['sample_key'][row]!r} are not finite in {self.dtype}; the largest is "
                f"{features[row].abs().max():.4g}. If that is a number, set dtype: float32."
            )
        self._row_ids.append(batch["row_id"].cpu().numpy())
        self._features.append(stored.numpy())
        size = sum(values.nbytes for values in self._features)
        if size >= PART_BYTES or time.monotonic() - self._last >= self.seconds:
            self._flush()
        if cast(Any, trainer).received_sigterm:  # Lightning's predict loop does not ask, and would go on
            raise SIGTERMException(128 + signal.SIGTERM)

    def _flush(self) -> None:
        if self._row_ids:
            write_part(self.folder, np.concatenate(self._row_ids), np.concatenate(self._features))
        self._row_ids, self._features, self._last = [], [], time.monotonic()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Writes what is done."""
        self._flush()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves the data module with all its rows."""
        cast(Any, trainer).datamodule.only_predict = None

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Waits for all processes; the first then makes the store."""
        self._flush()
        trainer.strategy.barrier("FeatureWriter: all parts are written")
        on_first_rank(self._merge, trainer)

    def _merge(self) -> None:
        missing = len(self._rows) - int(finished_rows(self.folder, len(self._rows)).sum())
        if missing:
            rank_zero_info(
                f"{self.folder}: {missing} of {len(self._rows)} images are missing. Run the same command again, "
                "without a limit on the batches."
            )
            return
        shape = merge_parts(self.folder, self._rows, self._record)
        rank_zero_info(f"{self.folder / RECORD}: features {tuple(shape)} in {self.dtype}, {len(self._rows)} images.")


def _columns(data: ImageTextDataModule) -> pa.Table:
    """What the store says of every image to predict."""
    rows = data.predict_rows()
    return store_columns([rows.table.locate(row) for row in rows.first.tolist()])


def _digest(rows: pa.Table) -> str:
    """Tells which images in which order, and whether one has changed."""
    digest = hashlib.sha256()
    for name in ("file_id", "modality", "size", "changed"):
        digest.update(rows[name].to_numpy().tobytes())
    return digest.hexdigest()


def _difference(first: dict[str, Any], second: dict[str, Any]) -> str | None:
    """Says in what two records differ."""
    for name in second:
        if name == "fingerprint":
            difference = fingerprint_difference(first[name], second[name])
            if difference is not None:
                return f"another encoder: {difference}"
        elif name == "probe":
            for branch, features in second[name].items():
                difference = probe_difference(first[name][branch], features)
                if difference is not None:
                    return f"another encoder: the {branch} features of a fixed image {difference}"
        elif first.get(name) != second[name]:
            return f"{name}: {first.get(name)!r} there, {second[name]!r} now"
    return None
