"""Decoding of images: pixels or an ``ImageDecodeError``, whatever the bytes are."""

from __future__ import annotations

import io
import math
import os
import zlib
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode
from torchvision.io import decode_image as decode_with_torchvision

from gmail_lightning.types import DataError

MAX_PIXELS = "GMAIL_LIGHTNING_MAX_PIXELS"  # environment variable, which workers and ranks inherit
PIXELS_AT_ONCE = 1 << 20  # laid over white together
ORIENTATION, BITS, PHOTOMETRIC, TILE_SIZE = 274, 258, 262, (322, 323)  # tags of TIFF and EXIF
FLIPS = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}  # axes by orientation, once 5 to 8 are transposed
ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type


class ImageDecodeError(DataError):
    """An image cannot be read or decoded. Training replaces the row and counts it; evaluation stops."""


def max_pixels() -> int | None:
    """Returns how many pixels an image may have; None for no limit.

    It is the environment variable ``GMAIL_LIGHTNING_MAX_PIXELS`` where that is set, else Pillow's
    ``Image.MAX_IMAGE_PIXELS``, by default 89,478,485.

    Raises:
        ValueError: If the variable is no positive integer.
    """
    value = os.environ.get(MAX_PIXELS)
    if value is None:
        limit: int | None = Image.MAX_IMAGE_PIXELS
        return limit
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"{MAX_PIXELS}={value!r}: give the largest number of pixels of an image, from 1.")
    Image.MAX_IMAGE_PIXELS = int(value)  # for the images within images that Pillow opens itself, as in icons
    return int(value)


def decode_image(data: bytes) -> Tensor:
    """Decodes one image; the EXIF orientation is applied and transparency is laid over white.

    JPEG goes through torchvision, which is the fastest, all else that Pillow reads through Pillow. What its header
    says is looked at first: an image of more than ``max_pixels()`` is refused before there is memory for its pixels.
    Of 16-bit channels the upper 8 bits are taken, and floats are expected from 0 to 1. Metadata that is damaged costs
    no pixels, as long as Pillow reads past it.

    Args:
        data: An encoded image.

    Returns:
        RGB, uint8, shape (3, H, W); of an animation the first frame.

    Raises:
        ImageDecodeError: If it is damaged, cut off, too large, of a format that is not read, or of values of which
            nobody knows which is white; whatever the decoder itself raises.
    """
    limit = max_pixels()
    try:
        with Image.open(io.BytesIO(data)) as opened:
            _check_header(opened, limit)
            if opened.format in ("JPEG", "MPO") and opened.mode in ("L", "RGB"):  # a fourth channel is ink
                encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                image = decode_with_torchvision(encoded, ImageReadMode.RGB)
            else:
                image = _rgb(opened, data)
            return _upright(image, _orientation(opened))
    except ImageDecodeError:
        raise
    except UnidentifiedImageError as error:  # its own message shows an address in memory
        raise ImageDecodeError(f"the image does not decode ({len(data)} bytes of no known format)") from error
    except Exception as error:  # damaged files raise anything: struct.error, IndexError, MemoryError, ...
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageDecodeError(f"the image does not decode ({reason})") from error


def _check_header(image: Image.Image, limit: int | None) -> None:
    """Refuses what must not be decoded, by what is known before."""
    if image.format == "EPS":
        raise ImageDecodeError("the image does not decode (PostScript is a program; save it as PNG)")
    width, height = image.size
    pixels = width * height
    if image.format == "TIFF":  # its tiles may be larger than the image, and are decoded whole
        pixels = max(pixels, math.prod(int(image.tag_v2.get(tag, 1)) for tag in TILE_SIZE))
    if limit is not None and pixels > limit:
        raise ImageDecodeError(
            f"the image does not decode ({width:,} x {height:,} pixels are more than {limit:,}; the environment "
            f"variable {MAX_PIXELS} sets the limit)"
        )


