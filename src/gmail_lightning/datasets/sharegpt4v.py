"""Long captions: ShareGPT4V and Urban1k."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from gmail_lightning.datasets.base import DataError, ModalityName
from gmail_lightning.datasets.ids import is_image_name
from gmail_lightning.datasets.tables.caption_rows import CaptionRow, CaptionRows, caption_table
from gmail_lightning.datasets.tables.parsed import read_once, read_text

VALIDATION_ENTRIES = 1_000
BLOCK = 1 << 20  # characters of the file read at a time
LONGEST_ENTRY = 16 * BLOCK


class ShareGPT4V(CaptionRows):
    """Images of COCO, LCS and SAM with captions of some 150 words (arXiv 2311.12793), one row per image.

    The first 1,000 entries of the file are the validation set, the rest is for training, as in Long-CLIP
    (arXiv 2403.15378). These 1,000 are images of COCO's training set, and bear its image ids: training on COCO as well
    is reported as an overlap.

    Args:
        annotations: ``share-captioner_coco_lcs_sam_1246k_1107.json``.
        image_root: Folder that the paths of the entries start from (``coco/train2017/000000000009.jpg``).
        modality: ``real``, or ``generated`` where the folder holds generated images under the same names.
        split: ``val`` or ``train``.
        subset: Whether the validation set may be other than 1,000 images with one caption each; ``summary`` says so.
        check_counts: False is the earlier name of ``subset=True``.

    Raises:
        DataError: If the file is missing or malformed, holds no entry of the split, or the counts differ.
    """

    def __init__(
        self,
        annotations: str | Path,
        image_root: str | Path,
        modality: ModalityName = "real",
        split: Literal["val", "train"] = "val",
        subset: bool = False,
        check_counts: bool = True,
    ) -> None:
        subset = subset or not check_counts
        if split not in ("val", "train"):
            raise ValueError(f"Unknown split {split!r} of ShareGPT4V. Known: val, train.")
        self.annotations, self.image_root = Path(annotations), Path(image_root)
        first, last = (0, VALIDATION_ENTRIES) if split == "val" else (VALIDATION_ENTRIES, None)
        rows = self._parsed = read_once(  # held for other data sets of the file
            self.annotations, split, lambda: caption_table(self.annotations, _rows(self.annotations, first, last))
        )
        if not len(rows):
            raise DataError(f"{annotations}: no entry after the first {first:,}: the split {split!r} is empty.")
        self.set_rows(rows, modality)
        self.split = split
        if split == "val":
            self.check_protocol("sharegpt4v_1k", subset)
        else:
            self.summary = f"{annotations}: ShareGPT4V without its first {first:,} entries: {len(self):,} captions."


def _rows(annotations: Path, first: int, last: int | None) -> Iterator[CaptionRow]:
    for number, entry in enumerate(islice(json_entries(annotations), first, last), start=first):
        try:
            caption, file = entry["conversations"][1]["value"], entry["image"]
        except (KeyError, IndexError, TypeError) as error:
            raise DataError(
                f"{annotations} entry {number + 1}: no 'image', or no answer in 'conversations' ({error!r}): not the "
                "format of ShareGPT4V."
            ) from error
        yield CaptionRow(caption, file, _image_id(file), f"sharegpt4v/{number}")


class Urban1k(CaptionRows):
    """1,000 street scenes with long captions (Long-CLIP, arXiv 2403.15378), an evaluation set.

    Args:
        root: Folder with ``image/NAME.jpg`` and ``caption/NAME.txt``.
        subset: Whether there may be other than 1,000 of both; ``summary`` says so.
        check_counts: False is the earlier name of ``subset=True``.

    Raises:
        DataError: If a folder is missing, an image has no caption or a caption no image, or the counts differ.
    """

    def __init__(self, root: str | Path, subset: bool = False, check_counts: bool = True) -> None:
        subset = subset or not check_counts
        self.annotations, self.image_root = Path(root) / "caption", Path(root) / "image"
        for folder in (self.annotations, self.image_root):
            if not folder.is_dir():
                raise DataError(f"{folder}: no such folder. Urban1k has image/NAME.jpg and caption/NAME.txt.")
        texts = [path for path in sorted(self.annotations.glob("*.txt")) if not path.name.startswith(".")]
        pictures = [path for path in sorted(self.image_root.iterdir()) if is_image_name(path.name)]
        captions, images = {path.stem: path for path in texts}, {path.stem: path for path in pictures}
        if twin := next((path for path in pictures if images[path.stem] != path), None):
            raise DataError(f"{twin} and {images[twin.stem].name}: two images for one caption. Remove one.")
        for what, lonely, other in (
            ("captions have no image", captions.keys() - images.keys(), self.image_root),
            ("images have no caption", images.keys() - captions.keys(), self.annotations),
        ):
            if lonely:
                raise DataError(
                    f"{root}: {len(lonely)} {what} in {other}: {min(lonely)} and so on. Add or remove them."
                )
        rows = [
            CaptionRow(read_text(path).partition("\n")[0], images[name].name, f"urban1k/{name}", f"urban1k/{name}")
            for name, path in captions.items()
        ]
        self.set_rows(caption_table(self.annotations, rows), "real")
        self.check_protocol("urban1k", subset)
        self.split = "test"


def json_entries(path: Path) -> Iterator[Any]:
    """Yields the entries of a list in JSON one by one: of a file of gigabytes, only what is asked for is read.

    Raises:
        DataError: If there is no such file, or it is not a list in JSON.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such annotation file. Check the path.")
    decoder, number = json.JSONDecoder(), 0
    with path.open(encoding="utf-8-sig") as file:
        text = file.read(BLOCK).lstrip()
        if not text.startswith("["):
            raise DataError(f"{path}: not a list in JSON.")
        at = 1
        while True:
            at = _skip(text, at)
            try:
                entry, at = decoder.raw_decode(text, at)
            except json.JSONDecodeError as error:  # the entry may go on in the next block
                if text[at : at + 1] == "]":
                    return
                block = file.read(BLOCK) if len(text) - at < LONGEST_ENTRY else ""
                if not block:
                    raise DataError(f"{path}: not valid JSON after entry {number} ({error.msg}).") from error
                text, at = text[at:] + block, 0
                continue
            number += 1
            yield entry


def _skip(text: str, at: int) -> int:
    """Where the next entry begins."""
    while at < len(text) and text[at] in " \t\r\n,":
        at += 1
    return at


def _image_id(file: str) -> int | str:
    """COCO's own id for its images, so that COCO's other annotations mean the same image by it; else a hash."""
    path = PurePosixPath(file)
    if path.parts[:1] == ("coco",) and path.stem.isdecimal():
        return int(path.stem)
    return f"sharegpt4v/{file}"
