"""Filters and deleted rows on every path by which a shard is searched: in place, read, asked, pushed, at home, by lists."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import hnswlib
import numpy as np
import pytest

import cotra_rdma
from cotra_rdma import Cluster, Shard
from cotra_rdma._build.collection import build_collection
from cotra_rdma._collection.manifest import coarse_of, shard_paths
from cotra_rdma.datasets import open_vectors
from cotra_rdma.protocol.tables import CentroidTable, CoarseRouteResponse
from quality.families import Family, around
from quality.filtered import Rows, ask_among, check_answers, only
from quality.measure import Ids, Truth, build_graph

ROWS, APART, QUERIES, DIM = 4000, 200, 60, 24
N_SHARDS, N_LISTS = 3, 60
K, EF = 10, 16
MARGIN = 0.01 + 1e-9
COMPASS_MARGIN = MARGIN + 0.01  # its target is 0.99 of what asking every shard finds


@pytest.fixture(scope="module")
def family() -> Family:
    """Clusters, and apart from all others 200 rows, from whose midst half of the queries come."""
    random = np.random.default_rng(19)
    base, queries = around(random, 2 * random.standard_normal((12, DIM)), 1.0, ROWS, QUERIES)
    base[:APART] = 8 + random.standard_normal((APART, DIM))
    queries[::2] = 8 + random.standard_normal((QUERIES // 2, DIM))
    return Family("paths", "l2", base.astype(np.float32), queries.astype(np.float32))


@pytest.fixture(scope="module")
def index(family: Family) -> hnswlib.Index:
    return build_graph(family)


FILTERS: dict[str, Callable[[], Rows]] = {
    "all but the neighbourhood": lambda: np.arange(ROWS) >= APART,
    "1 %": lambda: np.random.default_rng(20).permutation(ROWS) < ROWS // 100,
    "12 rows": lambda: np.random.default_rng(21).permutation(ROWS) < 12,
    "4 rows": lambda: np.random.default_rng(22).permutation(ROWS) < 4,
    "the neighbourhood alone": lambda: np.arange(ROWS) < APART,
}


def check_path(family: Family, index: hnswlib.Index, allowed: Rows, ids: Ids, margin: float) -> None:
    """All places are filled for which there is a row, and hnswlib finds no more under the same filter."""
    check_answers(ids, allowed)
    truth = Truth.of(family, K, allowed)
    with only(index, allowed):
        theirs = truth.recall(ask_among(index, family.queries, int(allowed.sum()), K, EF), K)
    ours = truth.recall(ids, K)
    assert ours >= theirs - margin


# ---- filters ----


class Paths:
    """Clusters over the shards of one collection, made when a test first asks for them."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self._stack = stack
        self._files = shard_paths([directory])
        self.shards = [stack.enter_context(Shard.open(file)) for file in self._files]
        self.ids = [shard.labels() for shard in self.shards]
        self._servers: list[cotra_rdma.Server] = []
        self._clusters: dict[str, Cluster] = {}

    def cluster(self, transport: str) -> Cluster:
        """Over "own" memory, "shm" or "rpc"."""
        if transport not in self._clusters:
            cluster = cotra_rdma.connect(self.shards) if transport == "own" else self._served(transport)
            self._clusters[transport] = self._stack.enter_context(cluster)
        return self._clusters[transport]

    def _served(self, transport: str) -> Cluster:
        return cotra_rdma.connect([server.address for server in self.servers()], transport=transport)

    def servers(self) -> list[cotra_rdma.Server]:
        if not self._servers:
            for shard, file in zip(self.shards, self._files, strict=True):
                table = coarse_of(file)
                assert table is not None
                coarse = CoarseRouteResponse(0, "", CentroidTable.of(table[0], "float16"), table[1]).encode()
                served = cotra_rdma.serve(shard, transports=("shm", "rpc"), coarse=coarse)
                self._servers.append(self._stack.enter_context(served))
        return self._servers

    def search(self, family: Family, transport: str, algorithm: str, allowed: Rows) -> cotra_rdma.SearchResult:
        return self.cluster(transport).search(
            family.queries, K, EF, algorithm=algorithm, filters=[allowed[ids] for ids in self.ids]
        )


def collection(family: Family, directory: Path, graph: str, n_lists: int) -> Path:
    np.save(directory / "base.npy", family.base)
    with open_vectors(directory / "base.npy") as vectors:
        build_collection(
            vectors,
            directory / "index",
            N_SHARDS,
            partition="kmeans",
            graph=graph,
            n_lists=n_lists,
            ef_construction=100,
            n_threads=1,
        )
    return directory / "index"


@pytest.fixture(scope="module")
def independent(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Paths]:
    with ExitStack() as stack:
        yield Paths(collection(family, tmp_path_factory.mktemp("independent"), "independent", N_LISTS), stack)


@pytest.fixture(scope="module")
def linked(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Paths]:
    with ExitStack() as stack:
        paths = Paths(collection(family, tmp_path_factory.mktemp("linked"), "global", N_LISTS), stack)
        at_home = stack.enter_context(cotra_rdma.connect([server.address for server in paths.servers()]))
        for server in paths.servers():
            server.search_with(at_home)
        yield paths
        for server in paths.servers():
            server.search_with(None)


