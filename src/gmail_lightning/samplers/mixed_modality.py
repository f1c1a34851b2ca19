"""Batches with an exact share of generated rows, the same at any number of processes, resumable at any batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, repeat
from typing import Literal, NamedTuple

import numpy as np
import torch.distributed
from torch.utils.data import DistributedSampler

from gmail_lightning.datasets.base import DataError
from gmail_lightning.types import Modality

BATCHES_AT_ONCE = 64  # drawn in one vectorised step, so that an epoch of millions of rows is never a list of tuples


def stable_hash(*parts: int | np.ndarray) -> np.ndarray:
    """Hashes integers to uint64, element by element after broadcasting; the same on every machine and version.

    Each part goes through the finaliser of SplitMix64 (Steele et al., 2014, https://doi.org/10.1145/2660193.2660195).
    """
    value = np.zeros((), dtype=np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64
        for part in parts:
            value = value ^ np.asarray(part, dtype=np.int64).view(np.uint64)
            value = value + np.uint64(0x9E3779B97F4A7C15)
            value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            value = value ^ (value >> np.uint64(31))
    return value


class Pairs(NamedTuple):
    """U units, each one real row and the generated rows that share its ``pair_id``."""

    pair_id: np.ndarray  # (U,) ascending
    real: np.ndarray  # (U,) row of the real image
    generated: np.ndarray  # (G,) rows of the generated images, unit by unit
    start: np.ndarray  # (U,) where the rows of a unit begin in ``generated``
    size: np.ndarray  # (U,) how many they are
    num_unpaired_real: int  # real rows that no generated row refers to

    def draw(self, unit: np.ndarray, *key: int | np.ndarray) -> np.ndarray:
        """Picks one generated row per unit by a hash of the key and the ``pair_id``."""
        choice = stable_hash(*key, self.pair_id[unit]) % self.size[unit].astype(np.uint64)
        rows: np.ndarray = self.generated[self.start[unit] + choice.astype(np.int64)]
        return rows


def find_pairs(modality: np.ndarray, pair_id: np.ndarray, describe: Callable[[int], str] = "row {}".format) -> Pairs:
    """Links every generated row to the real row of the same ``pair_id``.

    Args:
        modality: Modality of each row, shape (N,).
        pair_id: Shape (N,), -1 where there is none.
        describe: Names a row in error messages.

    Raises:
        DataError: If a generated row has no real row, or a ``pair_id`` has two real rows; names the rows.
    """
    generated = np.flatnonzero(modality == Modality.GENERATED)
    real = np.flatnonzero((modality == Modality.REAL) & (pair_id != -1))
    real = real[np.argsort(pair_id[real], kind="stable")]
    real_id = pair_id[real]
    twice = np.flatnonzero(real_id[1:] == real_id[:-1])
    if len(twice):
        first, second = describe(int(real[twice[0]])), describe(int(real[twice[0] + 1]))
        raise DataError(
            f"pair_id {real_id[twice[0]]} belongs to two real rows: {first} and {second} ({len(twice)} such in all). "
            "Give each real row (each caption of an image) a pair_id of its own."
        )
    generated = generated[np.argsort(pair_id[generated], kind="stable")]
    generated_id = pair_id[generated]
    at = np.searchsorted(real_id, generated_id)
    partnered = np.zeros(len(generated), dtype=bool)
    inside = at < len(real)
    partnered[inside] = real_id[at[inside]] == generated_id[inside]
    if not partnered.all():
        lost = int(generated[~partnered].min())
        lack = f"no real row of its pair_id {pair_id[lost]}"
        if pair_id[lost] < 0:
            lack = "no pair_id (is there a column of this name?)"
        raise DataError(
            f"{describe(lost)} is generated and has {lack} ({int((~partnered).sum())} such rows of {len(generated)}). "
            "Add the real rows, drop these generated ones, or use mode='mixture', which needs no pairs."
        )
    ids, start, count = np.unique(generated_id, return_index=True, return_counts=True)
    unpaired = int((modality == Modality.REAL).sum()) - len(ids)
    return Pairs(ids, real[np.searchsorted(real_id, ids)], generated, start, count, unpaired)


class _Pool:
    """An endless stream of permutations of some elements, each seeded by a hash of the key and its number.

    Args:
        elements: Shape (N,).
        share: Elements that each batch of a process takes.
        key: Seeds the permutations.
    """

    def __init__(self, elements: np.ndarray, share: int, *key: int) -> None:
        self.elements, self.share, self.key = elements, share, key
        self._permutations: dict[int, np.ndarray] = {}

    def _permutation(self, number: int) -> np.ndarray:
        if number not in self._permutations:
            while len(self._permutations) > 1:  # the current and the previous one are enough
                del self._permutations[min(self._permutations)]
            generator = np.random.default_rng(int(stable_hash(*self.key, number)))
            self._permutations[number] = generator.permutation(self.elements)
        return self._permutations[number]

    def take(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns ``count`` elements from position ``start`` of the stream on, and the number of the pass of each."""
        passes, offset = np.divmod(np.arange(start, start + count), len(self.elements))
        parts = [self._permutation(int(number))[offset[passes == number]] for number in np.unique(passes)]
        return np.concatenate(parts), passes


def generated_rows(batch_size: int, generated_fraction: float) -> int:
    """Returns how many of ``batch_size`` rows are generated.

    Raises:
        ValueError: If the fraction is outside [0, 1] or does not make whole rows; names the nearest that do.
    """
    if not 0 <= generated_fraction <= 1:
        raise ValueError(f"generated_fraction is {generated_fraction}, but it is a share of rows between 0 and 1.")

    def is_whole(size: int) -> bool:  # 0.333333 is meant to be a third
        return abs(generated_fraction * size - round(generated_fraction * size)) <= 1e-6 * size

    if is_whole(batch_size):
        return round(generated_fraction * batch_size)
    below = int(generated_fraction * batch_size)
    fractions = " or ".join(f"{n / batch_size:.6g} ({n} rows)" for n in (below, below + 1))
    smaller = next((size for size in range(batch_size - 1, 0, -1) if is_whole(size)), None)
    larger = next((size for size in range(batch_size + 1, 4 * batch_size) if is_whole(size)), None)
    sizes = " or ".join(str(size) for size in (smaller, larger) if size is not None)
    raise ValueError(
        f"generated_fraction={generated_fraction} of batch_size={batch_size} is "
        f"{generated_fraction * batch_size:.6g} rows, not a whole number. "
        f"Nearest fractions for this batch size: {fractions}."
        + (f" Nearest batch sizes for this fraction: {sizes}." if sizes else "")
    )


class MixedModalitySampler(DistributedSampler):
    """Every ``batch_size`` consecutive items are one batch of one process, with an exact share of generated rows.

    An item is (row, epoch, position), where the position counts rows of the global batches of this epoch: random
    augmentation keyed by (seed, epoch, position) does not depend on workers, on processes or on a resume.

    ``paired``: a unit is a generated row and the real row of its ``pair_id``, side by side. Where several generated
    rows share a real one, one of them is drawn on each pass. An epoch is
    floor(units / units in a global batch) batches.
    ``mixture``: ``generated_fraction`` of the rows of each batch are generated, any rows. An epoch is one pass over the
    generated rows, or over the real rows if the fraction is 0; the other pool goes on in its own time.

    Each pool is an endless stream of permutations that runs on across epochs, so nothing is dropped at their ends.
    Rank r of W takes every W-th element: the same global batches arise at any W if ``W * batch_size`` is the same.

    Args:
        modality: Modality of each row, shape (N,).
        pair_id: Links generated rows to real ones, shape (N,), -1 where there is none; not used by ``mixture``.
        batch_size: Rows per process; even in paired mode.
        mode: ``paired`` or ``mixture``.
        generated_fraction: Share of generated rows in ``mixture``.
        seed: Seeds the permutations, the same on all processes.
        num_replicas: Number of processes; by default that of the process group, 1 without.
        rank: Number of this process; by default that of the process group, 0 without.
        start_batch: Batches consumed since the beginning of training, epoch * steps + step: the epoch in which they end
            starts there, epochs before are empty.
        describe: Names a row in error messages.

    Raises:
        ValueError: If the batch size, the mode or the fraction cannot be met; names the nearest that can.
        DataError: If pairs are broken, a pool is empty, or there are too few rows for one global batch.
    """

    def __init__(
        self,
        modality: np.ndarray,
        pair_id: np.ndarray,
        *,
        batch_size: int,
        mode: Literal["paired", "mixture"] = "paired",
        generated_fraction: float = 0.5,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
        start_batch: int = 0,
        describe: Callable[[int], str] = "row {}".format,
    ) -> None:
        modality, pair_id = np.asarray(modality), np.asarray(pair_id)
        if num_replicas is None or rank is None:
            grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
            num_replicas = torch.distributed.get_world_size() if grouped else 1
            rank = torch.distributed.get_rank() if grouped else 0
        super().__init__(range(len(modality)), num_replicas, rank, seed=seed)  # type: ignore[arg-type]
        if mode not in ("paired", "mixture"):
            raise ValueError(f"Unknown mode {mode!r}: use 'paired' or 'mixture'.")
        if batch_size < 1 or (mode == "paired" and batch_size % 2):
            raise ValueError(
                f"batch_size={batch_size} counts rows, generated and real together: in mode {mode!r} it must be "
                + ("even and positive." if mode == "paired" else "positive.")
            )
        self.batch_size, self.mode, self.start_batch = batch_size, mode, start_batch
        self.global_batch_size = batch_size * num_replicas
        self.pairs: Pairs | None = None
        if mode == "paired":
            self.pairs = find_pairs(modality, pair_id, describe)
            self.generated_per_batch = batch_size // 2
            self._pools = [self._pool("pairs", np.arange(len(self.pairs.real)), 0, batch_size // 2)]
        else:
            self.generated_per_batch = generated_rows(batch_size, generated_fraction)
            generated, real = (np.flatnonzero(modality == m) for m in (Modality.GENERATED, Modality.REAL))
            pools = [
                self._pool("generated rows", generated, 1, self.generated_per_batch),
                self._pool("real rows", real, 2, batch_size - self.generated_per_batch),
            ]
            self._pools = [pool for pool in pools if pool.share]
        leading = self._pools[0]
        self.steps_per_epoch = len(leading.elements) // (leading.share * num_replicas)

    def _pool(self, name: str, elements: np.ndarray, number: int, share: int) -> _Pool:
        if len(elements) < share * self.num_replicas:
            raise DataError(
                f"There are {len(elements)} {name}, fewer than the {share * self.num_replicas} of one global batch "
                f"({share} per process x {self.num_replicas}). Lower batch_size, or add data."
            )
        return _Pool(elements, share, self.seed, number)

    def __len__(self) -> int:
        """Rows per process in a full epoch."""
        return self.steps_per_epoch * self.batch_size

    def first_step(self, epoch: int) -> int:
        """Number of batches of an epoch that ``start_batch`` says were consumed before."""
        return min(max(self.start_batch - epoch * self.steps_per_epoch, 0), self.steps_per_epoch)

    def __iter__(self) -> Iterator[tuple[int, int, int]]:  # type: ignore[override]
        return chain.from_iterable(self._blocks())

    def _blocks(self) -> Iterator[Iterable[tuple[int, int, int]]]:
        """Yields the items of some batches at a time; the epoch is that in which the iteration begins."""
        epoch = self.epoch
        for step in range(self.first_step(epoch), self.steps_per_epoch, BATCHES_AT_ONCE):
            steps = np.arange(step, min(step + BATCHES_AT_ONCE, self.steps_per_epoch))
            numbers = epoch * self.steps_per_epoch + steps
            rows, place = self._pairs(numbers) if self.pairs is not None else self._mixture(numbers)
            position = steps[:, None] * self.global_batch_size + place
            yield zip(rows.ravel().tolist(), repeat(epoch), position.ravel().tolist(), strict=False)

    def _take(self, pool: _Pool, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns this rank's elements of each batch (S, share), their passes, and their places in the pool's part.

        Batches are numbered from the beginning of training on, ``numbers`` are S consecutive ones.
        """
        total = pool.share * self.num_replicas  # per global batch
        mine = slice(self.rank, None, self.num_replicas)
        stream = pool.take(int(numbers[0]) * total, len(numbers) * total)
        elements, passes = (array.reshape(-1, total)[:, mine] for array in stream)
        return elements, passes, np.arange(total)[mine]

    def _pairs(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the rows of each batch, (S, B), generated and real in turn, and their places in it, (B,)."""
        assert self.pairs is not None
        units, passes, place = self._take(self._pools[0], numbers)
        rows = np.stack([self.pairs.draw(units, self.seed, passes), self.pairs.real[units]], axis=-1)
        return rows.reshape(len(numbers), -1), (2 * place[:, None] + np.arange(2)).ravel()

    def _mixture(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the rows of each batch, (S, B), the generated ones first, and their places in it, (B,)."""
        rows, places, offset = [], [], 0
        for pool in self._pools:
            elements, _, place = self._take(pool, numbers)
            rows.append(elements)
            places.append(offset + place)
            offset += pool.share * self.num_replicas
        return np.concatenate(rows, axis=1), np.concatenate(places)


class UnpaddedDistributedSampler(DistributedSampler):
    """Rank r of W takes rows r, r + W, ...: each row once, none repeated to even out the ranks.

    Ranks may differ by one in their number of rows, so evaluation steps must not wait for one another.
    """

    def __init__(self, size: int, *, num_replicas: int, rank: int) -> None:
        super().__init__(range(size), num_replicas, rank, shuffle=False)  # type: ignore[arg-type]
        self._rows = range(rank, size, num_replicas)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[int]:
        return iter(self._rows)
