"""The card of a generated data set: what is in it, what made it, what was left out, and how to read it."""

from __future__ import annotations

import json
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gmail_lightning.datasets.shards import MANIFEST, SCHEMA

COUNTED = ("prompt_id", "truncated", "generator", "size", "status", "reason", "clip_score", "clip_score_reason")
MAX_VALUES = 20  # a further column with more distinct values is counted, not listed
BINS, BAR = 12, 40  # of the histogram: number of bins, width of the longest bar
MEANING = {
    "not_finite": "the generator left NaN or infinity; there is no image",
    "undecodable": "the encoded image does not decode again; there is no image",
    "black": "black",
    "constant": "of one colour",
    "safety": "flagged by the generator's safety checker",
    "duplicate": "equal pixels to an earlier image",
    "near_duplicate": "near an earlier image by perceptual hash",
    "near_evaluation": "near an evaluation image by perceptual hash",
}


def dataset_card(
    folder: Path,
    recipe: Mapping[str, Any],
    licences: Mapping[str, str],
    leakage: Iterable[str],
    distances: str,
) -> str:
    """Writes up a store whose manifest is complete.

    Args:
        folder: Of the store.
        recipe: What ``recipe.json`` holds.
        licences: By what they are of.
        leakage: What is known of overlaps with evaluation sets, a line each.
        distances: How near duplicates and pictures near evaluation images were told.

    Returns:
        Markdown.
    """
    path = folder / MANIFEST
    further = [name for name in pq.read_schema(path).names if name not in SCHEMA.names]
    rows = pq.read_table(path, columns=[*COUNTED, *further], partitioning=None)
    parts = [
        f"# {folder.name}",
        f"{len(rows)} generated images, split `{recipe['split']}`, made by `{_command()}`. "
        f"Card of {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.",
        "Only rows whose status is `ok` are to be trained on; every score is a column of "
        f"`{MANIFEST}`, so that a threshold is a view.",
        "```python\nfrom gmail_lightning.datasets import TarShards\n\n"
        f"dataset = TarShards({str(folder)!r})  # rows that are ok\n```",
        "## Audit",
        _audit(rows, distances),
        "## Captions",
        _captions(rows, further),
        "## CLIPScore",
        _scores(rows),
        "## Overlap with evaluation sets",
        "\n".join(f"- {line}" for line in leakage) or "Not checked: this split is not for training.",
        "## Recipe",
        *(f"```json\n{json.dumps(entry, indent=2)}\n```" for entry in recipe["recipes"]),
        "## Licences",
        _table(("of", "licence"), licences.items()) if licences else "None were stated.",
    ]
    return "\n\n".join(parts) + "\n"


def _command() -> str:
    program = Path(sys.argv[0]).name
    program = "python -m gmail_lightning" if program == "__main__.py" else shlex.quote(program)
    return " ".join([program, shlex.join(sys.argv[1:])]).rstrip()


def _table(header: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _share(count: int, total: int) -> str:
    return f"{100 * count / max(total, 1):.2f} %"


def _counts(column: pa.ChunkedArray) -> list[tuple[Any, int]]:
    """Values with their numbers, the most frequent first."""
    counts = Counter({str(pair["values"]): pair["counts"] for pair in pc.value_counts(column).to_pylist()})
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _audit(rows: pa.Table, distances: str) -> str:
    counted = rows.group_by(["status", "reason"]).aggregate([([], "count_all")]).to_pylist()
    order = {reason: number for number, reason in enumerate([None, *MEANING])}
    lines = [
        (
            line["status"],
            line["reason"] or "",
            MEANING.get(line["reason"], ""),
            line["count_all"],
            _share(line["count_all"], len(rows)),
        )
        for line in sorted(counted, key=lambda line: order.get(line["reason"], len(order)))
    ]
    return f"{_table(('status', 'reason', 'meaning', 'images', 'share'), lines)}\n\n{distances}"


def _captions(rows: pa.Table, further: list[str]) -> str:
    truncated = pc.sum(rows["truncated"]).as_py() or 0
    lines: list[tuple[str, Any, Any]] = [
        ("prompts", pc.count_distinct(rows["prompt_id"]).as_py(), ""),
        ("prompts cut at the text encoder's limit", truncated, _share(truncated, len(rows))),
    ]
    for name in ("generator", "size", *further):
        counts = _counts(rows[name])
        if len(counts) > MAX_VALUES:
            lines.append((f"`{name}`: distinct values", len(counts), ""))
            continue
        lines += [(f"`{name}`: {value}", count, _share(count, len(rows))) for value, count in counts]
    return _table(("", "number", "share of images"), lines)


def _scores(rows: pa.Table) -> str:
    scores = rows["clip_score"].drop_null().to_numpy()
    missing = _counts(rows.filter(pc.is_null(rows["clip_score"]))["clip_score_reason"])
    lines = [f"No score: {', '.join(f'{count} ({reason})' for reason, count in missing)}."] if missing else []
    if len(scores):
        low, middle, high = np.percentile(scores, (5, 50, 95))
        lines.append(
            f"2.5 times the cosine, where positive. Mean {scores.mean():.3f}, median {middle:.3f}, 90 % between "
            f"{low:.3f} and {high:.3f}.\n"
        )
        counts, edges = np.histogram(scores, BINS)
        bars = (
            f"{left:6.3f} to {right:6.3f} {count:>9} {'#' * round(BAR * count / counts.max())}".rstrip()
            for left, right, count in zip(edges[:-1], edges[1:], counts, strict=True)
        )
        lines.append("```text\n" + "\n".join(bars) + "\n```")
    return "\n".join(lines)
