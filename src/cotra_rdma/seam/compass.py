"""Compass as an algorithm of the seam: a selector in front of scatter-gather."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cotra_rdma._routing.router import DEFAULT_TARGET, Router
from cotra_rdma.errors import InvalidInputError
from cotra_rdma.seam.interface import (
    ShardSubset,
    VectorShardSeam,
)


class Compass(VectorShardSeam):
    """Sends each query to the shards that hold its neighbours. Goes in front of `ScatterGather` as its `selector`."""

    def __init__(
        self, router: Router, numbers: Sequence[int] | None = None, *, target_recall: float = DEFAULT_TARGET
    ) -> None:
        """Chooses by coarse tables.

        Args:
            router: over the shards of the collection.
            numbers: the vshard id of each, in the router's order; None: 0, 1, 2...
            target_recall: the recall to keep, of that which asking every shard has; in (0, 1].
        """
        self._router = router
        self._numbers = list(range(router.n_shards)) if numbers is None else list(numbers)
        if len(self._numbers) != router.n_shards or len(set(self._numbers)) != router.n_shards:
            raise InvalidInputError(f"{router.n_shards} shards need as many different numbers, not {self._numbers}")
        if not 0 < target_recall <= 1:
            raise InvalidInputError(f"target_recall must be in (0, 1], not {target_recall!r}")
        self._target = target_recall

    def select_shards(self, query_vector: npt.NDArray[np.float32], all_shards: Sequence[int]) -> ShardSubset:
        """Of the shards that are present, those that are expected to hold enough of the query's neighbours; All where leaving
        any out loses too much. A shard that it knows nothing of is always asked."""
        present = np.isin(self._numbers, all_shards)
        if not present.any():
            return ShardSubset.All
        chosen = self._router.select(query_vector, self._target, present[np.newaxis])[0]
        wanted = [number for number, take in zip(self._numbers, chosen, strict=True) if take]
        wanted += [number for number in all_shards if number not in self._numbers]
        return ShardSubset.All if len(wanted) == len(all_shards) else ShardSubset.Subset(wanted)
