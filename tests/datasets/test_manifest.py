"""Every kind of manifest, written by independent writers, and every complaint."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from gmail_lightning.datasets import DataError, ImageDecodeError, ManifestDataset
from gmail_lightning.datasets.tables import columns as columns_module

KINDS = ("jsonl", "csv", "tsv", "parquet")
ROWS: list[dict[str, Any]] = [
    {"key": "k0", "image": "a.png", "caption": 'ein "Bär", süß', "modality": "real", "image_id": 7, "pair_id": 70},
    {
        "key": "k1",
        "image": "b.png",
        "caption": "two\r\nlines\tand 猫",
        "modality": "generated",
        "image_id": 7,
        "pair_id": 70,
    },
    {"key": "k2", "image": "a.png", "caption": " spaced\u2003out ", "modality": "1", "image_id": 8, "pair_id": None},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Writes rows as their file name says; None is an empty field."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if path.suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, color in (("a.png", (10, 20, 30)), ("b.png", (200, 100, 50))):
        Image.new("RGB", (5, 4), color).save(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_all_columns_come_through(folder: Path, kind: str) -> None:
    data = ManifestDataset(write(folder / f"rows.{kind}", ROWS), source="sd15")
    assert len(data) == 3
    assert data.modality.tolist() == [0, 1, 1]
    assert data.image_id.tolist() == [7, 7, 8]
    assert data.pair_id.tolist() == [70, 70, -1]
    assert data.picture()[0] == data.picture()[2] != data.picture()[1]
    rows = [data[i] for i in range(3)]
    assert [row["captions"] for row in rows] == [['ein "Bär", süß'], ["two lines and 猫"], ["spaced out"]]
    assert [row["source"] for row in rows] == ["real", "sd15", "sd15"]
    assert [row["sample_key"] for row in rows] == ["k0", "k1", "k2"]
    assert rows[0]["image"].shape == (3, 4, 5)
    assert torch.equal(rows[1]["image"][:, 0, 0], torch.tensor([200, 100, 50], dtype=torch.uint8))
    with pytest.raises(IndexError):
        data[3]


@pytest.mark.parametrize("kind", KINDS)
def test_two_columns_are_enough(folder: Path, kind: str) -> None:
    rows = [{"filepath": name, "title": text} for name, text in (("a.png", "1"), ("b.png", "null"), ("a.png", "NA"))]
    path = write(folder / f"rows.{kind}", rows)
    data = ManifestDataset(path, modality="generated", image_key="filepath", caption_key="title")
    assert [data.captions(i) for i in range(3)] == [["1"], ["null"], ["NA"]]
    assert data.modality.tolist() == [1, 1, 1]
    assert data.image_id[0] == data.image_id[2] != data.image_id[1]
    assert data.pair_id.tolist() == [-1, -1, -1]
    assert len({data.sample_key(i) for i in range(3)}) == 3
    assert data.source(0) == "generated"


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_lists_of_captions(folder: Path, kind: str) -> None:
    rows = [{"image": "a.png", "captions": ["x", "y\nz"]}, {"image": "b.png", "captions": ["w"]}]
    data = ManifestDataset(write(folder / f"rows.{kind}", rows), modality="real")
    assert [data.captions(i) for i in range(2)] == [["x", "y z"], ["w"]]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_labels_as_texts(folder: Path, kind: str) -> None:
    rows = [
        {"image": "a.png", "caption": "x", "pair_id": "p1", "image_id": "9", "label": "dog"},
        {"image": "a.png", "caption": "x", "pair_id": None, "image_id": "10", "label": None},
        {"image": "a.png", "caption": "x", "pair_id": "p1", "image_id": "9", "label": "cat"},
    ]
    data = ManifestDataset(write(folder / f"rows.{kind}", rows), modality="real")
    assert data.pair_id[0] == data.pair_id[2] > 0
    assert data.pair_id[1] == -1
    assert data.image_id.tolist() == [9, 10, 9]
    assert data.class_names == ["cat", "dog"]
    assert data.label is not None
    assert data.label.tolist() == [1, -1, 0]


def test_json_lines_whose_types_and_keys_differ(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[dict[str, Any]] = [
        {"image": "a.png", "caption": "x", "meta": {"a": 1}},
        {"image": "a.png", "caption": ["y", "z"], "image_id": "s7"},
        {"image": "a.png", "caption": "5", "pair_id": 3},
    ]
    for row in rows:
        row.setdefault("image_id", 7)
    expected = None
    for at_once in (100, 2, 1):
        monkeypatch.setattr(columns_module, "ROWS_AT_ONCE", at_once)
        data = ManifestDataset(write(folder / "rows.jsonl", rows), modality="real")
        assert [data.captions(i) for i in range(3)] == [["x"], ["y", "z"], ["5"]]
        assert data.pair_id.tolist() == [-1, -1, 3]
        assert data.image_id[0] == data.image_id[2] != data.image_id[1]
        expected = expected or data.image_id.tolist()
        assert data.image_id.tolist() == expected


def test_a_text_file_from_windows(folder: Path) -> None:
    (folder / "rows.csv").write_bytes("\ufeffimage,caption\r\na.png,x\r\n\r\nb.png,y\r\n".encode())
    (folder / "rows.jsonl").write_bytes(
        '\ufeff{"image": "a.png", "caption": "x"}\r\n\r\n{"image": "b.png", "caption": "y"}'.encode()
    )
    for kind in ("csv", "jsonl"):
        data = ManifestDataset(folder / f"rows.{kind}", modality="real")
        assert [data.captions(i) for i in range(2)] == [["x"], ["y"]]


def test_bytes_in_parquet(folder: Path) -> None:
    rows = [{"image": (folder / name).read_bytes(), "caption": "x"} for name in ("a.png", "b.png")]
    data = ManifestDataset(write(folder / "rows.parquet", rows), modality="real")
    assert data[1]["image"][:, 0, 0].tolist() == [200, 100, 50]


@pytest.mark.parametrize("kind", KINDS)
def test_captions_and_ids_stay_in_arrow_memory(folder: Path, kind: str) -> None:
    rows = [{"image": f"{i:06d}.png", "caption": f"a caption of a usual length, number {i}"} for i in range(3000)]
    path = write(folder / f"rows.{kind}", rows)
    before = pa.total_allocated_bytes()
    data = ManifestDataset(path, modality="real")
    held = pa.total_allocated_bytes() - before
    assert 0 < held / len(data) < 100  # bytes a row in Arrow; the columns of ids come to 24 more
    assert not any(isinstance(value, (list, dict)) for value in vars(data).values())


def bad(**changes: Any) -> list[dict[str, Any]]:
    """The three rows, the second changed."""
    return [ROWS[0], {**ROWS[1], **changes}, ROWS[2]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (bad(caption=" \n"), r"rows\.\w+ row 2 \(key 'k1'\): caption is empty.*1 such rows"),
        (bad(caption=None), r"row 2 \(key 'k1'\): caption is empty"),
        (bad(image=""), r"row 2 \(key 'k1'\): image is empty"),
        (bad(modality="fake"), r"row 2 \(key 'k1'\): unknown modality 'fake'.*real \(0\) or generated \(1\)"),
        (bad(modality=None), r"row 2 \(key 'k1'\): unknown modality"),
        (bad(key="k2"), "key 'k2' stands in row 2 and in row 3"),
        (bad(key=None), "row 2 .*key is empty"),
        (bad(image_id=None), r"row 2 \(key 'k1'\): image_id is empty"),
        ([{"image": "a.png", "caption": "x"}], r"no column modality \(found: image, caption\).*modality='real'"),
        ([{"file": "a.png", "text": "x"}], r"no column image, caption, modality \(found: file, text\)"),
    ],
)
def test_bad_rows_are_named(folder: Path, kind: str, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        ManifestDataset(write(folder / f"rows.{kind}", rows))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rows.jsonl", '{"image": "a", "caption": "x"}\n{"image": "b",', r"rows.jsonl line 2: not valid JSON"),
        ("rows.jsonl", '{"image": "a", "caption": "x"}\n[1]\n', "line 2: expected an object, found list"),
        ("rows.jsonl", "", "no rows"),
        ("rows.csv", "image,caption\na,x\nb,y,z\n", "line 3: 3 fields, but the header has 2.*double quotes"),
        ("rows.csv", "image,caption\n", "no rows"),
        ("rows.parquet", "nonsense", "not a readable Parquet file"),
        ("rows.txt", "a", "unknown kind of manifest '.txt'"),
        ("rows.jsonl", '{"image": "a", "caption": {"en": "x"}}\n', "row 1, caption: .*'en': 'x'.* is no text"),
        ("rows.jsonl", '{"image": "a", "caption": 2012}\n', "row 1, caption: 2012 is no text"),
        ("rows.jsonl", '{"image": "a", "caption": "x", "caption": "y"}\n', "line 1: .*caption stands there twice"),
        ("rows.jsonl", '{"image": "a", "caption": "x", "pair_id": true}\n', "row 1, pair_id: True is no id"),
        ("rows.csv", "image,caption,caption\na,x,y\n", "column caption stands there more than once"),
        ("rows.csv", 'image,caption\na,x\nb,"y" z\n', "rows.csv line 3: .*double quotes.*JSONL"),
        ("rows.csv", 'image,caption\na,x\nb,"y z\n', "rows.csv line 3: .*double quotes"),
        (
            "rows.csv",
            'image,caption\n1.png,"x\n2.png,y\n3.png,a 5"\n',
            "line 2: a quote opens there and closes in line 4",
        ),
        ("rows.tsv", 'image\tcaption\na\t"x\nb\ty 5"\n', "line 2: a quote opens there and closes in line 3"),
        ("rows.csv", f"image,caption\na,{'x' * 200_000}\n", "line 2: field larger than field limit.*JSONL"),
        ("rows.csv", "image,captions\na,\"['a dog' 'a cat']\"\n", "a list written as text"),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        ManifestDataset(tmp_path / name, modality="real")


def test_other_encodings_and_missing_files(folder: Path) -> None:
    for kind in ("csv", "jsonl"):
        (folder / f"latin.{kind}").write_bytes("image,caption\na.png,süß\n".encode("latin-1"))
        with pytest.raises(DataError, match=r"not UTF-8|not valid JSON"):
            ManifestDataset(folder / f"latin.{kind}", modality="real")
    with pytest.raises(DataError, match=r"none\.csv: no such manifest"):
        ManifestDataset(folder / "none.csv")
    with pytest.raises(ValueError, match="Unknown modality 'fake'"):
        ManifestDataset(write(folder / "rows.csv", ROWS), modality="fake")  # type: ignore[arg-type]
    data = ManifestDataset(write(folder / "rows.csv", [{**ROWS[0], "image": "gone.png"}]))  # images are read late
    with pytest.raises(ImageDecodeError, match=r"rows\.csv row 1 \(key 'k0'\): no file .*gone\.png"):
        data[0]
    (folder / "gone.png").write_text("nonsense")
    with pytest.raises(ImageDecodeError, match=r"rows\.csv row 1 \(key 'k0'\): the image does not decode"):
        data[0]


def test_integer_columns_are_not_copied_through_floats(folder: Path) -> None:
    large = 2**62 + 1
    rows = [{"image": "a.png", "caption": "x", "pair_id": large}, {"image": "a.png", "caption": "x", "pair_id": None}]
    for kind in KINDS:
        data = ManifestDataset(write(folder / f"rows.{kind}", rows), modality="real")
        assert np.array_equal(data.pair_id, [large, -1]), kind


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_questions(folder: Path, kind: str) -> None:
    rows = [
        {**row, "weight": w, "question": q}
        for row, w, q in zip(ROWS, (0.5, 0, 2), ("What?\n", None, "Who?"), strict=True)
    ]
    data = ManifestDataset(write(folder / f"rows.{kind}", rows))
    assert data.weight is not None
    assert data.weight.tolist() == [0.5, 0.0, 2.0]
    assert data.has_questions
    assert [data.question(i) for i in range(3)] == ["What?", "", "Who?"]
    plain = ManifestDataset(write(folder / f"plain.{kind}", ROWS))
    assert (plain.weight, plain.has_questions, plain.question(0)) == (None, False, None)
    for wrong in (-1, None) if kind == "parquet" else (-1, None, "much"):
        bad = [{**row, "weight": w} for row, w in zip(ROWS, (1, wrong, 1), strict=True)]
        with pytest.raises(DataError, match=r"row 2 .*weight is no number from 0 up"):
            ManifestDataset(write(folder / f"bad.{kind}", bad))


def test_columns_that_are_not_read_are_told(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("image,caption,pairid,url\n1.jpg,a cat,7,http://x\n")
    assert ManifestDataset(path, modality="real").summary == f"{path}: columns that are not read: pairid, url."
    path.write_text("image,caption,pair_id\n1.jpg,a cat,7\n")
    assert ManifestDataset(path, modality="real").summary is None


def test_a_class_may_be_called_none(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("image,caption,label\n1.jpg,a,cat\n2.jpg,b,none\n3.jpg,c,\n")
    data = ManifestDataset(path, modality="real")
    assert (data.class_names, data.label.tolist()) == (["cat", "none"], [0, 1, -1])
    path.write_text("image,caption,label\n1.jpg,a,3\n2.jpg,b,nan\n3.jpg,c,\n")
    data = ManifestDataset(path, modality="real")
    assert (data.class_names, data.label.tolist()) == (None, [3, -1, -1])


def test_half_of_a_character_and_the_text_none(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"image": "1.jpg", "caption": "a"}\n{"image": "2.jpg", "caption": "cut \\ud83d"}\n')
    with pytest.raises(DataError, match=r"row 2, caption: 'cut \\ud83d' holds half of a character"):
        ManifestDataset(path, modality="real")
    rows = [{"image": f"{n}.jpg", "caption": "a", "question": text} for n, text in enumerate(("none", 7, None))]
    path.write_text("\n".join(map(json.dumps, rows)))
    data = ManifestDataset(path, modality="real")
    assert [data.question(n) for n in range(3)] == ["none", "7", ""]


@pytest.mark.parametrize(
    ("text", "captions"),
    [
        ('image,caption\na.jpg,"two cats,\non a mat, in the sun"\nb.jpg,x\n', ["two cats, on a mat, in the sun", "x"]),
        ('image,caption\na.jpg,"see b.jpg\nand c.jpg"\n', ["see b.jpg and c.jpg"]),
        ('image,caption\na.jpg,"A dog.\nHowever, it is tired."\n', ["A dog. However, it is tired."]),
        ('image,caption\nmy dog.jpg,"A dog.\nIt is brown, and tired."\n', ["A dog. It is brown, and tired."]),
        ('caption,image\n"Look, a dog.\nIt is tired",b.jpg\n', ["Look, a dog. It is tired"]),
        ('image,caption\na.jpg,"STOP\nmy dog.jpg,a dog that says GO"\nc.jpg,z\n', "line 2: a quote opens there"),
        ('image,caption,label\na.jpg,"STOP,1\nb.jpg,a sign",1\nc.jpg,z,2\n', "line 2: a quote opens there"),
        ('image,caption,label\ra.jpg,"STOP,1\rb.jpg,a sign",1\rc.jpg,z,2\r', "line 2: a quote opens there"),
        ('caption,image\n"STOP,a.jpg\na sign that says GO",b.jpg\nz,c.jpg\n', "line 2: a quote opens there"),
        ("image,caption\na.jpg,\"['a dog', None]\"\n", "list written as text"),
        ("image,caption\na.jpg,['80s photo] of a mall [flash]\n", ["['80s photo] of a mall [flash]"]),
        ('image,caption\na,"x\nb,y"\nc,z\n', "line 2: a quote opens there and closes in line 3"),
        ('image,pair_id,caption\n0001,3,"a 5\n0002,4,a 6"\n', "line 2: a quote opens there and closes in line 3"),
    ],
)  # fmt: skip
def test_lines_within_quotes_are_a_text_or_rows(tmp_path: Path, text: str, captions: list[str] | str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(text)
    if isinstance(captions, str):
        with pytest.raises(DataError, match=captions):
            ManifestDataset(path, modality="real")
    else:
        data = ManifestDataset(path, modality="real")
        assert [data.captions(row)[0] for row in range(len(data))] == captions


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.list_(pa.string()), pa.large_list(pa.string()),
     pa.list_(pa.string(), 1), pa.list_(pa.string_view()), pa.dictionary(pa.int32(), pa.string())],
    ids=str,
)  # fmt: skip
def test_captions_of_every_type_that_arrow_has_for_texts(tmp_path: Path, kind: pa.DataType) -> None:
    values = ["a cat", "a dog"]
    if hasattr(kind, "value_field"):
        values = [[text] for text in values]
    columns = {"image": ["1.jpg", "2.jpg"], "caption": pa.array(values, kind)}
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    data = ManifestDataset(tmp_path / "rows.parquet", modality="real")
    assert [data.captions(row) for row in range(2)] == [["a cat"], ["a dog"]]


@pytest.mark.parametrize("name", ["image_id", "pair_id", "label"])
def test_an_id_is_no_list(tmp_path: Path, name: str) -> None:
    columns = {"image": ["1.jpg"], "caption": ["a cat"], name: pa.array([[1]])}
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=rf"column {name} cannot be list.*one integer or text"):
        ManifestDataset(tmp_path / "rows.parquet", modality="real")
