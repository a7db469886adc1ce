"""What was measured in a study, made into costs at one recall and into a workload."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cotra_rdma._bench.runner import Plan, Point
from cotra_rdma._bench.scaling.peers import HomeRow, Target
from cotra_rdma._bench.scaling.prediction import Fit, Workload, fit_log, throughput
from cotra_rdma._bench.scaling.scale import NO_FABRIC, RECALL, Scale
from cotra_rdma._bench.summary import at_recall, curves
from cotra_rdma._native.channel import FabricModel
from cotra_rdma._native.image import ImageInfo
from cotra_rdma.errors import InvalidInputError


@dataclass(frozen=True, slots=True)
class Cost:
    """What a query needs at the recall that is wanted, on average.

    Attributes:
        recall: the recall of the figures. It is higher than wanted if the least ef already finds more.
        reads: READs.
        rounds: rounds.
        bytes: bytes that were read.
        distances: distances that were computed.
        cpu_us: CPU time of the searching process.
        qps: as `Point`.
        p50_us: as `Point`.
    """

    recall: float
    reads: float
    rounds: float
    bytes: float
    distances: float
    cpu_us: float
    qps: float
    p50_us: float


@dataclass(frozen=True, slots=True)
class ShardsRow:
    """The cost at one number of shards, which are one graph or independent. One shard counts as one graph.

    Attributes:
        shards: the number of shards.
        one_graph: whether they are one graph.
        cost: the cost over the study's transport.
        recall_lost: the most recall that hnswlib's index of all vectors has more at equal ef.
        recall_lost_at_ef: the ef where that is.
        home_share: as `home_share`; None for independent shards.
        fabric: the cost over the modelled fabric; None for independent shards.
        bookkeeping: the cost over a fabric without limits; None for independent shards.
    """

    shards: int
    one_graph: bool
    cost: Cost
    recall_lost: float
    recall_lost_at_ef: int
    home_share: float | None
    fabric: Cost | None
    bookkeeping: Cost | None


@dataclass(frozen=True, slots=True)
class SizeRow:
    """The cost with some of the vectors in one shard."""

    vectors: int
    cost: Cost


@dataclass(frozen=True, slots=True)
class Check:
    """The prediction for one thread that reads everything over the modelled fabric, beside its measurement.

    Attributes:
        shards: the number of shards.
        qps_predicted: the prediction.
        qps: queries for each second of CPU time.
            That is what a thread that polls would do if it had the CPU to itself.
        latency_us_predicted: the prediction.
        latency_us: the median latency.
    """

    shards: int
    qps_predicted: float
    qps: float
    latency_us_predicted: float
    latency_us: float


def cost_at(curve: Sequence[Point]) -> Cost:
    """Reads a curve off at `RECALL`, linear between two points.

    If the least ef, which is k, finds more, the cost is that of the point.

    Raises:
        InvalidInputError: the sweep does not reach the recall.
    """
    names = ("reads", "rounds", "bytes", "distances")
    values = {name: [getattr(point, f"{name}_per_query") for point in curve] for name in names}
    values |= {"cpu_us": [point.cpu_us_per_query for point in curve], "qps": [point.qps for point in curve]}
    values |= {"p50_us": [point.p50_us for point in curve], "recall": [point.recall for point in curve]}
    found = {name: at_recall(curve, RECALL, column) for name, column in values.items()}
    if None in found.values():
        first = curve[0]
        if not (first.recall > RECALL and first.ef == first.k):
            raise InvalidInputError(
                f"{first.shards} shards of {first.n} vectors have recall {first.recall:.3f} at ef {first.ef} and "
                f"{curve[-1].recall:.3f} at {curve[-1].ef}. {RECALL} is not between them: give another --ef"
            )
        found = {name: column[0] for name, column in values.items()}
    return Cost(**{name: float(value) for name, value in found.items() if value is not None})


def shards_rows(points: Sequence[Point], scale: Scale, home_shares: Mapping[int, float]) -> list[ShardsRow]:
    """Makes a row for each number of shards as one graph, then for each number of independent shards."""
    known = {(key.shards, is_graph(key.shards, key.algorithm), key.transport): c for key, c in curves(points).items()}
    reference = {point.ef: point.recall for point in points if point.transport is None}
    rows = []
    for one_graph in (True, False):
        for n in scale.n_shards if one_graph else scale.n_shards[1:]:
            curve = known[n, one_graph, scale.transport]
            lost, at_ef = max((reference[point.ef] - point.recall, point.ef) for point in curve)
            fabric, bookkeeping = (
                cost_at(known[n, True, path]) if one_graph else None for path in (scale.fabric, NO_FABRIC)
            )
            share = home_shares[n] if one_graph else None
            rows.append(ShardsRow(n, one_graph, cost_at(curve), lost, at_ef, share, fabric, bookkeeping))
    return rows


def is_graph(shards: int, algorithm: str | None) -> bool:
    return shards == 1 or (algorithm or "").endswith("one graph")


def fit_sizes(sizes: Sequence[SizeRow]) -> tuple[Fit, Fit]:
    """Fits READs and rounds by the number of vectors.

    A size whose least ef finds more than was wanted has too high a cost.
    It is left out if three others remain.
    """
    fair = [row for row in sizes if row.cost.recall <= RECALL + 1e-9]
    used = fair if len(fair) >= 3 else sizes
    n = [row.vectors for row in used]
    return fit_log(n, [row.cost.reads for row in used]), fit_log(n, [row.cost.rounds for row in used])


def workload_of(
    points: Sequence[Point],
    scale: Scale,
    plan: Plan,
    rows: Sequence[ShardsRow],
    sizes: Sequence[SizeRow],
    infos: Sequence[ImageInfo],
    home: HomeRow,
) -> Workload:
    """Puts together what a query needs, from all measurements.

    Args:
        points: the points of all shards.
        scale: what was studied.
        plan: the settings.
        rows: the cost by shards.
        sizes: the cost by vectors.
        infos: the headers of the shards of the largest graph.
        home: what stays at home in that graph.
    """
    reads, rounds = fit_sizes(sizes)
    graphs = {row.shards: row for row in rows if row.one_graph}
    alone = {row.shards: row for row in rows if not row.one_graph}
    most = scale.n_shards[-1]
    single, widest = graphs[1], graphs[most]
    assert widest.bookkeeping is not None
    ours = [p for p in points if p.transport == scale.transport and is_graph(p.shards, p.algorithm)]
    expansion_us = cpu_per_read([[p for p in ours if p.shards == n] for n in scale.n_shards])
    count = sum(info.count for info in infos)
    local = home.local if scale.local_share is None else scale.local_share
    return Workload(
        expansions=reads,
        rounds=rounds,
        cpu_single_s=max(0.0, single.cost.cpu_us - expansion_us * single.cost.reads) * 1e-6,
        cpu_fixed_s=max(0.0, widest.cost.cpu_us - expansion_us * widest.cost.reads) * 1e-6,
        cpu_expansion_s=expansion_us * 1e-6,
        cpu_read_s=max(0.0, widest.bookkeeping.cpu_us - widest.cost.cpu_us) * 1e-6 / widest.cost.reads,
        record_bytes=infos[0].record_bytes,
        links=-(-infos[0].degree // 32) * 32,
        vector_bytes=sum(info.image_bytes - info.ivf_bytes for info in infos) / count,
        kept_bytes=sum(info.nav_bytes for info in infos) / count,
        halo_bytes=home.held_bytes,
        independent=alone[most].cost.reads / most / reads.at(count / most),
        remote_per_doubling=(1 - local) / float(np.log2(most)),
        dim=infos[0].dim,
        k=plan.k,
    )


def cpu_per_read(curves_: Sequence[Sequence[Point]]) -> float:
    """Computes the CPU time of one more READ in us.

    It is the slope that curves over ef have in common, each with a constant of its own.
    If a disturbed run gives no slope above 0, it is all CPU time over all READs.
    """
    above, below, cpu, reads = 0.0, 0.0, 0.0, 0.0
    for curve in curves_:
        x = np.array([point.reads_per_query for point in curve], np.float64)
        y = np.array([point.cpu_us_per_query for point in curve])
        above += float(((x - x.mean()) * (y - y.mean())).sum())
        below += float(np.square(x - x.mean()).sum())
        cpu, reads = cpu + float(y.sum()), reads + float(x.sum())
    return above / below if above > 0 and below > 0 else cpu / reads


def check(row: ShardsRow, workload: Workload, fabric: FabricModel) -> Check:
    """Predicts one thread that owns no shard and has a NIC for each shard, as over the modelled fabric."""
    assert row.fabric is not None
    cpu_s = workload.expanding_s(row.shards, row.cost.reads) + row.cost.reads * workload.cpu_read_s
    messages, link_bytes = row.cost.reads / row.shards, row.cost.bytes / row.shards
    qps, _ = throughput(1, cpu_s, fabric, messages, link_bytes)
    transfer_s = link_bytes / fabric.bytes_per_s if fabric.bytes_per_s else 0.0
    latency_s = cpu_s + row.cost.rounds * fabric.round_trip_s + transfer_s
    return Check(row.shards, qps, 1e6 / row.fabric.cpu_us, 1e6 * latency_s, row.fabric.p50_us)


def targets(rows: Sequence[ShardsRow]) -> list[Target]:
    """Makes the targets of one graph that counts decide, at the most shards."""
    graphs = {row.shards: row for row in rows if row.one_graph}
    most = max(graphs)
    ours, one = graphs[most], graphs[1]
    alone = next(row for row in rows if not row.one_graph and row.shards == most)
    return [
        Target.at_most(f"READs at {most} shards / at 1", 1.2, ours.cost.reads / one.cost.reads),
        Target.at_most(f"distances at {most} shards / independent", 0.35, ours.cost.distances / alone.cost.distances),
        Target.at_most(f"rounds at {most} shards / at 1", 1.1, ours.cost.rounds / one.cost.rounds),
        Target.at_most(f"recall lost to hnswlib at equal ef, {most} shards", 0.01, ours.recall_lost),
    ]
