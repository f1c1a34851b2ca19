"""CPU time of the mixed loader against a plain shuffle of the same rows.

The peer is ``DataLoader(ConcatDataset(...), shuffle=True)``. Both loaders read the same columns of the same data sets,
row by row, and hand out the same kind of batch (256 rows: ids, captions, sources and keys; no pixels, which would hide
the loaders behind the decoding). Goal: at most 1.1 times the CPU time a batch, for pairs and for mixtures.

A second comparison, for information, leaves nothing but the order: bare numbers under both samplers. There the items
(row, epoch, position) show, which a plain shuffle does not make: some 20 us a batch, whatever an item then costs.
"""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

import logging
import statistics
import sys
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from gmail_lightning.datamodules import MixedModalityDataModule
from gmail_lightning.datasets import ImageTextDataset
from gmail_lightning.samplers import MixedModalitySampler
from gmail_lightning.types import InputSpec, Modality

ROWS = 25_600
BATCH_SIZE = 256
ROUNDS = 9
GOAL = 1.1


class Trivial(ImageTextDataset):
    """Rows that cost nothing to read."""

    def __init__(self, modality: Modality) -> None:
        self.modality = np.full(ROWS, modality)
        self.image_id = self.pair_id = np.arange(ROWS)
        self.name = modality.name.lower()
        self.keys = [f"{self.name}/{i}" for i in range(ROWS)]
        self.texts = [[f"caption {i}"] for i in range(ROWS)]

    def read_image(self, index: int) -> Tensor:
        raise NotImplementedError

    def captions(self, index: int) -> list[str]:
        return self.texts[index]

    def sample_key(self, index: int) -> str:
        return self.keys[index]

    def source(self, index: int) -> str:
        return self.name


class Samples(Dataset[dict[str, Any]]):
    """One sample a row, as a data set without batches gives it."""

    def __init__(self, rows: ImageTextDataset) -> None:
        self.rows = rows
        self.columns = [column.tolist() for column in (rows.modality, rows.image_id, rows.pair_id)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        modality, image_id, pair_id = self.columns
        return {
            "modality": modality[index],
            "image_id": image_id[index],
            "pair_id": pair_id[index],
            "source": self.rows.source(index),
            "sample_key": self.rows.sample_key(index),
            "caption": self.rows.captions(index)[0],
            "replaced": False,
        }


class Numbers(Dataset[int]):
    """The least that an item can be."""

    def __init__(self, start: int) -> None:
        self.numbers = list(range(start, start + ROWS))

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> int:
        return self.numbers[index]


class ByItem(Dataset[int]):
    """The same numbers by the items of the mixing sampler, batch by batch as the data module reads them."""

    def __init__(self, rows: Dataset[int]) -> None:
        self.rows = rows

    def __getitems__(self, items: list[tuple[int, int, int]]) -> list[int]:
        rows = self.rows
        return [rows[row] for row, _, _ in items]


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    columns = {key: [sample[key] for sample in samples] for key in samples[0]}
    tensors = ("modality", "image_id", "pair_id", "replaced")
    return {key: torch.tensor(column) if key in tensors else column for key, column in columns.items()}


Loaders = dict[str, Iterable[Any]]


def batch_loaders() -> Loaders:
    real, generated = Trivial(Modality.REAL), Trivial(Modality.GENERATED)
    both = ConcatDataset([Samples(real), Samples(generated)])
    loaders: Loaders = {"shuffle": DataLoader(both, BATCH_SIZE, shuffle=True, collate_fn=collate)}
    for mode in ("paired", "mixture"):
        data = MixedModalityDataModule([real, generated], batch_size=BATCH_SIZE, mode=mode, input_spec=InputSpec())
        data.setup("fit")
        loaders[mode] = data.train_dataloader()
    check({name: next(iter(loader)) for name, loader in loaders.items()})
    return loaders


def number_loaders() -> Loaders:
    both = ConcatDataset([Numbers(0), Numbers(ROWS)])
    modality, pair_id = np.repeat([0, 1], ROWS), np.tile(np.arange(ROWS), 2)
    loaders: Loaders = {"shuffle": DataLoader(both, BATCH_SIZE, shuffle=True)}
    for mode in ("paired", "mixture"):
        sampler = MixedModalitySampler(modality, pair_id, batch_size=BATCH_SIZE, mode=mode)
        loaders[mode] = DataLoader(ByItem(both), BATCH_SIZE, sampler=sampler)
    return loaders


def check(batches: dict[str, dict[str, Any]]) -> None:
    """All loaders must hand out the same kind of batch."""
    peer = batches["shuffle"]
    for name, batch in batches.items():
        for key, value in peer.items():
            same = type(batch[key]) is type(value) and len(batch[key]) == BATCH_SIZE
            if not same or (isinstance(value, Tensor) and value.dtype != batch[key].dtype):
                raise TypeError(f"{name}: {key} is not what the peer gives.")


def compare(title: str, loaders: Loaders) -> float:
    """Prints the times and returns the worst ratio to the shuffle."""
    times: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(ROUNDS):
        for name, loader in loaders.items():  # interleaved, so that a busy machine slows all of them
            start = time.process_time()
            number = sum(1 for _ in loader)
            times[name].append((time.process_time() - start) / number)
    worst = 0.0
    for name, values in times.items():
        ratio = statistics.median(ours / peer for ours, peer in zip(values, times["shuffle"], strict=True))
        worst = worst if name == "shuffle" else max(worst, ratio)
        print(f"{title}, {name}: {statistics.median(values) * 1e6:.0f} us of CPU a batch of {BATCH_SIZE}, {ratio:.2f}x")
    return worst


def main() -> int:
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    compare("bare numbers", number_loaders())
    worst = compare("batches", batch_loaders())
    print(f"mixing: {worst:.2f}x (goal <= {GOAL})")
    return int(worst > GOAL)


if __name__ == "__main__":
    sys.exit(main())
