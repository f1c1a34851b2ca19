"""Decoding against Pillow."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from gmail_lightning.datasets.base import ImageDecodeError, decode_image, one_line
from gmail_lightning.datasets.ids import stable_ids


def picture(mode: str) -> Image.Image:
    """A smooth 40 x 30 picture, so that lossy formats stay close; alpha runs from 0 to 255."""
    y, x = np.mgrid[0:30, 0:40]
    channels = [x * 6, y * 8, 255 - x * 6, np.clip(x * 9 - 40, 0, 255)]
    image = Image.fromarray(np.stack(channels, -1).astype(np.uint8), "RGBA")
    return image if mode == "RGBA" else image.convert(mode)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def by_pillow(data: bytes) -> Tensor:
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return torch.from_numpy(np.array(Image.alpha_composite(white, image).convert("RGB"))).permute(2, 0, 1)


@pytest.mark.parametrize(
    ("mode", "kind", "options"),
    [
        ("RGB", "JPEG", {}),
        ("L", "JPEG", {}),
        ("RGB", "PNG", {}),
        ("RGBA", "PNG", {}),
        ("L", "PNG", {}),
        ("LA", "PNG", {}),
        ("P", "PNG", {}),
        ("P", "PNG", {"transparency": 3}),
        ("RGB", "WEBP", {"lossless": True}),
        ("RGBA", "WEBP", {"lossless": True}),
        ("P", "GIF", {}),
        ("P", "GIF", {"transparency": 5}),
        ("RGB", "BMP", {}),
        ("RGB", "TIFF", {}),
        ("RGB", "AVIF", {}),
    ],
)
def test_decoding_equals_pillow(mode: str, kind: str, options: dict[str, object]) -> None:
    data = encoded(picture(mode), kind, **options)
    image = decode_image(data)
    assert image.dtype == torch.uint8
    assert image.shape == (3, 30, 40)
    assert (image.int() - by_pillow(data).int()).abs().max() <= 1  # rounding of the transparency


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [3, 6, 8, 5])
def test_exif_orientation_is_honoured(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture("RGB"), kind, exif=exif)
    assert decode_image(data).shape[1:] == ((30, 40) if orientation == 3 else (40, 30))
    assert (decode_image(data).int() - by_pillow(data).int()).abs().max() <= 1


def test_cmyk_is_ink_and_not_transparency() -> None:
    data = encoded(picture("CMYK"), "JPEG", quality=95)
    expected = torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1)
    assert (decode_image(data).int() - expected.int()).abs().float().mean() < 3


def test_sixteen_bit_png_keeps_its_brightness() -> None:
    values = np.linspace(0, 65535, 30 * 40).reshape(30, 40).astype(np.uint16)
    image = decode_image(encoded(Image.fromarray(values), "PNG"))
    assert np.abs(image[0].numpy().astype(int) - values / 257).max() <= 1
    assert torch.equal(image[0], image[2])


def test_of_an_animation_the_first_frame() -> None:
    frames = [picture("RGB"), Image.new("RGB", (40, 30), "red")]
    for kind, options in (("GIF", {}), ("WEBP", {"lossless": True})):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert (decode_image(data).int() - by_pillow(data).int()).abs().max() <= 1


@pytest.mark.parametrize(
    "data", [b"", b"not an image", encoded(picture("RGB"), "PNG")[:60], encoded(picture("RGB"), "JPEG")[:100]]
)
def test_broken_bytes_are_an_error(data: bytes) -> None:
    with pytest.raises(ImageDecodeError, match="does not decode"):
        decode_image(data)


def test_truncated_file_is_an_error(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8))
    for kind in ("JPEG", "PNG", "WEBP"):
        data = encoded(noise, kind)
        with pytest.raises(ImageDecodeError, match="does not decode"):
            decode_image(data[: len(data) // 2])


def test_stable_ids_are_pinned() -> None:
    import hashlib

    names = ["a", "b/ü.png", ""]
    expected = [int.from_bytes(hashlib.blake2b(n.encode(), digest_size=8).digest(), "little") // 2 for n in names]
    assert stable_ids(names).tolist() == expected
    assert min(expected) >= 0


def test_one_line() -> None:
    assert one_line(" a\r\nb\u2028c\t d ") == "a b c d"
