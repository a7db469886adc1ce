"""`Compass` and `Spire` as algorithms of the seam; `ScatterGather` and `CoTraRdma` have modules of their own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cotra_rdma._native.lists import IvfTable
from cotra_rdma._routing.compass import DEFAULT_TARGET, Router
from cotra_rdma.errors import InvalidInputError
from cotra_rdma.protocol.messages import BuildExchangeRequest, BuildExchangeResponse, CentroidTable
from cotra_rdma.seam.interface import (
    BuildExchangeFailed,
    ShardMessage,
    ShardMessageKind,
    ShardRef,
    ShardRpcDispatch,
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


class Spire(VectorShardSeam):
    """Tells every peer, once and shard to shard, where this shard's inverted lists are: with the tables of all, a reader
    knows every list of every shard, and a query takes two one-sided rounds.

    Searching by them is `Cluster.search(algorithm="spire")`.
    """

    def __init__(self, shard: ShardRef, table: IvfTable, *, generation: int = 1) -> None:
        """Speaks for one shard.

        Args:
            shard: which.
            table: its lists; stays the caller's.
            generation: of the shard's build (`Shard.info.generation`).
        """
        self._shard = shard
        offsets, sizes = table.offsets, table.sizes
        begin = int(offsets.min()) if len(offsets) else 0
        ends = np.append(offsets[1:], np.uint64(begin + table.info.list_bytes))
        order = np.argsort(offsets, kind="stable")
        lengths = np.empty(len(offsets), np.uint64)
        lengths[order] = np.append(offsets[order][1:], ends[-1]) - offsets[order]
        self._request = BuildExchangeRequest(
            shard.vshard_id,
            CentroidTable(table.centroids, sizes, table.radii),
            offsets - np.uint64(begin),
            lengths.astype(np.uint32),
            begin,
            generation,
        ).encode()

    async def build_time_exchange(self, peer: ShardRef, dispatch: ShardRpcDispatch) -> None:
        """Sends this shard's table to `peer`. Raises `BuildExchangeFailed` when it is not taken."""
        message = ShardMessage(ShardMessageKind.SpireCentroidTable, self._request)
        reply = await self.direct_message(peer, message, dispatch, self._shard.node_id)
        answer = BuildExchangeResponse.decode(reply.payload)
        if answer.code:
            raise BuildExchangeFailed(peer.vshard_id, answer.message)
