"""From pixels to shards, behind the back of the process that makes them."""

from __future__ import annotations

import io
import json
import os
import queue
import tarfile
import threading
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from gmail_lightning.datasets.base import ImageDecodeError, decode_image
from gmail_lightning.datasets.shards import SCHEMA
from gmail_lightning.generation.images.audit import audit_image
from gmail_lightning.generation.whole_files import temporary, write_table

WEBP_METHOD = 2  # of 0 to 6: at quality 90 two thirds of the time of method 4, for files 3 % larger


@dataclass(frozen=True)
class ImageFormat:
    """How images are stored.

    Attributes:
        size: Pixels of the shorter side; or height and width, to which the image is resized and cropped at the centre;
            None keeps the size of the generator. Images are never enlarged to the shorter side.
        name: Codec, and suffix of the files.
        quality: Of webp and jpg, 1 to 100. Both halve the resolution of colour; png keeps every pixel.
    """

    size: int | tuple[int, int] | None = None
    name: Literal["webp", "png", "jpg"] = "jpg"
    quality: int = 95

    def __post_init__(self) -> None:
        sides = self.size if isinstance(self.size, tuple) else (self.size,)
        if any(side is not None and side < 1 for side in sides):
            raise ValueError(f"size={self.size}: give pixels of the shorter side, or height and width.")
        if self.name not in ("webp", "png", "jpg"):
            raise ValueError(f"Unknown image_format {self.name!r}: use webp, png or jpg.")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality={self.quality} is not between 1 and 100.")

    def fit(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Height and width to resize an image to, and those to crop it to afterwards."""
        if self.size is None or (isinstance(self.size, int) and min(height, width) <= self.size):
            return (height, width), (height, width)
        if isinstance(self.size, int):
            scale = self.size / min(height, width)
            resized = round(height * scale), round(width * scale)
            return resized, resized
        scale = max(self.size[0] / height, self.size[1] / width)
        return (max(round(height * scale), self.size[0]), max(round(width * scale), self.size[1])), self.size


def encode_image(image: Image.Image, image_format: ImageFormat) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    if image_format.name == "webp":
        image.save(buffer, "webp", quality=image_format.quality, method=WEBP_METHOD)
    elif image_format.name == "jpg":
        image.save(buffer, "jpeg", quality=image_format.quality)
    else:
        image.save(buffer, "png")
    return buffer.getvalue()


def resize_image(image: Image.Image, image_format: ImageFormat) -> Image.Image:
    """Resizes with antialiasing (bicubic), then crops the centre."""
    (height, width), (crop_height, crop_width) = image_format.fit(image.height, image.width)
    if (height, width) != (image.height, image.width):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    return image.crop((left, top, left + crop_width, top + crop_height))


def to_bytes(image: Tensor) -> Tensor:
    """Maps floats in [0, 1] to bytes, rounding to the nearest; what lies outside is clipped."""
    return image.mul(255).round_().clamp_(0, 255).to(torch.uint8)


def store_image(
    image: np.ndarray, finite: bool, flagged: bool, image_format: ImageFormat
) -> tuple[bytes | None, dict[str, Any]]:
    """Encodes one image, decodes it again as a reader will, and audits what comes out.

    Args:
        image: uint8, shape (3, H, W).
        finite: Whether the generator left only finite values.
        flagged: Whether its safety checker objects.
        image_format: How to store it.

    Returns:
        The encoded image, None where the row failed, and the columns that the audit fills.
    """
    height, width = image_format.fit(*image.shape[1:])[1]
    row: dict[str, Any] = {"size": f"{height}x{width}", "flagged": flagged}
    if not finite:
        return None, {**row, "status": "failed", "reason": "not_finite"}
    pixels = np.ascontiguousarray(image.transpose(1, 2, 0))
    data = encode_image(resize_image(Image.fromarray(pixels), image_format), image_format)
    try:
        stored = decode_image(data)
    except ImageDecodeError:
        return None, {**row, "status": "failed", "reason": "undecodable"}
    return data, {**row, **audit_image(stored, flagged)}


class ShardFile:
    """A shard in the making. ``close`` gives the tar its name, then writes the rows that say it is complete."""

    def __init__(self, folder: Path, shard: str) -> None:
        self.path, self.rows = folder / f"{shard}.tar", list[dict[str, Any]]()
        self._temporary = temporary(self.path)
        self._file = self._temporary.open("wb")
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def add(self, row: dict[str, Any], image: bytes | None, suffix: str) -> None:
        """Adds a row, and its image where there is one."""
        self.rows.append(row)
        if image is None:
            return
        texts = {"txt": row["caption"].encode(), "json": json.dumps(row).encode()}
        for name, data in {suffix: image, **texts}.items():
            member = tarfile.TarInfo(f"{row['key']}.{name}")
            member.size = len(data)
            self._tar.addfile(member, io.BytesIO(data))

    def close(self) -> None:
        """Completes the shard."""
        further = sorted({name for row in self.rows for name in row} - set(SCHEMA.names))
        schema = pa.schema([*SCHEMA, *((name, pa.string()) for name in further)])
        table = pa.Table.from_pylist(self.rows, schema)
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._temporary.replace(self.path)
        write_table(table, self.path.with_suffix(".parquet"))

    def discard(self) -> None:
        """Removes what there is of the shard."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Job:
    shard: str
    rows: list[dict[str, Any]]
    images: Tensor  # (B, 3, H, W)
    finite: list[bool] | None  # None: not looked at yet, the images are still floats
    flagged: list[bool]


class BackgroundWriter:
    """Takes batches of images in the order of the plan and writes shards, in threads.

    Memory stays flat: where the threads fall behind, ``put`` waits. An exception of theirs is raised by the next call.
    No torch operation on pixels runs in the threads, so that they leave its pool of threads to the generator.

    Args:
        folder: Of the store.
        sizes: Number of rows of each shard that will come; a shard is closed with its last.
        image_format: How images are stored.
        threads: That encode and audit.
        capacity: Batches that may wait.
    """

    def __init__(
        self, folder: Path, sizes: Mapping[str, int], image_format: ImageFormat, threads: int = 2, capacity: int = 2
    ) -> None:
        self.folder, self.sizes, self.image_format = folder, sizes, image_format
        #: Rows written so far, by reason; those that are ok under ``ok``.
        self.counts: Counter[str] = Counter()
        self._queue: queue.Queue[_Job | None] = queue.Queue(capacity)
        self._pool = ThreadPoolExecutor(threads, "encode")
        self._file: ShardFile | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="write shards", daemon=True)
        self._thread.start()

    def put(self, shard: str, rows: list[dict[str, Any]], images: Tensor, flagged: list[bool]) -> None:
        """Hands over a batch of one shard.

        Args:
            shard: Name of the shard.
            rows: What the manifest says of each image besides the audit; they are filled and kept.
            images: Floats in [0, 1], shape (B, 3, H, W).
            flagged: By the generator's safety checker, length B.
        """
        finite = None
        if images.device.type != "cpu":  # a quarter of the bytes to copy, and the work is done where it is fast
            finite = torch.isfinite(images).flatten(1).all(dim=1).tolist()
            images = to_bytes(images.nan_to_num()).cpu()
        job = _Job(shard, rows, images, finite, flagged)
        while True:
            self._raise()
            try:
                return self._queue.put(job, timeout=1)
            except queue.Full:
                continue

    def finish(self) -> None:
        """Waits until all is written. A shard whose last row has not come is removed."""
        self.stop()
        self._raise()

    def stop(self) -> None:
        """As ``finish``, after an error: what the threads had to say is not raised."""
        while self._thread.is_alive():
            try:
                self._queue.put(None, timeout=1)
                break
            except queue.Full:
                continue
        self._thread.join()
        self._pool.shutdown()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while (job := self._queue.get()) is not None:
                self._write(job)
        except BaseException as error:
            self._error = error
        finally:
            if self._file is not None:
                self._file.discard()

    def _store(self, image: Tensor, finite: bool | None, flagged: bool) -> tuple[bytes | None, dict[str, Any]]:
        pixels = image.numpy()
        if finite is None:
            finite = bool(np.isfinite(pixels).all())
            pixels = _to_bytes(pixels) if finite else pixels
        return store_image(pixels, finite, flagged, self.image_format)

    def _write(self, job: _Job) -> None:
        finite = job.finite if job.finite is not None else [None] * len(job.rows)
        if self._file is None:
            self._file = ShardFile(self.folder, job.shard)
        created = datetime.now(UTC).isoformat(timespec="seconds")
        for row, (data, audit) in zip(
            job.rows, self._pool.map(self._store, job.images, finite, job.flagged), strict=True
        ):
            row.update(audit, duplicate_of=None, created=created)
            self._file.add(row, data, self.image_format.name)
            self.counts[row["reason"] or "ok"] += 1
        if len(self._file.rows) == self.sizes[job.shard]:
            file, self._file = self._file, None
            file.close()


def _to_bytes(image: np.ndarray) -> np.ndarray:
    """As :func:`to_bytes`."""
    return np.rint(image * np.float32(255)).clip(0, 255).astype(np.uint8)
