"""Hashes of pixels, and the search for near ones."""

from __future__ import annotations

import hashlib
import io

import numpy as np
import pytest
import torch
from PIL import Image

from gmail_lightning.datasets import EmojiDataset
from gmail_lightning.transforms import image_hash
from gmail_lightning.transforms.image_hash import exact_hash, near_matches, near_pairs, perceptual_hash


def distance(one: int, other: int) -> int:
    return bin((one ^ other) & (2**64 - 1)).count("1")


def reference_hash(image: torch.Tensor) -> int:
    """The same hash in plain loops: sums over pixels, cosines by their definition."""
    pixels = image.numpy().astype(float)
    height, width = image.shape[1:]
    grid = np.zeros((3, 32, 32))
    for row in range(32):
        for column in range(32):
            top, bottom = row * height / 32, (row + 1) * height / 32
            left, right = column * width / 32, (column + 1) * width / 32
            for y in range(int(top), min(int(np.ceil(bottom)), height)):
                for x in range(int(left), min(int(np.ceil(right)), width)):
                    share = (min(bottom, y + 1) - max(top, y)) * (min(right, x + 1) - max(left, x))
                    grid[:, row, column] += share * pixels[:, y, x] * 32 * 32 / height / width
    luma = 0.299 * grid[0] + 0.587 * grid[1] + 0.114 * grid[2]

    def cosine(plane: np.ndarray, v: int, u: int) -> float:
        at = 2 * np.arange(32) + 1
        weight = np.outer(np.cos(np.pi * v * at / 64), np.cos(np.pi * u * at / 64))
        return float((plane * weight).sum()) / 32 * (1 if v == 0 else 2**0.5) * (1 if u == 0 else 2**0.5)

    order = [(v, total - v) for total in range(1, 9) for v in range(total + 1)]
    bits = [cosine(luma, v, u) > 8 for v, u in order[:44]]
    for plane in (grid[0] - luma, grid[2] - luma):
        bits += [cosine(plane, v, u) > 16 for v, u in order[:4]]
    for plane in (grid[0] - luma, grid[2] - luma):
        bits += [plane.mean() > level for level in (-40, -20, -5, 5, 20, 40)]
    number = int("".join("01"[int(bit)] for bit in bits), 2)
    return number - 2**64 if number >= 2**63 else number


@pytest.mark.parametrize("shape", [(64, 64), (40, 57), (20, 33)])
def test_hash_equals_its_definition_in_loops(shape: tuple[int, int]) -> None:
    coarse = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(shape[0])) * 255
    image = torch.nn.functional.interpolate(coarse, shape, mode="bilinear")[0].to(torch.uint8)
    assert perceptual_hash(image) == reference_hash(image)
    assert -(2**63) <= perceptual_hash(image) < 2**63


