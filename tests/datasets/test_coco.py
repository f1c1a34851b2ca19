"""COCO's annotations and Karpathy's splits, on files made here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gmail_lightning.datasets import CocoCaptions, DataError, ImageDecodeError, protocols
from gmail_lightning.datasets.ids import stable_ids

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
    flickr = CocoCaptions(write(tmp_path, {"dataset": "flickr8k", "images": [entry]}), tmp_path, split="train")
    assert flickr.image_id.tolist() == stable_ids(["flickr8k/5.png"]).tolist()
    assert flickr.pair_id.tolist() == stable_ids(["flickr8k/5.png#0"]).tolist()
    data = CocoCaptions(write(tmp_path, {"images": [entry]}), tmp_path, split="train")
    assert data.image_id.tolist() == stable_ids(["karpathy/5.png"]).tolist()
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
        (
            {"images": COCO["images"][1:], "annotations": [{"id": 3, "image_id": 4, "caption": " "}]},
            None,
            "caption 3 of 4.png is empty",
        ),
        (
            {**COCO, "images": [*COCO["images"], {"id": 2, "file_name": "b"}]},
            None,
            r"1 of 3 images have no caption.* 2 ",
        ),
        ({**COCO, "images": [*COCO["images"], COCO["images"][0]]}, None, "3 images have 2 different ids"),
        (
            {**COCO, "annotations": [*COCO["annotations"], COCO["annotations"][0]]},
            None,
            r"1 ids of captions occur more than once, one of them with 4.png \(31\)",
        ),
        (
            {"images": [*KARPATHY["images"], karpathy(7, "test", [9])]},
            "test",
            r"image 7 \(val2014/7.png\) stands there",
        ),
        ({"images": [karpathy(7, "test", [])]}, "test", r"image 7 \(val2014/7.png\) has no caption"),
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


def six_captions(images: int) -> dict[str, Any]:
    """COCO's format; the captions of an image are not neighbours."""
    return {
        "images": [{"id": i, "file_name": f"{i}.png"} for i in range(1, images + 1)],
        "annotations": [
            {"id": 10 * i + k, "image_id": i, "caption": f"image {i} caption {k}"}
            for k in range(6)
            for i in range(images, 0, -1)
        ],
    }


def test_the_first_captions_of_each_image(tmp_path: Path) -> None:
    path = write(tmp_path, six_captions(3))
    data = CocoCaptions(path, tmp_path, captions_per_image=2)
    assert data.pair_id.tolist() == [30, 20, 10, 31, 21, 11]
    assert len(CocoCaptions(path, tmp_path, captions_per_image=9)) == 18
    for wrong in (0, -2):
        with pytest.raises(ValueError, match=f"captions_per_image={wrong}: give at least 1"):
            CocoCaptions(path, tmp_path, captions_per_image=wrong)


def small(monkeypatch: pytest.MonkeyPatch, name: str, images: int, captions: int) -> None:
    published = protocols.CAPTION_PROTOCOLS[name]
    monkeypatch.setitem(protocols.CAPTION_PROTOCOLS, name, published._replace(images=images, captions=captions))


def test_the_coco_5k_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, six_captions(3))
    with pytest.raises(
        DataError,
        match=r"captions.json: not the protocol coco_5k: 3 images instead of 5,000, 15 captions instead of 25,000. "
        r"It is COCO val2017, .*: read captions_val2017.json",
    ):
        CocoCaptions(path, tmp_path, protocol="coco_5k")
    small(monkeypatch, "coco_5k", 3, 15)
    data = CocoCaptions(path, tmp_path, protocol="coco_5k")
    assert [data.captions(i)[0] for i in range(15)] == [
        f"image {i} caption {k}" for k in range(5) for i in range(3, 0, -1)
    ]
    assert data.split == "val"  # refused as training data
    assert data.summary is not None
    assert "protocol coco_5k" in data.summary
    assert "3 images, 15 captions" in data.summary
    for wrong in ({"captions_per_image": 1}, {"split": "val"}):
        with pytest.raises(DataError, match=f"{next(iter(wrong))}=.*Leave .* out"):
            CocoCaptions(path, tmp_path, protocol="coco_5k", **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Unknown protocol 'coco'"):
        CocoCaptions(path, tmp_path, protocol="coco")  # type: ignore[arg-type]


def test_the_karpathy_test_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, KARPATHY)
    with pytest.raises(DataError, match=r"1 images instead of 5,000, 2 captions instead of 25,010"):
        CocoCaptions(path, tmp_path, protocol="karpathy_test")
    small(monkeypatch, "karpathy_test", 1, 2)
    data = CocoCaptions(path, tmp_path, protocol="karpathy_test")
    assert data.pair_id.tolist() == [70, 71]
    assert data.split == "test"
    with pytest.raises(DataError, match="split='val', but the protocol karpathy_test is Karpathy's test split"):
        CocoCaptions(path, tmp_path, split="val", protocol="karpathy_test")
    with pytest.raises(DataError, match=r"the protocol coco_5k is .*: read captions_val2017.json"):
        CocoCaptions(path, tmp_path, protocol="coco_5k")
    with pytest.raises(DataError, match=r"the protocol karpathy_test is .*: read dataset_coco.json"):
        CocoCaptions(write(tmp_path, COCO), tmp_path, protocol="karpathy_test")
