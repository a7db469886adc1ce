"""One graph of 20,000 words over four owners, walked over verbs: what it costs, and owners that are killed in the middle."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from owners import GENEROUS_S, OUT, figure, start, stopped

import cotra_rdma
from cotra_rdma import Cluster, SearchResult, Shard
from cotra_rdma._collection.manifest import shard_paths
from cotra_rdma._owner.child_process import OwnerProcess

Floats = npt.NDArray[np.float32]
K, EF, N_SHARDS = 10, 48, 4
REPEATED = 20  # times the queries, for a search that is still on its way when an owner is killed


@pytest.fixture(scope="module")
def paths() -> list[Path]:
    return shard_paths([OUT / "graph-4"])


@pytest.fixture(scope="module")
def graph(paths: list[Path], host: str, device_name: str) -> Iterator[list[OwnerProcess]]:
    """An owner process for each shard; those that a check kills are its own."""
    started = start(paths, host, device_name)
    yield started
    for owner in started:
        owner.close()


@pytest.fixture(scope="module")
def homes(graph: list[OwnerProcess]) -> list[str]:
    return [owner.addresses[0] for owner in graph]


@pytest.fixture(scope="module")
def truth(queries: Floats) -> npt.NDArray[np.int64]:
    vectors = np.load(OUT / "all.npy")
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.argsort(-(queries @ vectors.T), axis=1)[:, :K].astype(np.int64)


@pytest.fixture(scope="module")
def expected(homes: list[str], queries: Floats) -> SearchResult:
    with cotra_rdma.connect(homes, transport="shm") as cluster:
        return cluster.search(queries, k=K, ef=EF)


def recall(found: npt.NDArray[np.int64], truth: npt.NDArray[np.int64]) -> float:
    return float(np.mean([len(set(a) & set(b)) / K for a, b in zip(found.tolist(), truth.tolist(), strict=True)]))


def work(result: SearchResult) -> float:
    """Distances, estimates and exact ones: of 32 neighbours and a node's own in each expansion, and of upper nodes."""
    return float((33 * result.stats["expansions"] + result.stats["cache_hits"]).mean())


def assert_same(found: SearchResult, expected: SearchResult) -> None:
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_array_equal(found.distances, expected.distances)
    np.testing.assert_array_equal(found.stats["expansions"], expected.stats["expansions"])


def packets_sent(device_name: str) -> int:
    return int(Path(f"/sys/class/infiniband/{device_name}/ports/1/hw_counters/sent_pkts").read_text())


def search_and_kill(cluster: Cluster, victim: OwnerProcess, device_name: str, queries: Floats) -> SearchResult:
    """A long search, in whose middle an owner is killed."""
    found: list[SearchResult | BaseException] = []

    def search() -> None:
        try:
            found.append(cluster.search(np.tile(queries, (REPEATED, 1)), k=K, ef=EF))
        except BaseException as error:
            found.append(error)

    packets = packets_sent(device_name)
    thread = threading.Thread(target=search)
    thread.start()
    while packets_sent(device_name) < packets + 4000:
        assert thread.is_alive(), found
    os.kill(victim.pid, signal.SIGKILL)
    thread.join(120)
    assert not thread.is_alive()
    assert isinstance(found[0], SearchResult), found
    return found[0]


def check_one_walk_over_four_owners(
    graph: list[OwnerProcess],
    homes: list[str],
    host: str,
    device_name: str,
    queries: Floats,
    truth: npt.NDArray[np.int64],
    expected: SearchResult,
) -> None:
    with (
        OwnerProcess([OUT / "graph-1", OUT / "apart-4"], listen=f"{host}:0", device=device_name) as others,
        cotra_rdma.connect(others.addresses[0], transport="verbs") as one,
        cotra_rdma.connect(others.addresses[1:], transport="verbs") as apart,
        cotra_rdma.connect(homes, transport="verbs") as four,
    ):
        assert four.one_graph
        with stopped(graph):
            found = four.search(queries, k=K, ef=EF)
        single = one.search(queries, k=K, ef=EF)
        independent = apart.search(queries, k=K, ef=EF)
    assert_same(found, expected)
    assert found.transports == ("verbs",) * N_SHARDS
    reads, rounds = (float(found.stats[name].mean() / single.stats[name].mean()) for name in ("reads", "rounds"))
    distances = work(found) / work(independent)
    assert recall(found.ids, truth) > recall(single.ids, truth) - 0.02
    assert distances < 0.5
    assert reads < 1.2
    assert rounds < 1.1
    figure(
        f"one graph of 20,000 vectors over 4 owners, over verbs, beside one shard: recall@10 {recall(found.ids, truth):.3f} "
        f"and {recall(single.ids, truth):.3f}, {found.stats['reads'].mean():.1f} READs ({reads:.2f} x), "
        f"{found.stats['rounds'].mean():.1f} rounds ({rounds:.2f} x), {distances:.2f} of the distances of four "
        f"graphs, {len(queries) / found.elapsed_s:.0f} and {len(queries) / single.elapsed_s:.0f} queries/s"
    )


