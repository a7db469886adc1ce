"""One graph over all shards, connected to: what is read together, what is asked, and shards that fail."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import cotra_rdma
from cotra_rdma import CompletionError, InvalidInputError, PartialResultError
from cotra_rdma._bench.data import DataSet
from cotra_rdma._bench.opening import Split, open_systems
from cotra_rdma._bench.runner import Plan, run
from cotra_rdma._build.collection import build_collection
from cotra_rdma._collection.manifest import shard_paths
from cotra_rdma._owner.child_process import OwnerProcess
from cotra_rdma.datasets import open_vectors
from cotra_rdma.seam.interface import ShardRef
from helpers.faults import FaultyFabric

Floats = npt.NDArray[np.float32]
N, N_SHARDS = 3000, 3


@pytest.fixture(scope="module")
def index(words: Floats, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3,000 words in three shards of one graph."""
    directory = tmp_path_factory.mktemp("one")
    np.save(directory / "base.npy", words[:N])
    with open_vectors(directory / "base.npy") as file:
        build_collection(
            file, directory / "index", N_SHARDS, metric="cosine", M=8, ef_construction=60, graph="global", n_threads=1
        )
    return directory / "index"


@pytest.fixture(scope="module")
def truth(words: Floats, queries: Floats) -> npt.NDArray[np.int64]:
    unit = words[:N] / np.linalg.norm(words[:N], axis=1, keepdims=True)
    return np.argsort(-queries @ unit.T, axis=1)[:, :10]


def recall(ids: npt.NDArray[np.int64], truth: npt.NDArray[np.int64]) -> float:
    return float(np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(ids, truth, strict=True)]))


def test_nothing_else_is_to_be_said(index: Path, queries: Floats, truth: npt.NDArray[np.int64]) -> None:
    with OwnerProcess([index], transports=("shm", "rpc")) as owner:
        with cotra_rdma.connect(owner.addresses, transport="shm") as cluster:
            assert cluster.one_graph
            found = cluster.search(queries, k=10, ef=48)
            threads = cluster.search(queries, k=10, ef=48, n_threads=3)
            auto = cluster.search(queries, k=10, ef=48, algorithm="auto")
            asked = cluster.search(queries, k=10, ef=48, algorithm="scatter-gather")
            routed = cluster.search(queries, k=10, ef=48, algorithm="compass")
        with cotra_rdma.connect(owner.addresses[::-1], transport="shm") as cluster:
            turned = cluster.search(queries, k=10, ef=48)
    assert recall(found.ids, truth) > 0.95
    for other in (threads, auto, turned):
        np.testing.assert_array_equal(other.ids, found.ids)
        np.testing.assert_array_equal(other.stats["reads"], found.stats["reads"])
    np.testing.assert_array_equal(turned.shards, N_SHARDS - 1 - found.shards)
    assert (auto.algorithm, asked.transports) == ("cotra", ("rpc",) * N_SHARDS)
    assert recall(asked.ids, truth) > 0.95
    assert found.stats["reads"].mean() < 0.6 * asked.stats["expansions"].mean()
    assert recall(routed.ids, truth) > 0.9


def test_nodes_of_shards_that_cannot_be_read_are_pushed(
    index: Path, queries: Floats, truth: npt.NDArray[np.int64], caplog: pytest.LogCaptureFixture
) -> None:
    files = shard_paths([index])
    with (
        OwnerProcess(files[:2], transports=("shm", "rpc")) as near,
        OwnerProcess(files[2:], transports=("rpc",)) as far,
    ):
        addresses = [*near.addresses, *far.addresses]
        with caplog.at_level("INFO"), cotra_rdma.connect(addresses) as cluster:
            assert cluster.one_graph
            assert cluster.transports == ("shm", "shm", "rpc")
            found = cluster.search(queries, k=10, ef=48)
        with cotra_rdma.connect(addresses, transport="rpc") as cluster:
            assert cluster.one_graph
            everything = cluster.search(queries, k=10, ef=48)
    assert f"shard 2 ({addresses[2]}) is reached over rpc" in caplog.text
    assert found.transports == ("shm", "shm", "push")
    assert everything.transports == ("push",) * N_SHARDS
    assert recall(found.ids, truth) > 0.95
    assert (found.stats["pushed"].sum(), found.stats["reads"].sum()) > (0, 0)
    np.testing.assert_array_equal(everything.ids, found.ids)  # how a record is come by changes nothing
    np.testing.assert_array_equal(everything.distances, found.distances)
    np.testing.assert_array_equal(everything.stats["expansions"], found.stats["expansions"])
    assert (everything.stats["reads"] == 0).all()


