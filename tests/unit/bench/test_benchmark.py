"""What `cotra bench` computes, without measuring anything real: recall, curves, plans, checks of a data set."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest

from cotra_rdma._bench.data import DataSet, Ids, Queries, Rows, distances, nearest
from cotra_rdma._bench.plot import check_plot, draw
from cotra_rdma._bench.runner import Answer, Plan, Point, Setting, System, run
from cotra_rdma._bench.summary import Comparison, Ratio, compare, label, why_not
from cotra_rdma._bench.transports import is_zero_rtt, parse_transport
from cotra_rdma._core.stats import STATS_DTYPE
from cotra_rdma.datasets import recall
from cotra_rdma.errors import InvalidInputError


class Oracle:
    """A system that finds the first `ef` - 8 of the true answers."""

    def __init__(self, truth: Ids, name: str, transport: str | None, twin: Oracle | None = None) -> None:
        self._truth = truth
        self.name = name
        self.transport = transport
        self.beams = self.inflights = transport is not None
        self.algorithm: str | None = None
        self.n_shards = 1
        self.cache_bytes: int | None = 0 if self.beams else None
        self.zero_rtt: System | None = twin
        self.rtt_s = 5e-6 if twin else 0.0
        self._asked = 0

    def search(self, queries: Queries, setting: Setting, rows: Rows | None = None) -> Answer:
        self.rows = rows
        self._asked += len(queries)
        ids = self._truth[: len(queries), : setting.k].copy()
        ids[:, max(setting.ef - 8, 0) :] = -1
        stats = np.zeros(len(queries), STATS_DTYPE)
        rounds = setting.ef // setting.beam
        stats["reads"], stats["rounds"], stats["read_bytes"] = setting.ef, rounds, 1024 * setting.ef
        stats["expansions"], stats["cache_hits"] = setting.ef, 7
        stats["latency_ns"] = 1000 + 1e9 * self.rtt_s * rounds
        return Answer(ids, stats if self.beams else None, in_process=self.beams)

    def forget(self) -> None:
        pass

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
    with pytest.raises(InvalidInputError, match="names row 300, but there are 300"):
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
    assert done == [(i + 1, 18) for i in range(18)]
    theirs, ours = points[0], points[2]
    assert theirs.recall == pytest.approx(0.8)
    assert (
        theirs.reads_per_query is theirs.owner_cpu_us_per_query is theirs.overhead_us is theirs.batch_overhead is None
    )
    assert (ours.reads_per_query, ours.rounds_per_query, ours.bytes_per_query) == (16, 4, 16384)
    assert (theirs.distances_per_query, ours.distances_per_query) == (None, 16 * (1 + 32) + 7)
    assert ours.cpu_us_per_query >= 0
    assert ours.batch_overhead is not None
    assert ours.owner_cpu_us_per_query == pytest.approx(1.0)
    assert all(p.qps_min <= p.qps <= p.qps_max and 0 < p.p50_us <= p.p99_us for p in points)
    assert all(len(p.qps_repeats) == 3 and p.qps == sorted(p.qps_repeats)[1] for p in points)
    assert theirs.p50_us == theirs.call_us
    assert (ours.p50_us, ours.p99_us) == (1.0, 1.0)
    assert ours.overhead_us == pytest.approx(ours.call_us - 1.0)


def test_a_stream_of_queries_by_zipfs_law(tmp_path: Path) -> None:
    data = DataSet.open(write_set(tmp_path, "l2"))
    stream = data.drawn(1.0, 3000)
    rows = [int(np.flatnonzero((data.queries == query).all(axis=1))[0]) for query in stream.queries]
    assert (stream.ground_truth == data.ground_truth[rows]).all()
    often = np.sort(np.bincount(rows, minlength=30))[::-1] / 3000
    assert often[:3] == pytest.approx(1 / np.arange(1, 4) / (1 / np.arange(1, 31)).sum(), rel=0.15)
    assert (data.drawn(1.0, 3000).queries == stream.queries).all()
    alike = [int(np.flatnonzero((data.queries == query).all(axis=1))[0]) for query in data.drawn(0, 3000).queries]
    assert np.bincount(alike, minlength=30).max() < 2 * 100


def test_settings_are_swept_where_a_system_has_them(tmp_path: Path) -> None:
    data = DataSet.open(write_set(tmp_path, "l2"))
    systems = [Oracle(data.ground_truth, "hnswlib", None), Oracle(data.ground_truth, "cotra", "shm")]
    points = run(data, systems, Plan(efs=(16,), threads=(1, 2), inflights=(0, 8), repeats=1))
    assert [(p.system, p.n_threads, p.inflight) for p in points] == [
        *[("hnswlib", 1, None), ("cotra", 1, 0), ("cotra", 1, 8)],
        *[("hnswlib", 2, None), ("cotra", 2, 0), ("cotra", 2, 8)],
    ]
    assert label(points[-1]) == "cotra shm, beam 8, inflight 8, 2 threads"


def test_a_modelled_latency_is_measured_against_rounds_and_compute(tmp_path: Path) -> None:
    data = DataSet.open(write_set(tmp_path, "l2"))
    twin = Oracle(data.ground_truth, "cotra", "model:rtt=0")
    far = Oracle(data.ground_truth, "cotra", "model:rtt=5us", twin)
    near, away = run(data, [twin, far], Plan(efs=(16,), beams=(4,), repeats=2))
    assert near.latency_model_ratio is None
    assert away.p50_us == pytest.approx(21)
    assert away.latency_model_ratio == pytest.approx(1.0)


def test_the_first_rows_have_a_ground_truth_of_their_own(tmp_path: Path) -> None:
    for metric in ("l2", "ip", "cosine"):
        stem = write_set(tmp_path, metric)
        whole = DataSet.open(stem)
        data = whole.first(100)
        assert data.vectors.shape == (100, 8)
        assert len(np.concatenate(list(data.vectors.chunks(64)))) == 100
        base = np.load(f"{stem}_base.npy")[:100]
        truth = np.stack([np.argsort(distances(metric, query, base))[:20] for query in whole.queries])
        assert (data.ground_truth == truth).all()
        assert data.digest() != whole.digest()
        assert whole.first(15).ground_truth.shape == (30, 15)
        third = whole.every(3)
        assert third.vectors.shape == (100, 8)
        assert (third.vectors.read() == np.load(f"{stem}_base.npy")[::3]).all()
        assert (third.vectors.read(98) == np.load(f"{stem}_base.npy")[294::3]).all()
        assert (
            third.ground_truth[:, 0] == [distances(metric, q, third.vectors.read()).argmin() for q in whole.queries]
        ).all()
    with pytest.raises(InvalidInputError, match="has 300 vectors"):
        whole.first(301)


def test_equal_distances_are_in_the_order_of_rows() -> None:
    base = np.ones((9, 4), np.float32)
    assert nearest("l2", base[:1], base, 9).tolist() == [list(range(9))]


@pytest.mark.parametrize("text", ["shm:rtt=1us", "model", "model:rtt=5", "model:rtt=1.2.3us", "model:gbit=1us", "tcp"])
def test_a_transport_that_is_none(text: str) -> None:
    with pytest.raises(InvalidInputError, match=r"is not verbs, shm, rpc, shm\+rpc, local"):
        parse_transport(text)


def test_modelled_fabrics() -> None:
    kind, fabric = parse_transport("model:rtt=2.5us:gbit=100:mreads=10")
    assert kind == "model"
    assert fabric is not None
    assert (fabric.round_trip_s, fabric.bytes_per_s, fabric.reads_per_s) == pytest.approx((2.5e-6, 12.5e9, 1e7))
    assert is_zero_rtt("model:rtt=0")
    assert is_zero_rtt("model:rtt=0us:gbit=100")
    assert not is_zero_rtt("model:rtt=1ms")
    assert not is_zero_rtt("shm")
    assert not is_zero_rtt(None)


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
    with pytest.raises(InvalidInputError, match=r"must end in .png"):
        check_plot(tmp_path / "curves.gif")
    with pytest.raises(InvalidInputError, match="there is no directory"):
        check_plot(tmp_path / "nowhere" / "curves.png")


def test_a_plot_without_matplotlib_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name, suffixes in (("curves.png", (".png",)), ("report.html", (".html",))):
        with pytest.raises(InvalidInputError, match=f"{name} needs matplotlib: pip install matplotlib"):
            check_plot(tmp_path / name, suffixes)


def point(system: str, transport: str | None, ef: int, recall: float, *qps: float, n_threads: int = 1) -> Point:
    fields = {field.name: None for field in dataclasses.fields(Point)}
    fields |= {"system": system, "transport": transport, "ef": ef, "recall": recall, "n_threads": n_threads}
    fields |= {"beam": 4 if transport else None, "inflight": 0 if transport else None, "dataset": "<a & b>", "k": 10}
    fields |= {"n": 9, "dim": 2, "metric": "l2", "M": 16, "ef_construction": 200, "repeats": len(qps)}
    fields |= {"p50_us": 1.0, "p99_us": 2.0, "call_us": 1.5, "reads_per_query": ef if transport else None}
    return Point(
        **fields | {"qps": float(np.median(qps)), "qps_min": min(qps), "qps_max": max(qps), "qps_repeats": qps}
    )


def test_curves_are_compared_at_equal_recall() -> None:
    points = [
        point("cotra", "shm", 64, 0.98, 6000, 12000, 6000),
        point("cotra", "shm", 32, 0.94, 10000, 20000, 10000),
        point("hnswlib", None, 32, 0.90, 5000, 5000, 10000),
        point("hnswlib", None, 64, 1.00, 3000, 3000, 6000),
        point("faiss", None, 32, 0.90, 5000, 5000, 5000),
    ]
    ours, theirs, _, unreached, _, _ = compare(points, (0.95, 0.99))
    assert isinstance(ours, Comparison)
    assert (ours.qps, ours.reads_per_query) == pytest.approx((9000, 40))
    assert theirs.qps == pytest.approx(4000)
    assert list(ours.qps_ratios) == ["hnswlib"]
    assert dataclasses.astuple(ours.qps_ratios["hnswlib"]) == pytest.approx((2.25, 1.125, 4.5))
    assert theirs.qps_ratios == unreached.qps_ratios == {}
    assert unreached.qps is None
    assert why_not(points, unreached) == "below: larger --ef"


def test_threads_and_fabrics_are_compared_with_one_thread_and_no_round_trip() -> None:
    points = [
        point("cotra", transport, ef, recall, qps * n_threads * share, n_threads=n_threads)
        for transport, share in (("model:rtt=5us", 0.5), ("model:rtt=0", 1.0), ("shm", 2.0))
        for n_threads in (1, 2)
        for ef, recall, qps in ((32, 0.9, 1000), (64, 1.0, 500))
    ]
    found = {(line.transport, line.n_threads): line for line in compare(points, (0.95,))}
    assert found["shm", 1].threads_ratio is found["shm", 1].zero_rtt_ratio is None
    assert found["shm", 2].threads_ratio == Ratio(2, 2, 2)
    assert found["model:rtt=5us", 2].zero_rtt_ratio == Ratio(0.5, 0.5, 0.5)
    assert found["model:rtt=0", 2].zero_rtt_ratio is None
