"""The store that the generation of images writes: tar shards, one row per image, and the plan of what is where."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gmail_lightning.datasets.shards import CARD, MANIFEST, PLAN, RECIPE, SCHEMA
from gmail_lightning.datasets.tars.index import remove_index
from gmail_lightning.generation.images.audit import audit_rows
from gmail_lightning.generation.plan import EMPTY, Plan, run_starts
from gmail_lightning.generation.whole_files import TEMPORARY, temporary, write_table, write_text

logger = logging.getLogger(__name__)

AUDITED = ("pair_id", "status", "reason", "duplicate_of")  # set by the pass over all rows
COMPARED = ("key", "exact_hash", "perceptual_hash", *AUDITED)  # read by it
ROW_GROUP = 65_536


class ShardStore:
    """A folder of shards.

    ``<shard>.tar`` holds ``<key>.webp`` (or png, jpg), ``<key>.txt`` and ``<key>.json`` of each image; beside it
    ``<shard>.parquet`` holds a row per image, failed ones included, and says that the shard is complete. A row's status
    there, and in the ``.json``, is what its own picture shows; ``manifest.parquet`` has all rows, after the pass over
    the whole set. Files come into being under a temporary name, so what has its name is whole.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read_recipe(self) -> dict[str, Any] | None:
        """What ``recipe.json`` holds, None where there is none."""
        path = self.folder / RECIPE
        return json.loads(path.read_text()) if path.exists() else None  # type: ignore[no-any-return]

    def write_recipe(self, recipe: Mapping[str, Any]) -> None:
        """Writes ``recipe.json``."""
        write_text(self.folder / RECIPE, json.dumps(recipe, indent=2) + "\n")

    def read_plan(self) -> Plan:
        """The plan, empty where there is none."""
        path = self.folder / PLAN
        if not path.exists():
            return EMPTY
        table = pq.read_table(path, read_dictionary=["shard"], partitioning=None)
        shard = table["shard"].combine_chunks()
        codes = np.asarray(shard.indices)
        first = run_starts(codes)
        names = shard.dictionary.take(pa.array(codes[first])).to_pylist()
        return Plan(table["key"].combine_chunks().cast(pa.large_string()), names, np.append(first, len(table)))

    def write_plan(self, plan: Plan) -> None:
        """Writes the plan: the same file for the same plan, so that several processes may do it."""
        codes = np.repeat(np.arange(len(plan.shards), dtype=np.int32), np.diff(plan.starts))
        shard = pa.DictionaryArray.from_arrays(codes, pa.array(plan.shards, pa.string()))
        write_table(pa.table({"key": plan.keys, "shard": shard}), self.folder / PLAN)

    def complete(self, shards: Iterable[str]) -> list[bool]:
        """Whether each shard is complete."""
        there = {entry.name for entry in os.scandir(self.folder)} if self.folder.is_dir() else set()
        return [f"{shard}.parquet" in there for shard in shards]

    def clear(self) -> None:
        """Removes what generation wrote here, and the index of its tars; the folder knows it until the last is gone."""
        shards = set(self.read_plan().shards)
        for name in (MANIFEST, CARD):
            (self.folder / name).unlink(missing_ok=True)
        for path in list(self.folder.iterdir()):
            if path.suffix in (".tar", ".parquet") and path.stem in shards:
                path.unlink(missing_ok=True)
        remove_index(self.folder)
        self.remove_temporary(shards, age=0)
        for name in (PLAN, RECIPE):
            (self.folder / name).unlink(missing_ok=True)

    def remove_temporary(self, shards: Iterable[str], age: float = 3600) -> None:
        """Removes what killed runs left of the given shards, and of the other files what is older than ``age`` seconds:
        another worker may be writing the same manifest.
        """
        ours = {f"{shard}{suffix}" for shard in shards for suffix in (".tar", ".parquet")}
        for path in list(self.folder.iterdir()):
            name, mark, _ = path.name.partition(TEMPORARY)
            if not mark or name not in {*ours, MANIFEST, PLAN, RECIPE, CARD}:
                continue
            if name in ours or time.time() - path.stat().st_mtime >= age:
                path.unlink(missing_ok=True)

    def merge(
        self,
        shards: list[str],
        evaluation: Mapping[str, tuple[list[str], np.ndarray]],
        max_distance: int | None,
        pair_ids: tuple[pa.Array, np.ndarray] | None = None,
    ) -> int:
        """Audits the rows of all shards against one another and writes the manifest, sorted by shard and key.

        Two passes over the shards, so that only what is compared is ever in memory at once. Columns that were added to
        an earlier manifest of the very same images (``gmail-lightning repair``) are kept.

        Args:
            shards: All of the plan.
            evaluation: Keys and perceptual hashes of evaluation images, by set.
            max_distance: Of near duplicates.
            pair_ids: Keys (N,) and the ``pair_id`` that the captions now give them (N,), in place of those that were
                stored: whoever renumbers the captions keeps the images.

        Returns:
            Number of rows whose ``pair_id`` is not the stored one.
        """
        schema, compared = SCHEMA, []
        for shard in shards:
            file = pq.ParquetFile(self.folder / f"{shard}.parquet")
            schema = pa.unify_schemas([schema, file.schema_arrow])
            compared.append(file.read(columns=list(COMPARED)).sort_by("key"))
        audited = audit_rows(pa.concat_tables(compared), evaluation, max_distance=max_distance)
        stored = audited["pair_id"].fill_null(-1).to_numpy()
        current = stored
        if pair_ids is not None:
            row = pc.index_in(audited["key"].combine_chunks(), value_set=pair_ids[0]).fill_null(-1).to_numpy()
            current = np.where(row >= 0, pair_ids[1][row], stored)
            at = audited.schema.get_field_index("pair_id")
            audited = audited.set_column(at, "pair_id", pa.array(current, pa.int64()))
        further = sorted(set(schema.names) - set(SCHEMA.names))
        schema = pa.schema([*SCHEMA, *(schema.field(name) for name in further)])
        path = temporary(self.folder / MANIFEST)
        with pq.ParquetWriter(path, schema) as writer:
            for rows in self._rows(shards, schema, audited):
                writer.write_table(rows, row_group_size=ROW_GROUP)
        self._keep_added(path)
        path.replace(self.folder / MANIFEST)
        return int((current != stored).sum())

    def _keep_added(self, path: Path) -> None:
        """Copies columns of the present manifest that the new one at ``path`` lacks, if both hold the same images."""
        if not (self.folder / MANIFEST).is_file():
            return
        before = pq.ParquetFile(self.folder / MANIFEST)
        added = [name for name in before.schema_arrow.names if name not in pq.read_schema(path).names]
        if not added:
            return
        old, new = before.read(["key", *added]), pq.read_table(path, partitioning=None)
        if not old["key"].combine_chunks().equals(new["key"].combine_chunks()):
            logger.warning("%s: other images than before, so %s are gone.", self.folder / MANIFEST, ", ".join(added))
            return
        for name in added:
            new = new.append_column(name, old[name])
        pq.write_table(new, path, row_group_size=ROW_GROUP)

    def _rows(self, shards: list[str], schema: pa.Schema, audited: pa.Table) -> Iterator[pa.Table]:
        """All rows with what the audit says, in row groups of many shards."""
        parts, start = [], 0
        for number, shard in enumerate(shards, 1):
            rows = pq.read_table(self.folder / f"{shard}.parquet", schema=schema, partitioning=None).sort_by("key")
            for name in AUDITED:
                column = audited[name].slice(start, len(rows))
                rows = rows.set_column(schema.get_field_index(name), schema.field(name), column)
            start += len(rows)
            parts.append(rows)
            if number == len(shards) or sum(map(len, parts)) >= ROW_GROUP:
                yield pa.concat_tables(parts).combine_chunks()
                parts = []
