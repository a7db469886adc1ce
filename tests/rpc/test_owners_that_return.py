"""Owners that are away and come back: what is kept for them, who waits for them, and what must not make anybody forget them."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import cotra_rdma
from cotra_rdma import ClosedError, Cluster, CotraError, FabricModel, Server, Shard, TransportError
from cotra_rdma._build.collection import build_collection
from cotra_rdma._collection.manifest import coarse_of, shard_paths
from cotra_rdma._reader import replicas as replicas_module
from cotra_rdma._reader import threads as threads_module
from cotra_rdma._reader import upkeep
from cotra_rdma._reader.connection import Connection
from cotra_rdma._reader.replicas import Owner
from cotra_rdma.datasets import open_vectors
from cotra_rdma.protocol.tables import CentroidTable, CoarseRouteResponse
from helpers.faults import FaultyFabric

Floats = npt.NDArray[np.float32]
N, N_SHARDS = 2000, 4


@pytest.fixture(scope="module")
def paths(words: Floats, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """2,000 words in four shards of one graph."""
    directory = tmp_path_factory.mktemp("return")
    np.save(directory / "base.npy", words[:N])
    with open_vectors(directory / "base.npy") as file:
        build_collection(
            file, directory / "index", N_SHARDS, metric="cosine", M=8, ef_construction=60, graph="global", n_threads=1
        )
    return shard_paths([directory / "index"])


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as parts:
        yield parts


@pytest.fixture
def shards(paths: list[Path], stack: ExitStack) -> list[Shard]:
    return [stack.enter_context(Shard.open(path)) for path in paths]


@pytest.fixture(autouse=True)
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Owners are looked for when a test says so, and not by the clock."""
    monkeypatch.setattr(upkeep, "LOOK_S", 3600.0)


def serve(
    stack: ExitStack, paths: list[Path], shards: list[Shard], number: int, address: str = "127.0.0.1:0"
) -> Server:
    told = coarse_of(paths[number])
    assert told is not None
    coarse = CoarseRouteResponse(0, "", CentroidTable.of(told[0], "float16"), told[1]).encode()
    return stack.enter_context(cotra_rdma.serve(shards[number], address, transports=("shm", "rpc"), coarse=coarse))


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"


def lose(reader: Cluster, shard: int) -> None:
    """As a search does whose READs of it fail, where nobody else owns it."""
    assert (
        reader._session._fail_over(reader._connections[shard], TransportError("gone", shard=shard), True, set()) is None
    )
    assert reader.transports[shard] == "lost"


def test_a_halo_is_kept_for_an_owner_that_comes_back(
    paths: list[Path], shards: list[Shard], queries: Floats, stack: ExitStack
) -> None:
    servers = [serve(stack, paths, shards, number) for number in range(1, N_SHARDS)]
    own = [shards[0], *(server.address for server in servers)]
    reader = stack.enter_context(cotra_rdma.connect(own, transport="shm", halo=0.6))
    before = reader.search(queries, k=10, ef=48)
    lose(reader, 2)
    assert reader.search(queries, k=10, ef=48).missing == (2,)
    held = reader.record_caches  # what the others were asked for since is in theirs
    assert held[2] is not None
    assert held[2].records > 20
    assert reader.revive() == [servers[1].address]
    assert reader.record_caches == held
    again = reader.search(queries, k=10, ef=48)
    np.testing.assert_array_equal(again.ids, before.ids)
    assert again.coverage == 1.0
    assert again.local_share >= before.local_share > 0.4


