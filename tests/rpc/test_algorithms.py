"""Every algorithm over one collection: recall, paths, filters, masks, explanations, stopped owners; the exchange of SPIRE."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import cotra_rdma
from cotra_rdma import (
    Cluster,
    Compass,
    GrpcDispatch,
    InvalidInputError,
    PartialResultError,
    ScatterGather,
    Server,
    Shard,
    Spire,
    TransportError,
)
from cotra_rdma._build.collection import build_collection
from cotra_rdma._collection.manifest import Collection, coarse_of, shard_paths
from cotra_rdma._native.channel import Channel
from cotra_rdma._native.list_engine import IvfTable
from cotra_rdma._native.view import View
from cotra_rdma._owner.child_process import OwnerProcess
from cotra_rdma._reader.cost_model import Link
from cotra_rdma._reader.planner import ALGORITHMS
from cotra_rdma.datasets import open_vectors
from cotra_rdma.protocol.envelope import VShardMessageType
from cotra_rdma.protocol.tables import BuildExchangeRequest, CentroidTable, CoarseRouteResponse
from cotra_rdma.seam.interface import BuildExchangeFailed, ShardRef, ShardSubset, exchange_with_peers
from helpers.begun import stop_process
from helpers.image import image_bytes
from helpers.lists import distances_to_all, recall_of

Floats = npt.NDArray[np.float32]
Wide = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
HERE = ("shm", "rpc")
N, N_SHARDS, N_LISTS = 4000, 4, 40
K, EF = 10, 64
INDEPENDENT = tuple(name for name in ALGORITHMS if name != "home")  # that one is for one graph
NAMED = INDEPENDENT[1:]
FLOORS = {"cotra": 0.98, "scatter-gather": 0.98, "spire": 0.98} | dict.fromkeys(
    ("auto", "compass", "compass+scatter-gather", "compass+spire"), 0.96
)
SEARCH = VShardMessageType.VECTOR_SCATTER_REQUEST
EXCHANGE = VShardMessageType.VECTOR_BUILD_EXCHANGE_REQUEST


@pytest.fixture(scope="module")
def rows(words: Floats) -> Floats:
    return words[:N]


@pytest.fixture(scope="module")
def asked(rows: Floats) -> Floats:
    """Vectors near those in the collection, but none of them: float32[100, 100]."""
    generator = np.random.default_rng(11)
    near = rows[generator.choice(N, 100, replace=False)]
    return (near + 0.1 * generator.standard_normal(near.shape)).astype(np.float32)


@pytest.fixture(scope="module")
def exact(rows: Floats, asked: Floats) -> Wide:
    """The distance of each query to each row."""
    return distances_to_all(rows, asked, "cosine")


@pytest.fixture(scope="module")
def directory(rows: Floats, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A collection of 4 shards, with neighbours together and 40 inverted lists."""
    path = tmp_path_factory.mktemp("algorithms")
    np.save(path / "rows.npy", rows)
    with open_vectors(path / "rows.npy") as vectors:
        build_collection(
            vectors,
            path / "index",
            N_SHARDS,
            metric="cosine",
            ef_construction=60,
            n_threads=1,
            partition="kmeans",
            n_lists=N_LISTS,
        )
    return path / "index"


@pytest.fixture(scope="module")
def opened(directory: Path) -> Iterator[list[Shard]]:
    with ExitStack() as stack:
        yield [stack.enter_context(Shard.open(path)) for path in shard_paths([directory])]


@pytest.fixture(scope="module")
def members(opened: list[Shard]) -> list[npt.NDArray[np.int64]]:
    """The ids of each shard, by local row."""
    return [shard.labels() for shard in opened]


def coarse(path: Path) -> bytes:
    """What `cotra serve` tells of a shard of a collection."""
    found = coarse_of(path)
    assert found is not None
    return CoarseRouteResponse(0, "", CentroidTable.of(found[0], "float16"), found[1]).encode()


@pytest.fixture(scope="module")
def servers(directory: Path, opened: list[Shard]) -> Iterator[list[Server]]:
    with ExitStack() as stack:
        yield [
            stack.enter_context(cotra_rdma.serve(shard, transports=HERE, coarse=coarse(path)))
            for shard, path in zip(opened, shard_paths([directory]), strict=True)
        ]


@pytest.fixture(scope="module")
def addresses(servers: list[Server]) -> list[str]:
    return [server.address for server in servers]


