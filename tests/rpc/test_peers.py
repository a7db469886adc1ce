"""Peers: owners that walk the whole collection for who asks them, from the command line and as `Peering`."""

from __future__ import annotations

import itertools
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import cotra_rdma
from cotra_rdma import FormatError, InvalidInputError, SearchResult, Server, Shard, TransportError
from cotra_rdma._build.collection import build_collection
from cotra_rdma._collection import owners_file as owners
from cotra_rdma._collection.manifest import MANIFEST, Collection, coarse_of, shard_paths
from cotra_rdma._owner.child_process import OwnerProcess
from cotra_rdma._owner.peering import Peering, Walks
from cotra_rdma.cli import demo
from cotra_rdma.datasets import open_vectors
from cotra_rdma.protocol.collection_search import CollectionResponse
from cotra_rdma.protocol.envelope import VShardEnvelope, VShardMessageType, join
from cotra_rdma.protocol.rpc_server import RpcServer
from cotra_rdma.protocol.tables import CentroidTable, CoarseRouteResponse

Floats = npt.NDArray[np.float32]
N, N_SHARDS, N_QUERIES = 2000, 4, 100
HERE = ("shm", "rpc")


def whole(walks: list[str]) -> bool:
    return "lost" not in walks


@pytest.fixture(scope="module")
def built(words: Floats, queries: Floats, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,000 words in four shards of one graph; beside it queries and their exact neighbours."""
    path = tmp_path_factory.mktemp("built")
    np.save(path / "base.npy", words[:N])
    np.save(path / "queries.npy", queries[:N_QUERIES])
    unit = words[:N] / np.linalg.norm(words[:N], axis=1, keepdims=True)
    np.save(path / "gt.npy", np.argsort(-queries[:N_QUERIES] @ unit.T, axis=1)[:, :10])
    with open_vectors(path / "base.npy") as vectors:
        build_collection(
            vectors, path / "index", N_SHARDS, metric="cosine", M=8, ef_construction=60, graph="global", n_threads=1
        )
    return path


@pytest.fixture
def index(built: Path, tmp_path: Path) -> Path:
    """A copy of the collection: who serves it writes into its directory."""
    shutil.copytree(built / "index", tmp_path / "index")
    return tmp_path / "index"


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as parts:
        yield parts


def peer(stack: ExitStack, index: Path, *shards: int, transports: tuple[str, ...] = HERE) -> OwnerProcess:
    """A process that walks the collection, when it found the others."""
    return stack.enter_context(OwnerProcess([index], shards=shards, transports=transports, announce=True, walk=True))


def search(built: Path, *arguments: object, status: int = 0) -> Any:
    command = [sys.executable, "-m", "cotra_rdma.cli", "search", *map(str, arguments), "--json"]
    command += ["--queries", str(built / "queries.npy"), "--ground-truth", str(built / "gt.npy")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == status, done.stderr
    return json.loads(done.stderr if status else done.stdout)


def kill(owner: OwnerProcess) -> None:
    os.kill(owner.pid, signal.SIGKILL)
    owner.close()


def test_peers_from_the_command_line(built: Path, index: Path, tmp_path: Path, stack: ExitStack) -> None:
    """Four processes; a reader sends each query home; then one of them is killed."""
    peers = [peer(stack, index, number) for number in range(N_SHARDS)]
    for number, process in enumerate(peers):
        assert process.wait_walks(whole) == ["own" if at == number else "shm" for at in range(N_SHARDS)]
    read = search(built, index, "--out", tmp_path / "read.npy")
    assert (read["own_per_query"], read["local_share"], read["walked_at_home"]) == (0, 0, None)
    home = search(built, index, "--algorithm", "home", "--out", tmp_path / "home.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "home.npy"), np.load(tmp_path / "read.npy"))
    assert home["transports"] == {process.addresses[0]: "home" for process in peers}
    assert (home["algorithm"], home["walked_at_home"], home["coverage"]) == ("home", N_QUERIES, 1.0)
    assert home["local_share"] > 0.6
    assert home["own_per_query"] > home["cached_records_per_query"] > 0
    assert home["own_per_query"] + home["cached_records_per_query"] + home["reads_per_query"] == pytest.approx(
        read["reads_per_query"]
    )
    kill(peers[1])
    refused = search(built, index, "--algorithm", "home", "--no-allow-partial", status=1)["error"]
    assert refused["shard"] == 1
    lost = search(built, index, "--algorithm", "home", "--out", tmp_path / "lost.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "lost.npy"), np.load(tmp_path / "read.npy"))  # still mapped there
    assert list(lost["transports"].values()) == ["home", "peers", "home", "home"]
    assert list(lost["unreached"]) == ["shard 1"]
    assert (lost["walked_at_home"], lost["coverage"], lost["failures"]) == (N_QUERIES, 1.0, {})


def test_a_peer_that_is_lost_and_comes_back(built: Path, index: Path, stack: ExitStack) -> None:
    """Over RPC its memory goes with it: the others say so, walk without it, and with it again when it is elsewhere."""
    peers = [peer(stack, index, number, transports=("rpc",)) for number in range(N_SHARDS)]
    for number, process in enumerate(peers):
        assert process.wait_walks(whole) == ["own" if at == number else "rpc" for at in range(N_SHARDS)]
    asked = (index, "--algorithm", "home")
    before = search(built, *asked)
    assert (before["coverage"], before["walked_at_home"]) == (1.0, N_QUERIES)
    assert before["pushed_per_query"] > 0
    kill(peers[2])
    during = search(built, *asked)
    assert (during["coverage"], list(during["failures"])) == (0.75, ["shard 2"])
    assert during["walked_at_home"] == N_QUERIES  # by the owners that are left
    assert during["transports"]["shard 2"] == "lost"
    assert 0.4 < during["recall"] < before["recall"]
    left = [process for at, process in enumerate(peers) if at != 2]
    for process in left:
        assert process.wait_walks(lambda walks: walks[2] == "lost")
    back = peer(stack, index, 2, transports=("rpc",))
    for process in [*left, back]:
        process.wait_walks(whole)
    after = search(built, *asked)
    assert (after["recall"], after["coverage"]) == (before["recall"], 1.0)
    assert back.addresses[0] in after["transports"]


@pytest.mark.parametrize("graph", ["global", "independent"])
def test_an_owner_that_was_killed_before_the_search(
    built: Path, index: Path, tmp_path: Path, stack: ExitStack, graph: str
) -> None:
    """One graph is searched without its shard, which is said; shards by themselves are, where that is asked for."""
    if graph == "independent":
        index = tmp_path / "apart"
        with open_vectors(built / "base.npy") as vectors:
            build_collection(vectors, index, 2, metric="cosine", M=4, ef_construction=20, n_threads=1)
    left = stack.enter_context(OwnerProcess([index], shards=[0], transports=("rpc",), announce=True))
    dies = stack.enter_context(OwnerProcess([index], shards=[1], transports=("rpc",), announce=True))
    where = [*left.addresses, *dies.addresses]
    kill(dies)
    alone = () if graph == "global" else ("--allow-partial",)
    n_shards = N_SHARDS if graph == "global" else 2
    for named in ([index], where):  # by their addresses too
        found = search(built, *named, *alone)
        assert found["coverage"] == pytest.approx(1 / (n_shards if named == [index] else 2))
        assert "nobody listens there" in found["failures"]["shard 1"]
        assert found["transports"]["shard 1"] == "lost"
        refused = search(built, *named, *(("--no-allow-partial",) if graph == "global" else ()), status=1)["error"]
        assert refused["shard"] == 1
    command = [
        sys.executable,
        "-m",
        "cotra_rdma.cli",
        "search",
        *where,
        "--queries",
        str(built / "queries.npy"),
        *alone,
    ]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "50% of the shards, without shard 1" in shown.stdout
    warned = "warning: the answer is without shard 1; --no-allow-partial makes that an error" in shown.stderr
    assert warned == (graph == "global")


def test_a_replica_is_the_home_of_a_killed_one(built: Path, index: Path, stack: ExitStack) -> None:
    """And all shards of one process are its own."""
    first, second, replica = (peer(stack, index, *shards) for shards in ((0, 1), (2, 3), (2, 3)))
    assert first.wait_walks(whole) == ["own", "own", "shm", "shm"]
    for process in (second, replica):
        assert process.wait_walks(whole) == ["shm", "shm", "own", "own"]
    before = search(built, index, "--algorithm", "home")
    assert before["local_share"] > 0.75
    kill(second)
    after = search(built, index, "--algorithm", "home")
    assert list(after["transports"]) == [*first.addresses, *replica.addresses]
    assert (after["walked_at_home"], after["coverage"], after["recall"]) == (N_QUERIES, 1.0, before["recall"])


def test_peers_without_a_directory_in_common(built: Path, tmp_path: Path, stack: ExitStack) -> None:
    """Addresses are given; of two owners one is a peer, and the queries of the other are walked by the reader."""
    for name, numbers in (("here", (0, 1)), ("there", (2, 3))):
        (tmp_path / name).mkdir()
        shutil.copy(built / "index" / MANIFEST, tmp_path / name)
        for number in numbers:
            for ending in ("cotra", "coarse"):
                shutil.copy(built / "index" / f"shard-{number:03d}.{ending}", tmp_path / name)
    there = stack.enter_context(OwnerProcess([tmp_path / "there"], shards=(2, 3), transports=HERE))
    any_will_do = ["127.0.0.1:1", "127.0.0.1:1"]
    here = stack.enter_context(
        OwnerProcess(
            [tmp_path / "here"], shards=(0, 1), transports=HERE, walk=True, peers=[*any_will_do, *there.addresses]
        )
    )
    assert here.wait_walks(whole) == ["own", "own", "shm", "shm"]
    found = search(built, *here.addresses, *there.addresses, "--algorithm", "home")
    assert (found["coverage"], found["recall"] > 0.95) == (1.0, True)
    assert list(found["transports"].values()) == ["home", "home", "shm", "shm"]
    assert 0 < found["walked_at_home"] < N_QUERIES
    refused = search(built, *there.addresses, "--algorithm", "home", status=1)["error"]
    assert refused["type"] == "PeerError"


def test_the_demo_loses_an_owner(built: Path, index: Path) -> None:
    """On a smaller collection than its own."""
    vectors = np.load(built / "base.npy")
    rows = list(range(0, N, 20))
    exact = demo._exact(vectors, rows)
    with demo._owners(index) as processes:
        with cotra_rdma.connect(index, transport="shm") as cluster:
            home = demo._at_home(cluster, vectors, rows)
        assert sum(home["queries"]) == len(rows)
        assert home["local_share"] > 0.6
        loss = demo._lose_one(index, processes, vectors, rows, exact)
    before, without, after = loss["recall"]
    assert (loss["coverage"], after) == (0.75, before)
    assert without < before - 0.1


# ---- Peering ----


def serve(stack: ExitStack, index: Path, number: int) -> Server:
    path = shard_paths([index], [number])[0]
    told = coarse_of(path)
    assert told is not None
    coarse = CoarseRouteResponse(0, "", CentroidTable.of(told[0], "float16"), told[1]).encode()
    return stack.enter_context(cotra_rdma.serve(stack.enter_context(Shard.open(path)), transports=HERE, coarse=coarse))


class Told:
    """How a peering walks the shards, as it tells."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Walks] = queue.SimpleQueue()
        self.put = self._queue.put

    def next(self) -> Walks:
        return self._queue.get(timeout=30)


def test_generations_are_not_mixed(built: Path, index: Path, tmp_path: Path, stack: ExitStack) -> None:
    """An owner of a rebuilt collection is no peer of those that serve the one before."""
    shutil.copytree(index, tmp_path / "rebuilt")
    with open_vectors(built / "base.npy") as vectors:
        build_collection(vectors, tmp_path / "rebuilt", N_SHARDS, M=8, ef_construction=60, graph="global", force=True)
    assert Collection.load(tmp_path / "rebuilt").generation == 2
    own, *others = [serve(stack, index, number) for number in range(N_SHARDS)]
    newer = serve(stack, tmp_path / "rebuilt", 1)
    owners.add(index, [(1, newer.address), (2, others[1].address), (3, others[2].address)])
    told = Told()

    def tell(walks: Walks) -> None:
        told.put(walks)
        raise RuntimeError("of who is told: no end of the peering")

    peering = stack.enter_context(Peering(index, halo=0.0, changed=tell))
    peering.start({0: own}, patience_s=0.0)
    assert told.next() == ("own", "lost", "shm", "shm")
    owners.add(index, [(1, others[0].address)])
    assert told.next() == ("own", "shm", "shm", "shm") == peering.walks
    with pytest.raises(FormatError, match=r"shard 0 of .* is served as generation 1, and the manifest has 2"):
        Peering(tmp_path / "rebuilt").start({0: own})


def test_who_comes_first_waits_and_does_not_wait_for_ever(index: Path, queries: Floats, stack: ExitStack) -> None:
    one, two, *_ = servers = [serve(stack, index, number) for number in range(N_SHARDS)]
    reader = stack.enter_context(cotra_rdma.connect([server.address for server in servers], transport="shm"))
    waiting = stack.enter_context(Peering(index, [[one.address], [], ["127.0.0.1:1"], []]))
    waiting.start({1: two}, patience_s=3600.0)
    waiting.look()
    assert waiting.walks == ()
    with pytest.raises(cotra_rdma.PeerError, match="its own shard only"):
        reader.search(queries, algorithm="home")
    told = Told()
    peering = stack.enter_context(Peering(index, [[], [two.address], ["127.0.0.1:1"], []], changed=told.put))
    peering.start({0: one}, patience_s=0.0)
    assert told.next() == ("own", "shm", "lost", "lost")
    found = reader.search(queries, algorithm="home")
    assert found.homes is not None
    assert set(found.homes.tolist()) == {0, -1}  # the others are no peers, and their queries are walked by the reader
    assert found.missing == (2, 3)
    assert isinstance(found.failures[2], cotra_rdma.PeerError)
    peering.close()
    peering.close()
    with pytest.raises(TransportError):
        cotra_rdma.connect([one.address])
    with pytest.raises(cotra_rdma.ClosedError):
        peering.start({0: one})


def test_a_cluster_is_replaced_while_it_is_searched(index: Path, queries: Floats, stack: ExitStack) -> None:
    servers = [serve(stack, index, number) for number in range(N_SHARDS)]
    addresses = [server.address for server in servers]
    reader = stack.enter_context(cotra_rdma.connect(addresses, transport="shm"))
    wanted = reader.search(queries).ids
    clusters = [cotra_rdma.connect(addresses, transport="shm") for _ in range(20)]
    for server in servers:
        server.search_with(clusters[0])
    done = threading.Event()
    searches: list[cotra_rdma.SearchResult] = []

    def search_on() -> None:
        while not done.is_set() or not searches:
            searches.append(reader.search(queries, algorithm="home"))

    with ExitStack() as running:
        thread = threading.Thread(target=search_on)
        thread.start()
        running.callback(thread.join)
        running.callback(done.set)
        for before, after in itertools.pairwise(clusters):
            for server in servers:
                server.search_with(after)
            before.close()
    for found in searches:
        np.testing.assert_array_equal(found.ids, wanted)
        assert (found.homes is not None and (found.homes >= 0).all(), found.coverage) == (True, 1.0)
    for server in servers:
        server.search_with(None)
    clusters[-1].close()


def test_shards_that_one_side_never_reached(index: Path, queries: Floats, stack: ExitStack) -> None:
    """A reader without two shards, and a peer that numbers them as it likes, or is without one too."""
    servers = [serve(stack, index, number) for number in range(N_SHARDS)]
    addresses = [server.address for server in servers]
    every = stack.enter_context(cotra_rdma.connect(addresses, transport="shm"))
    wanted = every.search(queries)
    reader = stack.enter_context(
        cotra_rdma.connect([addresses[0], [], addresses[2], []], transport="shm", allow_partial=True)
    )
    assert (reader.images[1], reader.images[3]) == (0, 0)
    for server in servers:
        server.search_with(every)
    found = reader.search(queries, algorithm="home")
    np.testing.assert_array_equal(found.ids, wanted.ids)
    np.testing.assert_array_equal(found.shards, wanted.shards)
    assert (found.coverage, found.transports) == (1.0, ("home", "peers", "home", "peers"))
    lacking = [[], addresses[2], addresses[1], addresses[0]]
    partial = stack.enter_context(cotra_rdma.connect(lacking, transport="shm", allow_partial=True))
    for server in servers:
        server.search_with(partial)
    found = reader.search(queries, algorithm="home")
    assert (found.missing, found.transports) == ((3,), ("home", "peers", "home", "lost"))
    where = np.full(N, -1)
    for number, server in enumerate(servers):
        where[server.shard.labels()] = number
    np.testing.assert_array_equal(found.shards, where[found.ids])
    other = stack.enter_context(cotra_rdma.connect(addresses[:2], transport="shm"))
    walked = other.search(queries)
    for _ in range(2):  # what other shards hold is no answer here: it walks by itself
        found = other.search(queries, algorithm="home")
        assert_walked_here(found, walked)


def assert_walked_here(found: SearchResult, walked: SearchResult) -> None:
    assert found.homes is not None
    assert (found.homes == -1).all()
    np.testing.assert_array_equal(found.ids, walked.ids)
    np.testing.assert_array_equal(found.shards, walked.shards)
    assert found.coverage == 1.0
    assert "home" not in found.transports


@pytest.mark.parametrize(
    "change",
    [
        lambda told: replace(told, more_stats=b""),
        lambda told: replace(told, shards=told.shards + 100),
        lambda told: replace(told, images=told.images + 1),
        lambda told: replace(told, answer=replace(told.answer, labels=told.answer.labels[:, 1:])),
    ],
    ids=["no stats", "shards that are none", "images that are none", "too few answers"],
)
def test_a_home_that_answers_what_is_none(
    index: Path, queries: Floats, stack: ExitStack, change: Callable[[CollectionResponse], CollectionResponse]
) -> None:
    """Its queries are walked here, and it is asked no more for a while; the others' are walked at home."""
    servers = [serve(stack, index, number) for number in range(N_SHARDS)]
    every = stack.enter_context(cotra_rdma.connect([server.address for server in servers], transport="shm"))
    wanted = every.search(queries)
    asked = []

    def handle(request: VShardEnvelope) -> VShardEnvelope:
        reply = servers[1]._answers.handle(request)
        reply = reply() if callable(reply) else reply  # a search of all shards has a thread of its own
        if request.msg_type == VShardMessageType.VECTOR_SCATTER_REQUEST:
            asked.append(request)
            payload = change(CollectionResponse.decode(join(reply.payload))).encode()
            reply = VShardEnvelope(2, reply.msg_type, 0, 0, 0, payload)
        return reply

    lying = stack.enter_context(RpcServer("127.0.0.1:0", handle))
    addresses = [servers[0].address, lying.address, servers[2].address, servers[3].address]
    reader = stack.enter_context(cotra_rdma.connect(addresses, transport="shm"))
    for server in servers:
        server.search_with(every)
    for _ in range(2):
        found = reader.search(queries, algorithm="home")
        np.testing.assert_array_equal(found.ids, wanted.ids)
        np.testing.assert_array_equal(found.shards, wanted.shards)
        assert found.homes is not None
        assert set(found.homes.tolist()) == {0, 2, 3, -1}
        assert (found.coverage, found.transports) == (1.0, ("home", "shm", "home", "home"))
    assert len(asked) == 1


def test_one_shard_is_left_and_then_none(index: Path, queries: Floats, stack: ExitStack) -> None:
    """Four shards of one graph are that, however many of them have an owner."""
    last, *others = [serve(stack, index, number) for number in range(N_SHARDS)]
    addresses = [server.address for server in (last, *others)]
    every, reader = (stack.enter_context(cotra_rdma.connect(addresses, transport="rpc")) for _ in range(2))
    last.search_with(every)
    for server in others:
        server.close()
    assert reader.search(queries).missing == (1, 2, 3)
    walked = reader.search(queries)
    late = stack.enter_context(cotra_rdma.connect(addresses, transport="rpc", allow_partial=True))
    for cluster in (reader, late):
        assert cluster.one_graph
        for algorithm in ("home", "auto", "scatter-gather"):
            found = cluster.search(queries, algorithm=algorithm, explain=True)
            assert (found.missing, found.coverage) == ((1, 2, 3), 0.25)
            assert (found.shards[found.ids >= 0] == 0).all()
        np.testing.assert_array_equal(cluster.search(queries, algorithm="home").ids, walked.ids)
        assert (cluster.homes(queries) == 0).all()
    last.search_with(None)
    last.close()
    with pytest.raises(TransportError) as plain:
        reader.search(queries)
    for algorithm in ("auto", "home", "scatter-gather", "compass", "spire", "cotra"):
        with pytest.raises(TransportError) as raised:
            reader.search(queries, algorithm=algorithm, explain=True)
        assert str(raised.value) == str(plain.value)
        nothing = reader.search(queries, algorithm=algorithm, explain=True, allow_partial=True)
        assert (nothing.coverage, (nothing.ids == -1).all()) == (0.0, True)
    with pytest.raises(TransportError, match="no shard has an owner"):
        reader.homes(queries)


def test_what_cannot_be_peers(built: Path, tmp_path: Path, words: Floats) -> None:
    with open_vectors(built / "base.npy") as vectors:
        build_collection(vectors, tmp_path / "apart", 2, M=4, ef_construction=20, n_threads=1)
    with pytest.raises(InvalidInputError, match="cotra build --graph global makes one"):
        Peering(tmp_path / "apart")
    with pytest.raises(InvalidInputError, match="owners of 3 shards, and the collection has 4"):
        Peering(built / "index", [[]] * 3)
    with pytest.raises(InvalidInputError, match="halo"):
        Peering(built / "index", halo=-0.5)
    with pytest.raises(FormatError):
        Peering(tmp_path)
    with Shard.open(built / "index" / "shard-001.cotra") as shard, cotra_rdma.serve(shard, transports=HERE) as server:
        with pytest.raises(InvalidInputError, match="there is no shard 4"):
            Peering(built / "index").start({4: server})
        with pytest.raises(FormatError, match=r"shard 0 of .* is served as"):
            Peering(built / "index").start({0: server})
