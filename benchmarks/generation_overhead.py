"""What storing generated images costs the process that makes them, and whether its memory stays flat.

    python benchmarks/generation_overhead.py

A stub stands for a fast pipeline: 50 ms an image, in batches of 8 images of 512 x 512 floats, stored at 256 pixels. The
first goal is on what the driver adds, the larger of two: the main thread's time between two pipeline calls, and the
wall time of the loop of ``predict`` against a bare loop of the same calls, which the threads may slow down. The
second part makes 10,000 images of 128 x 128 without any pause: resident memory in the last quarter may grow
by no more than 8 MB (Linux). There is no scorer: CLIPScores are model time of the stage, as the pipeline calls are, and
are no part of the overhead.
"""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from gmail_lightning.callbacks import DatasetWriter
from gmail_lightning.datamodules import PromptDataModule
from gmail_lightning.datasets import ImageTextDataset
from gmail_lightning.models.generative import GeneratedImages, ImageGenerator
from gmail_lightning.tasks import ImageGenerationTask

IMAGES, MANY, BATCH, SECONDS = 512, 10_000, 8, 0.05
OVERHEAD_GOAL, MEMORY_GOAL = 2.0, 8.0  # per cent; MB
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.ERROR)
warnings.filterwarnings("ignore")


class Captions(ImageTextDataset):
    """Captions without images."""

    def __init__(self, length: int) -> None:
        self.modality = np.zeros(length, dtype=np.int64)
        self.image_id = self.pair_id = np.arange(length)

    def read_image(self, index: int) -> Tensor:
        raise NotImplementedError

    def captions(self, index: int) -> list[str]:
        return [f"a photo of thing number {index} on a table beside the window"]

    def sample_key(self, index: int) -> str:
        return str(index)


class StubPipeline(ImageGenerator):
    """Waits as long as a pipeline takes, and returns a shifted picture of smooth noise."""

    pretrained = True

    def __init__(self, size: int, seconds: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        parts = [torch.randn(1, 3, k, k, generator=generator) / k for k in (4, 8, 16, 32, 64)]
        image = sum(torch.nn.functional.interpolate(part, (size, size), mode="bicubic") * 2 for part in parts)
        self.batch = torch.cat([(image + 0.5 + torch.randn(1, 3, 1, 1) * 0.1).clamp(0, 1) for _ in range(BATCH)])
        self.size, self.seconds = size, seconds
        self.inside, self.memory = 0.0, list[float]()

    def generate(self, captions: list[str], seeds: list[int]) -> GeneratedImages:
        start = time.perf_counter()
        self.memory.append(resident_megabytes())
        image = self.batch[: len(captions)].roll(seeds[0] % self.size, dims=3)
        time.sleep(max(self.seconds * len(captions) - (time.perf_counter() - start), 0))
        self.inside += time.perf_counter() - start
        return GeneratedImages(image, [False] * len(captions))

    def describe(self) -> dict[str, str | int | float | None]:
        return {
            "generator": "stub", "revision": None, "scheduler": "none", "steps": 1, "guidance": 1.0,
            "size": f"{self.size}x{self.size}",
        }  # fmt: skip


class Clock(pl.Callback):
    """When the first batch began and when the last was handed over."""

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.start, self.cpu = time.perf_counter(), time.thread_time()

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.loop, self.cpu = time.perf_counter() - self.start, time.thread_time() - self.cpu


def resident_megabytes() -> float:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def generate(pipeline: StubPipeline, images: int, size: int, folder: str) -> tuple[float, float]:
    """Seconds of the loop over the batches, and of all until the manifest is written."""
    clock = Clock()
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False,
        enable_progress_bar=False, callbacks=[clock, DatasetWriter(folder, size=size)], default_root_dir=folder,
    )  # fmt: skip
    trainer.predict(ImageGenerationTask(pipeline), PromptDataModule(Captions(images), evaluation={}, batch_size=BATCH))
    print(f"CPU time of the main thread, pipeline included: {clock.cpu / images * 1e3:.2f} ms an image")
    return clock.loop, time.perf_counter() - clock.start


def overhead(folder: str) -> float:
    """Per cent of the time of the pipeline calls that the driver adds."""
    bare = StubPipeline(512, SECONDS)
    start = time.perf_counter()
    for _ in range(IMAGES // BATCH):
        bare.generate([""] * BATCH, list(range(BATCH)))
    alone = time.perf_counter() - start
    pipeline = StubPipeline(512, SECONDS)
    loop, whole = generate(pipeline, IMAGES, 256, folder)
    between = (loop - pipeline.inside) / IMAGES
    print(f"bare loop: {alone / IMAGES * 1e3:.2f} ms an image")
    print(f"outside the pipeline call: {between * 1e3:.2f} ms an image, {100 * between / SECONDS:.2f} %")
    print(f"pipeline call, slowed by the threads beside it: {pipeline.inside / IMAGES * 1e3:.2f} ms an image")
    print(f"after the last batch, until the manifest and the card are written: {whole - loop:.2f} s, once")
    wall = 100 * (loop - alone) / alone
    print(f"loop against the bare loop: {wall:+.2f} %")
    return max(100 * between / SECONDS, wall)


def memory(folder: str) -> float:
    """Growth of resident memory in MB, from the mean of the third quarter to that of the fourth."""
    pipeline = StubPipeline(128, 0.0)
    loop, _ = generate(pipeline, MANY, 64, folder)
    quarters = np.array_split(np.array(pipeline.memory), 4)
    print(f"{MANY} images without a pause: {MANY / loop:.0f} images/s")
    print("resident memory by quarters: " + ", ".join(f"{quarter.mean():.1f}" for quarter in quarters) + " MB")
    return float(quarters[3].mean() - quarters[2].mean())


def main() -> int:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        growth = memory(first)
        percent = overhead(second)
    print("without a scorer: scoring counts as model time, and is excluded")
    print(f"generation_memory: {growth:.1f} MB in the last quarter (goal <= {MEMORY_GOAL:.0f})")
    print(f"generation_overhead: {percent:.2f} % (goal <= {OVERHEAD_GOAL})")
    return int(growth > MEMORY_GOAL or percent > OVERHEAD_GOAL)


if __name__ == "__main__":
    sys.exit(main())
