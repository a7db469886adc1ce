"""This package as `cotra bench` measures it, and the cache of built graphs. Each class is a `System`."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cotra_rdma._bench.data import DataSet, Ids, Queries, Rows
from cotra_rdma._bench.libraries import LIBRARIES, SEED, Progress, library_version
from cotra_rdma._bench.runner import Answer, Plan, Setting, System
from cotra_rdma._bench.transports import MIXED, parse_transport
from cotra_rdma._build.collection import build_collection
from cotra_rdma._collection.manifest import shard_paths
from cotra_rdma._core.query_checks import pack_filter
from cotra_rdma._native.channel import Channel, FabricModel
from cotra_rdma._native.graph_engine import Engine
from cotra_rdma._native.record_cache import RecordCache
from cotra_rdma._native.view import View
from cotra_rdma._owner.child_process import OwnerProcess
from cotra_rdma._owner.server import TRANSPORTS
from cotra_rdma._reader.cluster import Cluster
from cotra_rdma._reader.connect import connect
from cotra_rdma._shard.shard import Shard
from cotra_rdma.errors import FormatError, InvalidInputError

_BY_OWNERS = frozenset(("rpc", "home", "peers"))
"""The paths of `SearchResult.transports` over which owners search."""


class Remote:
    """A shard in an owner process of its own, reached over one transport."""

    name = "cotra"
    algorithm = None
    n_shards = 1
    beams = True
    rtt_s = 0.0
    zero_rtt = None

    def __init__(self, path: Path, transport: str, cache_bytes: int = 0) -> None:
        self.transport = transport
        self.cache_bytes: int | None = cache_bytes
        self.inflights = transport != "rpc"
        with contextlib.ExitStack() as stack:
            self._owner = stack.enter_context(OwnerProcess([path], transports=tuple(dict.fromkeys((transport, "rpc")))))
            self._cluster = stack.enter_context(
                connect(self._owner.addresses, transport=transport, cache_bytes=cache_bytes)
            )
            self._stack = stack.pop_all()

    def search(self, queries: Queries, setting: Setting, rows: Rows | None = None) -> Answer:
        """Searches as `System.search` does."""
        result = self._cluster.search(
            queries,
            k=setting.k,
            ef=setting.ef,
            beam=setting.beam,
            n_threads=setting.n_threads,
            inflight=setting.inflight,
            filters=None if rows is None else [rows],
        )
        return Answer(result.ids, result.stats, in_process=not _BY_OWNERS.intersection(result.transports))

    def forget(self) -> None:
        """Empties the reader's cache of records."""
        self._cluster.clear_caches()

    def owner_cpu_s(self) -> float | None:
        """Returns the CPU time of the owner's process."""
        return self._owner.cpu_s()

    def close(self) -> None:
        """Disconnects, and ends the owner."""
        self._stack.close()


class Local:
    """A shard that is mapped in this process, with or without a modelled fabric."""

    name = "cotra"
    algorithm = None
    n_shards = 1
    beams = True
    inflights = True

    def __init__(
        self, path: Path, transport: str, fabric: FabricModel | None, n_threads: int, cache_bytes: int = 0
    ) -> None:
        """Maps the shard, and makes one engine for each thread. `n_threads` is the most that a search will have."""
        self.transport = transport
        self.cache_bytes: int | None = cache_bytes
        self._cache: RecordCache | None = None
        self.rtt_s = 0.0 if fabric is None else fabric.round_trip_s
        self.zero_rtt: Local | None = None
        with contextlib.ExitStack() as stack:
            arena = stack.enter_context(Shard.open(path, verify=False)).arena
            self._pool = stack.enter_context(ThreadPoolExecutor(n_threads))
            self._engines = []
            for _ in range(n_threads):
                channel = stack.enter_context(Channel.shm(arena))
                if fabric is not None:
                    channel = stack.enter_context(Channel.model(channel, fabric))
                view = stack.enter_context(View.open(channel))
                if cache_bytes and self._cache is None:
                    self._cache = stack.enter_context(RecordCache.create(view, cache_bytes))
                self._engines.append(stack.enter_context(Engine.create([view], [channel], [self._cache])))
            if fabric is not None and self.rtt_s:
                self.zero_rtt = Local(path, transport, replace(fabric, round_trip_s=0.0), n_threads, cache_bytes)
                stack.callback(self.zero_rtt.close)
            self._stack = stack.pop_all()

    def search(self, queries: Queries, setting: Setting, rows: Rows | None = None) -> Answer:
        """Searches as `System.search` does."""
        filters = None if rows is None else [pack_filter(rows, len(rows))]

        def search(engine: Engine, part: Queries) -> tuple[Ids, npt.NDArray[np.float32], npt.NDArray[np.void]]:
            return engine.search(part, setting.k, setting.ef, setting.beam, inflight=setting.inflight, filters=filters)

        parts = np.array_split(queries, min(setting.n_threads, len(queries)))
        run = map if len(parts) == 1 else self._pool.map  # one thread needs no hand-over
        answers = list(run(search, self._engines[: len(parts)], parts))
        ids, _, stats = zip(*answers, strict=True)
        return Answer(np.concatenate([part[0] for part in ids]), np.concatenate(stats), in_process=True)

    def forget(self) -> None:
        """Empties the cache of records."""
        if self._cache is not None:
            self._cache.clear()

    def owner_cpu_s(self) -> float | None:
        """Returns None: there is no owner."""
        return None

    def close(self) -> None:
        """Unmaps the shard."""
        self._stack.close()


