"""Several owners of a shard, owners that die in the middle, owners that come back, and shards that this process owns itself."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import cotra_rdma
from cotra_rdma import Cluster, FormatError, InvalidInputError, Server, Shard, TransportError
from cotra_rdma._build.collection import build_collection
from cotra_rdma._collection.manifest import coarse_of, shard_paths
from cotra_rdma._owner.child_process import OwnerProcess
from cotra_rdma._reader.connection import Connection
from cotra_rdma._reader.halo import far_links
from cotra_rdma._reader.replicas import Replicas
from cotra_rdma.datasets import open_vectors
from cotra_rdma.protocol.envelope import VShardEnvelope, VShardMessageType
from cotra_rdma.protocol.rpc_server import RpcServer
from cotra_rdma.protocol.tables import CentroidTable, CoarseRouteResponse
from helpers.begun import GENEROUS_S, answer_of, stop_process
from helpers.faults import FaultyFabric

Floats = npt.NDArray[np.float32]
N, N_SHARDS = 4000, 4
LOSSY = FaultyFabric(fail_after_reads=150, fail_status=-10, fail_wc_status=12)


@pytest.fixture(scope="module")
def paths(words: Floats, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """4,000 words in four shards of one graph."""
    directory = tmp_path_factory.mktemp("replicas")
    np.save(directory / "base.npy", words[:N])
    with open_vectors(directory / "base.npy") as file:
        build_collection(
            file, directory / "index", N_SHARDS, metric="cosine", M=8, ef_construction=60, graph="global", n_threads=1
        )
    return shard_paths([directory / "index"])


@pytest.fixture(scope="module")
def owners(paths: list[Path]) -> Iterator[list[OwnerProcess]]:
    """Two processes that own all shards."""
    with OwnerProcess(paths, transports=("shm", "rpc")) as one, OwnerProcess(paths, transports=("shm", "rpc")) as other:
        yield [one, other]


@pytest.fixture(scope="module")
def wanted(owners: list[OwnerProcess], queries: Floats) -> cotra_rdma.SearchResult:
    with cotra_rdma.connect(owners[0].addresses, transport="shm") as cluster:
        return cluster.search(queries, k=10, ef=48)


def kill(owner: OwnerProcess) -> None:
    os.kill(owner.pid, signal.SIGKILL)
    os.waitid(os.P_PID, owner.pid, os.WEXITED | os.WNOWAIT)


def break_channel(cluster: Cluster, shard: int) -> None:
    """The channels to a shard's present owner fail after some READs."""
    peer = cluster._connections[shard]
    peer._fabric, peer._first = LOSSY, None
    cluster._session.engines.drop(peer)


def assert_same(found: cotra_rdma.SearchResult, wanted: cotra_rdma.SearchResult) -> None:
    np.testing.assert_array_equal(found.ids, wanted.ids)
    np.testing.assert_array_equal(found.distances, wanted.distances)
    np.testing.assert_array_equal(found.shards, wanted.shards)
    assert found.coverage == 1.0


@pytest.mark.parametrize("n_threads", [1, 3])
def test_the_other_owner_takes_over_in_the_middle_of_a_query(
    owners: list[OwnerProcess], queries: Floats, wanted: cotra_rdma.SearchResult, n_threads: int
) -> None:
    groups = [list(pair) for pair in zip(*(owner.addresses for owner in owners), strict=True)]
    with cotra_rdma.connect(groups, transport="shm") as cluster:
        before = cluster.addresses
        for shard in (1, 3):
            break_channel(cluster, shard)
        assert_same(cluster.search(queries, k=10, ef=48, n_threads=n_threads), wanted)
        for shard in range(N_SHARDS):
            assert (cluster.addresses[shard] != before[shard]) == (shard in (1, 3))
            assert cluster.addresses[shard] in groups[shard]
        assert_same(cluster.search(queries, k=10, ef=48, n_threads=n_threads), wanted)
        cluster.revive()  # unless its own thread was quicker
        assert cluster._session.replicas is not None
        assert cluster._session.replicas.are_all_here
        break_channel(cluster, 1)  # and back again
        assert_same(cluster.search(queries, k=10, ef=48), wanted)
        assert cluster.addresses[1] == before[1]