@pytest.mark.parametrize("kind", FILTERS)
def test_one_image(family: Family, index: hnswlib.Index, kind: str) -> None:
    allowed = FILTERS[kind]()
    with Shard.from_hnswlib(index, n_threads=1) as shard:
        check_path(family, index, allowed, shard.search(family.queries, K, EF, rows=allowed)[0], MARGIN)


@pytest.mark.parametrize("kind", FILTERS)
@pytest.mark.parametrize(
    ("transport", "algorithm", "path"),
    [
        ("own", "cotra", "own"),
        ("shm", "cotra", "shm"),
        ("rpc", "cotra", "rpc"),
        ("shm", "scatter-gather", "rpc"),
        ("shm", "spire", "shm"),
        ("shm", "compass", "shm"),
        ("rpc", "compass+scatter-gather", "rpc"),
        ("shm", "compass+spire", "shm"),
        ("shm", "auto", "shm"),
    ],
)
def test_shards_of_their_own(
    family: Family, index: hnswlib.Index, independent: Paths, transport: str, algorithm: str, path: str, kind: str
) -> None:
    allowed = FILTERS[kind]()
    found = independent.search(family, transport, algorithm, allowed)
    assert (found.coverage, found.failures, set(found.transports)) == (1.0, {}, {path})
    check_path(family, index, allowed, found.ids, COMPASS_MARGIN if algorithm.startswith("compass") else MARGIN)


@pytest.mark.parametrize("kind", FILTERS)
@pytest.mark.parametrize(
    ("transport", "algorithm", "path"),
    [
        ("own", "cotra", "own"),
        ("shm", "cotra", "shm"),
        ("rpc", "cotra", "push"),
        ("shm", "home", "home"),
        ("rpc", "home", "home"),
        ("shm", "scatter-gather", "rpc"),
        ("shm", "compass", "shm"),
        ("shm", "spire", "shm"),
    ],
)
def test_one_graph(
    family: Family, index: hnswlib.Index, linked: Paths, transport: str, algorithm: str, path: str, kind: str
) -> None:
    allowed = FILTERS[kind]()
    found = linked.search(family, transport, algorithm, allowed)
    assert (found.coverage, found.failures, set(found.transports) - {"peers"}) == (1.0, {}, {path})
    check_path(family, index, allowed, found.ids, COMPASS_MARGIN if algorithm.startswith("compass") else MARGIN)


# ---- deleted rows ----


@pytest.fixture(scope="module")
def left() -> Rows:
    """The tenth that is not deleted: none of those that are apart."""
    key = np.random.default_rng(23).permutation(ROWS)
    key[:APART] = ROWS
    return key < ROWS // 10


@pytest.fixture(scope="module")
def decimated(family: Family, left: Rows) -> Iterator[list[Shard]]:
    """Three hnswlib indexes of a third each, of whose rows nine of ten are deleted."""
    with ExitStack() as stack:
        shards = []
        for part in np.array_split(np.arange(ROWS), N_SHARDS):
            index = hnswlib.Index("l2", DIM)
            index.init_index(len(part), M=16, ef_construction=100, random_seed=100)
            index.add_items(family.base[part], part, num_threads=1)
            for row in part[~left[part]].tolist():
                index.mark_deleted(row)
            shards.append(stack.enter_context(Shard.from_hnswlib(index, n_threads=1, n_lists=N_LISTS // N_SHARDS)))
        yield shards


@pytest.fixture(scope="module")
def decimated_addresses(decimated: list[Shard]) -> Iterator[list[str]]:
    with ExitStack() as stack:
        yield [stack.enter_context(cotra_rdma.serve(shard, transports=("shm", "rpc"))).address for shard in decimated]


@pytest.mark.parametrize("of_those", [1.0, 0.05])
@pytest.mark.parametrize(
    ("transport", "algorithm"),
    [("own", "cotra"), ("shm", "cotra"), ("rpc", "cotra"), ("shm", "scatter-gather"), ("shm", "spire")],
)
def test_deleted_rows(
    family: Family,
    index: hnswlib.Index,
    left: Rows,
    decimated: list[Shard],
    decimated_addresses: list[str],
    transport: str,
    algorithm: str,
    of_those: float,
) -> None:
    """Alone, and with a filter that one of twenty of the others passes."""
    passes = np.random.default_rng(24).random(ROWS) < of_those
    filters = None if of_those == 1 else [passes[shard.labels()] for shard in decimated]
    with ExitStack() as stack:
        if transport == "own":
            cluster = stack.enter_context(cotra_rdma.connect(decimated))
        else:
            cluster = stack.enter_context(cotra_rdma.connect(decimated_addresses, transport=transport))
        found = cluster.search(family.queries, K, EF, algorithm=algorithm, filters=filters)
    assert (found.coverage, found.failures) == (1.0, {})
    check_path(family, index, left & passes, found.ids, MARGIN)
