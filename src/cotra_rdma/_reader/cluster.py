"""`connect`: a reader of one or more shards. Each shard is read over the best path to it, and the answers are merged."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from cotra_rdma._core.memory_region import MemoryRegion
from cotra_rdma._core.stats import STATS_DTYPE
from cotra_rdma._core.stop import Progress, Stop
from cotra_rdma._native.channel import Channel
from cotra_rdma._native.record_cache import CacheInfo
from cotra_rdma._reader.batch import Answer, make_batch
from cotra_rdma._reader.caches import RecordCaches
from cotra_rdma._reader.connection import LOST, ONE_SIDED, Connection, check_alike
from cotra_rdma._reader.connector import Connector
from cotra_rdma._reader.engine_pool import EnginePool
from cotra_rdma._reader.executor import SearchExecutor
from cotra_rdma._reader.home_search import HomeSearch
from cotra_rdma._reader.planner import Planner, router_of, walked_of
from cotra_rdma._reader.replicas import Owner, Replicas, Tried
from cotra_rdma._reader.result import SearchResult
from cotra_rdma._reader.searcher import Options, Searcher
from cotra_rdma._reader.threads import MAX_THREADS, Threads
from cotra_rdma._reader.upkeep import Upkeep
from cotra_rdma._routing.router import DEFAULT_TARGET
from cotra_rdma.errors import (
    ClosedError,
    CotraError,
    DeadlineError,
    InvalidInputError,
    TransportError,
)
from cotra_rdma.protocol.envelope import fields_of


class Cluster:
    """A connection to shards; made by `connect`. Searches may come from many threads at once.

    Attributes:
        dim, metric: of the vectors.
        one_graph: whether its shards, several, are of one graph, and those that have an owner are walked together.
    """

    def __init__(
        self, owners: list[list[Owner]], connector: Connector, cache_bytes: int, halo: float, allow_partial: bool
    ) -> None:
        self._lock = threading.Lock()
        self._ending = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._n_searches = 0
        self._closing = self._closed = False
        self._connector, self._threads = connector, Threads()
        self._engines = EnginePool(self._threads.searchers, self._threads.callers, self._fail_over)
        self._ef: int | None = None
        self._planner: Planner | None = None
        self._replicas: Replicas | None = None
        self._upkeep: Upkeep | None = None
        self._caches: RecordCaches | None = None
        try:
            self._replicas = replicas = Replicas(
                owners, connector.connect, connector.choose, self._equip_late, self._forget
            )
            check_alike(replicas.known)
            connector.open_device(replicas.known)
            replicas.settle(allow_partial=allow_partial)
            first = next(connection for connection in replicas.connections if connection.transport != LOST)
            self.dim: int = first.shard.dim
            self.metric: str = first.shard.metric
            graphs = {connection.shard.graph_id for connection in replicas.connections}
            self.one_graph: bool = len(replicas.connections) > 1 and len(graphs) == 1 and graphs != {0}
            shards = replicas.connections
            self._planner = Planner(shards, self.dim, router_of(shards), walked_of(shards), one_graph=self.one_graph)
            executor = SearchExecutor(replicas, self._engines, self._threads.callers)
            homes = HomeSearch(replicas, executor, self._threads.callers)
            self._searcher = Searcher(replicas, self._planner, executor, homes, one_graph=self.one_graph)
            self._caches = RecordCaches(replicas, cache_bytes, halo)
            for connection in replicas.connections:
                self._caches.equip(connection)
            self._upkeep = Upkeep(replicas, self.revive)
        except BaseException:
            self.close()
            raise
        if "verbs" in self.transports or not replicas.are_all_here:
            self._upkeep.start()

    @property
    def _connections(self) -> list[Connection]:
        """The owner of each shard that is in use now."""
        return [] if self._replicas is None else self._replicas.connections

    @property
    def _one_sided(self) -> list[Connection]:
        return [connection for connection in self._connections if connection.transport in ONE_SIDED]

    # ---- owners that come and go ----

    def _fail_over(self, failed: Connection, error: CotraError, give_up: bool, tried: set[Tried]) -> Connection | None:
        assert self._replicas is not None
        return self._replicas.replace(failed, error, give_up=give_up, tried=tried)

    def _forget(self, gone: Connection) -> None:
        """What there was of an owner that is not used any more."""
        if self._planner is not None:
            self._planner.refresh()
        if self._upkeep is not None:
            self._upkeep.start()
        self._engines.drop(gone)

    def _equip_late(self, connection: Connection) -> None:
        if self._caches is not None:
            self._caches.equip_late(connection)

    def revive(self) -> list[str]:
        """Tries owners that failed, or were not there at `connect`, again now; the addresses of those that are back.

        A thread does it every few seconds as long as any is away. Raises `ClosedError` once closed."""
        with self._searching(1):  # `close` waits for it, too
            assert self._replicas is not None
            return self._replicas.revive(self._between_owners)

    def _between_owners(self) -> None:
        """Before each owner that is tried again, which takes long where it is silent: leases and `close` do not wait for all."""
        self._check_open()
        if self._upkeep is not None:
            self._upkeep.renew_if_due()

    def renew_leases(self) -> None:
        """Keeps the queue pairs that owners hold for this reader. A thread does it, as long as the cluster is open."""
        if self._upkeep is not None:
            self._upkeep.renew_leases()

    def _check_open(self) -> None:
        if self._closing:
            raise ClosedError("the cluster is closed")

    # ---- what it is connected to ----

    @property
    def addresses(self) -> tuple[str, ...]:
        """The address of the owner in use of each shard, in order; "own" for one that this process holds and does not serve."""
        return tuple(connection.address for connection in self._connections)

    @property
    def transports(self) -> tuple[str, ...]:
        """For each shard the path to the owner in use: "own" memory, "verbs", "shm", "rpc"; "lost" where it has none left."""
        return tuple(connection.transport for connection in self._connections)

    @property
    def passed_over(self) -> tuple[dict[str, str], ...]:
        """For each shard why a better path was not taken, by its name."""
        return tuple(connection.passed_over for connection in self._connections)

    @property
    def lost(self) -> dict[int, CotraError]:
        """The shards that have no owner left, and why."""
        return {} if self._replicas is None else dict(self._replicas.lost)

    def __len__(self) -> int:
        """Vectors in all shards."""
        return sum(connection.shard.count for connection in self._connections)

    @property
    def counts(self) -> tuple[int, ...]:
        """The local rows of each shard, deleted ones included: the bits of a filter."""
        return tuple(connection.shard.count for connection in self._connections)

    @property
    def regions(self) -> tuple[MemoryRegion | None, ...]:
        """The region that each shard's owner exposes to RDMA READs, or None where it has no verbs device."""
        told = [connection.capabilities.region for connection in self._connections]
        return tuple(None if region is None else MemoryRegion(**fields_of(region)) for region in told)

    @property
    def images(self) -> tuple[int, ...]:
        """The checksum of each shard's image, which names the shard whatever its place here; 0 where its owner, of an earlier
        version, does not tell it."""
        return () if self._replicas is None else self._replicas.images

    @property
    def cached_bytes(self) -> int:
        """Bytes that this reader keeps of the shards: headers and upper layers, and the cache of `cache_bytes`."""
        views = sum(connection.view.nbytes for connection in self._connections if connection.view is not None)
        return views + sum(cache.nbytes for cache in self.record_caches if cache is not None)

    @property
    def record_caches(self) -> tuple[CacheInfo | None, ...]:
        """The cache of each shard's records; None for a shard without."""
        return () if self._caches is None else self._caches.infos

    def clear_caches(self) -> None:
        """Forgets all cached records, and how often each was asked for: as after `connect`."""
        for connection in self._connections:
            if connection.cache is not None:
                connection.cache.clear()

    def ping(self, n_reads: int = 100, n_bytes: int = 1024) -> tuple[npt.NDArray[np.uint64], ...]:
        """The latency of `n_reads` READs of each shard's first bytes, one after the other, in ns: uint64[n_reads] for each
        shard; empty for one that is only asked over RPC. Raises `TransportError`."""
        latencies = []
        for connection in self._connections:
            if connection.transport not in ONE_SIDED:
                latencies.append(np.empty(0, np.uint64))
                continue
            channel, parts = connection.open_channel()
            with parts:
                latencies.append(channel.read_loop(np.zeros(n_reads, np.uint64), n_bytes)[1])
        return tuple(latencies)

    @contextmanager
    def channel(self, shard: int) -> Iterator[Channel]:
        """A channel of its own to the region of one shard, for one thread; closed at the end, before the cluster is.

        Raises `TransportError` for a shard that is only asked over RPC.
        """
        connection = self._connections[shard]
        if connection.transport not in ONE_SIDED:
            raise TransportError(
                f"{connection} cannot be read: {connection.passed_over or 'rpc was asked for'}", shard=shard
            )
        channel, parts = connection.open_channel()
        with parts:
            yield channel

    # ---- searching ----

    def search(
        self,
        queries: npt.ArrayLike,
        k: int = 10,
        ef: int = 64,
        beam: int = 8,
        n_threads: int = 1,
        *,
        inflight: int = 0,
        timeout_s: float | None = None,
        filters: Sequence[npt.ArrayLike | bytes | None] | None = None,
        shards: npt.ArrayLike | None = None,
        allow_partial: bool | None = None,
        algorithm: str = "cotra",
        target_recall: float = DEFAULT_TARGET,
        owner_cpu: bool = False,
        explain: bool = False,
        max_expansions: int | None = None,
        progress: Progress | None = None,
        stop: Stop | None = None,
    ) -> SearchResult:
        """The k nearest vectors of each query, over all shards.

        Each shard is searched by itself, and the answers are merged by distance, then shard, then id; an id that several
        shards hold is returned once. Shards of one graph (`cotra build --graph global`; `one_graph`) that can be read are
        searched together, by one walk a query, whose READs go to whichever shard holds the next node. So are those whose owners
        can only be asked: they expand nodes for it ("push").

        Where an owner fails in the middle, the search goes on over another of the same shard, and where there is none without
        the shard.

        Ctrl-C ends a search that was called in Python's main thread, however many threads share it: the owners and the other
        threads are told, and `KeyboardInterrupt` is raised. `stop` ends one in any thread. The cluster can be used as before.

        Args:
            queries: float32[n_queries, dim] or float32[dim].
            k: answers for each query, k <= ef. With fewer vectors than k, places stay empty (-1, inf).
            ef: how far each shard's walk looks beyond the k-th answer: a larger one finds more, with more READs. For
                "spire" the lists that are read, over all shards.
            beam: nodes expanded a round at most: a wider one needs fewer rounds. Not for "spire".
            n_threads: threads that share the queries, each with its own queue pairs.
            inflight: queries in progress at once in each thread; 0: chosen for the transport.
            timeout_s: how long the whole search may take, whatever it waits for. What it waits for at one time has less, where it
                can go on without it: half of the time that is left. None: as long as it goes on; a READ, and an owner's answer
                to one message, are waited for 5 s.
            filters: for each shard which of its rows may be returned: None (all), bool[count], or a bitmap (bit i of byte
                i // 8, lowest first, is local row i). Under a selective filter more of the graph is walked, or just the
                rows that it lets through are read.
            shards: bool[n_queries, n_shards]: which shards each query is for; None: all.
            allow_partial: leave out a shard that has no owner left, and say so in the result, in place of raising; also the
                last one, whatever the algorithm: the result then has a coverage of 0, and what was found before. None: where
                the shards are one graph, of which the rest is as good as before; but where none is left, that is an error.
            algorithm: "cotra" reads the graphs of the shards that can be read, and asks the owners of the others; "home" sends
                each query to the owner of most of its neighbourhood, which walks the whole graph, its own records in place
                (`Server.search_with`); what a home does not answer is walked here, and where all refuse that is an error,
                but for filters and bounds, which owners of earlier versions refuse. With `shards` the walk is made here, and
                the result's algorithm is "cotra";
                "scatter-gather" asks all owners; "spire" reads inverted lists, in two rounds (`Shard.build(n_lists=)`).
                "compass" in front of them ("compass", "compass+scatter-gather", "compass+spire") leaves out of each query
                the shards that have nothing for it (`cotra build --partition kmeans`). "auto" takes what the cost model
                says is quickest, and Compass where leaving shards out pays and was measured: without filters, and for k
                no larger than at the build (10). Which it was is in the result. It compares times, not recall, and
                learns, so its answers may differ from call to call; those of all others never do.
            target_recall: of Compass: the recall to keep, of that which asking every shard has; k above 10 loses more. Under
                filters Compass asks all shards that have a row to return. Where the shards that it chose have fewer than k
                answers, the others are asked, too.
            owner_cpu: whether "auto" may let owners search whose memory could be read.
            explain: have the cost model's predictions in the result, for any algorithm.
            max_expansions: records that a walk expands at most, though it would find more: a bound for what a query costs,
                whatever the data and the filter. Of shards with graphs of their own each has a walk. The result says which
                queries that ended (`incomplete`), and `coverage` does not count them. None: as many as it takes. Not for
                "spire".
            progress: hears of queries that were answered, some times a second.
            stop: what another thread may end the search by.

        Raises:
            InvalidInputError: a wrong dim, NaN or infinity, k > ef, a filter of another length. TransportError and those
            below it: a shard failed; the error's `shard` tells which. It is a `PartialResultError`, with what the others
            answered in its `result`, where that is to be had: when the shard was asked over RPC.
            DeadlineError: the search was not over within `timeout_s`; it names a shard where that one kept it waiting.
            SearchCancelledError: `stop` was set.
        """
        stop = stop or Stop()
        with self._searching(n_threads):
            try:
                batch = make_batch(
                    queries,
                    self.dim,
                    self.counts,
                    k=k,
                    ef=ef,
                    beam=beam,
                    stop=stop,
                    inflight=inflight,
                    timeout_s=timeout_s,
                    filters=filters,
                    shards=shards,
                    max_expansions=max_expansions,
                    progress=progress,
                )
                options = Options(n_threads, allow_partial, algorithm, target_recall, owner_cpu, explain)
                return self._searcher.search(batch, options)
            except DeadlineError as error:
                raise stop.late(error, timeout_s) from None
            except BaseException:
                stop.set()  # for all that still works for it
                raise

    def homes(self, queries: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """The shard whose owner `search(algorithm="home")` sends each query to: int64[n_queries], positions as in `addresses`.

        Raises `InvalidInputError` for wrong queries, shards that are not one graph, or not the whole of a collection with
        coarse tables.
        """
        assert self._planner is not None
        with self._searching(1):
            return self._planner.homes(make_batch(queries, self.dim, self.counts, k=1, ef=1, beam=1, stop=Stop()))

    def walk(
        self,
        queries: npt.ArrayLike,
        k: int = 10,
        ef: int = 64,
        beam: int = 8,
        n_threads: int = 1,
        *,
        inflight: int = 0,
        timeout_s: float | None = None,
        filters: Sequence[npt.ArrayLike | bytes | None] | None = None,
    ) -> Answer:
        """The one-sided part of `search`, by shard and not merged, for algorithms that merge it with other answers.

        Arguments and errors as `search`.

        Returns:
            labels int64[n_read, n_queries, k] (-1 where there are fewer) and distances float32 likewise (inf there) of the
            shards that are read over verbs or shm, in their order; and one `STATS_DTYPE` record for each query.
        """
        with self._searching(n_threads):
            stop = Stop()
            batch = make_batch(
                queries,
                self.dim,
                self.counts,
                k=k,
                ef=ef,
                beam=beam,
                stop=stop,
                inflight=inflight,
                timeout_s=timeout_s,
                filters=filters,
            )
            connections = self._one_sided
            if not connections:
                shape = (0, len(batch.queries), k)
                return np.empty(shape, np.int64), np.empty(shape, np.float32), np.zeros(len(batch.queries), STATS_DTYPE)
            stop.expect(len(batch.queries))
            try:
                return self._engines.search(
                    connections, batch.of_shards([connection.index for connection in connections]), n_threads
                )[0]
            except DeadlineError as error:
                raise stop.late(error, timeout_s) from None

    @contextmanager
    def _searching(self, n_threads: int) -> Iterator[None]:
        """A search, from begin to end: `close` waits for it. Raises `ClosedError` once closed."""
        if not 1 <= n_threads <= MAX_THREADS:
            raise InvalidInputError(f"n_threads must be in [1, {MAX_THREADS}], not {n_threads}")
        with self._lock:
            self._check_open()
            self._n_searches += 1
        try:
            yield
        finally:
            with self._lock:
                self._n_searches -= 1
                if self._closing:
                    self._idle.notify_all()

    # ---- hnswlib's own calls ----

    def set_ef(self, ef: int) -> None:
        """ef for `knn_query`, as hnswlib's `set_ef`."""
        if ef < 1:
            raise InvalidInputError(f"ef must be at least 1, not {ef}")
        self._ef = ef

    def knn_query(
        self, data: npt.ArrayLike, k: int = 1, num_threads: int = 1
    ) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.float32]]:
        """hnswlib's `Index.knn_query`: labels uint64[n_queries, k] and distances float32[n_queries, k].

        ef is what `set_ef` set, at least k; 64 or k before. Raises `InvalidInputError` when a query has fewer than k
        answers, as hnswlib does.
        """
        result = self.search(data, k, max(self._ef or 64, k), n_threads=num_threads)
        if (result.ids < 0).any():
            raise InvalidInputError(f"there are fewer than {k} vectors to return; use search() for a partial answer")
        return result.ids.astype(np.uint64), result.distances

    # ---- the end ----

    def close(self) -> None:
        """Closes engines, then connections. Searches in progress in other threads are waited for (a `Stop` ends one); those
        that come later raise `ClosedError`. Idempotent; one that was interrupted is done by the next."""
        with self._lock:
            self._closing = True
            while self._n_searches:
                self._idle.wait()
        with self._ending:
            if self._closed:
                return
            if self._upkeep is not None:
                self._upkeep.stop()
            self._threads.close()
            self._engines.close()
            if self._replicas is not None:
                self._replicas.close()
            self._connector.close()
            self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        paths: Any = ", ".join(f"{a} over {t}" for a, t in zip(self.addresses, self.transports, strict=True))
        return f"<Cluster of {len(self._connections)} shards: {paths}>"
