"""What peers are worth to each other, measured: how much of a walk stays at a query's home, and what one shard less costs."""

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
"""Of a timed comparison, at least."""

Report = Callable[[int, int], None]
"""Called with (done, all)."""


@dataclass(frozen=True, slots=True)
class HomeRow:
    """Every query answered by its home peer, whose own records are in place and whose halo is as it was at `connect`.

    Attributes:
        halo: what was asked for, as a share of the own images. held: what it has, in records, over those of the own shard, on
            average over the peers. held_bytes: memory that its caches take, for each of the own shard's vectors.
        recall: at which the shares are, of all queries together. own: the share of all expansions whose record is of the own
            shard. local: of the own shard or in the halo.
    """

    halo: float
    held: float
    held_bytes: float
    recall: float
    own: float
    local: float


@dataclass(frozen=True, slots=True)
class LossRow:
    """The collection without one shard, beside the whole, at equal ef.

    Attributes:
        shard: which; vectors: that it held. share: of the queries' true k nearest that it held.
        recall_fall: what recall is less. reads_ratio, time_ratio, cpu_ratio: READs, wall clock and CPU time of this process for
            the batch, over those of the whole; of times the median of the ratios of calls right after each other.
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
    """What one graph should keep to, `bound` ("<=" or ">=") a limit, and whether it does."""

    what: str
    bound: str
    limit: float
    measured: float
    met: bool

    @classmethod
    def at_most(cls, what: str, limit: float, measured: float) -> Target:
        """Met up to the limit."""
        return cls(what, "<=", limit, measured, measured <= limit)

    @classmethod
    def at_least(cls, what: str, limit: float, measured: float) -> Target:
        """Met from the limit on."""
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
        """A reader of all shards; with `owners`, those in one's place: none, or what this process holds."""
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
    """A row for each halo at the recall `wanted`, linear between `efs` (ascending; the nearest where it is outside of them);
    and how many queries the peer has that is home to most, over the mean.

    A cluster is made anew for each ef: a cache that was walked through holds what its queries read.
    """
    homes = owners.whole.homes(data.queries)
    loads = np.bincount(homes, minlength=len(owners.paths))
    here = np.flatnonzero(loads).tolist()
    counts = np.zeros((len(halos), len(efs), 4))  # of all queries: right answers, own, cached, all expansions
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
    """Each shard missing once, for a reader who was told: no owner, partial answers allowed."""
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
    """Wall clock and CPU time of this process, in seconds."""
    begin, cpu_begin = time.perf_counter(), time.process_time()
    search(cluster)
    return time.perf_counter() - begin, time.process_time() - cpu_begin


def peer_targets(homes: Sequence[HomeRow], losses: Sequence[LossRow]) -> list[Target]:
    """Those of routed queries, with each halo, and of a lost shard."""
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
