"""A collection that is built again while it is served: its owners take it up, readers follow, and no search fails."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import cotra_rdma
from cotra_rdma import Cluster, InvalidInputError, OwnerProcess, Shard
from cotra_rdma._build.collection import build_collection
from cotra_rdma._collection.manifest import Collection
from cotra_rdma._owner.server import Server
from cotra_rdma.datasets import open_vectors
from helpers.begun import waited

Floats = npt.NDArray[np.float32]
N = 600


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as parts:
        yield parts


def build(words: Floats, directory: Path, n_shards: int = 2, graph: str = "independent") -> Collection:
    np.save(directory / "base.npy", words)
    with open_vectors(directory / "base.npy") as file:
        return build_collection(
            file,
            directory / "index",
            n_shards,
            metric="cosine",
            M=8,
            ef_construction=40,
            graph=graph,
            n_threads=1,
            force=True,
        )


@pytest.mark.parametrize(("graph", "transports"), [("independent", ("rpc",)), ("global", ("shm", "rpc"))])
def test_no_search_fails(
    words: Floats, tmp_path: Path, stack: ExitStack, graph: str, transports: tuple[str, ...]
) -> None:
    build(words[:N], tmp_path, graph=graph)
    owner = stack.enter_context(OwnerProcess([tmp_path / "index"], transports=transports, announce=True))
    owner.wait_ready()
    cluster = stack.enter_context(cotra_rdma.connect(tmp_path / "index", timeout_s=60))
    old, errors, over = cluster.images, [], threading.Event()
    n_new = 0

    def keep_searching() -> None:
        nonlocal n_new
        while not over.is_set():
            try:
                found = cluster.search(words[:5], k=1)
            except Exception as error:
                errors.append(error)
                return
            n_new += found.images != old
            if (found.ids[:, 0] != np.arange(5)).any() or found.coverage != 1.0:
                errors.append(found)

    thread = threading.Thread(target=keep_searching)
    thread.start()
    # the same words first, and others behind them
    rebuilt = build(np.concatenate([words[:N], words[N : N + 100]]), tmp_path, graph=graph)
    if transports == ("rpc",):
        waited(lambda: n_new > 5 or bool(errors))
    else:  # a reader of mapped memory sees it when it renews its lease
        waited(lambda: (cluster.renew_leases(), n_new > 5 or bool(errors))[1])
    over.set()
    thread.join()
    assert errors == []
    assert cluster.images == tuple(entry.image_checksum for entry in rebuilt.shards)
    assert cluster.search(words[N + 50], k=1).ids.tolist() == [[N + 50]]


def test_sighup(words: Floats, tmp_path: Path, stack: ExitStack) -> None:
    build(words[:N], tmp_path, 1)
    owner = stack.enter_context(OwnerProcess([tmp_path / "index"], transports=("rpc",)))
    cluster = stack.enter_context(cotra_rdma.connect(owner.addresses))
    import os

    os.kill(owner.pid, signal.SIGHUP)  # nothing is new
    assert cluster.search(words[:5], k=1).coverage == 1.0
    build(words[N : 2 * N], tmp_path, 1)
    os.kill(owner.pid, signal.SIGHUP)
    waited(lambda: cluster.search(words[N], k=1).distances[0, 0] < 1e-3)


def test_what_cannot_be_taken_up_is_served_as_before(words: Floats, tmp_path: Path, stack: ExitStack) -> None:
    build(words[:N], tmp_path, 2)
    owner = stack.enter_context(OwnerProcess([tmp_path / "index"], transports=("rpc",)))
    cluster = stack.enter_context(cotra_rdma.connect(owner.addresses))
    old = cluster.images
    build(words[:N, :50].copy(), tmp_path, 1)  # another dim, and one shard less
    assert cluster.search(words[:5], k=1).coverage == 1.0
    assert cluster.images == old


class TestReplace:
    @pytest.fixture
    def shards(self, words: Floats, stack: ExitStack) -> list[Shard]:
        return [
            stack.enter_context(Shard.build(words[begin : begin + N], metric="cosine", generation=1 + begin))
            for begin in (0, N)
        ]

    @pytest.fixture
    def server(self, shards: list[Shard], stack: ExitStack) -> Server:
        return stack.enter_context(cotra_rdma.serve(shards[0], transports=("shm", "rpc")))

    def test_readers_of_both_are_served(
        self, server: Server, shards: list[Shard], words: Floats, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        released: list[str] = []
        early: Cluster = stack.enter_context(cotra_rdma.connect(server.address, "shm"))
        server.replace(shards[1], released=lambda: released.append("old"))
        assert server.shard is shards[1]
        assert early.search(words[0], k=1).distances[0, 0] < 1e-3  # what it has mapped is there still
        late = stack.enter_context(cotra_rdma.connect(server.address, "shm"))
        assert late.search(words[N], k=1).distances[0, 0] < 1e-3
        server._offers.close_retired()
        assert released == []
        server._offers._retired = [(0.0, offer) for _, offer in server._offers._retired]  # as if a lease had passed
        server._offers.close_retired()
        assert released == ["old"]

    def test_another_dim_or_metric(self, server: Server, words: Floats) -> None:
        for other in (Shard.build(words[:50], metric="l2"), Shard.build(words[:50, :7].copy(), metric="cosine")):
            with other, pytest.raises(InvalidInputError, match="in the place of one of cosine"):
                server.replace(other)
