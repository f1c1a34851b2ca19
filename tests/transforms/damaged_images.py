"""Encoded samples, and ways to damage them; as a program, decodes so many mutations of each sample.

python tests/transforms/damaged_images.py 10000 [SAMPLE ...]

Prints a line of JSON per sample: how many gave pixels, how many an ``ImageDecodeError``, what else came out, and the
largest resident memory of the process so far, in MiB. A mutation depends on the sample and its number alone.
"""

from __future__ import annotations

import faulthandler
import io
import json
import os
import random
import struct
import sys
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

MAX_PIXELS = 1_000_000


def drawing(mode: str = "RGB", size: tuple[int, int] = (61, 47)) -> Image.Image:
    """Gradients with some noise; alpha runs from 0 to 255."""
    y, x = np.mgrid[0 : size[1], 0 : size[0]]
    planes = np.stack([x * 4, y * 5, 255 - x * 4, x * 2 + y * 2], -1) + np.random.default_rng(0).integers(
        0, 9, (*x.shape, 4)
    )
    image = Image.fromarray(planes.clip(0, 255).astype(np.uint8), "RGBA")
    return image if mode == "RGBA" else image.convert(mode)


def deep() -> Image.Image:
    return Image.fromarray(np.linspace(0, 65535, 61 * 47).reshape(47, 61).astype(np.uint16))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG, with its checksum."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def chunks(png: bytes) -> list[tuple[bytes, bytes]]:
    found, at = [], 8
    while at < len(png):
        size = struct.unpack(">I", png[at : at + 4])[0]
        found.append((png[at + 4 : at + 8], png[at + 8 : at + 8 + size]))
        at += size + 12
    return found


