"""Random access into webdataset tars: this project's stores of generated images, and folders like img2dataset's."""

from __future__ import annotations

import logging
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from torch import Tensor

from gmail_lightning.datasets.base import (
    DataError,
    ImageTextDataset,
    ModalityName,
    constant_modality,
    decode_image,
    one_line,
)
from gmail_lightning.datasets.shards import MANIFEST, PLAN, RECIPE, SCHEMA
from gmail_lightning.datasets.tars.files import find_tars, read_member
from gmail_lightning.datasets.tars.filter import Filter, choose
from gmail_lightning.datasets.tars.index import UNREADABLE, read_record
from gmail_lightning.datasets.tars.rows import REPAIRED, read_manifest, repaired_rows, store_rows, webdataset_rows
from gmail_lightning.types import Modality

CLIP_SCORE_SCALE = 2.5  # w of CLIPScore, arXiv 2104.08718
ALPHA = 2.5  # of PCM-Net: a cosine of 1 / alpha and above weighs 1
DEFECTS = ("no image", "no caption", UNREADABLE)  # reasons that nobody asked for

logger = logging.getLogger(__name__)


class TarShards(ImageTextDataset):
    """Rows of uncompressed webdataset tars, each read at its place by an index that is built once.

    A folder with ``manifest.parquet`` is a store that image generation wrote: captions, ids and what the audit found
    come from the manifest. Any other is read as img2dataset leaves it: ``{key}.jpg`` (png, webp, ...), ``{key}.txt``,
    ``{key}.json``. There the caption is the text or else ``caption`` of the record; ``image_id``, ``pair_id``,
    ``clip_score`` and ``status`` come from the Parquet file beside the tar, else from the records. An image without
    an id is known by its key and what it holds, in whatever tar it lies; a real row that states no pair has
    one of its own by its key, which what is generated from it inherits. What was not downloaded is left out. A key
    ends at the last dot of a member's name. Archives that are joined end to end are read to the end. Tars of a store
    are refused without their manifest.

    The index is ``index.parquet`` in the folder, or, where that cannot be written, a file in the folder that
    ``GMAIL_LIGHTNING_CACHE`` names, by default in the user's cache. A tar that has changed is indexed again. Columns
    stay in Arrow and numpy memory; images are read when they are asked for. What is left out is counted by its reason
    in ``dropped`` and ``summary``, which the data module shows.

    Args:
        path: A folder, one tar, or a pattern within one folder: ``shards/{00000..00041}.tar``, ``shards/*.tar``.
        filter: Which rows are used; by default those whose status is ok.
        split: The split to read of a store that holds several; of other folders, the split that they are.
        modality: ``real`` or ``generated``, over what the manifest says; needed where there is none.
        source: Name of the generator, over what the manifest says.
        weight: ``clip_score`` gives each row the weight clamp(alpha * CLIPScore / 2.5, 0, 1) with alpha 2.5: the cosine
            of image and caption, as PCM-Net has it (github.com/jianjieluo/PCM-Net). For tasks whose ``uses_weights`` is
            True, such as ``CaptioningTask``; contrastive tasks refuse weights.
        repaired: Shows each caption with the image that ``gmail-lightning repair`` chose for it (SynC). ``pair_id``
            stays that of the caption, for whose real image the chosen one now stands; ``image_id`` is that of the
            chosen image, so that captions that share an image are not negatives of one another.
        space: Name of the data set that ids and keys are of, where there is no manifest: equal ones of two spaces are
            different images. See :mod:`gmail_lightning.datasets.ids`.

    Raises:
        DataError: If tars, columns or images are missing, damaged or stand twice, or no row is left; says what to do.
        ValueError: If arguments contradict one another.
    """

    def __init__(
        self,
        path: str | Path,
        filter: Filter | None = None,
        split: str | None = None,
        modality: ModalityName | None = None,
        source: str | None = None,
        weight: Literal["clip_score"] | None = None,
        repaired: bool = False,
        space: str = "",
    ) -> None:
        chosen = Filter() if filter is None else filter
        if weight not in (None, "clip_score"):
            raise ValueError(f"Unknown weight {weight!r}: use 'clip_score', or leave it out.")
        if repaired and (weight is not None or chosen.min_clip_score is not None):
            raise ValueError("A clip_score is that of a caption's own image, so it says nothing with repaired=True.")
        self.path = str(path)
        tars = find_tars(path)
        self.folder = tars[0].parent
        self.is_store = (self.folder / MANIFEST).is_file()
        if self.is_store and space:
            raise ValueError(f"space={space!r}: the ids of {self.folder} are those of its {MANIFEST}. Leave it out.")
        if not self.is_store and any((self.folder / name).is_file() for name in (PLAN, RECIPE)):
            raise DataError(
                f"{self.folder}: image generation is not finished, for there is no {MANIFEST}. Run its command again: "
                "it makes what is missing and writes the manifest at the end."
            )
        score = "repair_score" if repaired else "clip_score"
        if self.is_store:
            needs_score = weight is not None or chosen.min_clip_score is not None or chosen.top_share is not None
            scores = list(REPAIRED) if repaired else ["clip_score"] if needs_score else []
            all_tars = Path(path).is_dir()
            if repaired and not all_tars:
                raise DataError(
                    f"{path}: repaired=True needs the whole folder, for the chosen image may be in any tar."
                )
            found = store_rows(tars, all_tars, scores)
            found = repaired_rows(found, self.folder) if repaired else found
        elif repaired:
            raise DataError(f"{path}: repaired=True needs a store of image generation, and there is no {MANIFEST}.")
        else:
            found = webdataset_rows(tars, space)
        rows, self._tars, self._stamps = found.columns, found.tars, found.stamps
        if self.is_store:
            self._check_split(rows, split)
        keep, self.dropped = choose(rows, chosen, split if self.is_store else None, score)
        self.dropped |= found.unused
        self.summary = self._tell(len(rows), int(keep.sum()), found.unlisted)
        if "rejected" in chosen.statuses:
            self.not_for_training = f"{self.path} is read with rejected images. Leave only 'ok' in Filter.statuses."
        self._take(rows.filter(pa.array(keep)), modality, source)
        self.split = rows["split"][int(np.argmax(keep))].as_py() if self.is_store else split
        if weight is not None:
            self.weight = self._weights(rows.filter(pa.array(keep))["clip_score"])

    def _check_split(self, rows: pa.RecordBatch, split: str | None) -> None:
        known = sorted(pc.unique(rows["split"].cast(pa.string())).to_pylist(), key=str)
        if split is None and len(known) > 1:
            raise DataError(
                f"{self.path} holds several splits: name one by split=. There are {', '.join(map(str, known))}."
            )
        if split is not None and split not in known:
            raise DataError(f"{self.path}: unknown split {split!r}. There are {', '.join(map(str, known))}.")

    def _tell(self, total: int, kept: int, unlisted: int) -> str:
        dropped = ", ".join(f"{number:,} {reason}" for reason, number in self.dropped.items())
        summary = f"TarShards({self.path}): {total:,} rows, {kept:,} used" + (
            f"; dropped: {dropped}" if dropped else ""
        )
        if unlisted:
            summary += f"; {unlisted:,} keys of the tars are not in the manifest"
        if not kept:
            raise DataError(f"{summary}. No rows are left: relax the filter, or look into the reasons.")
        if unlisted or any(reason in DEFECTS for reason in self.dropped):
            logger.warning("%s", summary)  # all else is told by the data module
        return summary

    def _take(self, rows: pa.RecordBatch, modality: ModalityName | None, source: str | None) -> None:
        """Keeps the columns of the rows in use."""
        self._key, self._caption = rows["key"], rows["caption"]
        self._tar, self._offset, self._size, self._picture, self._file_id, self._row = (
            rows[name].fill_null(-1).to_numpy() for name in ("tar", "offset", "size", "picture", "file_id", "row")
        )
        self._json_offset, self._json_size = (
            rows[name].fill_null(-1).to_numpy() for name in ("json_offset", "json_size")
        )
        self.image_id, self.pair_id = (rows[name].fill_null(-1).to_numpy() for name in ("image_id", "pair_id"))
        if modality is not None:
            self.modality = constant_modality(modality, len(rows))
        elif self.is_store:
            name = rows["modality"].cast(pa.string())
            number = pc.index_in(name, value_set=pa.array([m.name.lower() for m in Modality]))
            if number.null_count:
                unknown = name.filter(pc.is_null(number))[0].as_py()
                raise DataError(f"{self.folder / MANIFEST}: unknown modality {unknown!r}. Use real or generated.")
            self.modality = number.to_numpy().astype(np.int64)
        else:
            raise DataError(f"{self.path}: there is no {MANIFEST}: say modality='real' or 'generated'.")
        generator = rows["generator"] if self.is_store and source is None else pa.repeat(source, len(rows))
        if "own_id" in rows.schema.names:
            alone = (self.pair_id == -1) & (self.modality == Modality.REAL)
            self.pair_id = np.where(alone, rows["own_id"].to_numpy(), self.pair_id)
        names = pc.fill_null(generator.cast(pa.string()), "generated").dictionary_encode()
        self._sources = ["real", *names.dictionary.to_pylist()]
        self._source = np.where(self.modality == Modality.REAL, 0, names.indices.to_numpy() + 1)

    def _weights(self, score: pa.Array) -> np.ndarray:
        if score.null_count:
            raise DataError(
                f"{self.path}: {score.null_count:,} rows in use have no clip_score to weigh them by. Score them, leave "
                "them out by Filter(min_clip_score=0), or leave out weight."
            )
        weight: np.ndarray = np.clip(ALPHA * score.to_numpy() / CLIP_SCORE_SCALE, 0, 1).astype(np.float32)
        return weight

    def read_image(self, index: int) -> Tensor:  # noqa: D102
        return decode_image(self.encoded(index))

    def encoded(self, index: int) -> bytes:
        """Returns the image of a row as it is stored."""
        return self._read(index, self._offset, self._size)

    def file_ids(self) -> np.ndarray:  # noqa: D102
        ids: np.ndarray = self._file_id
        return ids

    def file_stamps(self, rows: np.ndarray) -> np.ndarray:
        """Returns the size of each image, and the time of change of its tar."""
        changed = np.array([stamp[1] for stamp in self._stamps], dtype=np.int64)
        return np.stack([self._size[rows], changed[self._tar[rows]]], axis=1)

    def _read(self, index: int, offset: np.ndarray, size: np.ndarray) -> bytes:
        tar = self._tar[index]
        return read_member(self._tars[tar], self._stamps[tar], int(offset[index]), int(size[index]))

    def captions(self, index: int) -> list[str]:  # noqa: D102
        return [one_line(self._caption[index].as_py())]

    def sample_key(self, index: int) -> str:  # noqa: D102
        return str(self._key[index].as_py())

    def source(self, index: int) -> str:  # noqa: D102
        return str(self._sources[self._source[index]])

    def picture(self) -> np.ndarray:  # noqa: D102
        picture: np.ndarray = self._picture
        return picture

    def describe(self, index: int) -> str:  # noqa: D102
        return f"{self._tars[self._tar[index]]} key {self.sample_key(index)!r}"

    def record(self, index: int) -> dict[str, Any]:
        """Returns the ``.json`` that lies beside a row's image; empty where there is none."""
        if self._json_offset[index] < 0:
            return {}
        try:
            return read_record(self._read(index, self._json_offset, self._json_size))
        except ValueError as error:
            raise DataError(f"{self.describe(index)}: its .json is {error}.") from error

    def column(self, name: str) -> pa.Array:
        """Reads a column of a store's manifest, in the order of the rows, shape (N,).

        Raises:
            DataError: If there is no such column, or no manifest.
        """
        return read_manifest(self.folder, [name])[name].take(pa.array(self._row))

    def perceptual_hashes(self) -> np.ndarray | None:
        """Returns the hash of each row's picture from the manifest, shape (N,) int64; None where one is missing."""
        if not self.is_store or "perceptual_hash" not in pq.read_schema(self.folder / MANIFEST).names:
            return None
        hashes = read_manifest(self.folder, ["perceptual_hash"])["perceptual_hash"].take(pa.array(self._picture))
        return None if hashes.null_count else hashes.to_numpy()

    @cached_property
    def _further(self) -> dict[str, pa.Array]:
        """The manifest's columns that were passed on from another data set."""
        known = {*SCHEMA.names, *REPAIRED}
        schema = pq.read_schema(self.folder / MANIFEST) if self.is_store else pa.schema([])
        names = [column.name for column in schema if column.name not in known and pa.types.is_string(column.type)]
        return {name: self.column(name).dictionary_encode() for name in names}

    def columns(self, index: int) -> dict[str, str]:
        """Returns the columns of the manifest that the row has inherited, such as ``concept_set``."""
        values = {name: column[index].as_py() for name, column in self._further.items()}
        return {name: value for name, value in values.items() if value is not None}
