"""Fashion-MNIST out of small idx files, which torchvision reads too."""

from __future__ import annotations

import gzip
import multiprocessing
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.datasets import FashionMNIST as Peer

from gmail_lightning.datasets import DataError, FashionMNIST
from gmail_lightning.datasets.fashion_mnist import CLASS_NAMES, DEBIAN_FOLDER
from gmail_lightning.testing import check_dataset

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def idx(values: np.ndarray, magic: int | None = None) -> bytes:
    """The format, written anew from its description (yann.lecun.com/exdb/mnist)."""
    head = 0x0800 + values.ndim if magic is None else magic
    return struct.pack(f">{1 + values.ndim}I", head, *values.shape) + values.astype(np.uint8).tobytes()


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """40 images of ``train``, and 20 of ``test``, where torchvision looks for them."""
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for prefix, count in (("train", 40), ("t10k", 20)):
        images, labels = random.integers(0, 256, (count, 28, 28)), random.permutation(np.arange(count) % 10)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(idx(images))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(labels))
    return folder


def zipped(raw: Path) -> Path:
    """The same files as the Debian package has them."""
    folder = raw.parent / "zipped"
    folder.mkdir()
    for path in raw.iterdir():
        (folder / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    return folder


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("packed", [False, True])
def test_images_and_labels_are_torchvisions(raw: Path, split: str, packed: bool) -> None:
    peer = Peer(str(raw.parents[1]), train=split == "train")
    data = FashionMNIST(zipped(raw) if packed else raw, split)
    assert len(data) == len(peer) == {"train": 40, "test": 20}[split]
    assert data.label.tolist() == peer.targets.tolist()
    for row in range(len(data)):
        image = data[row]["image"]
        assert image.dtype == torch.uint8
        assert torch.equal(image, peer.data[row].expand(3, 28, 28))
    assert data.split == split
    assert f"{len(data)} of {len(data)} images, not the" in str(data.summary)


def test_each_class_has_a_word_of_its_published_name() -> None:
    for ours, published in zip(CLASS_NAMES, Peer.classes, strict=True):
        names = published.lower().split("/")
        assert any(ours.lower() in (name, f"{name}s") for name in names)


def test_it_is_a_data_set_like_the_others(raw: Path) -> None:
    check_dataset(FashionMNIST(raw))
    check_dataset(FashionMNIST(raw, "test", "generated", classes=["bag", "coat"], per_class=2, space="made"))


def test_captions_are_the_prompts_of_the_class(raw: Path) -> None:
    data = FashionMNIST(raw, templates=["a {}", "my {}."])
    row = data.label.tolist().index(9)
    assert data.captions(row) == ["a ankle boot", "my ankle boot."]
    assert data.captions_are_classes
    assert len(FashionMNIST(raw).captions(0)) == len(FashionMNIST(raw).templates) >= 3
    with pytest.raises(ValueError, match="needs exactly one"):
        FashionMNIST(raw, templates=["boots"])


def test_labels_number_the_chosen_classes(raw: Path) -> None:
    peer = Peer(str(raw.parents[1]), train=True)
    data = FashionMNIST(raw, classes=["bag", "T-shirt", "coat"])
    kept = [row for row, target in enumerate(peer.targets.tolist()) if target in (8, 0, 4)]
    assert [data.sample_key(i) for i in range(len(data))] == [f"train/{row:05d}" for row in kept]
    assert data.label.tolist() == [[8, 0, 4].index(target) for target in peer.targets[kept].tolist()]
    assert data.class_names == ["bag", "T-shirt", "coat"]
    assert torch.equal(data[3]["image"][1], peer.data[kept[3]])
    others = FashionMNIST(raw, classes=[name for name in CLASS_NAMES if name not in data.class_names])
    assert not set(others.image_id) & set(data.image_id)
    assert set(others.image_id) | set(data.image_id) == set(FashionMNIST(raw).image_id)


def keys(data: FashionMNIST) -> set[str]:
    return {data.sample_key(i) for i in range(len(data))}


def test_so_many_of_each_class_and_always_the_same(raw: Path) -> None:
    two = FashionMNIST(raw, per_class=2)
    assert np.bincount(two.label).tolist() == [2] * 10
    assert keys(FashionMNIST(raw, per_class=1)) < keys(two) < keys(FashionMNIST(raw, per_class=3))
    assert keys(FashionMNIST(raw, per_class=4)) == keys(FashionMNIST(raw))
    boots = FashionMNIST(raw, classes=["ankle boot"], per_class=2)
    assert keys(boots) == {two.sample_key(i) for i in np.flatnonzero(two.label == 9)}
    first = [np.flatnonzero(FashionMNIST(raw).label == c)[:2] for c in range(10)]
    assert keys(two) != {f"train/{row:05d}" for row in np.concatenate(first)}, "not merely the first"
    with pytest.raises(DataError, match=r"per_class=5, but 4 images are of the class 'T-shirt'. Lower it"):
        FashionMNIST(raw, per_class=5)


def test_ids_are_of_the_image_or_of_the_space(raw: Path) -> None:
    data, test = FashionMNIST(raw), FashionMNIST(raw, "test")
    assert len(set(data.image_id) | set(test.image_id)) == 60
    assert np.array_equal(data.pair_id, data.image_id)
    assert np.array_equal(FashionMNIST(zipped(raw), templates="a {}").image_id, data.image_id)
    assert not set(FashionMNIST(raw, space="x").image_id) & set(data.image_id)
    assert np.array_equal(FashionMNIST(raw, space="x").file_ids(), data.file_ids())
    made = FashionMNIST(raw, modality="generated")
    assert made.modality.tolist() == [1] * 40
    assert made.pair_id.tolist() == [-1] * 40


def read(data: FashionMNIST) -> Tensor:
    return data[5]["image"]


def test_pixels_are_not_sent_to_workers(raw: Path) -> None:
    data = FashionMNIST(raw)
    assert len(pickle.dumps(data)) < 40 * 28 * 28 / 4
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert torch.equal(pool.apply(read, (data,)), data[5]["image"])


def test_a_row_is_a_copy(raw: Path) -> None:
    data = FashionMNIST(raw)
    before = data[0]["image"].clone()
    data[0]["image"].zero_()
    assert torch.equal(data[0]["image"], before)


RANDOM = np.random.default_rng(1).integers(0, 256, (40, 28, 28))
TEN = np.arange(40) % 10


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        (IMAGES, None, "no such file"),
        (LABELS, None, "no such file"),
        (f"{IMAGES}.gz", gzip.compress(idx(RANDOM))[:-2000], "damaged or cut"),
        (f"{IMAGES}.gz", b"\x1f\x8b\x08" + bytes(300), "damaged or cut"),
        (f"{IMAGES}.gz", idx(RANDOM), "damaged or cut .Not a gzipped file"),
        (f"{LABELS}.gz", bytearray(gzip.compress(idx(TEN))[:-6] + bytes(6)), "damaged or cut"),
        (IMAGES, idx(TEN), "magic number 2049 in 48 bytes, not 2051"),
        (LABELS, idx(RANDOM), "magic number 2051 in 31,376 bytes, not 2049"),
        (IMAGES, b"\0\0\x08\x03\0\0", "magic number 2051 in 6 bytes"),
        (IMAGES, idx(RANDOM)[:-1], r"31,359 bytes of values, but its header promises 31,360 \(40 x 28 x 28\)"),
        (LABELS, idx(TEN) + b"\0", "41 bytes of values, but its header promises 40"),
        (IMAGES, idx(RANDOM[:, :27]), "images of 27 x 28 px, not 28 x 28"),
        (IMAGES, idx(RANDOM[:39]), "40 labels, but .*images-idx3-ubyte has 39 images"),
        (LABELS, idx(np.where(np.arange(40) == 7, 10, TEN)), "label 8 is 10, and none from 0 to 9"),
    ],
)
def test_damaged_files(raw: Path, name: str, content: bytes | None, told: str) -> None:
    (raw / name.removesuffix(".gz")).unlink()
    if content is not None:
        (raw / name).write_bytes(content)
    with pytest.raises(DataError, match=told) as error:
        FashionMNIST(raw)
    assert str(raw / name.removesuffix(".gz")) in str(error.value)
    assert "apt-get install dataset-fashion-mnist" in str(error.value)
    assert "root" in str(error.value)


