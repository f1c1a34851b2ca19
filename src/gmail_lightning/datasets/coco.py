"""Captions in the two formats of COCO."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from gmail_lightning.datasets.base import (
    CAPTION_BLOCK,
    DataError,
    ImageTextDataset,
    ModalityName,
    constant_modality,
    decode_image,
    one_line,
)

Row = tuple[str, int, int]  # caption, image id, caption id


class CocoCaptions(ImageTextDataset):
    """One row per caption: ``image_id`` is COCO's image id, ``pair_id`` the id of the caption.

    Reads COCO's annotation files (``captions_train2017.json``) and Karpathy's splits (``dataset_coco.json``,
    https://cs.stanford.edu/people/karpathy/deepimagesent/), also those of other data sets in that format.

    Args:
        annotations: The JSON file.
        image_root: Folder of the images; Karpathy's file adds the folder of each image (``val2014``) itself.
        modality: ``real``, or ``generated`` where the folder holds generated images under the same names.
        split: Split of Karpathy's file, or several joined by +: ``train+restval`` is the usual training set,
            and any other than these two is refused as training data.

    Raises:
        DataError: If the file or the split is missing or malformed, or a caption is empty.
    """

    def __init__(
        self,
        annotations: str | Path,
        image_root: str | Path,
        modality: ModalityName = "real",
        split: str | None = None,
    ) -> None:
        self.annotations, self.image_root = Path(annotations), Path(image_root)
        if not self.annotations.is_file():
            raise DataError(f"{annotations}: no such annotation file. Check the path.")
        try:
            content = json.loads(self.annotations.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{annotations}: not valid JSON ({error}).") from error
        if not isinstance(content, dict) or not isinstance(content.get("images"), list):
            raise DataError(f"{annotations}: no list 'images': neither COCO's nor Karpathy's format.")
        try:
            if "annotations" in content:
                rows, files = self._coco_rows(content, split)
            else:
                rows, files = self._karpathy_rows(content, split)
        except KeyError as error:
            raise DataError(f"{annotations}: an entry has no {error}: neither COCO's nor Karpathy's format.") from error
        if not rows:
            raise DataError(f"{annotations}: no captions.")
        captions = [one_line(caption) for caption, _, _ in rows]
        if "" in captions:
            _, image, caption = rows[captions.index("")]
            raise DataError(f"{annotations}: caption {caption} of image {image} is empty. Write one or remove it.")
        self._caption = pa.array(captions)  # one block of memory, which workers share
        self.image_id = np.array([image for _, image, _ in rows], dtype=np.int64)
        self.pair_id = np.array([caption for _, _, caption in rows], dtype=np.int64)
        self._files = files
        self.modality = constant_modality(modality, len(rows))
        if split is not None:  # restval is what Karpathy's split leaves of the validation images for training
            self.split = "train" if set(split.split("+")) <= {"train", "restval"} else split

    def _coco_rows(
        self, content: dict[str, Any], split: str | None
    ) -> tuple[list[tuple[str, int, int]], dict[int, str]]:
        if split is not None:
            raise DataError(
                f"{self.annotations}: split={split!r}, but COCO's annotation files hold one split each: leave it out."
            )
        files = {image["id"]: image["file_name"] for image in content["images"]}
        rows = [(entry["caption"], entry["image_id"], entry["id"]) for entry in content["annotations"]]
        lost = next((row for row in rows if row[1] not in files), None)
        if lost:
            raise DataError(f"{self.annotations}: caption {lost[2]} belongs to image {lost[1]}, which 'images' lacks.")
        return rows, files

    def _karpathy_rows(self, content: dict[str, Any], split: str | None) -> tuple[list[Row], dict[int, str]]:
        known = sorted({image["split"] for image in content["images"]})
        wanted = [] if split is None else split.split("+")
        if not wanted or not set(wanted) <= set(known):
            raise DataError(
                f"{self.annotations}: "
                + ("name a split" if split is None else f"unknown split {split!r}")
                + f". Known: "
                f"{', '.join(known)}; several are joined by +, as in train+restval."
            )
        rows, files = [], {}
        for image in content["images"]:
            if image["split"] in wanted:
                number = image["cocoid"] if "cocoid" in image else image["imgid"]
                files[number] = str(Path(image.get("filepath", ""), image["filename"]))
                rows += [(sentence["raw"], number, sentence["sentid"]) for sentence in image["sentences"]]
        return rows, files

    def read_image(self, index: int) -> Tensor:  # noqa: D102
        return decode_image((self.image_root / self._files[int(self.image_id[index])]).read_bytes())

    def captions(self, index: int) -> list[str]:  # noqa: D102
        return [self._caption[index].as_py()]

    def caption_blocks(self) -> Iterator[tuple[pa.Array, np.ndarray]]:  # noqa: D102
        for start in range(0, len(self), CAPTION_BLOCK):
            texts = self._caption[start : start + CAPTION_BLOCK]
            yield texts, np.arange(start, start + len(texts))

    def sample_key(self, index: int) -> str:
        """Returns image id and caption id."""
        return f"{self.image_id[index]}/{self.pair_id[index]}"

    def picture(self) -> np.ndarray:  # noqa: D102
        return self.image_id

    def describe(self, index: int) -> str:  # noqa: D102
        return f"{self.annotations} image {self.image_id[index]}, caption {self.pair_id[index]}"
