"""The data sets of `cotra bench`: vectors, queries and exact answers."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cotra_rdma._core.constants import METRICS
from cotra_rdma.datasets import HDF5_SUFFIXES, VectorFile, open_vectors, read_ground_truth, read_queries
from cotra_rdma.errors import InvalidInputError

Ids = npt.NDArray[np.int64]
Queries = npt.NDArray[np.float32]
Rows = npt.NDArray[np.bool_]
"""bool[n], the vectors of a data set that a filter lets through."""

FILTER_SEED = 12
STREAM_SEED = 14
BLOCK_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class DataSet:
    """Vectors, queries, and the nearest vectors of each query.

    Attributes:
        name: what the figures are filed under.
        vectors: the vectors.
        queries: float32[n_queries, dim].
        ground_truth: int64[n_queries, k or more], the ids of each query's nearest vectors, nearest first.
        metric: the metric that the ground truth is sorted by.
    """

    name: str
    vectors: VectorFile
    queries: Queries
    ground_truth: Ids
    metric: str

    @classmethod
    def open(
        cls,
        stem: str | os.PathLike[str] | None = None,
        *,
        base: str | os.PathLike[str] | None = None,
        queries: str | os.PathLike[str] | None = None,
        ground_truth: str | os.PathLike[str] | None = None,
        metric: str | None = None,
    ) -> DataSet:
        """Opens a data set.

        Args:
            stem: an ann-benchmarks HDF5 file, or DIR/NAME for NAME_base.npy, NAME_queries.npy and NAME_gt.npy.
            base: a file of vectors, in place of the stem's.
            queries: a file of queries, in place of the stem's.
            ground_truth: a file of nearest vectors, in place of the stem's.
            metric: the metric. None takes the file's own, or else the one that the ground truth is sorted by.

        Raises:
            InvalidInputError: parts are missing or do not fit each other, or the ground truth is of another metric.
            FormatError: as `open_vectors`.
            OSError: as `open_vectors`.
        """
        if stem is not None:
            hdf5 = Path(stem).suffix.lower() in HDF5_SUFFIXES
            base = base or (stem if hdf5 else f"{os.fspath(stem)}_base.npy")
            queries = queries or (stem if hdf5 else f"{os.fspath(stem)}_queries.npy")
            ground_truth = ground_truth or (stem if hdf5 else f"{os.fspath(stem)}_gt.npy")
        if base is None or queries is None or ground_truth is None:
            raise InvalidInputError("a data set needs a stem, or base, queries and ground truth files")
        vectors, wanted, truth = open_vectors(base), read_queries(queries), read_ground_truth(ground_truth)
        if wanted.shape[1] != vectors.dim or len(truth) != len(wanted):
            raise InvalidInputError(
                f"{base} is {list(vectors.shape)}, {queries} {list(wanted.shape)}, {ground_truth} {list(truth.shape)}: "
                "these files do not belong together"
            )
        if truth.min() < 0 or truth.max() >= vectors.count:
            raise InvalidInputError(f"{ground_truth} names row {truth.max()}, but there are {vectors.count} vectors")
        fitting = _metrics_of(vectors, wanted, truth)
        metric = metric or vectors.metric or next(iter(fitting), None)
        if metric not in fitting:
            found = f", but by {' or '.join(fitting)}" if fitting else ""
            raise InvalidInputError(f"{ground_truth} is not sorted by {metric or 'any known metric'}{found}")
        return cls(Path(stem or base).stem, vectors, wanted, truth, metric)

    def first(self, n: int) -> DataSet:
        """Makes a data set of the first n vectors and the same queries.

        Each query keeps as many exact neighbours as it had, but at most n.

        Raises:
            InvalidInputError: there are fewer than n vectors.
        """
        if n > self.vectors.count:
            raise InvalidInputError(f"{self.name} has {self.vectors.count} vectors, but the first {n} are wanted")
        return self._among(self.vectors.first(n))

    def every(self, step: int) -> DataSet:
        """Makes a data set of every `step`-th vector and the same queries, with exact neighbours as for `first`."""
        return self._among(self.vectors.every(step))

    def _among(self, vectors: VectorFile) -> DataSet:
        """Makes a data set of the same queries and some of the vectors."""
        truth = nearest(self.metric, self.queries, vectors.read(), min(vectors.count, self.ground_truth.shape[1]))
        return replace(self, vectors=vectors, ground_truth=truth)

    def drawn(self, exponent: float, n: int) -> DataSet:
        """Makes a data set of the same vectors and a stream of n queries, which are drawn from these by Zipf's law.

        The queries get ranks in a random order.
        The query of rank r is drawn with a probability in proportion to 1 / r ** exponent, so with 0 all are drawn
        alike.
        Each call draws the same stream.
        """
        generator = np.random.default_rng(STREAM_SEED)
        order = generator.permutation(len(self.queries))
        shares = np.arange(1.0, len(order) + 1) ** -exponent
        drawn = order[generator.choice(len(order), n, p=shares / shares.sum())]
        return replace(self, queries=self.queries[drawn], ground_truth=self.ground_truth[drawn])

    def filtered(self, share: float, k: int) -> tuple[Rows, Ids]:
        """Draws a random filter that lets a share of the vectors through.

        Args:
            share: the share.
            k: how many neighbours to find for each query.

        Returns:
            The filter, and the k nearest vectors of each query among those that it lets through.

        Raises:
            InvalidInputError: it lets fewer than k vectors through.
        """
        rows = np.random.default_rng(FILTER_SEED).random(self.vectors.count) < share
        (numbers,) = rows.nonzero()
        if len(numbers) < k:
            raise InvalidInputError(f"a filter of {share} lets {len(numbers)} vectors through, fewer than k = {k}")
        return rows, numbers[nearest(self.metric, self.queries, self.vectors.read()[rows], k)]

    def digest(self) -> str:
        """Returns 16 hexadecimal digits of a hash of all vectors, which tell them from others of the same name and
        shape.
        """
        state = hashlib.blake2b(str((self.vectors.shape, self.vectors.dtype.str)).encode(), digest_size=8)
        for chunk in self.vectors.chunks(rows=16384):
            state.update(np.ascontiguousarray(chunk).data)
        return state.hexdigest()


def _metrics_of(vectors: VectorFile, queries: Queries, truth: Ids, sample: int = 20) -> list[str]:
    """Returns the metrics by which the first rows of the ground truth are sorted."""
    fitting = []
    for metric in METRICS:
        for query, ids in zip(queries[:sample].astype(np.float64), truth[:sample], strict=True):
            rows = np.stack([vectors.read(row, row + 1)[0] for row in ids]).astype(np.float64)
            gaps = np.diff(distances(metric, query, rows))
            if (gaps < -1e-5 * (1 + np.abs(gaps).max(initial=0))).any():
                break
        else:
            fitting.append(metric)
    return fitting


def distances(metric: str, query: npt.NDArray[Any], rows: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Computes the exact distances of one query to rows.

    Args:
        metric: "l2" for squared distances, "ip" for 1 - inner product, "cosine" for 1 - cosine, as in hnswlib.
        query: [dim].
        rows: [n, dim].

    Returns:
        float64[n].
    """
    query, rows = query.astype(np.float64), rows.astype(np.float64)
    if metric == "l2":
        return np.asarray(np.square(rows - query).sum(axis=1))
    scale = 1.0 if metric == "ip" else np.linalg.norm(query) * np.linalg.norm(rows, axis=1)
    return np.asarray(1.0 - rows @ query / scale)


def nearest(metric: str, queries: Queries, rows: npt.NDArray[Any], k: int) -> Ids:
    """Finds the k nearest rows of each query. The result is exact, but for rounding in float64.

    Args:
        metric: as for `distances`.
        queries: float32[n_queries, dim].
        rows: [n, dim].
        k: how many rows to find.

    Returns:
        The numbers of the rows, nearest first: int64[n_queries, k].
    """
    base = rows.astype(np.float64)
    squares = np.square(base).sum(axis=1)
    if metric == "cosine":
        base /= np.sqrt(np.maximum(squares, np.finfo(float).tiny))[:, np.newaxis]
    found = np.empty((len(queries), k), np.int64)
    step = max(1, BLOCK_BYTES // (8 * len(base)))
    for begin in range(0, len(queries), step):
        products = queries[begin : begin + step].astype(np.float64) @ base.T
        keys = squares - 2 * products if metric == "l2" else -products  # numbers that sort like the distances
        few = np.sort(np.argpartition(keys, k - 1, axis=1)[:, :k], axis=1)
        order = np.argsort(np.take_along_axis(keys, few, 1), axis=1, kind="stable")
        found[begin : begin + step] = np.take_along_axis(few, order, 1)
    return found
