"""Class folders."""

from __future__ import annotations

import json
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
    assert data.captions(3) == ["a photo of a n03 x."]
    assert data[3]["label"] == 2
    assert data.modality.tolist() == [1] * 4
    assert len(set(data.image_id.tolist())) == 4
    assert data.image_id.tolist() == ImageFolder(root).image_id.tolist()


def test_class_names_by_order_and_by_folder(root: Path) -> None:
    for names in (["cat", "dog", "emu"], {"n03_x": "emu", "n01": "cat", "n02": "dog"}):
        data = ImageFolder(root, class_names=names)
        assert [data.captions(i)[0] for i in range(4)] == [
            f"a photo of a {name}." for name in ("cat", "dog", "dog", "emu")
        ]


def test_class_names_from_files(root: Path) -> None:
    names, file = ["cat", "große Dogge", "emu"], root / "names.json"
    for content in (names, dict(zip(("n01", "n02", "n03_x"), names, strict=True))):
        file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        assert ImageFolder(root, class_names=str(file)).class_names == names
    lines = root / "names.txt"
    lines.write_text("cat\ngroße Dogge\n\nemu\n", encoding="utf-8")
    assert ImageFolder(root, class_names=lines).class_names == names
    lines.write_text("cat\n")
    with pytest.raises(DataError, match="1 class_names for 3 folders"):
        ImageFolder(root, class_names=lines)
    with pytest.raises(DataError, match=r"none.txt: no such file of class names"):
        ImageFolder(root, class_names=root / "none.txt")
    for content, message in (("[", "not valid JSON"), ("[1]", "expected a list of names"), ("3", "expected a list")):
        file.write_text(content)
        with pytest.raises(DataError, match=rf"names.json: {message}"):
            ImageFolder(root, class_names=file)


def test_prompts_are_the_captions(root: Path) -> None:
    data = ImageFolder(root, class_names=["cat", "dog", "emu"], templates=["a {}.", "{}!"])
    assert data.templates == ["a {}.", "{}!"]
    assert data.captions(2) == ["a dog.", "dog!"]
    assert ImageFolder(root, templates="{}").captions(0) == ["n01"]
    pets = ImageFolder(root, templates="oxford_pets")
    assert pets.captions(0) == ["a photo of a n01, a type of pet."]
    with pytest.raises(ValueError, match=r"No published prompts for 'a photo'. Known: imagenet"):
        ImageFolder(root, templates="a photo")
    for wrong in (["a {} {}"], []):
        with pytest.raises(ValueError, match=r"exactly one|at least one"):
            ImageFolder(root, templates=wrong)


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
