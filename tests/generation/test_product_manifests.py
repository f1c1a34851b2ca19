"""Manifests of products: what is read back, what is left out, and that no product is in both splits."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from gmail_lightning.datasets import DataError, ManifestDataset
from gmail_lightning.generation.product_manifests import (
    deepfashion_manifests,
    is_test,
    main,
    product_csv_manifests,
)

VIEWS = ("01_1_front", "01_2_side", "01_7_additional", "02_1_front")
NAMES = [
    f"{group}-{category}-id_{number:08d}-{view}.jpg"
    for group, category in (("MEN", "Denim"), ("WOMEN", "Blouses_Shirts"), ("WOMEN", "Dresses"))
    for number in range(20)
    for view in VIEWS[: 2 + number % 3]
]


def picture(path: Path, value: int = 9) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (2, 3), (value, value, value)).save(path)


@pytest.fixture
def deepfashion(tmp_path: Path) -> Path:
    """The layout of DeepFashion-MultiModal: ``captions.json`` beside the folder ``images``."""
    for name in NAMES:
        picture(tmp_path / "images" / name)
    texts = {name: f"This piece is  number\n{i}." for i, name in enumerate(NAMES)}
    (tmp_path / "captions.json").write_text(json.dumps(texts))
    return tmp_path


def of_name(name: str) -> str:
    return name[: name.index("id_") + len("id_00000000")]


def test_deepfashion_by_group_and_product(deepfashion: Path) -> None:
    written = deepfashion_manifests(deepfashion / "captions.json", deepfashion / "images", deepfashion / "out", 0.3)
    names = [f"fashion_{group}_{split}.parquet" for group in ("man", "woman") for split in ("train", "test")]
    assert sorted(written.rows) == sorted(deepfashion / "out" / name for name in names)
    assert not written.skipped
    found = {path: [Path(p).name for p in pq.read_table(path)["image"].to_pylist()] for path in written.rows}
    assert sorted(name for images in found.values() for name in images) == sorted(NAMES), "every image once"
    for path, images in found.items():
        assert {name.partition("-")[0] for name in images} == {"MEN" if "_man_" in path.name else "WOMEN"}
        assert written.products[path] == len({of_name(name) for name in images})
    for group in ("man", "woman"):
        train, test = ({of_name(n) for n in found[p]} for p in sorted(found, reverse=True) if f"_{group}_" in p.name)
        assert not train & test
        assert len(train | test) == {"man": 20, "woman": 40}[group]
    assert pq.read_table(deepfashion / "out" / names[0])["product"][0].as_py().startswith("MEN-Denim-id_000000")


def test_a_manifest_is_read_as_it_stands(deepfashion: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(deepfashion)
    deepfashion_manifests("captions.json", "images", "a/out", 0.3)
    monkeypatch.chdir("/")
    data = ManifestDataset(deepfashion / "a" / "out" / "fashion_man_train.parquet")
    name = Path(data.sample_key(0)).name.partition("#")[0]
    assert data.captions(0) == [f"This piece is number {NAMES.index(name)}."]
    assert torch.equal(data[0]["image"][:, 0, 0], torch.tensor([9, 9, 9], dtype=torch.uint8))
    assert not data.modality.any()


def test_the_split_is_of_the_product_alone(deepfashion: Path) -> None:
    """Other images, another order, another folder change nothing."""
    texts = json.loads((deepfashion / "captions.json").read_text())
    deepfashion_manifests(deepfashion / "captions.json", deepfashion / "images", deepfashion / "a", 0.3)
    fewer = {name: texts[name] for name in reversed(NAMES) if not name.endswith("side.jpg")}
    (deepfashion / "fewer.json").write_text(json.dumps(fewer))
    deepfashion_manifests(deepfashion / "fewer.json", deepfashion / "images", deepfashion / "b" / "c", 0.3)
    for name in ("fashion_man_test.parquet", "fashion_woman_train.parquet"):
        first, second = (pq.read_table(deepfashion / folder / name) for folder in ("a", "b/c"))
        assert set(first["product"].to_pylist()) == set(second["product"].to_pylist())


def test_the_share_is_that_of_the_products() -> None:
    names = [f"WOMEN-Dresses-id_{number:08d}" for number in range(20_000)]
    for share in (0.1, 0.5):
        found = sum(is_test(name, share) for name in names) / len(names)
        assert abs(found - share) < 5 * (share * (1 - share) / len(names)) ** 0.5
    assert {n for n in names if is_test(n, 0.1)} < {n for n in names if is_test(n, 0.5)}


def test_what_is_skipped_is_counted(deepfashion: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = json.loads((deepfashion / "captions.json").read_text())
    texts |= {NAMES[0]: " \n", "KIDS-Dresses-id_00000001-01_1_front.jpg": "a", "WOMEN-Dresses.jpg": "a"}
    texts["../MEN-Denim-id_00000001-01_1_front.jpg"] = "a"
    (deepfashion / "images" / NAMES[5]).unlink()
    (deepfashion / "captions.json").write_text(json.dumps(texts))
    main([*("deepfashion", f"{deepfashion}/captions.json", f"{deepfashion}/images", f"{deepfashion}/out")])
    said = capsys.readouterr().out
    assert "3 with another name than (MEN|WOMEN)-CATEGORY-id_NUMBER-VIEW.jpg" in said
    assert "1 with an empty caption" in said
    assert "1 without an image file" in said
    rows = sum(pq.read_metadata(path).num_rows for path in (deepfashion / "out").iterdir())
    assert rows == len(NAMES) - 2
    assert said.count(".parquet: ") == 4


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[]", "expected an object"),
        ("{", "not valid JSON"),
        ('{"a.jpg": ["a"]}', "'a.jpg' has list, expected a text"),
        ('{"a.jpg": "a", "a.jpg": "b"}', "'a.jpg' stands there 2 times"),
        ("{}", "nothing is left to write. skipped: nothing"),
        ('{"a.jpg": "a"}', "nothing is left to write. skipped: 1 with another name"),
        ('{"MEN-Denim-id_00000001-01_1_front.jpg": "a"}', "skipped: 1 without an image file. Check the folder"),
        (b'{"a.jpg": "\xff"}', "not valid JSON in UTF-8"),
    ],
)
def test_captions_that_are_malformed(tmp_path: Path, text: str | bytes, told: str) -> None:
    (tmp_path / "captions.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=told):
        deepfashion_manifests(tmp_path / "captions.json", tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_split_without_a_product_and_a_share_that_is_none(tmp_path: Path) -> None:
    name = "MEN-Denim-id_00000001-01_1_front.jpg"
    picture(tmp_path / name)
    (tmp_path / "captions.json").write_text(json.dumps({name: "jeans"}))
    with pytest.raises(DataError, match="no product of fashion_man falls into"):
        deepfashion_manifests(tmp_path / "captions.json", tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="test_share=1: give a number between 0 and 1"):
        deepfashion_manifests(tmp_path / "captions.json", tmp_path, tmp_path / "out", 1)
    with pytest.raises(DataError, match=r"none\.json: no such file"):
        deepfashion_manifests(tmp_path / "none.json", tmp_path, tmp_path / "out")


HEADER = ("sku", "photo", "title")


def table(root: Path, rows: list[tuple[str, str, str]], header: tuple[str, ...] = HEADER, name: str = "p.csv") -> Path:
    with (root / name).open("w", newline="") as file:
        csv.writer(file, delimiter="\t" if name.endswith("tsv") else ",").writerows([header, *rows])
    return root / name


@pytest.mark.parametrize("name", ["p.csv", "p.tsv"])
def test_a_product_table(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [(f"s{i}", f"a/{i}-{view}.png", f'lamp, "{i}"') for i in range(30) for view in range(1 + i % 3)]
    for i, (_, image, _) in enumerate(rows):
        picture(tmp_path / "img" / image, i)
    whole = [*rows, ("", rows[0][1], "a"), ("s1", "", "a"), ("s1", "no.png", "a"), ("s1", rows[0][1], "")]
    path = table(tmp_path, whole, name=name)
    main(
        [
            *("csv", str(path), str(tmp_path / "img"), str(tmp_path / "out"), "--test-share=0.4", "--name=lamps"),
            *("--product=sku", "--image=photo", "--caption=title"),
        ]
    )
    said = capsys.readouterr().out
    for reason in ("a product id", "the name of an image", "an image file"):
        assert f"1 without {reason}" in said
    assert "1 with an empty caption" in said
    train, test = (pq.read_table(tmp_path / "out" / f"lamps_{split}.parquet") for split in ("train", "test"))
    assert not set(train["product"].to_pylist()) & set(test["product"].to_pylist())
    assert train.num_rows + test.num_rows == len(rows)
    data = ManifestDataset(tmp_path / "out" / "lamps_test.parquet")
    for row in range(len(data)):
        number = [image for _, image, _ in rows].index(data.sample_key(row).partition("#")[0].removeprefix("../img/"))
        assert data.captions(row) == [rows[number][2]]
        assert data[row]["image"].unique().tolist() == [number]
        assert test["product"][row].as_py() == rows[number][0]


def test_an_image_of_two_products_is_refused(tmp_path: Path) -> None:
    """By links and spellings of its path, too."""
    picture(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    for other in ("a.png", "./a.png", "b.png"):
        path = table(tmp_path, [("1", "a.png", "x"), ("2", other, "y")])
        with pytest.raises(DataError, match="is of the products '1' and '2'"):
            product_csv_manifests(path, tmp_path, tmp_path / "out", "photo", "title", "sku")


def test_spellings_of_one_id_are_one_product(tmp_path: Path) -> None:
    rows = [(spelling, f"{i}-{j}.png", "x") for i in range(40) for j, spelling in enumerate((f"{i}", f" {i}.0 "))]
    for _, image, _ in rows:
        picture(tmp_path / image)
    written = product_csv_manifests(table(tmp_path, rows), tmp_path, tmp_path, "photo", "title", "sku", test_share=0.5)
    assert sum(written.products.values()) == 40
    assert sum(written.rows.values()) == 80


def test_a_column_that_is_missing(tmp_path: Path) -> None:
    path = table(tmp_path, [("1", "a.png", "x")])
    with pytest.raises(DataError, match=r"no column image, product_id \(found: sku, photo, title\)"):
        product_csv_manifests(path, tmp_path, tmp_path / "out", caption="title")
    with pytest.raises(DataError, match="no such file"):
        product_csv_manifests(tmp_path / "none.csv", tmp_path, tmp_path / "out")


def test_the_command(deepfashion: Path) -> None:
    command = [sys.executable, "-m", "gmail_lightning.generation.product_manifests", "deepfashion"]
    done = subprocess.run([*command, "none.json", "images", "out"], cwd=deepfashion, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == "none.json: no such file. Check the path."
    done = subprocess.run([*command, "captions.json", "images", "out"], cwd=deepfashion, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list((deepfashion / "out").iterdir())) == 4
    assert done.stdout.endswith("skipped: nothing\n")
