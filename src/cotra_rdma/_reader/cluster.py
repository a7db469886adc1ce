"""`Cluster`: a reader of one or more shards. It searches each shard over the best path to it, and merges the answers."""

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
    """A reader of shards, made by `connect`. It is a context manager.

    Several threads may search at once.

    Attributes:
        dim: the dimension of the vectors.
        metric: "l2", "ip" or "cosine".
        one_graph: whether there are several shards and they are one graph. One walk then goes through all shards that have
            an owner.
    """

    def __init__(self, connect: Callable[[SessionHooks], Session], connector: Connector, *, follow: bool) -> None:
        """Connects.

        Args:
            connect: makes a session over the images that the owners serve now.
            connector: what `connect` uses. The cluster closes it.
            follow: whether a search follows owners to another image.

        Raises:
            CotraError: as `connect` raises it.
        """
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
        """For each shard, the connection to the owner that is in use now."""
        return self._session.replicas.connections

    # ---- owners that come and go ----

    def revive(self) -> list[str]:
        """Tries again to connect to owners that failed, or that were away at `connect`.

        A thread of the cluster does the same every 5 s while an owner is away.

        Returns:
            The addresses of the owners that are back.

        Raises:
            ClosedError: the cluster is closed.
        """
        with self._searching(1) as session:  # `close` waits for it, too
            back = session.revive()
            is_stale = bool(session.replicas.renewed & session.replicas.lost.keys())
        if is_stale:
            self._follow_later()
        return back

    def renew_leases(self) -> None:
        """Renews the lease at each owner, which keeps this reader's queue pairs.

        A thread of the cluster does the same every 15 s while the cluster is open.
        """
        self._session.upkeep.renew_leases()

    def follow(self) -> None:
        """Connects to the images that the owners serve now. The next search searches those.

        A search that is in progress ends on the images that it began with.
        A search follows by itself when an owner serves another image, unless `connect(follow=False)` was called.
        Filters are for the rows of one image: see `images` of `search`.
        If this raises, the cluster searches the same images as before.

        Raises:
            StaleShardError: the number of shards, the dimension or the metric is another one, or a rebuild is not over.
            TransportError: a shard cannot be reached. `connect` lists the other errors of a new connection.
            ClosedError: the cluster is closed.
        """
        self._follow(self._session)

    def _follow(self, stale: Session) -> None:
        """Puts a new session in the place of `stale`. Does nothing if another thread has done so."""
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
        """Follows, for a thread of the cluster. It only logs a failure, because that thread tries again."""
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
        """For each shard, the address of the owner in use. "own" is a shard that this process holds and does not serve."""
        return tuple(connection.address for connection in self._connections)

    @property
    def transports(self) -> tuple[str, ...]:
        """For each shard, the path to the owner in use: "own" (this process's memory), "verbs", "shm" or "rpc".

        "lost" is a shard that has no owner left.
        """
        return tuple(connection.transport for connection in self._connections)

    @property
    def passed_over(self) -> tuple[dict[str, str], ...]:
        """For each shard, why each better path is not in use, by the name of that path."""
        return tuple(connection.passed_over for connection in self._connections)

    @property
    def lost(self) -> dict[int, CotraError]:
        """Why a shard has no owner left, by the position of the shard."""
        return dict(self._session.replicas.lost)

    def __len__(self) -> int:
        """The number of vectors in all shards."""
        return sum(connection.shard.count for connection in self._connections)

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of rows of each shard, deleted rows included. A filter has one bit for each row."""
        return tuple(connection.shard.count for connection in self._connections)

    @property
    def regions(self) -> tuple[MemoryRegion | None, ...]:
        """For each shard, the memory region that its owner exposes to RDMA READs, or None if the owner offers no verbs."""
        told = [connection.capabilities.region for connection in self._connections]
        return tuple(None if region is None else MemoryRegion(**fields_of(region)) for region in told)

    @property
    def images(self) -> tuple[int, ...]:
        """The checksum of each shard's image, as an unsigned 64-bit number. It is 0 for a shard that was never reached.

        The checksum names the shard, whatever its position in this cluster.
        """
        return self._session.replicas.images

    @property
    def cached_bytes(self) -> int:
        """The bytes that this reader keeps of the shards: views (headers and upper layers) and record caches."""
        views = sum(connection.view.nbytes for connection in self._connections if connection.view is not None)
        return views + sum(cache.nbytes for cache in self.record_caches if cache is not None)

    @property
    def record_caches(self) -> tuple[CacheInfo | None, ...]:
        """For each shard, its record cache in numbers, or None if it has no cache."""
        return self._session.caches.infos

    def clear_caches(self) -> None:
        """Empties the record caches, and forgets how often each record was asked for."""
        for connection in self._connections:
            if connection.cache is not None:
                connection.cache.clear()

    def metrics(self) -> ClusterMetrics:
        """What this cluster has done since `connect`, in numbers, and how its owners stand. Any thread may ask, at any time."""
        return metrics_of(self._counters, self._session.replicas)

    def ping(self, n_reads: int = 100, n_bytes: int = 1024) -> tuple[npt.NDArray[np.uint64], ...]:
        """Measures READs of each shard's first bytes, one after the other.

        Args:
            n_reads: the number of READs of each shard.
            n_bytes: the length of a READ.

        Returns:
            For each shard, the latencies in ns, uint64[n_reads]. The array is empty for a shard that is only asked over RPC.

        Raises:
            TransportError: a READ failed, or a channel cannot be opened.
        """
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
        """Opens a channel to the memory region of one shard, for one thread.

        The block's end closes the channel. It must end before the cluster is closed.

        Args:
            shard: the position of the shard.

        Raises:
            TransportError: the shard is only asked over RPC, or the channel cannot be opened.
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
        """Finds the k nearest vectors of each query, over all shards.

        Independent shards are walked one by one.
        Their answers are merged by distance, then shard, then id.
        An id that several shards hold is returned once.

        Shards of one graph (`one_graph`, `cotra build --graph global`) are searched by one walk for each query.
        Its READs go to whichever shard holds the next node.
        If a shard cannot be read, its owner expands nodes for the walk.
        `SearchResult.transports` then says "push" for that shard.

        If an owner fails during the search, the search goes on over another owner of the same shard.
        If there is no other owner, `allow_partial` says what happens.

        Ctrl-C ends a search that Python's main thread called, also if other threads share it.
        Owners and threads that work for the search are stopped, and `KeyboardInterrupt` is raised.
        `stop` ends a search in any thread.
        The cluster can be used afterwards.

        Args:
            queries: float32[n_queries, dim] or float32[dim]. Other types of real numbers are converted.
            k: the number of answers for each query, at most `ef`. If there are fewer vectors, places stay empty (-1, inf).
            ef: the length of the list of nearest nodes that decides when a walk ends. A larger `ef` finds more, with more
                READs. For "spire", it is the number of inverted lists that a query reads, over all shards.
            beam: the most nodes that a walk expands in one round. A wider beam needs fewer rounds. "spire" ignores it.
            n_threads: the number of threads that share the queries. Each has its own queue pairs.
            inflight: the number of queries in progress at once in each thread. 0 chooses it by the transport.
            timeout_s: the most seconds that the whole search may take. A wait that the search can go on without gets half of
                the time that is left. None sets no bound for the search. Each READ, and each answer of an owner, then has
                5 s.
            filters: for each shard, the rows that may be in an answer: None (all), bool[count], or a bitmap (bit i % 8 of
                byte i // 8, counted from the lowest, is row i). Under a selective filter, a walk goes further, or reads only
                the rows that the filter lets through.
            shards: bool[n_queries, n_shards]: the shards that each query asks. None asks all.
            allow_partial: whether to leave out a shard that has no owner left, in place of raising. If every shard is left
                out, the result has coverage 0 and holds what was found before. None stands for True if the shards are one
                graph, and for False otherwise; but it raises if no shard is left.
            algorithm: one of these. The result says what was done.

                - "cotra" reads the graphs of the shards that can be read, and asks the owners of the others.
                - "home" sends each query to the owner that holds most of its neighbourhood. That owner walks the whole
                  graph, and uses its own records in place (`Server.search_with`). This process walks for the queries that no
                  home answers. If all homes refuse, that is an error, except for filters and bounds, which owners of earlier
                  versions refuse. With `shards`, this process walks, and the result says "cotra".
                - "scatter-gather" asks all owners to search their shards.
                - "spire" reads inverted lists in two rounds (`Shard.build(n_lists=)`).
                - "compass", "compass+scatter-gather" and "compass+spire" first leave out of each query the shards that are
                  unlikely to hold its neighbours (`cotra build --partition kmeans`).
                - "auto" takes the way that the cost model predicts to be the quickest. It takes Compass if that leaves out
                  enough shards, without filters, and for k up to the calibration's (10). It compares times, not recall. It
                  learns from each search, so its answers may differ from call to call. Those of the others never do.
            target_recall: the recall that Compass has to keep, as a share of the recall of asking every shard. A k above 10
                loses more. With filters, Compass asks all shards that have a row to return. If the chosen shards have fewer
                than k answers, the others are asked too.
            owner_cpu: whether "auto" may ask owners to search shards that could be read.
            explain: whether the result has the cost model's predictions for any algorithm, not only for "auto".
            max_expansions: the most records that a walk may expand. It bounds what a query costs, whatever the data and the
                filter. Each independent shard has a walk of its own. `SearchResult.incomplete` says which queries the bound
                ended, and `coverage` does not count them. None sets no bound. It is not for "spire".
            images: the images that the filters are for: `Cluster.images`, read when the filters were made. None stands for
                the images of `connect`. If the cluster searches other images by now, filters are refused.
            progress: called with the number of answered queries, some times a second.
            stop: another thread may call its `set`, which ends the search.

        Returns:
            The answers, and how they were found.

        Raises:
            InvalidInputError: an argument is out of its range, of another shape, or holds NaN or infinity.
            TransportError: a shard failed. The error's `shard` says which.
            PartialResultError: some shards failed, and others answered. Its `result` holds those answers.
            DeadlineError: the search was not over within `timeout_s`. It names a shard if that shard was waited for.
            SearchCancelledError: `stop` was set.
            StaleShardError: an owner serves another image than at connect, and cannot be followed, as `follow` explains. Or
                the filters are for another image. Then call `follow`, and make filters for the new images.
            ClosedError: the cluster is closed.
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
                stop.set()  # other threads may still work for this search
                raise

        return self._observer.search(search, stop, {"k": k, "ef": ef, "beam": beam, "algorithm": algorithm})

    def _search(self, make: Callable[[Session], Batch], options: Options, *, may_follow: bool) -> SearchResult:
        """Searches. If an owner serves another image and `may_follow` is set, follows it and searches once more."""
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
        """Finds the home of each query: the shard whose owner `search(algorithm="home")` sends it to.

        Args:
            queries: float32[n_queries, dim] or float32[dim].

        Returns:
            int64[n_queries]: positions of shards, as in `addresses`.

        Raises:
            InvalidInputError: the queries are malformed, the shards are not one graph, or they have no coarse tables.
            TransportError: no shard has an owner.
            ClosedError: the cluster is closed.
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
        """Walks the shards that can be read, and does not merge their answers.

        It is for algorithms that merge these answers with others.
        The arguments and the errors are those of `search`.

        Returns:
            ids int64[n_read, n_queries, k] (-1 in empty places), distances float32[n_read, n_queries, k] (inf there), and
            `STATS_DTYPE`[n_queries]. n_read counts the shards whose path is one-sided. They keep their order.
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
        """Counts a search as in progress until the block ends, so that `close` waits for it.

        Raises:
            ClosedError: the cluster is closed.
            InvalidInputError: `n_threads` is out of its range.
        """
        if not 1 <= n_threads <= MAX_THREADS:
            raise InvalidInputError(f"n_threads must be in [1, {MAX_THREADS}], not {n_threads}")
        self._check_process()  # before the lock: after a fork, a thread of the parent may hold the lock for ever
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
        """Sets the `ef` of `knn_query`, as hnswlib's `Index.set_ef` does.

        Raises:
            InvalidInputError: `ef` is below 1.
        """
        if ef < 1:
            raise InvalidInputError(f"ef must be at least 1, not {ef}")
        self._ef = ef

    def knn_query(
        self, data: npt.ArrayLike, k: int = 1, num_threads: int = 1
    ) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.float32]]:
        """Searches as hnswlib's `Index.knn_query` does.

        `ef` is what `set_ef` set, or 64, and at least k.

        Args:
            data: the queries, float32[n_queries, dim] or float32[dim].
            k: the number of answers for each query.
            num_threads: `n_threads` of `search`.

        Returns:
            ids uint64[n_queries, k] and distances float32[n_queries, k].

        Raises:
            InvalidInputError: a query has fewer than k answers. hnswlib raises an error then too.
            CotraError: the other errors of `search`.
        """
        result = self.search(data, k, max(self._ef or 64, k), n_threads=num_threads)
        if (result.ids < 0).any():
            raise InvalidInputError(f"there are fewer than {k} vectors to return; use search() for a partial answer")
        return result.ids.astype(np.uint64), result.distances

    # ---- the end ----

    def close(self) -> None:
        """Closes engines, then connections. Idempotent.

        It waits for searches that other threads have in progress. A `Stop` ends such a search.
        A search that begins later raises `ClosedError`.
        If a call of `close` is interrupted, the next call finishes its work.
        In a child of `fork` it closes nothing, because everything is the parent's.
        """
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
