"""A bound that the user sets: a walk ends there, and the result says so, on every path that walks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest

import cotra_rdma
from cotra_rdma import InvalidInputError, Server, Shard
from cotra_rdma._build.collection import build_collection
from cotra_rdma._collection.manifest import coarse_of, shard_paths
from cotra_rdma.datasets import open_vectors
from cotra_rdma.protocol.tables import CentroidTable, CoarseRouteResponse

ROWS, QUERIES, DIM, N_SHARDS = 3000, 40, 16, 3
BOUND = 25


@pytest.fixture(scope="module")
def queries() -> np.ndarray:
    return np.random.default_rng(2).standard_normal((QUERIES, DIM)).astype(np.float32)


@pytest.fixture(scope="module", params=["independent", "global"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    directory = tmp_path_factory.mktemp(request.param)
    np.save(directory / "base.npy", np.random.default_rng(1).standard_normal((ROWS, DIM)).astype(np.float32))
    with open_vectors(directory / "base.npy") as vectors:
        build_collection(
            vectors,
            directory / "index",
            N_SHARDS,
            partition="kmeans",
            graph=request.param,
            n_lists=30,
            ef_construction=60,
            n_threads=1,
        )
    with ExitStack() as stack:
        servers = []
        for path in shard_paths([directory / "index"]):
            table = coarse_of(path)
            assert table is not None
            coarse = CoarseRouteResponse(0, "", CentroidTable.of(table[0], "float16"), table[1]).encode()
            shard = stack.enter_context(Shard.open(path))
            servers.append(stack.enter_context(cotra_rdma.serve(shard, transports=("shm", "rpc"), coarse=coarse)))
        if request.param == "global":
            at_home = stack.enter_context(cotra_rdma.connect([server.address for server in servers]))
            for server in servers:
                server.search_with(at_home)
        yield servers
        for server in servers:
            server.search_with(None)


@pytest.mark.parametrize(
    ("transport", "algorithm"),
    [
        ("shm", "cotra"),
        ("rpc", "cotra"),
        ("shm", "scatter-gather"),
        ("shm", "compass"),
        ("shm", "home"),
    ],
)
def test_every_path(served: list[Server], queries: np.ndarray, transport: str, algorithm: str) -> None:
    with cotra_rdma.connect([server.address for server in served], transport=transport) as cluster:
        if algorithm == "home" and not cluster.one_graph:
            with pytest.raises(InvalidInputError, match="one graph"):
                cluster.search(queries, 10, 64, algorithm=algorithm, max_expansions=BOUND)
            return
        n_walks = 1 if cluster.one_graph and algorithm != "scatter-gather" else N_SHARDS
        free = cluster.search(queries, 10, 64, algorithm=algorithm)
        assert not free.incomplete.any()
        assert free.coverage == 1
        ended = cluster.search(queries, 10, 64, algorithm=algorithm, max_expansions=BOUND)
        assert (ended.stats["expansions"] <= n_walks * BOUND).all()
        assert ended.incomplete.all()
        assert ended.coverage == 0
        assert (ended.ids >= 0).all()
        most = int(free.stats["expansions"].max()) + 1
        wide = cluster.search(queries, 10, 64, algorithm=algorithm, max_expansions=most)
        np.testing.assert_array_equal(wide.ids, free.ids)
        assert not wide.incomplete.any()


def test_auto_takes_a_way_that_walks(served: list[Server], queries: np.ndarray) -> None:
    with cotra_rdma.connect([server.address for server in served]) as cluster:
        found = cluster.search(queries, 10, 64, algorithm="auto", max_expansions=BOUND)
        assert "spire" not in found.algorithm
        assert (found.stats["expansions"] <= N_SHARDS * BOUND).all()


def test_some_queries_are_cut_short(served: list[Server], queries: np.ndarray) -> None:
    with cotra_rdma.connect([server.address for server in served]) as cluster:
        free = cluster.search(queries, 10, 64)
        bound = int(np.median(free.stats["expansions"])) // (1 if cluster.one_graph else N_SHARDS)
        some = cluster.search(queries, 10, 64, max_expansions=bound)
        assert 0 < some.incomplete.sum() < QUERIES or not cluster.one_graph
        assert some.coverage == pytest.approx(1 - some.incomplete.mean())
        np.testing.assert_array_equal(some.ids[~some.incomplete], free.ids[~some.incomplete])


def test_one_shard(served: list[Server], queries: np.ndarray) -> None:
    shard = served[0].shard
    for n_threads in (1, 2):
        _, _, stats = shard.search(queries, 10, 64, n_threads=n_threads, max_expansions=BOUND)
        assert (stats["expansions"] <= BOUND).all()
        assert stats["incomplete"].all()


def test_what_is_refused(served: list[Server], queries: np.ndarray) -> None:
    with cotra_rdma.connect([server.address for server in served]) as cluster:
        for wrong in (0, -1, 2**32, 1.5, "many"):
            with pytest.raises(InvalidInputError, match="max_expansions"):
                cluster.search(queries, max_expansions=wrong)
            with pytest.raises(InvalidInputError, match="max_expansions"):
                served[0].shard.search(queries, max_expansions=wrong)
        with pytest.raises(InvalidInputError, match="spire: max_expansions is a bound of walks"):
            cluster.search(queries, algorithm="spire", max_expansions=5)
        assert cluster.search(queries[:0], max_expansions=5).coverage == 1
