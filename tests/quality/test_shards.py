"""Several shards, each with a graph of its own or linked to one graph, find what one hnswlib index of all rows finds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import hnswlib
import numpy as np
import pytest

import cotra_rdma
from cotra_rdma import Cluster, Shard
from cotra_rdma._build.collection import build_collection
from cotra_rdma._collection.manifest import shard_paths
from cotra_rdma.datasets import open_vectors
from quality import families
from quality.families import Family
from quality.measure import Truth, ask_hnswlib, build_graph

MARGIN = 0.01 + 1e-9
N_SHARDS = 3


@pytest.fixture(scope="module", params=["clusters-32d", "ip-queries-x0.1-64d", "embeddings-384d"])
def family(request: pytest.FixtureRequest) -> Family:
    return families.make(request.param)


@pytest.fixture(scope="module")
def index(family: Family) -> hnswlib.Index:
    return build_graph(family)


@pytest.fixture(scope="module")
def truth(family: Family) -> Truth:
    return Truth.of(family, 100)


@pytest.fixture(scope="module", params=["independent", "global"])
def cluster(
    request: pytest.FixtureRequest, family: Family, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    directory = tmp_path_factory.mktemp("shards")
    np.save(directory / "base.npy", family.base)
    with open_vectors(directory / "base.npy") as vectors:
        build_collection(vectors, directory / "index", N_SHARDS, metric=family.metric, graph=request.param, n_threads=1)
    with ExitStack() as stack:
        shards = [stack.enter_context(Shard.open(path)) for path in shard_paths([directory / "index"])]
        cluster = stack.enter_context(cotra_rdma.connect(shards))
        assert cluster.one_graph == (request.param == "global")
        yield cluster


@pytest.mark.parametrize(("k", "ef"), [(10, 16), (10, 64), (10, 256), (10, 10), (100, 100)])
def test_recall_at_equal_ef(
    cluster: Cluster, family: Family, index: hnswlib.Index, truth: Truth, k: int, ef: int
) -> None:
    theirs = truth.recall(ask_hnswlib(index, family.queries, k, ef), k)
    ours = truth.recall(cluster.search(family.queries, k, ef).ids, k)
    assert ours >= theirs - MARGIN


def test_recall_goes_to_that_of_one_graph(cluster: Cluster, family: Family, index: hnswlib.Index, truth: Truth) -> None:
    theirs = truth.recall(ask_hnswlib(index, family.queries, 10, 1024), 10)
    ours = truth.recall(cluster.search(family.queries, 10, 1024).ids, 10)
    assert ours >= 0.999 * theirs
