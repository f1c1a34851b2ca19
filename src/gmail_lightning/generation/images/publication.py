"""A store whose shards are all there becomes a data set: an audit of the whole, a manifest, a card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gmail_lightning.datasets.shards import CARD, MANIFEST
from gmail_lightning.generation.images.audit import NEAR_DISTANCE
from gmail_lightning.generation.images.card import dataset_card
from gmail_lightning.generation.images.store import ShardStore
from gmail_lightning.generation.whole_files import write_text


class Published(NamedTuple):
    """What the data set holds.

    Attributes:
        counts: Number of rows by status.
        renumbered: Number of rows whose ``pair_id`` is not the stored one.
    """

    counts: dict[str, int]
    renumbered: int


def publish(
    store: ShardStore,
    shards: list[str],
    evaluation: Mapping[str, tuple[list[str], np.ndarray]],
    pair_ids: tuple[pa.Array, np.ndarray],
    *,
    max_distance: int | None,
    leakage: Sequence[str],
    licences: Mapping[str, str],
) -> Published:
    """Writes manifest and card.

    Args:
        store: Its shards are complete.
        shards: All of the plan.
        evaluation: Keys and perceptual hashes of evaluation images, by set.
        pair_ids: Keys and the ``pair_id`` that the captions now give them, see ``ShardStore.merge``.
        max_distance: Differing bits of near duplicates; None keeps them.
        leakage: What is known of overlaps with evaluation sets, a line each.
        licences: By what they are of.
    """
    renumbered = store.merge(shards, evaluation, max_distance, pair_ids)
    near = "kept" if max_distance is None else f"up to {max_distance} differing bits of perceptual hashes"
    distances = f"Near duplicates: {near}. Near evaluation images: up to {NEAR_DISTANCE} differing bits."
    recipe = store.read_recipe()
    assert recipe is not None
    write_text(store.folder / CARD, dataset_card(store.folder, recipe, licences, leakage, distances))
    store.remove_temporary(shards)
    status = pq.read_table(store.folder / MANIFEST, columns=["status"], partitioning=None)["status"]
    counts = {pair["values"]: pair["counts"] for pair in pc.value_counts(status).to_pylist()}
    return Published(counts, renumbered)