def test_a_killed_owner_of_pushed_nodes(
    paths: list[Path], owners: list[OwnerProcess], queries: Floats, wanted: cotra_rdma.SearchResult
) -> None:
    with OwnerProcess(paths, transports=("rpc",)) as dies:
        groups = [[address, *others] for address, *others in zip(dies.addresses, owners[0].addresses, strict=True)]
        with cotra_rdma.connect(groups, transport="rpc") as cluster:
            assert_same(cluster.search(queries, k=10, ef=48), wanted)
            kill(dies)
            assert_same(cluster.search(queries, k=10, ef=48, timeout_s=30.0), wanted)
            assert set(cluster.addresses) == set(owners[0].addresses)
            assert cluster.revive() == []


def test_owners_that_ask_are_replaced_too(paths: list[Path], owners: list[OwnerProcess], queries: Floats) -> None:
    with OwnerProcess(paths[:1], transports=("rpc",)) as dies:
        rest = owners[0].addresses[1:]
        with cotra_rdma.connect([[*dies.addresses, owners[0].addresses[0]], *rest], transport="rpc") as cluster:
            asked = cluster.search(queries, k=10, ef=48, algorithm="scatter-gather")
            kill(dies)
            again = cluster.search(queries, k=10, ef=48, algorithm="scatter-gather", timeout_s=30.0)
    np.testing.assert_array_equal(again.ids, asked.ids)
    assert again.coverage == 1.0


def liar(server: Server, lies: set[str], name: str, request: VShardEnvelope) -> VShardEnvelope:
    """The server's answer; where `name` lies, a search is answered with what is none."""
    reply = answer_of(server, request)
    if name in lies and request.msg_type == VShardMessageType.VECTOR_SCATTER_REQUEST:
        reply = VShardEnvelope(2, reply.msg_type, 0, 0, 0, b"\xc1")
    return reply


def test_an_owner_whose_answer_is_none_is_replaced(paths: list[Path], queries: Floats) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(cotra_rdma.serve(stack.enter_context(Shard.open(paths[0])), transports=("rpc",)))
        lies: set[str] = set()
        at = {
            stack.enter_context(RpcServer("127.0.0.1:0", partial(liar, server, lies, name))).address: name
            for name in ("one", "other")
        }
        cluster = stack.enter_context(cotra_rdma.connect([list(at)], transport="rpc"))
        wanted, first = cluster.search(queries, algorithm="scatter-gather"), cluster.addresses[0]
        lies.add(at[first])
        assert_same(cluster.search(queries, algorithm="scatter-gather"), wanted)
        assert cluster.addresses[0] != first
        lies |= set(at.values())
        with pytest.raises(FormatError, match=r"shard 0 \(127.0.0.1:"):
            cluster.search(queries, algorithm="scatter-gather")


def test_an_owner_that_hangs_is_waited_for_once(paths: list[Path], owners: list[OwnerProcess], queries: Floats) -> None:
    """And where partial answers are not asked for, it stays: who sees the error may try again."""
    with OwnerProcess(paths[2:3], transports=("rpc",)) as hangs:
        addresses = [*owners[0].addresses[:2], *hangs.addresses, owners[0].addresses[3]]
        with cotra_rdma.connect(addresses, transport="rpc", timeout_s=0.5) as cluster:
            search = partial(cluster.search, queries[:5], algorithm="scatter-gather")
            assert search().coverage == 1.0
            stop_process(hangs.pid)
            with pytest.raises(TransportError):
                search(allow_partial=False, timeout_s=0.2)
            assert cluster.transports[2] == "rpc"
            first = search(allow_partial=True, timeout_s=2.0)
            assert (first.missing, cluster.transports[2]) == ((2,), "lost")
            lost = cluster.lost[2]
            again = search(allow_partial=True, timeout_s=60.0)  # far longer than the test may wait
            assert (again.missing, again.failures[2]) == ((2,), lost)
            os.kill(hangs.pid, signal.SIGCONT)


