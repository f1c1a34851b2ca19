"""Captions as the file that COCO's evaluation reads."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.distributed.tensor import DTensor

from gmail_lightning.callbacks.resumption import begin, end, stop_if_told
from gmail_lightning.datamodules import ImageTextDataModule
from gmail_lightning.datamodules.rows import EvaluationRows
from gmail_lightning.datasets.base import DataError, one_line
from gmail_lightning.distributed import on_first_rank
from gmail_lightning.generation.captions import CaptionFile, unlisted_rows
from gmail_lightning.generation.parts import Record, with_work_for_all
from gmail_lightning.generation.rows import image_columns, images_digest
from gmail_lightning.models.branches.adapters import adapter_ids


class CocoResultWriter(Callback):
    """Writes predicted captions in COCO's result format, ``[{"image_id": 42, "caption": "..."}, ...]``.

    One file for all processes: each image once, by ascending ``image_id``, each caption on one line. It is written when
    the last process is done, to a temporary name first, and replaces an older one. Until then the captions lie in parts
    beside it: killed, the same command goes on with the images that are missing, on any number of devices. A loader of
    one's own has no list of images, and begins anew.

    Args:
        path: The file; by default ``captions.json`` in the run folder. All nodes must see its folder.
        sample_keys: Add the ``sample_key`` of every image, such as its file name: where ``image_id`` is a hash, nothing
            else says which image it is. COCO's tools ignore it.
        seconds: Most time between two parts, and so what a kill loses.

    Raises:
        ValueError: If the path does not end in ``.json``.
    """

    def __init__(self, path: str | None = None, sample_keys: bool = False, seconds: float = 60.0) -> None:
        if path is not None and not path.endswith(".json"):
            raise ValueError(f"path={path!r}: COCO results are a .json file.")
        self.path, self.sample_keys, self.seconds = path, sample_keys, seconds
        self._captions: CaptionFile | None = None  # none in a trial run
        self._unlisted = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lets the data module ask which images are missing.

        Raises:
            DataError: If two images have one ``image_id``.
        """
        if stage != "predict":
            return
        self._captions, self._unlisted = None, 0
        file = Path(self.path or Path(trainer.log_dir or trainer.default_root_dir) / "captions.json")
        data = getattr(trainer, "datamodule", None)
        rows = data.predict_rows() if isinstance(data, ImageTextDataModule) else None
        if rows is not None:
            _refuse_shared_ids(rows)
        if cast(Any, trainer).fast_dev_run:
            return
        on_first_rank(partial(file.parent.mkdir, parents=True, exist_ok=True), trainer)
        if isinstance(data, ImageTextDataModule) and rows is not None:
            data.predict_only(partial(self._missing, trainer, pl_module, file, rows))
        else:
            self._captions = self._begin(trainer, CaptionFile(file, None, {}, self.seconds))[0]

    def _missing(self, trainer: Trainer, task: LightningModule, file: Path, rows: EvaluationRows) -> np.ndarray:
        """Looks at what is there; it is asked for when the checkpoint is known."""
        record = {**_record(trainer, task, rows), "sample_keys": self.sample_keys}
        self._captions, missing = self._begin(trainer, CaptionFile(file, len(rows), record, self.seconds))
        if len(missing) < len(rows):
            rank_zero_info(f"{file}: {len(rows)} images, of which {len(missing)} are to be captioned.")
        return with_work_for_all(missing, len(rows), trainer.world_size)

    def _begin(self, trainer: Trainer, captions: CaptionFile) -> tuple[CaptionFile, np.ndarray]:
        missing, removed = begin(captions.begin, trainer)
        if removed is not None:
            rank_zero_warn(f"{captions.parts.folder}: captions of another run are removed ({removed}).")
        return captions, missing

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps the captions of a batch, and writes a part now and then.

        Raises:
            MisconfigurationException: If the task predicts no captions.
        """
        if not isinstance(outputs, dict) or not {"caption", "image_id"} <= outputs.keys():
            raise MisconfigurationException(
                f"CocoResultWriter writes the captions that CaptioningTask predicts; {type(pl_module).__name__} "
                "predicts none: predict_step must return a dict with caption and image_id."
            )
        if self._captions is None:
            return
        columns = {
            "image_id": outputs["image_id"].tolist(),
            "caption": [one_line(caption) for caption in outputs["caption"]],
            **({"sample_key": outputs["sample_key"]} if self.sample_keys else {}),
        }
        entries = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        if self._captions.count is None:
            row_id = unlisted_rows(trainer.global_rank, self._unlisted, len(entries))
            self._unlisted += len(entries)
        else:
            row_id = batch["row_id"].cpu().numpy()
        self._captions.add(row_id, entries)
        stop_if_told(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Writes what is done."""
        if self._captions is not None:
            self._captions.parts.flush()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Waits for all processes; the first then writes the file."""
        if self._captions is None:
            return
        finished = end(self._captions.parts, self._captions.finish, trainer)
        if finished.warning is not None:
            rank_zero_warn(finished.warning)
        rank_zero_info(finished.message)


def _record(trainer: Trainer, task: LightningModule, rows: EvaluationRows) -> Record:
    """What captions depend on: the images, the task and its settings, and weights, by their file if there is one."""
    checkpoint = Path(str(trainer.ckpt_path)) if trainer.ckpt_path else None
    status = checkpoint.stat() if checkpoint is not None and checkpoint.exists() else None
    settings = json.dumps(dict(task.hparams), default=lambda value: type(value).__name__)
    return {
        "images": images_digest(image_columns([rows.table.locate(row) for row in rows.first.tolist()])),
        "task": type(task).__name__,
        "settings": hashlib.sha256(settings.encode()).hexdigest(),
        "checkpoint": str(checkpoint) if status is None else [status.st_size, status.st_mtime_ns],
        "weights": _weights_digest(task) if checkpoint is None else None,
        "precision": str(trainer.precision),
    }


def _weights_digest(task: LightningModule) -> str:
    """Tells what is trained, and the adapters of an earlier stage, apart from what they were before."""
    digest, adapters = hashlib.sha256(), adapter_ids(task)
    for name, weight in task.named_parameters():
        if weight.requires_grad or id(weight) in adapters:
            digest.update(f"{name} {tuple(weight.shape)}".encode())
            share = weight.to_local() if isinstance(weight, DTensor) else weight  # no collective on one process alone
            digest.update(share.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _refuse_shared_ids(rows: EvaluationRows) -> None:
    ids = rows.table.image_id[rows.first]
    _, first, group = np.unique(ids, return_index=True, return_inverse=True)
    earliest = first[group]  # image of the same id
    later = np.flatnonzero(earliest != np.arange(len(ids)))
    if len(later):
        one, other = rows.first[[earliest[later[0]], later[0]]].tolist()
        raise DataError(
            f"{rows.table.describe(one)} and {rows.table.describe(other)} have the same image_id "
            f"{rows.table.image_id[one]} ({len(later)} such images), and COCO results hold one caption per image_id. "
            "Predict real and generated images, or data sets that share images, apart; or use PredictionWriter, which "
            "goes by sample_key."
        )