@pytest.mark.parametrize("value", [0, 128, 255])
def test_a_constant_image_has_a_hash_and_noise_of_one_level_keeps_it(value: int) -> None:
    image = torch.full((3, 64, 64), value, dtype=torch.uint8)
    noise = torch.randint(0, 2, (3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    noisy = image + noise if value < 255 else image - noise
    assert perceptual_hash(image) == perceptual_hash(noisy) == perceptual_hash(image[:, :17, :23])


def test_copies_are_near_and_other_concepts_are_not() -> None:
    data = EmojiDataset("noto", "novel")
    rows = range(0, len(data), 4)
    hashes = [perceptual_hash(data.image(row)) for row in rows]
    changed: dict[str, list[int]] = {"webp": [], "small": []}
    for row in rows:
        image = Image.fromarray(data.image(row).permute(1, 2, 0).numpy())
        encoded = io.BytesIO()
        image.save(encoded, "WEBP", quality=80)
        for name, copy in (("webp", Image.open(encoded)), ("small", image.resize((48, 48), Image.Resampling.BICUBIC))):
            pixels = torch.from_numpy(np.array(copy.convert("RGB"))).permute(2, 0, 1)
            changed[name].append(perceptual_hash(pixels))
    for name, copies in changed.items():
        near = [distance(one, other) <= 2 for one, other in zip(hashes, copies, strict=True)]
        assert np.mean(near) >= 0.95, name
    others = [[distance(one, other) for other in hashes if other is not one] for one in hashes]
    assert np.mean([min(row) <= 2 for row in others]) <= 0.06


def test_exact_hash_is_blake2b_of_shape_and_bytes() -> None:
    image = torch.arange(24, dtype=torch.uint8).reshape(3, 2, 4)
    expected = hashlib.blake2b(b"(3, 2, 4)" + bytes(range(24)), digest_size=16).hexdigest()
    assert exact_hash(image) == expected
    assert exact_hash(image.reshape(3, 4, 2)) != expected  # the same bytes in another shape
    assert exact_hash(image.permute(0, 2, 1)) == exact_hash(image.permute(0, 2, 1).contiguous())


@pytest.mark.parametrize("image", [torch.zeros(3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.uint8)])
def test_other_images_are_refused(image: torch.Tensor) -> None:
    for function in (perceptual_hash, exact_hash):
        with pytest.raises(ValueError, match=r"uint8 image of shape \(3, H, W\)"):
            function(image)


def clustered_hashes(count: int, seed: int, centres: int = 12) -> np.ndarray:
    """Around few centres, so that many pairs are near; some twice; the sign bit is used."""
    rng = np.random.default_rng(seed)
    centre = np.random.default_rng(99).integers(-(2**63), 2**63 - 1, 12)[rng.integers(0, centres, count)]
    flips = np.zeros(count, dtype=np.int64)
    for _ in range(3):
        flips ^= np.left_shift(np.int64(1), rng.integers(0, 64, count)) * rng.integers(0, 2, count)
    hashes: np.ndarray = centre ^ flips
    hashes[count // 2 : count // 2 + 5] = hashes[:5]
    return hashes


@pytest.mark.parametrize("max_distance", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("candidates", [50, 1 << 22])  # the small one makes many chunks
def test_near_matches_equal_brute_force(max_distance: int, candidates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_hash, "CANDIDATES", candidates)
    hashes, reference = clustered_hashes(150, 0), clustered_hashes(120, 1, centres=9)
    table = np.array([[distance(int(one), int(other)) for other in reference] for one in hashes])
    nearest = table.argmin(axis=1)  # the first on ties
    expected = np.where(table.min(axis=1) <= max_distance, nearest, -1)
    assert (expected >= 0).any()
    assert (expected < 0).any()
    assert near_matches(hashes, reference, max_distance).tolist() == expected.tolist()


@pytest.mark.parametrize("max_distance", [0, 2, 4])
def test_near_pairs_equal_brute_force(max_distance: int) -> None:
    hashes = np.unique(clustered_hashes(150, 2))
    left, right, bits = near_pairs(hashes, hashes, max_distance)
    table = np.array([[distance(int(one), int(other)) for other in hashes] for one in hashes])
    rows, columns = np.nonzero(table <= max_distance)
    assert left.tolist() == rows.tolist()
    assert right.tolist() == columns.tolist()
    assert bits.tolist() == table[rows, columns].tolist()


def test_nothing_to_search_for_or_in() -> None:
    none, some = np.empty(0, dtype=np.int64), np.array([3, -7])
    assert near_matches(none, some).shape == (0,)
    assert near_matches(some, none).tolist() == [-1, -1]
    assert near_matches(none, none).shape == (0,)


@pytest.mark.parametrize("max_distance", [-1, 5])
def test_a_distance_out_of_range_is_refused(max_distance: int) -> None:
    with pytest.raises(ValueError, match=f"max_distance={max_distance}: from 0 to 4"):
        near_matches(np.array([1]), np.array([1]), max_distance)
