"""Flickr30k, by Karpathy's splits or whole."""

from __future__ import annotations

from pathlib import Path, PurePath
from typing import Literal

from gmail_lightning.datasets.base import DataError, ModalityName
from gmail_lightning.datasets.caption_rows import CaptionRow, CaptionRows
from gmail_lightning.datasets.coco import karpathy_rows, read_json

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
        check_counts: Whether images and captions must be as many as published.

    Raises:
        DataError: If the file is missing, malformed, or of another split, or the counts differ.
    """

    def __init__(
        self,
        annotations: str | Path,
        image_root: str | Path,
        modality: ModalityName = "real",
        split: Literal["test", "val", "train", "full"] = "test",
        check_counts: bool = True,
    ) -> None:
        if split not in PROTOCOLS:
            raise ValueError(f"Unknown split {split!r} of Flickr30k. Known: {', '.join(PROTOCOLS)}.")
        self.annotations, self.image_root = Path(annotations), Path(image_root)
        if (self.annotations.suffix == ".json") == (split == "full"):
            file = "results_20130124.token" if split == "full" else "Karpathy's dataset_flickr30k.json"
            raise DataError(f"{annotations}: split {split!r} of Flickr30k needs {file}.")
        rows = self._token_captions() if split == "full" else self._karpathy_captions(split)
        self.set_rows(rows, modality)
        self.check_protocol(PROTOCOLS[split], enforce=check_counts)
        self.split = split

    def _token_captions(self) -> list[CaptionRow]:
        if not self.annotations.is_file():
            raise DataError(f"{self.annotations}: no such annotation file. Check the path.")
        rows = []
        text = self.annotations.read_text(encoding="utf-8-sig")
        for number, line in enumerate(text.split("\n"), start=1):
            key, tab, caption = line.partition("\t")
            if not line:
                continue
            if not tab or "#" not in key:
                raise DataError(f"{self.annotations} line {number}: expected IMAGE.jpg#NUMBER, a tab and a caption.")
            file = key.rpartition("#")[0]  # 1000092795.jpg of 1000092795.jpg#0
            rows.append(CaptionRow(caption, file, f"flickr30k/{file}", f"flickr30k/{key}"))
        return rows

    def _karpathy_captions(self, split: str) -> list[CaptionRow]:
        content = read_json(self.annotations)
        if not isinstance(content, dict) or not isinstance(content.get("images"), list) or "annotations" in content:
            raise DataError(f"{self.annotations}: no list 'images' of Karpathy's: read dataset_flickr30k.json.")
        try:
            if content.setdefault("dataset", "flickr30k") != "flickr30k":
                raise DataError(
                    f"{self.annotations}: of the data set {content['dataset']}: read dataset_flickr30k.json."
                )
            rows = karpathy_rows(content, split, self.annotations)
        except KeyError as error:
            raise DataError(f"{self.annotations}: an entry has no {error}: not Karpathy's format.") from error
        return [row._replace(file=PurePath(row.file).name) for row in rows]
