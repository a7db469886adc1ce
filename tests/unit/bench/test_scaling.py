"""What a scaling study makes of its measurements, without owners: rows at one recall, targets, fits, tables, the picture."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from cotra_rdma._bench.data import DataSet, nearest
from cotra_rdma._bench.runner import Plan, Point
from cotra_rdma._bench.scaling.costs import (
    Check,
    Cost,
    SizeRow,
    check,
    cost_at,
    cpu_per_read,
    fit_sizes,
    shards_rows,
    targets,
    workload_of,
)
from cotra_rdma._bench.scaling.peers import HomeRow, LossRow, peer_targets
from cotra_rdma._bench.scaling.plot import draw_study
from cotra_rdma._bench.scaling.prediction import PUBLISHED, Machine, predict_all, variations
from cotra_rdma._bench.scaling.scale import FABRIC, NO_FABRIC, Scale
from cotra_rdma._bench.scaling.study import Study, home_share, study
from cotra_rdma._bench.scaling.tables import scaling_tables
from cotra_rdma._bench.transports import parse_transport
from cotra_rdma._build.collection import build_collection
from cotra_rdma._collection.manifest import shard_paths
from cotra_rdma._shard.shard import Shard
from cotra_rdma.datasets import open_vectors
from cotra_rdma.errors import InvalidInputError

EFS = (10, 20, 40)
SCALE = Scale(n_shards=(1, 4))
HOMES = [HomeRow(0.0, 0.0, 0.0, 0.95, 0.6, 0.6), HomeRow(0.5, 0.4, 450.0, 0.95, 0.6, 0.8)]
LOSSES = [LossRow(at, 500, 0.25, 0.24, 1.01, 1.2, cpu) for at, cpu in enumerate((0.98, 1.1, 1.04, 1.0))]
FIXED_US, READ_US = {1: 6.0, 4: 9.0}, 0.5


def point(ef: int, recall: float, reads: float, **fields: object) -> Point:
    values: dict[str, object] = {field.name: None for field in dataclasses.fields(Point)}
    values |= {"system": "cotra", "transport": "shm", "dataset": "small", "shards": 1, "k": 10, "n": 1000}
    values |= {"n_threads": 1, "ef": ef, "recall": recall, "qps": 1e6 / reads, "qps_repeats": (1e6 / reads,)}
    values |= {"p50_us": 2 * reads, "cpu_us_per_query": reads, "reads_per_query": reads, "rounds_per_query": reads / 4}
    values |= {"bytes_per_query": 960 * reads, "distances_per_query": 33 * reads + 100}
    return Point(**values | fields)  # type: ignore[arg-type]


def measured() -> list[Point]:
    """hnswlib; one graph of 1 and of 4 shards, which reads 1.1 times as much; 4 independent shards, 4.4 times."""
    points = [
        point(ef, recall, 1, system="hnswlib", transport=None)
        for ef, recall in zip(EFS, (0.9, 0.94, 0.99), strict=True)
    ]
    for n, factor, name in ((1, 1.0, "cotra"), (4, 1.1, "cotra, one graph"), (4, 4.4, "cotra")):
        for path, more_us in (("shm", 0.0), (FABRIC, 0.3), (NO_FABRIC, 0.1)):
            for ef, recall in zip(EFS, (0.9, 0.945, 0.985), strict=True):
                reads = factor * ef
                cpu_us = FIXED_US[n] + reads * (READ_US + more_us)
                alike = {"shards": n, "transport": path, "algorithm": name, "cpu_us_per_query": cpu_us}
                points.append(point(ef, recall, reads, **alike))
    return points


@pytest.fixture
def found(tmp_path: Path) -> Study:
    points = measured()
    rows = shards_rows(points, SCALE, {1: 1.0, 4: 0.7})
    sizes = [SizeRow(n, dataclasses.replace(rows[0].cost, reads=reads, rounds=reads / 4)) for n, reads in _sizes()]
    rng = np.random.default_rng(3)
    with Shard.build(rng.normal(size=(300, 8)).astype(np.float32), M=4, n_threads=1) as shard:
        infos = [shard.info] * 4
    workload = workload_of(points, SCALE, Plan(), rows, sizes, infos, HOMES[-1])
    fabric = parse_transport(FABRIC)[1]
    assert fabric is not None
    checks = [check(row, workload, fabric) for row in rows if row.one_graph]
    wanted = [*targets(rows), *peer_targets(HOMES, LOSSES)]
    return Study(
        *("small $1", "shm", FABRIC, 0.95, rows, sizes, HOMES, 1.5, LOSSES, wanted, workload, checks, Machine()),
        predict_all(workload, Machine(), fabric),
        variations(workload, Machine(), fabric, busiest=1.5),
    )


def _sizes() -> list[tuple[int, float]]:
    return [(250, 18.0), (500, 20.0), (1000, 22.0), (2000, 24.0)]


def test_a_curve_is_read_off_at_the_recall() -> None:
    found = cost_at([point(20, 0.94, 20), point(40, 0.98, 40)])
    assert found == Cost(*(pytest.approx(x) for x in (0.95, 25, 6.25, 24000, 925, 25, 43750, 50)))


def test_a_curve_that_begins_above_the_recall_at_the_least_ef() -> None:
    assert cost_at([point(10, 0.96, 11), point(20, 0.98, 20)]).recall == 0.96
    for curve in ([point(20, 0.96, 20), point(40, 0.98, 40)], [point(10, 0.5, 11), point(20, 0.9, 20)]):
        with pytest.raises(InvalidInputError, match=r"0\.95 is not between them: give another --ef"):
            cost_at(curve)


def test_rows_have_each_curve_once(found: Study) -> None:
    assert [(row.shards, row.one_graph) for row in found.rows] == [(1, True), (4, True), (4, False)]
    one, ours, alone = found.rows
    assert ours.cost.reads == pytest.approx(1.1 * one.cost.reads)
    assert alone.cost.reads == pytest.approx(4.4 * one.cost.reads)
    assert (ours.home_share, alone.home_share, alone.fabric, alone.bookkeeping) == (0.7, None, None, None)
    assert ours.fabric is not None
    assert ours.fabric.cpu_us == pytest.approx(9 + 0.8 * ours.cost.reads)
    assert (ours.recall_lost, ours.recall_lost_at_ef) == (pytest.approx(0.005), 40)


def test_targets_are_met_or_not(found: Study) -> None:
    assert [(t.limit, t.met) for t in found.targets[:4]] == [(1.2, True), (0.35, True), (1.1, True), (0.01, True)]
    reads, distances, rounds, lost = (t.measured for t in found.targets[:4])
    assert (reads, rounds, lost) == pytest.approx((1.1, 1.1, 0.005))
    assert distances == pytest.approx((33 * 1.1 * 22.5 + 100) / (33 * 4.4 * 22.5 + 100), rel=1e-3)
    one, ours, alone = found.rows
    worse = dataclasses.replace(ours, cost=dataclasses.replace(ours.cost, reads=1.3 * one.cost.reads), recall_lost=0.02)
    assert [t.met for t in targets([one, worse, alone])] == [False, True, True, False]


def test_targets_of_peers(found: Study) -> None:
    assert [(t.bound, t.limit, t.measured, t.met) for t in found.targets[4:]] == [
        *[(">=", 0.7, 0.6, False), (">=", 0.7, 0.8, True)],
        *[("<=", 0.01, pytest.approx(-0.01), True), ("<=", 1.1, 1.1, True)],
    ]
    worse = dataclasses.replace(LOSSES[2], recall_fall=0.27, cpu_ratio=1.11)
    assert [t.met for t in peer_targets(HOMES, [*LOSSES[:2], worse])] == [False, True, False, False]


def test_the_workload_is_what_was_measured(found: Study) -> None:
    needs = found.workload
    assert needs.expansions.per_doubling == pytest.approx(2)
    assert needs.rounds.per_doubling == pytest.approx(0.5)
    costs = (needs.cpu_single_s, needs.cpu_fixed_s, needs.cpu_expansion_s, needs.cpu_read_s)
    assert costs == pytest.approx((6e-6, 9e-6, 5e-7, 1e-7))
    assert needs.remote_per_doubling == pytest.approx(0.1)
    assert needs.independent == pytest.approx(1.1 * found.rows[0].cost.reads / needs.expansions.at(300))
    assert (needs.links, needs.halo_bytes) == (32, 450)
    assert needs.vector_bytes > needs.record_bytes > needs.kept_bytes > 0


def test_the_wanted_local_share_takes_the_measured_one_s_place(found: Study) -> None:
    scale = dataclasses.replace(SCALE, local_share=0.5)
    with Shard.build(np.eye(64, dtype=np.float32), M=4, n_threads=1) as shard:
        needs = workload_of(measured(), scale, Plan(), found.rows, found.sizes, [shard.info], HOMES[-1])
    assert needs.remote_per_doubling == pytest.approx(0.25)


def test_the_model_is_checked_against_one_thread(found: Study) -> None:
    ours = found.rows[1]
    checked: Check = found.checks[1]
    cpu_us = 9 + ours.cost.reads * 0.6
    assert checked.qps_predicted == pytest.approx(1e6 / cpu_us)
    assert checked.qps == pytest.approx(1e6 / (9 + 0.8 * ours.cost.reads))
    transfer_us = 960 * ours.cost.reads / 4 / 12.5e3
    assert checked.latency_us_predicted == pytest.approx(cpu_us + 2 * ours.cost.rounds + transfer_us)
    assert checked.latency_us == pytest.approx(2 * ours.cost.reads)


def test_the_cpu_time_of_a_read_is_the_slope_of_all_curves() -> None:
    curves = [[point(ef, 0.9, ef, cpu_us_per_query=fixed + 0.4 * ef) for ef in EFS] for fixed in (5.0, 50.0)]
    assert cpu_per_read(curves) == pytest.approx(0.4)
    falling = [[point(ef, 0.9, ef, cpu_us_per_query=100.0 - ef) for ef in EFS]]
    assert cpu_per_read(falling) == pytest.approx((300 - 70) / 70)


def test_sizes_above_the_recall_are_not_fitted_where_others_are_enough(found: Study) -> None:
    cost = found.sizes[0].cost
    above = SizeRow(125, dataclasses.replace(cost, recall=0.99, reads=900.0))
    assert fit_sizes([above, *found.sizes])[0].per_doubling == pytest.approx(2)
    assert fit_sizes([above, *found.sizes[:2]])[0].per_doubling < 0


def test_what_cannot_be_studied(tmp_path: Path) -> None:
    data = small_set(tmp_path, 1000)
    for scale, reason in (
        (Scale(transport="rpc"), "needs shm or verbs"),
        (Scale(fabric="model:rtt=0:gbit=100"), "a model with a round trip"),
        (Scale(n_shards=(1,)), "several numbers of shards"),
        (Scale(n_shards=(2, 4)), "with 1"),
        (Scale(local_share=0.01), r"the local share of 16 shards is 1 / 16 to 1, not 0\.01"),
    ):
        with pytest.raises(InvalidInputError, match=reason):
            study(data, scale, Plan(), tmp_path / "none")
    with pytest.raises(InvalidInputError, match="999 vectors are too few"):
        study(data.first(999), Scale(), Plan(), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def small_set(directory: Path, n: int) -> DataSet:
    """Vectors in two clusters far from each other."""
    rng = np.random.default_rng(7)
    base, queries = (rng.normal(size=(rows, 8)).astype(np.float32) for rows in (n, 20))
    base[: n // 2] += 100
    queries[:10] += 100
    for name, array in (("base", base), ("queries", queries), ("gt", nearest("l2", queries, base, 10))):
        np.save(directory / f"small_{name}.npy", array)
    return DataSet.open(directory / "small")


def test_queries_stay_at_home_where_shards_lie_apart(tmp_path: Path) -> None:
    data = small_set(tmp_path, 1000)
    shares = {}
    for partition in ("kmeans", "range"):
        interleaved = np.load(tmp_path / "small_base.npy").reshape(2, 500, 8).swapaxes(0, 1).reshape(1000, 8)
        np.save(tmp_path / "mixed.npy", interleaved)
        knobs = {"M": 4, "ef_construction": 40, "n_threads": 1, "partition": partition}
        with open_vectors(tmp_path / "mixed.npy") as file:
            graph = "global" if partition == "kmeans" else "independent"
            build_collection(file, tmp_path / partition, 2, metric="l2", graph=graph, **knobs)  # type: ignore[arg-type]
        shares[partition] = home_share(tmp_path / partition, data.queries, Plan(), 20)
    assert shares["kmeans"] > 0.95
    assert 0.5 <= shares["range"] < 0.7  # both shards hold half of everything, and each is walked
    assert len(shard_paths([tmp_path / "kmeans"])) == 2


def test_tables_and_picture(found: Study, tmp_path: Path) -> None:
    tables = {table.title: table for table in scaling_tables(found)}
    assert all(len(row) == len(table.columns) for table in tables.values() for row in table.rows)
    assert [row[-1] for row in tables["Targets"].rows] == [*["yes"] * 4, "no", *["yes"] * 3]
    assert [row[1] for row in tables["Targets"].rows][3:6] == ["<= 0.01", ">= 0.7", ">= 0.7"]
    assert len([title for title in tables if title.startswith("Predicted: ")]) == 3
    published = tables["Published by others, on their machines and data"]
    assert [row[0] for row in published.rows] == [line.system for line in PUBLISHED]
    draw_study(found, tmp_path / "a.svg")
    draw_study(found, tmp_path / "b.svg")
    text = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert text == (tmp_path / "b.svg").read_text(encoding="utf-8")
    assert "CoTra / one machine, published</text>" in text
    assert "small $1, recall@10 0.95" in text.replace(r"\$", "$")
    draw_study(found, tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
