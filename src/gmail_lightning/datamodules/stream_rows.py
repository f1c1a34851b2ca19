"""Batches out of webdataset shards, in the order in which these come."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.utils.data import IterableDataset, get_worker_info

from gmail_lightning.datamodules.collate import encode_texts
from gmail_lightning.datamodules.stream_samples import Sample, ShardReader
from gmail_lightning.datasets.base import (
    DataError,
    ImageDecodeError,
    ModalityName,
    decode_image,
)
from gmail_lightning.datasets.pictures import PIXELS, Picture, look_at, stack_pictures
from gmail_lightning.types import ImageTextBatch, InputSpec, Modality, modality_rows

MAX_BROKEN = 100  # images in a row that do not decode


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
        space: str = "",
        any_loss: bool = False,
    ) -> None:
        self.urls, self.spec, self.batch_size, self.shuffle, self.seed = urls, spec, batch_size, shuffle, seed
        self.modality: ModalityName = modality
        self.source, self.augmentations = source, [] if augmentation is None else [augmentation]
        self.num_replicas, self.rank = num_replicas, rank
        self.start = 0  # part of the seed: a run that goes on draws anew
        self._shards_read = ShardReader(modality, space, any_loss)
        self._given = 0  # samples taken from the stream
        self._owed = 0  # rows that are still to be marked as standing in for broken ones

    def __iter__(self) -> Iterator[ImageTextBatch]:
        self._shards_read.reasons, self._shards_read.readable, self._given, self._owed = [], 0, 0, 0
        worker = get_worker_info()
        workers, number = (1, 0) if worker is None else (worker.num_workers, worker.id)
        samples = self._samples(self.rank * workers + number, self.num_replicas * workers)
        while True:
            yield self._batch(samples)

    def _shards(self, slot: int, slots: int) -> Iterator[str]:
        in_vain: set[int] = set()  # shards without a sample since the last one that had some
        for number in itertools.count():
            order = np.random.default_rng([self.seed, self.start, number]).permutation(len(self.urls))
            for shard in order[slot::slots].tolist():
                before = self._shards_read.readable
                yield self.urls[shard]
                in_vain = {*in_vain, shard} if self._shards_read.readable == before else set()
                if len(in_vain) == len(self.urls):
                    why = self._shards_read.last_reason
                    raise DataError(f"{self.urls[shard]} and the shards beside it hold no sample to train on.{why}")

    def _samples(self, slot: int, slots: int) -> Iterator[Sample]:
        import webdataset

        samples = itertools.chain.from_iterable(map(self._shards_read.read, self._shards(slot, slots)))
        if not self.shuffle:
            return samples
        draw = random.Random(int(np.random.SeedSequence([self.seed, self.start, slot]).generate_state(1)[0]))
        return iter(webdataset.shuffle(self.shuffle, rng=draw)(samples))

    def _picture(self, sample: Sample) -> Picture:
        return Picture(PIXELS, look_at(decode_image(sample.image), self.spec.images, self.augmentations))

    def _batch(self, stream: Iterator[Sample]) -> ImageTextBatch:
        samples: list[Sample] = []
        pictures: list[Picture] = []
        undecoded: list[str] = []
        broken = 0
        while len(samples) < self.batch_size:
            sample = next(stream)
            self._given += 1
            try:
                if self.spec.images:
                    pictures.append(self._picture(sample))
                samples.append(sample)
                broken = 0
            except ImageDecodeError as error:
                broken += 1
                undecoded.append(f"key {sample.key!r}: {error}")
                if broken == MAX_BROKEN:
                    why = f"{MAX_BROKEN} images in a row do not decode, the last: {undecoded[-1]}"
                    raise DataError(why) from error
        # What is broken counts once as many samples were given out as were read before it: shuffling reads ahead.
        due = [reason for at, reason in self._shards_read.reasons if at <= self._given]
        reasons, self._shards_read.reasons = [*undecoded, *due], self._shards_read.reasons[len(due) :]
        self._owed += len(reasons)
        standing_in = min(self._owed, self.batch_size)
        self._owed -= standing_in
        captions = [sample.caption for sample in samples]
        size = len(samples)
        batch: dict[str, Any] = {
            "modality": torch.full((size,), int(Modality[self.modality.upper()])),
            "image_id": torch.tensor([sample.image_id for sample in samples]),
            "pair_id": torch.tensor([sample.pair_id for sample in samples]),
            "source": [self.source] * size,
            "sample_key": [sample.key for sample in samples],
            "caption": captions,
            "replaced": torch.arange(size) < standing_in,
            "replaced_reason": reasons,
        }
        batch.update(stack_pictures(pictures, lambda i: f"key {samples[i].key!r}"))
        for name, text_spec in self.spec.texts.items():
            batch[name], batch[f"{name}_row"] = encode_texts(name, text_spec, captions), torch.arange(size)
        if self.spec.captions is not None:
            batch.update(self.spec.captions.encode(captions, [""] * size))
        batch.update(modality_rows(batch))
        return cast(ImageTextBatch, batch)
