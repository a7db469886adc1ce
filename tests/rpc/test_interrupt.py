"""Ctrl-C, deadlines, and readers that go: on every path the search ends, the owners stop, and the next search is right."""

from __future__ import annotations

import json
import logging
import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

import cotra_rdma
from cotra_rdma import (
    Cluster,
    CoTraRdma,
    DeadlineError,
    FabricModel,
    PartialResultError,
    ScatterGather,
    SearchCancelledError,
    Server,
    Shard,
    Stop,
)
from cotra_rdma._build.collection import build_collection
from cotra_rdma._collection.manifest import coarse_of, shard_paths
from cotra_rdma.datasets import open_vectors
from cotra_rdma.protocol.envelope import VShardMessageType
from cotra_rdma.protocol.tables import CentroidTable, CoarseRouteResponse
from helpers.begun import GENEROUS_S, Signaller, heeding_ctrl_c, waited

Floats = npt.NDArray[np.float32]
N, N_SHARDS = 3000, 2
MANY = 20_000  # queries: a minute and more, with this ef
EF = 1024
EXPAND = VShardMessageType.VECTOR_EXPAND_REQUEST
SEARCH = VShardMessageType.VECTOR_SCATTER_REQUEST
COTRA = (sys.executable, "-m", "cotra_rdma.cli")
SLOW = FabricModel(round_trip_s=0.02)


class Served(NamedTuple):
    """A collection whose shards are served here."""

    path: Path
    servers: list[Server]

    @property
    def addresses(self) -> list[str]:
        return [server.address for server in self.servers]

    def is_asked(self) -> bool:
        return any(server.n_at_work for server in self.servers)

    @property
    def n_expanded(self) -> int:
        return sum(server.request_counts.get(EXPAND, 0) for server in self.servers)

    @property
    def n_searches(self) -> int:
        return sum(server.request_counts.get(SEARCH, 0) for server in self.servers)

    def is_idle(self) -> bool:
        return not self.is_asked()


