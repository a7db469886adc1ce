"""Owners that take a shard over and offer less than the one before, and engines over owners that are not used any more."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import cotra_rdma
from cotra_rdma import Cluster
from cotra_rdma._build.collection import build_collection
from cotra_rdma._collection.manifest import shard_paths
from cotra_rdma._owner.child_process import OwnerProcess
from cotra_rdma._reader import replicas
from cotra_rdma.datasets import open_vectors
from helpers.faults import FaultyFabric

Floats = npt.NDArray[np.float32]
N = 2000
LOSSY = FaultyFabric(fail_after_reads=150, fail_status=-10, fail_wc_status=12)


@pytest.fixture(scope="module")
def paths(words: Floats, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """2,000 words in two shards, with a graph and inverted lists each."""
    directory = tmp_path_factory.mktemp("lesser")
    np.save(directory / "base.npy", words[:N])
    with open_vectors(directory / "base.npy") as file:
        build_collection(
            file, directory / "index", 2, metric="cosine", M=8, ef_construction=60, n_lists=20, n_threads=1
        )
    return shard_paths([directory / "index"])


@pytest.fixture(scope="module")
def groups(paths: list[Path]) -> Iterator[list[list[str]]]:
    """Of each shard an owner whose memory can be read, and one that can only be asked."""
    with OwnerProcess(paths, transports=("shm", "rpc")) as one, OwnerProcess(paths, transports=("rpc",)) as other:
        yield [list(pair) for pair in zip(one.addresses, other.addresses, strict=True)]


@pytest.fixture(autouse=True)
def as_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first owner that is given is the first that is used."""
    monkeypatch.setattr(replicas, "_alike", list)


def break_channels(cluster: Cluster, *shards: int) -> None:
    for shard in shards:
        peer = cluster._connections[shard]
        peer._fabric, peer._first = LOSSY, None
        cluster._session.engines.drop(peer)


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("broken", [(1,), (0, 1)])
def test_a_graph_of_its_own_is_asked_for_where_its_owner_can_only_be_asked(
    groups: list[list[str]], queries: Floats, n_threads: int, broken: tuple[int, ...]
) -> None:
    with cotra_rdma.connect(groups) as cluster:
        wanted = cluster.search(queries, k=10, ef=48)
        assert wanted.transports == ("shm", "shm")
        break_channels(cluster, *broken)
        for _ in range(2):
            found = cluster.search(queries, k=10, ef=48, n_threads=n_threads)
            np.testing.assert_array_equal(found.ids, wanted.ids)
            assert found.coverage == 1.0
            assert found.transports == tuple("rpc" if shard in broken else "shm" for shard in range(2))


def test_inverted_lists_of_an_owner_that_can_only_be_asked(groups: list[list[str]], queries: Floats) -> None:
    with cotra_rdma.connect(groups) as cluster:
        wanted = cluster.search(queries, k=10, ef=16, algorithm="spire")
        break_channels(cluster, 1)
        found = cluster.search(queries, k=10, ef=16, algorithm="spire")
        assert found.transports == ("shm", "rpc")
        assert found.coverage == 1.0
        same = sum(len(set(a) & set(b)) for a, b in zip(found.ids.tolist(), wanted.ids.tolist(), strict=True))
        assert same > 0.8 * wanted.ids.size  # the owner searched its graph


def test_an_engine_in_use_is_not_kept_when_its_owner_is_dropped_meanwhile(
    groups: list[list[str]], queries: Floats
) -> None:
    with cotra_rdma.connect(groups, transport="shm") as cluster:
        cluster.search(queries[:5], k=5)
        peers, pool, n_open = list(cluster._connections), cluster._session.engines, len(os.listdir("/proc/self/fd"))
        engines = pool._take(peers, frozenset())  # as a search of another thread does
        pool.drop(peers[1])
        pool._give_back(peers, frozenset(), engines)
        assert not any(pool._idle.values())
        assert len(os.listdir("/proc/self/fd")) <= n_open
