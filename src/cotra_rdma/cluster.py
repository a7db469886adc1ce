"""`connect`: a reader of one or more shards. Each shard is read over the best path to it, and the answers are merged."""

from __future__ import annotations

import logging
import socket
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from cotra_rdma.channel import DEFAULT_TIMEOUT_S, FabricModel
from cotra_rdma.compass import DEFAULT_TARGET, Router
from cotra_rdma.cost import Prediction, needs_of_asking, needs_of_reading
from cotra_rdma.engine import COUNTS, STATS_DTYPE, CacheInfo, merge
from cotra_rdma.errors import (
    ClosedError,
    CotraError,
    FormatError,
    InvalidInputError,
    PartialResultError,
    TransportError,
)
from cotra_rdma.job import Answer, SearchJob
from cotra_rdma.lanes import LanePool
from cotra_rdma.peer import ONE_SIDED, Peer, check_alike
from cotra_rdma.plan import Plan, Planner
from cotra_rdma.queries import check_queries, check_search, check_timeout, pack_filter
from cotra_rdma.region import MemoryRegion
from cotra_rdma.rpc import ClientKeys, parse_address
from cotra_rdma.verbs import Device, QueuePairOptions
from cotra_rdma.wire import fields_of

log = logging.getLogger(__name__)

TRANSPORTS = ("auto", "verbs", "shm", "rpc")
_LEASE_RENEWAL_S = 15.0
_MAX_THREADS = 256
_FEW = 1024  # queries whose stats may be kept until somebody asks about them


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The answers to a batch of queries.

    Attributes:
        ids: int64[n_queries, k], nearest first; -1 where there are fewer.
        distances: float32[n_queries, k], inf there.
        shards: int32[n_queries, k]: the position of the shard of each, in the order given to `connect`; -1 there.
        stats: `cotra_rdma.engine.STATS_DTYPE`[n_queries]: reads, rounds (of the shard with most), expansions, cache_hits
            (upper-layer nodes looked at without a READ), cached_records (taken from the cache of `cache_bytes` in place of
            as many READs), read_bytes, latency_ns; all else summed over the shards.
        transports: for each shard the transport that was really used: "verbs", "shm" or "rpc".
        elapsed_s: of the whole call, in seconds.
        coverage: the share of the shards that answered: 1.0 unless a partial answer was asked for.
        failures: the shards that did not answer, and why.
        asked: int32[n_queries]: how many shards each query was for.
        algorithm: what was done: "cotra", "compass+spire"...
        predictions: what the cost model expected of each way, the one taken first; empty where it was not asked.
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


def connect(
    addresses: str | Sequence[str],
    transport: str = "auto",
    *,
    device: str | None = None,
    gid_index: int | None = None,
    keys: ClientKeys | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    fabric: FabricModel | None = None,
    queue_pair: QueuePairOptions | None = None,
    cache_bytes: int = 0,
) -> Cluster:
    """Connects to the owners of shards, and reads each shard's header and upper layers once.

    Args:
        addresses: HOST:PORT of each shard's server; their order numbers the shards.
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

    Raises:
        TransportError: a shard cannot be reached. VerbsUnavailableError: verbs was asked for and cannot be had, and why.
        InvalidInputError: shards that differ in dim or metric; a shard's part of `cache_bytes` that holds no record.
    """
    given = [addresses] if isinstance(addresses, str) else list(addresses)
    if not given:
        raise InvalidInputError("connect needs at least one address")
    check_timeout(timeout_s)
    if cache_bytes < 0:
        raise InvalidInputError(f"cache_bytes must be 0 or more, not {cache_bytes}")
    if transport not in TRANSPORTS:
        raise InvalidInputError(f"transport must be one of {', '.join(TRANSPORTS)}, not {transport!r}")
    options = queue_pair or QueuePairOptions()
    return Cluster(given, transport, device, gid_index, keys, timeout_s, fabric, options, cache_bytes)


