"""What a query took: the record that engines fill, and how it travels."""

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
"""What a query took. expansions = reads + cached_records + own + pushed: records that were READ, that a cache had, in this
process's own memory, and nodes that their shards' owners expanded. (A READ repeated after a failure is counted twice.)"""
COUNTS = ("reads", "expansions", "cache_hits", "cached_records", "own", "pushed", "incomplete", "read_bytes")
"""Those of `STATS_DTYPE` that are summed over shards; of rounds and latency_ns a query has its slowest shard's."""
OWNER_STATS_DTYPE = np.dtype([(name, STATS_DTYPE[name]) for name in (STATS_DTYPE.names or ())[:6]])
"""What an owner that searches its shard tells of each query, without what a cache did: it has none."""
MORE_STATS_DTYPE = np.dtype([(name, STATS_DTYPE[name]) for name in (STATS_DTYPE.names or ())[6:]])
"""What it tells beside of a search of the whole collection."""


def pack_stats(stats: npt.NDArray[np.void], dtype: np.dtype[np.void] = OWNER_STATS_DTYPE) -> memoryview:
    """An owner's stats (`STATS_DTYPE`[n]) as they travel: `OWNER_STATS_DTYPE`[n], or the rest of them, as raw bytes."""
    told = np.empty(len(stats), dtype)
    for name in dtype.names or ():
        told[name] = stats[name]
    return told.view(np.uint8).data


def unpack_stats(
    data: bytes | memoryview, n_queries: int, more: bytes | memoryview | None = None
) -> npt.NDArray[np.void]:
    """The other way round: `STATS_DTYPE`[n_queries]. Raises `FormatError` where they are of another number of queries."""
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
