"""Statistics of a query: the record that engines fill, and its form in messages."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cotra_rdma.errors import FormatError

STATS_DTYPE = np.dtype(
    [
        ("reads", "<u4"),
        ("rounds", "<u4"),
        ("expansions", "<u4"),
        ("cache_hits", "<u4"),
        ("read_bytes", "<u8"),
        ("latency_ns", "<u8"),
        ("cached_records", "<u4"),
        ("own", "<u4"),
        ("pushed", "<u4"),
        ("incomplete", "<u4"),
    ]
)
"""The statistics of one query.

`reads` counts records that were READ.
`cached_records` counts records that a cache held.
`own` counts records in this process's own memory.
`pushed` counts nodes that their shards' owners expanded.
`expansions` is the sum of these four.
A READ that was repeated after a failure is counted twice.
"""
COUNTS = ("reads", "expansions", "cache_hits", "cached_records", "own", "pushed", "incomplete", "read_bytes")
"""The fields of `STATS_DTYPE` that are summed over shards.

For `rounds` and `latency_ns`, a query has the values of its slowest shard.
"""
OWNER_STATS_DTYPE = np.dtype([(name, STATS_DTYPE[name]) for name in (STATS_DTYPE.names or ())[:6]])
"""What an owner that searches its own shard says of each query. It has no cache, so cache fields are missing."""
MORE_STATS_DTYPE = np.dtype([(name, STATS_DTYPE[name]) for name in (STATS_DTYPE.names or ())[6:]])
"""The further fields that an owner sends when it searched the whole collection."""


def pack_stats(stats: npt.NDArray[np.void], dtype: np.dtype[np.void] = OWNER_STATS_DTYPE) -> memoryview:
    """Packs an owner's stats for a message.

    Args:
        stats: `STATS_DTYPE`[n].
        dtype: the fields to pack, `OWNER_STATS_DTYPE` or `MORE_STATS_DTYPE`.

    Returns:
        The raw bytes of dtype[n].
    """
    told = np.empty(len(stats), dtype)
    for name in dtype.names or ():
        told[name] = stats[name]
    return told.view(np.uint8).data


def unpack_stats(
    data: bytes | memoryview, n_queries: int, more: bytes | memoryview | None = None
) -> npt.NDArray[np.void]:
    """Unpacks an owner's stats from a message.

    Args:
        data: the raw bytes of `OWNER_STATS_DTYPE`[n_queries].
        n_queries: the number of queries that were asked.
        more: the raw bytes of `MORE_STATS_DTYPE`[n_queries], or None if there are none.

    Returns:
        `STATS_DTYPE`[n_queries]. Fields that were not sent are 0.

    Raises:
        FormatError: the stats are of another number of queries.
    """
    stats = np.zeros(n_queries, STATS_DTYPE)
    for raw, dtype in ((data, OWNER_STATS_DTYPE), (more, MORE_STATS_DTYPE)):
        if raw is None:
            continue
        if len(raw) != n_queries * dtype.itemsize:
            raise FormatError(f"{len(raw)} bytes of stats to {n_queries} queries")
        told = np.frombuffer(raw, dtype)
        for name in dtype.names or ():
            stats[name] = told[name]
    return stats