@pytest.mark.parametrize("options", [{"halo": 0.6}, {"cache_bytes": 200_000}])
def test_a_shard_that_is_there_only_later_gets_what_connect_was_asked_for(
    paths: list[Path], shards: list[Shard], queries: Floats, stack: ExitStack, options: dict[str, Any]
) -> None:
    servers = [serve(stack, paths, shards, number) for number in range(1, N_SHARDS)]
    own = [shards[0], *(server.address for server in servers)]
    whole = stack.enter_context(cotra_rdma.connect(own, transport="shm", **options))
    late = free_address()
    reader = stack.enter_context(cotra_rdma.connect([*own[:3], late], transport="shm", allow_partial=True, **options))
    assert reader.search(queries, k=10, ef=48).missing == (3,)
    assert reader.record_caches[3] is None
    serve(stack, paths, shards, 3, late)
    assert reader.revive() == [late]
    found, wanted = reader.search(queries, k=10, ef=48), whole.search(queries, k=10, ef=48)
    np.testing.assert_array_equal(found.ids, wanted.ids)
    held, like = reader.record_caches[3], whole.record_caches[3]
    assert held is not None
    assert like is not None
    assert held.places == pytest.approx(like.places, rel=0.15)
    if "cache_bytes" in options:
        assert sum(cache.nbytes for cache in reader.record_caches if cache is not None) <= 200_000
    else:
        assert found.local_share >= wanted.local_share


