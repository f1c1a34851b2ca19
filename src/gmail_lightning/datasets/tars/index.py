"""Where the members of webdataset tars lie: one pass over the headers, kept in ``index.parquet`` beside the tars."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tarfile
import uuid
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gmail_lightning.cache import cache_folder
from gmail_lightning.datasets.base import DataError
from gmail_lightning.datasets.ids import id_text, known_by, read_at, stable_ids
from gmail_lightning.datasets.tars.fields import FIELDS, TEXTS, parquet_beside, refuse_generated, with_parquet
from gmail_lightning.datasets.tars.members import (
    beside_sample,
    name_is_text,
    of_no_use,
    open_tar,
    read_members,
    read_name,
)

INDEX = "index.parquet"
META = b"gmail_lightning_tar_index"
SCHEMA = pa.schema(
    [
        *((column.name, pa.float64() if column.name == "clip_score" else column.type) for column in TEXTS),
        ("own_id", pa.int64()),
    ]
)
VERSION = 8  # of what an index says; one of another version is made anew
UNREADABLE = "unreadable text"

Places = dict[str, tuple[int, int]]

logger = logging.getLogger(__name__)


class TarIndex(NamedTuple):
    """What is known of some tars.

    Attributes:
        table: One row per key, of ``SCHEMA``, null where a member is missing. ``own_id`` is for images without
            ``image_id``.
        number: The number of each row's tar, shape (N,) int32.
        stamps: The size and the time of change of each tar.
        unused: How many members are of no use, by what they are.
    """

    table: pa.Table
    number: np.ndarray
    stamps: list[tuple[int, int]]
    unused: dict[str, int]


def tar_index(tars: list[Path], described: bool) -> TarIndex:
    """Returns one row per key of the tars; tars that are new or have changed are read first.

    Args:
        tars: Tars of one folder.
        described: A manifest holds captions and ids, so that the members' texts need not be read.

    Raises:
        DataError: If a tar is cut short, damaged, or names a key twice, or is of a store without its manifest; names
            tar and key.
    """
    folder = tars[0].parent
    stamps = {tar.name: _stamp(tar) for tar in tars}
    known, parts, unused = _load(folder, described)
    stale = [tar for tar in tars if known.get(tar.name) != stamps[tar.name]]
    changed = [tar.name for tar in stale if tar.name in known]
    if changed:
        logger.warning("%s changed since %s were indexed: they are read again.", ", ".join(changed), folder)
    if stale:
        logger.info("Indexing %d tars of %s.", len(stale), folder)
        for tar in stale:
            parts[tar.name], unused[tar.name] = index_tar(tar, described)
        known |= {tar.name: stamps[tar.name] for tar in stale}
        kept = sorted(name for name in parts if (folder / name).is_file())
        tars_of = {name: (known[name], len(parts[name]), unused[name]) for name in kept}
        _save(folder, described, tars_of, [parts[name] for name in kept])
    table = pa.concat_tables([parts[tar.name] for tar in tars])
    number = np.repeat(np.arange(len(tars), dtype=np.int32), [len(parts[tar.name]) for tar in tars])
    total = sum((Counter(unused[tar.name]) for tar in tars), Counter[str]())
    return TarIndex(table, number, [(stamps[tar.name][0], stamps[tar.name][1]) for tar in tars], dict(total))


def index_tar(path: Path, described: bool = False) -> tuple[pa.Table, dict[str, int]]:
    """Makes the rows of one tar, by one pass over its headers; pieces of each image are read.

    Returns:
        A table of ``SCHEMA``, and how many members are of no use, by what they are.
    """
    columns: dict[str, list[Any]] = {name: [] for name in TEXTS.names}
    names: list[str] = []
    beside = None if described else parquet_beside(path)
    with path.open("rb") as file:
        members, unused = _members(path, file)
        if not described:
            _take_out_besides(members, unused, set() if beside is None else set(beside["key"].to_pylist()))
        for key, found in members.items():
            columns["key"].append(key)
            for kind in ("image", "json"):
                offset, size = found.get(kind, (None, None))
                columns[f"{kind}_offset"].append(offset)
                columns[f"{kind}_size"].append(size)
            fields = {} if described else _fields(path, key, file.fileno(), found, beside is None)
            for name in FIELDS:
                columns[name].append(fields.get(name))
            offset, size = found.get("image", (0, 0))
            names.append(known_by(key, size, read_at(file.fileno(), offset)))
    table = pa.table(columns, schema=TEXTS)
    if beside is not None:
        table = with_parquet(table, beside)
    own_ids = np.append(stable_ids(names), np.full(len(table) - len(names), -1))  # those of the Parquet file alone
    try:
        return table.append_column("own_id", pa.array(own_ids, pa.int64())).cast(SCHEMA), dict(unused)
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: a clip_score is no number ({error}).") from error


def _members(path: Path, file: IO[bytes]) -> tuple[dict[str, Places], Counter[str]]:
    """Offset and size of the image, the text and the record of each key, and how many members are of no use."""
    members: dict[str, Places] = {}
    unused: Counter[str] = Counter()
    try:
        with open_tar(file, "r:") as archive:
            for member in read_members(archive):
                name = read_name(member.name)
                if not name.kind or not member.isreg():
                    unused[of_no_use(member.name) if member.isreg() else "links"] += 1
                    continue
                _refuse_member(path, member)
                found = members.setdefault(name.key, {})
                if name.kind in found:
                    raise DataError(
                        f"{path}: key {name.key!r} has two members .{name.suffix} or two images. Make keys unique."
                    )
                found[name.kind] = (member.offset_data, member.size)
    except tarfile.ReadError as error:
        fault = f"{path}: not a whole uncompressed tar"
        if members:
            fault = f"{path} is cut short or damaged after key {next(reversed(members))!r}"
        raise DataError(f"{fault} ({error}). Fetch or make it again.") from error
    return members, unused


def _take_out_besides(members: dict[str, Places], unused: Counter[str], listed: set[str]) -> None:
    """Takes out single members that lie beside a sample, but for those that the Parquet file knows as samples."""
    with_image = {key for key, found in members.items() if "image" in found}
    for key in list(members):
        if key not in listed and (what := beside_sample(key, members[key], with_image)) is not None:
            unused[what] += 1
            del members[key]


def _refuse_member(path: Path, member: tarfile.TarInfo) -> None:
    if not name_is_text(member.name):
        raise DataError(f"{path}: the name {member.name!r} is not UTF-8. Write the tar again with such names.")
    if member.issparse():
        raise DataError(f"{path}: {member.name} is a sparse member, not to be read at its place. Write it without -S.")


def _fields(path: Path, key: str, descriptor: int, found: Places, alone: bool) -> dict[str, str | None]:
    """What a key's texts say; what cannot be read becomes its status, where they stand ``alone``, without a Parquet."""
    fields: dict[str, str | None] = {}
    record: dict[str, Any] = {}
    try:
        if "json" in found:
            offset, size = found["json"]
            record = read_record(os.pread(descriptor, size, offset))
            fields = {name: _text(name, record.get(name)) for name in FIELDS}
    except DataError as error:
        raise DataError(f"{path} key {key!r}: {error}") from error
    except ValueError:
        if alone:
            return {"status": UNREADABLE}
    try:
        if "txt" in found:
            offset, size = found["txt"]
            fields["caption"] = os.pread(descriptor, size, offset).decode("utf-8-sig") or fields.get("caption")
    except ValueError:
        fields["status"] = UNREADABLE
    refuse_generated(path, record)
    return fields