@pytest.fixture(scope="module")
def cluster(addresses: list[str]) -> Iterator[Cluster]:
    with cotra_rdma.connect(addresses) as cluster:
        assert cluster.transports == ("shm",) * N_SHARDS
        yield cluster


def searches_of(servers: Sequence[Server]) -> list[int]:
    """How many searches each owner was asked for so far."""
    return [server.request_counts.get(SEARCH, 0) for server in servers]


def recall_among(ids: npt.NDArray[np.int64], exact: Wide, allowed: Mask) -> float:
    """Against brute force over the rows that each query may have: bool[n_queries, n]."""
    return recall_of(ids, np.where(allowed, exact, 9.0))


# ---- what they find ----


@pytest.mark.parametrize("algorithm", INDEPENDENT)
@pytest.mark.parametrize("n_threads", [1, 3])
def test_recall(cluster: Cluster, asked: Floats, exact: Wide, algorithm: str, n_threads: int) -> None:
    result = cluster.search(asked, K, EF, algorithm=algorithm, n_threads=n_threads)
    assert recall_of(result.ids, exact) >= FLOORS[algorithm]
    assert (result.coverage, result.failures) == (1.0, {})
    found = np.take_along_axis(exact, result.ids, axis=1)
    np.testing.assert_allclose(result.distances, found, atol=1e-5)
    assert (np.diff(result.distances, axis=1) >= 0).all()
    assert all(len(set(row)) == K for row in result.ids.tolist())
    assert result.transports == (("rpc" if algorithm.endswith("gather") else "shm"),) * N_SHARDS


@pytest.mark.parametrize("before", ["", "compass+"])
def test_reading_and_asking_give_the_same_bits(cluster: Cluster, asked: Floats, before: str) -> None:
    read = cluster.search(asked, K, EF, algorithm="compass" if before else "cotra")
    owners = cluster.search(asked, K, EF, algorithm=f"{before}scatter-gather")
    np.testing.assert_array_equal(read.ids, owners.ids)
    np.testing.assert_array_equal(read.shards, owners.shards)
    np.testing.assert_array_equal(read.distances.view(np.uint32), owners.distances.view(np.uint32))
    np.testing.assert_array_equal(read.asked, owners.asked)
    assert (read.stats["reads"] > 0).all()
    assert (owners.stats["reads"] == 0).all()


def test_answers_come_from_the_shards_that_hold_them(
    cluster: Cluster, asked: Floats, members: list[npt.NDArray[np.int64]]
) -> None:
    holder = np.empty(N, np.int32)
    for number, ids in enumerate(members):
        holder[ids] = number
    for algorithm in INDEPENDENT:
        result = cluster.search(asked, K, EF, algorithm=algorithm)
        np.testing.assert_array_equal(result.shards, holder[result.ids])


def test_compass_asks_fewer_and_loses_little(cluster: Cluster, asked: Floats, exact: Wide) -> None:
    every = cluster.search(asked, K, EF, algorithm="cotra")
    some = cluster.search(asked, K, EF, algorithm="compass")
    few = cluster.search(asked, K, EF, algorithm="compass", target_recall=0.8)
    all_of_them = cluster.search(asked, K, EF, algorithm="compass", target_recall=1.0)
    assert (every.asked == N_SHARDS).all()
    assert (some.asked >= 1).all()
    assert some.asked.mean() < 3.5
    assert few.asked.mean() < some.asked.mean()
    assert recall_of(some.ids, exact) >= recall_of(every.ids, exact) - 0.02
    assert some.stats["reads"].sum() < every.stats["reads"].sum()
    np.testing.assert_array_equal(all_of_them.ids, every.ids)
    for result in (some, few):
        outside = np.array([[shard in set(row) for shard in range(N_SHARDS)] for row in result.shards.tolist()])
        assert (outside.sum(axis=1) <= result.asked).all()


def test_shards_may_be_given_in_any_order(addresses: list[str], cluster: Cluster, asked: Floats) -> None:
    order = [2, 0, 3, 1]
    with cotra_rdma.connect([addresses[number] for number in order]) as other:
        for algorithm in ("compass", "compass+spire"):
            one, two = (where.search(asked, K, EF, algorithm=algorithm) for where in (cluster, other))
            np.testing.assert_array_equal(one.ids, two.ids)
            np.testing.assert_array_equal(one.asked, two.asked)
            np.testing.assert_array_equal(one.shards, np.array(order)[two.shards])


