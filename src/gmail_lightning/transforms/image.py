"""Resizing of decoded images to what an encoder asks for."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from gmail_lightning.types import ImageSpec

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".avif", ".tif", ".tiff"}  # of the names of images


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
    height, width = image.shape[1:]
    target_height, target_width = spec.size
    if (height, width) != spec.size:
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
        image = F.resize(image, list(size), InterpolationMode(spec.interpolation), antialias=True)
        if size != spec.size:
            image = F.center_crop(image, list(spec.size))  # pads with black where the image is smaller
    return image.float().div_(255.0)
