"""Which rows of webdataset tars are used."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


@dataclass(frozen=True)
class Filter:
    """Which rows of a store are used: a view, nothing is written.

    The conditions apply one after the other: ``statuses``, ``min_clip_score``, then ``top_share`` of what is left.

    Attributes:
        min_clip_score: Least CLIPScore; rows without a score are left out, too.
        statuses: ``ok``, ``rejected``, or both. With ``rejected`` the data set cannot be trained on.
        top_share: Share of the rows to keep, the best by CLIPScore, or by ``repair_score`` where pairs are repaired
            (SynC keeps 0.9); of equal scores the earlier row. Rows without a score are left out, too.
    """

    min_clip_score: float | None = None
    statuses: list[str] = field(default_factory=lambda: ["ok"])
    top_share: float | None = None

    def __post_init__(self) -> None:
        if not self.statuses or set(self.statuses) - {"ok", "rejected"}:
            raise ValueError(f"Filter.statuses is {self.statuses}: use 'ok', 'rejected' or both (failed has no image).")
        if self.top_share is not None and not 0 < self.top_share <= 1:
            raise ValueError(f"Filter.top_share is {self.top_share}, but it is a share above 0 and up to 1.")


def choose(rows: pa.RecordBatch, filter: Filter, split: str | None, score: str) -> tuple[np.ndarray, dict[str, int]]:
    """Says which rows a filter keeps, and counts the others by their first reason.

    Args:
        rows: ``columns`` of a :class:`~gmail_lightning.datasets.tars.rows.TarRows`.
        filter: The conditions.
        split: Keep this split only.
        score: Column that ``top_share`` goes by.

    Returns:
        A mask of shape (N,), and the number of rows for each reason.
    """
    keep = np.ones(len(rows), dtype=bool)
    dropped: dict[str, int] = {}

    def drop(wrong: Any, reason: str) -> None:
        hit = keep & np.asarray(wrong)
        if hit.any():
            dropped[reason] = int(hit.sum())
            keep[hit] = False

    if split is not None:
        drop(pc.fill_null(pc.not_equal(rows["split"].cast(pa.string()), split), True), "of another split")
    status, statuses = rows["status"].cast(pa.string()), pa.array(filter.statuses, pa.string())
    reason = pc.coalesce(rows["reason"].cast(pa.string()), status)
    refused = pc.invert(pc.is_in(status, value_set=statuses))
    for value in pc.unique(reason.filter(refused)).to_pylist():
        drop(pc.and_(refused, pc.equal(reason, value)), value)
    if "repaired_key" in rows.schema.names:
        drop(pc.is_null(rows["repaired_key"]), "no repaired_key")
        drop(pc.invert(pc.is_in(rows["image_status"], value_set=statuses)), "whose chosen image is not ok")
    drop(pc.is_null(rows["offset"]), "no image")
    drop(pc.fill_null(pc.equal(pc.utf8_trim_whitespace(rows["caption"]), ""), True), "no caption")
    if filter.min_clip_score is not None or filter.top_share is not None:
        drop(pc.is_null(rows[score], nan_is_null=True), f"no {score}")
    if filter.min_clip_score is not None:
        drop(pc.fill_null(pc.less(rows[score], filter.min_clip_score), False), f"{score} < {filter.min_clip_score:g}")
    if filter.top_share is not None:
        left = np.flatnonzero(keep)
        order = np.argsort(-rows[score].fill_null(0).to_numpy()[left], kind="stable")
        worse = np.zeros(len(rows), dtype=bool)
        worse[left[order[max(round(filter.top_share * len(left)), 1) :]]] = True
        drop(worse, f"not among the best {filter.top_share:g} by {score}")
    return keep, dropped