def test_a_cache_that_leaves_no_room_for_a_shard_that_is_late(
    paths: list[Path], shards: list[Shard], queries: Floats, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers = [serve(stack, paths, shards, number) for number in range(3)]
    late = free_address()
    addresses = [*(server.address for server in servers), late]
    reader = stack.enter_context(cotra_rdma.connect(addresses, allow_partial=True, cache_bytes=200_000))
    reader._session.caches._bytes = 1  # as if the others had all of it
    serve(stack, paths, shards, 3, late)
    assert reader.revive() == [late]
    assert reader.record_caches[3] is None
    assert reader.search(queries, k=10, ef=48).coverage == 1.0


def test_compass_is_there_when_the_collection_is(
    words: Floats, queries: Floats, tmp_path: Path, stack: ExitStack
) -> None:
    np.save(tmp_path / "base.npy", words[:N])
    with open_vectors(tmp_path / "base.npy") as file:
        build_collection(
            file, tmp_path / "index", 3, metric="cosine", M=4, ef_construction=30, partition="kmeans", n_threads=1
        )
    paths = shard_paths([tmp_path / "index"])
    shards = [stack.enter_context(Shard.open(path)) for path in paths]
    late = free_address()
    addresses = [serve(stack, paths, shards, 0).address, serve(stack, paths, shards, 1).address, late]
    reader = stack.enter_context(cotra_rdma.connect(addresses, allow_partial=True))
    with pytest.raises(TransportError, match="had none of shard 2 yet, which has no owner"):
        reader.search(queries, algorithm="compass", allow_partial=True)
    serve(stack, paths, shards, 2, late)
    assert reader.revive() == [late]
    assert reader.search(queries, algorithm="compass").coverage == 1.0
    lose(reader, 2)
    assert reader.search(queries, algorithm="compass", allow_partial=True).missing == (2,)  # its table is known still


def test_nobody_waits_for_another_shards_owner(
    paths: list[Path], shards: list[Shard], queries: Floats, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers = [serve(stack, paths, shards, number) for number in range(N_SHARDS)]
    other = serve(stack, paths, shards, 0)
    groups = [[servers[0].address, other.address], *(server.address for server in servers[1:])]
    reader = stack.enter_context(cotra_rdma.connect(groups, transport="shm"))
    replicas = reader._session.replicas
    assert replicas is not None
    asked, answer = threading.Event(), threading.Event()
    choose = replicas._choose

    def slowly(peer: Connection) -> None:
        asked.set()
        assert answer.wait(30.0)
        choose(peer)

    monkeypatch.setattr(replicas, "_choose", slowly)
    found: list[Connection | None] = []
    failed = replicas.connections[0]
    failover = [
        threading.Thread(
            target=lambda: found.append(
                reader._session._fail_over(failed, TransportError("gone", shard=0), True, set())
            )
        )
        for _ in range(2)
    ]
    for thread in failover:
        thread.start()
    assert asked.wait(30.0)
    try:
        assert [owner.address for owner in replicas.owners(1)] == [servers[1].address]
        assert replicas.owners(0)[0] is failed
        apart = np.ones((len(queries), N_SHARDS), bool)
        apart[:, 0] = False
        assert reader.search(queries, shards=apart).coverage == 1.0
        lose(reader, 2)
        assert not found
    finally:
        answer.set()
        for thread in failover:
            thread.join(30.0)
    assert [peer.address for peer in found if peer is not None] == [replicas.connections[0].address] * 2
    assert replicas.connections[0] is not failed


def test_owners_that_are_away_are_never_forgotten(
    paths: list[Path], shards: list[Shard], stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers = [serve(stack, paths, shards, number) for number in range(N_SHARDS)]
    reader = stack.enter_context(cotra_rdma.connect([server.address for server in servers], transport="shm"))
    replicas = reader._session.replicas
    assert replicas is not None
    for shard in (1, 2):
        lose(reader, shard)
    reach = replicas._reach

    def broken(shard: int, owner: Owner) -> Connection:
        if shard == 1:
            raise RuntimeError("what nobody thought of")
        return reach(shard, owner)

    monkeypatch.setattr(replicas, "_reach", broken)
    assert reader.revive() == [servers[2].address]
    assert not replicas.are_all_here
    monkeypatch.undo()
    assert reader.revive() == [servers[1].address]
    assert replicas.are_all_here
    assert reader.lost == {}
    for prepare in (CotraError("no path"), MemoryError()):
        lose(reader, 1)

        def refuse(peer: Connection, why: BaseException = prepare) -> None:
            raise why

        monkeypatch.setattr(replicas, "_choose", refuse)
        assert reader.revive() == []
        monkeypatch.undo()
        assert reader.revive() == [servers[1].address]


def test_the_thread_that_looks_for_owners_survives_everything(
    paths: list[Path], shards: list[Shard], stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "LOOK_S", 0.01)
    servers = [serve(stack, paths, shards, number) for number in range(N_SHARDS)]
    reader = stack.enter_context(cotra_rdma.connect([server.address for server in servers], transport="shm"))
    replicas = reader._session.replicas
    assert replicas is not None
    revive, failures = replicas.revive, iter(range(3))

    def fragile(before_each: Callable[[], None]) -> list[str]:
        if next(failures, None) is not None:
            raise RuntimeError("what nobody thought of")
        return revive(before_each)

    monkeypatch.setattr(replicas, "revive", fragile)
    lose(reader, 1)
    wait_until(lambda: not reader.lost)
    assert reader.transports[1] == "shm"


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30.0
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("n_threads", [1, 2])
def test_close_waits_for_searches(
    paths: list[Path], shards: list[Shard], queries: Floats, stack: ExitStack, n_threads: int
) -> None:
    servers = [serve(stack, paths, shards, number) for number in range(N_SHARDS)]
    slow = FabricModel(round_trip_s=0.003)
    reader = cotra_rdma.connect([server.address for server in servers], transport="shm", fabric=slow)
    found: list[cotra_rdma.SearchResult] = []
    thread = threading.Thread(target=lambda: found.append(reader.search(queries, ef=48, n_threads=n_threads)))
    thread.start()
    wait_until(lambda: reader._n_searches == 1)
    assert not found
    reader.close()
    assert reader._n_searches == 0
    thread.join(30.0)
    assert found[0].coverage == 1.0
    assert (found[0].ids >= 0).all()
    with pytest.raises(ClosedError):
        reader.search(queries)


def silent(stack: ExitStack) -> tuple[socket.socket, str]:
    """One that takes connections, as the kernel does for a stopped process, and never answers; and its address."""
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    return listener, f"127.0.0.1:{listener.getsockname()[1]}"


def test_searches_go_on_while_a_silent_owner_is_tried_again(
    paths: list[Path], shards: list[Shard], queries: Floats, stack: ExitStack
) -> None:
    servers = [serve(stack, paths, shards, number) for number in range(N_SHARDS)]
    reader = stack.enter_context(
        cotra_rdma.connect([server.address for server in servers], transport="shm", timeout_s=30.0)
    )
    replicas = reader._session.replicas
    assert replicas is not None
    listener, address = silent(stack)
    lose(reader, 2)
    replicas._away.insert(0, (2, address))
    thread = threading.Thread(target=reader.revive)
    thread.start()
    wait_until(replicas._reviving.locked)
    assert [owner.address for owner in replicas.owners(1)] == [servers[1].address]
    assert reader.search(queries, k=10, ef=48).missing == (2,)
    lose(reader, 3)
    assert thread.is_alive()
    listener.close()
    thread.join(30.0)
    assert list(reader.lost) == [3]
    assert replicas._away == [(2, address), (3, servers[3].address)]


def test_close_waits_for_one_silent_owner_and_not_for_all(
    paths: list[Path], shards: list[Shard], stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "LOOK_S", 0.01)
    monkeypatch.setattr(upkeep, "LEASE_RENEWAL_S", 0.0)
    servers = [serve(stack, paths, shards, number) for number in range(N_SHARDS)]
    reader = stack.enter_context(
        cotra_rdma.connect([server.address for server in servers], transport="shm", timeout_s=0.5)
    )
    replicas = reader._session.replicas
    assert replicas is not None
    tried: list[Owner] = []
    renewed: list[int] = []  # after how many owners
    reach = replicas._reach

    def noted(shard: int, owner: Owner) -> Connection:
        tried.append(owner)
        return reach(shard, owner)

    monkeypatch.setattr(replicas, "_reach", noted)
    monkeypatch.setattr(reader._session.upkeep, "renew_leases", lambda: renewed.append(len(tried)))
    hanging = [silent(stack)[1] for _ in range(20)]
    with replicas._lock:
        replicas._away += [(3, address) for address in hanging]
    lose(reader, 1)
    wait_until(lambda: len(tried) == 2)
    reader.close()
    assert len(tried) <= 3
    assert 1 in renewed  # leases do not wait for twenty owners


def test_an_owner_here_that_was_closed_keeps_no_other_away(
    paths: list[Path], shards: list[Shard], queries: Floats, stack: ExitStack
) -> None:
    servers = [serve(stack, paths, shards, number) for number in range(1, N_SHARDS)]
    own = Shard.open(paths[0])
    reader = stack.enter_context(cotra_rdma.connect([own, *(server.address for server in servers)], transport="shm"))
    for shard in (0, 2):
        lose(reader, shard)
    own.close()
    assert reader.revive() == [servers[1].address]
    assert list(reader.lost) == [0]
    assert reader.search(queries, k=10, ef=48).missing == (0,)


@pytest.mark.parametrize("why", [TransportError("no path"), MemoryError()])
def test_a_standby_without_a_path_is_tried_again(
    paths: list[Path], shards: list[Shard], stack: ExitStack, monkeypatch: pytest.MonkeyPatch, why: Exception
) -> None:
    """Also where partial answers are not asked for, and the owner that failed stays in use."""
    servers = [serve(stack, paths, shards, number) for number in range(N_SHARDS)]
    other = serve(stack, paths, shards, 0)
    groups = [[servers[0].address, other.address], *(server.address for server in servers[1:])]
    reader = stack.enter_context(cotra_rdma.connect(groups, transport="shm"))
    replicas = reader._session.replicas
    assert replicas is not None
    used, standby = replicas.owners(0)

    def refuse(peer: Connection) -> None:
        raise why

    monkeypatch.setattr(replicas, "_choose", refuse)
    with contextlib.suppress(MemoryError):
        assert reader._session._fail_over(used, TransportError("gone", shard=0), False, set()) is None
    monkeypatch.undo()
    assert replicas.owners(0) == [used]
    assert not replicas.are_all_here
    assert reader._session.upkeep.thread is not None  # it looks after those that are away
    assert reader.revive() == [standby.address]
    assert reader._session._fail_over(used, TransportError("gone", shard=0), False, set()) is replicas.connections[0]
    assert reader.addresses[0] == standby.address


def test_a_shard_that_was_not_asked_is_not_covered(
    paths: list[Path], shards: list[Shard], queries: Floats, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its owner comes back when the search has begun without it."""
    servers = [serve(stack, paths, shards, number) for number in range(N_SHARDS)]
    reader = stack.enter_context(cotra_rdma.connect([server.address for server in servers], transport="shm"))
    lose(reader, 2)
    gather = reader._session.searcher._executor.gather

    def late(*arguments: Any) -> Any:
        assert reader.revive() == [servers[2].address]
        return gather(*arguments)

    monkeypatch.setattr(reader._session.searcher._executor, "gather", late)
    found = reader.search(queries, k=10, ef=48)
    assert (found.missing, found.coverage, found.transports[2]) == ((2,), 0.75, "lost")
    assert not (found.shards == 2).any()
    monkeypatch.undo()
    assert reader.search(queries, k=10, ef=48).coverage == 1.0


def test_a_standby_that_can_be_read_gets_the_cache_that_one_that_was_asked_had_not(
    paths: list[Path], shards: list[Shard], queries: Floats, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers = [serve(stack, paths, shards, number) for number in range(N_SHARDS)]
    asked = stack.enter_context(cotra_rdma.serve(shards[1], transports=("rpc",)))
    monkeypatch.setattr(replicas_module, "_alike", lambda peers: peers)  # in the order given, whoever is nearer
    groups = [servers[0].address, [asked.address, servers[1].address], *(server.address for server in servers[2:])]
    reader = stack.enter_context(cotra_rdma.connect(groups, cache_bytes=200_000))
    assert reader.transports == ("shm", "rpc", "shm", "shm")
    assert reader.record_caches[1] is None
    reader._cache_bytes = 400_000  # the others have all of it
    assert reader._session._fail_over(reader._connections[1], TransportError("gone", shard=1), True, set()) is not None
    assert reader.transports == ("shm",) * 4
    assert reader.record_caches[1] is not None
    assert reader.search(queries, k=10, ef=48).coverage == 1.0


def test_nothing_is_asked_of_a_closed_cluster(
    paths: list[Path], shards: list[Shard], queries: Floats, stack: ExitStack
) -> None:
    servers = [serve(stack, paths, shards, number) for number in range(N_SHARDS)]
    reader = cotra_rdma.connect([server.address for server in servers], transport="shm")
    lose(reader, 1)
    reader.close()
    for call in (reader.search, reader.walk, reader.homes, lambda _: reader.revive()):
        with pytest.raises(ClosedError, match="the cluster is closed"):
            call(queries)
    reader.close()


def test_a_close_that_was_interrupted_is_done_by_the_next(
    paths: list[Path], shards: list[Shard], stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers = [serve(stack, paths, shards, number) for number in range(N_SHARDS)]
    reader = cotra_rdma.connect([server.address for server in servers], transport="shm")

    def interrupted() -> None:
        raise KeyboardInterrupt

    with reader._searching(1):
        monkeypatch.setattr(reader._idle, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            reader.close()
        monkeypatch.undo()
    assert reader._session.replicas is not None
    assert not reader._session.replicas._closed
    reader.close()
    assert reader._session.replicas._closed


@pytest.mark.parametrize("n_threads", [2, 4])
def test_searches_that_share_threads_do_not_wait_for_each_other(
    paths: list[Path],
    shards: list[Shard],
    queries: Floats,
    stack: ExitStack,
    monkeypatch: pytest.MonkeyPatch,
    n_threads: int,
) -> None:
    """More parts of searches than threads, and each part asks several owners at once."""
    monkeypatch.setattr(threads_module, "MAX_THREADS", 4)
    servers = [serve(stack, paths, shards, number) for number in range(N_SHARDS)]
    reader = stack.enter_context(cotra_rdma.connect([server.address for server in servers], transport="rpc"))
    wanted = reader.search(queries, k=10, ef=48)
    found: list[cotra_rdma.SearchResult] = []
    threads = [
        threading.Thread(
            target=lambda: found.append(reader.search(queries, k=10, ef=48, n_threads=n_threads)), daemon=True
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
    assert len(found) == 4
    for result in found:
        np.testing.assert_array_equal(result.ids, wanted.ids)


def test_no_owner_is_tried_twice_in_a_search(
    paths: list[Path], shards: list[Shard], queries: Floats, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that are too slow, and are found well whenever they are looked at: the search ends all the same."""
    servers = [serve(stack, paths, shards, number) for number in range(N_SHARDS)]
    other = serve(stack, paths, shards, 0)
    groups = [[servers[0].address, other.address], *(server.address for server in servers[1:])]
    reader = stack.enter_context(cotra_rdma.connect(groups, transport="rpc"))
    attempts: list[str] = []

    def slowly(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(peer: Connection, *arguments: Any) -> Any:
            if peer.index:
                return real(peer, *arguments)
            attempts.append(peer.address)
            assert len(attempts) < 10
            reader.revive()
            raise cotra_rdma.DeadlineError("too slow", shard=0)

        return call

    for name in ("search", "expand"):
        monkeypatch.setattr(Connection, name, slowly(getattr(Connection, name)))
    for algorithm in ("scatter-gather", "cotra"):
        attempts.clear()
        found = reader.search(queries, k=10, ef=48, algorithm=algorithm, allow_partial=True)
        assert found.missing == (0,)
        assert set(attempts) == set(groups[0])
        assert len(attempts) == 2
        reader.revive()


def test_what_a_failover_leaves_behind(
    paths: list[Path], shards: list[Shard], words: Floats, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard that was read is pushed to: the result says so, and the cost model takes nothing from it."""
    monkeypatch.setattr(replicas_module, "_alike", lambda peers: peers)  # in the order given
    servers = [serve(stack, paths, shards, number) for number in range(N_SHARDS)]
    asked = stack.enter_context(cotra_rdma.serve(shards[0], transports=("rpc",)))
    groups = [[servers[0].address, asked.address], *(server.address for server in servers[1:])]
    reader = stack.enter_context(cotra_rdma.connect(groups))
    peer = reader._connections[0]
    peer._fabric, peer._first = FaultyFabric(fail_after_reads=20, fail_status=-10, fail_wc_status=12), None
    found = reader.search(words[:1500], k=5, ef=16)
    assert found.transports == ("push", "shm", "shm", "shm")
    assert found.coverage == 1.0
    assert found.stats["pushed"].sum() > 0
    assert reader.search(words[:1500], k=5, ef=16, algorithm="auto", explain=True).coverage == 1.0


def test_errors_of_shards_that_are_lost_keep_nothing_alive(
    paths: list[Path], shards: list[Shard], queries: Floats, stack: ExitStack
) -> None:
    servers = [serve(stack, paths, shards, number) for number in range(N_SHARDS)]
    reader = stack.enter_context(cotra_rdma.connect([server.address for server in servers], transport="shm"))
    for shard in range(N_SHARDS):
        lose(reader, shard)

    def depth() -> int:
        with pytest.raises(TransportError, match="gone") as caught:
            reader.search(queries)
        return len(caught.traceback)

    assert depth() == depth() == depth()


def test_a_close_that_was_interrupted_at_its_thread_is_done_by_the_next(
    paths: list[Path], shards: list[Shard], stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers = [serve(stack, paths, shards, number) for number in range(N_SHARDS)]
    reader = cotra_rdma.connect([server.address for server in servers], transport="shm")
    lose(reader, 1)  # starts the thread that looks for owners
    thread = reader._session.upkeep.thread
    assert thread is not None

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(thread, "join", interrupt)
    with pytest.raises(KeyboardInterrupt):
        reader.close()
    monkeypatch.undo()
    view = reader._connections[0].view
    assert view is not None
    assert not view.closed
    reader.close()
    assert view.closed
    assert not thread.is_alive()
