"""Resizing against the preprocessing of open_clip, which runs on Pillow images."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from gmail_lightning.transforms import resize
from gmail_lightning.types import ImageSpec

MODES = {"crop": "shortest", "squash": "squash", "longest": "longest"}


def picture(height: int, width: int) -> np.ndarray:
    """Smooth with some noise, as photographs are."""
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(x / 9), np.cos(y / 7), np.sin((x + y) / 11)], -1) * 90 + 120
    noise = np.random.default_rng(0).normal(0, 10, waves.shape)
    return np.asarray((waves + noise).clip(0, 255), dtype=np.uint8)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("shape", [(90, 121), (121, 90), (64, 64), (20, 31), (300, 40), (32, 32)])
def test_resize_equals_open_clip(shape: tuple[int, int], mode: Any, interpolation: Any) -> None:
    image = picture(*shape)
    reference = image_transform(
        (32, 32), is_train=False, mean=(0, 0, 0), std=(1, 1, 1), resize_mode=MODES[mode], interpolation=interpolation
    )
    expected = reference(Image.fromarray(image))
    result = resize(torch.from_numpy(image).permute(2, 0, 1), ImageSpec((32, 32), mode, interpolation))
    assert result.shape == expected.shape
    assert result.dtype == torch.float32
    assert (result - expected).abs().max() <= 2 / 255  # two libraries round the same filter


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("shape", [(90, 121), (20, 31), (57, 57), (1, 90)])
def test_any_shape_goes_in_and_the_asked_one_comes_out(shape: tuple[int, int], mode: Any) -> None:
    result = resize(torch.from_numpy(picture(*shape)).permute(2, 0, 1), ImageSpec((24, 36), mode))
    assert result.shape == (3, 24, 36)
    assert 0 <= result.min() <= result.max() <= 1
    if mode == "longest":
        rows, columns = (result > 0).any(0).any(1).sum(), (result > 0).any(0).any(0).sum()
        scale = min(24 / shape[0], 36 / shape[1])
        assert (rows, columns) == (max(round(shape[0] * scale), 1), max(round(shape[1] * scale), 1))


def test_an_image_of_the_right_size_is_untouched() -> None:
    image = torch.from_numpy(picture(24, 36)).permute(2, 0, 1)
    assert torch.equal(resize(image, ImageSpec((24, 36))), image / 255)


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"uint8 image of shape \(3, H, W\), got torch.float32 of \(3, 4, 4\)"):
        resize(torch.rand(3, 4, 4), ImageSpec((4, 4)))
    with pytest.raises(ValueError, match="Unknown resize_mode 'stretch'"):
        resize(torch.zeros(3, 4, 4, dtype=torch.uint8), ImageSpec((5, 5), "stretch"))  # type: ignore[arg-type]


@pytest.mark.parametrize("target", [(24, 24), (24, 36)])
@pytest.mark.parametrize("shape", [(1, 3000), (3000, 1), (2, 1001), (1001, 3), (5, 900)])
def test_what_is_cut_off_before_resizing_was_not_seen(shape: tuple[int, int], target: tuple[int, int]) -> None:
    image = torch.from_numpy(picture(*shape)).permute(2, 0, 1)
    scale = max(target[0] / shape[0], target[1] / shape[1])
    size = [max(int(side * scale), least) for side, least in zip(shape, target, strict=True)]
    whole = F.resize(image, size, InterpolationMode.BICUBIC, antialias=True)
    difference = (resize(image, ImageSpec(target)) * 255 - F.center_crop(whole, list(target))).abs()
    assert difference.mean() < 8  # its middle is at most one pixel of the target away
    if scale == int(scale):
        assert difference.max() <= 1


def test_tall_images_are_squashed_alike() -> None:
    image = torch.from_numpy(picture(4000, 2)).permute(2, 0, 1)
    whole = F.resize(image, [24, 200], InterpolationMode.BICUBIC, antialias=True)
    assert (resize(image, ImageSpec((24, 200), "squash")) * 255 - whole).abs().max() <= 2


@pytest.mark.slow
def test_memory_of_resizing_is_that_of_source_and_target() -> None:
    code = """
import resource, torch
from gmail_lightning.transforms import resize
from gmail_lightning.types import ImageSpec
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
resize(torch.zeros(3, 300, 300, dtype=torch.uint8), ImageSpec((224, 224)))
for shape in ((1, 200_000), (200_000, 1), (3, 60_000)):
    for mode in ("crop", "squash", "longest"):
        before = peak()
        resize(torch.zeros(3, *shape, dtype=torch.uint8), ImageSpec((224, 224), mode))
        assert peak() - before < 60, (shape, mode, peak() - before)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