@pytest.mark.parametrize("algorithm", ["spire", "compass+spire"])
def test_spire_takes_two_rounds(cluster: Cluster, asked: Floats, exact: Wide, algorithm: str) -> None:
    recalls, sizes = [], []
    for lists in (K, 20, N_LISTS):
        result = cluster.search(asked, K, lists, algorithm=algorithm)
        assert (result.stats["rounds"] == 2).all()
        assert (result.stats["reads"] >= K).all()
        recalls.append(recall_of(result.ids, exact))
        sizes.append(result.stats["read_bytes"].mean())
    assert recalls[0] <= recalls[1] <= recalls[2]
    assert sizes == sorted(sizes)


def test_a_small_and_an_empty_batch(cluster: Cluster, asked: Floats) -> None:
    for algorithm in INDEPENDENT:
        alone = cluster.search(asked[0], K, EF, algorithm=algorithm, n_threads=8)
        assert alone.ids.shape == (1, K)
        none = cluster.search(np.empty((0, asked.shape[1]), np.float32), K, EF, algorithm=algorithm)
        assert (none.ids.shape, none.asked.shape) == ((0, K), (0,))


# ---- scopes ----


@pytest.mark.parametrize("algorithm", INDEPENDENT)
def test_filters(
    cluster: Cluster, asked: Floats, exact: Wide, members: list[npt.NDArray[np.int64]], algorithm: str
) -> None:
    allowed = np.random.default_rng(3).random(N) < 0.5
    result = cluster.search(asked, K, EF, algorithm=algorithm, filters=[allowed[ids] for ids in members])
    assert allowed[result.ids].all()
    # With half of the rows, a query's neighbours are further apart than those that Compass was calibrated with.
    floor = 0.94 if algorithm.startswith("compass") else 0.98
    assert recall_among(result.ids, exact, np.tile(allowed, (len(asked), 1))) >= floor


@pytest.mark.parametrize("algorithm", INDEPENDENT)
def test_a_filter_that_closes_shards_leaves_the_search_to_the_others(
    cluster: Cluster, asked: Floats, exact: Wide, members: list[npt.NDArray[np.int64]], algorithm: str
) -> None:
    for closed in range(N_SHARDS):
        filters = [np.zeros(len(ids), bool) if shard == closed else None for shard, ids in enumerate(members)]
        result = cluster.search(asked, K, EF, algorithm=algorithm, filters=filters)
        allowed = np.ones((len(asked), N), bool)
        allowed[:, members[closed]] = False
        assert (result.ids >= 0).all()
        assert (result.shards != closed).all()
        assert recall_among(result.ids, exact, allowed) >= 0.96
        if algorithm.startswith("compass"):
            assert (result.asked < N_SHARDS).all()


@pytest.mark.parametrize("algorithm", INDEPENDENT)
@pytest.mark.parametrize("n_threads", [1, 3])
def test_each_query_asks_its_own_shards(
    cluster: Cluster,
    asked: Floats,
    exact: Wide,
    members: list[npt.NDArray[np.int64]],
    algorithm: str,
    n_threads: int,
) -> None:
    mask = np.random.default_rng(5).random((len(asked), N_SHARDS)) < 0.5
    mask[0] = False
    allowed = np.empty((len(asked), N), bool)
    for shard, ids in enumerate(members):
        allowed[:, ids] = mask[:, shard : shard + 1]
    result = cluster.search(asked, K, EF, algorithm=algorithm, shards=mask, n_threads=n_threads)
    some = mask.any(axis=1)
    assert (result.ids[~some] == -1).all()
    assert (result.shards[~some] == -1).all()
    assert (result.ids[some] >= 0).all()
    assert np.take_along_axis(mask[some], result.shards[some], axis=1).all()
    assert recall_among(result.ids[some], exact[some], allowed[some]) >= 0.96
    assert (result.asked <= mask.sum(axis=1)).all()
    assert (result.asked[some] >= 1).all()
    if not algorithm.startswith(("compass", "auto")):
        np.testing.assert_array_equal(result.asked, mask.sum(axis=1))


# ---- what was done, and why ----


def base_of(algorithm: str) -> str:
    """The way that a prediction is of: Compass chooses the shards of each of them."""
    return algorithm.removeprefix("compass").removeprefix("+") or "cotra"


