"""The seam's algorithms over verbs, on a collection of four shards in a process of their own."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
from owners import OUT, figure

import cotra_rdma
from cotra_rdma import TransportError
from cotra_rdma.owner_process import OwnerProcess

Floats = npt.NDArray[np.float32]
K, EF = 10, 24


@pytest.fixture(scope="module")
def collection(host: str, device_name: str) -> Iterator[OwnerProcess]:
    with OwnerProcess([OUT / "collection"], listen=f"{host}:0", device=device_name) as owner:
        owner.wait_ready(120.0)
        yield owner


def nearest(queries: Floats) -> npt.NDArray[np.int64]:
    vectors = np.load(OUT / "small.npy")
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.argsort(-(queries @ vectors.T), axis=1)[:, :K].astype(np.int64)


def recall(found: npt.NDArray[np.int64], truth: npt.NDArray[np.int64]) -> float:
    return float(np.mean([len(set(a) & set(b)) / K for a, b in zip(found.tolist(), truth.tolist(), strict=True)]))


def check_every_algorithm_over_verbs(collection: OwnerProcess, queries: Floats) -> None:
    truth = nearest(queries)
    with (
        cotra_rdma.connect(collection.addresses, transport="verbs") as far,
        cotra_rdma.connect(collection.addresses, transport="shm") as near,
    ):
        for algorithm in ("cotra", "spire", "compass", "compass+spire", "scatter-gather"):
            before = collection.cpu_s()
            result = far.search(queries, k=K, ef=EF, algorithm=algorithm, timeout_s=30.0)
            used = collection.cpu_s() - before
            np.testing.assert_array_equal(
                result.ids, near.search(queries, k=K, ef=EF, algorithm=algorithm, timeout_s=30.0).ids
            )
            one_sided = algorithm != "scatter-gather"
            assert set(result.transports) == {"verbs" if one_sided else "rpc"}
            assert (used < 0.005) == one_sided  # its threads wake up now and then
            assert recall(result.ids, truth) > 0.85
            if algorithm.endswith("spire"):
                assert (result.stats["rounds"] == 2).all()
            figure(
                f"{algorithm} over {result.transports[0]}: recall@10 {recall(result.ids, truth):.3f}, "
                f"{len(queries) / result.elapsed_s:.0f} queries/s, {result.stats['reads'].mean():.1f} READs, "
                f"{result.stats['rounds'].mean():.1f} rounds, {result.stats['read_bytes'].mean() / 1024:.1f} KiB, "
                f"{result.asked.mean():.2f} of 4 shards, owner's CPU {used * 1e6 / len(queries):.0f} us a query"
            )


def check_a_stopped_collection_is_searched_one_sided_alone(collection: OwnerProcess, queries: Floats) -> None:
    with cotra_rdma.connect(collection.addresses, transport="verbs") as cluster:
        expected = {name: cluster.search(queries[:20], k=K, ef=EF, algorithm=name).ids for name in ("cotra", "spire")}
        try:
            os.kill(collection.pid, signal.SIGSTOP)
            assert os.WIFSTOPPED(os.waitpid(collection.pid, os.WUNTRACED)[1])
            before = collection.cpu_s()
            for name, ids in expected.items():
                np.testing.assert_array_equal(cluster.search(queries[:20], k=K, ef=EF, algorithm=name).ids, ids)
            assert collection.cpu_s() == before
            with pytest.raises(TransportError):
                cluster.search(queries[:20], k=K, ef=EF, algorithm="scatter-gather", timeout_s=1.0)
            partial = cluster.search(
                queries[:20], k=K, ef=EF, algorithm="scatter-gather", timeout_s=1.0, allow_partial=True
            )
            assert partial.coverage == 0.0
            assert sorted(partial.failures) == [0, 1, 2, 3]
        finally:
            os.kill(collection.pid, signal.SIGCONT)
