"""The seam's algorithms over verbs, on a collection of four shards in a process of their own."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
from owners import GENEROUS_S, OUT, figure, stopped

import cotra_rdma
from cotra_rdma import TransportError
from cotra_rdma._owner.child_process import OwnerProcess

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
            one_sided = algorithm != "scatter-gather"
            with stopped([collection] if one_sided else []):
                result = far.search(queries, k=K, ef=EF, algorithm=algorithm, timeout_s=GENEROUS_S)
            expected = near.search(queries, k=K, ef=EF, algorithm=algorithm, timeout_s=GENEROUS_S)
            np.testing.assert_array_equal(result.ids, expected.ids)
            assert set(result.transports) == {"verbs" if one_sided else "rpc"}
            assert recall(result.ids, truth) > 0.85
            if algorithm.endswith("spire"):
                assert (result.stats["rounds"] == 2).all()
            figure(
                f"{algorithm} over {result.transports[0]}: recall@10 {recall(result.ids, truth):.3f}, "
                f"{len(queries) / result.elapsed_s:.0f} queries/s, {result.stats['reads'].mean():.1f} READs, "
                f"{result.stats['rounds'].mean():.1f} rounds, {result.stats['read_bytes'].mean() / 1024:.1f} KiB, "
                f"{result.asked.mean():.2f} of 4 shards{', its owner stopped' if one_sided else ''}"
            )


def check_a_stopped_collection_is_searched_one_sided_alone(collection: OwnerProcess, queries: Floats) -> None:
    with cotra_rdma.connect(collection.addresses, transport="verbs") as cluster:
        expected = {name: cluster.search(queries[:20], k=K, ef=EF, algorithm=name).ids for name in ("cotra", "spire")}
        with stopped([collection]):
            for name, ids in expected.items():
                np.testing.assert_array_equal(cluster.search(queries[:20], k=K, ef=EF, algorithm=name).ids, ids)
            with pytest.raises(TransportError):
                cluster.search(queries[:20], k=K, ef=EF, algorithm="scatter-gather", timeout_s=1.0)
            partial = cluster.search(
                queries[:20], k=K, ef=EF, algorithm="scatter-gather", timeout_s=1.0, allow_partial=True
            )
            assert partial.coverage == 0.0
            assert sorted(partial.failures) == [0, 1, 2, 3]
