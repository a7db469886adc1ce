"""This package as `cotra bench` measures it: `Remote`, `Local` and `Algorithm` are systems."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cotra_rdma._bench.data import Ids, Queries, Rows
from cotra_rdma._bench.runner import Answer, Setting
from cotra_rdma._bench.transports import MIXED, parse_transport
from cotra_rdma._collection.manifest import shard_paths
from cotra_rdma._core.query_checks import pack_filter
from cotra_rdma._native.channel import Channel, FabricModel
from cotra_rdma._native.graph_engine import Engine
from cotra_rdma._native.record_cache import RecordCache
from cotra_rdma._native.view import View
from cotra_rdma._owner.child_process import OwnerProcess
from cotra_rdma._reader.cluster import Cluster
from cotra_rdma._reader.connect import connect
from cotra_rdma._shard.shard import Shard
from cotra_rdma.errors import InvalidInputError

_BY_OWNERS = frozenset(("rpc", "home", "peers"))
"""The paths of `SearchResult.transports` over which owners search."""


class _Reader:
    """What the systems over a `Cluster` share.

    Attributes:
        _labels: for each shard the vectors of the data set that it holds.
    """

    name = "cotra"
    _cluster: Cluster
    _labels: Sequence[Ids | slice] = (slice(None),)
    _searched_by = "cotra"
    _timeout_s: float | None = None

    def search(self, queries: Queries, setting: Setting, rows: Rows | None = None) -> Answer:
        """Searches as `System.search` does."""
        result = self._cluster.search(
            queries,
            k=setting.k,
            ef=setting.ef,
            beam=setting.beam,
            n_threads=setting.n_threads,
            inflight=setting.inflight,
            filters=None if rows is None else [rows[labels] for labels in self._labels],
            algorithm=self._searched_by,
            timeout_s=self._timeout_s,
        )
        shards = float(result.asked.mean()) if len(result.asked) else 0.0
        return Answer(result.ids, result.stats, shards, in_process=not _BY_OWNERS.intersection(result.transports))

    def forget(self) -> None:
        """Empties the reader's cache of records."""
        self._cluster.clear_caches()


class Remote(_Reader):
    """A shard in an owner process of its own, reached over one transport."""

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


class Algorithm(_Reader):
    """One algorithm over a collection."""

    _timeout_s = 60.0

    def __init__(self, collective: Collective, algorithm: str, *, ideal: Cluster | None = None) -> None:
        """Searches the collective's cluster, or `ideal`, which is a cluster without a round trip."""
        asks = owners_search(algorithm)
        self._collective = collective
        self._cluster = ideal or collective.cluster
        self._searched_by = algorithm
        self._labels = collective.labels
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

    def owner_cpu_s(self) -> float | None:
        """Returns the CPU time of the owners."""
        return self._collective.owner_cpu_s()

    def close(self) -> None:
        """Does nothing: who made the collective closes it."""


def owners_search(algorithm: str) -> bool:
    """Returns whether an algorithm has the owners search over RPC."""
    return algorithm.endswith("scatter-gather")
