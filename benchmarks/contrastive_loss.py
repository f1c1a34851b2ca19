"""Tiled `clip_loss` against open_clip's ClipLoss, forward and backward, on one thread.

Time: CPU seconds of the process, peer and ours in turn, first repetition dropped, medians. The peer gets features that
are normalised already; ours normalises them once more.
Memory: peak resident size of a fresh process during one step, above its size before (inputs in place, kernels loaded by
a small step) and less the gradients. Linux only, since the peak is reset through /proc.

    python benchmarks/contrastive_loss.py
"""

import os

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from torch import Tensor

from gmail_lightning.losses import clip_loss

DIM = 512
SCALE = 1 / 0.07
LOSSES: dict[str, Callable[..., Tensor]] = {"open_clip": ClipLoss(), "tiled": clip_loss}


def features(rows: int, frozen: bool) -> list[Tensor]:
    image, text = F.normalize(torch.randn(2, rows, DIM, generator=torch.Generator().manual_seed(0)), dim=-1)
    return [image.requires_grad_(), text.requires_grad_(not frozen), torch.tensor(SCALE, requires_grad=True)]


def step(name: str, inputs: list[Tensor]) -> float:
    """CPU seconds of forward and backward."""
    for tensor in inputs:
        tensor.grad = None
    start = time.process_time()
    LOSSES[name](*inputs).backward()
    return time.process_time() - start


def compare_time(rows: int, frozen: bool, repetitions: int) -> tuple[float, float]:
    """Ratio of CPU times, and relative difference of the image gradients."""
    inputs = {name: features(rows, frozen) for name in LOSSES}
    seconds: dict[str, list[float]] = {name: [] for name in LOSSES}
    for _ in range(repetitions + 1):
        for name in LOSSES:
            seconds[name].append(step(name, inputs[name]))
    medians = {name: median(values[1:]) for name, values in seconds.items()}
    print(f"{rows} rows, {'frozen' if frozen else 'both'}: " + ", ".join(f"{n} {s:.3f} s" for n, s in medians.items()))
    peer, ours = (inputs[name][0].grad for name in LOSSES)
    unit = inputs["open_clip"][0].detach()
    peer -= unit * (unit * peer).sum(1, keepdim=True)  # the part that normalising inside leaves
    return medians["open_clip"] / medians["tiled"], ((peer - ours).norm() / peer.norm()).item()


def resident(field: str) -> float:
    """VmRSS or VmHWM of this process in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def measure_memory(name: str, rows: int) -> float:
    step(name, features(64, frozen=False))
    inputs = features(rows, frozen=False)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident("VmRSS")
    step(name, inputs)
    return resident("VmHWM") - before - sum(t.grad.nbytes for t in inputs) / 2**20


def main() -> int:
    torch.set_num_threads(1)
    both, both_error = compare_time(4096, frozen=False, repetitions=5)
    frozen, frozen_error = compare_time(4096, frozen=True, repetitions=5)
    memory = {}
    for name in LOSSES:
        command = [sys.executable, __file__, "--memory", name]
        memory[name] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"16384 rows: {name} {memory[name]:.0f} MiB")
    results = [
        ("gradient_difference", max(both_error, frozen_error), "<=", 1e-5),
        ("memory_ratio_16384", memory["open_clip"] / memory["tiled"], ">=", 50.0),
        ("time_ratio_frozen_4096", frozen, ">=", 1.9),
        ("time_ratio_4096", both, ">=", 1.6),
    ]
    for name, value, sign, goal in results:
        print(f"{name}: {value:.3g} (goal {sign} {goal:g})")
    return int(not all(value >= goal if sign == ">=" else value <= goal for _, value, sign, goal in results))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory"]:
        torch.set_num_threads(1)
        print(measure_memory(sys.argv[2], 16384))
    else:
        sys.exit(main())
