"""The rows of webdataset tars in one form, from a store of image generation and from folders like img2dataset's."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gmail_lightning.datasets.base import DataError
from gmail_lightning.datasets.ids import id_column, stable_ids
from gmail_lightning.datasets.shards import MANIFEST
from gmail_lightning.datasets.tars.index import tar_index

STORE = ("key", "shard", "split", "modality", "image_id", "pair_id", "caption", "generator", "status", "reason")
REPEATING = ("shard", "split", "modality", "generator", "status", "reason")  # few values, many rows
MEMBERS = ("image_offset", "image_size", "json_offset", "json_size", "own_id")  # columns of the index
REPAIRED = ("repaired_key", "repair_score")


@dataclass(frozen=True)
class TarRows:
    """All rows of some tars, before any is left out.

    Attributes:
        columns: ``key, caption, status, reason, image_id, pair_id``; of the image ``tar`` (its number), ``offset``,
            ``size`` (null where there is none), ``picture`` (equal where rows show one image) and ``file_id`` (of its
            key and what it holds, see :mod:`~gmail_lightning.datasets.ids`); ``json_offset`` and
            ``json_size`` of the record; of a store also ``split, modality, generator``; scores where they were asked
            for.
        tars: Paths of the tars.
        stamps: Size and time of change of each tar when it was indexed.
        unlisted: Number of keys in the tars that the manifest does not have.
        unused: How many members of the tars are of no use, by what they are.
    """

    columns: pa.RecordBatch
    tars: list[str]
    stamps: list[tuple[int, int]]
    unlisted: int = 0
    unused: dict[str, int] = field(default_factory=dict)


def read_manifest(folder: Path, names: list[str]) -> pa.RecordBatch:
    """Reads columns of a store's manifest.

    Raises:
        DataError: If it cannot be read, or lacks a column.
    """
    path = folder / MANIFEST
    try:
        found = pq.read_schema(path).names
        missing = [name for name in names if name not in found]
        if set(REPAIRED) & set(missing):
            raise DataError(f"{path}: no column {', '.join(missing)}. Make them by gmail-lightning repair.")
        if missing:
            raise DataError(f"{path}: no column {', '.join(missing)} (found: {', '.join(found)}).")
        repeating = [name for name in names if name in REPEATING]
        table = pq.read_table(path, columns=names, read_dictionary=repeating, partitioning=None)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}).") from error
    return pa.RecordBatch.from_pydict({name: whole(table[name]) for name in names})


def whole(column: pa.ChunkedArray) -> pa.Array:
    """One array of any length; dictionaries stay small."""
    if pa.types.is_string(column.type):
        column = column.cast(pa.large_string())
    if pa.types.is_dictionary(column.type):
        column = column.unify_dictionaries()
    return column.combine_chunks() if len(column) else pa.array([], column.type)


def store_rows(tars: list[Path], all_tars: bool, scores: list[str]) -> TarRows:
    """Joins a store's manifest with the index of its tars.

    Args:
        tars: Tars of one folder.
        all_tars: They are all that the folder has, so that every row must be in one of them; else rows of others are
            left out.
        scores: Further columns of the manifest.

    Raises:
        DataError: If a tar or an image that the manifest names is missing.
    """
    folder = tars[0].parent
    rows = read_manifest(folder, [*STORE, *scores])
    rows = rows.append_column("row", pa.array(np.arange(len(rows))))
    shard = rows["shard"].cast(pa.string())
    tar = pc.index_in(shard, value_set=pa.array([path.stem for path in tars]))
    if all_tars:
        _refuse(folder, rows, pc.is_null(tar), "the tar of its shard is missing")
    else:
        rows, tar = rows.filter(pc.is_valid(tar)), tar.drop_null()
    check_keys(rows["key"], str(folder / MANIFEST))
    index, number, stamps, unused = tar_index(tars, described=True)
    at = pc.index_in(rows["key"], value_set=whole(index["key"]))
    here = pc.fill_null(pc.equal(pa.array(number).take(at), tar), False)
    at = pc.if_else(here, at, pa.scalar(None, at.type))  # found, but in the tar of another shard
    members = {name: whole(index[name]).take(at) for name in MEMBERS}
    stored = pc.not_equal(rows["status"].cast(pa.string()), "failed")
    _refuse(folder, rows, pc.and_(stored, pc.is_null(members["image_offset"])), "its tar has no image of this key")
    return TarRows(
        _with_members(rows, tar, members, rows["row"]),
        [str(path) for path in tars],
        stamps,
        len(index) - (len(at) - at.null_count),
        unused,
    )


def _with_members(
    rows: pa.RecordBatch, tar: pa.Array, members: dict[str, pa.Array], picture: pa.Array
) -> pa.RecordBatch:
    columns = dict(zip(rows.schema.names, rows.columns, strict=True))
    columns |= {"tar": tar, "offset": members["image_offset"], "size": members["image_size"], "picture": picture}
    columns["file_id"] = members["own_id"]
    return pa.RecordBatch.from_pydict({**columns, **{name: members[name] for name in ("json_offset", "json_size")}})


def _refuse(folder: Path, rows: pa.RecordBatch, wrong: pa.Array, complaint: str) -> None:
    """Raises a DataError for the first row where ``wrong`` holds."""
    row = pc.index(wrong, True).as_py()
    if row >= 0:
        where = f"{folder / MANIFEST} row {rows['row'][row].as_py() + 1} (key {rows['key'][row].as_py()!r}, "
        where += f"{rows['shard'][row].as_py()}.tar)"
        raise DataError(
            f"{where}: {complaint} ({pc.sum(wrong).as_py()} such rows). Restore it, or run the stage again."
        )


def webdataset_rows(tars: list[Path], space: str = "") -> TarRows:
    """Reads the index of tars without a manifest; a key whose status is not ``success`` counts as failed.

    Args:
        tars: Tars of one folder.
        space: Name of the data set that ids and keys are of.

    Raises:
        DataError: If two tars have one key.
    """
    index, number, stamps, unused = tar_index(tars, described=False)
    columns = {name: whole(index[name]) for name in index.column_names}
    check_keys(columns["key"], str(tars[0].parent))
    succeeded = pc.is_in(
        pc.fill_null(columns["status"], "ok"), value_set=pa.array(["ok", "success"], pa.large_string())
    )
    row = pa.array(np.arange(len(index)))
    rows = {name: columns[name] for name in ("key", "caption", "clip_score")}
    own = stable_ids(f"{space}/{key}" for key in columns["key"].to_pylist()) if space else columns["own_id"].to_numpy()
    stated = id_column(index["image_id"], space)
    rows |= {"image_id": pa.array(np.where(stated == -1, own, stated)), "own_id": pa.array(own)}
    rows |= {"pair_id": pa.array(id_column(index["pair_id"], space))}
    rows |= {"status": pc.if_else(succeeded, "ok", "failed"), "reason": columns["status"], "row": row}
    batch = _with_members(pa.RecordBatch.from_pydict(rows), pa.array(number), columns, row)
    return TarRows(batch, [str(path) for path in tars], stamps, unused=unused)


def check_keys(keys: pa.Array, where: str) -> None:
    """Refuses keys that stand twice."""
    if pc.count_distinct(keys).as_py() < len(keys):
        counts = pc.value_counts(keys)
        twice = pc.greater(counts.field("counts"), 1)
        key = counts.field("values").filter(twice)[0].as_py()
        raise DataError(
            f"{where}: key {key!r} stands there more than once ({pc.sum(twice).as_py()} such keys). Make keys "
            "unique, or give several TarShards of fewer tars."
        )


def repaired_rows(given: TarRows, folder: Path) -> TarRows:
    """Puts the image that ``repaired_key`` names in the place of a row's own, with its ``image_id``.

    Adds ``image_status``, the status of that image.

    Raises:
        DataError: If a key is unknown, or of another split.
    """
    rows = given.columns
    at = pc.index_in(rows["repaired_key"].cast(pa.large_string()), value_set=rows["key"])
    lost = pc.and_(pc.is_valid(rows["repaired_key"]), pc.is_null(at))
    _refuse(folder, rows, lost, "its repaired_key is no key of the manifest")
    split = rows["split"].cast(pa.string())
    _refuse(
        folder, rows, pc.fill_null(pc.not_equal(split.take(at), split), False), "its repaired_key is of another split"
    )
    columns = dict(zip(rows.schema.names, rows.columns, strict=True))
    for name in ("tar", "offset", "size", "picture", "file_id", "image_id", "json_offset", "json_size"):
        columns[name] = columns[name].take(at)
    columns["image_status"] = rows["status"].cast(pa.string()).take(at)
    return replace(given, columns=pa.RecordBatch.from_pydict(columns))