def png(width: int, height: int, depth: int, color: int, rows: bytes, extra: bytes = b"", interlaced: int = 0) -> bytes:
    """A PNG of any layout; ``rows`` have their filter bytes, ``extra`` are chunks before the pixels."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlaced)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def interlaced_png() -> bytes:
    values = np.asarray(drawing())
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    parts = [values[top::down, left::right] for top, left, down, right in passes]
    rows = b"".join(b"\0" + row.tobytes() for part in parts if part.size for row in part)
    return png(61, 47, 8, 2, rows, interlaced=1)


def samples() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a drawing"
    frames = {"save_all": True, "append_images": [Image.new("RGB", (61, 47), "red")]}
    all_samples = {
        "jpeg": encoded(drawing(), "JPEG", exif=exif),
        "jpeg-progressive": encoded(drawing(), "JPEG", progressive=True, icc_profile=bytes(200)),
        "jpeg-cmyk": encoded(drawing("CMYK"), "JPEG"),
        "png": encoded(drawing("RGBA"), "PNG", exif=exif),
        "png-16": encoded(deep(), "PNG"),
        "png-palette": encoded(drawing("P"), "PNG", transparency=b"\x00\x80" * 100),
        "png-interlaced": interlaced_png(),
        "png-animated": encoded(drawing(), "PNG", **frames),
        "gif-animated": encoded(drawing("P"), "GIF", transparency=5, **frames),
        "bmp": encoded(drawing("P"), "BMP"),
        "tiff-lzw": encoded(drawing(), "TIFF", compression="tiff_lzw"),
        "tiff-deflate": encoded(drawing("RGBA"), "TIFF", compression="tiff_adobe_deflate"),
        "tiff-16": encoded(deep(), "TIFF", exif=exif),
        "tiff-jpeg": encoded(drawing(), "TIFF", compression="jpeg"),
        "webp": encoded(drawing(), "WEBP", exif=exif),
        "webp-lossless": encoded(drawing("RGBA"), "WEBP", lossless=True),
        "webp-animated": encoded(drawing(), "WEBP", **frames),
        "ppm": encoded(drawing(), "PPM"),
        "ico": encoded(drawing("RGBA"), "ICO", sizes=[(32, 32), (16, 16)]),
        "tga": encoded(drawing(), "TGA", compression="tga_rle"),
    }
    Image.init()
    for kind in ("AVIF", "JPEG2000"):
        if kind in Image.SAVE:  # not every build has them
            all_samples[kind.lower()] = encoded(drawing(), kind)
    return all_samples


def mutate(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """One or several damages of one kind."""
    if data.startswith(b"\x89PNG") and rng.random() < 0.5:
        return mutate_chunks(data, rng)
    changed = bytearray(data)
    kind = rng.choice(("bits", "header", "cut", "hole", "splice", "twice"))
    if kind == "bits":
        for _ in range(rng.choice((1, 1, 2, 8, 30))):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    elif kind == "header":
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(min(len(changed), 100))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    elif kind == "cut":
        del changed[rng.randrange(len(changed)) :]
    else:
        start, size = rng.randrange(len(changed)), rng.randint(1, 64)
        if kind == "hole":
            changed[start : start + size] = bytes(len(changed[start : start + size]))
        elif kind == "splice":
            other = rng.choice(others)
            begin = rng.randrange(len(other))
            changed[start : start + rng.choice((0, size))] = other[begin : begin + size]
        else:
            changed[start:start] = changed[start : start + size]
    return bytes(changed)


def mutate_chunks(data: bytes, rng: random.Random) -> bytes:
    """Changes, removes, repeats or moves a chunk of a PNG; checksums are correct, and so is the deflated stream."""
    found = chunks(data)
    at = rng.randrange(len(found))
    kind, content = found[at]
    way = rng.choice(("change", "change", "inflated", "remove", "repeat", "move", "rename"))
    if way == "inflated" and kind == b"IDAT":
        try:
            rows = bytearray(zlib.decompress(content))
            rows[rng.randrange(len(rows))] = rng.randrange(256)
            found[at] = kind, zlib.compress(rows[: rng.choice((len(rows), rng.randrange(len(rows))))])
        except zlib.error:
            pass
    elif way in ("change", "inflated") and content:
        changed = bytearray(content)
        changed[rng.randrange(len(changed))] = rng.choice((0, 1, 0x7F, 0xFF, rng.randrange(256)))
        found[at] = kind, bytes(changed[: rng.choice((len(changed), rng.randrange(len(changed))))])
    elif way == "remove":
        del found[at]
    elif way == "repeat":
        found.insert(at, found[at])
    elif way == "move":
        found.insert(rng.randrange(len(found)), found.pop(at))
    else:
        found[at] = (
            rng.choice((b"tRNS", b"PLTE", b"iCCP", b"zTXt", b"iTXt", b"eXIf", b"acTL", b"fcTL", b"IDAT")),
            content,
        )
    return data[:8] + b"".join(chunk(*one) for one in found)


def outcome(data: bytes) -> str:
    """``pixels``, ``refused``, or what went wrong."""
    from gmail_lightning.transforms import ImageDecodeError, decode_image

    try:
        image = decode_image(data)
    except ImageDecodeError:
        return "refused"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        return f"{image.dtype} of {tuple(image.shape)}"
    return "pixels" if 0 < image[0].numel() <= MAX_PIXELS else f"too large: {tuple(image.shape)}"


def largest_memory() -> int:
    """In MiB, of this process since it began; ``getrusage`` would count what its parent held."""
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:") + 1]) // 1024


def main(count: int, chosen: list[str]) -> None:
    faulthandler.enable()
    warnings.simplefilter("ignore")
    os.environ["GMAIL_LIGHTNING_MAX_PIXELS"] = str(MAX_PIXELS)
    known = samples()
    for name, data in known.items():
        if chosen and name not in chosen:
            continue
        print(name, file=sys.stderr, flush=True)
        found: Counter[str] = Counter()
        for number in range(count):
            rng = random.Random(f"{name} {number}")
            answer = outcome(mutate(data, list(known.values()), rng))
            found[answer if answer in ("pixels", "refused") else f"{answer} ({number})"] += 1
        memory = largest_memory()
        pixels, refused = found.pop("pixels", 0), found.pop("refused", 0)
        line = {"sample": name, "pixels": pixels, "refused": refused, "wrong": dict(found), "mib": memory}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
