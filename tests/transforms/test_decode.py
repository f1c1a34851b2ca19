"""Decoding against Pillow."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from damaged_images import chunk, encoded, interlaced_png, png, samples
from PIL import Image, ImageFile, ImageOps
from torch import Tensor

from gmail_lightning.transforms import ImageDecodeError, decode_image


def picture(mode: str) -> Image.Image:
    """A smooth 40 x 30 picture, so that lossy formats stay close; alpha runs from 0 to 255."""
    y, x = np.mgrid[0:30, 0:40]
    channels = [x * 6, y * 8, 255 - x * 6, np.clip(x * 9 - 40, 0, 255)]
    image = Image.fromarray(np.stack(channels, -1).astype(np.uint8), "RGBA")
    return image if mode == "RGBA" else image.convert(mode)


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


@pytest.mark.parametrize("name", list(samples()))
def test_truncated_files_are_an_error_or_whole(name: str) -> None:
    data = samples()[name]
    whole = decode_image(data)
    for end in range(0, len(data), max(len(data) // 60, 1)):
        try:
            image = decode_image(data[:end])
        except ImageDecodeError:
            continue
        assert torch.equal(image, whole), end  # what was cut off is not of the pixels


def tiff(values: np.ndarray, *, bits: int, kind: int = 1, white_is_zero: bool = False, order: str = "<") -> bytes:
    """One row of grey, by the specification: ``kind`` 1 is unsigned, 2 signed, 3 float."""
    if bits == 12:
        data = int("".join(f"{value:012b}" for value in values), 2).to_bytes(len(values) * 12 // 8, "big")
    else:
        data = values.astype(f"{order}{'uif'[kind - 1]}{bits // 8}").tobytes()
    tags = {256: len(values), 257: 1, 258: bits, 259: 1, 262: int(not white_is_zero), 273: 8}
    tags |= {277: 1, 278: 1, 279: len(data), 339: kind}
    entries = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", 8 + len(data))
    return head + data + struct.pack(order + "H", len(tags)) + entries + bytes(4)


RAMP = np.linspace(0, 65535, 64).round().astype(int)
DEEP = {
    "TIFF": tiff(RAMP, bits=16),
    "TIFF, big-endian": tiff(RAMP, bits=16, order=">"),
    "TIFF, white is zero": tiff(65535 - RAMP, bits=16, white_is_zero=True),
    "TIFF of 12 bits": tiff(RAMP >> 4, bits=12),
    "TIFF of floats": tiff(RAMP / 65535, bits=32, kind=3),
    "TIFF of floats, white is zero": tiff(1 - RAMP / 65535, bits=32, kind=3, white_is_zero=True),
    "TIFF, LZW": encoded(Image.fromarray(RAMP.astype(np.uint16)[None]), "TIFF", compression="tiff_lzw"),
    "PNG": png(64, 1, 16, 0, b"\0" + RAMP.astype(">u2").tobytes()),
    "PNG, colour": png(64, 1, 16, 2, b"\0" + RAMP.repeat(3).astype(">u2").tobytes()),
    "PNG, transparent colour": png(
        64, 1, 16, 0, b"\0" + RAMP.astype(">u2").tobytes(), chunk(b"tRNS", struct.pack(">H", 12345))
    ),
    "PGM": b"P5 64 1 65535\n" + RAMP.astype(">u2").tobytes(),
    "PGM of 10 bits": b"P5 64 1 1023\n" + (RAMP >> 6).astype(">u2").tobytes(),
    "PPM": b"P6 64 1 65535\n" + RAMP.repeat(3).astype(">u2").tobytes(),
    "PFM": b"Pf 64 1 -1.0\n" + (RAMP / 65535).astype("<f4").tobytes(),
    "JPEG 2000": encoded(Image.fromarray(RAMP.astype(np.uint16)[None].repeat(64, 0)), "JPEG2000"),
}


@pytest.mark.parametrize("name", list(DEEP))
def test_a_deep_ramp_stays_a_ramp(name: str) -> None:
    image = decode_image(DEEP[name])
    assert np.abs(image[:, 0].numpy() - RAMP / 257).max() <= 1.5


FITS = "".join(
    card.ljust(80)
    for card in (
        f"{k:8}= {v:>20}" for k, v in {"SIMPLE": "T", "BITPIX": 16, "NAXIS": 2, "NAXIS1": 64, "NAXIS2": 1}.items()
    )
)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (tiff(RAMP / 257, bits=32, kind=3), "floats from 0 to 255, where 0 is black and 1 is white"),
        (tiff(RAMP / 65535 - 0.5, bits=32, kind=3), "floats from -0.5 to 0.5"),
        (tiff(np.where(RAMP > 9, 0.5, np.nan), bits=32, kind=3), "floats from nan"),
        (tiff(RAMP, bits=32), "which value is white in TIFF of mode I"),
        (tiff(RAMP // 2, bits=16, kind=2), "which value is white in TIFF of mode I"),
        (encoded(Image.fromarray(RAMP.astype(np.uint16)[None]), "IM"), "which value is white in IM of mode I;16"),
        ((FITS + "END".ljust(80)).ljust(2880).encode() + RAMP.astype(">i2").tobytes(), "which value is white in FITS"),
    ],
)
def test_where_white_is_unknown_the_picture_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(ImageDecodeError, match=reason):
        decode_image(data)


@pytest.mark.parametrize(
    ("data", "expected"),  # by the specification of PNG: a sample of n bits times 255 / (2^n - 1), white where clear
    [
        (png(8, 1, 1, 0, b"\0\x0f", chunk(b"tRNS", b"\0\1")), [0] * 4 + [255] * 4),
        (png(4, 1, 2, 0, b"\0\x1b", chunk(b"tRNS", b"\0\1")), [0, 255, 170, 255]),
        (png(2, 1, 4, 0, b"\0\x1f", chunk(b"tRNS", b"\0\1")), [255, 255]),
        (png(2, 1, 4, 0, b"\0\x1e", chunk(b"tRNS", b"\0\2")), [17, 238]),
        (png(2, 1, 8, 0, b"\0\x01\x02", chunk(b"tRNS", b"\0\1")), [255, 2]),
        (png(2, 1, 16, 0, b"\0\1\2\1\3", chunk(b"tRNS", b"\1\2")), [255, 1]),
        (png(2, 1, 16, 2, b"\0" + b"\1\2" * 3 + b"\7\0" * 3, chunk(b"tRNS", b"\1\2" * 3)), [255, 7]),
        (png(2, 1, 16, 4, b"\0\x80\0\xff\xff\x80\0\0\0"), [128, 255]),
        (
            png(8, 1, 1, 3, b"\0\x0f", chunk(b"PLTE", b"\5" * 3 + b"\x09" * 3) + chunk(b"tRNS", b"\0")),
            [255] * 4 + [9] * 4,
        ),
    ],
)
def test_transparency_at_every_depth(data: bytes, expected: list[int]) -> None:
    assert decode_image(data).tolist() == [[expected]] * 3


@pytest.mark.parametrize("mode", ["1", "LA", "PA", "YCbCr", "CMYK", "LAB", "RGBX"])
def test_rarer_modes_equal_pillow(mode: str) -> None:
    data = encoded(picture("RGBA" if mode in ("LA", "PA") else "RGB").convert("P" if mode == "PA" else mode), "TIFF")
    opened = Image.open(io.BytesIO(data))
    expected = by_pillow(data) if opened.has_transparency_data else torch.from_numpy(np.array(opened.convert("RGB")))
    expected = expected if len(expected) == 3 else expected.permute(2, 0, 1)
    assert (decode_image(data).int() - expected.int()).abs().max() <= 1


def test_pixels_that_end_early_are_an_error() -> None:
    rows = b"".join(b"\0" + bytes([200]) * 4 for _ in range(8))
    assert decode_image(png(4, 8, 8, 0, rows)).shape == (3, 8, 4)
    for height, depth, color in ((9, 8, 0), (100, 8, 0), (8, 8, 2), (8, 16, 0)):
        with pytest.raises(ImageDecodeError, match="does not decode"):
            decode_image(png(4, height, depth, color, rows))
    dark = png(4, 8, 8, 0, bytes(5 * 8))
    assert decode_image(dark).max() == 0  # black rows alone are no proof
    whole = interlaced_png()
    assert torch.equal(decode_image(whole), by_pillow(whole))
    at = whole.index(b"IDAT") - 4
    size = int.from_bytes(whole[at : at + 4], "big")
    inflated = zlib.decompress(whole[at + 8 : at + 8 + size])
    with pytest.raises(ImageDecodeError, match="does not decode"):
        decode_image(png(61, 47, 8, 2, inflated[:-1000], interlaced=1))


def broken_exif() -> bytes:
    """A description that is a number, and an orientation."""
    entries = struct.pack("<HHII", 0x010E, 5, 1, 38) + struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4) + struct.pack("<II", 72, 1)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])  # Pillow writes no such AVIF
def test_broken_metadata_cost_no_pixels(kind: str) -> None:
    assert decode_image(encoded(picture("RGB"), kind, exif=broken_exif())).shape == (3, 40, 30)
    assert decode_image(encoded(picture("RGB"), kind, exif=b"Exif\0\0" + bytes(range(200)))).shape == (3, 30, 40)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RecursionError("deep"),
        struct.error("short"),
        IndexError("3"),
        AttributeError("x"),
        OverflowError(),
    ],
)
def test_whatever_a_decoder_raises_is_an_image_decode_error(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    data = encoded(picture("RGB"), "PNG")
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(ImageDecodeError, match=str(error) or type(error).__name__):
        decode_image(data)
    monkeypatch.setattr(Image, "open", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        decode_image(data)


def test_programs_are_no_pictures() -> None:
    with pytest.raises(ImageDecodeError, match="PostScript is a program"):
        decode_image(encoded(picture("RGB"), "EPS"))


def huge(kind: str) -> bytes:
    """Small files of 20,000 x 20,000 pixels by their headers."""
    if kind == "PNG":
        return png(20_000, 20_000, 8, 2, b"\0" * 100)
    if kind == "GIF":  # one small frame on a large canvas
        return b"GIF89a" + struct.pack("<HHBBB", 20_000, 20_000, 0x80, 0, 0) + bytes(6) + GIF_FRAME
    return (
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 154, 0, 0, 54, 40, 20_000, 20_000, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(100)
    )


GIF_FRAME = b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00;"


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP"])
def test_too_many_pixels_are_refused_before_they_are_decoded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ImageDecodeError, match=r"20,000 x 20,000 pixels are more than 89,478,485|exceeds limit"):
        decode_image(huge(kind))


def test_the_limit_is_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(picture("RGB"), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # put back when the test is over
    monkeypatch.setenv("GMAIL_LIGHTNING_MAX_PIXELS", str(40 * 30 - 1))
    with pytest.raises(ImageDecodeError, match=r"40 x 30 pixels are more than 1,199.*GMAIL_LIGHTNING_MAX_PIXELS"):
        decode_image(data)
    monkeypatch.setenv("GMAIL_LIGHTNING_MAX_PIXELS", str(40 * 30))
    assert decode_image(data).shape == (3, 30, 40)
    monkeypatch.setenv("GMAIL_LIGHTNING_MAX_PIXELS", "many")
    with pytest.raises(ValueError, match="GMAIL_LIGHTNING_MAX_PIXELS='many'"):
        decode_image(data)


@pytest.mark.slow
def test_texts_that_inflate_without_end_are_no_danger() -> None:
    bomb = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(200_000_000), 9))
    with pytest.raises(ImageDecodeError, match="does not decode"):
        decode_image(png(1, 1, 8, 0, b"\0\0", bomb))
