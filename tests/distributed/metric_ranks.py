"""Metrics of generation, spread and recurring captions on two gloo ranks; `tests/metrics/test_metric_ranks.py` judges.

python metric_ranks.py RANK FOLDER

Writes FOLDER/RANK.pt: for each split of the rows, what the two ranks find together.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from gmail_lightning.metrics import FeatureSpread, GenerationScore, ImageTextRecall

RANKS, IMAGES = 2, 11
SPLITS = (7, IMAGES)  # rows of the first rank; of the second split the other has none, and no update

draws = torch.Generator().manual_seed(3)
GENERATED, REAL, CAPTIONS = (torch.randn(IMAGES, 6, generator=draws) for _ in range(3))
TEXTS, OWNER, TEXT_IDS = torch.randn(22, 6, generator=draws), torch.arange(22) % IMAGES, torch.arange(22) // 4


def values(start, stop):
    score, spread, recall = GenerationScore(), FeatureSpread(6), ImageTextRecall((1, 2))
    rows = torch.arange(start, stop)
    own = torch.isin(OWNER, rows)
    if len(rows):
        score.update(GENERATED[rows], REAL[rows], CAPTIONS[rows])
        spread.update(GENERATED[rows], REAL[rows])
        recall.update(GENERATED[rows], rows, TEXTS[own], OWNER[own], TEXT_IDS[own])
    return score.compute() | spread.compute() | recall.compute()


def main(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    results = [values(*((0, split), (split, IMAGES))[rank]) for split in SPLITS]
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
