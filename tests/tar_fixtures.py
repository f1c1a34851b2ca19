"""Tars and stores made by hand, with the standard library and pyarrow alone."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def picture(number: int, size: int = 6) -> np.ndarray:
    """A picture of its own for each number, (H, W, 3) uint8."""
    return np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(number)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]]) -> Path:
    pairs = members.items() if isinstance(members, dict) else members
    with tarfile.open(path, "w") as tar:
        for name, data in pairs:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def sample(key: str, number: int, caption: str | None, /, **record: Any) -> list[tuple[str, bytes]]:
    texts = [] if caption is None else [(f"{key}.txt", caption.encode())]
    return [(f"{key}.png", png(number)), *texts, (f"{key}.json", json.dumps({"key": key, **record}).encode())]


def hash_of(number: int) -> int:
    """64 bits that no two numbers nearly share."""
    return int(np.random.default_rng(number).integers(-(2**63), 2**63 - 1))


def store_row(number: int, **changes: Any) -> dict[str, Any]:
    """A manifest row as the contract of the store says."""
    return {
        "key": f"k{number:03d}", "shard": f"train-{number // 4:06d}", "split": "train", "modality": "generated",
        "prompt_id": f"p{number}", "image_index": 0, "image_id": 1000 + number, "pair_id": number,
        "caption": f"caption {number}", "prompt": f"a {number}", "truncated": False, "generator": "sd15",
        "revision": None, "scheduler": "ddim", "steps": 4, "guidance": 7.5, "seed": number, "size": "6x6",
        "status": "ok", "reason": None, "flagged": False, "pixel_mean": 0.5, "pixel_std": 0.3,
        "exact_hash": hashlib.blake2b(png(number), digest_size=16).hexdigest(), "perceptual_hash": hash_of(number),
        "clip_score": 0.5 + number / 100, "clip_score_reason": None, "duplicate_of": None, "created": "now",
        "concept_set": "paired", **changes,
    }  # fmt: skip


SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("revision", "reason", "clip_score_reason", "duplicate_of", "concept_set")]
    + [("clip_score", pa.float64()), ("perceptual_hash", pa.int64()), ("image_index", pa.int32())]
)


def write_manifest(folder: Path, rows: list[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(rows)
    for field in SCHEMA:
        if field.name in table.column_names:
            table = table.set_column(
                table.schema.get_field_index(field.name), field.name, table[field.name].cast(field.type)
            )
    pq.write_table(table, folder / "manifest.parquet")


def write_store(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """Row n shows ``picture(n)``; a failed row has no image."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in dict.fromkeys(row["shard"] for row in rows):
        members = []
        for number, row in enumerate(rows):
            if row["shard"] == shard and row["status"] != "failed":
                members += sample(row["key"], number, row["caption"], number=number)
        write_tar(folder / f"{shard}.tar", members)
    (folder / "plan.parquet").write_bytes(b"not read here")
    (folder / "recipe.json").write_text("{}")
    write_manifest(folder, rows)
    return folder
