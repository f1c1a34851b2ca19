"""Resizing of decoded images to what an encoder asks for."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from gmail_lightning.types import ImageSpec

_NAMES = """
apng avif avifs blp bmp bw cur dcx dds dib fit fits flc fli ftc ftu gbr gif icb icns ico iim im j2c j2k jfif jp2 jpc jpe
jpeg jpf jpg jpx mpo msp pbm pcd pcx pfm pgm png pnm ppm psd pxr qoi ras rgb rgba sgi tga tif tiff vda vst webp xbm xpm
"""
#: Of the names of images: all that Pillow decodes by itself. They are written out because ids go by the first image of
#: a folder (:mod:`gmail_lightning.datasets.ids`), whichever decoders a build of Pillow has. PostScript is left out, as
#: it is a program, and so is what Pillow only recognises: BUFR, GRIB, HDF5, MPEG, WMF.
SUFFIXES = frozenset(f".{name}" for name in _NAMES.split())
LONGEST = 16  # times what is needed: longer images are cut, or resized in two steps, so that memory stays bounded


def resize(image: Tensor, spec: ImageSpec) -> Tensor:
    """Resizes one image with antialiasing.

    The filter runs on bytes and rounds to bytes, as Pillow does in the preprocessing that CLIP models are trained with.

    Args:
        image: uint8, shape (3, H, W).
        spec: Size (h, w), resize mode and interpolation.

    Returns:
        float32 in [0, 1], shape (3, h, w).

    Raises:
        ValueError: If the image is not uint8 of shape (3, H, W), or the mode is unknown.
    """
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"Expected a uint8 image of shape (3, H, W), got {image.dtype} of {tuple(image.shape)}.")
    target_height, target_width = spec.size
    if image.shape[1:] != spec.size:
        if spec.resize_mode == "crop":
            image = _middle(image, spec.size)
        height, width = image.shape[1:]
        scales = target_height / height, target_width / width
        if spec.resize_mode == "squash":
            size = spec.size
        elif spec.resize_mode == "crop":  # truncated, as torchvision's Resize does, but never below the target
            scale = max(scales)
            size = max(int(height * scale), target_height), max(int(width * scale), target_width)
        elif spec.resize_mode == "longest":
            scale = min(scales)
            size = max(round(height * scale), 1), max(round(width * scale), 1)
        else:
            raise ValueError(f"Unknown resize_mode {spec.resize_mode!r}: use crop, squash or longest.")
        if size[0] < height and height * size[1] > LONGEST * (height * width + size[0] * size[1]):
            # Down before across: the filter goes across first, which makes all rows of a tall image as wide as asked.
            image = F.resize(image, [size[0], width], InterpolationMode(spec.interpolation), antialias=True)
        image = F.resize(image, list(size), InterpolationMode(spec.interpolation), antialias=True)
        if size != spec.size:
            image = F.center_crop(image, list(spec.size))  # pads with black where the image is smaller
    return image.float().div_(255.0)


def _middle(image: Tensor, target: tuple[int, int]) -> Tensor:
    """Shortens an image that is far longer than the target and would be enlarged, by as much at both ends.

    A row of 3000 pixels would become 224 x 672000 before its middle is cut out. What is kept is ``LONGEST`` times what
    the target shows, well beyond the reach of the filter; all other images are left whole.
    """
    sides = image.shape[1:]
    scale = max(target[0] / sides[0], target[1] / sides[1])
    for axis in (0, 1) if scale > 1 else ():
        extra = (sides[axis] - math.ceil(LONGEST * max(target[axis] / scale, 1))) // 2
        if extra > 0:
            image = image.narrow(axis + 1, extra, sides[axis] - 2 * extra)
    return image
