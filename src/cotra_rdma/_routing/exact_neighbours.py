"""Finds the exact neighbours of some vectors, in one pass over the data set."""

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
    vectors: VectorSource,
    rows: Ids,
    k: int,
    metric: str = "l2",
    progress: Progress | None = None,
    *,
    chunk_rows: int | None = None,
) -> Ids:
    """Finds the k nearest vectors to each of some rows, by exact distances. The source is read once, in chunks.

    A row is not its own neighbour, but a copy of it is.

    Args:
        vectors: the data set.
        rows: the rows, int64[n].
        k: the number of neighbours.
        metric: "l2", "ip" or "cosine".
        progress: see `Progress`.
        chunk_rows: the vectors to read at once. None stands for as many as fit into some MiB.

    Returns:
        The rows of the neighbours, int64[n, k].

    Raises:
        InvalidInputError: k is not less than the number of vectors.
    """
    count, _ = vectors.shape
    if not 1 <= k < count:
        raise InvalidInputError(f"{count} vectors have no {k} neighbours each")
    queries = np.concatenate([np.asarray(vectors.read(int(row), int(row) + 1), np.float32) for row in rows])
    return nearest(vectors, queries, rows, k, metric, progress, chunk_rows=chunk_rows)[0]


def nearest(
    vectors: VectorSource,
    queries: Floats,
    own: Ids,
    k: int,
    metric: str = "l2",
    progress: Progress | None = None,
    *,
    chunk_rows: int | None = None,
) -> tuple[Ids, Floats]:
    """Finds the k nearest vectors to each query, by exact distances.

    Args:
        vectors: the data set.
        queries: float32[n, dim].
        own: the row of each query, which is not its own neighbour, int64[n]. -1 if the query is not among the vectors.
        k: the number of neighbours.
        metric: "l2", "ip" or "cosine".
        progress: see `Progress`.
        chunk_rows: the vectors to read at once. None stands for as many as fit into some MiB.

    Returns:
        The rows of the neighbours, int64[n, k], with -1 in places that are left. Values that rank them, float32[n, k],
        which are infinite in those places. Values of one query rank neighbours from several data sets together.
    """
    count, dim = vectors.shape
    centre = np.zeros(dim, np.float32) if metric == "ip" else queries.mean(axis=0)
    queries = (normalised(queries) if metric == "cosine" else queries - centre).astype(np.float32)
    best = np.full((len(queries), k), np.inf, np.float32)
    found = np.full((len(queries), k), -1, np.int64)
    step = chunk_rows or max(256, 4 * CHUNK_FLOATS // max(len(queries), dim))
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
        else:  # few are nearer than the k-th nearest so far
            query, column = np.nonzero(gaps < best[:, -1:])
        _merge_nearest(best, found, query, gaps[query, column], column + start)
        if progress:
            progress(start + len(chunk), count)
    found[np.isinf(best)] = -1
    return found, best


def _merge_nearest(best: Floats, found: Ids, query: Ids, gaps: Floats, ids: Ids) -> None:
    """Merges candidates into the k nearest of each query, in place.

    Args:
        best: the values of the k nearest so far, float32[n, k].
        found: their rows, int64[n, k].
        query: the query of each candidate, int64[c].
        gaps: the value of each candidate, float32[c].
        ids: the row of each candidate, int64[c].
    """
    n, k = best.shape
    query = np.concatenate([np.repeat(np.arange(n), k), query])
    gaps, ids = np.concatenate([best.ravel(), gaps]), np.concatenate([found.ravel(), ids])
    order = np.lexsort((ids, gaps, query))
    first = np.searchsorted(query[order], np.arange(n))
    order = order[(first[:, np.newaxis] + np.arange(k)).ravel()]  # each query has at least k: those from before
    best[:], found[:] = gaps[order].reshape(n, k), ids[order].reshape(n, k)