def test_no_images(raw: Path) -> None:
    (raw / IMAGES).write_bytes(idx(RANDOM[:0]))
    (raw / LABELS).write_bytes(idx(TEN[:0]))
    with pytest.raises(DataError, match="no labels"):
        FashionMNIST(raw)


def test_a_class_that_the_files_lack(raw: Path) -> None:
    (raw / LABELS).write_bytes(idx(TEN * 0))
    with pytest.raises(DataError, match="no image of bag"):
        FashionMNIST(raw, classes=["bag"])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"split": "val"}, "Unknown split 'val' of FashionMNIST. Known: train, test"),
        ({"classes": ["boot", "bag"]}, "'boot'. Known: T-shirt, trousers"),
        ({"classes": []}, "none given. Known: T-shirt"),
        ({"classes": ["bag", "bag"]}, "Name each class once"),
        ({"per_class": 0}, "per_class=0 of FashionMNIST"),
        ({"modality": "drawn"}, "Unknown modality 'drawn'"),
    ],
)
def test_arguments_that_are_none(raw: Path, arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        FashionMNIST(raw, **arguments)


@pytest.mark.skipif(not Path(DEBIAN_FOLDER).is_dir(), reason="the Debian package dataset-fashion-mnist is not there")
@pytest.mark.parametrize(("split", "each"), [("train", 6000), ("test", 1000)])
def test_the_package_itself(split: str, each: int) -> None:
    data = FashionMNIST(split=split)
    assert np.bincount(data.label).tolist() == [each] * 10
    assert "not the" not in str(data.summary)
