"""Flickr30k, by Karpathy's splits or whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from gmail_lightning.datasets.base import DataError, ModalityName
from gmail_lightning.datasets.coco import karpathy_split, read_annotations
from gmail_lightning.datasets.tables.caption_rows import CaptionRow, CaptionRows, caption_table
from gmail_lightning.datasets.tables.parsed import read_once, read_text

PROTOCOLS = {"full": "flickr30k_full", "train": "flickr30k_train", "val": "flickr30k_val", "test": "flickr30k_1k"}


class Flickr30k(CaptionRows):
    """Flickr30k (Young et al., TACL 2014), one row per caption; images and captions have the same ids in both files.

    Two protocols are in use. ``test`` is the usual one, 1,000 images of Karpathy's split. ``full`` ranks all 31,783
    images, as Long-CLIP and so GMAIL do: its recall is about half of the other, and the two are not to be compared.

    Args:
        annotations: ``dataset_flickr30k.json`` of Karpathy, or ``results_20130124.token`` for ``full``.
        image_root: Folder of the images (``flickr30k-images``).
        modality: ``real``, or ``generated`` where the folder holds generated images under the same names.
        split: ``test``, ``val``, ``train``, or ``full``.
        subset: Whether images and captions may be others than published; ``summary`` says so.
        check_counts: False is the earlier name of ``subset=True``.

    Raises:
        DataError: If the file is missing, malformed, or of another split, or the counts differ.
    """

    def __init__(
        self,
        annotations: str | Path,
        image_root: str | Path,
        modality: ModalityName = "real",
        split: Literal["test", "val", "train", "full"] = "test",
        subset: bool = False,
        check_counts: bool = True,
    ) -> None:
        subset = subset or not check_counts
        if split not in PROTOCOLS:
            raise ValueError(f"Unknown split {split!r} of Flickr30k. Known: {', '.join(PROTOCOLS)}.")
        self.annotations, self.image_root = Path(annotations), Path(image_root)
        if (self.annotations.suffix == ".json") == (split == "full"):
            file = "results_20130124.token" if split == "full" else "Karpathy's dataset_flickr30k.json"
            raise DataError(f"{annotations}: split {split!r} of Flickr30k needs {file}.")
        # held for other data sets of the file
        self._parsed = self._token_captions() if split == "full" else read_annotations(self.annotations, "flickr30k")
        self.set_rows(self._parsed if split == "full" else self._karpathy_captions(split), modality)
        self.check_protocol(PROTOCOLS[split], subset)
        self.split = split

    def _token_captions(self) -> pa.Table:
        return read_once(self.annotations, "captions", lambda: caption_table(self.annotations, self._token_rows()))

    def _token_rows(self) -> Iterator[CaptionRow]:
        for number, line in enumerate(read_text(self.annotations).split("\n"), start=1):
            key, tab, caption = line.partition("\t")
            if not line:
                continue
            if not tab or "#" not in key:
                raise DataError(f"{self.annotations} line {number}: expected IMAGE.jpg#NUMBER, a tab and a caption.")
            file = key.rpartition("#")[0]  # 1000092795.jpg of 1000092795.jpg#0
            yield CaptionRow(caption, file, f"flickr30k/{file}", f"flickr30k/{key}")

    def _karpathy_captions(self, split: str) -> pa.Table:
        metadata = self._parsed.schema.metadata
        found = metadata[b"dataset"].decode() if metadata[b"format"] == b"karpathy" else "coco"
        if found != "flickr30k":
            raise DataError(f"{self.annotations}: of the data set {found}: read dataset_flickr30k.json.")
        rows = karpathy_split(self._parsed, split, self.annotations)
        names = pc.replace_substring_regex(rows["file"], "^.*/", "")
        return rows.set_column(rows.schema.get_field_index("file"), "file", names)
