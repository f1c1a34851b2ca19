"""Captions in parts become the file that a plain program would write, whatever came in between."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from gmail_lightning.generation import parts as parts_module
from gmail_lightning.generation.captions import CaptionFile, unlisted_rows


def plain(rows: list[dict]) -> str:
    """The first caption of each image, as one would write them who has all in memory."""
    first: dict[int, dict] = {}
    for row in rows:
        first.setdefault(row["image_id"], row)
    return "[\n" + ",\n".join(json.dumps(first[image_id]) for image_id in sorted(first)) + "\n]\n"


def entries(count: int, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    ids = rng.integers(-(2**62), 2**62, count).tolist()
    words = ["a dog", 'a "quoted"\\ 狗', "\ud83d", "", "x" * 300]
    return [{"image_id": image_id, "caption": f"{words[i % 5]} {i}"} for i, image_id in enumerate(ids)]


def launch(path: Path, rows: list[dict], world: int, batches: int | None = None, record: str = "") -> CaptionFile:
    file = CaptionFile(path, len(rows), {"record": record}, seconds=0.0)
    missing, _ = file.begin()
    for process in range(world):
        own = CaptionFile(path, len(rows), {"record": record}, seconds=1e6)
        for row_id in np.array_split(missing[process::world], 5)[:batches]:
            own.add(row_id, [rows[row] for row in row_id.tolist()])
        own.parts.flush()
    return file


@pytest.mark.parametrize("worlds", [(1, 2), (2, 1), (3, 2)])
def test_interrupted_at_one_world_size_and_ended_at_another(tmp_path: Path, worlds: tuple[int, int]) -> None:
    rows = entries(57)
    path = tmp_path / "out.json"
    first = launch(path, rows, worlds[0], batches=2)
    there = sorted(set(range(57)) - set(first.parts.missing().tolist()))
    assert 0 < len(there) < 57
    message, warning = first.finish()
    assert path.read_text() == plain([rows[row] for row in there])
    assert warning is None
    assert f"{57 - len(there)} of 57 are missing" in message
    second = launch(path, rows, worlds[1])
    assert second.finish().message == f"Captions of 57 images: {path}"
    assert path.read_bytes() == plain(rows).encode()
    assert [left.name for left in tmp_path.iterdir()] == ["out.json"]


def test_rows_that_a_relaunch_makes_again_are_no_repetition(tmp_path: Path) -> None:
    rows = entries(9)
    file = launch(tmp_path / "out.json", rows, 1)
    file.add(np.array([0, 4]), [rows[0], rows[4]])
    file.parts.flush()
    assert file.finish().warning is None
    assert (tmp_path / "out.json").read_text() == plain(rows)


def test_images_that_come_twice_keep_their_first_caption(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    rows = [{"image_id": int(i), "caption": f"{rng.integers(2)}"} for i in rng.integers(0, 30, 100)]
    file = CaptionFile(tmp_path / "out.json", None, {})
    file.begin()
    for process, share in enumerate((rows[:37], rows[37:])):  # as two ranks of a loader of one's own
        made = 0
        for start in range(0, len(share), 10):
            batch = share[start : start + 10]
            file.add(unlisted_rows(process, made, len(batch)), batch)
            made += len(batch)
    file.parts.flush()
    _, warning = file.finish()
    assert (tmp_path / "out.json").read_text() == plain(rows)
    first: dict[int, dict] = {}
    others = [row for row in rows if first.setdefault(row["image_id"], row) is not row]
    differ = sum(row["caption"] != first[row["image_id"]]["caption"] for row in others)
    assert 0 < differ < len(others)
    assert warning is not None
    assert warning.startswith(f"{len(others)} captions are of an image_id that came before, such as ")
    assert f"such as {others[0]['image_id']}; {differ} of them differ" in warning
    assert not (tmp_path / "out.json.parts").exists()


def test_captions_of_something_else_are_not_mixed_in(tmp_path: Path) -> None:
    rows = entries(20)
    launch(tmp_path / "out.json", rows, 1, batches=2, record="old")
    file = CaptionFile(tmp_path / "out.json", 20, {"record": "new"})
    missing, removed = file.begin()
    assert missing.tolist() == list(range(20))
    assert removed == "record: 'old' there, 'new' now"
    unlisted = CaptionFile(tmp_path / "out.json", None, {"record": "new"})
    assert "not known beforehand" in str(unlisted.begin()[1])
    assert unlisted.finish().message.startswith("Captions of 0 images")
    assert json.loads((tmp_path / "out.json").read_text()) == []


@pytest.mark.slow
def test_memory_does_not_hold_all_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts_module, "PART_BYTES", 2**18)
    count, size = 8000, 2000  # 16 MB of captions
    file = CaptionFile(tmp_path / "out.json", count, {}, seconds=1e6)
    file.begin()
    tracemalloc.start()
    for start in range(0, count, 50):
        row_id = np.arange(start, start + 50)
        file.add(row_id, [{"image_id": int(row) * 7919 % 8009, "caption": f"{row:0{size}d}"} for row in row_id])
    file.parts.flush()
    file.finish()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "out.json").stat().st_size > count * size
    assert peak < 3 * 2**20
