"""R@K of images and texts in both directions against CLIP_benchmark's way, torchmetrics, and the bare matrix product.

    python benchmarks/retrieval.py

Time: CPU seconds of the process on one thread, all ways in turn in one process, first repetition dropped, medians;
1,000 images with 5 captions each, features of width 512 that are normalised already (ours normalises them once more).
CLIP_benchmark and ours give R@1/5/10 both ways. torchmetrics is timed for the texts as queries alone and for one k,
which is at most a sixth of that. The bare product is one matrix of all scores.
Memory: peak resident size of a fresh process above its size before, inputs in place. Linux only, since the peak is
reset through /proc. COCO's size is 5,000 x 25,000; the gallery of a million texts is that of 64 images and of width 64,
and is compared with a gallery of a quarter of that.
"""

import os

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

import ctypes
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.retrieval import RetrievalRecall

from gmail_lightning.metrics import image_text_recall

KS = (1, 5, 10)
BATCH = 64  # queries that CLIP_benchmark scores at once


def features(images: int, texts: int, dim: int = 512) -> tuple[Tensor, Tensor, Tensor]:
    """Unit features of images and texts that resemble one another, and the image of each text."""
    generator = torch.Generator().manual_seed(0)
    owner = torch.arange(texts) * images // texts
    image = F.normalize(torch.randn(images, dim, generator=generator), dim=1)
    text = torch.randn(texts, dim, generator=generator)
    for rows in torch.arange(texts).split(4096):
        text[rows[0] : rows[-1] + 1] = F.normalize(image[owner[rows]] + 0.35 * text[rows], dim=1)
    return image, text, owner


def clip_benchmark(image: Tensor, text: Tensor, owner: Tensor) -> dict[str, float]:
    """A whole score matrix and one of positives; per k and direction the top k as one-hot rows."""
    scores = text @ image.T
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(text)), owner] = True
    values = {}
    for k in KS:
        for name, table, pairs in (("t2i", scores, positive), ("i2t", scores.T, positive.T)):
            recalls = []
            for rows, own in zip(table.split(BATCH), pairs.split(BATCH), strict=True):
                one_hot = F.one_hot(rows.topk(k, dim=1).indices, rows.shape[1])
                recalls.append((one_hot * own[:, None]).sum(dim=(1, 2)) / own.sum(dim=1))
            values[f"{name}_R@{k}"] = (torch.cat(recalls) > 0).float().mean().item()
    return values


def torchmetrics_recall(image: Tensor, text: Tensor, owner: Tensor, ks: tuple[int, ...] = KS) -> dict[str, float]:
    """Texts to images only: a text has one positive, so that its recall is a hit."""
    scores = text @ image.T + 2  # positive: it takes a positive with a score below 0 for a miss
    query = torch.arange(len(text))[:, None].expand_as(scores)
    target = owner[:, None] == torch.arange(len(image))
    values = {}
    for k in ks:
        metric = RetrievalRecall(top_k=k)
        metric.update(scores.flatten(), target.flatten(), indexes=query.flatten())
        values[f"t2i_R@{k}"] = metric.compute().item()
    return values


def cpu_seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def resident(field: str) -> float:
    """VmRSS or VmHWM of this process in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def measure_memory(images: int, texts: int, dim: int) -> float:
    image_text_recall(*features(16, 64, dim))  # kernels loaded
    inputs = features(images, texts, dim)
    ctypes.CDLL(None).malloc_trim(0)  # what making the inputs left free counts as ours if it is taken again
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident("VmRSS")
    image_text_recall(*inputs)
    return resident("VmHWM") - before


def memory(images: int, texts: int, dim: int) -> float:
    command = [sys.executable, __file__, "--memory", str(images), str(texts), str(dim)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def compare_time(repetitions: int = 7) -> tuple[dict[str, float], float]:
    """Median CPU seconds of every way, and the largest difference of a recall from ours."""
    image, text, owner = features(1000, 5000)
    ways: dict[str, Callable[[], dict[str, float]]] = {
        "product": lambda: {"sum": (image @ text.T)[0, 0].item()},
        "ours": lambda: {name: value.item() for name, value in image_text_recall(image, text, owner, KS).items()},
        "clip_benchmark": lambda: clip_benchmark(image, text, owner),
        "torchmetrics": lambda: torchmetrics_recall(image, text, owner, ks=(1,)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repetitions + 1):
        for name, way in ways.items():
            seconds[name].append(cpu_seconds(way))
    ours = ways["ours"]()
    print("1000 x 5000: " + ", ".join(f"{name} {value:.3f}" for name, value in ours.items()))
    difference = max(
        abs(ours[name] - value)
        for values in (ways["clip_benchmark"](), torchmetrics_recall(image, text, owner))
        for name, value in values.items()
    )
    medians = {name: median(values[1:]) for name, values in seconds.items()}
    print("1000 x 5000: " + ", ".join(f"{name} {value:.4f} s" for name, value in medians.items()))
    return medians, difference


def main() -> int:
    torch.set_num_threads(1)
    seconds, difference = compare_time()
    coco = memory(5000, 25000, 512)
    quarter, million = memory(64, 250_000, 64), memory(64, 1_000_000, 64)
    print(
        f"Extra memory: 5000 x 25000 {coco:.0f} MiB; 64 x 250,000 {quarter:.0f} MiB; 64 x 1,000,000 {million:.0f} MiB"
    )
    results = [
        ("recall_difference", difference, "<=", 1e-6),
        ("memory_5k_x_25k_MiB", coco, "<=", 200.0),
        ("memory_growth_250k_to_1M_MiB", million - quarter, "<=", 4.0),
        ("time_over_product", seconds["ours"] / seconds["product"], "<=", 1.8),
        ("torchmetrics_over_ours", seconds["torchmetrics"] / seconds["ours"], ">=", 10.0),
        ("clip_benchmark_over_ours", seconds["clip_benchmark"] / seconds["ours"], ">=", 6.0),
    ]
    for name, value, sign, goal in results:
        print(f"{name}: {value:.3g} (goal {sign} {goal:g})")
    return int(not all(value >= goal if sign == ">=" else value <= goal for _, value, sign, goal in results))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory"]:
        torch.set_num_threads(1)
        print(measure_memory(*map(int, sys.argv[2:])))
    else:
        sys.exit(main())
