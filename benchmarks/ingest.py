"""CPU time per image: stored at training size in tar shards, against full size decoded and resized.

    python benchmarks/ingest.py

The same pictures lie on disk as JPEG files of 640 x 480 (quality 90, some 110 kB, as photographs have) and, resized
once to 224 x 224, in tars as JPEG (quality 95) and as WebP (quality 90). Read are: full size by Pillow, decode and
resize to 224, as the usual pipeline does; full size by this library; the tars by ``TarShards``; and for the cost of the
index, the bytes of the same JPEGs from memory. All give (3, 224, 224) float in [0, 1]. One thread, interleaved, median.

The goal is for JPEG. WebP is shown without one: its files are smaller, and its decoder takes twice as long.
"""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

import io
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gmail_lightning.datasets import TarShards
from gmail_lightning.datasets.base import decode_image
from gmail_lightning.transforms import resize
from gmail_lightning.types import ImageSpec

IMAGES, ROUNDS, SIZE = 48, 9, 224
SPEC = ImageSpec((SIZE, SIZE))
GOAL, OVERHEAD_GOAL = 8.0, 1.25


def photo(seed: int) -> np.ndarray:
    """Gradients, and noise at every scale with an amplitude that falls with the frequency: (480, 640, 3) uint8."""
    rng = np.random.default_rng(seed)
    across = np.add.outer(np.linspace(0, 1, 480), np.linspace(0, 1, 640))[..., None] * rng.uniform(-60, 60, 3) + 128
    for cells in (4, 16, 64, 160, 320):
        coarse = rng.normal(size=(cells, cells, 3)).clip(-3, 3) * 40 + 128
        layer = Image.fromarray(coarse.clip(0, 255).astype(np.uint8)).resize((640, 480), Image.Resampling.BICUBIC)
        across += (np.asarray(layer, dtype=np.float64) - 128) * (8 / cells) ** 0.5
    return (across + rng.normal(size=across.shape) * 7).clip(0, 255).astype(np.uint8)


def encoded(image: Image.Image, kind: str, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=quality)
    return buffer.getvalue()


def prepare(folder: Path) -> tuple[list[Path], dict[str, list[bytes]]]:
    """Writes the files, and a folder of tars for each format; returns the files, and what is in the tars."""
    files: list[Path] = []
    small: dict[str, list[bytes]] = {"jpg": [], "webp": []}
    for number in range(IMAGES):
        image = Image.fromarray(photo(number))
        files.append(folder / f"{number:04d}.jpg")
        files[-1].write_bytes(encoded(image, "JPEG", 90))
        square = image.crop((80, 0, 560, 480)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        small["jpg"].append(encoded(square, "JPEG", 95))
        small["webp"].append(encoded(square, "WEBP", 90))
    for kind, images in small.items():
        (folder / kind).mkdir()
        for shard in range(2):
            with tarfile.open(folder / kind / f"{shard:05d}.tar", "w") as tar:
                for number in range(shard, IMAGES, 2):
                    for suffix, data in ((kind, images[number]), ("txt", b"a picture"), ("json", b"{}")):
                        member = tarfile.TarInfo(f"{number:08d}.{suffix}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
    return files, small


def by_pillow(path: Path) -> Tensor:
    with Image.open(path) as image:
        left = (image.width - image.height) // 2
        box = (left, 0, left + image.height, image.height)
        pixels = np.array(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC, box))
    return torch.from_numpy(pixels).permute(2, 0, 1).float().div_(255)


def main() -> int:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        files, small = prepare(Path(name))
        jpg, webp = (TarShards(Path(name) / kind, modality="real") for kind in ("jpg", "webp"))
        stored = [small["jpg"][int(jpg.sample_key(i))] for i in range(IMAGES)]
        order = np.random.default_rng(0).permutation(IMAGES).tolist()
        ways: dict[str, Callable[[int], Tensor]] = {
            "full size, Pillow": lambda i: by_pillow(files[i]),
            "full size, ours": lambda i: resize(decode_image(files[i].read_bytes()), SPEC),
            "pre-sized, TarShards": lambda i: resize(jpg.image(i), SPEC),
            "pre-sized, bytes in memory": lambda i: resize(decode_image(stored[i]), SPEC),
            "pre-sized WebP, TarShards": lambda i: resize(webp.image(i), SPEC),
        }
        if not torch.equal(ways["pre-sized, TarShards"](1), ways["pre-sized, bytes in memory"](1)):
            raise ValueError("TarShards reads other pixels than were stored.")
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(ROUNDS):
            for label, way in ways.items():  # interleaved, so that a busy machine slows all of them
                start = time.process_time()
                for i in order:
                    way(i)
                times[label].append((time.process_time() - start) / IMAGES)
        sizes = {"full size": statistics.mean(file.stat().st_size for file in files)}
        sizes |= {f"pre-sized {kind}": statistics.mean(map(len, images)) for kind, images in small.items()}
    print("kB an image: " + ", ".join(f"{label} {size / 1e3:.0f}" for label, size in sizes.items()))
    for label, values in times.items():
        print(f"{label}: {1 / statistics.median(values):.0f} images/s a core")

    def ratio(slow: str, fast: str) -> float:
        return statistics.median(a / b for a, b in zip(times[slow][1:], times[fast][1:], strict=True))

    print(f"JPEG against full size by ours: {ratio('full size, ours', 'pre-sized, TarShards'):.1f}x")
    print(f"WebP against full size by Pillow: {ratio('full size, Pillow', 'pre-sized WebP, TarShards'):.1f}x")
    faster = ratio("full size, Pillow", "pre-sized, TarShards")
    overhead = ratio("pre-sized, TarShards", "pre-sized, bytes in memory")
    print(f"ingest: {faster:.1f}x (goal >= {GOAL})")
    print(f"ingest_index: {overhead:.2f}x the time of decoding from memory (goal <= {OVERHEAD_GOAL})")
    return int(faster < GOAL or overhead > OVERHEAD_GOAL)


if __name__ == "__main__":
    sys.exit(main())
