"""One rule for ids: what a value means, whatever states it, and what is one image, wherever it lies."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from gmail_lightning.datasets import CocoCaptions, DataError, ImageFolder, ImageTextDataset, ManifestDataset
from gmail_lightning.datasets.base import one_line, own_pair_ids
from gmail_lightning.datasets.ids import file_ids, id_column, id_number, id_text, stable_ids

BIG, NAN = 17_000_000_000_000_000_011, float("nan")


def draw(path: Path, shade: int, format: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (shade, 90, 30)).save(path, format)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((1, 1.0, "1", " 1 ", "1.0", "1.", "+1", np.int32(1), np.float32(1)), 1),
        ((0, 0.0, -0.0, "0", "-0", "0.0"), 0),
        ((None, NAN, "", "  ", "nan", "NaN", "<NA>", "null", "None", -1, -1.0, "-1"), -1),
        ((2**63 - 1, str(2**63 - 1)), 2**63 - 1),
        ((BIG, str(BIG), f" {BIG}.0"), int(stable_ids([str(BIG)])[0])),
        ((-5, "-5", -5.0), int(stable_ids(["-5"])[0])),
        (("x3", " x3\n"), int(stable_ids(["x3"])[0])),
        (("é", "é"), int(stable_ids(["é"])[0])),
        (("007",), int(stable_ids(["007"])[0])),
    ],
)
def test_a_value_is_one_number(values: tuple[Any, ...], expected: int) -> None:
    assert {id_number(value) for value in values} == {expected}
    for value in values:
        kind = pa.uint64() if value == BIG else None
        assert id_column(pa.chunked_array([pa.array([value, value], kind)])).tolist() == [expected] * 2


@pytest.mark.parametrize("value", [2.0**60, float("inf"), True, b"x", [1]])
def test_what_is_no_id_is_refused(value: Any) -> None:
    with pytest.raises(DataError, match=r"no (exact )?id"):
        id_text(value)


def test_columns_of_every_type_agree() -> None:
    for kind in (pa.int8(), pa.int64(), pa.uint64(), pa.float32(), pa.float64(), pa.string(), pa.large_string()):
        values = ["3", "44", None] if kind in (pa.string(), pa.large_string()) else [3, 44, None]
        column = pa.chunked_array([pa.array(values, kind), pa.array([], kind)])
        assert id_column(column).tolist() == [3, 44, -1], kind
        named = id_column(column, "mine").tolist()
        assert named == [*stable_ids(["mine/3", "mine/44"]).tolist(), -1], kind
    with pytest.raises(DataError, match=r"row 2: 1\.15"):
        id_column(pa.chunked_array([[1.0, 2.0**60]]))


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    sign = "\t" if path.suffix == ".tsv" else ","
    lines = [sign.join("" if v is None else str(v) for v in row.values()) for row in rows]
    path.write_text("\n".join([sign.join(rows[0]), *lines, ""]))
    return path


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    kinds = {name: pa.uint64() if BIG in values else None for name, values in columns.items()}
    pq.write_table(pa.table({name: pa.array(values, kinds[name]) for name, values in columns.items()}), path)
    return path


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], Path]] = {
    "jsonl": jsonl,
    "csv": csv,
    "tsv": csv,
    "parquet": parquet,
}


@pytest.mark.parametrize("values", [[1, 2, None], [1.0, NAN, 2.0], ["1", "2", "x3"], [-5, 7, 8], [BIG, 7, 1]])
def test_every_kind_of_file_gives_the_same_ids(tmp_path: Path, values: list[Any]) -> None:
    rows = [{"image": f"{i}.png", "caption": "a cup", "pair_id": value} for i, value in enumerate(values)]
    expected = [id_number(value) for value in values]
    for kind, write in WRITERS.items():
        data = ManifestDataset(write(tmp_path / f"rows.{kind}", rows), modality="real")
        assert data.pair_id.tolist() == expected, kind


@pytest.mark.parametrize("value", [7, "7", 7.0, BIG, "k7-mug-a", -3])
def test_cocos_ids_are_those_of_a_manifest(tmp_path: Path, value: Any) -> None:
    image = {"id": value, "file_name": "a.jpg"}
    caption = {"id": value, "image_id": value, "caption": "a cup"}
    (tmp_path / "c.json").write_text(json.dumps({"images": [image], "annotations": [caption]}))
    coco = CocoCaptions(tmp_path / "c.json", tmp_path)
    row = {"image": "a.jpg", "caption": "a cup", "image_id": value, "pair_id": value}
    data = ManifestDataset(jsonl(tmp_path / "a.jsonl", [row]), modality="real")
    assert coco.image_id.tolist() == data.image_id.tolist() == coco.pair_id.tolist() == data.pair_id.tolist()
    apart = CocoCaptions(tmp_path / "c.json", tmp_path, space="vizwiz")
    assert apart.image_id.tolist() == [id_number(value, "vizwiz")] != coco.image_id.tolist()


@pytest.mark.parametrize("value", [None, NAN, "", -1])
def test_missing_ids_are_refused_or_none(tmp_path: Path, value: Any) -> None:
    coco = {
        "images": [{"id": 1, "file_name": "a.jpg"}],
        "annotations": [{"id": value, "image_id": 1, "caption": "a cup"}],
    }
    (tmp_path / "c.json").write_text(json.dumps(coco))
    with pytest.raises(DataError, match=r"c\.json: caption_id of a\.jpg is"):
        CocoCaptions(tmp_path / "c.json", tmp_path)
    row = {"image": "a.jpg", "caption": "a cup", "pair_id": value, "label": value}
    data = ManifestDataset(jsonl(tmp_path / "a.jsonl", [row, {**row, "label": 0.0}]), modality="real")
    assert data.pair_id.tolist() == [-1, -1]
    assert data.label is not None
    assert data.label.tolist() == [-1, 0]
    with pytest.raises(DataError, match="image_id is empty"):
        ManifestDataset(jsonl(tmp_path / "b.jsonl", [{**row, "image_id": value}]), modality="real")


def folder(root: Path) -> ImageTextDataset:
    return ImageFolder(root)


def manifest(root: Path) -> ImageTextDataset:
    rows = [{"image": f"{name}/{i}.png", "caption": f"{name} {i}"} for name in ("cat", "dog") for i in range(2)]
    return ManifestDataset(jsonl(root / "rows.jsonl", rows), modality="real")


@pytest.mark.parametrize("read", [folder, manifest])
def test_images_are_known_wherever_they_lie(tmp_path: Path, read: Callable[[Path], ImageTextDataset]) -> None:
    for number, root in enumerate(("one", "two")):
        for name in ("cat", "dog"):
            for i in range(2):
                draw(tmp_path / root / name / f"{i}.png", 100 * number + 10 * i + (name == "dog"))
    one, two = read(tmp_path / "one"), read(tmp_path / "two")
    assert len({*one.image_id.tolist(), *two.image_id.tolist()}) == 8  # equal names, other images
    assert one.image_id.tolist() == folder(tmp_path / "one").image_id.tolist()  # whichever data set reads them
    assert len({*one.pair_id.tolist(), *two.pair_id.tolist(), -1}) == 9  # each real row has a pair of its own
    shutil.move(tmp_path / "one", tmp_path / "three")
    moved = read(tmp_path / "three")
    assert moved.image_id.tolist() == one.image_id.tolist()
    assert moved.pair_id.tolist() == one.pair_id.tolist()


def test_a_path_may_be_written_in_any_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(2):
        draw(tmp_path / "data" / "cat" / f"{i}.png", i)
    (tmp_path / "link").symlink_to(tmp_path / "data" / "cat")
    monkeypatch.chdir(tmp_path)
    expected = file_ids("data", ["cat/0.png", "cat/1.png"]).tolist()
    assert len(set(expected)) == 2
    for root, files in (
        ("data/cat", ["0.png", "1.png"]),
        (tmp_path, ["data/cat/0.png", "./data//cat/../cat/1.png"]),
        ("nowhere", [str(tmp_path / "data/cat/0.png"), str(tmp_path / "link/1.png")]),
    ):
        assert file_ids(root, files).tolist() == expected


def test_folders_that_only_begin_alike(tmp_path: Path) -> None:
    """As two videos that begin in black, of one data set or of two."""
    for name in ("a", "b"):
        draw(tmp_path / name / "0.png", 0)
    Image.new("RGB", (8, 6)).save(tmp_path / "a" / "1.png")
    Image.new("RGB", (80, 60)).save(tmp_path / "b" / "1.png")
    assert len({*file_ids(tmp_path / "a", ["1.png"]), *file_ids(tmp_path / "b", ["1.png"])}) == 2
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    assert len(set(file_ids(tmp_path, ["a/1.png", "c/1.png"]).tolist())) == 1  # a copy is the same image
    for name, grey in (("a", 10), ("b", 20)):
        Image.new("L", (8, 6), grey).save(tmp_path / name / "2.bmp")
    assert len(set(file_ids(tmp_path, ["a/2.bmp", "b/2.bmp"]).tolist())) == 2  # of one size, but small
    for name, grey in (("a", 10), ("b", 20), ("d", 30)):
        picture = Image.new("L", (300, 300))
        picture.paste(grey, (0, 100, 300, 200))  # as a film with bars above and below: of one size, and of one head
        draw(tmp_path / name / "0.png", 0)
        picture.save(tmp_path / name / "2.bmp")
    assert len(set(file_ids(tmp_path, ["a/2.bmp", "b/2.bmp", "d/2.bmp"]).tolist())) == 3
    before = file_ids(tmp_path, ["b/2.bmp"])
    draw(tmp_path / "b" / "-.png", 0)  # before all others
    shutil.copytree(tmp_path / "b", tmp_path / "e", ignore=lambda *_: ["0.png"])
    assert file_ids(tmp_path, ["b/2.bmp", "e/2.bmp"]).tolist() == [before, before]
    assert len({*file_ids(tmp_path / "a", ["2.bmp"], "a"), *file_ids(tmp_path / "b", ["2.bmp"], "b")}) == 2


def test_images_that_are_added_behind_or_have_no_suffix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("000", "001"):
        draw(tmp_path / "data" / name, int(name), format="PNG")
    (tmp_path / "data" / "about.json").write_text("{}")
    before = file_ids(tmp_path, ["data/000", "data/001"])
    draw(tmp_path / "data" / "002", 2, format="PNG")
    (tmp_path / "data" / "about.json").write_text("{1}")
    monkeypatch.chdir(tmp_path)
    assert file_ids("data", ["000", "001"]).tolist() == before.tolist()
    shutil.move(tmp_path / "data", tmp_path / "moved")
    assert file_ids("moved", ["000", "001"]).tolist() == before.tolist()


def test_files_that_are_not_there_go_by_their_real_path_or_by_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert file_ids("x", ["a.png"]).tolist() == file_ids(tmp_path / "y", ["../x/a.png"]).tolist()
    assert len({*file_ids("x", ["a.png"]), *file_ids("y", ["a.png"])}) == 2
    assert file_ids("x", ["a.png"], "mine").tolist() == file_ids("y", ["./a.png"], "mine").tolist()


@pytest.mark.parametrize("kind", ["csv", "jsonl", "coco"])
def test_a_pair_does_not_depend_on_the_rows_beside_it(tmp_path: Path, kind: str) -> None:
    """Nor on their order; rows that are equal in all are two."""
    texts = ["a cup", "a mug", "a jug", "a cup", "a cup"]
    images = ["1", "1", "2", "1", "2"]

    def read(rows: list[int]) -> ImageTextDataset:
        if kind == "coco":
            content = {
                "images": [{"id": int(i), "file_name": f"{i}.png"} for i in sorted({images[row] for row in rows})],
                "annotations": [{"id": row, "image_id": int(images[row]), "caption": texts[row]} for row in rows],
            }
            (tmp_path / "c.json").write_text(json.dumps(content))
            return CocoCaptions(tmp_path / "c.json", tmp_path)
        entries = [{"image": f"{images[row]}.png", "caption": texts[row]} for row in rows]
        if kind == "jsonl":
            return ManifestDataset(jsonl(tmp_path / "a.jsonl", entries), modality="real")
        lines = "\n".join(f"{entry['image']},{entry['caption']}" for entry in entries)
        (tmp_path / "a.csv").write_text(f"image,caption\n{lines}\n")
        return ManifestDataset(tmp_path / "a.csv", modality="real")

    whole = read([0, 1, 2, 3, 4]).pair_id
    assert len(set(whole.tolist())) == 5
    for rows in ([0], [1], [2], [4], [2, 1, 0], [1, 4]):
        assert read(rows).pair_id.tolist() == whole[rows].tolist()


def test_a_pair_depends_on_the_question_and_not_on_white_space(tmp_path: Path) -> None:
    asked = [{"image": "1.png", "caption": "yes", "question": text} for text in ("Is it red?", "Is it big?")]
    both = ManifestDataset(jsonl(tmp_path / "a.jsonl", asked), modality="real").pair_id.tolist()
    assert ManifestDataset(jsonl(tmp_path / "b.jsonl", asked[1:]), modality="real").pair_id.tolist() == both[1:]
    assert len(set(both)) == 2
    rows = [{"image": f"{i}.png", "caption": text} for i, text in ((1, "a  cup"), (2, "a jug"))]
    tidy = [{"image": f"{i}.png", "caption": text} for i, text in ((1, "a cup\n"), (2, "a jug"))]
    found = [
        ManifestDataset(jsonl(tmp_path / f"{n}.jsonl", each), modality="real") for n, each in enumerate((rows, tidy))
    ]
    assert found[0].pair_id.tolist() == found[1].pair_id.tolist()


def test_bytes_go_by_their_content(tmp_path: Path) -> None:
    for i in range(3):
        draw(tmp_path / f"{i}.png", 50 * i)
    pictures = [(tmp_path / f"{i}.png").read_bytes() for i in (0, 1, 2, 0)]
    rows = [{"image": picture, "caption": f"cup {i}"} for i, picture in enumerate(pictures)]
    one = ManifestDataset(parquet(tmp_path / "one.parquet", rows), modality="real")
    two = ManifestDataset(parquet(tmp_path / "two.parquet", rows[::-1]), modality="real")
    assert one.image_id.tolist() == two.image_id.tolist()[::-1]
    assert one.pair_id.tolist() == two.pair_id.tolist()[::-1]
    assert len(set(one.image_id.tolist())) == 3
    assert len(set(one.pair_id.tolist())) == 4
    keys = [one.sample_key(i) for i in range(4)]
    assert len(set(keys)) == 4
    assert {key[:16] for key in keys} == {two.sample_key(i)[:16] for i in range(4)}
    nested = pa.array([{"bytes": picture, "path": "x.png"} for picture in pictures])
    pq.write_table(pa.table({"image": nested, "caption": ["a"] * 4}), tmp_path / "hub.parquet")
    hub = ManifestDataset(tmp_path / "hub.parquet", modality="real")
    assert hub.image_id.tolist() == one.image_id.tolist()
    assert hub.image(1).shape == (3, 6, 8)


def test_own_pairs_go_by_image_and_captions(tmp_path: Path) -> None:
    rows = [
        {"image": "a.png", "caption": "one"},
        {"image": "a.png", "caption": "two"},
        {"image": "b.png", "caption": "one"},
        {"image": "a.png", "caption": "one"},
    ]
    data = ManifestDataset(jsonl(tmp_path / "a.jsonl", rows), modality="real")
    again = ManifestDataset(jsonl(tmp_path / "b.jsonl", [rows[i] for i in (2, 1, 0)]), modality="real")
    assert len(set(data.pair_id.tolist())) == 4
    assert again.pair_id.tolist() == data.pair_id[[2, 1, 0]].tolist()
    generated = ManifestDataset(tmp_path / "a.jsonl", modality="generated")
    assert own_pair_ids(generated).tolist() == generated.pair_id.tolist() == [-1] * 4


def test_stable_ids_are_pinned() -> None:
    names = ["a", "b/ü.png", ""]
    expected = [int.from_bytes(hashlib.blake2b(n.encode(), digest_size=8).digest(), "little") // 2 for n in names]
    assert stable_ids(names).tolist() == expected
    assert min(expected) >= 0


def test_one_line() -> None:
    assert one_line(" a\r\nb\u2028c\t d ") == "a b c d"
