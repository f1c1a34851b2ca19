"""The files of a store of generated images: their names, and the columns of the manifest."""

from __future__ import annotations

import pyarrow as pa

MANIFEST, PLAN, RECIPE, CARD = "manifest.parquet", "plan.parquet", "recipe.json", "README.md"

#: Columns of the manifest; those of ``ImageTextDataset.columns`` follow, as strings.
SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("key", "shard", "split", "modality", "prompt_id")]
    + [("image_index", pa.int32()), ("image_id", pa.int64()), ("pair_id", pa.int64())]
    + [("caption", pa.string()), ("prompt", pa.string()), ("truncated", pa.bool_())]
    + [(name, pa.string()) for name in ("generator", "revision", "scheduler")]
    + [("steps", pa.int32()), ("guidance", pa.float64()), ("seed", pa.int64()), ("size", pa.string())]
    + [("status", pa.string()), ("reason", pa.string()), ("flagged", pa.bool_())]
    + [("pixel_mean", pa.float64()), ("pixel_std", pa.float64())]
    + [("exact_hash", pa.string()), ("perceptual_hash", pa.int64())]
    + [("clip_score", pa.float64()), ("clip_score_reason", pa.string())]
    + [("duplicate_of", pa.string()), ("created", pa.string())]
)
