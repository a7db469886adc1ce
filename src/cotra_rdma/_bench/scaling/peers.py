"""Measures what peers gain from each other: how much of a walk stays at a query's home, and what a lost shard costs."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cotra_rdma._bench.data import DataSet
from cotra_rdma._bench.runner import Plan
from cotra_rdma._collection.manifest import shard_paths
from cotra_rdma._owner.child_process import OwnerProcess
from cotra_rdma._reader.cluster import Cluster
from cotra_rdma._reader.connect import connect
from cotra_rdma._reader.replicas import Owner
from cotra_rdma._reader.result import SearchResult
from cotra_rdma._shard.shard import Shard
from cotra_rdma.datasets import recall

REPEATS = 25
"""The least number of timed comparisons."""

Report = Callable[[int, int], None]
"""Called with what is done, and how much there is."""


@dataclass(frozen=True, slots=True)
class HomeRow:
    """What stays at home if every query is answered by its home peer.

    A peer's own records are in place, and its halo is as it was at `connect`.

    Attributes:
        halo: the halo that was asked for, as a share of the own images.
        held: the records in the halo over those of the own shard, on average over the peers.
        held_bytes: the memory of the caches, for each of the own shard's vectors.
        recall: the recall of all queries together, at which the shares are measured.
        own: the share of all expansions whose record is in the own shard.
        local: the share of all expansions whose record is in the own shard or in the halo.
    """

    halo: float
    held: float
    held_bytes: float
    recall: float
    own: float
    local: float


@dataclass(frozen=True, slots=True)
class LossRow:
    """The collection without one shard, beside the whole collection at equal ef.

    The ratios are over the whole collection.
    Those of times are medians of the ratios of two calls that follow each other.

    Attributes:
        shard: the lost shard.
        vectors: the vectors that it held.
        share: the share of the queries' true k nearest vectors that it held.
        recall_fall: how much the recall falls.
        reads_ratio: READs of the batch.
        time_ratio: wall clock of the batch.
        cpu_ratio: CPU time of this process during the batch.
    """

    shard: int
    vectors: int
    share: float
    recall_fall: float
    reads_ratio: float
    time_ratio: float
    cpu_ratio: float


@dataclass(frozen=True, slots=True)
class Target:
    """A target that one graph should keep to.

    Attributes:
        what: what is measured.
        bound: "<=" or ">=".
        limit: the limit.
        measured: the measurement.
        met: whether it keeps to the limit.
    """

    what: str
    bound: str
    limit: float
    measured: float
    met: bool

    @classmethod
    def at_most(cls, what: str, limit: float, measured: float) -> Target:
        """Makes a target that is met up to the limit."""
        return cls(what, "<=", limit, measured, measured <= limit)

    @classmethod
    def at_least(cls, what: str, limit: float, measured: float) -> Target:
        """Makes a target that is met from the limit on."""
        return cls(what, ">=", limit, measured, measured >= limit)


class Owners:
    """A collection in an owner process, and a reader of all of it."""

    def __init__(self, directory: Path, transport: str) -> None:
        self.paths = shard_paths([directory])
        self._transport = transport
        with ExitStack() as stack:
            offered = tuple(dict.fromkeys((transport, "rpc")))
            self.addresses = stack.enter_context(OwnerProcess(self.paths, transports=offered)).addresses
            self.whole = stack.enter_context(self.connect())
            self._stack = stack.pop_all()

    def connect(self, place: int = 0, owners: Sequence[Owner] | None = None, halo: float = 0.0) -> Cluster:
        """Connects to all shards.

        Args:
            place: the shard whose owners are replaced.
            owners: the owners of that shard: none, or what this process holds. None replaces nothing.
            halo: as `connect`.
        """
        of: list[Sequence[Owner]] = [[address] for address in self.addresses]
        if owners is not None:
            of[place] = owners
        return connect(of, transport=self._transport, halo=halo, allow_partial=True)

    def __enter__(self) -> Owners:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def measure_homes(
    owners: Owners, data: DataSet, plan: Plan, efs: Sequence[int], halos: Sequence[float], wanted: float, report: Report
) -> tuple[list[HomeRow], float]:
    """Measures what stays at home with each halo, at the recall `wanted`.

    The figures are linear between `efs`, which ascend, and those of the nearest ef if the recall is outside of them.
    A cluster is made anew for each ef, because a cache that was walked through holds what its queries read.

    Returns:
        A row for each halo, and the queries of the peer that is home to most over the mean.
    """
    homes = owners.whole.homes(data.queries)
    loads = np.bincount(homes, minlength=len(owners.paths))
    here = np.flatnonzero(loads).tolist()
    counts = np.zeros((len(halos), len(efs), 4))  # over all queries: right answers, own, cached and all expansions
    held = np.zeros((len(halos), 2))  # records and bytes
    done = 0
    for home in here:
        queries, truth = data.queries[homes == home], data.ground_truth[homes == home]
        with Shard.open(owners.paths[home], verify=False) as shard:
            for (i, halo), (j, ef) in itertools.product(enumerate(halos), enumerate(efs)):
                with owners.connect(home, [shard], halo) as cluster:
                    caches = [cache for cache in cluster.record_caches if cache is not None]
                    found = cluster.search(queries, plan.k, ef, plan.beams[0])
                right = recall(found.ids, truth) * len(queries)
                counts[i, j] += [
                    right,
                    *(int(found.stats[name].sum()) for name in ("own", "cached_records", "expansions")),
                ]
                has = np.array([sum(c.records for c in caches), sum(c.nbytes for c in caches)])
                held[i] += has / shard.info.count / (len(here) * len(efs))
                report(done := done + 1, len(here) * len(halos) * len(efs))
    rows = []
    for halo, (records, nbytes), by_ef in zip(halos, held.tolist(), counts, strict=True):
        at, own, cached, every = (
            float(np.interp(wanted, by_ef[:, 0] / len(homes), column)) for column in (by_ef / [len(homes), 1, 1, 1]).T
        )
        rows.append(HomeRow(halo, records, nbytes, at, own / every, (own + cached) / every))
    return rows, float(loads.max() / loads.mean())


def measure_losses(owners: Owners, data: DataSet, plan: Plan, ef: int, report: Report) -> list[LossRow]:
    """Measures the loss of each shard in turn.

    The reader knows that the shard has no owner, and allows partial answers.
    """
    truth = data.ground_truth[:, : plan.k]
    repeats = max(REPEATS, plan.repeats)

    def search(cluster: Cluster) -> SearchResult:
        return cluster.search(data.queries, plan.k, ef, plan.beams[0], allow_partial=True)

    complete = search(owners.whole)
    before, reads = recall(complete.ids, truth), int(complete.stats["reads"].sum())
    rows = []
    for shard, path in enumerate(owners.paths):
        with Shard.open(path, verify=False) as file:
            labels = file.labels()
        with owners.connect(shard, []) as rest:
            found = search(rest)
            times = np.array([[_times(search, owners.whole), _times(search, rest)] for _ in range(repeats)])
        time_ratio, cpu_ratio = np.median(times[:, 1] / times[:, 0], axis=0).tolist()
        rows.append(
            LossRow(
                shard,
                len(labels),
                float(np.isin(truth, labels).mean()),
                before - recall(found.ids, truth),
                int(found.stats["reads"].sum()) / reads,
                time_ratio,
                cpu_ratio,
            )
        )
        report(shard + 1, len(owners.paths))
    return rows


def _times(search: Callable[[Cluster], SearchResult], cluster: Cluster) -> tuple[float, float]:
    """Measures the wall clock and this process's CPU time of a search, in seconds."""
    begin, cpu_begin = time.perf_counter(), time.process_time()
    search(cluster)
    return time.perf_counter() - begin, time.process_time() - cpu_begin


def peer_targets(homes: Sequence[HomeRow], losses: Sequence[LossRow]) -> list[Target]:
    """Makes the targets of routed queries, one for each halo, and of a lost shard."""
    n = len(losses)
    names = [f"and a halo of {row.halo:g}" if row.halo else "alone" for row in homes]
    return [
        *(
            Target.at_least(f"local share, routed home, {n} shards, own records {name}", 0.7, row.local)
            for name, row in zip(names, homes, strict=True)
        ),
        Target.at_most(
            f"one of {n} shards lost: recall falls more than its share, at most",
            0.01,
            max(row.recall_fall - row.share for row in losses),
        ),
        Target.at_most(
            f"one of {n} shards lost: CPU time of a search / with all, at most",
            1.1,
            max(row.cpu_ratio for row in losses),
        ),
    ]
