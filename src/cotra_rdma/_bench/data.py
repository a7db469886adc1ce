"""The data sets of `cotra bench`: vectors, queries, and what the right answers are."""

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
"""bool[n]: the vectors of a data set that a filter lets through."""

FILTER_SEED = 12
STREAM_SEED = 14
BLOCK_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class DataSet:
    """Vectors, queries float32[n, dim], and the ids of each query's nearest vectors, nearest first: int64[n, >= k]."""

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
            stem: an ann-benchmarks HDF5 file, or DIR/NAME of NAME_base.npy, NAME_queries.npy and NAME_gt.npy.
            base, queries, ground_truth: files that take the place of the stem's.
            metric: None: the file's own, else the one that the ground truth is sorted by.

        Raises:
            InvalidInputError: parts are missing or do not fit each other, or the ground truth is of another metric.
            FormatError, OSError: as `open_vectors`.
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
                "these do not belong together"
            )
        if truth.min() < 0 or truth.max() >= vectors.count:
            raise InvalidInputError(f"{ground_truth}: names row {truth.max()} of {vectors.count}")
        fitting = _metrics_of(vectors, wanted, truth)
        metric = metric or vectors.metric or next(iter(fitting), None)
        if metric not in fitting:
            found = " or ".join(fitting) or "none that is known"
            raise InvalidInputError(f"{ground_truth}: is not sorted by {metric or 'any metric'}, but by {found}")
        return cls(Path(stem or base).stem, vectors, wanted, truth, metric)

    def first(self, n: int) -> DataSet:
        """The first n vectors with the same queries, and as many exact neighbours of each as before, n at most.

        Raises `InvalidInputError` where there are fewer than n.
        """
        if n > self.vectors.count:
            raise InvalidInputError(f"{self.name} has {self.vectors.count} vectors, and the first {n} are wanted")
        return self._among(self.vectors.first(n))

    def every(self, step: int) -> DataSet:
        """Every so many-th vector with the same queries, and exact neighbours as of `first`."""
        return self._among(self.vectors.every(step))

    def _among(self, vectors: VectorFile) -> DataSet:
        """The same queries over others of the vectors."""
        truth = nearest(self.metric, self.queries, vectors.read(), min(vectors.count, self.ground_truth.shape[1]))
        return replace(self, vectors=vectors, ground_truth=truth)

    def drawn(self, exponent: float, n: int) -> DataSet:
        """The same vectors with a stream of n queries, drawn from these by Zipf's law. The query of rank r, of a random order,
        comes with a probability in proportion to 1 / r ** exponent; 0: all alike. The same stream whenever it is drawn."""
        generator = np.random.default_rng(STREAM_SEED)
        order = generator.permutation(len(self.queries))
        shares = np.arange(1.0, len(order) + 1) ** -exponent
        drawn = order[generator.choice(len(order), n, p=shares / shares.sum())]
        return replace(self, queries=self.queries[drawn], ground_truth=self.ground_truth[drawn])

    def filtered(self, share: float, k: int) -> tuple[Rows, Ids]:
        """A random filter that lets a share of the vectors through, and each query's k nearest among those."""
        rows = np.random.default_rng(FILTER_SEED).random(self.vectors.count) < share
        (numbers,) = rows.nonzero()
        if len(numbers) < k:
            raise InvalidInputError(f"a filter of {share} lets {len(numbers)} vectors through, and {k} are wanted")
        return rows, numbers[nearest(self.metric, self.queries, self.vectors.read()[rows], k)]

    def digest(self) -> str:
        """Tells these vectors from others of the same name and shape: 16 hexadecimal digits of a hash of all of them."""
        state = hashlib.blake2b(str((self.vectors.shape, self.vectors.dtype.str)).encode(), digest_size=8)
        for chunk in self.vectors.chunks(rows=16384):
            state.update(np.ascontiguousarray(chunk).data)
        return state.hexdigest()


def _metrics_of(vectors: VectorFile, queries: Queries, truth: Ids, sample: int = 20) -> list[str]:
    """The metrics by which the first rows of the ground truth are sorted."""
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
    """Exact distances of one query [dim] to rows [n, dim]: squared l2, 1 - ip, or 1 - cosine, as hnswlib has them."""
    query, rows = query.astype(np.float64), rows.astype(np.float64)
    if metric == "l2":
        return np.asarray(np.square(rows - query).sum(axis=1))
    scale = 1.0 if metric == "ip" else np.linalg.norm(query) * np.linalg.norm(rows, axis=1)
    return np.asarray(1.0 - rows @ query / scale)


def nearest(metric: str, queries: Queries, rows: npt.NDArray[Any], k: int) -> Ids:
    """Rows of the k nearest of each query, nearest first: int64[n_queries, k]. Exact, but for rounding in float64."""
    base = rows.astype(np.float64)
    squares = np.square(base).sum(axis=1)
    if metric == "cosine":
        base /= np.sqrt(np.maximum(squares, np.finfo(float).tiny))[:, np.newaxis]
    found = np.empty((len(queries), k), np.int64)
    step = max(1, BLOCK_BYTES // (8 * len(base)))
    for begin in range(0, len(queries), step):
        products = queries[begin : begin + step].astype(np.float64) @ base.T
        keys = squares - 2 * products if metric == "l2" else -products  # in the order of the distances
        few = np.sort(np.argpartition(keys, k - 1, axis=1)[:, :k], axis=1)
        order = np.argsort(np.take_along_axis(keys, few, 1), axis=1, kind="stable")
        found[begin : begin + step] = np.take_along_axis(few, order, 1)
    return found
