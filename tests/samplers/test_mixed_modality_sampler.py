"""The sampler against its promises, rank by rank, without starting processes."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest

from gmail_lightning.datasets import DataError
from gmail_lightning.samplers import MixedModalitySampler, UnpaddedDistributedSampler
from gmail_lightning.samplers.mixed_modality import find_pairs, stable_hash

WORLDS = (1, 2, 4)
Batch = list[tuple[int, int, int]]


def pool(num_generated: int, num_real: int) -> tuple[np.ndarray, np.ndarray]:
    """Unpaired rows in a scrambled order."""
    modality = np.array([1] * num_generated + [0] * num_real)
    np.random.default_rng(7).shuffle(modality)
    return modality, np.full(len(modality), -1)


def paired(num_pairs: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """``k`` generated rows and one real row for each of ``num_pairs`` ids (100, 103, 106, ...), scrambled."""
    modality = np.repeat([0] + [1] * k, num_pairs)
    pair_id = np.tile(100 + 3 * np.arange(num_pairs), k + 1)
    order = np.random.default_rng(8).permutation(len(modality))
    return modality[order], pair_id[order]


def batches(rows: tuple[np.ndarray, np.ndarray], batch_size: int, epoch: int = 0, **arguments: object) -> list[Batch]:
    sampler = MixedModalitySampler(*rows, batch_size=batch_size, **arguments)
    sampler.set_epoch(epoch)
    items = list(sampler)
    assert len(items) % batch_size == 0
    return [items[i : i + batch_size] for i in range(0, len(items), batch_size)]


def per_rank(rows: tuple[np.ndarray, np.ndarray], total: int, world: int, **arguments: object) -> list[list[Batch]]:
    return [batches(rows, total // world, num_replicas=world, rank=r, **arguments) for r in range(world)]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 1.0])
def test_every_batch_of_every_rank_has_the_exact_share(world: int, fraction: float) -> None:
    rows = pool(150, 90)
    for rank in per_rank(rows, 32, world, mode="mixture", generated_fraction=fraction):
        assert len(rank) == (150 // (32 * fraction) if fraction else 90 // 32)
        for batch in rank:
            assert sum(rows[0][row] for row, _, _ in batch) == len(batch) * fraction


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("world", WORLDS)
def test_pairs_are_neighbours_and_half_of_every_batch(world: int, k: int) -> None:
    modality, pair_id = paired(50, k)
    for rank in per_rank((modality, pair_id), 16, world, mode="paired"):
        assert len(rank) == 50 // 8
        for batch in rank:
            for (generated, _, _), (real, _, _) in zip(batch[::2], batch[1::2], strict=True):
                assert (modality[generated], modality[real]) == (1, 0)
                assert pair_id[generated] == pair_id[real]


@pytest.mark.parametrize("arguments", [{"mode": "paired"}, {"mode": "mixture", "generated_fraction": 0.25}])
def test_global_batches_do_not_depend_on_the_number_of_ranks(arguments: dict[str, object]) -> None:
    rows = paired(60, 2)
    for epoch in (0, 5):
        single = [sorted(batch) for batch in batches(rows, 16, epoch, **arguments)]
        assert {epoch} == {item[1] for batch in single for item in batch}
        for world in WORLDS[1:]:
            ranks = per_rank(rows, 16, world, epoch=epoch, **arguments)
            joined = [sorted(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)]
            assert joined == single  # the items hold the position, so augmentation is the same, too
            for parts in zip(*ranks, strict=True):
                assert len({item for part in parts for item in part}) == 16  # no item on two ranks
    positions = [position for batch in single for _, _, position in batch]
    assert sorted(positions) == list(range(16 * len(single)))


@pytest.mark.parametrize("world", WORLDS)
def test_ranks_are_disjoint_over_a_pass(world: int) -> None:
    rows = paired(64, 1)  # one epoch is exactly one pass
    seen = [row for rank in per_rank(rows, 16, world, mode="paired") for batch in rank for row, _, _ in batch]
    assert sorted(seen) == list(range(128))


def test_each_pass_is_a_fresh_permutation_and_nothing_is_dropped_between_epochs() -> None:
    rows = pool(23, 17)  # 5 batches of 4 generated rows an epoch: passes end inside epochs
    sampler = MixedModalitySampler(*rows, batch_size=8, mode="mixture", seed=3)
    stream: dict[int, list[int]] = {0: [], 1: []}
    for epoch in range(23):
        sampler.set_epoch(epoch)
        assert len(list(sampler)) == len(sampler) == 40
        for row, _, _ in sampler:
            stream[int(rows[0][row])].append(row)
    for modality, size in ((1, 23), (0, 17)):
        members = np.flatnonzero(rows[0] == modality).tolist()
        full = len(stream[modality]) // size * size
        passes = [tuple(stream[modality][i : i + size]) for i in range(0, full, size)]
        assert len(passes) == 23 * 20 // size
        assert all(sorted(one) == members for one in passes)
        assert len(set(passes)) == len(passes)  # all in different orders
    other = MixedModalitySampler(*rows, batch_size=8, mode="mixture", seed=4)
    sampler.set_epoch(0)
    assert list(other) != list(sampler)


def test_each_of_k_images_is_drawn_over_the_passes() -> None:
    modality, pair_id = paired(8, 3)
    counts = np.zeros(len(modality), dtype=int)
    passes = 60
    for epoch in range(passes):
        for batch in batches((modality, pair_id), 16, epoch, mode="paired"):
            counts[[row for row, _, _ in batch]] += 1
    assert (counts[modality == 0] == passes).all()
    # Binomial(60, 1/3): mean 20, standard deviation 3.7; 24 draws stay within 4 of them.
    assert (np.abs(counts[modality == 1] - 20) < 15).all()
    assert counts[modality == 1].sum() == 8 * passes


@pytest.mark.parametrize("mode", ["paired", "mixture"])
@pytest.mark.parametrize("world", WORLDS)
def test_start_batch_continues_with_the_very_next_item(mode: str, world: int) -> None:
    rows = paired(45, 2)
    for rank in range(world):
        whole = MixedModalitySampler(*rows, batch_size=16 // world, mode=mode, num_replicas=world, rank=rank)
        steps = whole.steps_per_epoch
        straight = []
        for epoch in range(3):
            whole.set_epoch(epoch)
            straight += list(whole)
        for start in (0, 1, steps - 1, steps, steps + 2, 3 * steps):
            whole.start_batch = start
            resumed = []
            for epoch in range(3):
                whole.set_epoch(epoch)
                resumed += list(whole)
            assert resumed == straight[start * 16 // world :]
        assert len(whole) == steps * 16 // world  # a resumed epoch keeps its full length


def test_blocks_of_batches_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = paired(100, 2)
    expected = batches(rows, 8, 2, mode="paired")
    monkeypatch.setattr("gmail_lightning.samplers.mixed_modality.BATCHES_AT_ONCE", 3)
    assert batches(rows, 8, 2, mode="paired") == expected


def test_stable_hash_is_splitmix64() -> None:
    def reference(*parts: int) -> int:
        mask, value = 2**64 - 1, 0
        for part in parts:
            value = ((value ^ (part & mask)) + 0x9E3779B97F4A7C15) & mask
            value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
            value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
            value ^= value >> 31
        return value

    assert int(stable_hash(0)) == 0xE220A8397B1DCDAF  # first output of SplitMix64 seeded with 0, as published
    for parts in ((0,), (1, 2), (-1, 2**40, 7)):
        assert int(stable_hash(*parts)) == reference(*parts)
    assert stable_hash(3, np.arange(4), 1).tolist() == [reference(3, i, 1) for i in range(4)]


def test_find_pairs_counts_real_rows_without_partner() -> None:
    found = find_pairs(np.array([0, 0, 1, 1, 0]), np.array([5, 9, 9, 9, -1]))
    assert found.num_unpaired_real == 2
    assert (found.pair_id.tolist(), found.real.tolist(), found.generated.tolist()) == ([9], [1], [2, 3])


@pytest.mark.parametrize(
    ("modality", "pair_id", "arguments", "error", "message"),
    [
        ([0, 1], [1, 1], {"batch_size": 3}, ValueError, "batch_size=3 .* even"),
        ([0, 1], [1, 1], {"batch_size": 2, "mode": "both"}, ValueError, "Unknown mode 'both'"),
        ([0, 1], [1, 2], {"batch_size": 2}, DataError, r"row 1 .* no real row of its pair_id 2 \(1 such rows of 1\)"),
        ([0, 1, 1], [1, 1, -1], {"batch_size": 2}, DataError, r"row 2 is generated .* no pair_id"),
        ([0, 0, 1], [4, 4, 4], {"batch_size": 2}, DataError, "pair_id 4 .* two real rows: row 0 and row 1"),
        ([0, 1], [1, 1], {"batch_size": 4}, DataError, "1 pairs, fewer than the 2 of one global batch"),
        ([0, 1], [1, 1], {"batch_size": 2, "num_replicas": 2, "rank": 0}, DataError, "1 pairs, fewer than the 2"),
        ([0, 1], [-1, -1], {"batch_size": 4, "mode": "mixture"}, DataError, "1 generated rows, fewer than the 2"),
        ([0, 1, 1], [-1] * 3, {"batch_size": 4, "mode": "mixture"}, DataError, "1 real rows, fewer than the 2"),
    ],
)
def test_bad_input_is_refused(
    modality: list[int], pair_id: list[int], arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        MixedModalitySampler(np.array(modality), np.array(pair_id), **{"num_replicas": 1, "rank": 0, **arguments})


@pytest.mark.parametrize("fraction", [-0.1, 1.5, float("nan")])
def test_share_outside_the_unit_interval_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        MixedModalitySampler(*pool(9, 9), batch_size=4, mode="mixture", generated_fraction=fraction)


@pytest.mark.parametrize(("fraction", "batch_size"), [(0.3, 32), (1 / 3, 8), (0.123, 10)])
def test_a_share_of_no_whole_rows_names_values_that_work(fraction: float, batch_size: int) -> None:
    with pytest.raises(ValueError, match="not a whole number") as caught:
        MixedModalitySampler(*pool(900, 900), batch_size=batch_size, mode="mixture", generated_fraction=fraction)
    fractions, *sizes = re.search(r"batch size: (.*?)\.(?: Nearest .*: (.*)\.)?$", str(caught.value)).groups()
    for suggestion in re.findall(r"([\d.]+) \(", fractions):
        MixedModalitySampler(
            *pool(900, 900), batch_size=batch_size, mode="mixture", generated_fraction=float(suggestion)
        )
    for suggestion in re.findall(r"\d+", sizes[0] or ""):
        MixedModalitySampler(*pool(900, 900), batch_size=int(suggestion), mode="mixture", generated_fraction=fraction)
    assert fraction == 0.123 or sizes[0]  # 0.123 needs 1000 rows: too far off to be of use


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_unpadded_sampler_gives_each_row_once(world: int) -> None:
    ranks = [UnpaddedDistributedSampler(11, num_replicas=world, rank=rank) for rank in range(world)]
    assert sorted(row for sampler in ranks for row in sampler) == list(range(11))
    assert [len(list(sampler)) for sampler in ranks] == [len(sampler) for sampler in ranks]
