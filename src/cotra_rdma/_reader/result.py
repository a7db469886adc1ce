"""`SearchResult`: the answers of `Cluster.search`, and how they were found."""

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
        ids: int64[n_queries, k], nearest first. Places without an answer hold -1.
        distances: float32[n_queries, k], ascending. Places without an answer hold inf.
        shards: int32[n_queries, k]: the position of each answer's shard, in the order of `connect`. -1 without an answer.
        stats: `lowlevel.STATS_DTYPE`[n_queries], summed over the shards. `rounds` and `latency_ns` are of the slowest shard.

            - reads: records that were READ.
            - rounds: rounds of READs.
            - expansions: nodes that were expanded.
            - cache_hits: nodes of the upper layers that were looked at, which needs no READ.
            - cached_records: records taken from a cache, each in place of a READ.
            - own: records of this process's own shards, used in place.
            - pushed: nodes that owners expanded for a walk.
            - read_bytes: bytes of READs, and of the messages of pushes.
            - latency_ns: from the query's begin to its end.
        transports: for each shard, the path that was really used:

            - "own": this process's own memory.
            - "verbs", "shm": READs.
            - "push": the owner expanded nodes for the walk.
            - "rpc": the owner searched its shard.
            - "home": the owner searched the collection.
            - "peers": the homes of the queries reached this shard.
            - "lost": the shard has no owner left.
        elapsed_s: the duration of the call in seconds.
        coverage: the share of the shards that answered, times the share of the queries that are not `incomplete`. It is below
            1.0 only if shards are missing or `max_expansions` ended a walk.
        failures: why a shard is missing, by its position. Answers that it gave before it failed are kept.
        asked: int32[n_queries]: the number of shards that each query asked.
        algorithm: what was done, such as "cotra" or "compass+spire".
        predictions: what the cost model predicted for each way. The way that was taken is first. It is empty if the cost model
            was not asked.
        images: the checksum of each shard's image that was searched, as in `Cluster.images`.
        homes: int32[n_queries]: the shard whose owner walked each query, or -1 if this process walked. It is None unless the
            algorithm is "home".
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
        """bool[n_queries]: whether `max_expansions` ended a walk of the query. There may then be nearer rows, or more."""
        return np.asarray(self.stats["incomplete"] > 0)

    @property
    def missing(self) -> tuple[int, ...]:
        """The positions of the shards that did not answer, ascending."""
        return tuple(sorted(self.failures))

    @property
    def local_share(self) -> float:
        """The share of all expansions whose record was in the memory of the process that walked.

        Such a record is of its own shard, or of a cache.
        It is NaN if nothing was expanded.
        """
        here = sum(int(self.stats[name].sum()) for name in ("own", "cached_records"))
        total = int(self.stats["expansions"].sum())
        return here / total if total else float("nan")
