"""CPU time of an alignment step: the teacher's features out of a store, against the teacher run in the step.

    python benchmarks/cached_teacher.py

Sixteen pairs, a tower of ViT-B/32's width and six layers at 224 pixels, LoRA of rank 4 on q and v. The step is forward,
backward and optimizer; reading is left out of both sides. Interleaved in one process, one thread, median of the ratios.
"""

import os

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

import logging
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch

from gmail_lightning.callbacks import FeatureWriter
from gmail_lightning.datamodules import MixedModalityDataModule
from gmail_lightning.datasets import EmojiDataset, FeatureStore, ImageTextDataset
from gmail_lightning.models import OpenCLIPEncoder
from gmail_lightning.tasks import AlignmentTask, EmbeddingTask
from gmail_lightning.types import ImageTextBatch

ROUNDS, PAIRS, GOAL = 11, 16, 0.72
CONFIG = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": 224, "patch_size": 32, "layers": 6, "width": 768},
    "text_cfg": {"context_length": 16, "vocab_size": 6348, "width": 64, "heads": 1, "layers": 1},
}
for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
    logging.getLogger(name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore")


def encoder() -> OpenCLIPEncoder:
    torch.manual_seed(0)
    return OpenCLIPEncoder(config=CONFIG, merges="emoji")


def write_features(folder: Path, real: ImageTextDataset) -> None:
    """What ``gmail-lightning predict`` does with ``EmbeddingTask``."""
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[FeatureWriter(str(folder))]
    )
    trainer.predict(EmbeddingTask(encoder()), MixedModalityDataModule(predict=real, batch_size=PAIRS))


def first_batch(task: AlignmentTask, real: ImageTextDataset) -> ImageTextBatch:
    hands = [real, EmojiDataset("fluent_flat", "novel")]
    data = MixedModalityDataModule(hands, batch_size=2 * PAIRS, input_spec=task.input_spec)
    data.setup("fit")
    return next(iter(data.train_dataloader()))


def seconds(task: AlignmentTask, optimizer: torch.optim.Optimizer, batch: ImageTextBatch) -> float:
    """CPU time of one step."""
    start = time.process_time()
    optimizer.zero_grad()
    task.compute_losses(batch)["loss"].backward()
    optimizer.step()
    return time.process_time() - start


def main() -> int:
    task, real = AlignmentTask(encoder()), EmojiDataset("noto", "novel")
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=1e-4)
    with tempfile.TemporaryDirectory() as folder:
        write_features(Path(folder) / "store", real)
        batches = {"live": first_batch(task, real), "cached": first_batch(task, FeatureStore(f"{folder}/store", real))}
    if batches["live"]["sample_key"] != batches["cached"]["sample_key"]:
        raise RuntimeError("The two batches show different pairs.")
    times: dict[str, list[float]] = {name: [] for name in batches}
    for repetition in range(ROUNDS + 2):
        for name, batch in batches.items():
            value = seconds(task, optimizer, batch)
            if repetition > 1:  # the first two warm up
                times[name].append(value)
    for name, values in times.items():
        print(f"{name} teacher: {statistics.median(values) * 1000:.0f} ms CPU a step")
    ratio = statistics.median(a / b for a, b in zip(times["cached"], times["live"], strict=True))
    print(f"cached_teacher: {ratio:.2f} (goal <= {GOAL})")
    return int(ratio > GOAL)


if __name__ == "__main__":
    sys.exit(main())
