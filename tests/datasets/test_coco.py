"""COCO's annotations and Karpathy's splits, on files made here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gmail_lightning.datasets import CocoCaptions, DataError, ImageDecodeError

COCO: dict[str, Any] = {
    "images": [{"id": 9, "file_name": "9.png"}, {"id": 4, "file_name": "4.png"}],
    "annotations": [
        {"id": 31, "image_id": 4, "caption": "A man\nwalks. "},
        {"id": 30, "image_id": 9, "caption": "Ein Vogel & süß"},
        {"id": 32, "image_id": 4, "caption": "someone walking"},
    ],
}


def karpathy(number: int, split: str, sentids: list[int]) -> dict[str, Any]:
    return {
        "filepath": "val2014",
        "filename": f"{number}.png",
        "cocoid": number,
        "imgid": number - 1,
        "split": split,
        "sentids": sentids,
        "sentences": [{"raw": f"caption {i}", "sentid": i, "tokens": []} for i in sentids],
    }


KARPATHY = {
    "images": [
        karpathy(5, "train", [50, 51]),
        karpathy(6, "restval", [60]),
        karpathy(7, "test", [70, 71]),
        karpathy(8, "val", [80]),
    ],
    "dataset": "coco",
}


def write(folder: Path, content: Any) -> Path:
    path = folder / "captions.json"
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


def test_annotations_are_one_row_per_caption(tmp_path: Path) -> None:
    for number in (4, 9):
        Image.new("RGB", (number, 2), (number, 0, 0)).save(tmp_path / f"{number}.png")
    data = CocoCaptions(write(tmp_path, COCO), tmp_path)
    assert data.image_id.tolist() == [4, 9, 4]
    assert data.pair_id.tolist() == [31, 30, 32]
    assert [data.captions(i) for i in range(3)] == [["A man walks."], ["Ein Vogel & süß"], ["someone walking"]]
    assert [data[i]["image"].shape[2] for i in range(3)] == [4, 9, 4]
    assert data.modality.tolist() == [0, 0, 0]
    assert data.split is None
    picture = data.picture()
    assert picture[0] == picture[2] != picture[1]
    assert len({data.sample_key(i) for i in range(3)}) == 3


@pytest.mark.parametrize(
    ("split", "images", "captions", "of"),
    [
        ("train", [5, 5], [50, 51], "train"),
        ("restval", [6], [60], "train"),
        ("train+restval", [5, 5, 6], [50, 51, 60], "train"),
        ("test", [7, 7], [70, 71], "test"),
        ("val", [8], [80], "val"),
        ("train+val", [5, 5, 8], [50, 51, 80], "train+val"),
    ],
)
def test_karpathy_splits(tmp_path: Path, split: str, images: list[int], captions: list[int], of: str) -> None:
    data = CocoCaptions(write(tmp_path, KARPATHY), tmp_path / "coco", modality="generated", split=split)
    assert data.split == of
    assert data.image_id.tolist() == images
    assert data.pair_id.tolist() == captions
    assert [data.captions(i) for i in range(len(data))] == [[f"caption {i}"] for i in captions]
    assert data.modality.tolist() == [1] * len(images)
    file = tmp_path / "coco" / "val2014" / f"{images[0]}.png"
    with pytest.raises(
        ImageDecodeError, match=f"captions.json image {images[0]}, caption {captions[0]}: no file {file}"
    ):
        data[0]
    file.parent.mkdir(parents=True)
    Image.new("RGB", (3, 2)).save(file)
    assert data[0]["image"].shape == (3, 2, 3)


def test_other_data_sets_of_karpathy_have_no_coco_ids(tmp_path: Path) -> None:
    entry = {k: v for k, v in karpathy(5, "train", [1]).items() if k not in ("cocoid", "filepath")}
    data = CocoCaptions(write(tmp_path, {"images": [entry]}), tmp_path, split="train")
    assert data.image_id.tolist() == [4]
    Image.new("RGB", (3, 2)).save(tmp_path / "5.png")
    assert data[0]["image"].shape == (3, 2, 3)


def without(content: dict[str, Any], part: str, key: str) -> dict[str, Any]:
    return {**content, part: [{k: v for k, v in entry.items() if k != key} for entry in content[part]]}


@pytest.mark.parametrize(
    ("content", "split", "message"),
    [
        (KARPATHY, "training", "unknown split 'training'. Known: restval, test, train, val"),
        (KARPATHY, "train+dev", "unknown split 'train.dev'. Known: restval"),
        (KARPATHY, None, "name a split. Known: restval, test, train, val"),
        (COCO, "train", "split='train', but COCO's annotation files hold one split each"),
        ({"images": []}, "x", "unknown split 'x'"),
        ({"annotations": [], "images": []}, None, "no captions"),
        ([], None, "no list 'images'"),
        (without(COCO, "annotations", "caption"), None, "an entry has no 'caption'"),
        ({**COCO, "images": COCO["images"][:1]}, None, "caption 31 belongs to image 4, which 'images' lacks"),
        ({**COCO, "annotations": [{"id": 3, "image_id": 4, "caption": " "}]}, None, "caption 3 of image 4 is empty"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, content: Any, split: str | None, message: str) -> None:
    with pytest.raises(DataError, match=f"captions.json: {message}"):
        CocoCaptions(write(tmp_path, content), tmp_path, split=split)


def test_missing_and_malformed_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json: no such annotation file"):
        CocoCaptions(tmp_path / "none.json", tmp_path)
    (tmp_path / "half.json").write_text('{"images": [')
    with pytest.raises(DataError, match=r"half\.json: not valid JSON"):
        CocoCaptions(tmp_path / "half.json", tmp_path)
