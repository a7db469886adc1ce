"""An estimate's error: as large as its weight says, on any data."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from cotra_rdma import Shard
from cotra_rdma._core.remote_expansion import PUSH_DTYPE
from cotra_rdma._native.channel import Channel
from cotra_rdma._native.view import View

Floats = npt.NDArray[np.float32]
Data = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]
ROWS, QUERIES = 400, 25


def normal(generator: np.random.Generator, dim: int) -> Data:
    return generator.standard_normal((ROWS, dim)), generator.standard_normal((QUERIES, dim))


def clusters(generator: np.random.Generator, dim: int) -> Data:
    """Ten, whose radius is a ten-thousandth of what lies between them; queries are members."""
    centres = generator.standard_normal((10, dim))
    rows = centres[np.arange(ROWS) % 10] + 1e-4 * generator.standard_normal((ROWS, dim))
    return rows, centres[np.arange(QUERIES) % 10] + 1e-4 * generator.standard_normal((QUERIES, dim))


def offset(generator: np.random.Generator, dim: int) -> Data:
    rows, queries = normal(generator, dim)
    return rows + 1000, queries + 1000


def small_queries(generator: np.random.Generator, dim: int) -> Data:
    rows, queries = normal(generator, dim)
    return rows, queries * 1e-3


def lengths(generator: np.random.Generator, dim: int) -> Data:
    rows, queries = normal(generator, dim)
    return rows * generator.lognormal(0, 1.5, (ROWS, 1)), queries


def exact(rows: Floats, query: Floats, metric: str) -> npt.NDArray[np.float64]:
    x, q = rows.astype(np.float64), query.astype(np.float64)
    if metric == "l2":
        return np.square(x - q).sum(axis=1)
    if metric == "cosine":
        x, q = x / np.linalg.norm(x, axis=1, keepdims=True), q / np.linalg.norm(q)
    return 1 - x @ q


def errors(rows: Floats, queries: Floats, metric: str) -> npt.NDArray[np.float64]:
    """Of the estimates of some nodes' neighbours, each over its deviation; without those that float32 cannot tell."""
    found = []
    with (
        Shard.build(rows, metric=metric, M=8, ef_construction=60, n_threads=1) as shard,
        Channel.shm(shard.arena) as channel,
        View.open(channel) as view,
    ):
        for query in queries:
            distances = exact(rows, query, metric)
            nodes = np.argsort(distances)[:: ROWS // 40]  # near and far
            pushes = np.zeros(len(nodes), PUSH_DTYPE)
            pushes["row"], pushes["limit"] = nodes, np.inf
            told = view.expand(shard.arena, query[np.newaxis], pushes)
            wrong = told.estimates - distances[told.numbers]
            scale = np.repeat(np.abs(distances[nodes]), told.found["count"]) + np.abs(distances[told.numbers])
            deviations = 1 / told.weights.astype(np.float64)
            clear = deviations > 1e-6 * (1 + scale if metric != "l2" else scale)
            found.append((wrong / deviations)[clear])
    return np.concatenate(found)


@pytest.mark.parametrize("dim", [16, 64, 100, 384])
@pytest.mark.parametrize(
    ("metric", "data"),
    [
        ("l2", normal),
        ("l2", clusters),
        ("l2", offset),
        ("ip", normal),
        ("ip", small_queries),
        ("ip", lengths),
        ("ip", clusters),
        ("cosine", normal),
        ("cosine", lengths),
    ],
)
def test_errors_are_as_large_as_weights_say(
    metric: str, data: Callable[[np.random.Generator, int], Data], dim: int
) -> None:
    rows, queries = (each.astype(np.float32) for each in data(np.random.default_rng(dim), dim))
    found = errors(rows, queries, metric)
    assert len(found) > 5000
    assert abs(found.mean()) < 0.2
    assert 0.5 < np.sqrt(np.square(found).mean()) < 1.3
    assert (np.abs(found) < 4.5).mean() > 0.999


def test_weights_scale_with_the_query() -> None:
    """For inner products, a shorter query's estimates are as good: errors and deviations are shorter by as much."""
    rows, queries = (each.astype(np.float32) for each in normal(np.random.default_rng(5), 64))
    np.testing.assert_allclose(errors(rows, queries, "ip"), errors(rows, queries * np.float32(2**-8), "ip"), atol=0.05)
