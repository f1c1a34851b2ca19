"""The store: the plan, the merge of shards."""

import json
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gmail_lightning.datasets.shards import SCHEMA
from gmail_lightning.datasets.tars.index import tar_index
from gmail_lightning.generation.images import store as store_module
from gmail_lightning.generation.images.shard_writer import ShardFile
from gmail_lightning.generation.images.store import ShardStore
from gmail_lightning.generation.plan import EMPTY, Plan
from gmail_lightning.generation.whole_files import temporary


def large(*keys: str) -> pa.Array:
    return pa.array(keys, pa.large_string())


def held(plan: Plan) -> dict[str, list[str]]:
    return {name: plan.keys[plan.rows(i)].to_pylist() for i, name in enumerate(plan.shards)}


def test_the_plan_grows_at_its_end(tmp_path: Path) -> None:
    store = ShardStore(tmp_path)
    plan = EMPTY.extended(large("a", "b", "c", "d", "e"), "train", 2)
    assert held(plan) == {"train-000000": ["a", "b"], "train-000001": ["c", "d"], "train-000002": ["e"]}
    assert plan.extended(large("e", "a"), "train", 2) is plan
    longer = plan.extended(large("x", "a", "y", "e", "z"), "train", 2)
    assert held(longer) == {**held(plan), "train-000003": ["x", "y"], "train-000004": ["z"]}
    for wanted in (plan, longer):
        store.write_plan(wanted)
        assert held(store.read_plan()) == held(wanted)
        assert store.read_plan().sizes() == {name: len(keys) for name, keys in held(wanted).items()}
        first = (tmp_path / "plan.parquet").read_bytes()
        store.write_plan(wanted)
        assert (tmp_path / "plan.parquet").read_bytes() == first  # several processes may write it
    assert len(ShardStore(tmp_path / "empty").read_plan()) == 0


def row(key: str, shard: str, **columns: object) -> dict:
    return {"key": key, "shard": shard, "caption": f"of {key}", "status": "ok", "reason": None, **columns}


def write_shard(folder: Path, shard: str, rows: list[dict]) -> None:
    file = ShardFile(folder, shard)
    for one in rows:
        file.add(one, b"pixels", "png")
    assert not (folder / f"{shard}.tar").exists()
    file.close()


@pytest.mark.parametrize("group", [1, 3, 100])
def test_the_manifest_is_sorted_and_has_the_columns_of_all_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: int
) -> None:
    monkeypatch.setattr(store_module, "ROW_GROUP", group)
    rng = np.random.default_rng(0)
    hashes = rng.integers(-(2**62), 2**62, 9)
    rows = [row(f"k{i}", f"s{i // 3}", perceptual_hash=int(hashes[i]), exact_hash=f"h{i % 8}") for i in range(9)]
    for i, one in enumerate(rows):
        if i < 3:
            one["concept_set"] = "novel"
        if i >= 6:
            one["camera"] = "none"
    for shard in range(3):
        write_shard(tmp_path, f"s{shard}", rows[3 * shard : 3 * shard + 3][::-1])
    store = ShardStore(tmp_path)
    store.merge(["s0", "s1", "s2"], {"val": (["there"], hashes[4:5])}, 3)
    table = pq.read_table(tmp_path / "manifest.parquet")
    assert table.schema.names == [*SCHEMA.names, "camera", "concept_set"]
    assert all(table.schema.field(name).type == SCHEMA.field(name).type for name in SCHEMA.names)
    found = table.to_pylist()
    assert [one["key"] for one in found] == [f"k{i}" for i in range(9)]
    assert [one["camera"] for one in found] == [None] * 6 + ["none"] * 3
    assert [one["concept_set"] for one in found] == ["novel"] * 3 + [None] * 6
    wrong = {one["key"]: (one["status"], one["reason"], one["duplicate_of"]) for one in found if one["reason"]}
    assert wrong == {
        "k8": ("rejected", "duplicate", "k0"),
        "k4": ("rejected", "near_evaluation", "val/there"),
    }
    again = table
    store.merge(["s0", "s1", "s2"], {"val": (["there"], hashes[4:5])}, 3)
    assert pq.read_table(tmp_path / "manifest.parquet").equals(again)


def test_what_killed_runs_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    names = ["s0.tar.tmp-host-1", "s0.parquet.tmp-host-1", "manifest.parquet.tmp-host-2", "s9.tar.tmp-host-1"]
    names += ["mine.tmp-1", "s0.tar"]
    for name in names:
        (tmp_path / name).write_text("")
    store = ShardStore(tmp_path)
    store.remove_temporary(["s0"])
    left = {"manifest.parquet.tmp-host-2", "s9.tar.tmp-host-1", "mine.tmp-1", "s0.tar"}
    assert {p.name for p in tmp_path.iterdir()} == left  # another worker may be writing that manifest
    import os

    os.utime(tmp_path / "manifest.parquet.tmp-host-2", (time.time() - 7200,) * 2)
    store.remove_temporary(["s0"])
    assert {p.name for p in tmp_path.iterdir()} == left - {"manifest.parquet.tmp-host-2"}


def test_a_recipe_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    store = ShardStore(tmp_path)
    assert store.read_recipe() is None
    store.write_recipe({"split": "train", "recipes": []})
    assert store.read_recipe() == json.loads((tmp_path / "recipe.json").read_text())
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.json"]


def test_no_two_temporary_names_are_alike(tmp_path: Path) -> None:
    names = {temporary(tmp_path / "s0.tar").name for _ in range(3)}  # processes of two containers may have one number
    assert len(names) == 3
    assert all(name.startswith("s0.tar.tmp-") for name in names)


def test_a_cleared_folder_has_no_index_left(tmp_path: Path) -> None:
    store = ShardStore(tmp_path)
    store.write_plan(EMPTY.extended(large("k0"), "train", 2))
    write_shard(tmp_path, "train-000000", [row("k0", "train-000000")])
    tar_index([tmp_path / "train-000000.tar"], described=True)
    assert (tmp_path / "index.parquet").is_file()
    store.clear()
    assert list(tmp_path.iterdir()) == []
    pq.write_table(pa.table({"mine": [1]}), tmp_path / "index.parquet")
    store.clear()
    assert [path.name for path in tmp_path.iterdir()] == ["index.parquet"]
