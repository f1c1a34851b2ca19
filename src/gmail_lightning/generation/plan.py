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

    def extended(self, keys: pa.Array, split: str, shard_size: int) -> Plan:
        """The plan with new shards at its end for those ``keys`` that it lacks, in their order."""
        new = keys.filter(pc.invert(pc.is_in(keys, value_set=self.keys))) if len(self) else keys
        if not len(new):
            return self
        starts = np.append(np.arange(0, len(new), shard_size), len(new)) + len(self)
        first = len(self.shards)
        names = [f"{split}-{first + i:06d}" for i in range(len(starts) - 1)]
        return Plan(pa.concat_arrays([self.keys, new]), [*self.shards, *names], np.append(self.starts, starts[1:]))


EMPTY = Plan(pa.array([], pa.large_string()), [], np.zeros(1, dtype=np.int64))