class Collective:
    """A collection in an owner process, which all algorithms search. Two transports need two owner processes."""

    def __init__(self, directory: Path, transport: str, cache_bytes: int = 0) -> None:
        kind, fabric = parse_transport(transport)
        if kind == "local":
            raise InvalidInputError(
                "algorithms over several shards are measured over shm, verbs, rpc or a modelled fabric, not local"
            )
        path = {"model": "shm", MIXED: "auto"}.get(kind, kind)
        self.directory = directory
        self.transport = transport
        self.cache_bytes = cache_bytes
        self.rtt_s = 0.0 if fabric is None else fabric.round_trip_s
        paths = shard_paths([directory])
        self.labels = []
        for file in paths:
            with Shard.open(file, verify=False) as shard:
                self.labels.append(shard.labels())
        offered = [("shm", "rpc"), ("rpc",)] if kind == MIXED else [tuple(dict.fromkeys((path, "rpc")))]
        with contextlib.ExitStack() as stack:
            self._owners = [
                stack.enter_context(OwnerProcess(paths[at :: len(offered)], transports=names))
                for at, names in enumerate(offered)
            ]
            addresses = [""] * len(paths)
            for at, owner in enumerate(self._owners):
                addresses[at :: len(offered)] = owner.addresses
            self.cluster = stack.enter_context(
                connect(addresses, transport=path, fabric=fabric, cache_bytes=cache_bytes)
            )
            self.zero_rtt: Cluster | None = None
            if fabric is not None and self.rtt_s:
                ideal = replace(fabric, round_trip_s=0.0)
                self.zero_rtt = stack.enter_context(
                    connect(addresses, transport=path, fabric=ideal, cache_bytes=cache_bytes)
                )
            self._stack = stack.pop_all()

    def owner_cpu_s(self) -> float:
        """Returns the CPU time of all owners."""
        return sum(owner.cpu_s() for owner in self._owners)

    def close(self) -> None:
        """Disconnects, and ends the owners."""
        self._stack.close()


class Algorithm:
    """One algorithm over a collection."""

    name = "cotra"

    def __init__(self, collective: Collective, algorithm: str, *, ideal: Cluster | None = None) -> None:
        """Searches the collective's cluster, or `ideal`, which is a cluster without a round trip."""
        asks = _asks(algorithm)
        self._collective = collective
        self._cluster = ideal or collective.cluster
        self._searched_by = algorithm
        self.directory = collective.directory
        one_graph = ", one graph" if collective.cluster.one_graph else ""
        pushed = ", pushed" if one_graph and not asks and "rpc" in collective.cluster.transports else ""
        self.algorithm = f"{algorithm}{one_graph}{pushed}"
        self.transport = "rpc" if asks else collective.transport
        self.n_shards = len(collective.labels)
        self.beams = not algorithm.endswith("spire")
        self.inflights = not asks
        self.cache_bytes: int | None = 0 if asks else collective.cache_bytes
        self.rtt_s = 0.0 if asks or ideal else collective.rtt_s
        self.zero_rtt = Algorithm(collective, algorithm, ideal=collective.zero_rtt) if self.rtt_s else None

    def search(self, queries: Queries, setting: Setting, rows: Rows | None = None) -> Answer:
        """Searches as `System.search` does."""
        result = self._cluster.search(
            queries,
            k=setting.k,
            ef=setting.ef,
            beam=setting.beam,
            n_threads=setting.n_threads,
            inflight=setting.inflight,
            filters=None if rows is None else [rows[labels] for labels in self._collective.labels],
            algorithm=self._searched_by,
            timeout_s=60.0,
        )
        shards = float(result.asked.mean()) if len(result.asked) else 0.0
        return Answer(result.ids, result.stats, shards, in_process=not _BY_OWNERS.intersection(result.transports))

    def forget(self) -> None:
        """Empties the reader's cache of records."""
        self._cluster.clear_caches()

    def owner_cpu_s(self) -> float | None:
        """Returns the CPU time of the owners."""
        return self._collective.owner_cpu_s()

    def close(self) -> None:
        """Does nothing: who made the collective closes it."""


def _asks(algorithm: str) -> bool:
    """Returns whether an algorithm has the owners search over RPC."""
    return algorithm.endswith("scatter-gather")


@dataclass(frozen=True, slots=True)
class Budget:
    """The size of a cache: in bytes, or as a share of the shards."""

    nbytes: int = 0
    share: float = 0.0

    def of(self, paths: Sequence[Path]) -> int:
        """Returns the size in bytes for these shards."""
        return self.nbytes or round(self.share * sum(path.stat().st_size for path in paths))


