"""Parts: what is missing after any interruption, and what becomes of it."""

from pathlib import Path

import numpy as np
import pytest

from gmail_lightning.generation import parts as module
from gmail_lightning.generation.parts import Parts, first_difference, with_work_for_all, write_part
from gmail_lightning.generation.whole_files import whole_file


def collected(parts: Parts) -> dict[int, list[float]]:
    return {int(row): values.tolist() for rows, columns in parts.read()
            for row, values in zip(rows, columns["value"], strict=True)}  # fmt: skip


@pytest.mark.parametrize("worlds", [(1, 1), (3, 2), (2, 5)])
def test_launches_of_any_size_make_each_row_once(tmp_path: Path, worlds: tuple[int, int]) -> None:
    """Every process of the first launch is killed after another number of batches, and the second ends it."""
    count, rng = 50, np.random.default_rng(0)
    wanted = rng.normal(size=(count, 2))
    made = np.zeros(count, dtype=int)
    for launch, world in enumerate(worlds):
        first = Parts(tmp_path, count, {"of": "test"}, seconds=0.0)
        assert first.difference(first_difference) is None
        first.open()
        missing = first.missing()
        assert missing.tolist() == np.flatnonzero(made == 0).tolist()
        for process in range(world):
            parts = Parts(tmp_path, count, {"of": "test"}, seconds=0.0)
            batches = np.array_split(missing[process::world], 4)
            for row_id in batches[: process + 1] if launch == 0 else batches:
                parts.add(row_id, {"value": wanted[row_id]})
                made[row_id] += 1
            parts.flush()
    assert (made == 1).all()
    assert len(first.missing()) == 0
    assert collected(first) == {row: wanted[row].tolist() for row in range(count)}


def test_rows_are_kept_until_time_or_size_asks_for_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART_BYTES", 1000)
    parts = Parts(tmp_path, 100, {}, seconds=1e6)
    parts.open()

    def written() -> list[int]:
        return sorted(len(rows) for rows, _ in parts.read())

    for start in range(0, 40, 10):
        parts.add(np.arange(start, start + 10), {"value": np.zeros((10, 4))})  # 320 bytes a batch
    assert written() == [30]  # a fourth would be more than 1000
    parts.add(np.array([40]), {"value": np.full((1, 4), 1.0)})
    parts.flush()
    parts.flush()
    assert written() == [11, 30]
    texts = [np.array([b"short"] * 9), np.array([b"l" * 200])]  # together they would take ten times the longest
    for row_id, column in zip((np.arange(50, 59), np.arange(59, 60)), texts, strict=True):
        parts.add(row_id, {"text": column})
    parts.flush()
    sizes = [columns["text"].nbytes for _, columns in parts.read() if "text" in columns]
    assert sizes == [45, 200]


def test_what_a_killed_process_was_writing_is_no_part(tmp_path: Path) -> None:
    parts = Parts(tmp_path, 4, {"layer": None})
    parts.open()
    write_part(tmp_path, np.array([1, 3]), {"value": np.zeros(2)})
    (tmp_path / "0000000000-abc.npz.tmp-0123").write_bytes(b"half")
    assert parts.missing().tolist() == [0, 2]
    parts.open()
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".npz"]
    assert parts.missing().tolist() == [0, 2]
    other = Parts(tmp_path, 4, {"layer": -2})
    assert other.difference(first_difference) == "layer: None there, -2 now"
    parts.remove()
    assert not tmp_path.exists()


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    def half() -> None:
        with whole_file(tmp_path / "a.txt") as file:
            file.write(b"half")
            assert not (tmp_path / "a.txt").exists()
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        half()
    assert list(tmp_path.iterdir()) == []
    with whole_file(tmp_path / "a.txt") as file:
        file.write(b"whole")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_bytes() == b"whole"


@pytest.mark.parametrize(
    ("missing", "count", "processes", "expected"),
    [([], 9, 2, [0, 1]), ([7], 9, 2, [0, 1, 7]), ([3, 7], 9, 2, [3, 7]), ([], 2, 4, [0, 1]), ([1], 9, 1, [1])],
)
def test_no_process_is_idle(missing: list[int], count: int, processes: int, expected: list[int]) -> None:
    rows = with_work_for_all(np.array(missing, dtype=np.int64), count, processes)
    assert rows.tolist() == expected