def _rgb(image: Image.Image, data: bytes) -> Tensor:
    """Decodes with Pillow; returns uint8, shape (3, H, W), as it is stored."""
    image.load()
    if image.format == "PNG":
        _check_png(image, data)
    elif image.format == "JPEG2000" and b"\xff\xd9" not in data:  # its end mark; half of the data give a blurred image
        raise ImageDecodeError("the image does not decode (its pixels end early)")
    if image.mode == "F" or image.mode[0] == "I":
        image = _eight_bits(image)
    if image.has_transparency_data:
        return _over_white(torch.from_numpy(np.array(image.convert("RGBA"))))
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scales grey of more than 8 bits by what is white in it; by another number, it comes out white or black."""
    values = np.asarray(image)
    bits = _bits(image)
    if image.mode == "F":
        if not (values.min() >= 0 and values.max() <= 1):
            raise ImageDecodeError(
                f"the image does not decode (floats from {values.min():g} to {values.max():g}, where 0 is black and 1 "
                "is white; save it with 8 bits)"
            )
        grey = (values * 255).round().astype(np.uint8)
    elif bits is None:
        raise ImageDecodeError(
            f"the image does not decode (nobody knows which value is white in {image.format} of mode {image.mode}; "
            "save it with 8 bits, or unsigned 16)"
        )
    else:
        grey = (values >> (bits - 8)).clip(0, 255).astype(np.uint8)
    if image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC) == 0:  # white is zero
        grey = 255 - grey
    if isinstance(clear := image.info.get("transparency"), int):
        grey = np.where(values == clear, 255, grey).astype(np.uint8)
    return Image.fromarray(grey)


def _bits(image: Image.Image) -> int | None:
    """Bits of unsigned integers whose largest value is white."""
    if image.format == "TIFF" and image.mode.startswith("I;16"):
        return int(image.tag_v2[BITS][0])
    known = image.mode.startswith("I;16") and image.format in ("PNG", "JPEG2000")
    return 16 if known or (image.format == "PPM" and image.mode == "I") else None  # Pillow scales PPM's to 16 bits


def _check_png(image: Image.Image, data: bytes) -> None:
    """Mends Pillow's transparent colour where pixels are not of 8 bits, and refuses pixels that end early."""
    depth, color, interlaced = data[24], data[25], data[28]
    clear = image.info.get("transparency")
    if isinstance(clear, int) and depth in (2, 4):
        image.info["transparency"] = clear * (255 // (2**depth - 1))
    elif isinstance(clear, tuple) and depth == 16:
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    # Rows that are not there stay black without an error.
    if interlaced or not np.asarray(image.crop((0, image.height - 1, *image.size))).any():
        size, bits = image.size, depth * PNG_CHANNELS[color]
        expected = 0
        for top, left, down, right in ADAM7 if interlaced else ((0, 0, 1, 1),):
            width, height = -(-(size[0] - left) // right), -(-(size[1] - top) // down)
            expected += height * (1 + -(-width * bits // 8)) if width > 0 else 0
        if _inflated(data) < expected:
            raise ImageDecodeError("the image does not decode (its pixels end early)")


def _inflated(data: bytes) -> int:
    """Number of the bytes that a PNG's pixels were deflated from."""
    inflate, length = zlib.decompressobj(), 0
    for part in _png_pixels(data):
        while part and not inflate.eof:
            length += len(inflate.decompress(part, PIXELS_AT_ONCE))
            part = inflate.unconsumed_tail
    return length + len(inflate.flush())


def _png_pixels(data: bytes) -> Iterator[bytes]:
    at = 8
    while at + 8 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] == b"IDAT":
            yield data[at + 8 : at + 8 + size]
        at += size + 12


def _over_white(pixels: Tensor) -> Tensor:
    """Maps (H, W, 4) uint8, RGB with alpha, to (3, H, W)."""
    height, width = pixels.shape[:2]
    image = torch.empty(3, height, width, dtype=torch.uint8)
    rows = max(PIXELS_AT_ONCE // width, 1)
    for start in range(0, height, rows):
        part = pixels[start : start + rows].permute(2, 0, 1)
        alpha = part[3:].float() / 255
        image[:, start : start + rows] = (part[:3].float() * alpha + 255 * (1 - alpha)).round_().to(torch.uint8)
    return image


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # of damaged metadata, while the pixels are sound
        return 1


def _upright(image: Tensor, orientation: int) -> Tensor:
    """Turns (3, H, W) as EXIF says."""
    if 5 <= orientation <= 8:
        image = image.transpose(1, 2)
    return image.flip(FLIPS[orientation]) if orientation in FLIPS else image
