"""Class folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gmail_lightning.datasets import DataError, ImageFolder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, width in (("n02/b.png", 2), ("n02/a.JPG", 3), ("n01/deep/c.webp", 4), ("n03_x/d.bmp", 5)):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (width, 1)).save(path)
    (tmp_path / "n01" / "notes.txt").write_text("no image")
    (tmp_path / ".cache").mkdir()
    return tmp_path


def test_folders_are_classes(root: Path) -> None:
    data = ImageFolder(root, modality="generated")
    assert [data.sample_key(i) for i in range(4)] == ["n01/deep/c.webp", "n02/a.JPG", "n02/b.png", "n03_x/d.bmp"]
    assert data.class_names == ["n01", "n02", "n03 x"]
    assert np.array_equal(data.label, [0, 1, 1, 2])
    assert [data[i]["image"].shape[2] for i in range(4)] == [4, 3, 2, 5]
    assert data.captions(3) == ["a photo of a n03 x"]
    assert data[3]["label"] == 2
    assert data.modality.tolist() == [1] * 4
    assert len(set(data.image_id.tolist())) == 4
    assert data.image_id.tolist() == ImageFolder(root).image_id.tolist()


def test_class_names_by_order_and_by_folder(root: Path) -> None:
    for names in (["cat", "dog", "emu"], {"n03_x": "emu", "n01": "cat", "n02": "dog"}):
        data = ImageFolder(root, class_names=names)
        assert [data.captions(i)[0] for i in range(4)] == [
            f"a photo of a {name}" for name in ("cat", "dog", "dog", "emu")
        ]


def test_errors(root: Path) -> None:
    with pytest.raises(DataError, match="2 class_names for 3 folders"):
        ImageFolder(root, class_names=["a", "b"])
    with pytest.raises(DataError, match="no name for the folders n02, n03_x"):
        ImageFolder(root, class_names={"n01": "cat"})
    with pytest.raises(DataError, match="none: no such folder"):
        ImageFolder(root / "none")
    with pytest.raises(DataError, match="no class folders"):
        ImageFolder(root / "n02")
    (root / "n04").mkdir()
    with pytest.raises(DataError, match="n04: no images"):
        ImageFolder(root)
