"""The model of many machines: its limits, and that it moves the right way."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from cotra_rdma._bench.scaling.prediction import (
    MACHINES,
    ONE_GRAPH,
    READ_ANSWER_BYTES,
    READ_REQUEST_BYTES,
    ROUTED,
    SCATTER_GATHER,
    SYSTEMS,
    VECTORS,
    Machine,
    Workload,
    fit_log,
    predict,
    predict_all,
    variations,
)
from cotra_rdma._native.channel import FabricModel
from cotra_rdma.errors import InvalidInputError

FREE = FabricModel()
FABRIC = FabricModel(2e-6, 12.5e9, 10e6)
MACHINE = Machine(cores=16, memory_bytes=512e9)


@pytest.fixture
def workload() -> Workload:
    n = [1e4, 2e4, 4e4, 8e4]
    return Workload(
        expansions=fit_log(n, [20, 22.5, 24.5, 27]),
        rounds=fit_log(n, [5, 5.4, 5.6, 6]),
        cpu_single_s=6e-6,
        cpu_fixed_s=9e-6,
        cpu_expansion_s=4e-7,
        cpu_read_s=1e-7,
        record_bytes=960,
        links=32,
        vector_bytes=973,
        kept_bytes=13,
        halo_bytes=500,
        independent=1.1,
        remote_per_doubling=0.08,
        dim=128,
        k=10,
    )


def test_a_line_is_found_with_its_error() -> None:
    n = 2.0 ** np.arange(10, 15)
    exact = fit_log(n, [3 + 2 * x for x in range(10, 15)])
    assert (exact.at_one, exact.per_doubling, exact.error) == pytest.approx((3, 2, 0), abs=1e-9)
    assert exact.at(2**30) == pytest.approx(63)
    noise = np.array([0.1, -0.2, 0.0, 0.2, -0.1])
    rough = fit_log(n, 2 * np.arange(10, 15) + 3 + noise)
    slope, start = np.polyfit(np.arange(10, 15), 2 * np.arange(10, 15) + 3 + noise, 1)
    assert (rough.at_one, rough.per_doubling) == pytest.approx((start, slope))
    left = 2 * np.arange(10, 15) + 3 + noise - [rough.at(x) for x in n]
    assert rough.error == pytest.approx(np.sqrt(np.square(left).sum() / 3))
    assert rough.standard_error(2**12) < rough.standard_error(2**20) < rough.standard_error(2**33)
    assert rough.at(2**33, 2) - rough.at(2**33) == pytest.approx(2 * rough.standard_error(2**33))


@pytest.mark.parametrize("n", [[1000.0, 2000.0], [1000.0, 1000.0, 1000.0]])
def test_no_line_without_an_error(n: list[float]) -> None:
    with pytest.raises(InvalidInputError, match="needs at least 3 different numbers of vectors"):
        fit_log(n, [1.0] * len(n))


@pytest.mark.parametrize("system", SYSTEMS)
def test_one_machine_needs_no_fabric(workload: Workload, system: str) -> None:
    cpu_s = workload.cpu_single_s + workload.expansions.at(1e8) * workload.cpu_expansion_s
    for fabric in (FREE, FABRIC, FabricModel(1.0, 1.0, 1.0)):
        alone = predict(system, workload, MACHINE, fabric, 1, 1e8)
        assert (alone.qps, alone.limit, alone.reads) == (pytest.approx(16 / cpu_s), "CPU", 0)
        assert alone.latency_s == pytest.approx(cpu_s)
        assert alone.memory_bytes == pytest.approx(973e8)


def test_without_limits_of_the_fabric_cores_are_all(workload: Workload) -> None:
    for system, machines in itertools.product((ROUTED, ONE_GRAPH), (2, 16, 64)):
        found = predict(system, workload, MACHINE, FREE, machines, 1e9)
        cpu_s = 9e-6 + workload.expansions.at(1e9) * 4e-7 + found.reads * 1e-7
        assert (found.qps, found.limit) == (pytest.approx(machines * 16 / cpu_s), "CPU")
        assert found.latency_s == pytest.approx(cpu_s)


def test_a_nic_starts_and_serves(workload: Workload) -> None:
    reads = workload.expansions.at(1e9) * 15 / 16
    by_messages = predict(ONE_GRAPH, workload, Machine(10**6), FABRIC, 16, 1e9)
    assert by_messages.reads == pytest.approx(reads)
    assert (by_messages.qps, by_messages.limit) == (pytest.approx(16 * 10e6 / (2 * reads)), "messages")
    by_bytes = predict(ONE_GRAPH, workload, Machine(10**6), replace(FABRIC, reads_per_s=0), 16, 1e9)
    each = 960 + READ_REQUEST_BYTES + READ_ANSWER_BYTES
    assert (by_bytes.qps, by_bytes.limit) == (pytest.approx(16 * 12.5e9 / (reads * each)), "bandwidth")
    latency_s = predict(ONE_GRAPH, workload, MACHINE, FABRIC, 16, 1e9).latency_s
    cpu_s = 9e-6 + workload.expansions.at(1e9) * 4e-7 + reads * 1e-7
    assert latency_s == pytest.approx(
        cpu_s + workload.rounds.at(1e9) * 2e-6 + reads * (960 + READ_ANSWER_BYTES) / 12.5e9
    )


def test_routed_queries_read_less(workload: Workload) -> None:
    assert workload.remote_share(1, routed=True) == workload.remote_share(1, routed=False) == 0
    assert workload.remote_share(16, routed=True) == pytest.approx(0.32)
    assert workload.remote_share(16, routed=False) == pytest.approx(15 / 16)
    near = replace(workload, remote_per_doubling=0.9)
    assert near.remote_share(2, routed=True) == 0.5  # never worse than anywhere
    for machines in MACHINES[1:]:
        routed, anywhere = (predict(s, workload, MACHINE, FABRIC, machines, 1e9) for s in (ROUTED, ONE_GRAPH))
        assert routed.reads < anywhere.reads
        assert routed.qps > anywhere.qps
        assert routed.latency_s < anywhere.latency_s


def test_more_is_never_less(workload: Workload) -> None:
    for system in SYSTEMS:
        for machines in MACHINES:
            by_vectors = [predict(system, workload, MACHINE, FABRIC, machines, n) for n in VECTORS]
            assert all(a.qps >= b.qps and a.latency_s <= b.latency_s for a, b in itertools.pairwise(by_vectors))
            more = replace(FABRIC, reads_per_s=20e6, bytes_per_s=50e9)
            fast, slow = (predict(system, workload, MACHINE, fabric, machines, 1e9) for fabric in (more, FABRIC))
            assert fast.qps >= slow.qps
            cores = predict(system, workload, Machine(64), FABRIC, machines, 1e9)
            assert cores.qps >= slow.qps
            worse = predict(system, workload, MACHINE, FABRIC, machines, 1e9, errors=2)
            assert worse.qps <= slow.qps
    anywhere = [predict(ONE_GRAPH, workload, MACHINE, FABRIC, machines, 1e9).qps for machines in MACHINES[1:]]
    assert anywhere == sorted(anywhere)


def test_scatter_gather_repeats_the_walk(workload: Workload) -> None:
    found = predict(SCATTER_GATHER, workload, MACHINE, FREE, 16, 1e9)
    cpu_s = 6e-6 + 1.1 * workload.expansions.at(1e9 / 16) * 4e-7
    assert (found.qps, found.limit) == (pytest.approx(16 / cpu_s), "CPU")
    assert predict(SCATTER_GATHER, workload, MACHINE, FABRIC, 16, 1e9).latency_s == pytest.approx(cpu_s + 2e-6)
    slow = predict(SCATTER_GATHER, workload, Machine(10**6), FABRIC, 16, 1e9)
    assert (slow.qps, slow.limit) == (pytest.approx(16 * 10e6 / 60), "messages")


def test_memory_bounds_what_a_machine_holds(workload: Workload) -> None:
    assert not predict(ONE_GRAPH, workload, MACHINE, FABRIC, 1, 1e9).fits
    few = predict(ROUTED, workload, MACHINE, FABRIC, 4, 1e9)
    assert few.memory_bytes == pytest.approx(1e9 / 4 * (973 + 500) + 13e9)
    assert few.fits
    assert predict(ONE_GRAPH, workload, MACHINE, FABRIC, 4, 1e9).memory_bytes == pytest.approx(1e9 / 4 * 973 + 13e9)
    assert workload.number_bytes(2**31 - 1) == 0
    assert workload.number_bytes(2**31) == 128
    huge = predict(ROUTED, workload, MACHINE, FABRIC, 64, 1e10)  # node numbers of 64 bits: 4 bytes more a link
    assert huge.memory_bytes == pytest.approx(1e10 / 64 * (973 + 128 + 500) + 130e9)
    assert predict(SCATTER_GATHER, workload, MACHINE, FABRIC, 64, 1e10).memory_bytes == pytest.approx(1e10 / 64 * 973)


def test_all_predictions_and_variations(workload: Workload) -> None:
    assert len(predict_all(workload, MACHINE, FABRIC)) == len(SYSTEMS) * len(MACHINES) * len(VECTORS)
    found = {row.what: row for row in variations(workload, MACHINE, FABRIC, busiest=1.25)}
    base = found["as assumed"]
    one = predict(ONE_GRAPH, workload, MACHINE, FABRIC, 1, 1e9)
    assert base.speedup == pytest.approx(base.prediction.qps / one.qps)
    assert found["queries not routed home"].speedup < base.speedup
    assert found["expansions and rounds twice the fit"].prediction.qps < 0.6 * base.prediction.qps
    assert found["expansions and rounds 2 standard errors above the fit"].prediction.qps < base.prediction.qps
    skewed = found["the busiest home has 1.25 times the mean load"]
    assert skewed.prediction.qps == pytest.approx(base.prediction.qps / 1.25)
    assert skewed.speedup == pytest.approx(base.speedup / 1.25)
    assert found["READs that are served count nothing"].prediction.qps >= base.prediction.qps


@pytest.mark.parametrize(("system", "machines", "vectors"), [("other", 1, 10), (ONE_GRAPH, 0, 10), (ROUTED, 16, 8)])
def test_what_cannot_be_predicted(workload: Workload, system: str, machines: int, vectors: float) -> None:
    with pytest.raises(InvalidInputError, match="no prediction for"):
        predict(system, workload, MACHINE, FABRIC, machines, vectors)