def test_auto_explains_itself(cluster: Cluster, asked: Floats) -> None:
    for owner_cpu in (False, True):
        result = cluster.search(asked, K, EF, algorithm="auto", owner_cpu=owner_cpu)
        first, *others = result.predictions
        assert sorted(way.algorithm for way in result.predictions) == ["cotra", "scatter-gather", "spire"]
        assert result.algorithm in NAMED
        assert base_of(result.algorithm) == first.algorithm
        assert first.allowed
        assert all(first.seconds <= other.seconds for other in others if other.allowed)
        assert all(0 < way.seconds < np.inf for way in result.predictions)
        assert first.shards == pytest.approx(result.asked.mean())
        assert all(bool(way.why) != way.allowed for way in result.predictions)


@contextmanager
def with_links(addresses: list[str], *links: Link) -> Iterator[Cluster]:
    """A cluster that believes its links to be like these."""
    with cotra_rdma.connect(addresses) as cluster:
        for peer, link in zip(cluster._connections, links, strict=True):
            peer.link = link
        yield cluster


SLOW_TO_READ = Link(rtt_s=10.0, reads_per_s=1.0, bytes_per_s=1.0, rpc_s=1e-9)
QUICK_TO_READ = Link(rtt_s=1e-7, reads_per_s=1e9, bytes_per_s=1e12, rpc_s=1e-3)


def test_auto_leaves_shards_out_only_where_that_was_measured(
    addresses: list[str], asked: Floats, members: list[npt.NDArray[np.int64]]
) -> None:
    some = [np.arange(len(ids)) % 10 == 0 for ids in members]
    with with_links(addresses, *[SLOW_TO_READ] * N_SHARDS) as cluster:
        left_out = cluster.search(asked, K, EF, algorithm="auto", owner_cpu=True)
        assert left_out.algorithm == "compass+scatter-gather"
        assert left_out.asked.mean() < 3.5
        for result in (
            cluster.search(asked, K, EF, algorithm="auto", owner_cpu=True, filters=some),
            cluster.search(asked, K + 1, EF, algorithm="auto", owner_cpu=True),
            cluster.search(asked, K, EF, algorithm="auto", owner_cpu=True, target_recall=1.0),
        ):
            assert result.algorithm == "scatter-gather"
            assert (result.asked == N_SHARDS).all()


def test_auto_spares_owners_that_can_be_read(addresses: list[str], servers: list[Server], asked: Floats) -> None:
    """However cheap the cost model has it."""
    with with_links(addresses, *[SLOW_TO_READ] * N_SHARDS) as cluster:
        before = searches_of(servers)
        result = cluster.search(asked, K, EF, algorithm="auto")
        assert result.transports == ("shm",) * N_SHARDS
        assert searches_of(servers) == before
        (gathered,) = (way for way in result.predictions if way.algorithm == "scatter-gather")
        assert (gathered.allowed, gathered.why) == (False, "the owners' CPU is not to be used")
        assert gathered.seconds < result.predictions[0].seconds
        allowed = cluster.search(asked, K, EF, algorithm="auto", owner_cpu=True)
        assert allowed.transports == ("rpc",) * N_SHARDS
        assert searches_of(servers) == [count + 1 for count in before]


def test_auto_asks_the_owner_of_the_one_slow_link(addresses: list[str], servers: list[Server], asked: Floats) -> None:
    quick = QUICK_TO_READ
    with with_links(addresses, quick, quick, replace(SLOW_TO_READ, rpc_s=1e-3), quick) as cluster:
        before = searches_of(servers)
        result = cluster.search(
            asked, K, EF, algorithm="auto", owner_cpu=True, target_recall=1.0, n_threads=len(addresses)
        )
        read = cluster.search(asked, K, EF, algorithm="cotra")
    assert (result.algorithm, result.transports) == ("cotra", ("shm", "shm", "rpc", "shm"))
    assert searches_of(servers) == [count + (number == 2) for number, count in enumerate(before)]
    np.testing.assert_array_equal(result.ids, read.ids)
    assert result.predictions[0].owner_cpu_s > 0