def test_a_shard_that_fails_is_named_or_left_out(index: Path, queries: Floats) -> None:
    with (
        OwnerProcess([index], transports=("shm", "rpc")) as owner,
        cotra_rdma.connect(owner.addresses, transport="shm") as cluster,
    ):
        second = cluster._connections[1]
        second._fabric = FaultyFabric(fail_after_reads=20, fail_status=-10, fail_wc_status=12)
        second._first = None  # the channel that connect made, without the fabric
        found = cluster.search(queries, k=10, ef=50)
        assert (found.missing, found.coverage, found.transports) == ((1,), 2 / 3, ("shm", "lost", "shm"))
        with pytest.raises(PartialResultError, match="1 of 3 shards failed: shard 1") as caught:
            cluster.search(queries, k=10, ef=50, allow_partial=False)
        assert caught.value.shard == 1
        assert set(cluster.lost) == {1}
        cluster.revive()  # its owner is well
        assert cluster.lost == {}
        whole = cluster.search(queries, k=10, ef=50)
    assert isinstance(found.failures[1], CompletionError)
    assert set(found.shards[:, -1]) >= {0, 2}  # and what was read of the lost one before
    assert (whole.missing, whole.transports) == ((), ("shm",) * N_SHARDS)


def test_the_seams_algorithm_walks_it_too(index: Path, queries: Floats) -> None:
    files = shard_paths([index])
    with (
        OwnerProcess(files[:2], transports=("shm", "rpc")) as near,
        OwnerProcess(files[2:], transports=("rpc",)) as far,
        cotra_rdma.connect([*near.addresses, *far.addresses]) as cluster,
        cotra_rdma.CoTraRdma(cluster) as algorithm,
    ):
        wanted = cluster.search(queries, k=10, ef=48)
        found = algorithm.search(queries, k=10, ef=48)
        np.testing.assert_array_equal(found.ids, wanted.ids)
        assert (found.transports, found.coverage) == (("shm", "shm", "push"), 1.0)
        far.close()
        with pytest.raises(PartialResultError, match="shard 2 of node 0 failed") as caught:
            algorithm.search(queries, k=10, ef=48)
        partial = algorithm.search(queries, k=10, ef=48, allow_partial=True)
    for result in (partial, caught.value.result):
        assert result.failed == (ShardRef(0, 2),)
        assert result.transports == ("shm", "shm", "lost")


def test_bench_measures_it(words: Floats, queries: Floats, tmp_path: Path) -> None:
    unit = words[:600] / np.linalg.norm(words[:600], axis=1, keepdims=True)
    near = np.argsort(-queries[:20] @ unit.T, axis=1)[:, :10]
    for name, array in (("base", words[:600]), ("queries", queries[:20]), ("gt", near)):
        np.save(tmp_path / f"small_{name}.npy", array)
    data = DataSet.open(str(tmp_path / "small"), metric="cosine")
    plan = Plan(k=10, efs=[16], repeats=1, M=4, ef_construction=30)
    split = Split(["cotra"], (1, 2), graph="global")
    with open_systems(data, ["shm"], plan, tmp_path / "cache", libraries=(), split=split) as systems:
        points = run(data, systems, plan, lambda done, total: None)
    assert [(point.shards, point.algorithm) for point in points] == [(1, "cotra"), (2, "cotra, one graph")]
    split = Split(["cotra", "scatter-gather"], (2,), graph="global")
    paths = ["shm", "rpc", "shm+rpc"]
    with open_systems(data, paths, plan, tmp_path / "cache", libraries=(), split=split) as systems:
        points = run(data, systems, plan)
    read, asked, pushed, both = points
    assert [(point.transport, point.algorithm) for point in points] == [
        ("shm", "cotra, one graph"),
        ("rpc", "scatter-gather, one graph"),
        ("rpc", "cotra, one graph, pushed"),
        ("shm+rpc", "cotra, one graph, pushed"),
    ]
    assert read.recall == pushed.recall == both.recall
    assert read.distances_per_query == pushed.distances_per_query == both.distances_per_query
    assert pushed.reads_per_query == 0
    assert both.reads_per_query is not None
    assert read.reads_per_query is not None
    assert 0 < both.reads_per_query < read.reads_per_query
    with (
        pytest.raises(InvalidInputError, match=r"shm\+rpc needs several shards"),
        open_systems(data, paths, plan, tmp_path / "none", libraries=()),
    ):
        raise AssertionError
    assert asked.owner_cpu_us_per_query
    assert not (tmp_path / "none").exists()
