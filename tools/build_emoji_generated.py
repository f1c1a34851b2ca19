"""Packs the generated hand of ``recipes/emoji/generate.yaml``: ``python tools/build_emoji_generated.py STORE``."""

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from gmail_lightning.datasets import TarShards, emoji


def build(store: Path, out: Path) -> None:
    """Writes the images that passed the audit, as they are stored, in the order of their keys."""
    images = TarShards(store)
    rows = sorted(range(len(images)), key=images.sample_key)
    concepts = [images.columns(row)["concept"] for row in rows]
    table = {
        "concept": concepts,
        "key": [images.sample_key(row) for row in rows],
        "caption": [images.captions(row)[0] for row in rows],
        "image": [images.encoded(row) for row in rows],
    }
    path = out / "generated.parquet"
    pq.write_table(pa.table(table), path, compression="zstd")
    print(f"{len(rows)} images of {len(set(concepts))} concepts, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    build(Path(sys.argv[1]), Path(emoji.__file__).parent)