@pytest.fixture(scope="module")
def data(words: Floats, queries: Floats, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with graphs and lists of their own, the same as one graph, and many queries."""
    path = tmp_path_factory.mktemp("interrupt")
    np.save(path / "base.npy", words[:N])
    np.save(path / "many.npy", np.tile(queries, (MANY // len(queries), 1)))
    for name, graph, n_lists in (("own", "independent", 20), ("one", "global", 0)):
        with open_vectors(path / "base.npy") as file:
            build_collection(
                file,
                path / name,
                N_SHARDS,
                metric="cosine",
                M=6,
                ef_construction=40,
                n_threads=1,
                partition="kmeans",
                graph=graph,
                n_lists=n_lists,
            )
    return path


@pytest.fixture(scope="module")
def many(data: Path) -> Floats:
    return np.load(data / "many.npy")


def serve_all(path: Path, stack: ExitStack) -> Served:
    servers = []
    for file in shard_paths([path]):
        found = coarse_of(file)
        assert found is not None
        coarse = CoarseRouteResponse(0, "", CentroidTable.of(found[0], "float16"), found[1]).encode()
        shard = stack.enter_context(Shard.open(file))
        servers.append(stack.enter_context(cotra_rdma.serve(shard, transports=("shm", "rpc"), coarse=coarse)))
    return Served(path, servers)


@pytest.fixture
def own(data: Path) -> Iterator[Served]:
    with ExitStack() as stack:
        yield serve_all(data / "own", stack)


@pytest.fixture
def one(data: Path) -> Iterator[Served]:
    """One graph, whose owners are connected to each other."""
    with ExitStack() as stack:
        served = serve_all(data / "one", stack)
        for server in served.servers:
            server.search_with(stack.enter_context(cotra_rdma.connect(served.addresses)))
        yield served


class Way(NamedTuple):
    """How a search goes."""

    graph: str
    connected: dict[str, Any]
    options: dict[str, Any]
    begun: str = "answers"  # "asks" owners, or has them expand ("pushes")
    times: int = 1  # as many queries, where they are quick

    def has_begun(self, served: Served, stop: Stop) -> Callable[[], bool]:
        """What tells that a search has, from now on."""
        before = served.n_expanded
        if self.begun == "answers":
            return lambda: stop.memory[1] > 0
        return served.is_asked if self.begun == "asks" else lambda: served.n_expanded > before


WAYS = {
    "shm": Way("own", {}, {}),
    "shm, 2 threads": Way("own", {}, {"n_threads": 2}),
    "a slow wire": Way("own", {"fabric": SLOW}, {"ef": 64}),
    "a slow wire, 2 threads": Way("own", {"fabric": SLOW}, {"ef": 64, "n_threads": 2}),
    "spire": Way("own", {}, {"algorithm": "spire", "ef": 20}, times=10),
    "spire on a slow wire": Way("own", {"fabric": SLOW}, {"algorithm": "spire", "ef": 20}),
    "compass": Way("own", {}, {"algorithm": "compass", "ef": 8 * EF}),
    "rpc": Way("own", {"transport": "rpc"}, {}, "asks"),
    "scatter-gather": Way("own", {}, {"algorithm": "scatter-gather"}, "asks"),
    "one graph": Way("one", {}, {}),
    "one graph, 2 threads": Way("one", {}, {"n_threads": 2}),
    "pushed": Way("one", {"transport": "rpc"}, {}, "pushes"),
    "pushed, 2 threads": Way("one", {"transport": "rpc"}, {"n_threads": 2}, "pushes"),
    "home": Way("one", {}, {"algorithm": "home", "ef": 8 * EF}, "asks"),
}


@pytest.fixture
def way(request: pytest.FixtureRequest) -> Iterator[tuple[Way, Served, Cluster]]:
    how = WAYS[request.param]
    served: Served = request.getfixturevalue(how.graph)
    with cotra_rdma.connect(served.addresses, **how.connected) as cluster:
        yield how, served, cluster


def assert_usable(way: tuple[Way, Served, Cluster], queries: Floats, wanted: cotra_rdma.SearchResult) -> None:
    """What is asked afterwards has the answer that it had before, and no owner works for the search that ended."""
    how, served, cluster = way
    waited(served.is_idle)
    found = cluster.search(queries, **how.options | {"ef": 64})
    np.testing.assert_array_equal(found.ids, wanted.ids)
    np.testing.assert_array_equal(found.distances, wanted.distances)


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_ctrl_c(way: tuple[Way, Served, Cluster], queries: Floats, many: Floats) -> None:
    how, served, cluster = way
    few = queries[:20]
    wanted = cluster.search(few, **how.options | {"ef": 64})
    stop, asked = Stop(), np.tile(many, (how.times, 1))
    with Signaller(how.has_begun(served, stop)), pytest.raises(KeyboardInterrupt):
        cluster.search(asked, **{"ef": EF} | how.options, stop=stop)
    assert stop.n_answered < len(asked) / 2
    assert_usable(way, few, wanted)


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_a_deadline(way: tuple[Way, Served, Cluster], queries: Floats, many: Floats) -> None:
    """It bounds the whole, not what is waited for at one time, and nobody works on."""
    how, _, cluster = way
    few = queries[:20]
    wanted = cluster.search(few, **how.options | {"ef": 64})
    stop = Stop()
    some = many[:4000] if how.options.get("algorithm") in ("compass", "home") else np.tile(many, (how.times, 1))
    with pytest.raises((DeadlineError, PartialResultError)) as caught:
        cluster.search(some, **{"ef": EF} | how.options, timeout_s=0.5, stop=stop)
    if isinstance(caught.value, DeadlineError) and caught.value.shard is None:
        assert str(caught.value).startswith("the search was not over within 0.5 s: ")
    assert stop.n_answered < len(some) / 2
    assert_usable(way, few, wanted)


def test_a_search_that_is_in_time(own: Served, queries: Floats) -> None:
    with cotra_rdma.connect(own.addresses) as cluster:
        wanted = cluster.search(queries)
        np.testing.assert_array_equal(cluster.search(queries, timeout_s=GENEROUS_S).ids, wanted.ids)


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_progress(way: tuple[Way, Served, Cluster], queries: Floats, many: Floats) -> None:
    """It goes up to what was asked, is told in the thread that searches, and ends the search by what it raises."""
    how, _, cluster = way
    few = queries[:20]
    wanted = cluster.search(few, **how.options | {"ef": 64})
    told: list[int] = []
    asked = np.tile(many, (how.times, 1))

    def progress(done: int, total: int) -> None:
        assert threading.current_thread() is threading.main_thread()
        assert total == len(asked)
        told.append(done)
        if len(told) == 4:
            raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        cluster.search(asked, **{"ef": EF} | how.options, progress=progress)
    assert told == sorted(told)
    assert 0 <= told[-1] < len(asked) / 2
    assert_usable(way, few, wanted)


@pytest.mark.parametrize("kind", ["search", "whole collection", "seam"])
def test_owners_stop_for_readers_that_are_gone(
    own: Served, one: Served, many: Floats, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """The owner is told of it by the end of the connection alone, and drops the search. All queries are one message: a second's
    work and more."""
    served = one if kind == "whole collection" else own
    program = "import sys, numpy as np, cotra_rdma\nmany = np.load(sys.argv[1])\n"
    if kind == "seam":
        program += "g = cotra_rdma.ScatterGather.connect(sys.argv[2:])\ng.search_sync(many, 10, 10, timeout_s=600)"
    else:
        algorithm = "home" if kind == "whole collection" else "scatter-gather"
        program += "c = cotra_rdma.connect(sys.argv[2:])\n"
        program += f"c.search(many, 10, 10, algorithm={algorithm!r}, timeout_s=600)"
    caplog.set_level(logging.DEBUG, "cotra_rdma.protocol.rpc_server")
    path = served.path.parent / "many.npy"
    with subprocess.Popen([sys.executable, "-c", program, str(path), *served.addresses]) as reader:
        waited(lambda: served.n_searches > 0 and served.is_asked())
        reader.kill()
    waited(lambda: "who asked is gone" in caplog.text)
    waited(served.is_idle)


def test_a_stop_that_another_thread_sets(own: Served, many: Floats) -> None:
    with cotra_rdma.connect(own.addresses) as cluster:
        stop, ends = Stop(), []

        def search() -> None:
            try:
                cluster.search(many, ef=EF, stop=stop, allow_partial=True)
            except SearchCancelledError as error:
                ends.append(error)

        thread = threading.Thread(target=search)
        thread.start()
        waited(lambda: stop.memory[1] > 0)
        stop.set()
        thread.join()
        assert len(ends) == 1
        with pytest.raises(SearchCancelledError):
            cluster.search(many[:1], stop=stop)


def test_a_server_that_is_closed_lets_its_searches_go(own: Served, many: Floats) -> None:
    """Their answers would not be sent any more."""
    failed = []
    with cotra_rdma.connect(own.addresses, transport="rpc") as cluster:

        def search() -> None:
            try:
                cluster.search(many, ef=EF, timeout_s=600)
            except cotra_rdma.TransportError as error:
                failed.append(error)

        thread = threading.Thread(target=search)
        thread.start()
        waited(own.is_asked)
        for server in own.servers:
            server.close()
        thread.join()
    assert len(failed) == 1


def test_ctrl_c_of_the_seams_algorithms(own: Served, queries: Floats, many: Floats) -> None:
    with (
        ScatterGather.connect(own.addresses) as gatherer,
        cotra_rdma.connect([own.addresses[0]]) as near,
        cotra_rdma.connect([own.addresses[0]], transport="rpc") as far,
        CoTraRdma(near) as reads,
        CoTraRdma(far) as asks,
    ):
        wanted = gatherer.search_sync(queries, timeout_s=GENEROUS_S).ids
        with Signaller(own.is_asked), pytest.raises(KeyboardInterrupt):
            gatherer.search_sync(many, 10, EF, timeout_s=600)
        waited(own.is_idle)
        with Signaller(own.is_asked), pytest.raises(KeyboardInterrupt):
            asks.search(many, 10, EF, timeout_s=600)
        waited(own.is_idle)
        with pytest.raises(DeadlineError, match=r"not over within 0.3 s: \d+ of 20000"):
            reads.search(many, 10, EF, timeout_s=0.3)
        np.testing.assert_array_equal(gatherer.search_sync(queries, timeout_s=GENEROUS_S).ids, wanted)


# ---- the command line ----


@pytest.fixture
def heeding() -> Iterator[None]:
    with heeding_ctrl_c():
        yield


@pytest.mark.usefixtures("heeding")
def test_cotra_search_ends_with_130(own: Served, data: Path) -> None:
    command = [*COTRA, "search", *own.addresses, "--queries", str(data / "many.npy"), "--ef", str(EF)]
    for extra, line in (
        (["--transport", "rpc"], "error: interrupted"),
        (["--transport", "rpc", "--json"], "interrupted"),
    ):
        with subprocess.Popen([*command, *extra], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            waited(lambda: own.n_searches > 0 and own.is_asked())
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=GENEROUS_S)
        assert (process.returncode, out) == (130, "")
        assert len(err.splitlines()) == 1
        assert line in err
        if "--json" in extra:
            assert json.loads(err)["error"]["type"] == "KeyboardInterrupt"
        waited(own.is_idle)


@pytest.mark.usefixtures("heeding")
def test_cotra_search_shows_progress_on_a_terminal(own: Served, data: Path) -> None:
    command = [
        *COTRA,
        "search",
        *own.addresses,
        "--queries",
        str(data / "many.npy"),
        "--ef",
        str(EF),
        "--timeout",
        "300",
    ]
    reader, terminal = pty.openpty()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=terminal, env={**os.environ, "TERM": "xterm"})
    os.close(terminal)
    shown = b""
    with process, open(reader, "rb", buffering=0) as screen:
        while b"searching" not in shown or b"/20000" not in shown:
            shown += screen.read(1 << 12)
        process.send_signal(signal.SIGINT)
        try:
            while more := screen.read(1 << 12):
                shown += more
        except OSError:  # a terminal that nobody has open any more
            pass
    assert process.returncode == 130
    assert b"searching" in shown
    assert b"queries/s" in shown
    assert b"interrupted" in shown


@pytest.mark.usefixtures("heeding")
def test_cotra_bench_ends_with_130_and_its_owners_with_it(data: Path, many: Floats, tmp_path: Path) -> None:
    np.save(tmp_path / "gt.npy", np.zeros((len(many), 10), np.int64))
    command = [*COTRA, "bench", "--base", str(data / "base.npy"), "--queries", str(data / "many.npy")]
    command += ["--ground-truth", str(tmp_path / "gt.npy"), "--metric", "cosine", "--ef", str(EF), "--compare", "none"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        waited(lambda: process.poll() is not None or bool(children.read_text().split()))
        owners = [int(pid) for pid in children.read_text().split()]
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=GENEROUS_S)
    assert (process.returncode, out) == (130, ""), err
    assert err == "error: interrupted\n"
    assert owners
    waited(lambda: not any(Path(f"/proc/{pid}").exists() for pid in owners))
