"""`Spire` as an algorithm of the seam: shards tell each other where their inverted lists are."""

from __future__ import annotations

import numpy as np

from cotra_rdma._native.list_engine import IvfTable
from cotra_rdma.protocol.tables import BuildExchangeRequest, BuildExchangeResponse, CentroidTable
from cotra_rdma.seam.interface import (
    BuildExchangeFailed,
    ShardMessage,
    ShardMessageKind,
    ShardRef,
    ShardRpcDispatch,
    VectorShardSeam,
)


class Spire(VectorShardSeam):
    """Tells every peer once where this shard's inverted lists are.

    With the tables of all shards, a reader knows every list.
    A query then takes two one-sided rounds.
    `Cluster.search(algorithm="spire")` searches by the lists.
    """

    def __init__(self, shard: ShardRef, table: IvfTable, *, generation: int = 1) -> None:
        """Makes the message of one shard.

        Args:
            shard: the shard.
            table: its lists. The table stays the caller's.
            generation: the generation of the shard's build (`Shard.info.generation`).
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
        """Sends this shard's table to `peer`.

        Raises:
            BuildExchangeFailed: the peer does not take the table.
            TransportError: the peer does not answer.
        """
        message = ShardMessage(ShardMessageKind.SpireCentroidTable, self._request)
        reply = await self.direct_message(peer, message, dispatch, self._shard.node_id)
        answer = BuildExchangeResponse.decode(reply.payload)
        if answer.code:
            raise BuildExchangeFailed(peer.vshard_id, answer.message)
