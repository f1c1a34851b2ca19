"""Where the members of webdataset tars lie: one pass over the headers, kept in ``index.parquet`` beside the tars."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tarfile
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gmail_lightning.cache import cache_folder
from gmail_lightning.datasets.base import DataError
from gmail_lightning.datasets.columns import integers_or_texts
from gmail_lightning.datasets.ids import stable_ids
from gmail_lightning.transforms.image import SUFFIXES

INDEX = "index.parquet"
META = b"gmail_lightning_tar_index"
FIELDS = ("caption", "status", "image_id", "pair_id", "clip_score")  # of a key's .json, or of the Parquet file
OURS = {"prompt_id", "exact_hash"}  # every row that image generation wrote has both
PLACES = [f"{kind}_{what}" for kind in ("image", "json") for what in ("offset", "size")]
TEXTS = pa.schema([("key", pa.string()), *((n, pa.int64()) for n in PLACES), *((n, pa.string()) for n in FIELDS)])
NUMBERS = {"image_id": pa.int64(), "pair_id": pa.int64(), "clip_score": pa.float64()}
SCHEMA = pa.schema([(column.name, NUMBERS.get(column.name, column.type)) for column in TEXTS])

logger = logging.getLogger(__name__)


def tar_index(tars: list[Path], described: bool) -> tuple[pa.Table, np.ndarray, list[tuple[int, int]]]:
    """Returns one row per key of the tars; tars that are new or have changed are read first.

    Args:
        tars: Tars of one folder.
        described: A manifest holds captions and ids, so that the members' texts need not be read.

    Returns:
        A table of ``SCHEMA``, null where a member is missing; the number of each row's tar in ``tars``, shape (N,)
        int32; the size and time of change of each tar.

    Raises:
        DataError: If a tar is cut short, damaged, or names a key twice, or is of a store without its manifest; names
            tar and key.
    """
    folder = tars[0].parent
    stamps = {tar.name: _stamp(tar) for tar in tars}
    known, parts = _load(folder, described)
    stale = [tar for tar in tars if known.get(tar.name) != stamps[tar.name]]
    changed = [tar.name for tar in stale if tar.name in known]
    if changed:
        logger.warning("%s changed since %s were indexed: they are read again.", ", ".join(changed), folder)
    if stale:
        logger.info("Indexing %d tars of %s.", len(stale), folder)
        parts |= {tar.name: index_tar(tar, described) for tar in stale}
        known |= {tar.name: stamps[tar.name] for tar in stale}
        kept = sorted(name for name in parts if (folder / name).is_file())
        _save(folder, described, {name: known[name] for name in kept}, [parts[name] for name in kept])
    table = pa.concat_tables([parts[tar.name] for tar in tars])
    number = np.repeat(np.arange(len(tars), dtype=np.int32), [len(parts[tar.name]) for tar in tars])
    return table, number, [(stamps[tar.name][0], stamps[tar.name][1]) for tar in tars]


def index_tar(path: Path, described: bool = False) -> pa.Table:
    """Makes the rows of one tar, by one pass over its headers; images are not read."""
    columns: dict[str, list[Any]] = {name: [] for name in TEXTS.names}
    beside = None if described else _parquet_beside(path)
    members = _members(path)
    with path.open("rb") as file:
        for key, found in members.items():
            columns["key"].append(key)
            for kind in ("image", "json"):
                offset, size = found.get(kind, (None, None))
                columns[f"{kind}_offset"].append(offset)
                columns[f"{kind}_size"].append(size)
            fields = {} if described else _fields(path, file.fileno(), found, beside is None)
            for name in FIELDS:
                columns[name].append(fields.get(name))
    table = pa.table(columns, schema=TEXTS)
    if beside is not None:
        table = _with_parquet(table, beside)
    own = {"image_id": table["key"].to_pylist(), "pair_id": [None] * len(table)}
    for name in () if described else ("image_id", "pair_id"):
        values = zip(table[name].to_pylist(), own[name], strict=True)
        column = pa.array([_id(value, default) for value, default in values], pa.int64())
        table = table.set_column(table.schema.get_field_index(name), name, column)
    try:
        return table.cast(SCHEMA)
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: a clip_score is no number ({error}).") from error


def _id(value: str | None, default: str | None) -> int:
    """An integer as it is, a text by a stable hash, that of the default where there is no value, -1 without one."""
    if value is None and default is None:
        return -1
    if value is not None and re.fullmatch(r"-?\d{1,18}", value):
        return int(value)
    return int(stable_ids([value or default or ""])[0])


def _members(path: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Offset and size of the image, the text and the record of each key."""
    members: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                cast(Any, tar).members = []  # else the list of all members grows
                match = re.fullmatch(r"(?:\./)?((?:.*/)?[^./]+)\.([^/]*)", member.name)  # up to the name's first dot
                if match is None or not member.isreg():
                    continue
                key, suffix = match.groups()
                suffix = suffix.lower()
                kind = "image" if f".{suffix}" in SUFFIXES else suffix
                if kind not in ("image", "txt", "json"):
                    continue
                found = members.setdefault(key, {})
                if kind in found:
                    raise DataError(f"{path}: key {key!r} has two members .{suffix} or two images. Make keys unique.")
                found[kind] = (member.offset_data, member.size)
            end = tar.offset
        with path.open("rb") as file:
            closed = os.pread(file.fileno(), tarfile.BLOCKSIZE, end) == bytes(tarfile.BLOCKSIZE)
    except tarfile.ReadError as error:
        raise DataError(
            f"{path}: not a whole uncompressed tar ({error}). Was it cut short, as by a download that was stopped? "
            "Fetch or make it again."
        ) from error
    if not closed:
        last = next(reversed(members), None)
        raise DataError(f"{path} is cut short or damaged after key {last!r}: no end mark. Fetch or make it again.")
    return members


