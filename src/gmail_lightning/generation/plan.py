"""Which image belongs to which shard."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


@dataclass(frozen=True)
class Plan:
    """Which image belongs to which shard: a shard holds consecutive keys.

    Attributes:
        keys: All N keys, shard by shard.
        shards: Names of the S shards.
        starts: First key of each shard and N, shape (S + 1,).
    """

    keys: pa.Array
    shards: list[str]
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)

    def rows(self, number: int) -> slice:
        """Where the keys of a shard are."""
        return slice(int(self.starts[number]), int(self.starts[number + 1]))

    def sizes(self) -> dict[str, int]:
        """Number of keys of each shard."""
        return dict(zip(self.shards, np.diff(self.starts).tolist(), strict=True))

    def size(self, number: int) -> int:
        """Number of keys of a shard."""
        return int(self.starts[number + 1] - self.starts[number])

    def extended(self, keys: pa.Array, split: str, shard_size: int) -> Plan:
        """The plan with new shards at its end for those ``keys`` that it lacks, in their order."""
        new = keys.filter(pc.invert(pc.is_in(keys, value_set=self.keys))) if len(self) else keys
        if not len(new):
            return self
        ends = len(self) + block_ends(len(new), shard_size)
        first = len(self.shards)
        names = [f"{split}-{number:06d}" for number in range(first, first + len(ends))]
        return Plan(pa.concat_arrays([self.keys, new]), [*self.shards, *names], np.append(self.starts, ends))


EMPTY = Plan(pa.array([], pa.large_string()), [], np.zeros(1, dtype=np.int64))


def block_ends(count: int, size: int) -> np.ndarray:
    """Where blocks of ``size`` end that ``count`` things are cut into; the last may be smaller.

    >>> block_ends(7, 3).tolist()
    [3, 6, 7]
    """
    return np.append(np.arange(size, count, size), count)


def run_starts(values: np.ndarray) -> np.ndarray:
    """Where runs of equal values begin.

    >>> run_starts(np.array([4, 4, 2, 2, 2, 4])).tolist()
    [0, 2, 5]
    """
    begins = np.ones(len(values), dtype=bool)
    begins[1:] = values[1:] != values[:-1]
    return np.flatnonzero(begins)
