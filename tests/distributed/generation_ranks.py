"""Generates a small data set with a generator that costs nothing, on any number of processes; the tests import it, too.

python generation_ranks.py FOLDER KILL_AT

A first process is killed when its generator is asked for KILL_AT images; two ranks finish what it left. What was there
in between goes to FOLDER.json.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1")

import lightning.pytorch as pl
import numpy as np
import torch
from torch.nn import functional as F

from gmail_lightning.callbacks.dataset_writer import DatasetWriter
from gmail_lightning.datamodules.prompts import PromptDataModule
from gmail_lightning.datasets import ImageTextDataset
from gmail_lightning.models.generative import GeneratedImages, ImageGenerator
from gmail_lightning.tasks.image_generation import ImageGenerationTask

IMAGES = 44  # in shards of 8: five whole ones and half a one


class Captions(ImageTextDataset):
    """Captions without images."""

    def __init__(self, texts, first_id=100):
        self.texts = [[text] if isinstance(text, str) else text for text in texts]
        self.modality = np.zeros(len(texts), dtype=np.int64)
        self.image_id = np.arange(first_id, first_id + len(texts))
        self.pair_id = self.image_id + 1

    def read_image(self, index):
        raise AssertionError("generation reads no image")

    def captions(self, index):
        return self.texts[index]

    def sample_key(self, index):
        return f"row-{index}"

    def columns(self, index):
        return {"concept_set": "paired" if index % 2 else "novel"}


class StubGenerator(ImageGenerator):
    """Blots of colour, drawn from the seed; some words in a prompt have a special meaning."""

    pretrained = True

    def __init__(self, steps: int = 1, size: int = 32, kill_at: int = -1):
        super().__init__()
        self.steps, self.size, self.kill_at = steps, size, kill_at
        self.calls, self.images = [], 0

    def generate(self, captions, seeds):
        self.calls.append(list(zip(captions, seeds, strict=True)))
        self.images += len(captions)
        if 0 <= self.kill_at <= self.images:
            time.sleep(0.5)  # the threads write what they have: a part of a shard
            os.kill(os.getpid(), signal.SIGKILL)
        image = torch.stack([self.draw(caption, seed) for caption, seed in self.calls[-1]])
        return GeneratedImages(image, ["unsafe" in caption for caption in captions])

    def draw(self, caption, seed):
        size = self.size
        if "black" in caption:
            return torch.zeros(3, size, size)
        if "grey" in caption:
            return torch.full((3, size, size), 0.5)
        if "copy" in caption:
            seed = 0
        image = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(seed))
        image = F.interpolate(image[None], (size, size), mode="bilinear")[0]
        if "broken" in caption:
            image[:, 0, 0] = torch.tensor([1.0, 0.0, 1.0])  # the tests look for this pixel
        if "nan" in caption:
            image[1, 3, 4] = float("nan")
        return image

    def describe(self):
        return {
            "generator": "stub", "revision": None, "scheduler": "none", "steps": self.steps, "guidance": 1.0,
            "size": f"{self.size}x{self.size}",
        }  # fmt: skip

    def truncated(self, captions):
        return [len(caption) > 40 for caption in captions]


def captions(count=IMAGES):
    return Captions([f"picture number {i}{' and a long list of other things' * (i % 5 == 0)}" for i in range(count)])


def generate(out, data=None, generator=None, devices=1, scorer=None, batch_size=3, **settings):
    """Runs ``predict``; returns trainer and writer."""
    data = data or PromptDataModule(captions(), evaluation={}, batch_size=batch_size)
    writer = DatasetWriter(str(out), **{"shard_size": 8, "image_format": "png", **settings})
    trainer = pl.Trainer(
        accelerator="cpu", devices=devices, strategy="ddp_fork" if devices > 1 else "auto",
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[writer], default_root_dir=Path(out).parent,
    )  # fmt: skip
    trainer.predict(ImageGenerationTask(generator or StubGenerator(), scorer), data)
    return trainer, writer


if __name__ == "__main__":
    folder, kill_at = Path(sys.argv[1]), int(sys.argv[2])
    child = os.fork()  # importing costs more than all the rest
    if not child:
        generate(folder, generator=StubGenerator(kill_at=kill_at))
        os._exit(0)
    killed_by = os.WTERMSIG(os.waitpid(child, 0)[1])
    left = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    folder.with_suffix(".json").write_text(json.dumps({"killed_by": killed_by, "left": left}))
    generate(folder, devices=2)