def _fields(path: Path, descriptor: int, found: dict[str, tuple[int, int]], with_record: bool) -> dict[str, str | None]:
    """What a key's texts say; what cannot be read becomes its status."""
    fields: dict[str, str | None] = {}
    record: dict[str, Any] = {}
    try:
        if with_record and "json" in found:
            offset, size = found["json"]
            record = json.loads(os.pread(descriptor, size, offset))
            fields = {name: None if record.get(name) is None else str(record[name]) for name in FIELDS}
        if "txt" in found:
            offset, size = found["txt"]
            fields["caption"] = os.pread(descriptor, size, offset).decode() or fields.get("caption")
    except (ValueError, AttributeError):  # not UTF-8, not JSON, not an object
        fields["status"] = "unreadable text"
    _refuse_generated(path, record if isinstance(record, dict) else {})
    return fields


def _refuse_generated(path: Path, names: Iterable[str]) -> None:
    """Refuses a part of a store: its own texts know neither the audit of the whole set nor what it may be used for."""
    if set(names) >= OURS:
        raise DataError(
            f"{path} is of a store of generated images, whose manifest.parquet is not beside it: copy manifest.parquet "
            "too. It says of which split the images are, and which of them repeat others or evaluation images."
        )


def _parquet_beside(path: Path) -> pa.Table | None:
    """The Parquet file that img2dataset writes beside a tar: its keys, failed downloads included, and ``FIELDS``."""
    file = path.with_suffix(".parquet")
    if not file.is_file():
        return None
    try:
        names = pq.read_schema(file).names
        table = pq.read_table(file, columns=[name for name in ("key", *FIELDS) if name in names], partitioning=None)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{file}: not a readable Parquet file ({error}). Fetch it again, or remove it.") from error
    if "key" not in names:
        return None
    _refuse_generated(path, names)
    whole = {
        name: integers_or_texts(table[name]) if name.endswith("_id") else table[name] for name in table.column_names
    }
    return pa.table({name: column.cast(pa.string()).combine_chunks() for name, column in whole.items()})