def test_without_a_word_the_graphs_are_read(cluster: Cluster, asked: Floats) -> None:
    plain, named = cluster.search(asked, K, EF), cluster.search(asked, K, EF, algorithm="cotra")
    assert (plain.algorithm, plain.predictions) == ("cotra", ())
    np.testing.assert_array_equal(plain.ids, named.ids)


@pytest.mark.parametrize("algorithm", NAMED)
def test_a_named_algorithm_can_be_explained(cluster: Cluster, asked: Floats, algorithm: str) -> None:
    plain = cluster.search(asked, K, EF, algorithm=algorithm)
    told = cluster.search(asked, K, EF, algorithm=algorithm, explain=True)
    assert plain.algorithm == told.algorithm == algorithm
    assert plain.predictions == ()
    assert told.predictions[0].algorithm == base_of(algorithm)
    assert len({way.algorithm for way in told.predictions}) == len(told.predictions) == 3
    np.testing.assert_array_equal(plain.ids, told.ids)


def test_what_was_measured_becomes_what_is_expected(addresses: list[str], asked: Floats) -> None:
    with cotra_rdma.connect(addresses) as cluster:
        for algorithm in ("cotra", "spire"):
            seen = cluster.search(asked, K, EF, algorithm=algorithm)
            expected = cluster.search(asked, K, EF, algorithm=algorithm, explain=True).predictions[0]
            assert expected.reads == pytest.approx(seen.stats["reads"].mean())
            assert expected.rounds == pytest.approx(seen.stats["rounds"].mean())
            assert expected.bytes == pytest.approx(seen.stats["read_bytes"].mean())


# ---- what cannot be had ----


def test_an_algorithm_that_is_unknown(cluster: Cluster, asked: Floats) -> None:
    with pytest.raises(InvalidInputError, match=r"algorithm must be one of auto, cotra, .* not 'hnsw'"):
        cluster.search(asked, algorithm="hnsw")


@pytest.mark.parametrize("target", [0, -1, 1.01])
def test_a_target_out_of_range(cluster: Cluster, asked: Floats, target: float) -> None:
    with pytest.raises(InvalidInputError, match=r"target_recall must be in \(0, 1\]"):
        cluster.search(asked, algorithm="compass", target_recall=target)


@pytest.mark.parametrize("explain", [False, True])
def test_shards_of_no_collection_and_without_lists(shards: list[Path], asked: Floats, explain: bool) -> None:
    with ExitStack() as stack:
        plain = [stack.enter_context(Shard.open(path)) for path in shards]
        served = [stack.enter_context(cotra_rdma.serve(shard, transports=HERE)).address for shard in plain]
        cluster = stack.enter_context(cotra_rdma.connect(served))
        with pytest.raises(
            InvalidInputError, match=r"spire: shard 0 \(.*\) has no inverted lists \(cotra build --ivf\)"
        ):
            cluster.search(asked, algorithm="spire", explain=explain)
        for algorithm in ("compass", "compass+spire", "compass+scatter-gather"):
            with pytest.raises(InvalidInputError, match=r"compass: .* not the whole of a collection .*cotra build"):
                cluster.search(asked, algorithm=algorithm, explain=explain)
        result = cluster.search(asked, algorithm="auto", explain=explain)
        assert result.algorithm == "cotra"
        assert [way.algorithm for way in result.predictions] == ["cotra", "scatter-gather"]


def test_a_part_of_a_collection_is_not_the_whole(addresses: list[str], asked: Floats) -> None:
    for some in (addresses[:3], [*addresses[:3], addresses[0]]):
        with cotra_rdma.connect(some) as cluster, pytest.raises(InvalidInputError, match="compass: these shards"):
            cluster.search(asked, algorithm="compass")


def test_lists_cannot_be_asked_for_over_rpc(addresses: list[str], cluster: Cluster, asked: Floats) -> None:
    with cotra_rdma.connect(addresses, transport="rpc") as far:
        with pytest.raises(InvalidInputError, match=r"spire: shard 0 .* cannot be read"):
            far.search(asked, algorithm="spire")
        over_rpc, read = (where.search(asked, K, EF, algorithm="compass") for where in (far, cluster))
        np.testing.assert_array_equal(over_rpc.ids, read.ids)
        chosen = far.search(asked, K, EF, algorithm="auto")
        assert chosen.transports == ("rpc",) * N_SHARDS
        assert {way.algorithm: way.allowed for way in chosen.predictions} == {"cotra": True, "scatter-gather": True}


# ---- owners that stop ----


