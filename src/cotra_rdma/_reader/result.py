"""`SearchResult`: what a cluster's search gives."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cotra_rdma._reader.cost_model import Prediction
from cotra_rdma.errors import CotraError


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The answers to a batch of queries.

    Attributes:
        ids: int64[n_queries, k], nearest first; -1 where there are fewer.
        distances: float32[n_queries, k], inf there.
        shards: int32[n_queries, k]: the position of the shard of each, in the order given to `connect`; -1 there.
        stats: `cotra_rdma._core.stats.STATS_DTYPE`[n_queries]: reads, rounds (of the shard with most), expansions, cache_hits
            (upper-layer nodes looked at without a READ), cached_records (taken from a cache in place of as many READs), own
            (records of this process's own shards, used in place), pushed (nodes that owners expanded), read_bytes (messages
            of pushes included), latency_ns; all else summed over the shards.
        transports: for each shard what was really used: "own" memory, "verbs", "shm", "push" (its owner expanded nodes for the
            walk), "rpc" (its owner searched), "home" (its owner searched the collection), "peers" (the owners of others did, and
            reached it), or "lost" (it has no owner left).
        elapsed_s: of the whole call, in seconds.
        coverage: the share of the shards that the answer is of, times the share of the queries that are not `incomplete`: 1.0
            unless shards are missing, or `max_expansions` ended a walk.
        failures: the shards that are missing, and why. What was read of one before it failed is kept.
        asked: int32[n_queries]: how many shards each query was for.
        algorithm: what was done: "cotra", "compass+spire"...
        predictions: what the cost model expected of each way, the one taken first; empty where it was not asked.
        images: the checksum of each shard's image that was searched, as `Cluster.images`: the rows of filters are theirs.
        homes: int32[n_queries]: the shard whose owner walked each query; -1 where this process did. None: of "home" only.
    """

    ids: npt.NDArray[np.int64]
    distances: npt.NDArray[np.float32]
    shards: npt.NDArray[np.int32]
    stats: npt.NDArray[np.void]
    transports: tuple[str, ...]
    elapsed_s: float
    coverage: float
    failures: dict[int, CotraError]
    asked: npt.NDArray[np.int32]
    algorithm: str
    predictions: tuple[Prediction, ...]
    images: tuple[int, ...]
    homes: npt.NDArray[np.int32] | None = None

    @property
    def incomplete(self) -> npt.NDArray[np.bool_]:
        """bool[n_queries]: whether `max_expansions` ended a walk of the query: then there may be nearer rows, or more."""
        return np.asarray(self.stats["incomplete"] > 0)

    @property
    def missing(self) -> tuple[int, ...]:
        """The shards that the answer is without."""
        return tuple(sorted(self.failures))

    @property
    def local_share(self) -> float:
        """The share of all expansions whose record was in the memory of who walked: its own shards', or a cache's; NaN where none
        was expanded."""
        here = sum(int(self.stats[name].sum()) for name in ("own", "cached_records"))
        total = int(self.stats["expansions"].sum())
        return here / total if total else float("nan")
