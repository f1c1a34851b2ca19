"""What is to be generated: which folders are refused, who is in which shard, and what is missing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gmail_lightning.datasets.base import DataError
from gmail_lightning.datasets.shards import RECIPE
from gmail_lightning.generation.errors import FolderError
from gmail_lightning.generation.images.image_names import recipe_id
from gmail_lightning.generation.images.store import ShardStore
from gmail_lightning.generation.plan import Plan

Mode = Literal["incremental", "overwrite", "extend"]
Made = dict[str, dict[str, Any]]


def how_made(recipe: Mapping[str, Any], storage: Mapping[str, Any], scorer: Mapping[str, Any]) -> Made:
    """How images are made, as it comes back from ``recipe.json``.

    Args:
        recipe: All that the images depend on besides caption and seed; names and seeds follow from it alone.
        storage: How they are stored.
        scorer: What gives them their CLIPScore; empty where nothing does.
    """
    made: Made = json.loads(json.dumps({"recipe": recipe, "storage": storage, "scorer": scorer}))
    return made


def refuse_other_folder(store: ShardStore, mode: Mode, made: Made, split: str) -> None:
    """Refuses a folder that these images do not belong into; changes nothing.

    Args:
        store: The folder.
        mode: See ``DatasetWriter``.
        made: How the images are made.
        split: What they are for.

    Raises:
        FolderError: If another program made the folder or, in mode ``incremental``, another recipe,
            storage or scorer.
        DataError: If it holds images of another split.
    """
    foreign = sorted(p.name for p in store.folder.glob("*") if p.suffix in (".tar", ".parquet"))
    found = store.read_recipe()  # after the listing: another worker may be beginning, and this file is its first
    if found is None:
        if foreign:
            raise FolderError(
                f"{store.folder} holds {foreign[0]}{' and others' if len(foreign) > 1 else ''}, but no {RECIPE}: "
                "another program made it. Choose another folder."
            )
        return
    if mode == "overwrite":
        return
    if found["split"] != split:
        raise DataError(
            f"{store.folder} holds images of split {found['split']!r}, and these are of {split!r}: a store holds one "
            "split, so that images made for evaluation cannot get into training. Choose another folder."
        )
    known = [_how(entry, made) for entry in found["recipes"]]
    if mode == "extend" or made in known:
        return
    differing = "; ".join(
        f"{name}: {old.get(name)!r} there, {new.get(name)!r} now"
        for old, new in ((known[-1][part], made[part]) for part in made)
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    )
    raise FolderError(
        f"{store.folder} was made by another recipe ({differing}). Add these images by --mode extend, begin anew by "
        "--mode overwrite, or choose another folder."
    )


def begin_images(store: ShardStore, mode: Mode, made: Made, split: str, keys: pa.Array) -> None:
    """Refuses a folder that these images do not belong into, see :func:`refuse_other_folder`, or plans them in it."""
    refuse_other_folder(store, mode, made, split)
    plan_images(store, mode, made, split, keys)


def owned_shards(count: int, owner: int, owners: int) -> range:
    """Numbers of the shards, of ``count``, that one of some owners makes, from 0: each shard has one owner."""
    return range(owner, count, owners)


def plan_images(store: ShardStore, mode: Mode, made: Made, split: str, keys: pa.Array) -> None:
    """Writes down the recipe and plans the keys that are not planned yet; in mode ``overwrite`` after a clearance.

    Independent processes may do it at the same time: they write the same.

    Args:
        store: The folder.
        mode: See ``DatasetWriter``.
        made: How the images are made.
        split: What they are for.
        keys: Names of all images of this run.
    """
    store.folder.mkdir(parents=True, exist_ok=True)
    found = store.read_recipe()
    if found is not None and mode == "overwrite":
        store.clear()
        found = None
    recipes = [] if found is None else found["recipes"]
    if not any(_how(old, made) == made for old in recipes):
        created = datetime.now(UTC).isoformat(timespec="seconds")
        recipes = [*recipes, {"recipe_id": recipe_id(made["recipe"]), **made, "created": created}]
    if found is None or recipes != found["recipes"]:
        store.write_recipe({"split": split, "recipes": recipes})
    plan = store.read_plan()
    extended = plan.extended(keys, split, made["storage"]["shard_size"])
    if extended is not plan:
        store.write_plan(extended)


def missing_shards(
    store: ShardStore, plan: Plan, numbers: Sequence[int], keys: pa.Array
) -> list[tuple[str, np.ndarray]]:
    """Returns name and images, as positions in ``keys``, of the shards among ``numbers`` that are not complete.

    Raises:
        DataError: If a shard that is not complete needs an image that is not among the keys.
    """
    complete = store.complete(plan.shards)
    numbers = [number for number in numbers if not complete[number]]
    if not numbers:
        return []
    wanted = pa.concat_arrays([plan.keys[plan.rows(number)] for number in numbers])
    position = pc.index_in(wanted, value_set=keys)
    if position.null_count:
        raise DataError(
            f"{store.folder}: {position.null_count} images of shards that are not complete, such as "
            f"{wanted.filter(position.is_null())[0].as_py()}, are not among the prompts of this run. Finish these "
            "shards with the captions and the recipe they were planned for, or begin anew by --mode overwrite."
        )
    ends = np.cumsum([plan.size(number) for number in numbers])
    rows = np.split(position.to_numpy().astype(np.int64), ends[:-1])  # shard by shard
    return [(plan.shards[number], part) for number, part in zip(numbers, rows, strict=True)]


def _how(entry: Mapping[str, Any], made: Made) -> Made:
    """What an entry of ``recipe.json`` says; where it says nothing of the scorer, that is taken to be the same."""
    return {part: entry.get(part, made[part]) for part in made}