def test_a_shard_without_an_owner_is_told_and_walked_around(
    paths: list[Path], owners: list[OwnerProcess], queries: Floats, wanted: cotra_rdma.SearchResult
) -> None:
    with OwnerProcess(paths[2:3], transports=("rpc",)) as dies:
        addresses = [*owners[0].addresses[:2], *dies.addresses, owners[0].addresses[3]]
        with cotra_rdma.connect(addresses) as cluster:
            assert cluster.transports == ("shm", "shm", "rpc", "shm")
            assert_same(cluster.search(queries, k=10, ef=48), wanted)
            kill(dies)
            for _ in range(2):
                found = cluster.search(queries, k=10, ef=48, timeout_s=30.0)
                assert (found.missing, found.coverage) == ((2,), 0.75)
                assert found.transports == ("shm", "shm", "lost", "shm")
                assert isinstance(found.failures[2], TransportError)
            assert cluster.transports[2] == "lost"
            left = [
                [i for i, shard in zip(row, at, strict=True) if shard != 2]
                for row, at in zip(wanted.ids, wanted.shards, strict=True)
            ]
            kept = sum(len(set(row) & set(now)) for row, now in zip(left, found.ids, strict=True))
            assert kept > 0.95 * sum(map(len, left))
            for algorithm in ("scatter-gather", "auto"):
                assert cluster.search(queries, k=10, ef=48, algorithm=algorithm).missing == (2,)
            with OwnerProcess(paths[2:3], listen=dies.addresses[0], transports=("shm", "rpc")) as back:
                back.wait_ready()
                cluster.revive()  # unless its own thread was quicker
                assert cluster.lost == {}
                assert_same(cluster.search(queries, k=10, ef=48), wanted)


def test_an_owner_that_is_not_there_at_the_start(
    owners: list[OwnerProcess], queries: Floats, wanted: cotra_rdma.SearchResult
) -> None:
    nobody = "127.0.0.1:1"
    addresses = owners[0].addresses
    with cotra_rdma.connect([[nobody, addresses[0]], *addresses[1:]], transport="shm") as cluster:
        assert_same(cluster.search(queries, k=10, ef=48), wanted)
    with pytest.raises(TransportError, match=r"shard 1 \(127.0.0.1:1\) cannot be reached"):
        cotra_rdma.connect([addresses[0], nobody, *addresses[2:]])
    with cotra_rdma.connect([addresses[0], [], *addresses[2:]], allow_partial=True) as cluster:
        found = cluster.search(queries, k=10, ef=48)
        assert (found.missing, found.coverage, cluster.one_graph) == ((1,), 0.75, True)
        assert cluster.counts[1] == 0
    with pytest.raises(TransportError):
        cotra_rdma.connect([nobody, nobody], allow_partial=True)
    with pytest.raises(InvalidInputError, match=r"without: \[1\]"):
        cotra_rdma.connect([addresses[0], []])


def test_owners_of_one_shard_hold_one_image(owners: list[OwnerProcess]) -> None:
    addresses = owners[0].addresses
    with pytest.raises(InvalidInputError, match="are given as owners of one shard, and hold different ones"):
        cotra_rdma.connect([[addresses[0], addresses[1]], *addresses[2:]])


