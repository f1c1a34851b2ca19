"""Batches out of webdataset shards, in the order in which these come."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset, get_worker_info

from gmail_lightning.datamodules.collate import encode_texts
from gmail_lightning.datasets.base import (
    DataError,
    ImageDecodeError,
    ModalityName,
    decode_image,
    one_line,
)
from gmail_lightning.datasets.ids import stable_ids
from gmail_lightning.transforms.image import SUFFIXES, resize
from gmail_lightning.types import ImageTextBatch, InputSpec, Modality

MAX_BROKEN = 100  # images in a row that do not decode


@dataclass(frozen=True)
class Sample:
    """One sample of a shard, before its image is decoded."""

    key: str
    image: bytes
    caption: str
    image_id: int


def read_sample(members: dict[str, Any], modality: ModalityName) -> Sample | None:
    """Reads the members of one key.

    Args:
        members: As webdataset groups them, by suffix; ``__key__`` is the key.
        modality: What the stream is said to be.

    Returns:
        The sample, or None where its record says that its status is neither ok nor success.

    Raises:
        ValueError: If image or caption are missing.
        DataError: If the record says that the sample is of another modality, or not for training.
    """
    key = members["__key__"].removeprefix("./")
    record = json.loads(members.get("json", b"{}"))
    if record.get("status") not in (None, "ok", "success"):
        return None
    if record.get("split") not in (None, "train"):
        raise DataError(f"Key {key!r} was made for split {record['split']!r}: it is no training data.")
    if record.get("modality") not in (None, modality):
        raise DataError(f"Key {key!r} says modality {record['modality']!r}, but modality={modality!r} was given.")
    images = [data for suffix, data in members.items() if f".{suffix}" in SUFFIXES]
    caption = one_line(members.get("txt", b"").decode() or record.get("caption") or "")
    if len(images) != 1 or not caption:
        raise ValueError("no caption" if images else "no image")
    image_id = record.get("image_id")
    return Sample(key, images[0], caption, image_id if isinstance(image_id, int) else int(stable_ids([key])[0]))


class StreamRows(IterableDataset[ImageTextBatch]):
    """Endless batches out of the shards of one worker.

    On every pass the shards come in another order, the same on all ranks, and each worker of each rank takes its share
    of them, so that no two workers read one shard in a pass. What is broken is left out; the next sample stands in.
    """

    def __init__(
        self,
        urls: list[str],
        spec: InputSpec,
        batch_size: int,
        modality: ModalityName,
        source: str,
        shuffle: int,
        augmentation: nn.Module | None,
        seed: int,
        num_replicas: int,
        rank: int,
    ) -> None:
        self.urls, self.spec, self.batch_size, self.shuffle, self.seed = urls, spec, batch_size, shuffle, seed
        self.modality: ModalityName = modality
        self.source, self.augmentation = source, augmentation
        self.num_replicas, self.rank = num_replicas, rank
        self.start = 0  # part of the seed: a run that goes on draws anew
        self._reasons: list[str] = []
        self._readable = 0

    def __iter__(self) -> Iterator[ImageTextBatch]:
        worker = get_worker_info()
        workers, number = (1, 0) if worker is None else (worker.num_workers, worker.id)
        samples = self._samples(self.rank * workers + number, self.num_replicas * workers)
        while True:
            yield self._batch(samples)

    def _note(self, error: Exception) -> bool:
        """Remembers what is broken, and lets webdataset go on."""
        self._reasons.append(" ".join(str(part) for part in (type(error).__name__, *error.args)))
        return True

    def _shards(self, slot: int, slots: int) -> Iterator[dict[str, str]]:
        for number in itertools.count():
            before = self._readable
            order = np.random.default_rng([self.seed, self.start, number]).permutation(len(self.urls))
            for shard in order[slot::slots]:
                yield {"url": self.urls[shard]}
            if self._readable == before:
                why = f" The last reason: {self._reasons[-1]}." if self._reasons else ""
                raise DataError(f"{self.urls[order[slot]]} and the shards beside it hold no sample to train on.{why}")

    def _samples(self, slot: int, slots: int) -> Iterator[Sample]:
        import webdataset

        def read(members: Iterator[dict[str, Any]]) -> Iterator[Sample]:
            for some in members:
                try:
                    sample = read_sample(some, self.modality)
                except DataError as error:
                    raise DataError(f"{some['__url__']}: {error}") from error
                except (ValueError, AttributeError) as error:  # no image or caption, not UTF-8, not a JSON object
                    self._reasons.append(f"{some['__url__']} key {some['__key__']!r}: {error}")
                    continue
                if sample is not None:
                    self._readable += 1
                    yield sample

        draw = random.Random(int(np.random.SeedSequence([self.seed, self.start, slot]).generate_state(1)[0]))
        stages = [lambda: self._shards(slot, slots), webdataset.tarfile_to_samples(handler=self._note), read]
        if self.shuffle:
            stages.append(webdataset.shuffle(self.shuffle, rng=draw))
        yield from webdataset.DataPipeline(*stages)

    def _image(self, sample: Sample) -> Tensor:
        assert self.spec.image is not None
        image = resize(decode_image(sample.image), self.spec.image)
        return image if self.augmentation is None else self.augmentation(image)

    def _batch(self, stream: Iterator[Sample]) -> ImageTextBatch:
        samples: list[Sample] = []
        images: list[Tensor] = []
        broken = 0
        while len(samples) < self.batch_size:
            sample = next(stream)
            try:
                if self.spec.image is not None:
                    images.append(self._image(sample))
                samples.append(sample)
                broken = 0
            except ImageDecodeError as error:
                broken += 1
                self._reasons.append(f"key {sample.key!r}: {error}")
                if broken == MAX_BROKEN:
                    why = f"{MAX_BROKEN} images in a row do not decode, the last: {self._reasons[-1]}"
                    raise DataError(why) from error
        reasons, self._reasons = self._reasons[: self.batch_size], self._reasons[self.batch_size :]
        captions = [sample.caption for sample in samples]
        size = len(samples)
        batch: dict[str, Any] = {
            "modality": torch.full((size,), int(Modality[self.modality.upper()])),
            "image_id": torch.tensor([sample.image_id for sample in samples]),
            "pair_id": torch.full((size,), -1),
            "source": [self.source] * size,
            "sample_key": [sample.key for sample in samples],
            "caption": captions,
            "replaced": torch.arange(size) < len(reasons),
            "replaced_reason": reasons,
        }
        if images:
            batch["image"], batch["image_row"] = torch.stack(images), torch.arange(size)
        for name, text_spec in self.spec.texts.items():
            batch[name], batch[f"{name}_row"] = encode_texts(name, text_spec, captions), torch.arange(size)
        return cast(ImageTextBatch, batch)
