"""`CoTraRdma`: walks over one-sided READs as an algorithm of the seam."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from cotra_rdma._core.memory_region import MemoryRegion
from cotra_rdma._core.query_checks import pack_filter
from cotra_rdma._core.stop import wait_for
from cotra_rdma._native.channel import DEFAULT_TIMEOUT_S
from cotra_rdma._native.merge import merge
from cotra_rdma._owner.server import Server
from cotra_rdma._reader.cluster import Cluster
from cotra_rdma._reader.connection import ONE_SIDED
from cotra_rdma._reader.result import SearchResult
from cotra_rdma.errors import DeadlineError, InvalidInputError
from cotra_rdma.protocol.search import DEFAULT_BEAM
from cotra_rdma.protocol.tls import Tls
from cotra_rdma.seam.interface import ShardRef, VectorShardSeam
from cotra_rdma.seam.scatter_gather import Gathered, ScatterGather, SeamResult, ShardOutcome, ShardStatus, add_stats

log = logging.getLogger(__name__)


class CoTraRdma(VectorShardSeam):
    """Walks the graphs of shards whose memory can be read, and asks the owners of the others by `ScatterGather`.

    If the shards are one graph, it makes one walk, and those owners expand nodes for it.
    `SeamResult.transports` and `by_rpc` say how each shard was reached, and so does one line in the log.
    """

    def __init__(
        self,
        cluster: Cluster | None = None,
        *,
        server: Server | None = None,
        fallback: ScatterGather | None = None,
        tls: Tls | None = None,
    ) -> None:
        """Makes the reader's side (`cluster`), the owner's side (`server`), or both.

        Args:
            cluster: searches the shards. It stays the caller's to close.
            server: exposes this side's own shard. It stays the caller's to close.
            fallback: asks the shards that cannot be read, in their order. It stays the caller's to close.
                None makes one if it is needed, and `close` closes it.
            tls: this side's certificate, for the fallback that is made.

        Raises:
            InvalidInputError: the fallback is of another number of shards.
        """
        self._cluster = cluster
        self._server = server
        transports = () if cluster is None else cluster.transports
        self._read = [at for at, name in enumerate(transports) if name in ONE_SIDED]
        self._asked = [at for at, name in enumerate(transports) if name not in ONE_SIDED]
        self._fallback, self._own = fallback, False
        if cluster is not None and self._asked:
            if fallback is None:
                places = {ShardRef(0, at): cluster.addresses[at] for at in self._asked}
                self._fallback, self._own = ScatterGather.connect(places, tls=tls), True
            elif len(fallback.shards) != len(self._asked):
                raise InvalidInputError(
                    f"the fallback has {len(fallback.shards)} shards, and {len(self._asked)} shards need one"
                )
            for at in self._asked:
                why = cluster.passed_over[at] or "rpc was asked for"
                log.info("shard %d (%s) cannot be read and is asked over RPC: %s", at, cluster.addresses[at], why)

    @property
    def by_rpc(self) -> tuple[int, ...]:
        """The positions of the cluster's shards that cannot be read, and are asked over RPC."""
        return tuple(self._asked)

    def exposed_region(self) -> MemoryRegion | None:
        """Returns the memory region that peers may READ.

        It is the server's region.
        Without a server, it is the region of the cluster's shard, if the cluster has only one; `Cluster.regions` has
        all.
        None means that peers use RPC, or shared memory on the same host.
        """
        if self._server is not None:
            return self._server.exposed_region()
        regions = () if self._cluster is None else self._cluster.regions
        return regions[0] if len(regions) == 1 else None

    def search(
        self,
        queries: npt.ArrayLike,
        k: int = 10,
        ef: int = 64,
        beam: int = DEFAULT_BEAM,
        n_threads: int = 1,
        *,
        inflight: int = 0,
        timeout_s: float | None = None,
        allow_partial: bool = False,
        filters: Sequence[npt.ArrayLike | bytes | None] | None = None,
    ) -> SeamResult:
        """Returns the k nearest vectors of each query over all shards, merged by distance, then shard, then id.

        Args:
            queries: as `Cluster.search`.
            k: as `Cluster.search`.
            ef: as `Cluster.search`.
            beam: as `Cluster.search`.
            n_threads: as `Cluster.search`.
            inflight: as `Cluster.search`.
            timeout_s: the longest time for the whole search.
                None sets no limit for the walk, and 5 s for all answers over RPC.
            allow_partial: return a partial answer if shards that are asked over RPC fail.
                A READ that fails raises an error in any case.
                Only one graph is walked around a shard that has no owner left.
            filters: as `Cluster.search`.

        Raises:
            PartialResultError: as `ScatterGather.search`.
            InvalidInputError: there is no cluster to search. Others as `Cluster.search`.
        """
        if self._cluster is None:
            raise InvalidInputError("this CoTraRdma has no cluster to search: it only exposes a region")
        if self._cluster.one_graph:
            search = partial(self._cluster.search, inflight=inflight, timeout_s=timeout_s, filters=filters)
            result = _of_one_walk(search(queries, k, ef, beam, n_threads, allow_partial=True))
            if not allow_partial:
                result.require_whole()
            return result
        begin = time.perf_counter()
        asking = self._start_asking(queries, k, ef, beam, timeout_s, filters)
        try:
            walked = self._cluster.walk(
                queries, k, ef, beam, n_threads, inflight=inflight, timeout_s=timeout_s, filters=filters
            )
            walked_s = time.perf_counter() - begin
            if asking is not None:
                wait_for([asking])
            asked = None if asking is None else asking.result()
        except BaseException:
            if asking is not None:
                asking.cancel()
            raise
        gathered = self._together(walked, asked, walked_s)
        result = SeamResult(
            *merge(gathered.labels, gathered.distances),
            gathered.stats,
            self._cluster.transports,
            time.perf_counter() - begin,
            gathered.coverage(),
            tuple(gathered.outcomes),
        )
        if not allow_partial:
            result.require_whole()
        return result

    def _start_asking(
        self,
        queries: npt.ArrayLike,
        k: int,
        ef: int,
        beam: int,
        timeout_s: float | None,
        filters: Sequence[npt.ArrayLike | bytes | None] | None,
    ) -> Future[Gathered] | None:
        """Asks the owners of the shards that cannot be read. Returns None if there is no such shard."""
        if self._fallback is None or not self._asked:
            return None
        assert self._cluster is not None
        bitmaps = {}
        for shard, at in zip(self._fallback.shards, self._asked, strict=True):
            bitmap = None if filters is None else pack_filter(filters[at], self._cluster.counts[at])
            if bitmap is not None:
                bitmaps[shard.vshard_id] = bitmap
        patience = DEFAULT_TIMEOUT_S if timeout_s is None else timeout_s
        return self._fallback.start_gather(queries, k, ef, beam, timeout_s=patience, filters=bitmaps)

    def _together(
        self,
        walked: tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.void]],
        asked: Gathered | None,
        walked_s: float,
    ) -> Gathered:
        """Puts the answers of both kinds of shards together, in the cluster's order."""
        _, n, k = walked[0].shape
        n_shards = len(self._read) + len(self._asked)
        shards = tuple(ShardRef(0, at) for at in range(n_shards))
        labels = np.empty((n_shards, n, k), np.int64)
        distances = np.empty((n_shards, n, k), np.float32)
        stats = walked[2].copy()
        labels[self._read], distances[self._read] = walked[0], walked[1]
        outcomes = [ShardOutcome(shard, ShardStatus.ANSWERED, n, elapsed_s=walked_s) for shard in shards]
        if asked is not None:
            labels[self._asked], distances[self._asked] = asked.labels, asked.distances
            add_stats(stats, asked.stats)
            for at, outcome in zip(self._asked, asked.outcomes, strict=True):
                outcomes[at] = outcome
        return Gathered(shards, labels, distances, stats, np.ones((n_shards, n), np.bool_), outcomes)

    def close(self) -> None:
        """Closes the fallback if this object made it. Idempotent."""
        if self._own and self._fallback is not None:
            self._fallback.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _of_one_walk(found: SearchResult) -> SeamResult:
    """Converts the result of one walk over all shards.

    Owners that cannot be read expand nodes for such a walk, so the fallback has nothing to do.
    """
    outcomes = []
    for at in range(len(found.transports)):
        error = found.failures.get(at)
        late = isinstance(error, DeadlineError)
        status = ShardStatus.ANSWERED if error is None else ShardStatus.TIMED_OUT if late else ShardStatus.FAILED
        reason = "" if error is None else str(error)
        outcomes.append(ShardOutcome(ShardRef(0, at), status, len(found.ids), reason, error, found.elapsed_s))
    answers = (found.ids, found.distances, found.shards, found.stats, found.transports)
    return SeamResult(*answers, found.elapsed_s, found.coverage, tuple(outcomes))
