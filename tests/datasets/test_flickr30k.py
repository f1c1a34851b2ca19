"""Flickr30k in its two formats, on files made here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gmail_lightning.datasets import DataError, Flickr30k, protocols

TOKENS = [
    ("36979.jpg", ["A group of friends .", "a man, with a hat"]),
    ("1000092795.jpg", ["Two young guys .", "Zwei Männer\u2028reden"]),
]


def token_file(folder: Path) -> Path:
    path = folder / "results_20130124.token"
    lines = [f"{name}#{k}\t{text}\n" for name, texts in TOKENS for k, text in enumerate(texts)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def karpathy_file(folder: Path, **changes: Any) -> Path:
    path = folder / "dataset_flickr30k.json"
    images = [
        {
            "filename": name,
            "imgid": i,
            "split": ("train", "test")[i],
            "sentids": [2 * i, 2 * i + 1],
            "sentences": [{"raw": text, "sentid": 2 * i + k} for k, text in enumerate(texts)],
        }
        for i, (name, texts) in enumerate(TOKENS)
    ]
    path.write_text(json.dumps({"images": images, "dataset": "flickr30k"} | changes), encoding="utf-8")
    return path


def test_the_whole_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = token_file(tmp_path)
    with pytest.raises(DataError, match=r"2 images instead of 31,783, 4 captions instead of 158,915.*results_20130124"):
        Flickr30k(path, tmp_path, split="full")
    published = protocols.CAPTION_PROTOCOLS["flickr30k_full"]
    monkeypatch.setitem(protocols.CAPTION_PROTOCOLS, "flickr30k_full", published._replace(images=2, captions=4))
    data = Flickr30k(path, tmp_path, split="full")
    assert [data.captions(i)[0] for i in range(4)] == [
        "A group of friends .",
        "a man, with a hat",
        "Two young guys .",
        "Zwei Männer reden",
    ]
    assert [data.sample_key(i) for i in range(4)] == [f"{name}#{k}" for name, _ in TOKENS for k in range(2)]
    assert len(set(data.pair_id.tolist())) == 4
    assert data.image_id[0] == data.image_id[1] != data.image_id[2] == data.image_id[3]
    assert 36979 not in data.image_id  # which is an image of COCO
    assert data.split == "full"  # refused as training data
    assert data.summary is not None
    assert "flickr30k_full" in data.summary
    Image.new("RGB", (3, 2)).save(tmp_path / "1000092795.jpg")
    assert data[3]["image"].shape == (3, 2, 3)


def test_karpathys_splits_have_the_ids_of_the_whole_set(tmp_path: Path) -> None:
    full = Flickr30k(token_file(tmp_path), tmp_path, split="full", subset=True)
    path = karpathy_file(tmp_path)
    test = Flickr30k(path, tmp_path, "generated", subset=True)
    assert [test.captions(i)[0] for i in range(2)] == ["Two young guys .", "Zwei Männer reden"]
    assert test.image_id.tolist() == full.image_id[2:].tolist()
    assert test.pair_id.tolist() == full.pair_id[2:].tolist()
    assert test.modality.tolist() == [1, 1]
    assert test.split == "test"
    assert test.summary is not None
    assert "a subset (1,000 images and 5,000 captions are published), not protocol flickr30k_1k" in test.summary
    assert Flickr30k(path, tmp_path, split="train", subset=True).image_id.tolist() == full.image_id[:2].tolist()
    for split, counts in (("test", "1,000, 2 captions instead of 5,000"), ("train", "29,000, 2 .* 145,000")):
        with pytest.raises(DataError, match=f"1 images instead of {counts}"):
            Flickr30k(path, tmp_path, split=split)  # type: ignore[arg-type]


def test_wrong_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dataset_flickr30k.json: split 'full' of Flickr30k needs results_20130124"):
        Flickr30k(karpathy_file(tmp_path), tmp_path, split="full")
    with pytest.raises(DataError, match=r"token: split 'test' of Flickr30k needs Karpathy's dataset_flickr30k.json"):
        Flickr30k(token_file(tmp_path), tmp_path)
    with pytest.raises(ValueError, match="Unknown split 'dev'"):
        Flickr30k(token_file(tmp_path), tmp_path, split="dev")  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"of the data set coco: read dataset_flickr30k.json"):
        Flickr30k(karpathy_file(tmp_path, dataset="coco"), tmp_path)
    with pytest.raises(DataError, match="an entry has no 'filename'"):
        Flickr30k(karpathy_file(tmp_path, images=[{"split": "test", "imgid": 1}]), tmp_path)
    with pytest.raises(DataError, match="no list 'images': neither COCO's nor Karpathy's"):
        Flickr30k(karpathy_file(tmp_path, images={}), tmp_path)
    path = token_file(tmp_path)
    text = path.read_text(encoding="utf-8")
    path.write_text(text + "12.jpg\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"line 5: expected IMAGE.jpg#NUMBER, a tab and a caption"):
        Flickr30k(path, tmp_path, split="full")
    path.write_text(text + text.splitlines()[0], encoding="utf-8")
    with pytest.raises(DataError, match=r"1 ids of captions occur more than once, one of them with 36979.jpg"):
        Flickr30k(path, tmp_path, split="full")
    path.write_text("", encoding="utf-8")
    with pytest.raises(DataError, match="no captions"):
        Flickr30k(path, tmp_path, split="full")
    with pytest.raises(DataError, match="no such annotation file"):
        Flickr30k(tmp_path / "none.token", tmp_path, split="full")
