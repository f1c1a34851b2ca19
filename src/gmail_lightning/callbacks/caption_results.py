"""Captions as the file that COCO's evaluation reads."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from gmail_lightning.datamodules import ImageTextDataModule
from gmail_lightning.datamodules.rows import EvaluationRows
from gmail_lightning.datasets.base import DataError, one_line
from gmail_lightning.datasets.shards import temporary
from gmail_lightning.distributed import on_first_rank


class CocoResultWriter(Callback):
    """Writes predicted captions in COCO's result format, ``[{"image_id": 42, "caption": "..."}, ...]``.

    One file for all processes: each image once, by ascending ``image_id``, each caption on one line. It is written when
    the last process is done, to a temporary name first, and replaces an older one.

    Args:
        path: The file; by default ``captions.json`` in the run folder.
        sample_keys: Add the ``sample_key`` of every image, such as its file name: where ``image_id`` is a hash, nothing
            else says which image it is. COCO's tools ignore it.

    Raises:
        ValueError: If the path does not end in ``.json``.
    """

    def __init__(self, path: str | None = None, sample_keys: bool = False) -> None:
        if path is not None and not path.endswith(".json"):
            raise ValueError(f"path={path!r}: COCO results are a .json file.")
        self.path, self.sample_keys = path, sample_keys
        self._file = Path()
        self._rows: list[dict[str, Any]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses images that would come twice, before the first caption is written.

        Raises:
            DataError: If two images have one ``image_id``.
        """
        if stage != "predict":
            return
        self._rows = []
        self._file = Path(self.path or Path(trainer.log_dir or trainer.default_root_dir) / "captions.json")
        data = getattr(trainer, "datamodule", None)
        if isinstance(data, ImageTextDataModule):
            _refuse_shared_ids(data.predict_rows())
        if not cast(Any, trainer).fast_dev_run:  # what cannot be written is known now
            on_first_rank(partial(self._file.parent.mkdir, parents=True, exist_ok=True), trainer)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps the captions of a batch.

        Raises:
            MisconfigurationException: If the task predicts no captions.
        """
        if not isinstance(outputs, dict) or not {"caption", "image_id"} <= outputs.keys():
            raise MisconfigurationException(
                f"CocoResultWriter writes the captions that CaptioningTask predicts; {type(pl_module).__name__} "
                "predicts none: predict_step must return a dict with caption and image_id."
            )
        columns = {
            "image_id": outputs["image_id"].tolist(),
            "caption": [one_line(caption) for caption in outputs["caption"]],
            **({"sample_key": outputs["sample_key"]} if self.sample_keys else {}),
        }
        self._rows += [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gathers the captions of all processes on the first, which writes the file."""
        rows = [self._rows]
        if trainer.world_size > 1:
            rows = [[] for _ in range(trainer.world_size)]
            dist.gather_object(self._rows, rows if trainer.is_global_zero else None)
        self._rows = []
        if not cast(Any, trainer).fast_dev_run:
            on_first_rank(partial(_write, [row for share in rows for row in share], self._file), trainer)


def _refuse_shared_ids(rows: EvaluationRows) -> None:
    ids = rows.table.image_id[rows.first]
    order = np.argsort(ids, kind="stable")
    twice = np.flatnonzero(ids[order][1:] == ids[order][:-1])
    if len(twice):
        one, other = rows.first[order[twice[0] : twice[0] + 2]].tolist()
        raise DataError(
            f"{rows.table.describe(one)} and {rows.table.describe(other)} have the same image_id "
            f"{rows.table.image_id[one]} ({len(twice)} such images), and COCO results hold one caption per image_id. "
            "Predict real and generated images, or data sets that share images, apart; or use PredictionWriter, which "
            "goes by sample_key."
        )


def _write(rows: list[dict[str, Any]], path: Path) -> None:
    """Writes each image once; hours of captioning are not lost to an image that came twice."""
    first: dict[int, dict[str, Any]] = {}
    others = [row for row in rows if first.setdefault(row["image_id"], row) is not row]
    if others:
        different = [row for row in others if row["caption"] != first[row["image_id"]]["caption"]]
        rank_zero_warn(
            f"{len(others)} captions are of an image_id that came before, such as {others[0]['image_id']}; "
            f"{len(different)} of them differ from the first, which is kept."
        )
    lines = ",\n".join(json.dumps(first[image_id]) for image_id in sorted(first))
    part = temporary(path)
    part.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    part.replace(path)
    rank_zero_info(f"Captions of {len(first)} images: {path}")
