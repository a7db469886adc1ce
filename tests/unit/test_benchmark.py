"""What `cotra bench` computes, without measuring anything real: recall, curves, plans, checks of a data set."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from cotra_rdma.benchmark import (
    Comparison,
    Cost,
    DataSet,
    Ids,
    Plan,
    Point,
    Queries,
    Rows,
    compare,
    distances,
    recall,
    run,
)
from cotra_rdma.benchmark_plot import check_plot, draw
from cotra_rdma.errors import InvalidInputError


class Oracle:
    """A system that finds the first `ef` - 8 of the true answers."""

    def __init__(self, truth: Ids, name: str, transport: str | None) -> None:
        self._truth = truth
        self.name = name
        self.transport = transport
        self.beams = transport is not None
        self.algorithm: str | None = None
        self.n_shards = 1
        self._asked = 0

    def search(self, queries: Queries, k: int, ef: int, beam: int, rows: Rows | None = None) -> tuple[Ids, Cost | None]:
        self.rows = rows
        self._asked += len(queries)
        found = self._truth[: len(queries), :k].copy()
        found[:, max(ef - 8, 0) :] = -1
        return found, Cost(ef, ef / beam, 1024 * ef) if self.beams else None

    def owner_cpu_s(self) -> float | None:
        return 1e-6 * self._asked if self.beams else None

    def close(self) -> None:
        pass


def write_set(directory: Path, metric: str, n: int = 300, dim: int = 8) -> Path:
    rng = np.random.default_rng(3)
    base, queries = rng.normal(size=(n, dim)).astype(np.float32), rng.normal(size=(30, dim)).astype(np.float32)
    truth = np.stack([np.argsort(distances(metric, query, base))[:20] for query in queries])
    for name, array in (("base", base), ("queries", queries), ("gt", truth)):
        np.save(directory / f"small_{name}.npy", array)
    return directory / "small"


def test_recall_counts_the_answers_among_the_true_k() -> None:
    truth = np.arange(40).reshape(4, 10)
    assert recall(truth[:, :5], truth) == 1.0
    assert recall(truth[:, 5:], truth) == 0.0
    assert recall(np.where(np.arange(5) < 3, truth[:, :5], -1), truth) == pytest.approx(0.6)


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_the_metric_is_read_off_the_ground_truth(tmp_path: Path, metric: str) -> None:
    stem = write_set(tmp_path, metric)
    data = DataSet.open(stem)
    assert (data.name, data.metric, data.vectors.shape) == ("small", metric, (300, 8))
    for other in {"l2", "ip", "cosine"} - {metric}:
        with pytest.raises(InvalidInputError, match=f"is not sorted by {other}, but by {metric}"):
            DataSet.open(stem, metric=other)


def test_parts_that_do_not_belong_together(tmp_path: Path) -> None:
    stem = write_set(tmp_path, "l2")
    np.save(tmp_path / "wide.npy", np.zeros((30, 9), np.float32))
    np.save(tmp_path / "far.npy", np.full((30, 20), 300))
    with pytest.raises(InvalidInputError, match="do not belong together"):
        DataSet.open(stem, queries=tmp_path / "wide.npy")
    with pytest.raises(InvalidInputError, match="names row 300 of 300"):
        DataSet.open(stem, ground_truth=tmp_path / "far.npy")
    with pytest.raises(InvalidInputError, match="needs a stem"):
        DataSet.open(base=tmp_path / "wide.npy")


def test_a_run_has_a_row_for_every_configuration(tmp_path: Path) -> None:
    data = DataSet.open(write_set(tmp_path, "l2"))
    systems = [Oracle(data.ground_truth, "hnswlib", None), Oracle(data.ground_truth, "cotra", "shm")]
    done = []
    plan = Plan(efs=(16, 32), beams=(1, 4), repeats=3)
    points = run(data, systems, plan, lambda so_far, total: done.append((so_far, total)))
    assert [(p.system, p.ef, p.beam) for p in points] == [
        *[("hnswlib", 16, None), ("cotra", 16, 1), ("cotra", 16, 4)],
        *[("hnswlib", 32, None), ("cotra", 32, 1), ("cotra", 32, 4)],
    ]
    assert done == [(i + 1, 24) for i in range(24)]
    theirs, ours = points[0], points[2]
    assert theirs.recall == pytest.approx(0.8)
    assert theirs.reads_per_query is theirs.owner_cpu_us_per_query is None
    assert (ours.reads_per_query, ours.rounds_per_query, ours.bytes_per_query) == (16, 4, 16384)
    assert ours.owner_cpu_us_per_query == pytest.approx(1.0)
    assert all(p.qps_min <= p.qps <= p.qps_max and 0 < p.p50_us <= p.p99_us for p in points)


def test_a_filtered_run_has_the_ground_truth_of_what_is_let_through(tmp_path: Path) -> None:
    stem = write_set(tmp_path, "cosine")
    data = DataSet.open(stem)
    system = Oracle(data.ground_truth, "cotra", "shm")
    (point,) = run(data, [system], Plan(efs=(18,), repeats=1), share=0.2)
    assert system.rows is not None
    assert 30 < system.rows.sum() < 90
    assert point.filter == 0.2
    base, queries = np.load(f"{stem}_base.npy"), np.load(f"{stem}_queries.npy")
    (through,) = system.rows.nonzero()
    truth = [through[np.argsort(distances("cosine", query, base[through]))[:10]] for query in queries]
    assert point.recall == pytest.approx(recall(data.ground_truth[:, :10], np.stack(truth)))
    with pytest.raises(InvalidInputError, match="lets"):
        run(data, [system], Plan(efs=(18,), repeats=1), share=0.0001)


def test_a_plot_is_written(tmp_path: Path) -> None:
    data = DataSet.open(write_set(tmp_path, "l2"))
    systems = [Oracle(data.ground_truth, "hnswlib", None), Oracle(data.ground_truth, "cotra", "shm")]
    points = run(data, systems, Plan(efs=(16, 32), repeats=2))
    check_plot(tmp_path / "curves.svg")
    draw(points, tmp_path / "curves.svg")
    text = (tmp_path / "curves.svg").read_text(encoding="utf-8")
    assert text.startswith("<?xml")
    with pytest.raises(InvalidInputError, match=r"ends in .png"):
        check_plot(tmp_path / "curves.gif")


def test_curves_are_compared_at_equal_recall() -> None:
    def point(system: str, transport: str | None, ef: int, recall: float, qps: float, reads: float | None) -> Point:
        fields = {field.name: 0 for field in dataclasses.fields(Point)}
        fields |= {"system": system, "transport": transport, "ef": ef, "recall": recall, "qps": qps}
        fields |= {"beam": 4 if transport else None, "reads_per_query": reads, "algorithm": None, "filter": None}
        return Point(**fields)

    points = [
        point("cotra", "shm", 64, 0.98, 6000, 60),
        point("cotra", "shm", 32, 0.94, 10000, 40),
        point("hnswlib", None, 32, 0.90, 5000, None),
        point("hnswlib", None, 64, 1.00, 3000, None),
    ]
    ours, theirs, unreached, _ = compare(points, (0.95, 0.99))
    assert isinstance(ours, Comparison)
    assert (ours.qps, ours.reads_per_query) == pytest.approx((9000, 45))
    assert theirs.qps == pytest.approx(4000)
    assert ours.qps_ratio == pytest.approx(2.25)
    assert theirs.qps_ratio == 1.0
    assert unreached.qps is unreached.qps_ratio is None
