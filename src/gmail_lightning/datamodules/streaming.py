"""Training on shards that are remote or endless: a stream, where random access is not to be had."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.utils.data import DataLoader

from gmail_lightning.datamodules.base import ImageTextDataModule
from gmail_lightning.datamodules.stream_rows import StreamRows
from gmail_lightning.datamodules.training import as_module, refuse_no_share, seed_or_default, tell_broken
from gmail_lightning.datasets.base import DataError, ImageTextDataset, ModalityName
from gmail_lightning.datasets.shards import MANIFEST, PLAN
from gmail_lightning.datasets.tars.files import expand_path, is_remote
from gmail_lightning.types import ImageTextBatch, InputSpec


class StreamLoader:
    """A fixed number of batches of an endless stream, drawn anew each time."""

    def __init__(self, rows: StreamRows, steps: int, start: Callable[[], int], settings: dict[str, Any]) -> None:
        self.rows, self.steps, self.start, self.settings = rows, steps, start, settings

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[ImageTextBatch]:
        self.rows.start = self.start()  # asked late: only now does Lightning know where a resumed run is
        yield from itertools.islice(DataLoader(self.rows, batch_size=None, **self.settings), self.steps)


class StreamingDataModule(ImageTextDataModule):
    """Trains on webdataset shards in the order in which they come; evaluation is that of the data sets given.

    For shards that are remote (``https:``, or ``pipe:`` and a command) or have no end. Where they are local,
    :class:`~gmail_lightning.datasets.TarShards` mixes streams exactly, resumes exactly and knows the audit. Here an
    epoch is ``steps_per_epoch`` batches on every device; a resumed run goes on with other samples; all images are of
    one modality, and pairs are not kept together; of a shard that is cut short, what is lost is counted by the samples
    that whole shards have; that an image was rejected is known only where its ``.json`` says so, not what the
    audit of the whole set found (duplicates); and leakage into evaluation sets cannot be checked.

    Args:
        urls: Addresses of tars, with ``{00000..00041}``; several in a list. ``{key}.jpg`` (png, webp, ...) with
            ``{key}.txt``, or ``caption`` in ``{key}.json``.
        modality: ``real`` or ``generated``.
        steps_per_epoch: Batches per epoch and device.
        batch_size: Rows per device and training step.
        val: Named evaluation sets for ``fit`` and ``validate``.
        test: Named evaluation sets for ``test``; those of ``val`` by default.
        predict: Data sets for ``predict``.
        source: Name of the generator.
        shuffle: Samples held by each worker to draw from; 0 keeps the order of the shards.
        augmentation: Applied to training images, float (3, h, w) in [0, 1], as by ``MixedModalityDataModule``.
        eval_batch_size: Images per device in evaluation and prediction; by default ``batch_size``.
        num_workers: Worker processes of each loader; each needs a shard of its own.
        max_replaced_fraction: Training stops once more than this share of an epoch's samples were broken. Below 1, a
            shard that is cut short before a worker has read a whole one stops it, for what is lost is not known.
        seed: Of the order; by default that of ``seed_everything``, else 0.
        input_spec: For use without a task.
        space: Name of the data set that ids and keys are of, as in ``TarShards``.

    Raises:
        ModuleNotFoundError: If webdataset is not installed.
    """

    def __init__(
        self,
        urls: str | list[str],
        modality: ModalityName,
        steps_per_epoch: int,
        batch_size: int = 64,
        val: dict[str, list[ImageTextDataset]] | None = None,
        test: dict[str, list[ImageTextDataset]] | None = None,
        predict: list[ImageTextDataset] | ImageTextDataset | None = None,
        source: str | None = None,
        shuffle: int = 1000,
        augmentation: nn.Module | list[nn.Module] | None = None,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        max_replaced_fraction: float = 0.01,
        seed: int | None = None,
        input_spec: InputSpec | None = None,
        space: str = "",
    ) -> None:
        super().__init__(val, test, predict, eval_batch_size or batch_size, num_workers, input_spec)
        refuse_no_share(max_replaced_fraction)
        try:
            import webdataset  # noqa: F401
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "Streaming needs webdataset: pip install 'gmail_lightning[streaming]'."
            ) from error
        if modality not in ("real", "generated"):
            raise ValueError(f"Unknown modality {modality!r}: use 'real' or 'generated'.")
        if steps_per_epoch < 1 or shuffle < 0:
            raise ValueError(f"steps_per_epoch={steps_per_epoch} and shuffle={shuffle}: at least 1, and at least 0.")
        self.batch_size, self.max_replaced_fraction = batch_size, max_replaced_fraction
        self.augmentation, self.seed = as_module(augmentation), seed_or_default(seed)
        self.urls = [url for one in ([urls] if isinstance(urls, str) else urls) for url in expand_path(one)]
        self.modality: ModalityName = modality
        self.source = "real" if modality == "real" else source or "generated"
        self.steps_per_epoch, self.shuffle, self.space = steps_per_epoch, shuffle, space
        self._passes, self._broken, self._broken_epoch = 0, 0, -1

    def train_dataloader(self) -> StreamLoader:
        """Returns ``steps_per_epoch`` batches of the stream.

        Raises:
            MisconfigurationException: If there are fewer shards than workers.
            DataError: If a local shard is missing, or belongs to a store of image generation.
        """
        self._check_files()
        num_replicas, rank = self.replicas()
        workers = max(self.num_workers, 1)
        if len(self.urls) < num_replicas * workers:
            most = len(self.urls) // num_replicas
            advice = f"set num_workers to at most {most}" if most else f"use at most {len(self.urls)} devices"
            raise MisconfigurationException(
                f"{len(self.urls)} shards for {num_replicas} devices x {workers} workers: each worker needs one of "
                f"its own. To go on, {advice}, or write more and smaller shards."
            )
        rank_zero_info(
            f"Stream: {len(self.urls)} shards for {num_replicas} devices x {workers} workers; {self.steps_per_epoch} "
            f"batches of {self.batch_size} {self.modality} rows per device and epoch. Not checked against the "
            "evaluation sets."
        )
        rows = StreamRows(
            self.urls, self.spec, self.batch_size, self.modality, self.source, self.shuffle, self.augmentation,
            self.seed, num_replicas, rank, self.space, self.max_replaced_fraction == 1,
        )  # fmt: skip
        return StreamLoader(rows, self.steps_per_epoch, self._start, self.loader_settings(persistent_workers=False))

    def _check_files(self) -> None:
        for url in self.urls:
            if is_remote(url):
                continue
            if not Path(url).is_file():
                raise DataError(f"{url}: no such tar. A relative path starts from {Path.cwd()}.")
            if (Path(url).parent / MANIFEST).is_file() or (Path(url).parent / PLAN).is_file():
                raise DataError(
                    f"{url} belongs to a store of generated images, whose manifest says what may be trained on: use "
                    "TarShards."
                )

    def _start(self) -> int:
        """Another number for each pass: how far the training is, or how often the loader was asked."""
        self._passes += 1
        return self._passes if self.trainer is None else self.trainer.global_step

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Counts the samples that were broken."""
        batch = super().on_before_batch_transfer(batch, dataloader_idx)
        if self.trainer is not None and self.trainer.training and batch.get("replaced_reason"):
            self._count_broken(batch["replaced_reason"], self.trainer.current_epoch)
        return batch

    def _count_broken(self, reasons: list[str], epoch: int) -> None:
        before = self._broken if epoch == self._broken_epoch else 0
        self._broken, self._broken_epoch = before + len(reasons), epoch
        total = self.steps_per_epoch * self.batch_size
        summary = (
            f"{self._broken} samples of epoch {epoch} on this device were broken, and others stand in for them "
            f"({total} are read in an epoch); the last: {reasons[-1]}"
        )
        tell_broken(
            summary,
            "repair or leave out such shards",
            before=before,
            count=self._broken,
            total=total,
            max_replaced_fraction=self.max_replaced_fraction,
        )
