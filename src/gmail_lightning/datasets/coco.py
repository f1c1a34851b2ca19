"""Captions in the two formats of COCO."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from gmail_lightning.datasets.base import DataError, ModalityName
from gmail_lightning.datasets.ids import id_text
from gmail_lightning.datasets.protocols import CAPTION_PROTOCOLS
from gmail_lightning.datasets.tables.caption_rows import CaptionRow, CaptionRows, caption_table, first_captions
from gmail_lightning.datasets.tables.parsed import read_json, read_once


class CocoCaptions(CaptionRows):
    """One row per caption: ``image_id`` is COCO's image id, ``pair_id`` the id of the caption.

    Reads COCO's annotation files (``captions_train2017.json``) and Karpathy's splits (``dataset_coco.json``,
    https://cs.stanford.edu/people/karpathy/deepimagesent/), also those of other data sets in that format: where
    Karpathy's file is not COCO's, images are known by its ``dataset`` and their file names. Files of images without
    captions (``image_info_test2014.json``) are for prediction alone.

    Args:
        annotations: The JSON file.
        image_root: Folder of the images; Karpathy's file adds the folder of each image (``val2014``) itself.
        modality: ``real``, or ``generated`` where the folder holds generated images under the same names.
        split: Split of Karpathy's file, or several joined by +: ``train+restval`` is the usual training set,
            and any other than these two is refused as training data.
        captions_per_image: So many captions of each image, the first in the file; all by default.
        protocol: ``coco_5k`` (val2017, 5,000 images and the first five captions of each) or ``karpathy_test`` (5,000
            images, 25,010 captions): the counts are checked.
        subset: Of the protocol, whose counts are then not checked; ``summary`` says so.
        space: Name of the data set that the ids are of, where a file in COCO's format is not of COCO's images.

    Raises:
        DataError: If the file or the split is missing or malformed, a caption is empty or of no image, an image has no
            caption, an id occurs twice, or the protocol is another.
        ValueError: If ``captions_per_image`` is below 1, or the protocol is unknown, or missing for a subset.
    """

    def __init__(
        self,
        annotations: str | Path,
        image_root: str | Path,
        modality: ModalityName = "real",
        split: str | None = None,
        captions_per_image: int | None = None,
        protocol: Literal["coco_5k", "karpathy_test"] | None = None,
        space: str = "",
        subset: bool = False,
    ) -> None:
        if subset and protocol is None:
            raise ValueError("subset=True: of no protocol. Without one no counts are checked: leave subset out.")
        if captions_per_image is not None and captions_per_image < 1:
            raise ValueError(f"captions_per_image={captions_per_image}: give at least 1, or leave it out for all.")
        self.annotations, self.image_root = Path(annotations), Path(image_root)
        rows = self._parsed = read_annotations(self.annotations)  # held for other data sets of the file
        kind = rows.schema.metadata[b"format"].decode()
        if kind == "images":
            self.no_captions = f"{annotations} has no captions ('annotations'), so that it is for prediction alone."
        if protocol is not None:
            split, captions_per_image = self._obey(protocol, kind != "karpathy", split, captions_per_image)
        if kind == "karpathy":
            rows = karpathy_split(rows, split, self.annotations)
        elif split is not None:
            raise DataError(
                f"{annotations}: split={split!r}, but COCO's annotation files hold one split each: leave it out."
            )
        if captions_per_image is not None:
            rows = first_captions(rows, captions_per_image)
        self.set_rows(rows, modality, space)
        self.split = karpathy_stream(split)
        if protocol is not None:
            self.check_protocol(protocol, subset)
            self.split = CAPTION_PROTOCOLS[protocol].split

    def _obey(
        self, protocol: str, is_coco: bool, split: str | None, captions_per_image: int | None
    ) -> tuple[str | None, int | None]:
        """Returns the split and the number of captions that a protocol asks for."""
        if protocol not in ("coco_5k", "karpathy_test"):
            raise ValueError(f"Unknown protocol {protocol!r} of CocoCaptions. Known: coco_5k, karpathy_test.")
        published = CAPTION_PROTOCOLS[protocol]
        if is_coco != (protocol == "coco_5k"):
            raise DataError(
                f"{self.annotations}: the protocol {protocol} is {published.what}: read {published.file} for it."
            )
        of_file = None if is_coco else published.split  # a file of COCO holds one split and names none
        for what, given, asked in (
            ("split", split, of_file),
            ("captions_per_image", captions_per_image, published.captions_per_image),
        ):
            if given not in (None, asked):
                raise DataError(
                    f"{self.annotations}: {what}={given!r}, but the protocol {protocol} is {published.what}. "
                    f"Leave {what} out, or the protocol."
                )
        return of_file, published.captions_per_image

    def sample_key(self, index: int) -> str:
        """Returns image id and caption id."""
        return f"{self.image_id[index]}/{self.pair_id[index]}"

    def describe(self, index: int) -> str:  # noqa: D102
        return f"{self.annotations} image {self.image_id[index]}, caption {self.pair_id[index]}"


def read_annotations(path: Path, dataset: str = "karpathy") -> pa.Table:
    """The rows of a file in COCO's or Karpathy's format; the metadata say in ``format`` which, in ``dataset`` of what.

    ``format`` is ``karpathy``, ``coco``, or ``images`` where COCO's format has no captions; ``dataset`` is that of the
    file, or as given where Karpathy's does not name it.

    Raises:
        DataError: If the file is missing or of another format, an image has no id of its own, or a caption no image.
    """
    return read_once(path, f"captions of {dataset}", lambda: _parse(path, dataset))


def _parse(path: Path, dataset: str) -> pa.Table:
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise DataError(f"{path}: no list 'images': neither COCO's nor Karpathy's format.")
    kind = "coco" if "annotations" in content else "karpathy"
    if kind == "karpathy" and any("file_name" in image for image in content["images"]):
        kind = "images"
    dataset = str(content.get("dataset", dataset))
    try:
        rows = _karpathy_rows(content, dataset) if kind == "karpathy" else _coco_rows(content, path)
        table = caption_table(path, rows)
    except KeyError as error:
        raise DataError(f"{path}: an entry has no {error}: neither COCO's nor Karpathy's format.") from error
    except (TypeError, AttributeError) as error:
        raise DataError(f"{path}: an entry is malformed ({error}): neither COCO's nor Karpathy's format.") from error
    return table.replace_schema_metadata({"format": kind, "dataset": dataset})


def _coco_rows(content: dict[str, Any], path: Path) -> Iterable[CaptionRow]:
    files = {id_text(image["id"]): image["file_name"] for image in content["images"]}
    if len(files) < len(content["images"]):
        raise DataError(
            f"{path}: {len(content['images'])} images have {len(files)} different ids. Give every image an id of its "
            "own."
        )
    if "annotations" not in content:
        return [CaptionRow("", image["file_name"], image["id"], image["id"]) for image in content["images"]]
    entries = [(entry, id_text(entry["image_id"])) for entry in content["annotations"]]
    lost = next((entry for entry, image in entries if image not in files), None)
    if lost:
        raise DataError(f"{path}: caption {lost['id']} belongs to image {lost['image_id']}, which 'images' lacks.")
    silent = sorted(files.keys() - {image for _, image in entries}, key=str) if entries else []
    if silent:
        raise DataError(
            f"{path}: {len(silent)} of {len(files)} images have no caption, the first is {silent[0]} "
            f"({files[silent[0]]}). Remove them from 'images', or add captions."
        )
    return [CaptionRow(entry["caption"], files[image], entry["image_id"], entry["id"]) for entry, image in entries]


def _karpathy_rows(content: dict[str, Any], dataset: str) -> Iterable[CaptionRow]:
    for number, image in enumerate(content["images"]):
        file = str(Path(image.get("filepath", ""), image["filename"]))
        # COCO's ids are those of all its files; other data sets count from 0, each for itself
        name = f"{dataset}/{image['filename']}"
        image_id = image.get("cocoid", name)
        if not image["sentences"]:
            yield CaptionRow(None, file, image_id, f"{name}#none", image["split"], number)
        for i, sentence in enumerate(image["sentences"]):
            caption_id = sentence["sentid"] if image_id is not name else f"{name}#{i}"
            yield CaptionRow(sentence["raw"], file, image_id, caption_id, image["split"], number)


def karpathy_split(rows: pa.Table, split: str | None, annotations: Path) -> pa.Table:
    """The rows of one split of a file in Karpathy's format, or of several joined by +.

    Raises:
        DataError: If the split is not there, an image of it has no caption, or two have one id.
    """
    known = sorted(pc.unique(rows["split"]).to_pylist())
    wanted = [] if split is None else split.split("+")
    if not wanted or not set(wanted) <= set(known):
        fault = "name a split" if split is None else f"unknown split {split!r}"
        raise DataError(
            f"{annotations}: {fault}. Known: {', '.join(known)}; several are joined by +, as in train+restval."
        )
    rows = rows.filter(pc.is_in(rows["split"], value_set=pa.array(wanted)))
    images = rows.group_by(["image_id", "file"]).aggregate([("entry", "count_distinct"), ("caption", "count")])
    for fault, wrong in (
        ("has no caption", pc.equal(images["caption_count"], 0)),
        ("stands there twice", pc.greater(images["entry_count_distinct"], 1)),
    ):
        if (row := pc.index(wrong, True).as_py()) >= 0:
            image, file = images["image_id"][row], images["file"][row]
            raise DataError(f"{annotations}: image {image} ({file}) {fault}. Remove it, or mend the file.")
    return rows


def karpathy_stream(split: str | None) -> str | None:
    """What the rows of a split are for: restval is what Karpathy's split leaves of validation images for training."""
    if split is None:
        return None
    return "train" if set(split.split("+")) <= {"train", "restval"} else split
