"""`Compass` as an algorithm of the seam: it selects shards for `ScatterGather`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cotra_rdma._routing.router import DEFAULT_TARGET, Router
from cotra_rdma.errors import InvalidInputError
from cotra_rdma.seam.interface import ShardSubset, VectorShardSeam


class Compass(VectorShardSeam):
    """Sends each query to the shards that are likely to hold its neighbours. It is a `selector` of `ScatterGather`."""

    def __init__(
        self, router: Router, numbers: Sequence[int] | None = None, *, target_recall: float = DEFAULT_TARGET
    ) -> None:
        """Makes a selector from coarse tables.

        Args:
            router: knows the coarse tables of the collection's shards.
            numbers: the vshard id of each shard, in the router's order; None for 0, 1, 2...
            target_recall: the recall to keep, as a share in (0, 1] of the recall that asking every shard has.

        Raises:
            InvalidInputError: the numbers are not distinct or not as many as the shards, or the recall is out of its
                range.
        """
        self._router = router
        self._numbers = list(range(router.n_shards)) if numbers is None else list(numbers)
        if len(self._numbers) != router.n_shards or len(set(self._numbers)) != router.n_shards:
            raise InvalidInputError(
                f"{router.n_shards} shards need {router.n_shards} distinct numbers, not {self._numbers}"
            )
        if not 0 < target_recall <= 1:
            raise InvalidInputError(f"target_recall must be in (0, 1], not {target_recall!r}")
        self._target = target_recall

    def select_shards(self, query_vector: npt.NDArray[np.float32], all_shards: Sequence[int]) -> ShardSubset:
        """Chooses the shards that are expected to hold enough of a query's neighbours.

        A shard that the router does not know is always asked.

        Returns:
            The shards that were chosen among those that are present.
            All, if leaving out any shard would lose too much.
        """
        present = np.isin(self._numbers, all_shards)
        if not present.any():
            return ShardSubset.All
        chosen = self._router.select(query_vector, self._target, present[np.newaxis])[0]
        wanted = [number for number, take in zip(self._numbers, chosen, strict=True) if take]
        wanted += [number for number in all_shards if number not in self._numbers]
        return ShardSubset.All if len(wanted) == len(all_shards) else ShardSubset.Subset(wanted)
