"""The exact neighbours of some rows among all others, read once in chunks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cotra_rdma._clustering.kmeans import VectorSource, normalised
from cotra_rdma._core.arrays import Floats, Ids
from cotra_rdma._core.exact import products
from cotra_rdma.errors import InvalidInputError

CHUNK_FLOATS = 1 << 20

Progress = Callable[[int, int], None]
"""Called as progress(rows done, rows in all)."""


def exact_neighbours(
    vectors: VectorSource, rows: Ids, k: int, metric: str = "l2", progress: Progress | None = None
) -> Ids:
    """The k nearest of each of some rows among all others, by exact distances: int64[len(rows), k].

    The source is read once, in chunks. A row itself does not count, and copies of it do.

    Raises:
        InvalidInputError: k is not less than the number of vectors.
    """
    count, _ = vectors.shape
    if not 1 <= k < count:
        raise InvalidInputError(f"{count} vectors have no {k} neighbours each")
    queries = np.concatenate([np.asarray(vectors.read(int(row), int(row) + 1), np.float32) for row in rows])
    return nearest(vectors, queries, rows, k, metric, progress)[0]


def nearest(
    vectors: VectorSource, queries: Floats, own: Ids, k: int, metric: str = "l2", progress: Progress | None = None
) -> tuple[Ids, Floats]:
    """The k nearest vectors to each query, by exact distances.

    Args:
        queries: float32[n, dim].
        own: int64[n], the row of each query, which does not count; -1 where it is not among the vectors.

    Returns:
        Rows int64[n, k], -1 where there are fewer, and float32[n, k], which ranks them (infinite where there are fewer), also
        beside those of other vectors for the same queries.
    """
    count, dim = vectors.shape
    centre = np.zeros(dim, np.float32) if metric == "ip" else queries.mean(axis=0)
    queries = (normalised(queries) if metric == "cosine" else queries - centre).astype(np.float32)
    best = np.full((len(queries), k), np.inf, np.float32)
    found = np.full((len(queries), k), -1, np.int64)
    step = max(256, 4 * CHUNK_FLOATS // max(len(queries), dim))
    for start in range(0, count, step):
        chunk = np.asarray(vectors.read(start, min(start + step, count)), np.float32)
        chunk = normalised(chunk) if metric == "cosine" else chunk - centre
        gaps = products(queries, chunk).astype(np.float32)
        gaps *= -2
        if metric != "ip":
            gaps += np.square(chunk).sum(axis=1)
        inside = np.flatnonzero((own >= start) & (own < start + len(chunk)))
        gaps[inside, own[inside] - start] = np.inf
        if not start:
            near = np.argpartition(gaps, min(k, len(chunk)) - 1, axis=1)[:, :k]
            query, column = np.repeat(np.arange(len(queries)), near.shape[1]), near.ravel()
        else:  # few are closer than the k-th so far, and ever fewer
            query, column = np.nonzero(gaps < best[:, -1:])
        _merge_nearest(best, found, query, gaps[query, column], column + start)
        if progress:
            progress(start + len(chunk), count)
    found[np.isinf(best)] = -1
    return found, best


def _merge_nearest(best: Floats, found: Ids, query: Ids, gaps: Floats, ids: Ids) -> None:
    """Takes candidates into the k nearest of each query, in place."""
    n, k = best.shape
    query = np.concatenate([np.repeat(np.arange(n), k), query])
    gaps, ids = np.concatenate([best.ravel(), gaps]), np.concatenate([found.ravel(), ids])
    order = np.lexsort((ids, gaps, query))
    first = np.searchsorted(query[order], np.arange(n))
    order = order[(first[:, np.newaxis] + np.arange(k)).ravel()]  # each query has k at least: those it had
    best[:], found[:] = gaps[order].reshape(n, k), ids[order].reshape(n, k)