@contextmanager
def stopped(*owners: OwnerProcess) -> Iterator[None]:
    try:
        for owner in owners:
            stop_process(owner.pid)
            os.waitpid(owner.pid, os.WUNTRACED)
        yield
    finally:
        for owner in owners:
            os.kill(owner.pid, signal.SIGCONT)


def test_stopped_owners_are_read_and_cannot_be_asked(
    directory: Path, cluster: Cluster, asked: Floats, exact: Wide, members: list[npt.NDArray[np.int64]]
) -> None:
    paths = shard_paths([directory])
    with (
        OwnerProcess(paths[:2], transports=HERE) as stays,
        OwnerProcess(paths[2:], transports=HERE) as stops,
        cotra_rdma.connect([*stays.addresses, *stops.addresses]) as far,
    ):
        with stopped(stays, stops):
            before = [owner.cpu_s() for owner in (stays, stops)]
            for algorithm in ("cotra", "spire", "compass", "compass+spire", "auto"):
                result = far.search(asked, K, EF, algorithm=algorithm)
                assert recall_of(result.ids, exact) >= FLOORS[algorithm]
                assert result.coverage == 1.0
            assert [owner.cpu_s() for owner in (stays, stops)] == before
            with pytest.raises(TransportError, match=r"shard 0 \(") as every:
                far.search(asked, K, EF, algorithm="scatter-gather", timeout_s=0.1)
            assert every.value.shard == 0
        with stopped(stops):
            with pytest.raises(PartialResultError, match=r"2 of 4 shards failed: shard 2 .*; shard 3 ") as caught:
                far.search(asked, K, EF, algorithm="scatter-gather", timeout_s=0.5)
            partial = far.search(asked, K, EF, algorithm="scatter-gather", timeout_s=0.5, allow_partial=True)
            some = far.search(asked, K, EF, algorithm="compass+scatter-gather", timeout_s=0.5, allow_partial=True)
    allowed = np.zeros((len(asked), N), bool)
    allowed[:, np.concatenate(members[:2])] = True
    for result in (partial, caught.value.result):
        assert isinstance(result, cotra_rdma.SearchResult)
        assert result.coverage == 0.5
        assert sorted(result.failures) == [2, 3]
        assert all(isinstance(error, TransportError) for error in result.failures.values())
        assert recall_among(result.ids, exact, allowed) >= 0.98
    assert sorted(some.failures) == [2, 3]
    assert set(np.unique(some.shards)) <= {-1, 0, 1}


# ---- the seam ----


def test_compass_in_front_of_scatter_gather(
    directory: Path, addresses: list[str], servers: list[Server], cluster: Cluster, asked: Floats
) -> None:
    router = Collection.load(directory).router(directory)
    assert router is not None
    expected = cluster.search(asked, K, EF, algorithm="compass+scatter-gather")
    with ScatterGather.connect(addresses, selector=Compass(router)) as gatherer:
        result = gatherer.search_sync(asked, K, EF, timeout_s=30)
    np.testing.assert_array_equal(result.ids, expected.ids)
    np.testing.assert_array_equal(result.distances.view(np.uint32), expected.distances.view(np.uint32))
    assert sum(outcome.n_queries for outcome in result.outcomes) == expected.asked.sum()
    places = {ShardRef(9, 100 + number): address for number, address in enumerate(addresses)}
    numbered = Compass(router, [shard.vshard_id for shard in places])
    with ScatterGather.connect(places, selector=numbered) as gatherer:
        np.testing.assert_array_equal(gatherer.search_sync(asked, K, EF, timeout_s=30).ids, expected.ids)


def test_what_compass_selects(directory: Path, asked: Floats) -> None:
    router = Collection.load(directory).router(directory)
    assert router is not None
    mask = router.select(asked, 0.9)
    compass = Compass(router, [7, 5, 9, 3], target_recall=0.9)
    for query, chosen in zip(asked, mask, strict=True):
        subset = compass.select_shards(query, [3, 5, 7, 9])
        wanted = [number for number, take in zip([7, 5, 9, 3], chosen, strict=True) if take]
        assert subset == (ShardSubset.All if chosen.all() else ShardSubset.Subset(wanted))
    assert Compass(router, target_recall=1.0).select_shards(asked[0], [0, 1, 2, 3]) == ShardSubset.All
    with pytest.raises(InvalidInputError, match="4 shards need 4 distinct numbers"):
        Compass(router, [1, 2, 3])