def read_record(data: bytes) -> dict[str, Any]:
    """Returns what a ``.json`` member says.

    Raises:
        ValueError: If it is no JSON object, or nested too deeply to be read, or its caption is no text.
    """
    try:
        record = json.loads(data)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    caption = record.get("caption")
    if not isinstance(caption, str | None) or not name_is_text(caption or ""):
        raise ValueError(f"its caption is {caption!r} and no text")
    return record


def _text(name: str, value: Any) -> str | None:
    if name.endswith("_id"):
        return id_text(value)
    return None if value is None else str(value)


def _stamp(tar: Path) -> tuple[int, int, int]:
    """Size and time of change of a tar, and of the Parquet file beside it the time."""
    status, beside = tar.stat(), tar.with_suffix(".parquet")
    return status.st_size, status.st_mtime_ns, beside.stat().st_mtime_ns if beside.is_file() else 0


def _places(folder: Path) -> list[Path]:
    """Where the index of a folder may be: in it, or in the cache if the folder cannot be written."""
    digest = hashlib.blake2b(str(folder.resolve()).encode(), digest_size=8).hexdigest()
    return [folder / INDEX, cache_folder() / f"index-{digest}.parquet"]


def _load(
    folder: Path, described: bool
) -> tuple[dict[str, tuple[int, int, int]], dict[str, pa.Table], dict[str, dict[str, int]]]:
    """Stamps, rows and members of no use of the tars that are indexed."""
    for place in _places(folder):
        try:
            with place.open("rb") as handle, pq.ParquetFile(handle) as file:  # once: another process may replace it
                meta = json.loads((file.schema_arrow.metadata or {}).get(META, b"{}"))
                if (meta.get("described"), meta.get("version")) != (described, VERSION):
                    continue
                table, start, parts = file.read().replace_schema_metadata(None).cast(SCHEMA), 0, {}
            if len(table) != sum(rows for _, rows, _ in meta["tars"].values()):
                continue
        except (OSError, pa.ArrowInvalid):  # not there, or not readable: made anew
            continue
        for name, (_, rows, _) in meta["tars"].items():
            parts[name] = table.slice(start, rows)
            start += rows
        stamps = {name: tuple(stamp) for name, (stamp, _, _) in meta["tars"].items()}
        return stamps, parts, {name: unused for name, (_, _, unused) in meta["tars"].items()}
    return {}, {}, {}


def remove_index(folder: Path) -> None:
    """Removes the index that lies in a folder; a file of another kind is left alone."""
    path = folder / INDEX
    with suppress(OSError, pa.ArrowInvalid):  # not there, or not readable: not ours
        if META in (pq.read_schema(path).metadata or {}):
            path.unlink(missing_ok=True)


def _save(folder: Path, described: bool, tars: dict[str, Any], parts: list[pa.Table]) -> None:
    """Writes the index under a temporary name and renames it; a file of another kind is left alone."""
    meta = json.dumps({"described": described, "version": VERSION, "tars": tars})
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
