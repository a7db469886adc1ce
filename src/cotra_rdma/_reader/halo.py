"""The halo of an own shard: the records of other shards to which its nodes link most.

They are kept so that walks near the border of a shard stay in this process.
They are chosen by the links of the own shard alone.
docs/explanation/one-graph.md has measurements of what that does for queries that are at home there.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cotra_rdma._core.record_layout import heads_of, links_of, records_of
from cotra_rdma._native.arena import Arena
from cotra_rdma._native.image import ImageInfo
from cotra_rdma._reader.connection import READ, Connection
from cotra_rdma.errors import InvalidInputError

log = logging.getLogger(__name__)

_ROWS = 4096
_SPARE = 1.25  # of a cache's places: buckets fill unevenly
_RECORD_EXTRA = 64  # bytes of a bucket for each record


def far_links(arena: Arena, info: ImageInfo) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
    """Counts the links of a shard's nodes to nodes of other shards.

    Returns:
        The nodes that are linked to, uint32[n] ascending, and for each how many nodes link to it.
    """
    parts = []
    with arena.view() as memory:
        records = records_of(memory, info)
        for begin in range(0, info.count, _ROWS):
            rows = records[begin : begin + _ROWS]
            numbers = links_of(rows, info)
            linked = numbers[np.arange(numbers.shape[1]) < heads_of(rows)["count"][:, np.newaxis]]
            own = linked - np.uint32(info.graph_base) < info.count
            parts.append(linked[~own & (linked < info.graph_count)])
        del records, rows
    nodes, counts = np.unique(np.concatenate(parts), return_counts=True)
    return nodes, counts


class Halo:
    """The records of other shards to which this process's own shards link most."""

    def __init__(self, connections: Sequence[Connection], share: float) -> None:
        """Chooses the records. `fill` reads them.

        Args:
            connections: to all shards.
            share: how much to keep, as a share of the bytes of the own images.

        Raises:
            InvalidInputError: no shard is this process's own, or the shards are not of one graph.
        """
        own = [
            connection for connection in connections if connection.transport == "own" and connection.info is not None
        ]
        if not own or not own[0].shard.graph_id:
            raise InvalidInputError("halo: is for a process that holds shards of one graph itself")
        wanted: dict[int, int] = {}
        budget = 0
        for connection in own:
            assert connection.info is not None
            source, _ = connection.open_source()
            assert isinstance(source, Arena)
            budget += int(share * connection.info.count)
            for node, count in zip(*(column.tolist() for column in far_links(source, connection.info)), strict=True):
                wanted[node] = wanted.get(node, 0) + count
        nodes = np.fromiter(wanted.keys(), np.int64, len(wanted))
        counts = np.fromiter(wanted.values(), np.int64, len(wanted))
        self._nodes = np.sort(nodes[np.lexsort((nodes, -counts))[:budget]])
        log.info("halo: %d records of other shards, of %d that own ones link to", len(self._nodes), len(wanted))

    def fill(self, connection: Connection) -> None:
        """Gives a shard that is read a cache, and fills it with the chosen records of that shard.

        Raises:
            TransportError: the records could not be read.
        """
        if connection.transport not in READ or connection.info is None:
            return
        info = connection.info
        rows = self._nodes[(self._nodes >= info.graph_base) & (self._nodes < info.graph_base + info.count)]
        rows -= info.graph_base
        if not len(rows):
            return
        connection.make_cache(max(16, round(len(rows) * _SPARE)) * (info.record_bytes + _RECORD_EXTRA) + 4096)
        assert connection.cache is not None
        channel, parts = connection.open_channel()
        with parts:
            for begin in range(0, len(rows), _ROWS):
                some = rows[begin : begin + _ROWS]
                offsets = (info.records_offset + some * info.record_bytes).astype(np.uint64)
                for row, record in zip(some.tolist(), channel.gather(offsets, info.record_bytes), strict=True):
                    connection.cache.put(row, record)