def check_owners_without_a_region_and_own_shards_meet_verbs_in_one_query(
    paths: list[Path], homes: list[str], host: str, queries: Floats, expected: SearchResult
) -> None:
    with OwnerProcess([paths[3]], listen=f"{host}:0", transports=("rpc",)) as far, Shard.open(paths[0]) as own:
        with cotra_rdma.connect([own, homes[1], homes[2], *far.addresses], transport="auto") as cluster:
            found = cluster.search(queries, k=K, ef=EF, timeout_s=GENEROUS_S)
        with cotra_rdma.connect([own, *homes[1:]], transport="verbs", halo=0.25) as cluster:
            near = cluster.search(queries, k=K, ef=EF)
    assert found.transports == ("own", "verbs", "verbs", "push")
    assert near.transports == ("own", "verbs", "verbs", "verbs")
    for result in (found, near):
        assert_same(result, expected)
    assert all(found.stats[name].sum() > 0 for name in ("own", "reads", "pushed"))
    figure(
        f"own memory, verbs and pushes in one query: {found.stats['own'].mean():.1f}, {found.stats['reads'].mean():.1f} and "
        f"{found.stats['pushed'].mean():.1f} of {found.stats['expansions'].mean():.1f} expansions"
    )


def check_an_owner_killed_in_the_middle_of_a_search_is_replaced(
    paths: list[Path], homes: list[str], host: str, device_name: str, queries: Floats, expected: SearchResult
) -> None:
    (victim,) = start([paths[2]], host, device_name)
    try:
        with cotra_rdma.connect([*homes[:2], victim.addresses, homes[3]], transport="verbs") as cluster:
            assert cluster.addresses[2] == victim.addresses[0]
        with cotra_rdma.connect([*homes[:2], [victim.addresses[0], homes[2]], homes[3]], transport="verbs") as cluster:
            if cluster.addresses[2] != victim.addresses[0]:  # the other one was nearer
                cluster._session.replicas.replace(  # type: ignore[union-attr]
                    cluster._connections[2], cotra_rdma.TransportError("for the test"), give_up=True, tried=set()
                )
                cluster.revive()
            assert cluster.addresses[2] == victim.addresses[0]
            found = search_and_kill(cluster, victim, device_name, queries)
            assert cluster.addresses == tuple(homes)
            again = cluster.search(queries, k=K, ef=EF)
    finally:
        victim.close()
    for part in np.split(found.ids, REPEATED):
        np.testing.assert_array_equal(part, expected.ids)
    assert (found.coverage, found.transports) == (1.0, ("verbs",) * N_SHARDS)
    assert_same(again, expected)
    figure(f"an owner killed in mid-search, with a replica: all {len(found.ids)} answers bit-identical")


def check_an_owner_killed_in_the_middle_of_a_search_is_walked_around(
    paths: list[Path],
    homes: list[str],
    host: str,
    device_name: str,
    queries: Floats,
    truth: npt.NDArray[np.int64],
    expected: SearchResult,
) -> None:
    (victim,) = start([paths[1]], host, device_name)
    try:
        with cotra_rdma.connect([homes[0], *victim.addresses, *homes[2:]], transport="verbs") as cluster:
            whole = min(cluster.search(queries, k=K, ef=EF).elapsed_s for _ in range(3))
            found = search_and_kill(cluster, victim, device_name, queries)
            assert (found.missing, found.coverage) == ((1,), 0.75)
            assert found.transports == ("verbs", "lost", "verbs", "verbs")
            assert isinstance(found.failures[1], cotra_rdma.TransportError)
            after = [cluster.search(queries, k=K, ef=EF) for _ in range(3)]
    finally:
        victim.close()
    assert all(result.missing == (1,) for result in after)
    np.testing.assert_array_equal(found.ids[:20], expected.ids[:20])  # answered before
    share = len(np.flatnonzero(expected.shards == 1)) / expected.shards.size
    fell = recall(expected.ids, truth) - recall(after[0].ids, truth)
    ratio = min(result.elapsed_s for result in after) / whole
    assert fell < share + 0.02
    figure(
        f"an owner of 4 killed in mid-search, without a replica: it held {share:.1%} of the answers, recall@10 fell by "
        f"{fell:.3f}; a search after it took {ratio:.2f} x the time before"
    )