@dataclass(frozen=True, slots=True)
class Split:
    """How a data set is split over shards, and the algorithms that are measured over them."""

    algorithms: Sequence[str]
    n_shards: Sequence[int] = (16,)
    partition: str = "kmeans"
    n_lists: int = 0
    graph: str = "independent"


@contextlib.contextmanager
def open_systems(
    data: DataSet,
    transports: Sequence[str],
    plan: Plan,
    cache: Path,
    *,
    libraries: Sequence[str] = ("hnswlib",),
    split: Split | None = None,
    budgets: Sequence[Budget] = (Budget(),),
    progress: Progress = lambda what, done, total: None,
) -> Iterator[list[System]]:
    """Opens other libraries and this package over each transport, ready to be measured, and closes them at the end.

    With a `split`, this package searches a collection by each algorithm; without one, it searches a single shard.
    A system that reads has a cache of records of each of the `budgets`.

    All cores build the graphs, with the plan's M and ef_construction.
    The directory `cache` keeps them for the next run.
    Their names hold a hash of the vectors, the parameters, and a library's version.

    Args:
        data: the data set.
        transports: the names of transports, as `parse_transport` takes them.
        plan: the parameters of the graphs, and the most threads.
        cache: the directory for built graphs.
        libraries: the names of other libraries.
        split: how to split the data set; None for a single shard.
        budgets: the sizes of the cache of records.
        progress: called with what is built, the vectors that are done, and the number of vectors.
    """
    fabrics = [parse_transport(transport) for transport in transports]
    if split is None and MIXED in transports:
        raise InvalidInputError(f"{MIXED} needs several shards: give --algorithm")
    cache.mkdir(parents=True, exist_ok=True)
    shape = f"{data.vectors.count}x{data.vectors.dim}"
    stem = f"{data.name}-{shape}-{data.digest()}-{data.metric}-M{plan.M}-efc{plan.ef_construction}"
    with contextlib.ExitStack() as stack:
        systems: list[System] = []
        for name in libraries:
            path = cache / f"{stem}.{name}-{library_version(name)}"
            systems.append(LIBRARIES[name](data, plan, path, progress))
        if split is not None:
            asked: set[tuple[int, str]] = set()
            for n_shards in split.n_shards:
                directory = _collection(data, plan, split, n_shards, cache, stem, progress)
                sizes = [budget.of(shard_paths([directory])) for budget in budgets]
                for transport, cache_bytes in itertools.product(transports, sizes):
                    collective = Collective(directory, transport, cache_bytes)
                    stack.callback(collective.close)
                    for algorithm in split.algorithms:
                        if not (
                            _asks(algorithm) and (n_shards, algorithm) in asked
                        ):  # it is the same over any transport
                            systems.append(Algorithm(collective, algorithm))
                            asked.add((n_shards, algorithm))
            yield systems
            return
        shard = _shard(data, plan, cache / f"{stem}.cotra", progress)
        for transport, (kind, fabric) in zip(transports, fabrics, strict=True):
            for cache_bytes in (0,) if kind == "rpc" else [budget.of([shard]) for budget in budgets]:
                ours: System
                if kind in TRANSPORTS:
                    ours = Remote(shard, kind, cache_bytes)
                else:
                    ours = Local(shard, transport, fabric, max(plan.threads), cache_bytes)
                systems.append(ours)
                stack.callback(ours.close)
        yield systems


def _collection(
    data: DataSet, plan: Plan, split: Split, n_shards: int, cache: Path, stem: str, progress: Progress
) -> Path:
    linked = "-linked" if split.graph == "global" else ""
    n_lists = max(n_shards, split.n_lists) if split.n_lists else 0
    path = cache / f"{stem}-{n_shards}x{split.partition}{linked}-ivf{n_lists}"
    if not path.is_dir() or not all(map(_is_current, shard_paths([path]))):

        def report(shard: int, phase: str, done: int) -> None:
            progress(phase if shard < 0 else f"shard {shard + 1}/{n_shards} {phase}", done, data.vectors.count)

        build_collection(
            data.vectors,
            path,
            n_shards,
            metric=data.metric,
            M=plan.M,
            ef_construction=plan.ef_construction,
            seed=SEED,
            partition=split.partition,
            n_lists=n_lists,
            graph=split.graph,
            force=True,
            progress=report,
        )
    return path


def _is_current(path: Path) -> bool:
    """Returns whether a shard's file exists and is of this version's format."""
    try:
        Shard.open(path, verify=False).close()
    except (FileNotFoundError, FormatError):
        return False
    return True


def _shard(data: DataSet, plan: Plan, path: Path, progress: Progress) -> Path:
    if not _is_current(path):

        def report(phase: str, done: int, total: int) -> None:
            progress(f"cotra {phase}", done, total)

        with Shard.build(
            data.vectors.read(),
            metric=data.metric,
            M=plan.M,
            ef_construction=plan.ef_construction,
            seed=SEED,
            progress=report,
        ) as shard:
            shard.save(path)
    return path
