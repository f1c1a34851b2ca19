"""The audit of generated images: what one picture shows by itself, and what only the whole set shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from gmail_lightning.datasets.base import DataError
from gmail_lightning.transforms.image_hash import exact_hash, near_matches, near_pairs, perceptual_hash

#: Reasons in their order; the first that applies is kept. The first two are ``failed``: there is no image.
REASONS = (
    "not_finite",
    "undecodable",
    "safety",
    "black",
    "constant",
    "duplicate",
    "near_duplicate",
    "near_evaluation",
)
NEAR_DISTANCE = 2  # differing bits between the perceptual hashes of near duplicates
BLACK = 0.02  # mean and standard deviation below which a picture is black; pixels are in [0, 1]
CONSTANT = 1 / 255  # standard deviation of every channel below which a picture is of one colour


def audit_image(image: Tensor, flagged: bool) -> dict[str, Any]:
    """Checks one picture by itself.

    Args:
        image: As stored, uint8, shape (3, H, W).
        flagged: Whether the safety checker of the generator objects.

    Returns:
        ``status`` (ok or rejected), ``reason`` (safety, black, constant, or None), ``pixel_mean`` and ``pixel_std`` of
        all values in [0, 1], ``exact_hash`` and ``perceptual_hash``. Black: mean and deviation below 0.02. Constant, of
        whatever colour, white included: the deviation of each channel is below one level of 255.
    """
    counts = np.stack([np.bincount(channel.ravel(), minlength=256) for channel in image.cpu().numpy()])
    mean, std = _mean_and_std(counts.sum(axis=0))
    reason = None
    if flagged:  # first, since Stable Diffusion's checker paints what it flags black
        reason = "safety"
    elif mean < BLACK and std < BLACK:
        reason = "black"
    elif max(_mean_and_std(channel)[1] for channel in counts) < CONSTANT:
        reason = "constant"
    return {
        "status": "ok" if reason is None else "rejected",
        "reason": reason,
        "pixel_mean": mean,
        "pixel_std": std,
        "exact_hash": exact_hash(image),
        "perceptual_hash": perceptual_hash(image),
    }


def _mean_and_std(counts: np.ndarray) -> tuple[float, float]:
    """Of pixels in [0, 1], by how often each of the 256 levels occurs."""
    level = np.arange(256) / 255
    mean = counts @ level / counts.sum()
    return float(mean), float(np.sqrt(counts @ (level - mean) ** 2 / counts.sum()))


def audit_rows(
    table: pa.Table,
    evaluation: Mapping[str, tuple[list[str], np.ndarray]] | None = None,
    max_distance: int | None = NEAR_DISTANCE,
    evaluation_distance: int = NEAR_DISTANCE,
) -> pa.Table:
    """Checks pictures against one another and against evaluation images, in the order of the rows.

    Only rows whose status is ``ok`` are looked at and changed, so a second pass changes nothing. Of pictures with equal
    pixels (``exact_hash``) the first stays, the others are ``duplicate``. Then, greedily from the first row on, a
    picture whose ``perceptual_hash`` is near that of an earlier one that stays is ``near_duplicate``, those of one
    prompt included. Then pictures near an evaluation image are ``near_evaluation``. Drawings over white that differ in
    little are near one another (the figures are with :func:`~gmail_lightning.transforms.image_hash.perceptual_hash`):
    for such sets ``max_distance`` 0 or 1 loses fewer concepts, and None keeps them all.

    Args:
        table: Manifest rows with ``key``, ``status``, ``exact_hash`` and ``perceptual_hash``.
        evaluation: For each evaluation set its sample keys and perceptual hashes (N,) int64.
        max_distance: Differing bits between near duplicates, 0 to 4; None switches this check off.
        evaluation_distance: Differing bits between a picture and an evaluation image, 0 to 4.

    Returns:
        The table with ``status``, ``reason`` and ``duplicate_of`` (the key of the row that stays, or
        ``<set>/<sample key>``) of those rows set.

    Raises:
        DataError: If a column is missing, or an evaluation set has not one key per hash.
    """
    missing = [name for name in ("key", "status", "exact_hash", "perceptual_hash") if name not in table.column_names]
    if missing:
        raise DataError(f"The manifest to audit has no column {', '.join(missing)}. Audit each image first.")
    changed: dict[str, list[Any]] = {
        name: table[name].to_pylist() if name in table.column_names else [None] * len(table)
        for name in ("status", "reason", "duplicate_of")
    }
    keys = table["key"]
    ok = table["status"].to_numpy() == "ok"

    def reject(rows: np.ndarray, reason: str, names: list[str]) -> None:
        for row, name in zip(rows.tolist(), names, strict=True):
            changed["status"][row], changed["reason"][row], changed["duplicate_of"][row] = "rejected", reason, name
        ok[rows] = False

    rows, first = _equal_to_earlier(table["exact_hash"], ok)
    reject(rows, "duplicate", keys.take(pa.array(first)).to_pylist())
    known = ok & table["perceptual_hash"].is_valid().to_numpy()
    hashes = table["perceptual_hash"].fill_null(0).to_numpy().astype(np.int64)
    if max_distance is not None:
        rows, first = _near_earlier(hashes, np.flatnonzero(known), max_distance)
        reject(rows, "near_duplicate", keys.take(pa.array(first)).to_pylist())
    for name, (sample_keys, reference) in (evaluation or {}).items():
        if len(sample_keys) != len(reference):
            raise DataError(f"Evaluation set {name!r}: {len(sample_keys)} keys for {len(reference)} hashes.")
        candidates = np.flatnonzero(known & ok)
        match = near_matches(hashes[candidates], np.asarray(reference), evaluation_distance)
        near = match >= 0
        reject(candidates[near], "near_evaluation", [f"{name}/{sample_keys[i]}" for i in match[near].tolist()])
    for name, values in changed.items():
        column = pa.array(values, pa.string())
        at = table.schema.get_field_index(name)
        table = table.append_column(name, column) if at < 0 else table.set_column(at, name, column)
    return table


def _equal_to_earlier(column: pa.ChunkedArray, ok: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows, among those that are ``ok``, whose value an earlier one has, and the first row that has it."""
    codes = column.combine_chunks().dictionary_encode()
    codes = codes.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    rows = np.flatnonzero(ok & (codes >= 0))
    _, first, group = np.unique(codes[rows], return_index=True, return_inverse=True)
    later = first[group] != np.arange(len(rows))
    return rows[later], rows[first[group[later]]]


def _near_earlier(hashes: np.ndarray, rows: np.ndarray, max_distance: int) -> tuple[np.ndarray, np.ndarray]:
    """Among ``rows``, ascending: those near an earlier one that stays, and the nearest such, the first on ties."""
    values, first, group = np.unique(hashes[rows], return_index=True, return_inverse=True)
    by_age = np.argsort(first)  # distinct hashes by their first row: equal hashes share their fate, but for the first
    values, first = values[by_age], first[by_age]
    age = np.argsort(by_age)[group]
    later, earlier, distance = near_pairs(values, values, max_distance)
    older = earlier < later
    later, earlier, distance = later[older], earlier[older], distance[older]
    order = np.lexsort((earlier, distance, later))
    stays_for = np.arange(len(values))  # the hash that stands in for each; itself where it stays
    for one, other in zip(later[order].tolist(), earlier[order].tolist(), strict=True):
        if stays_for[one] == one and stays_for[other] == other:
            stays_for[one] = other
    keeper = first[stays_for[age]]
    rejected = keeper != np.arange(len(rows))
    return rows[rejected], rows[keeper[rejected]]
