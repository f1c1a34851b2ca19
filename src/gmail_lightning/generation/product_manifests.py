"""Manifests of products out of public catalogues, split by product: ``python -m ...generation.product_manifests -h``.

Views of one product look alike, so all of its images fall into one split, by a hash of the product.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from gmail_lightning.datasets.base import DataError, one_line
from gmail_lightning.datasets.ids import id_text, stable_ids
from gmail_lightning.datasets.tables.records import csv_records
from gmail_lightning.generation.whole_files import write_table

NAME = re.compile(r"(MEN|WOMEN)-(\w+)-(id_\d+)-[^/\\]+\.(?:jpe?g|png)", re.ASCII)
GROUPS = {"MEN": "fashion_man", "WOMEN": "fashion_woman"}
SPLITS = ("train", "test")


class Row(NamedTuple):
    """An image of a product; ``group`` names the manifests that it may go to, such as ``fashion_man``."""

    group: str
    product: str
    image: Path
    caption: str


class Manifests(NamedTuple):
    """What was written.

    Attributes:
        rows: Rows of each file.
        products: Products of each file.
        skipped: How many entries were left out, by reason.
    """

    rows: dict[Path, int]
    products: dict[Path, int]
    skipped: Counter[str]

    def __str__(self) -> str:
        lines = [f"{path}: {rows:,} images of {self.products[path]:,} products" for path, rows in self.rows.items()]
        skipped = ", ".join(f"{number:,} {reason}" for reason, number in sorted(self.skipped.items()))
        return "\n".join([*lines, f"skipped: {skipped or 'nothing'}"])


def deepfashion_manifests(
    captions: str | Path, images: str | Path, folder: str | Path, test_share: float = 0.1
) -> Manifests:
    """Writes ``fashion_man_train.parquet``, ``fashion_man_test.parquet`` and the two of ``fashion_woman``.

    The data are DeepFashion-MultiModal (Jiang et al., Text2Human, arXiv 2205.15996). A name such as
    ``WOMEN-Dresses-id_00000002-02_1_front.jpg`` gives the group, and up to the id the product.

    Args:
        captions: ``captions.json``: an object from the name of an image to its text.
        images: Folder of the images.
        folder: Where the manifests go.
        test_share: Of the products, expected in ``test``; between 0 and 1.

    Raises:
        DataError: If the file is missing or malformed, nothing is left of it, or a split of a group has no product.
        ValueError: If ``test_share`` is not between 0 and 1.
    """
    path, skipped = Path(captions), Counter[str]()
    rows = []
    for name, text in _captions(path):
        if (parts := NAME.fullmatch(name)) is None:
            skipped["with another name than (MEN|WOMEN)-CATEGORY-id_NUMBER-VIEW.jpg"] += 1
        elif image := _usable(Path(images) / name, text, skipped):
            prefix, category, number = parts.groups()
            rows.append(Row(GROUPS[prefix], f"{prefix}-{category}-{number}", image, one_line(text)))
    return _write(path, rows, skipped, Path(folder), test_share)


def product_csv_manifests(
    table: str | Path,
    images: str | Path,
    folder: str | Path,
    image: str = "image",
    caption: str = "caption",
    product: str = "product_id",
    name: str = "products",
    test_share: float = 0.1,
) -> Manifests:
    """Writes ``NAME_train.parquet`` and ``NAME_test.parquet`` out of a CSV or TSV file with a header.

    Args:
        table: The file, UTF-8, a row per image or per caption; tabs separate the fields where it ends in ``.tsv``.
        images: Folder that relative paths of images start from.
        folder: Where the manifests go.
        image: Column of the paths of the images.
        caption: Column of the texts.
        product: Column of the ids of the products; images of one id are never in both splits.
        name: What the manifests are called.
        test_share: Of the products, expected in ``test``; between 0 and 1.

    Raises:
        DataError: As :func:`deepfashion_manifests`; also if a column is missing, or an image is of two products.
        ValueError: As :func:`deepfashion_manifests`.
    """
    path, skipped = Path(table), Counter[str]()
    if not path.is_file():
        raise DataError(f"{path}: no such file. Check the path.")
    rows = []
    for record in csv_records(path, "\t" if path.suffix.lower() == ".tsv" else ",", image):
        if missing := [column for column in (image, caption, product) if column not in record]:
            raise DataError(
                f"{path}: no column {', '.join(missing)} (found: {', '.join(record)}). Name yours by --image, "
                "--caption and --product."
            )
        if (id_ := id_text(record[product])) is None:
            skipped["without a product id"] += 1
        elif not record[image].strip():
            skipped["without the name of an image"] += 1
        elif found := _usable(Path(images) / record[image].strip(), record[caption], skipped):
            rows.append(Row(name, id_, found, one_line(record[caption])))
    return _write(path, rows, skipped, Path(folder), test_share)


def _captions(path: Path) -> list[tuple[str, str]]:
    """Names and texts of ``captions.json``."""
    if not path.is_file():
        raise DataError(f"{path}: no such file. Check the path.")
    try:
        pairs = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=tuple)
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON in UTF-8 ({error}).") from error
    if not isinstance(pairs, tuple):
        raise DataError(f"{path}: expected an object from the name of an image to its text.")
    counts = Counter(name for name, _ in pairs)
    for name, text in pairs:
        if not isinstance(text, str):
            raise DataError(f"{path}: {name!r} has {type(text).__name__}, expected a text.")
        if counts[name] > 1:
            raise DataError(f"{path}: {name!r} stands there {counts[name]} times. Keep one text of each image.")
    return list(pairs)


def _usable(image: Path, caption: str, skipped: Counter[str]) -> Path | None:
    """The image, where there is one with a caption; else counts why not."""
    if not caption.strip():
        skipped["with an empty caption"] += 1
    elif not image.is_file():
        skipped["without an image file"] += 1
    else:
        return image
    return None


def is_test(product: str, test_share: float) -> bool:
    """Whether a product is of the test split; no machine, order or other product changes it."""
    return int(stable_ids([product])[0]) < test_share * 2**63


def _write(path: Path, rows: list[Row], skipped: Counter[str], folder: Path, test_share: float) -> Manifests:
    if not 0 < test_share < 1:
        raise ValueError(f"test_share={test_share}: give a number between 0 and 1, such as 0.1.")
    written = Manifests({}, {}, skipped)
    if not rows:
        raise DataError(f"{path}: nothing is left to write. {written}. Check the folder of the images.")
    _refuse_images_of_two_products(path, rows)
    tables = {
        (group, split): [row for row in rows if row.group == group and is_test(row.product, test_share) == test]
        for group in sorted({row.group for row in rows})
        for test, split in enumerate(SPLITS)
    }
    for (group, split), members in tables.items():
        if not members:
            raise DataError(f"{path}: no product of {group} falls into {split}, at test_share={test_share}. Change it.")
    folder.mkdir(parents=True, exist_ok=True)
    for (group, split), members in tables.items():
        file = folder / f"{group}_{split}.parquet"
        write_table(_table(members, folder), file)
        written.rows[file], written.products[file] = len(members), len({row.product for row in members})
    return written


def _table(rows: Sequence[Row], folder: Path) -> pa.Table:
    """Columns of :class:`~gmail_lightning.datasets.tables.manifest.ManifestDataset`, and ``product``."""
    columns: dict[str, Iterable[Any]] = {
        "image": [Path(os.path.relpath(row.image, folder)).as_posix() for row in rows],
        "caption": [row.caption for row in rows],
        "modality": ["real"] * len(rows),
        "product": [row.product for row in rows],
    }
    return pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})


def _refuse_images_of_two_products(path: Path, rows: list[Row]) -> None:
    """Such an image could be in both splits."""
    product: dict[str, str] = {}
    for row in rows:
        first = product.setdefault(os.path.realpath(row.image), row.product)
        if first != row.product:
            raise DataError(
                f"{path}: the image {row.image} is of the products {first!r} and {row.product!r}, so that it could be "
                "in both splits. Give them one id, such as that of the product they are variants of."
            )


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; see ``-h``."""
    parser = argparse.ArgumentParser(
        "python -m gmail_lightning.generation.product_manifests",
        description="Writes manifests of products, split by product.",
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    deepfashion = kinds.add_parser("deepfashion", help="captions.json of DeepFashion-MultiModal")
    deepfashion.add_argument("captions", help="captions.json: from the name of an image to its text")
    catalogue = kinds.add_parser("csv", help="a CSV or TSV file with a header")
    catalogue.add_argument("table", help="the file")
    for one in (deepfashion, catalogue):
        one.add_argument("images", help="folder of the images")
        one.add_argument("folder", help="where the manifests go")
        one.add_argument("--test-share", type=float, default=0.1, help="of the products (default: 0.1)")
    catalogue.add_argument("--image", default="image", help="column of the paths (default: image)")
    catalogue.add_argument("--caption", default="caption", help="column of the texts (default: caption)")
    catalogue.add_argument("--product", default="product_id", help="column of the product ids (default: product_id)")
    catalogue.add_argument("--name", default="products", help="of the manifests (default: products)")
    given = vars(parser.parse_args(arguments))
    commands: dict[str, Callable[..., Manifests]] = {"deepfashion": deepfashion_manifests, "csv": product_csv_manifests}
    convert = commands[given.pop("kind")]
    try:
        print(convert(**given))
    except ValueError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
