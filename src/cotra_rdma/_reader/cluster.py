"""`connect`: a reader of one or more shards. Each shard is read over the best path to it, and the answers are merged."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
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
from cotra_rdma._reader.batch import Answer, Batch, make_batch
from cotra_rdma._reader.connection import ONE_SIDED, Connection
from cotra_rdma._reader.connector import Connector
from cotra_rdma._reader.metrics import ClusterMetrics, metrics_of
from cotra_rdma._reader.observer import Observer
from cotra_rdma._reader.result import SearchResult
from cotra_rdma._reader.searcher import Options
from cotra_rdma._reader.session import Session, SessionHooks
from cotra_rdma._reader.threads import MAX_THREADS, Threads
from cotra_rdma._routing.router import DEFAULT_TARGET
from cotra_rdma.errors import (
    ClosedError,
    CotraError,
    DeadlineError,
    InvalidInputError,
    TransportError,
)
from cotra_rdma.protocol.envelope import fields_of

log = logging.getLogger(__name__)


class Cluster:
    """A connection to shards; made by `connect`. Searches may come from many threads at once.

    Attributes:
        dim, metric: of the vectors.
        one_graph: whether its shards, several, are of one graph, and those that have an owner are walked together.
    """

    def __init__(self, connect: Callable[[SessionHooks], Session], connector: Connector, *, follow: bool) -> None:
        """`connect`: connects to what owners serve now. `connector`: what it uses for that; it is closed with the cluster."""
        self._lock = threading.Lock()
        self._ending, self._following = threading.Lock(), threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._n_searches = 0
        self._closing = self._closed = False
        self._pid = os.getpid()
        self._connect, self._connector, self._threads = connect, connector, Threads()
        self._follows = follow
        self._counters = connector.counters
        self._observer = Observer(connector.counters, connector.tracing)
        self._ef: int | None = None
        try:
            self._session = session = connect(self._hooks)
        except BaseException:
            self._threads.close()
            connector.close()
            raise
        self._first_images = session.replicas.images
        self.dim: int = session.dim
        self.metric: str = session.metric
        self.one_graph: bool = session.one_graph

    @property
    def _hooks(self) -> SessionHooks:
        return SessionHooks(self._threads, self.revive, self._follow_later)

    @property
    def _connections(self) -> list[Connection]:
        """The owner of each shard that is in use now."""
        return self._session.replicas.connections

    # ---- owners that come and go ----

    def revive(self) -> list[str]:
        """Tries owners that failed, or were not there at `connect`, again now; the addresses of those that are back.

        A thread does it every few seconds as long as any is away. Raises `ClosedError` once closed."""
        with self._searching(1) as session:  # `close` waits for it, too
            back = session.revive()
            is_stale = bool(session.replicas.renewed & session.replicas.lost.keys())
        if is_stale:
            self._follow_later()
        return back

    def renew_leases(self) -> None:
        """Keeps the queue pairs that owners hold for this reader. A thread does it, as long as the cluster is open."""
        self._session.upkeep.renew_leases()

    def follow(self) -> None:
        """Connects to the images that owners serve now, and searches those from the next search on.

        Searches in progress end on the images that they began with. A search does it by itself where it finds that an owner
        serves another image, unless `connect` was told not to. Filters are for the rows of an image: see `search`.

        Raises:
            StaleShardError: the owners cannot be followed: another number of shards, another dim or metric, or a rebuild that
                is not over. TransportError and those of `connect`: a shard cannot be reached. The cluster stays as it was.
            ClosedError: the cluster was closed.
        """
        self._follow(self._session)

    def _follow(self, stale: Session) -> None:
        """Puts a new session in the place of one; nothing where another thread did."""
        self._check_process()
        with self._following:
            with self._lock:
                self._check_open()
            if self._session is not stale:
                return
            session = self._connect(self._hooks)
            try:
                session.check_follows(stale)
                with self._lock:
                    self._check_open()
                    self._session = session
                    self._counters.n_followed += 1
                    is_idle = not stale.n_searches
            except BaseException:
                session.close()
                raise
        log.info("owners serve other images, and are followed: %s", self)
        if is_idle:
            stale.close()

    def _follow_later(self) -> None:
        """The same, for threads that nobody waits for: what does not work now is tried again."""
        if not self._follows:
            return
        try:
            self._follow(self._session)
        except ClosedError:
            raise
        except CotraError as error:
            log.warning("owners serve other images, and cannot be followed yet: %s", error)

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise ClosedError("the cluster is of the process that this one was forked from: connect in this one")

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
        return dict(self._session.replicas.lost)

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
        """The checksum of each shard's image, which names the shard whatever its place here; 0 where it was never reached."""
        return self._session.replicas.images

    @property
    def cached_bytes(self) -> int:
        """Bytes that this reader keeps of the shards: headers and upper layers, and the cache of `cache_bytes`."""
        views = sum(connection.view.nbytes for connection in self._connections if connection.view is not None)
        return views + sum(cache.nbytes for cache in self.record_caches if cache is not None)

    @property
    def record_caches(self) -> tuple[CacheInfo | None, ...]:
        """The cache of each shard's records; None for a shard without."""
        return self._session.caches.infos

    def clear_caches(self) -> None:
        """Forgets all cached records, and how often each was asked for: as after `connect`."""
        for connection in self._connections:
            if connection.cache is not None:
                connection.cache.clear()

    def metrics(self) -> ClusterMetrics:
        """What this cluster has done since `connect`, in numbers, and how its owners stand. Any thread may ask, at any time."""
        return metrics_of(self._counters, self._session.replicas)

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
        images: Sequence[int] | None = None,
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
            images: the images that the filters are for, as `Cluster.images` told them when the filters were made. None: those of
                `connect`. Where the cluster searches others by now, filters are refused.
            progress: hears of queries that were answered, some times a second.
            stop: what another thread may end the search by.

        Raises:
            InvalidInputError: a wrong dim, NaN or infinity, k > ef, a filter of another length. TransportError and those
            below it: a shard failed; the error's `shard` tells which. It is a `PartialResultError`, with what the others
            answered in its `result`, where that is to be had: when the shard was asked over RPC.
            DeadlineError: the search was not over within `timeout_s`; it names a shard where that one kept it waiting.
            SearchCancelledError: `stop` was set.
            StaleShardError: an owner serves another image than when this cluster connected, and cannot be followed: `follow`
                says why. Or there are filters, and they are for the rows of the old image: make them for the new one, after
                `follow`.
        """
        stop, begin = stop or Stop(), time.perf_counter()

        def make(session: Session) -> Batch:
            if filters is not None:
                session.check_images(self._first_images if images is None else images)
            spent_s = time.perf_counter() - begin
            return make_batch(
                queries,
                self.dim,
                session.counts,
                k=k,
                ef=ef,
                beam=beam,
                stop=stop,
                inflight=inflight,
                timeout_s=None if timeout_s is None else max(timeout_s - spent_s, min(timeout_s, 1e-3)),
                filters=filters,
                shards=shards,
                max_expansions=max_expansions,
                progress=progress,
            )

        options = Options(n_threads, allow_partial, algorithm, target_recall, owner_cpu, explain)

        def search() -> SearchResult:
            try:
                return self._search(make, options, may_follow=self._follows and filters is None)
            except DeadlineError as error:
                raise stop.late(error, timeout_s) from None
            except BaseException:
                stop.set()  # for all that still works for it
                raise

        return self._observer.search(search, stop, {"k": k, "ef": ef, "beam": beam, "algorithm": algorithm})

    def _search(self, make: Callable[[Session], Batch], options: Options, *, may_follow: bool) -> SearchResult:
        """Searches. Where an owner serves another image, follows it, if it may, and searches once more."""
        behind: SearchResult | CotraError
        with self._searching(options.n_threads) as session:
            try:
                behind = session.searcher.search(make(session), options)
                if not may_follow or not session.is_behind(behind.failures.values()):
                    return behind
            except CotraError as error:
                if not may_follow or not session.is_behind([error]):
                    raise
                behind = error
        try:
            self._follow(session)
        except CotraError as error:
            log.warning("owners serve other images, and cannot be followed yet: %s", error)
            if isinstance(behind, CotraError):
                raise behind from error
            return behind
        return self._search(make, options, may_follow=False)

    def homes(self, queries: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """The shard whose owner `search(algorithm="home")` sends each query to: int64[n_queries], positions as in `addresses`.

        Raises `InvalidInputError` for wrong queries, shards that are not one graph, or not the whole of a collection with
        coarse tables.
        """
        with self._searching(1) as session:
            batch = make_batch(queries, self.dim, session.counts, k=1, ef=1, beam=1, stop=Stop())
            return session.planner.homes(batch)

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
        images: Sequence[int] | None = None,
    ) -> Answer:
        """The one-sided part of `search`, by shard and not merged, for algorithms that merge it with other answers.

        Arguments and errors as `search`.

        Returns:
            labels int64[n_read, n_queries, k] (-1 where there are fewer) and distances float32 likewise (inf there) of the
            shards that are read over verbs or shm, in their order; and one `STATS_DTYPE` record for each query.
        """
        stop = Stop()

        def walk() -> Answer:
            with self._searching(n_threads) as session:
                if filters is not None:
                    session.check_images(self._first_images if images is None else images)
                batch = make_batch(
                    queries,
                    self.dim,
                    session.counts,
                    k=k,
                    ef=ef,
                    beam=beam,
                    stop=stop,
                    inflight=inflight,
                    timeout_s=timeout_s,
                    filters=filters,
                )
                connections = [each for each in session.replicas.connections if each.transport in ONE_SIDED]
                if not connections:
                    shape = (0, len(batch.queries), k)
                    return (
                        np.empty(shape, np.int64),
                        np.empty(shape, np.float32),
                        np.zeros(len(batch.queries), STATS_DTYPE),
                    )
                stop.expect(len(batch.queries))
                try:
                    return session.engines.search(
                        connections, batch.of_shards([connection.index for connection in connections]), n_threads
                    )[0]
                except DeadlineError as error:
                    raise stop.late(error, timeout_s) from None

        return self._observer.walk(walk, stop)

    @contextmanager
    def _searching(self, n_threads: int) -> Iterator[Session]:
        """A search, from begin to end: `close` waits for it. Raises `ClosedError` once closed."""
        if not 1 <= n_threads <= MAX_THREADS:
            raise InvalidInputError(f"n_threads must be in [1, {MAX_THREADS}], not {n_threads}")
        self._check_process()  # another thread of the parent's may hold the lock for ever
        with self._lock:
            self._check_open()
            self._n_searches += 1
            session = self._session
            session.n_searches += 1
        try:
            yield session
        finally:
            with self._lock:
                session.n_searches -= 1
                is_over = session is not self._session and not session.n_searches
            if is_over:
                session.close()
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
        that come later raise `ClosedError`. Idempotent; one that was interrupted is done by the next. In a child of `fork` it
        closes nothing: all is the parent's."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            self._closing = True
            self._session.begin_close()
            while self._n_searches:
                self._idle.wait()
        with self._ending:
            if self._closed:
                return
            with self._following:
                session = self._session
            session.upkeep.stop()
            self._threads.close()
            session.close()
            self._connector.close()
            self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        paths: Any = ", ".join(f"{a} over {t}" for a, t in zip(self.addresses, self.transports, strict=True))
        return f"<Cluster of {len(self._connections)} shards: {paths}>"
