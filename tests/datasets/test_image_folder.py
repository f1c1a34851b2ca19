"""Class folders."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder as Peer

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


APPLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X" + bytes(100)


def litter(folder: Path) -> None:
    """What systems and programs leave in a folder."""
    (folder / ".thumbnails").mkdir()
    Image.new("RGB", (9, 9)).save(folder / ".thumbnails" / "x.jpg")
    (folder / ".DS_Store").write_bytes(b"\0")
    (folder / "._a.jpg").write_bytes(APPLE)
    (folder / "Thumbs.db").write_bytes(b"\0")


def test_hidden_files_and_folders_are_left_out_and_counted(root: Path) -> None:
    for folder in (root, root / "n02", root / "n01" / "deep"):
        litter(folder)
    (root / "n02" / "LICENSE").write_text("free")
    data = ImageFolder(root)
    assert [data.sample_key(i) for i in range(len(data))] == [
        "n01/deep/c.webp",
        "n02/a.JPG",
        "n02/b.png",
        "n03_x/d.bmp",
    ]
    assert data.class_names == ["n01", "n02", "n03 x"]
    hidden = 3 * 3 + 1  # and the folder that the fixture makes
    assert data.summary == (
        f"{root}: 4 images of 3 classes; left out: 3 .db, 1 .txt, {hidden} hidden, 1 without a suffix."
    )
    only_hidden = root / "n05"
    only_hidden.mkdir()
    litter(only_hidden)
    with pytest.raises(DataError, match=r"n05: no images .* \(left out: 1 \.db, 3 hidden\)"):
        ImageFolder(root)


def test_nothing_left_out_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (3, 3)).save(tmp_path / "cat" / "a.png")
    assert ImageFolder(tmp_path).summary is None


def test_links_are_followed_once(tmp_path: Path) -> None:
    for name in ("store/cats/1.jpg", "store/more/2.jpg", "root/dog/3.jpg", "store/4.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (3, 3), len(name)).save(path)
    (tmp_path / "root" / "cat").symlink_to(tmp_path / "store" / "cats")
    (tmp_path / "root" / "dog" / "batch2").symlink_to(tmp_path / "store" / "more")
    (tmp_path / "root" / "dog" / "5.png").symlink_to(tmp_path / "store" / "4.png")
    expected = sorted(Path(path).relative_to(tmp_path / "root").as_posix() for path, _ in Peer(tmp_path / "root").imgs)
    data = ImageFolder(tmp_path / "root")
    assert [data.sample_key(i) for i in range(len(data))] == expected
    assert len(expected) == 4
    (tmp_path / "store" / "more" / "up").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "dog" / "self").symlink_to(tmp_path / "root" / "dog")
    data = ImageFolder(tmp_path / "root")
    assert [data.sample_key(i) for i in range(len(data))] == expected
    assert data.summary is not None
    assert "left out: 2 linked to a folder around it" in data.summary


def test_a_path_is_a_path(tmp_path: Path) -> None:
    for name in ("run [v2]*/{a}/?/1.png", "run v/{a}/2.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        Image.new("RGB", (3, 3), len(name)).save(tmp_path / name)
    data = ImageFolder(tmp_path / "run [v2]*")
    assert [data.sample_key(i) for i in range(len(data))] == ["{a}/?/1.png"]
    assert data.image(0).shape == (3, 3, 3)
    assert data.class_names == ["{a}"]


@pytest.mark.parametrize("suffix", ["jfif", "JPE", "jp2", "ppm", "tga", "ico", "pcx", "apng", "qoi", "sgi", "dds"])
def test_all_that_pillow_reads_counts(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (16, 16), "red").save(tmp_path / "cat" / f"a.{suffix}")
    data = ImageFolder(tmp_path)
    assert len(data) == 1
    assert data.image(0).shape == (3, 16, 16)


def test_folders_that_cannot_be_listed_are_an_error(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def guarded(path: Path) -> Iterator[os.DirEntry[str]]:
        if Path(path).name == "deep":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(DataError, match=r"deep: cannot be listed \(Permission denied\)"):
        ImageFolder(root)


def test_a_space_keeps_folders_apart(root: Path) -> None:
    ids = [ImageFolder(root, space=space).image_id for space in ("", "mine", "yours")]
    assert len(np.unique(ids)) == 12
    real, generated = ImageFolder(root), ImageFolder(root, modality="generated")
    assert real.pair_id.tolist() == real.image_id.tolist()
    assert generated.pair_id.tolist() == [-1] * 4


def test_links_to_nothing_are_counted(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "cat" / "0.png")
    (tmp_path / "cat" / "1.png").symlink_to(tmp_path / "nowhere.png")
    data = ImageFolder(tmp_path)
    assert len(data) == 1
    assert "1 of a link to nothing" in str(data.summary)
