"""`connect`: a reader of one or more shards. Each shard is read over the best path to it, and the answers are merged."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from cotra_rdma._collection.manifest import Collection, collection_directory
from cotra_rdma._collection.owners_file import addresses_of, misfit
from cotra_rdma._core.memory_region import MemoryRegion
from cotra_rdma._core.query_checks import check_most, check_queries, check_search, check_timeout, pack_filter
from cotra_rdma._core.stats import COUNTS, STATS_DTYPE
from cotra_rdma._core.stop import Progress, Stop
from cotra_rdma._native.channel import DEFAULT_TIMEOUT_S, Channel, FabricModel
from cotra_rdma._native.record_cache import CacheInfo
from cotra_rdma._native.verbs import QueuePairOptions
from cotra_rdma._reader.batch import Answer, Batch
from cotra_rdma._reader.connection import LOST, ONE_SIDED, READ, Connection, check_alike
from cotra_rdma._reader.connector import Connector
from cotra_rdma._reader.cost_model import needs_of_asking, needs_of_reading
from cotra_rdma._reader.engine_pool import EnginePool
from cotra_rdma._reader.executor import SearchExecutor, used_of
from cotra_rdma._reader.halo import Halo
from cotra_rdma._reader.home_search import HomeSearch
from cotra_rdma._reader.planner import Plan, Planner
from cotra_rdma._reader.replicas import Owner, Replicas, Tried
from cotra_rdma._reader.result import SearchResult
from cotra_rdma._routing.router import DEFAULT_TARGET, Router
from cotra_rdma.errors import (
    ClosedError,
    CotraError,
    DeadlineError,
    FormatError,
    InvalidInputError,
    PartialResultError,
    TransportError,
)
from cotra_rdma.protocol.envelope import fields_of
from cotra_rdma.protocol.rpc import ClientKeys

log = logging.getLogger(__name__)

TRANSPORTS = ("auto", "verbs", "shm", "rpc")
_LEASE_RENEWAL_S = 15.0
_LOOK_S = 5.0  # between looks for owners that are away
_MAX_THREADS = 256
_FEW = 1024  # queries whose stats may be kept until somebody asks about them


def connect(
    addresses: Owner | os.PathLike[str] | Sequence[Owner | Sequence[Owner]],
    transport: str = "auto",
    *,
    device: str | None = None,
    gid_index: int | None = None,
    keys: ClientKeys | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    fabric: FabricModel | None = None,
    queue_pair: QueuePairOptions | None = None,
    cache_bytes: int = 0,
    halo: float = 0.0,
    allow_partial: bool = False,
    collection: Collection | None = None,
) -> Cluster:
    """Connects to the owners of shards, and reads each shard's header and upper layers once.

    Args:
        addresses: for each shard the HOST:PORT of its server, or several of them, whose owners hold the same image: the nearest
            is used, and another takes over where it fails. Their order numbers the shards. In place of an address, a `Shard`
            that this process holds, or a `Server` of it: its records are used in place, without READs. A path: the shards of
            the collection there, whose owners its `owners.json` names (`cotra serve`); the files themselves need not be there.
        transport: "auto" takes verbs, else shm on the same host, else rpc, for each shard by itself; which, and why not a
            better one, is in `Cluster.transports` and `Cluster.passed_over`, and logged once. A name is binding.
        device, gid_index: of verbs on this side; None for the first active device and the GID that ranks best.
        keys: CURVE keys, where the owners want them.
        timeout_s: for each call of the control plane.
        fabric: adds a modelled fabric to every one-sided READ.
        queue_pair: options of the queue pairs, time-outs say.
        cache_bytes: a bound for the memory in which the cluster keeps records that its walks read most often, beside
            headers and upper layers; 0 keeps none. All threads share it; each shard that is read has a part, by its size.
            It changes how much is read, and no answer. Of no use over shm, where a READ is a pointer.
        halo: where this process holds shards of one graph: records of the other shards that they link to most are read now and
            kept in a cache, so that walks near the border stay at home; as a share of the bytes of the own images.
        allow_partial: go on without shards that no owner can be reached of, as long as there is one.
        collection: whose shards these are, in its order: owners of another generation are not used. None: nothing is checked
            but what shards must have alike; for a path it is the collection there.

    Raises:
        TransportError: a shard cannot be reached. VerbsUnavailableError: verbs was asked for and cannot be had, and why.
        InvalidInputError: shards that differ in dim or metric; owners of one shard that hold different images; a shard's part of
        `cache_bytes` that holds no record.
    """
    if isinstance(addresses, os.PathLike):
        collection = Collection.load(collection_directory(addresses), shard_files=False)
        addresses = addresses_of(addresses)
    elif isinstance(addresses, str) or not isinstance(addresses, Sequence):
        addresses = [addresses]
    owners = [list(of) if isinstance(of, Sequence) and not isinstance(of, str) else [of] for of in addresses]
    if not any(owners) or not (allow_partial or all(owners)):
        empty = [at for at, of in enumerate(owners) if not of]
        raise InvalidInputError(f"connect needs at least one address for each shard; without: {empty or 'all'}")
    if collection is not None and len(owners) != len(collection.shards):
        raise InvalidInputError(f"owners of {len(owners)} shards, and the collection has {len(collection.shards)}")
    check_timeout(timeout_s)
    if cache_bytes < 0:
        raise InvalidInputError(f"cache_bytes must be 0 or more, not {cache_bytes}")
    if not 0 <= halo < math.inf:
        raise InvalidInputError(f"halo must be a share, 0 or more, not {halo}")
    if halo and cache_bytes:
        raise InvalidInputError("halo is a cache: it takes the place of cache_bytes")
    if transport not in TRANSPORTS:
        raise InvalidInputError(f"transport must be one of {', '.join(TRANSPORTS)}, not {transport!r}")
    fits = None if collection is None else partial(misfit, collection)
    reach = Connector(transport, device, gid_index, keys, timeout_s, fabric, queue_pair or QueuePairOptions(), fits)
    return Cluster(owners, reach, cache_bytes, halo, allow_partial)


class Cluster:
    """A connection to shards; made by `connect`. Searches may come from many threads at once.

    Attributes:
        dim, metric: of the vectors.
        one_graph: whether its shards, several, are of one graph, and those that have an owner are walked together.
    """

    def __init__(
        self, owners: list[list[Owner]], reach: Connector, cache_bytes: int, halo: float, allow_partial: bool
    ) -> None:
        self._lock = threading.Lock()
        self._planning, self._ending = threading.Lock(), threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._n_searches = 0
        self._closing = self._closed = False
        self._reach = reach
        self._planner: Planner | None = None
        self._replicas: Replicas | None = None
        self._engines = EnginePool(self._searchers, self._callers, self._fail_over)
        self._ef: int | None = None
        self._pools: dict[str, ThreadPoolExecutor] = {}
        self._stop = threading.Event()
        self._attendant: threading.Thread | None = None
        self._renewed = time.monotonic()
        self._cache_bytes, self._halo = cache_bytes, None
        try:
            self._replicas = replicas = Replicas(owners, reach.connect, reach.choose, self._equip_late, self._forget)
            self._search_executor = SearchExecutor(replicas, self._engines, self._callers)
            self._homes = HomeSearch(replicas, self._search_executor, self._callers)
            check_alike(replicas.known)
            reach.open_device(replicas.known)
            replicas.settle(allow_partial=allow_partial)
            first = next(connection for connection in replicas.connections if connection.transport != LOST)
            self.dim: int = first.shard.dim
            self.metric: str = first.shard.metric
            graphs = {connection.shard.graph_id for connection in replicas.connections}
            self.one_graph: bool = len(replicas.connections) > 1 and len(graphs) == 1 and graphs != {0}
            self._planner = Planner(
                replicas.connections, self.dim, _router(replicas.connections), self._walked(), one_graph=self.one_graph
            )
            self._halo = Halo(replicas.connections, halo) if halo else None
            for connection in replicas.connections:
                self._equip(connection)
        except BaseException:
            self.close()
            raise
        if "verbs" in self.transports or not replicas.are_all_here:
            self._attend()

    @property
    def _connections(self) -> list[Connection]:
        """The owner of each shard that is in use now."""
        return [] if self._replicas is None else self._replicas.connections

    @property
    def _one_sided(self) -> list[Connection]:
        return [connection for connection in self._connections if connection.transport in ONE_SIDED]

    def _walked(self) -> frozenset[int]:
        """Positions of the shards that are walked together: of one graph, and read or pushed to."""
        there = [
            connection
            for connection in self._connections
            if connection.transport in ONE_SIDED or connection.view is not None
        ]
        graphs = {connection.shard.graph_id for connection in there}
        return (
            frozenset(connection.index for connection in there) if len(graphs) == 1 and graphs != {0} else frozenset()
        )

    # ---- owners that come and go ----

    def _fail_over(self, failed: Connection, error: CotraError, give_up: bool, tried: set[Tried]) -> Connection | None:
        assert self._replicas is not None
        return self._replicas.replace(failed, error, give_up=give_up, tried=tried)

    def _forget(self, gone: Connection) -> None:
        """What there was of an owner that is not used any more."""
        if self._planner is not None:
            with self._planning:
                if self._planner.router is None:  # Compass takes the whole collection, which may be there only now
                    self._planner.router = _router(self._connections)
                self._planner.refresh(self._walked())
            self._attend()
        self._engines.drop(gone)

    def _attend(self) -> None:
        """Starts the thread that renews leases, and looks for owners that are away."""
        with self._lock:
            if self._attendant is not None or self._closed:
                return
            # The thread must not keep a cluster that nobody else holds: that one's leases run out.
            weakref.finalize(self, self._stop.set)
            self._attendant = threading.Thread(
                target=_attend, args=(weakref.ref(self), self._stop), name="cotra-attendant", daemon=True
            )
            self._attendant.start()

    def revive(self) -> list[str]:
        """Tries owners that failed, or were not there at `connect`, again now; the addresses of those that are back.

        A thread does it every few seconds as long as any is away. Raises `ClosedError` once closed."""
        assert self._replicas is not None
        with self._searching(1):  # `close` waits for it, too
            return self._replicas.revive(self._between_owners)

    def _between_owners(self) -> None:
        """Before each owner that is tried again, which takes long where it is silent: leases and `close` do not wait for all."""
        self._check_open()
        self._renew_if_due()

    def _look_after_owners(self) -> None:
        """What the thread does every few seconds, whatever comes of it: nobody else does."""
        for look in (self._renew_if_due, self.revive):
            try:
                look()
            except ClosedError:
                log.debug("owners are looked after no more: the cluster is closed")
            except Exception:
                log.exception("owners that are away, and leases, are looked after again in %s s", _LOOK_S)

    def _check_open(self) -> None:
        if self._closing:
            raise ClosedError("the cluster is closed")

    def _renew_if_due(self) -> None:
        with self._lock:
            if time.monotonic() - self._renewed < _LEASE_RENEWAL_S:
                return
            self._renewed = time.monotonic()
        self.renew_leases()

    def _equip(self, connection: Connection) -> None:
        """Gives a shard that is read the cache that `connect` was asked for. Raises `InvalidInputError` for one of no record."""
        if self._halo is not None:
            self._halo.fill(connection)
        elif self._cache_bytes and connection.transport in READ:
            connection.make_cache(self._cache_part(connection))

    def _equip_late(self, connection: Connection) -> None:
        """The same for one that is there only now: where others have all the bytes, it goes without."""
        try:
            self._equip(connection)
        except InvalidInputError as error:
            log.info("no cache: %s", error)

    def _cache_part(self, connection: Connection) -> int:
        """A shard's part of the cache's bytes, by its size; those that are not there are counted as the mean of the others."""
        here = {other.index: other for other in self._connections if other.transport in READ} | {
            connection.index: connection
        }
        sizes = {at: (other.info or other.shard).image_bytes for at, other in here.items()}
        n_lost = sum(other.transport == LOST and other.index not in here for other in self._connections)
        total = sum(sizes.values()) * (1 + n_lost / len(sizes))
        left = self._cache_bytes - sum(cache.nbytes for cache in self.record_caches if cache is not None)
        return max(0, min(int(self._cache_bytes * sizes[connection.index] / total), left))

    def renew_leases(self) -> None:
        """Keeps the queue pairs that owners hold for this reader. A thread does it, as long as the cluster is open."""
        for connection in list(self._connections):
            if connection.transport != "verbs":
                continue
            try:
                connection.renew()
            except CotraError as error:  # a search will tell
                log.debug("%s: its lease was not renewed: %s", connection, error)

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
        return tuple(None if connection.cache is None else connection.cache.info for connection in self._connections)

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
        check_most(max_expansions)
        self._begin_search(n_threads)
        stop = stop or Stop()
        try:
            batch = self._job(queries, k, ef, beam, inflight, timeout_s, filters, shards, stop, progress)
            batch = batch._replace(most=max_expansions)
            run = partial(
                self._search,
                n_threads=n_threads,
                allow_partial=allow_partial,
                target_recall=target_recall,
                owner_cpu=owner_cpu,
                explain=explain,
            )
            result = run(batch, algorithm=algorithm)
            base = result.algorithm.removeprefix("compass").removeprefix("+") or "cotra"
            if result.algorithm.startswith("compass"):
                result = self._fill(result, batch, partial(run, algorithm=base))
            return result
        except DeadlineError as error:
            raise stop.late(error, timeout_s) from None
        except BaseException:
            stop.set()  # for all that still works for it
            raise
        finally:
            self._end_search()

    def _search(
        self,
        batch: Batch,
        *,
        n_threads: int,
        allow_partial: bool | None,
        algorithm: str,
        target_recall: float,
        owner_cpu: bool,
        explain: bool,
    ) -> SearchResult:
        begin = time.perf_counter()
        assert self._planner is not None
        plan = self._planner.plan(
            algorithm, batch, n_threads, target_recall=target_recall, owner_cpu=owner_cpu, explain=explain
        )
        if plan.mask is not batch.mask:
            batch = batch._replace(mask=plan.mask)
        lenient = self.one_graph if allow_partial is None else allow_partial
        connections = list(self._connections)
        homes = None
        if plan.homes is None:
            answers, failures, plan = self._search_executor.gather(connections, batch, plan, n_threads, lenient)
            seconds = time.perf_counter() - begin
            ended = connections
            if connections != self._connections:
                pairs = zip(connections, self._connections, strict=True)
                ended = [before if after.transport == LOST else after for before, after in pairs]
            elif not failures:
                self._note(plan, batch, answers, n_threads, seconds)
            ids, distances, owners, stats = self._search_executor.merge(answers, batch)
            used = [used_of(connection, plan, failures) for connection in ended]
        else:
            here = partial(
                self._planner.plan, "cotra", batch, n_threads, target_recall=1.0, owner_cpu=False, explain=False
            )
            (ids, distances, owners, stats), used, failures, homes = self._homes.search(
                connections, batch, plan.homes, n_threads, here, lenient
            )
        n_shards = len(connections)
        asked = np.empty(len(batch.queries), np.int32)
        asked[:] = n_shards if batch.mask is None else batch.mask.sum(axis=1)
        result = SearchResult(
            ids,
            distances,
            owners,
            stats,
            tuple(used),
            time.perf_counter() - begin,
            _coverage(n_shards, failures, stats),
            failures,
            asked,
            plan.algorithm,
            plan.predictions,
            homes,
        )
        if failures and (not lenient or (allow_partial is None and len(failures) == n_shards)):
            first = failures[min(failures)]
            if len(failures) == n_shards:
                raise first.with_traceback(None)  # it is the one of all searches, and would grow with each
            why = "; ".join(str(failures[shard]) for shard in sorted(failures))
            raise PartialResultError(
                f"{len(failures)} of {n_shards} shards failed: {why}", result, shard=first.shard
            ) from first
        return result

    def _fill(self, result: SearchResult, batch: Batch, run: Callable[[Batch], SearchResult]) -> SearchResult:
        """Asks all shards for queries to which those that Compass chose have too few answers."""
        most = len(result.transports) if batch.mask is None else batch.mask.sum(axis=1)
        short = np.flatnonzero((result.ids[:, -1] < 0) & (result.asked < most))
        if not len(short):
            return result
        mask = None if batch.mask is None else batch.mask[short]
        more = run(batch._replace(queries=batch.queries[short], mask=mask))
        for name in ("ids", "distances", "shards", "asked"):
            getattr(result, name)[short] = getattr(more, name)
        result.stats["incomplete"][short] = 0
        for name in (*COUNTS, "rounds", "latency_ns"):
            result.stats[name][short] += more.stats[name]
        failures = result.failures | more.failures
        return replace(
            result,
            elapsed_s=result.elapsed_s + more.elapsed_s,
            failures=failures,
            coverage=_coverage(len(result.transports), failures, result.stats),
        )

    def homes(self, queries: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """The shard whose owner `search(algorithm="home")` sends each query to: int64[n_queries], positions as in `addresses`.

        Raises `InvalidInputError` for wrong queries, shards that are not one graph, or not the whole of a collection with
        coarse tables.
        """
        assert self._planner is not None
        with self._searching(1):
            return self._planner.homes(self._job(queries, 1, 1, 1, 0, None, None, None, Stop()))

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
            batch = self._job(queries, k, ef, beam, inflight, timeout_s, filters, None, stop)
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

    def _begin_search(self, n_threads: int) -> None:
        """`close` waits for its end (`_end_search`). Raises `ClosedError` once closed."""
        if not 1 <= n_threads <= _MAX_THREADS:
            raise InvalidInputError(f"n_threads must be in [1, {_MAX_THREADS}], not {n_threads}")
        with self._lock:
            self._check_open()
            self._n_searches += 1

    def _end_search(self) -> None:
        with self._lock:
            self._n_searches -= 1
            if self._closing:
                self._idle.notify_all()

    @contextmanager
    def _searching(self, n_threads: int) -> Iterator[None]:
        """A search, from begin to end."""
        self._begin_search(n_threads)
        try:
            yield
        finally:
            self._end_search()

    def _job(
        self,
        queries: npt.ArrayLike,
        k: int,
        ef: int,
        beam: int,
        inflight: int,
        timeout_s: float | None,
        filters: Sequence[npt.ArrayLike | bytes | None] | None,
        shards: npt.ArrayLike | None,
        stop: Stop,
        progress: Progress | None = None,
    ) -> Batch:
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        rows, n_shards = check_queries(queries, self.dim), len(self._connections)
        check_search(k, ef, beam, inflight, timeout_s)
        packed = None
        if filters is not None:
            if len(filters) != n_shards:
                raise InvalidInputError(f"{len(filters)} filters for {n_shards} shards")
            packed = tuple(
                pack_filter(bits, connection.shard.count)
                for bits, connection in zip(filters, self._connections, strict=True)
            )
        mask = None
        if shards is not None:
            mask = np.asarray(shards)
            if mask.dtype != np.bool_ or mask.shape != (len(rows), n_shards):
                raise InvalidInputError(
                    f"shards must be bool[{len(rows)}, {n_shards}], not {mask.dtype}{list(mask.shape)}"
                )
        stop.begin(len(rows), progress)
        wait_s = DEFAULT_TIMEOUT_S if timeout_s is None else timeout_s
        return Batch(rows, k, ef, beam, inflight, wait_s, stop, packed, mask, deadline)

    def _note(
        self, plan: Plan, batch: Batch, answers: list[tuple[list[int], Answer]], n_threads: int, seconds: float
    ) -> None:
        """Tells the cost model what a shard needed: after searches of one kind only, for others say less, and of all shards."""
        n, connections = len(batch.queries), self._connections
        if plan.pushed or batch.filters is not None or batch.most is not None or not answers or not n:
            return
        if (
            len(plan.asked) != len(connections)
            if plan.asked
            else any(connection.transport not in ONE_SIDED for connection in connections)
        ):
            return
        searches = n * len(connections) if batch.mask is None else int(batch.mask.sum())
        if plan.lists:  # a query reads as many lists however many shards it is for
            searches = n
        if not searches:
            return
        links = [connection.link for connection in connections]
        assert self._planner is not None
        if plan.asked:
            method, beam = "asked", batch.beam
            told = partial(needs_of_asking, links, answers[0][1][2], searches, seconds)
        else:
            method, beam = ("lists", 0) if plan.lists else ("walk", batch.beam)
            told = partial(needs_of_reading, links, answers[0][1][2], searches, seconds, min(n_threads, n))
        self._planner.experience.note(method, batch.k, batch.ef, beam, told if n <= _FEW else told())

    def _searchers(self) -> ThreadPoolExecutor:
        """The threads that share a search."""
        return self._threads("cotra-search")

    def _callers(self) -> ThreadPoolExecutor:
        """The threads that wait for owners: others, for those that share a search wait for them."""
        return self._threads("cotra-call")

    def _threads(self, name: str) -> ThreadPoolExecutor:
        with self._lock:
            if self._closed:
                raise ClosedError("the cluster is closed")
            if name not in self._pools:
                self._pools[name] = ThreadPoolExecutor(_MAX_THREADS, name)
            return self._pools[name]

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
            self._stop.set()
            if self._attendant is not None and self._attendant is not threading.current_thread():
                self._attendant.join()
            for pool in self._pools.values():
                pool.shutdown()
            self._engines.close()
            if self._replicas is not None:
                self._replicas.close()
            self._reach.close()
            self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        paths: Any = ", ".join(f"{a} over {t}" for a, t in zip(self.addresses, self.transports, strict=True))
        return f"<Cluster of {len(self._connections)} shards: {paths}>"


def _attend(cluster: weakref.ref[Cluster], stop: threading.Event) -> None:
    while not stop.wait(_LOOK_S):
        alive = cluster()
        if alive is not None:
            alive._look_after_owners()
        del alive


def _coverage(n_shards: int, failures: Mapping[int, CotraError], stats: npt.NDArray[np.void]) -> float:
    """The share of the shards that answered, times the share of the queries of which no bound ended a walk."""
    cut_short = float((stats["incomplete"] > 0).mean()) if len(stats) else 0.0
    return (n_shards - len(failures)) / n_shards * (1 - cut_short)


def _router(connections: list[Connection]) -> Router | None:
    """Compass over these shards, numbered as in their collection; None where they are not the whole of one."""
    by_number = {connection.number: connection for connection in connections}
    tables = [by_number[at].coarse for at in range(len(connections)) if at in by_number]
    known = [table for table in tables if table is not None]
    told = {connection.calibration for connection in connections}
    if len(known) != len(connections) or len(connections) < 2 or len(told) != 1:
        return None
    try:
        return Router(known, told.pop(), connections[0].shard.metric)
    except FormatError as error:
        log.info("Compass is off: %s", error)
        return None
