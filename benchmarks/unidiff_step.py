"""CPU time and memory of a joint step (ITC + IS) against the two steps apart, and what each reading of RSC adds.

    python benchmarks/unidiff_step.py

The embedded CLIP and pipeline, 32 rows, one thread. A step is that of a recipe: rows read and resized for each model,
forward, backward, clipping, optimizer and average of the weights. Apart are ``RetrievalTask`` on the CLIP and
``TextToImageTask`` on the pipeline with its text encoder, each reading its own rows, as without ``UniDiffTask``.
Interleaved in one process, median of the ratios.
Memory: peak resident size of a fresh process over three steps, above its size before it built the models (Linux only).
"""

import os

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

import ctypes
import gc
import logging
import subprocess
import sys
import time
import warnings
from pathlib import Path
from statistics import median

import torch

from gmail_lightning.datamodules import MixedModalityDataModule
from gmail_lightning.datasets import EmojiDataset
from gmail_lightning.models import DiffusersGenerator, OpenCLIPEncoder, ReciprocalConsistency
from gmail_lightning.models.averaging import WeightAverage
from gmail_lightning.tasks import RetrievalTask, TextToImageTask, UniDiffTask
from gmail_lightning.tasks.base import BaseTask

ROUNDS, ROWS, TIME_GOAL, MEMORY_GOAL = 7, 32, 0.85, 1.0
READINGS = ("reciprocal_kl", "feature", "image", "prediction_contrast")
APART = ("contrast", "synthesis")
for name in (
    "lightning.pytorch",
    "lightning.pytorch.utilities.rank_zero",
    "diffusers",
    "diffusers.pipelines.pipeline_utils",
    "diffusers.configuration_utils",
):
    logging.getLogger(name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore")


def build(name: str) -> BaseTask:
    if name == "contrast":
        task = RetrievalTask(OpenCLIPEncoder(pretrained="emoji_scorer"))
        task.average = WeightAverage([p for p in task.parameters() if p.requires_grad], 0.99)
        return task
    generator = DiffusersGenerator("emoji")
    if name == "synthesis":
        return TextToImageTask(generator, min_snr_gamma=None, ema_decay=0.99, train_text_encoder=True)
    consistency = ReciprocalConsistency(name) if name in READINGS else None
    return UniDiffTask(OpenCLIPEncoder(pretrained="emoji_scorer"), generator, consistency, ema_decay=0.99)


class Steps:
    """Training steps of a task on batches of its own."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        task = build(name)
        data = MixedModalityDataModule(
            EmojiDataset("noto"), mode="mixture", generated_fraction=0.0, batch_size=ROWS, input_spec=task.input_spec
        )
        data.setup("fit")
        self.task, self.batches = task, iter(data.train_dataloader())
        self.trained = [parameter for parameter in task.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5)

    def seconds(self) -> float:
        """CPU time of one step."""
        start = time.process_time()
        batch = next(self.batches)
        self.optimizer.zero_grad()
        self.task.compute_losses(batch)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        if self.task.average is not None:
            self.task.average.update()
        return time.process_time() - start


def resident(field: str) -> float:
    """VmRSS or VmHWM of this process in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def memory(name: str) -> float:
    """Peak of three steps in this process, in MiB above what the libraries take."""
    Steps("contrast").seconds()  # loads what all of them import
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # gives what it took back, which the next steps would take unseen
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    steps = Steps(name)
    for _ in range(3):
        steps.seconds()
    return resident("VmHWM") - before


def main() -> int:
    torch.set_num_threads(1)
    all_steps = {name: Steps(name) for name in (*APART, "joint", *READINGS)}
    times: dict[str, list[float]] = {name: [] for name in all_steps}
    for repetition in range(ROUNDS + 1):
        for name, steps in all_steps.items():
            value = steps.seconds()
            if repetition:  # the first warms up
                times[name].append(value)
    peaks = {}
    for name in (*APART, "joint"):
        command = [sys.executable, __file__, "--memory", name]
        peaks[name] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    for name, values in times.items():
        print(f"{name}: {median(values):.3f} s CPU a step" + (f", {peaks[name]:.0f} MiB" if name in peaks else ""))
    joint = times["joint"]
    for reading in READINGS:
        share = median((whole - without) / whole for whole, without in zip(times[reading], joint, strict=True))
        print(f"share of RSC, {reading}: {share:.2f} of a step")
    time_ratio = median(a / (b + c) for a, b, c in zip(joint, *(times[name] for name in APART), strict=True))
    memory_ratio = peaks["joint"] / sum(peaks[name] for name in APART)
    print(f"time_of_joint_step: {time_ratio:.2f} of the two apart (goal <= {TIME_GOAL})")
    print(f"memory_of_joint_step: {memory_ratio:.2f} of the two apart (goal < {MEMORY_GOAL:g})")
    return int(time_ratio > TIME_GOAL or memory_ratio >= MEMORY_GOAL)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory"]:
        print(memory(sys.argv[2]))
        sys.exit()
    sys.exit(main())
