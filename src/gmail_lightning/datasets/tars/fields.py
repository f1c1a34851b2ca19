"""What is said of the keys of a tar: by their own texts, and by the Parquet file that img2dataset writes beside it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gmail_lightning.datasets.base import DataError
from gmail_lightning.datasets.ids import id_text

FIELDS = ("caption", "status", "image_id", "pair_id", "clip_score")  # of a key's .json, or of the Parquet file
OURS = {"prompt_id", "exact_hash"}  # every row that image generation wrote has both
PLACES = [f"{kind}_{what}" for kind in ("image", "json") for what in ("offset", "size")]
TEXTS = pa.schema([("key", pa.string()), *((n, pa.int64()) for n in PLACES), *((n, pa.string()) for n in FIELDS)])


def refuse_generated(path: Path, names: Iterable[str]) -> None:
    """Refuses a part of a store: its own texts know neither the audit of the whole set nor what it may be used for."""
    if set(names) >= OURS:
        raise DataError(
            f"{path} is of a store of generated images, whose manifest.parquet is not beside it: copy manifest.parquet "
            "too. It says of which split the images are, and which of them repeat others or evaluation images."
        )


def parquet_beside(path: Path) -> pa.Table | None:
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
    refuse_generated(path, names)
    if not _holds_texts(table["key"]) or table["key"].null_count:
        fault = (
            f"{table['key'].null_count} of its keys are null" if table["key"].null_count else "its keys are no texts"
        )
        raise DataError(f"{file}: {fault}, so that they are not those of the tar. Write them as texts, or remove it.")
    columns: dict[str, pa.Array] = {}
    for name in table.column_names:
        try:
            if name.endswith("_id"):
                columns[name] = pa.array([id_text(value) for value in table[name].to_pylist()], pa.string())
            elif name == "caption" and not _holds_texts(table[name]):
                raise DataError(f"its values are {table[name].type}, and no texts")
            else:
                columns[name] = table[name].cast(pa.string()).combine_chunks()
        except (DataError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise DataError(f"{file} column {name}: {error}") from error
    return pa.table(columns)


def _holds_texts(column: pa.ChunkedArray) -> bool:
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    return any(test(kind) for test in tests)


def with_parquet(table: pa.Table, beside: pa.Table) -> pa.Table:
    """Fills the fields of the keys from the Parquet file, and adds the keys that only the file has."""
    row = pc.index_in(table["key"], value_set=beside["key"].combine_chunks())
    for name in FIELDS:
        if name in beside.column_names:
            given = beside[name].take(row)
            values = pc.coalesce(table[name], given) if name == "caption" else pc.coalesce(given, table[name])
            table = table.set_column(table.schema.get_field_index(name), name, values)
    only = beside.filter(pc.invert(pc.is_in(beside["key"], value_set=table["key"].combine_chunks())))
    columns = {field.name: pa.nulls(len(only), field.type) for field in TEXTS}
    columns |= {name: only[name] for name in only.column_names}
    return pa.concat_tables([table, pa.table(columns, schema=TEXTS)])
