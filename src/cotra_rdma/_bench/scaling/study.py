"""The study of `cotra bench --scaling`.

It measures one graph and independent shards at several numbers of shards, and how cost grows with the vectors.
From both it predicts what many machines would do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cotra_rdma._bench.data import DataSet, Queries
from cotra_rdma._bench.libraries import Progress
from cotra_rdma._bench.opening import Split, open_systems
from cotra_rdma._bench.runner import Plan, Point, run
from cotra_rdma._bench.scaling.costs import (
    Check,
    ShardsRow,
    SizeRow,
    check,
    cost_at,
    is_graph,
    shards_rows,
    targets,
    workload_of,
)
from cotra_rdma._bench.scaling.peers import (
    HomeRow,
    LossRow,
    Owners,
    Target,
    measure_homes,
    measure_losses,
    peer_targets,
)
from cotra_rdma._bench.scaling.prediction import Machine, Prediction, Variation, Workload, predict_all, variations
from cotra_rdma._bench.scaling.scale import NO_FABRIC, RECALL, Scale
from cotra_rdma._bench.systems import Algorithm
from cotra_rdma._bench.transports import parse_transport
from cotra_rdma._collection.manifest import shard_paths
from cotra_rdma._native.channel import Channel
from cotra_rdma._native.graph_engine import Engine
from cotra_rdma._native.image import ImageInfo
from cotra_rdma._native.view import View
from cotra_rdma._shard.shard import Shard

SIZES = 5


@dataclass(frozen=True, slots=True)
class Study:
    """The results of a study.

    Attributes:
        dataset: the name of the data set.
        transport: the path to the shards.
        fabric: the modelled fabric.
        recall: the recall of all figures.
        rows: the cost by shards.
        sizes: the cost by vectors.
        homes: what stays at a query's home, in one graph of the most shards.
        busiest: the queries of the peer that is home to most, over the mean.
        losses: what one lost shard costs, in one graph of the most shards.
        targets: what one graph should keep to.
        workload: what goes into the predictions.
        checks: the model beside measurements.
        machine: the machine of the predictions.
        predictions: the predictions.
        variations: the predictions with one assumption changed.
    """

    dataset: str
    transport: str
    fabric: str
    recall: float
    rows: list[ShardsRow]
    sizes: list[SizeRow]
    homes: list[HomeRow]
    busiest: float
    losses: list[LossRow]
    targets: list[Target]
    workload: Workload
    checks: list[Check]
    machine: Machine
    predictions: list[Prediction]
    variations: list[Variation]


def study(
    data: DataSet, scale: Scale, plan: Plan, cache: Path, progress: Progress = lambda what, done, total: None
) -> tuple[Study, list[Point]]:
    """Measures and predicts.

    Args:
        data: the data set.
        scale: what to study.
        plan: the settings to sweep.
        cache: the directory for built graphs.
        progress: called with what is done, how much of it, and how much there is.

    Returns:
        The study, and the points of all shards, which were measured in one interleaved run.

    Raises:
        InvalidInputError: as `Scale.check`, or the sweep of ef does not reach the recall.
    """
    scale.check(data)

    def report(what: str) -> Callable[[int, int], None]:
        return lambda done, total: progress(what, done, total)

    several = [n for n in scale.n_shards if n > 1]
    one_graph = Split(("cotra",), scale.n_shards, graph="global")
    paths = (scale.transport, scale.fabric, NO_FABRIC)
    with contextlib.ExitStack() as stack:
        systems = stack.enter_context(open_systems(data, paths, plan, cache, split=one_graph, progress=progress))
        directories = {system.n_shards: system.directory for system in systems if isinstance(system, Algorithm)}
        alone = Split(("cotra",), several)
        systems += stack.enter_context(
            open_systems(data, paths[:1], plan, cache, libraries=(), split=alone, progress=progress)
        )
        points = run(data, systems, plan, report("measuring shards"))
    efs = _efs_around(points, scale)
    with Owners(directories[scale.n_shards[-1]], scale.transport) as owners:
        homes, busiest = measure_homes(owners, data, plan, efs, scale.halos, RECALL, report("routing queries home"))
        losses = measure_losses(owners, data, plan, efs[-1], report("losing shards"))
    shares = {n: home_share(directories[n], data.queries, plan, efs[-1]) for n in scale.n_shards}
    rows = shards_rows(points, scale, shares)
    sizes = _sizes(data, plan, cache, progress)
    infos = _infos(directories[scale.n_shards[-1]])
    workload = workload_of(points, scale, plan, rows, sizes, infos, homes[-1])
    fabric = parse_transport(scale.fabric)[1]
    assert fabric is not None
    found = Study(
        data.name,
        scale.transport,
        scale.fabric,
        RECALL,
        rows,
        sizes,
        homes,
        busiest,
        losses,
        [*targets(rows), *peer_targets(homes, losses)],
        workload,
        [check(row, workload, fabric) for row in rows if row.one_graph],
        scale.machine,
        predict_all(workload, scale.machine, fabric),
        variations(workload, scale.machine, fabric, busiest=busiest),
    )
    return found, points


def home_share(directory: Path, queries: Queries, plan: Plan, ef: int) -> float:
    """Measures the part of all READs that go to the shard to which most READs of their query go.

    That is what the best peer for each query would find in its own shard, if it were known beforehand.
    Each shard's channel counts its READs, in this process and over memory.
    """
    with contextlib.ExitStack() as stack:
        arenas = [stack.enter_context(Shard.open(path, verify=False)).arena for path in shard_paths([directory])]
        channels = [stack.enter_context(Channel.shm(arena)) for arena in arenas]
        views = [stack.enter_context(View.open(channel)) for channel in channels]
        engine = stack.enter_context(Engine.create(views, channels))
        counts = [np.array([channel.info.reads for channel in channels], np.int64)]
        for i in range(len(queries)):
            engine.search(queries[i : i + 1], plan.k, ef, plan.beams[0])
            counts.append(np.array([channel.info.reads for channel in channels], np.int64))
    reads = np.diff(np.stack(counts), axis=0)
    return float(reads.max(axis=1).sum() / max(reads.sum(), 1))


def _efs_around(points: Sequence[Point], scale: Scale) -> list[int]:
    """Returns the least ef at which one graph of the most shards has the recall, and before it the next smaller ef."""
    n = scale.n_shards[-1]
    ours = [p for p in points if p.shards == n and p.transport == scale.transport and is_graph(n, p.algorithm)]
    efs = sorted(point.ef for point in ours)
    at = efs.index(min((point.ef for point in ours if point.recall >= RECALL), default=efs[-1]))
    return efs[max(0, at - 1) : at + 1]


def _sizes(data: DataSet, plan: Plan, cache: Path, progress: Progress) -> list[SizeRow]:
    """Measures the cost of one shard in this process, with every 16th vector, every 8th, and so on up to all.

    If a file is sorted, its beginning says little of the rest, so the vectors are taken from all of it.
    Counts do not vary and CPU times are not fitted, so each size is measured once.
    """
    once = replace(plan, threads=(1,), repeats=1)
    rows = []
    for halvings in range(SIZES - 1, -1, -1):
        part = data.every(1 << halvings) if halvings else data
        with open_systems(part, ["local"], once, cache, libraries=(), progress=progress) as systems:
            points = run(part, systems, once, lambda done, total: progress("measuring sizes", done, total))
        rows.append(SizeRow(part.vectors.count, cost_at(points)))
    return rows


def _infos(directory: Path) -> list[ImageInfo]:
    infos = []
    for path in shard_paths([directory]):
        with Shard.open(path, verify=False) as shard:
            infos.append(shard.info)
    return infos
