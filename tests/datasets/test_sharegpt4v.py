"""Long captions, on files made here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gmail_lightning.datasets import DataError, ShareGPT4V, Urban1k, sharegpt4v
from gmail_lightning.datasets.sharegpt4v import json_entries


def entry(file: str, caption: str) -> dict[str, Any]:
    question = {"from": "human", "value": "<image>\nDescribe this image in detail."}
    return {"id": Path(file).stem, "image": file, "conversations": [question, {"from": "gpt", "value": caption}]}


def write(folder: Path, count: int, **changes: Any) -> Path:
    entries = [entry(f"coco/train2017/{i:012d}.jpg", f'Image {i}.\nIt shows [{{\\"}}, ü.') for i in range(1, count + 1)]
    entries += [entry("sam/images/sa_7.jpg", "Last.")]
    path = folder / "share-captioner.json"
    path.write_text(json.dumps(entries, indent=2, ensure_ascii=False), encoding="utf-8")
    return path


def test_the_first_thousand_entries_are_for_validation(tmp_path: Path) -> None:
    path = write(tmp_path, 1002)
    val, train = ShareGPT4V(path, tmp_path), ShareGPT4V(path, tmp_path, "generated", split="train")
    assert val.image_id.tolist() == list(range(1, 1001))  # COCO's own
    assert val.captions(0) == ['Image 1. It shows [{\\"}, ü.']
    assert train.image_id[:2].tolist() == [1001, 1002]
    assert train.image_id[2] > 1 << 32
    assert [train.captions(i)[0][:10] for i in range(3)] == ["Image 1001", "Image 1002", "Last."]
    assert (val.split, train.split) == ("val", "train")
    assert train.modality.tolist() == [1, 1, 1]
    pair_ids = val.pair_id.tolist() + train.pair_id.tolist()
    assert len(set(pair_ids)) == 1003
    assert train.sample_key(2) == "sam/images/sa_7.jpg#0"
    assert val.summary is not None
    assert "sharegpt4v_1k" in val.summary
    assert train.summary is not None
    assert "3 captions" in train.summary
    file = tmp_path / "sam" / "images" / "sa_7.jpg"
    file.parent.mkdir(parents=True)
    Image.new("RGB", (3, 2)).save(file)
    assert train[2]["image"].shape == (3, 2, 3)


def test_entries_come_one_by_one_whatever_the_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, 30)
    expected = json.loads(path.read_text(encoding="utf-8"))
    for block in (1, 7, 100, 1 << 20):
        monkeypatch.setattr(sharegpt4v, "BLOCK", block)
        assert list(json_entries(path)) == expected
    monkeypatch.setattr(sharegpt4v, "BLOCK", 100)
    path.write_text(path.read_text(encoding="utf-8")[:1000] + '"', encoding="utf-8")
    assert next(json_entries(path)) == expected[0]  # what follows is not read
    with pytest.raises(DataError, match="not valid JSON after entry 3"):
        list(json_entries(path))


def test_wrong_files_of_sharegpt4v(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="31 images instead of 1,000, 31 captions instead of 1,000"):
        ShareGPT4V(write(tmp_path, 30), tmp_path)
    assert len(ShareGPT4V(write(tmp_path, 30), tmp_path, subset=True)) == 31
    with pytest.raises(DataError, match="no entry after the first 1,000: the split 'train' is empty"):
        ShareGPT4V(write(tmp_path, 30), tmp_path, split="train")
    with pytest.raises(ValueError, match="Unknown split 'test'"):
        ShareGPT4V(write(tmp_path, 1), tmp_path, split="test")  # type: ignore[arg-type]
    path = tmp_path / "other.json"
    for content, message in (
        ([{"image": "a.jpg", "conversations": []}], "entry 1: no 'image', or no answer in 'conversations'"),
        ([entry("a.jpg", "A."), {"conversations": [0, {"value": "B."}]}], "entry 2: no 'image'"),
        ({"images": []}, "not a list in JSON"),
        ([entry("a.jpg", "A."), entry("b.jpg", " ")], r"caption sharegpt4v/1 of b.jpg is empty"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(DataError, match=message):
            ShareGPT4V(path, tmp_path)
    entries = [entry(f"coco/train2017/{i % 999:012d}.jpg", "Twice.") for i in range(1000)]
    path.write_text(json.dumps(entries))
    with pytest.raises(DataError, match="999 images instead of 1,000"):
        ShareGPT4V(path, tmp_path)
    with pytest.raises(DataError, match="no such annotation file"):
        ShareGPT4V(tmp_path / "none.json", tmp_path)


def test_urban1k(tmp_path: Path) -> None:
    for folder in ("image", "caption"):
        (tmp_path / folder).mkdir()
    for i in (2, 11):
        Image.new("RGB", (i, 1)).save(tmp_path / "image" / f"{i}.jpg")
        (tmp_path / "caption" / f"{i}.txt").write_text(f"Street {i}.  Long.\nnot read", encoding="utf-8")
    with pytest.raises(DataError, match="2 images instead of 1,000, 2 captions instead of 1,000"):
        Urban1k(tmp_path)
    data = Urban1k(tmp_path, subset=True)
    assert [(data.captions(i), data[i]["image"].shape[2]) for i in range(2)] == [
        (["Street 11. Long."], 11),
        (["Street 2. Long."], 2),
    ]
    assert len(set(data.image_id.tolist())) == 2
    assert data.split == "test"
    (tmp_path / "caption" / "._2.txt").write_bytes(b"\0\xff")
    (tmp_path / "image" / "._2.jpg").write_bytes(b"\0\xff")
    assert len(Urban1k(tmp_path, check_counts=False)) == 2
    (tmp_path / "image" / "2.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"2\.jpg and 2\.png: two images for one caption"):
        Urban1k(tmp_path, check_counts=False)
    (tmp_path / "image" / "2.png").unlink()
    (tmp_path / "caption" / "3.txt").write_text("No image.")
    with pytest.raises(DataError, match=r"1 captions have no image in .*image: 3"):
        Urban1k(tmp_path, subset=True)
    (tmp_path / "caption" / "3.txt").unlink()
    Image.new("RGB", (1, 1)).save(tmp_path / "image" / "4.jpg")
    with pytest.raises(DataError, match=r"1 images have no caption in .*caption: 4"):
        Urban1k(tmp_path, subset=True)
    with pytest.raises(DataError, match="caption: no such folder"):
        Urban1k(tmp_path / "image")