def test_a_router_chooses_among_the_shards_that_may_be_asked(directory: Path, asked: Floats) -> None:
    router = Collection.load(directory).router(directory)
    assert router is not None
    among = np.random.default_rng(13).random((len(asked), N_SHARDS)) < 0.5
    for target in (0.9, 1.0):
        chosen = router.select(asked, target, among)
        assert not (chosen & ~among).any()
        np.testing.assert_array_equal(chosen.any(axis=1), among.any(axis=1))
        every = np.ones_like(among)
        np.testing.assert_array_equal(router.select(asked, target, every), router.select(asked, target))
    alone = np.eye(N_SHARDS, dtype=bool)[np.arange(len(asked)) % N_SHARDS]
    np.testing.assert_array_equal(router.select(asked, 0.5, alone), alone)


@contextmanager
def table_of(shard: Shard) -> Iterator[IvfTable]:
    arena = shard.pinned()
    with Channel.shm(arena) as channel, View.open(channel) as view, IvfTable.open(channel, view) as table:
        yield table


def exchange(opened: Sequence[Shard], servers: Sequence[Server]) -> None:
    """Each shard tells all others where its lists are, all at once."""
    refs = [ShardRef(0, number) for number in range(len(servers))]

    async def body() -> None:
        places = {(0, number): server.address for number, server in enumerate(servers)}
        async with GrpcDispatch(places) as dispatch:
            calls = []
            for me, shard in zip(refs, opened, strict=True):
                with table_of(shard) as table:
                    spire = Spire(me, table, generation=shard.info.generation)
                calls.append(exchange_with_peers(spire, [peer for peer in refs if peer != me], dispatch))
            await asyncio.gather(*calls)

    asyncio.run(body())


def test_tables_go_from_shard_to_shard(opened: list[Shard]) -> None:
    taken: list[list[BuildExchangeRequest]] = [[] for _ in opened]
    with ExitStack() as stack:
        servers = [
            stack.enter_context(cotra_rdma.serve(shard, transports=("rpc",), exchange=tables.append))
            for shard, tables in zip(opened, taken, strict=True)
        ]
        exchange(opened, servers)
        # N - 1 messages at each owner, and none of any other kind: there is nobody in between.
        assert [server.request_counts for server in servers] == [{EXCHANGE: N_SHARDS - 1}] * N_SHARDS
    for number, tables in enumerate(taken):
        assert sorted(told.shard for told in tables) == [other for other in range(N_SHARDS) if other != number]
        for told in tables:
            check_told(told, opened[told.shard])


def check_told(told: BuildExchangeRequest, shard: Shard) -> None:
    """That a peer can read the shard's lists by what it was told."""
    image, info = image_bytes(shard), shard.ivf_info
    assert info is not None
    with table_of(shard) as table:
        np.testing.assert_array_equal(told.table.centroids, table.centroids)
        np.testing.assert_array_equal(told.table.sizes, table.sizes)
        np.testing.assert_array_equal(told.table.radii, table.radii)
        offsets = table.offsets
    assert told.generation == shard.info.generation
    assert told.region_offset == shard.info.ivf_offset + info.table_bytes
    np.testing.assert_array_equal(told.region_offset + told.offsets, offsets)
    blocks = -(-told.table.sizes.astype(np.int64) // 32)
    np.testing.assert_array_equal(told.lengths, blocks * info.block_bytes)
    begins = told.offsets.astype(np.int64) + told.region_offset
    lists = [image[begin : begin + length] for begin, length in zip(begins, told.lengths, strict=True)]
    whole = image[shard.info.ivf_offset + info.table_bytes : shard.info.ivf_offset + shard.info.ivf_bytes]
    assert b"".join(lists) == whole  # each list contiguous, one after the other


def test_an_owner_that_takes_no_tables_is_named(opened: list[Shard]) -> None:
    with (
        cotra_rdma.serve(opened[0], transports=("rpc",), exchange=lambda table: None) as takes,
        cotra_rdma.serve(opened[1], transports=("rpc",)) as refuses,
        pytest.raises(BuildExchangeFailed, match="failed for shard 1: this owner takes no tables") as caught,
    ):
        exchange(opened[:2], [takes, refuses])
    assert caught.value.peer_shard == 1