def _with_parquet(table: pa.Table, beside: pa.Table) -> pa.Table:
    """Fills the fields of the keys from the Parquet file, and adds the keys that only the file has."""
    row = pc.index_in(table["key"], value_set=beside["key"].combine_chunks())
    for name in FIELDS:
        if name in beside.column_names:
            values = pc.coalesce(table[name], beside[name].take(row))
            table = table.set_column(table.schema.get_field_index(name), name, values)
    only = beside.filter(pc.invert(pc.is_in(beside["key"], value_set=table["key"].combine_chunks())))
    columns = {field.name: pa.nulls(len(only), field.type) for field in TEXTS}
    columns |= {name: only[name] for name in only.column_names}
    return pa.concat_tables([table, pa.table(columns, schema=TEXTS)])


def _stamp(tar: Path) -> tuple[int, int, int]:
    """Size and time of change of a tar, and of the Parquet file beside it the time."""
    status, beside = tar.stat(), tar.with_suffix(".parquet")
    return status.st_size, status.st_mtime_ns, beside.stat().st_mtime_ns if beside.is_file() else 0


def _places(folder: Path) -> list[Path]:
    """Where the index of a folder may be: in it, or in the cache if the folder cannot be written."""
    digest = hashlib.blake2b(str(folder.resolve()).encode(), digest_size=8).hexdigest()
    return [folder / INDEX, cache_folder() / f"index-{digest}.parquet"]


def _load(folder: Path, described: bool) -> tuple[dict[str, tuple[int, int, int]], dict[str, pa.Table]]:
    """Stamps and rows of the tars that are indexed."""
    for place in _places(folder):
        try:
            meta = json.loads((pq.read_schema(place).metadata or {}).get(META, b"{}"))
            if meta.get("described") is not described or meta.get("schema") != SCHEMA.names:
                continue
            table, start, parts = pq.read_table(place, schema=SCHEMA, partitioning=None), 0, {}
        except (OSError, pa.ArrowInvalid):  # not there, or not readable: made anew
            continue
        for name, (_, rows) in meta["tars"].items():
            parts[name] = table.slice(start, rows)
            start += rows
        return {name: tuple(stamp) for name, (stamp, _) in meta["tars"].items()}, parts
    return {}, {}


def remove_index(folder: Path) -> None:
    """Removes the index that lies in a folder; a file of another kind is left alone."""
    path = folder / INDEX
    with suppress(OSError, pa.ArrowInvalid):  # not there, or not readable: not ours
        if META in (pq.read_schema(path).metadata or {}):
            path.unlink(missing_ok=True)


def _save(folder: Path, described: bool, stamps: dict[str, tuple[int, int, int]], parts: list[pa.Table]) -> None:
    """Writes the index under a temporary name and renames it; a file of another kind is left alone."""
    tars = {name: (stamp, len(part)) for (name, stamp), part in zip(stamps.items(), parts, strict=True)}
    meta = json.dumps({"described": described, "schema": SCHEMA.names, "tars": tars})
    table = pa.concat_tables(parts).replace_schema_metadata({META: meta.encode()})
    reasons = []
    for place in _places(folder):
        temporary = place.with_name(f"{place.name}.tmp-{uuid.uuid4().hex}")
        try:
            if place.is_file() and META not in (pq.read_schema(place).metadata or {}):
                raise OSError(f"{place} is not an index")
            if place.parent != folder:
                place.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, temporary)
            temporary.replace(place)
            return
        except (OSError, pa.ArrowInvalid) as error:
            reasons.append(str(error))
            with suppress(OSError):
                temporary.unlink()
    logger.warning("The index of %s cannot be kept and is made each time (%s). Set GMAIL_LIGHTNING_CACHE to a folder "
                   "that can be written.", folder, "; ".join(reasons))  # fmt: skip
