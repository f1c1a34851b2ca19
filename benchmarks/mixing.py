"""CPU time of the mixed loader against a plain shuffle of the same rows.

The peer is ``DataLoader(ConcatDataset(...), shuffle=True)``. Both loaders read the same columns of the same data sets, row
by row, and hand out the same kind of batch (256 rows: ids, captions, sources and keys; no pixels, which would hide the
loaders behind the decoding). Goal: at most 1.1 times the CPU time a batch, for pairs and for mixtures.
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


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    columns = {key: [sample[key] for sample in samples] for key in samples[0]}
    tensors = ("modality", "image_id", "pair_id", "replaced")
    return {key: torch.tensor(column) if key in tensors else column for key, column in columns.items()}


def loaders() -> dict[str, Iterable[dict[str, Any]]]:
    real, generated = Trivial(Modality.REAL), Trivial(Modality.GENERATED)
    both = ConcatDataset([Samples(real), Samples(generated)])
    result: dict[str, Any] = {"shuffle": DataLoader(both, BATCH_SIZE, shuffle=True, collate_fn=collate)}
    for mode in ("paired", "mixture"):
        data = MixedModalityDataModule([real, generated], batch_size=BATCH_SIZE, mode=mode, input_spec=InputSpec())
        data.setup("fit")
        result[mode] = data.train_dataloader()
    return result


def check(batches: dict[str, dict[str, Any]]) -> None:
    """All loaders must hand out the same kind of batch."""
    peer = batches["shuffle"]
    for name, batch in batches.items():
        for key, value in peer.items():
            same = type(batch[key]) is type(value) and len(batch[key]) == BATCH_SIZE
            if not same or (isinstance(value, Tensor) and value.dtype != batch[key].dtype):
                raise TypeError(f"{name}: {key} is not what the peer gives.")


def main() -> int:
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    compared = loaders()
    check({name: next(iter(loader)) for name, loader in compared.items()})
    times: dict[str, list[float]] = {name: [] for name in compared}
    for _ in range(ROUNDS):
        for name, loader in compared.items():  # interleaved, so that a busy machine slows all of them
            start = time.process_time()
            number = sum(1 for _ in loader)
            times[name].append((time.process_time() - start) / number)
    for name, values in times.items():
        print(f"{name}: {statistics.median(values) * 1e6:.0f} us of CPU a batch of {BATCH_SIZE}")
    ratios = {
        mode: statistics.median(ours / peer for ours, peer in zip(times[mode], times["shuffle"], strict=True))
        for mode in ("paired", "mixture")
    }
    print(", ".join(f"{mode} {ratio:.2f}x" for mode, ratio in ratios.items()))
    worst = max(ratios.values())
    print(f"mixing: {worst:.2f}x (goal <= {GOAL})")
    return int(worst > GOAL)


if __name__ == "__main__":
    sys.exit(main())