def test_own_records_are_used_in_place(
    paths: list[Path], owners: list[OwnerProcess], queries: Floats, wanted: cotra_rdma.SearchResult
) -> None:
    with ExitStack() as stack:
        shard = stack.enter_context(Shard.open(paths[1]))
        addresses = [owners[0].addresses[0], shard, *owners[0].addresses[2:]]
        cluster = stack.enter_context(cotra_rdma.connect(addresses, transport="shm"))
        assert cluster.transports == ("shm", "own", "shm", "shm")
        found = cluster.search(queries, k=10, ef=48)
        assert_same(found, wanted)
        np.testing.assert_array_equal(found.stats["own"] + found.stats["reads"], wanted.stats["reads"])
        assert found.stats["own"].sum() > 0
        assert 0.1 < found.local_share < 0.6
        haloed = stack.enter_context(cotra_rdma.connect(addresses, transport="shm", halo=0.5))
        near = haloed.search(queries, k=10, ef=48)
        assert_same(near, wanted)
        assert near.local_share > found.local_share
        held = sum(cache.records for cache in haloed.record_caches if cache is not None)
        assert 0.3 * shard.info.count < held <= 0.75 * shard.info.count
        nodes, counts = far_links(shard.arena, shard.info)
        assert (counts > 0).all()
        base, count = shard.info.graph_base, shard.info.count
        assert not ((nodes >= base) & (nodes < base + count)).any()
    for halo, given in ((0.5, owners[0].addresses), (-1.0, addresses)):
        with pytest.raises(InvalidInputError, match="halo"):
            cotra_rdma.connect(given, halo=halo)


def test_queries_go_home(
    paths: list[Path], owners: list[OwnerProcess], queries: Floats, wanted: cotra_rdma.SearchResult
) -> None:
    """Four peers, each with a shard and a halo; a reader sends each query to the one that has most of its neighbourhood."""
    with ExitStack() as stack:
        servers = []
        for path in paths:
            shard = stack.enter_context(Shard.open(path))
            told = coarse_of(path)
            assert told is not None
            coarse = CoarseRouteResponse(0, "", CentroidTable.of(told[0], "float16"), told[1]).encode()
            servers.append(stack.enter_context(cotra_rdma.serve(shard, transports=("shm", "rpc"), coarse=coarse)))
        addresses = [server.address for server in servers]
        reader = stack.enter_context(cotra_rdma.connect(addresses, transport="shm"))
        with pytest.raises(cotra_rdma.PeerError, match="its own shard only"):
            reader.search(queries, k=10, ef=48, algorithm="home")
        for at, server in enumerate(servers):
            own = [*addresses[:at], server, *addresses[at + 1 :]]
            server.search_with(stack.enter_context(cotra_rdma.connect(own, transport="shm", halo=0.3)))
        found = reader.search(queries, k=10, ef=48, algorithm="home")
        assert_same(found, wanted)
        assert (found.algorithm, set(found.transports)) == ("home", {"home"})
        np.testing.assert_array_equal(
            found.stats["own"] + found.stats["cached_records"] + found.stats["reads"], wanted.stats["expansions"]
        )
        assert found.local_share > 0.7
        masked = reader.search(queries, k=10, ef=48, algorithm="home", shards=np.ones((len(queries), N_SHARDS), bool))
        assert (masked.algorithm, set(masked.transports)) == ("cotra", {"shm"})  # homes are told no mask: walked here
        np.testing.assert_array_equal(masked.ids, wanted.ids)
        servers[2].close()
        again = reader.search(queries, k=10, ef=48, algorithm="home")  # its memory is still mapped here
        np.testing.assert_array_equal(again.ids, wanted.ids)


def test_all_owners_are_connected_to_at_once() -> None:
    """Those that hang cost one deadline together."""
    groups = [["127.0.0.1:1", "127.0.0.1:2"], ["127.0.0.1:3"], ["127.0.0.1:4", "127.0.0.1:5"]]
    barrier = threading.Barrier(5)  # nobody passes it alone

    def hangs(_shard: int, _owner: object) -> Connection:
        barrier.wait(GENEROUS_S)
        raise TransportError("hangs")

    replicas = Replicas(groups, hangs, lambda _: None, lambda _: None, lambda _: None)
    with pytest.raises(TransportError, match="hangs"):
        replicas.settle(allow_partial=False)
    replicas.close()
