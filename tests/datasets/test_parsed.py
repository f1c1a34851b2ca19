"""Files of annotations are parsed once, and again when they change."""

import json
import os
from pathlib import Path

import pytest

from gmail_lightning.datasets import CocoCaptions, Flickr30k, ManifestDataset, ShareGPT4V
from gmail_lightning.datasets.base import DataError
from gmail_lightning.datasets.tables import parsed


def karpathy(path: Path, caption: str = "a cat") -> Path:
    images = [
        {
            "filename": f"{number}.jpg",
            "split": split,
            "sentences": [{"raw": f"{caption} {number}", "sentid": number}],
            "cocoid": number,
        }
        for number, split in enumerate(("train", "val"))
    ]
    path.write_text(json.dumps({"images": images, "dataset": "coco"}), encoding="utf-8")
    return path


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose JSON is parsed."""
    found: list[Path] = []
    read = parsed.read_json

    def watched(path: Path) -> object:
        found.append(path)
        return read(path)

    monkeypatch.setattr("gmail_lightning.datasets.coco.read_json", watched)
    return found


def test_the_splits_of_a_file_are_parsed_together(tmp_path: Path, reads: list[Path]) -> None:
    path = karpathy(tmp_path / "dataset_coco.json")
    train = CocoCaptions(path, tmp_path, split="train")
    val = CocoCaptions(path, tmp_path, split="val")
    generated = CocoCaptions(path, tmp_path / "generated", "generated", split="val")
    assert [data.captions(0) for data in (train, val, generated)] == [["a cat 0"], ["a cat 1"], ["a cat 1"]]
    assert reads == [path]
    os.utime(path, ns=(1, 1))  # changed, for all that is known
    CocoCaptions(path, tmp_path, split="val")
    assert reads == [path, path]


def test_large_files_are_parsed_once_on_a_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[Path]
) -> None:
    monkeypatch.setattr(parsed, "LARGE", 0)
    monkeypatch.setenv("GMAIL_LIGHTNING_CACHE", str(tmp_path / "cache"))
    path = karpathy(tmp_path / "dataset_coco.json")
    first = CocoCaptions(path, tmp_path, split="val")
    parsed._shared.clear()  # as in another process
    again = CocoCaptions(path, tmp_path, split="val")
    assert reads == [path]
    assert again.captions(0) == first.captions(0) == ["a cat 1"]
    assert again.image_id.tolist() == first.image_id.tolist() == [1]
    parsed._shared.clear()
    (kept,) = (tmp_path / "cache").glob("annotations-*.arrow")
    kept.write_bytes(b"cut")
    assert CocoCaptions(path, tmp_path, split="val").captions(0) == ["a cat 1"]
    assert reads == [path, path]
    karpathy(path, "one dog")
    assert CocoCaptions(path, tmp_path, split="val").captions(0) == ["one dog 1"]
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    karpathy(path, "two dog")  # of the same size
    os.utime(path, ns=times)
    assert CocoCaptions(path, tmp_path, split="val").captions(0) == ["two dog 1"]
    assert len(list((tmp_path / "cache").glob("annotations-*.arrow"))) == 1  # the new rows replace the old


def test_without_a_cache_that_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[Path]
) -> None:
    monkeypatch.setattr(parsed, "LARGE", 0)
    (tmp_path / "file").touch()
    monkeypatch.setenv("GMAIL_LIGHTNING_CACHE", str(tmp_path / "file"))
    path = karpathy(tmp_path / "dataset_coco.json")
    assert CocoCaptions(path, tmp_path, split="val").captions(0) == ["a cat 1"]
    assert reads == [path]


def test_data_sets_of_one_manifest_share_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("image,caption\n1.jpg,a cat\n", encoding="utf-8")
    first = ManifestDataset(path, modality="real")
    monkeypatch.setattr("gmail_lightning.datasets.tables.columns.csv_records", None)  # not read again
    assert ManifestDataset(path, modality="generated").captions(0) == first.captions(0)
    monkeypatch.undo()
    path.write_text("image,caption\n1.jpg,one dog\n", encoding="utf-8")
    assert ManifestDataset(path, modality="real").captions(0) == ["one dog"]


@pytest.mark.parametrize("large", [0, 1 << 20])
def test_faults_are_told_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: int) -> None:
    monkeypatch.setattr(parsed, "LARGE", large)
    monkeypatch.setenv("GMAIL_LIGHTNING_CACHE", str(tmp_path / "cache"))
    broken = tmp_path / "broken.json"
    broken.write_text('[{"image": "a.jpg"}]', encoding="utf-8")
    readers = [lambda: CocoCaptions(broken, tmp_path), lambda: Flickr30k(broken, tmp_path)]
    readers += [lambda: ShareGPT4V(broken, tmp_path), lambda: CocoCaptions(tmp_path / "no.json", tmp_path)]
    for read in readers * 2:
        with pytest.raises(DataError, match=r"broken.json( entry 1)?: |no such annotation file"):
            read()