class Cluster:
    """A connection to shards; made by `connect`. Searches may come from many threads at once.

    Attributes:
        dim, metric: of the vectors.
        transports: for each shard the path to it; `passed_over` says why not a better one.
        one_graph: whether the shards that can be read are of one graph, and are walked together.
    """

    def __init__(
        self,
        addresses: list[str],
        transport: str,
        device: str | None,
        gid_index: int | None,
        keys: ClientKeys | None,
        timeout_s: float,
        fabric: FabricModel | None,
        options: QueuePairOptions,
        cache_bytes: int,
    ) -> None:
        self._lock = threading.Lock()
        self._closed = False
        self._lanes = LanePool(self._executor)
        self._ef: int | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._stop_leases = threading.Event()
        self._leases: threading.Thread | None = None
        self._device: Device | None = None
        self._peers: list[Peer] = []
        try:
            for index, address in enumerate(addresses):
                towards = replace(options, peer_address=options.peer_address or _ip_of(address))
                peer = Peer(
                    index,
                    address,
                    keys=keys,
                    timeout_ms=max(1, round(timeout_s * 1000)),
                    options=towards if gid_index is None else replace(towards, gid_index=gid_index),
                    fabric=fabric,
                )
                self._peers.append(peer)
            check_alike(self._peers)
            no_device = self._open_device(transport, device)
            for peer in self._peers:
                peer.choose(transport, self._device, no_device)
            self._one_sided = [peer for peer in self._peers if peer.transport in ONE_SIDED]
            if cache_bytes:
                self._make_caches(cache_bytes)
        except BaseException:
            self.close()
            raise
        self.dim: int = self._peers[0].shard.dim
        self.metric: str = self._peers[0].shard.metric
        self.transports: tuple[str, ...] = tuple(peer.transport for peer in self._peers)
        self.passed_over: tuple[dict[str, str], ...] = tuple(peer.passed_over for peer in self._peers)
        self._links = [peer.link for peer in self._peers]
        graphs = {0 if peer.info is None else peer.info.graph_id for peer in self._one_sided}
        self.one_graph: bool = len(self._one_sided) > 1 and len(graphs) == 1 and graphs != {0}
        n_walked = len(self._one_sided) if self.one_graph else 1
        self._planner = Planner(self._peers, self.dim, _router(self._peers), n_walked)
        if self.one_graph and len(self._one_sided) < len(self._peers):
            asked = ", ".join(str(peer) for peer in self._peers if peer.transport not in ONE_SIDED)
            log.info("not all of the graph can be read: %s: the owner searches its shard by itself", asked)
        if "verbs" in self.transports:
            # The thread must not keep a cluster that nobody else holds: that one's leases run out.
            weakref.finalize(self, self._stop_leases.set)
            self._leases = threading.Thread(
                target=_keep_leases, args=(weakref.ref(self), self._stop_leases), name="cotra-leases", daemon=True
            )
            self._leases.start()

    def _open_device(self, transport: str, name: str | None) -> str:
        """Opens this side's device where it is needed; returns why there is none."""
        offered = any(peer.capabilities.transports.get("verbs") == "" for peer in self._peers)
        if transport not in ("auto", "verbs") or (not offered and transport == "auto"):
            return "not asked for"
        try:
            self._device = Device(name)
        except CotraError as error:
            if transport == "verbs" or name is not None:
                raise
            return str(error)
        return ""

    def _make_caches(self, budget_bytes: int) -> None:
        sizes = [peer.info.image_bytes for peer in self._one_sided if peer.info is not None]
        for peer, size in zip(self._one_sided, sizes, strict=True):
            peer.make_cache(budget_bytes * size // sum(sizes))

    def renew_leases(self) -> None:
        """Keeps the queue pairs that owners hold for this reader. A thread does it, as long as the cluster is open."""
        for peer in self._peers:
            if peer.transport != "verbs":
                continue
            try:
                peer.renew()
            except CotraError as error:  # a search will tell
                log.debug("%s: its lease was not renewed: %s", peer, error)

    # ---- what it is connected to ----

    @property
    def addresses(self) -> tuple[str, ...]:
        """The shards' addresses, in order."""
        return tuple(peer.address for peer in self._peers)

    def __len__(self) -> int:
        """Vectors in all shards."""
        return sum(peer.shard.count for peer in self._peers)

    @property
    def counts(self) -> tuple[int, ...]:
        """The local rows of each shard, deleted ones included: the bits of a filter."""
        return tuple(peer.shard.count for peer in self._peers)

    @property
    def regions(self) -> tuple[MemoryRegion | None, ...]:
        """The region that each shard's owner exposes to RDMA READs, or None where it has no verbs device."""
        told = [peer.capabilities.region for peer in self._peers]
        return tuple(None if region is None else MemoryRegion(**fields_of(region)) for region in told)

    @property
    def images(self) -> tuple[int, ...]:
        """The checksum of each shard's image, which names the shard whatever its place here; 0 where its owner, of an earlier
        version, does not tell it."""
        return tuple(peer.shard.image_checksum or 0 for peer in self._peers)

    @property
    def cached_bytes(self) -> int:
        """Bytes that this reader keeps of the shards: headers and upper layers, and the cache of `cache_bytes`."""
        views = sum(peer.view.nbytes for peer in self._peers if peer.view is not None)
        return views + sum(cache.nbytes for cache in self.record_caches if cache is not None)

    @property
    def record_caches(self) -> tuple[CacheInfo | None, ...]:
        """The cache of each shard's records; None for a shard without."""
        return tuple(None if peer.cache is None else peer.cache.info for peer in self._peers)

    def clear_caches(self) -> None:
        """Forgets all cached records, and how often each was asked for: as after `connect`."""
        for peer in self._peers:
            if peer.cache is not None:
                peer.cache.clear()

    def ping(self, n_reads: int = 100, n_bytes: int = 1024) -> tuple[npt.NDArray[np.uint64], ...]:
        """The latency of `n_reads` READs of each shard's first bytes, one after the other, in ns: uint64[n_reads] for each
        shard; empty for one that is only asked over RPC. Raises `TransportError`."""
        latencies = []
        for peer in self._peers:
            if peer.transport not in ONE_SIDED:
                latencies.append(np.empty(0, np.uint64))
                continue
            channel, parts = peer.open_channel()
            with parts:
                latencies.append(channel.read_loop(np.zeros(n_reads, np.uint64), n_bytes)[1])
        return tuple(latencies)

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
        timeout_s: float = DEFAULT_TIMEOUT_S,
        filters: Sequence[npt.ArrayLike | bytes | None] | None = None,
        shards: npt.ArrayLike | None = None,
        allow_partial: bool = False,
        algorithm: str = "cotra",
        target_recall: float = DEFAULT_TARGET,
        owner_cpu: bool = False,
        explain: bool = False,
    ) -> SearchResult:
        """The k nearest vectors of each query, over all shards.

        Each shard is searched by itself, and the answers are merged by distance, then shard, then id; an id that several
        shards hold is returned once. Shards of one graph (`cotra build --graph global`; `one_graph`) that can be read are
        searched together, by one walk a query, whose READs go to whichever shard holds the next node.

        Args:
            queries: float32[n_queries, dim] or float32[dim].
            k: answers for each query, k <= ef. With fewer vectors than k, places stay empty (-1, inf).
            ef: how far each shard's walk looks beyond the k-th answer: a larger one finds more, with more READs. For
                "spire" the lists that are read, over all shards.
            beam: nodes expanded a round at most: a wider one needs fewer rounds. Not for "spire".
            n_threads: threads that share the queries, each with its own queue pairs.
            inflight: queries in progress at once in each thread; 0: chosen for the transport.
            timeout_s: the longest wait for one READ, or for an owner's answer over RPC.
            filters: for each shard which of its rows may be returned: None (all), bool[count], or a bitmap (bit i of byte
                i // 8, lowest first, is local row i). Under a selective filter more of the graph is walked, or just the
                rows that it lets through are read.
            shards: bool[n_queries, n_shards]: which shards each query is for; None: all.
            allow_partial: leave out a shard that fails, and say so in the result, in place of raising.
            algorithm: "cotra" reads the graphs of the shards that can be read, and asks the owners of the others;
                "scatter-gather" asks all owners; "spire" reads inverted lists, in two rounds (`Shard.build(n_lists=)`).
                "compass" in front of them ("compass", "compass+scatter-gather", "compass+spire") leaves out of each query
                the shards that have nothing for it (`cotra build --partition kmeans`). "auto" takes what the cost model
                says is quickest, and Compass where leaving shards out pays and was measured: without filters, and for k
                no larger than at the build (10). Which it was is in the result. It compares times, not recall, and
                learns, so its answers may differ from call to call; those of all others never do.
            target_recall: of Compass: the recall to keep, of that which asking every shard has. Filters, and k above 10,
                lose more.
            owner_cpu: whether "auto" may let owners search whose memory could be read.
            explain: have the cost model's predictions in the result, for any algorithm.

        Raises:
            InvalidInputError: a wrong dim, NaN or infinity, k > ef, a filter of another length. TransportError and those
            below it: a shard failed; the error's `shard` tells which. It is a `PartialResultError`, with what the others
            answered in its `result`, where that is to be had: when the shard was asked over RPC.
        """
        begin = time.perf_counter()
        job = self._job(queries, k, ef, beam, inflight, timeout_s, filters, shards)
        self._check_open(n_threads)
        plan = self._planner.plan(
            algorithm, job, n_threads, target_recall=target_recall, owner_cpu=owner_cpu, explain=explain
        )
        if plan.mask is not job.mask:
            job = job._replace(mask=plan.mask)
        answers, failures = self._gather(job, plan, n_threads, allow_partial)
        self._note(plan, job, answers, n_threads, time.perf_counter() - begin)
        ids, distances, owners, stats = self._merge(answers, job)
        n_shards = len(self._peers)
        asked = np.empty(len(job.queries), np.int32)
        asked[:] = n_shards if job.mask is None else job.mask.sum(axis=1)
        result = SearchResult(
            ids,
            distances,
            owners,
            stats,
            tuple("rpc" if at in plan.asked else name for at, name in enumerate(self.transports)),
            time.perf_counter() - begin,
            (n_shards - len(failures)) / n_shards,
            failures,
            asked,
            plan.algorithm,
            plan.predictions,
        )
        if failures and not allow_partial:
            first = failures[min(failures)]
            if len(failures) == n_shards:
                raise first
            why = "; ".join(str(failures[shard]) for shard in sorted(failures))
            raise PartialResultError(
                f"{len(failures)} of {n_shards} shards failed: {why}", result, shard=first.shard
            ) from first
        return result

    def walk(
        self,
        queries: npt.ArrayLike,
        k: int = 10,
        ef: int = 64,
        beam: int = 8,
        n_threads: int = 1,
        *,
        inflight: int = 0,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        filters: Sequence[npt.ArrayLike | bytes | None] | None = None,
    ) -> Answer:
        """The one-sided part of `search`, by shard and not merged, for algorithms that merge it with other answers.

        Arguments and errors as `search`.

        Returns:
            labels int64[n_read, n_queries, k] (-1 where there are fewer) and distances float32 likewise (inf there) of the
            shards that are read over verbs or shm, in their order; and one `STATS_DTYPE` record for each query.
        """
        job = self._job(queries, k, ef, beam, inflight, timeout_s, filters, None)
        self._check_open(n_threads)
        if not self._one_sided:
            shape = (0, len(job.queries), k)
            return np.empty(shape, np.int64), np.empty(shape, np.float32), np.zeros(len(job.queries), STATS_DTYPE)
        return self._lanes.search(self._one_sided, job.of_shards([peer.index for peer in self._one_sided]), n_threads)

    def _check_open(self, n_threads: int) -> None:
        if not 1 <= n_threads <= _MAX_THREADS:
            raise InvalidInputError(f"n_threads must be in [1, {_MAX_THREADS}], not {n_threads}")
        if self._closed:
            raise ClosedError("the cluster is closed")

    def _job(
        self,
        queries: npt.ArrayLike,
        k: int,
        ef: int,
        beam: int,
        inflight: int,
        timeout_s: float,
        filters: Sequence[npt.ArrayLike | bytes | None] | None,
        shards: npt.ArrayLike | None,
    ) -> SearchJob:
        rows, n_shards = check_queries(queries, self.dim), len(self._peers)
        check_search(k, ef, beam, inflight, timeout_s)
        packed = None
        if filters is not None:
            if len(filters) != n_shards:
                raise InvalidInputError(f"{len(filters)} filters for {n_shards} shards")
            packed = tuple(pack_filter(bits, peer.shard.count) for bits, peer in zip(filters, self._peers, strict=True))
        mask = None
        if shards is not None:
            mask = np.asarray(shards)
            if mask.dtype != np.bool_ or mask.shape != (len(rows), n_shards):
                raise InvalidInputError(
                    f"shards must be bool[{len(rows)}, {n_shards}], not {mask.dtype}{list(mask.shape)}"
                )
        return SearchJob(rows, k, ef, beam, inflight, timeout_s, packed, mask)

    def _gather(
        self, job: SearchJob, plan: Plan, n_threads: int, allow_partial: bool
    ) -> tuple[list[tuple[list[int], Answer]], dict[int, CotraError]]:
        """Asks every shard: the answers with the shards that they are of, and the failures."""
        answers: list[tuple[list[int], Answer]] = []
        failures: dict[int, CotraError] = {}
        calls = []
        for at in sorted(plan.asked):
            calls.append((at, self._executor().submit(self._peers[at].search, job.of_shards([at]))))
        try:
            near = [peer for peer in self._peers if peer.index not in plan.asked]
            while near:
                numbers = [peer.index for peer in near]
                try:
                    part = job.of_shards(numbers)
                    answers.append((numbers, self._lanes.search(near, part, n_threads, lists=plan.lists)))
                    break
                except CotraError as error:
                    if not allow_partial or error.shard not in numbers:
                        raise
                    failures[error.shard] = error
                    near = [peer for peer in near if peer.index != error.shard]
        finally:
            for shard, call in calls:
                try:
                    labels, distances, stats = call.result()
                    answers.append(([shard], (labels[np.newaxis], distances[np.newaxis], stats)))
                except CotraError as error:
                    failures[shard] = error
        return answers, failures

    def _note(
        self, plan: Plan, job: SearchJob, answers: list[tuple[list[int], Answer]], n_threads: int, seconds: float
    ) -> None:
        """Tells the cost model what a shard needed: after searches of one kind only, for others say less."""
        n = len(job.queries)
        if len(plan.asked) not in (0, len(self._peers)) or job.filters is not None or not answers or not n:
            return
        searches = n * len(self._peers) if job.mask is None else int(job.mask.sum())
        if plan.lists:  # a query reads as many lists however many shards it is for
            searches = n
        if not searches:
            return
        if plan.asked:
            method, beam = "asked", job.beam
            told = partial(needs_of_asking, self._links, answers[0][1][2], searches, seconds)
        else:
            method, beam = ("lists", 0) if plan.lists else ("walk", job.beam)
            told = partial(needs_of_reading, self._links, answers[0][1][2], searches, seconds, min(n_threads, n))
        self._planner.experience.note(method, job.k, job.ef, beam, told if n <= _FEW else told())

    def _merge(
        self, answers: list[tuple[list[int], Answer]], job: SearchJob
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.int32], npt.NDArray[np.void]]:
        if len(answers) == 1 and len(answers[0][0]) == len(self._peers):
            labels, distances, stats = answers[0][1]
            return *merge(labels, distances), stats
        shape = (len(self._peers), len(job.queries), job.k)
        labels = np.full(shape, -1, np.int64)
        distances = np.full(shape, np.inf, np.float32)
        total = np.zeros(len(job.queries), STATS_DTYPE)
        for shards, answer in answers:
            labels[shards], distances[shards], stats = answer
            for name in COUNTS:
                total[name] += stats[name]
            for name in ("rounds", "latency_ns"):
                total[name] = np.maximum(total[name], stats[name])
        return *merge(labels, distances), total

    def _executor(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._closed:
                raise ClosedError("the cluster is closed")
            if self._pool is None:
                self._pool = ThreadPoolExecutor(_MAX_THREADS, "cotra-search")
            return self._pool

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
        """Closes lanes, then connections. A search in progress in another thread is waited for. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._stop_leases.set()
        if self._leases is not None:
            self._leases.join()
        if self._pool is not None:
            self._pool.shutdown()
        self._lanes.close()
        for peer in self._peers:
            peer.close()
        if self._device is not None:
            self._device.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        paths: Any = ", ".join(f"{a} over {t}" for a, t in zip(self.addresses, self.transports, strict=True))
        return f"<Cluster of {len(self._peers)} shards: {paths}>"


def _keep_leases(cluster: weakref.ref[Cluster], stop: threading.Event) -> None:
    while not stop.wait(_LEASE_RENEWAL_S):
        alive = cluster()
        if alive is not None:
            alive.renew_leases()
        del alive


def _router(peers: list[Peer]) -> Router | None:
    """Compass over these shards, numbered as in their collection; None where they are not the whole of one."""
    by_number = {peer.number: peer for peer in peers}
    tables = [by_number[at].coarse for at in range(len(peers)) if at in by_number]
    known = [table for table in tables if table is not None]
    told = {peer.calibration for peer in peers}
    if len(known) != len(peers) or len(peers) < 2 or len(told) != 1:
        return None
    try:
        return Router(known, told.pop(), peers[0].shard.metric)
    except FormatError as error:
        log.info("Compass is off: %s", error)
        return None


def _ip_of(address: str) -> str | None:
    """The IP address that a shard is reached at, for the choice of the GID."""
    host, port = parse_address(address)
    try:
        return str(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0]).partition("%")[0]
    except OSError as error:
        raise TransportError(f"{address}: {error}") from error
