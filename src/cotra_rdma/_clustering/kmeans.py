"""k-means over vectors in memory or in a file.

This is Lloyd's algorithm (Lloyd 1982, "Least squares quantization in PCM"), trained on a sample.
For small k, k-means++ chooses the first centroids (Arthur and Vassilvitskii 2007).
All rows are then assigned to the centroids, a chunk at a time, so that memory holds one chunk and the sample.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from cotra_rdma._core.constants import METRICS
from cotra_rdma._core.exact import products
from cotra_rdma.errors import InvalidInputError

Floats = npt.NDArray[np.float32]
Parts = npt.NDArray[np.int32]
Counts = npt.NDArray[np.int64]

ROWS_PER_CENTROID = 256
"""The most rows of the sample for each centroid."""
MAX_COMPONENT = 1e15
"""The largest component of a vector. The squares of larger ones can overflow float32 when they are summed."""

_MAX_SEEDED = 256  # centroids of k-means++, which looks at every row once for each; more start as random rows
_CHUNK_FLOATS = 1 << 22  # of a chunk's distances, and of its rows
_SAMPLE_CHUNK = 16_384

Progress = Callable[[str, int, int], None]
"""Called as progress("train" | "assign", done, in all)."""


@runtime_checkable
class VectorSource(Protocol):
    """What vectors are read from. `datasets.VectorFile` is one."""

    @property
    def shape(self) -> tuple[int, int]:
        """The number of rows and the components of a vector."""

    def read(self, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """Reads rows [start, stop)."""

    def take(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Reads some rows. They ascend, and none is there twice."""


@dataclass(frozen=True, slots=True)
class Clusters:
    """The result of `kmeans`.

    Attributes:
        centroids: float32[k, dim]. For cosine, they are means of normalised vectors, and not normalised themselves.
        assignment: the nearest centroid of each row, int32[n].
        sizes: the number of rows of each centroid, int64[k]. It is 0 only if there are fewer than k distinct vectors.
        radii: the root of the mean squared distance of each centroid's rows to it, float32[k]. It is 0 without rows.
    """

    centroids: Floats
    assignment: Parts
    sizes: Counts
    radii: Floats


def kmeans(
    vectors: npt.ArrayLike | VectorSource,
    k: int,
    *,
    seed: int = 0,
    n_iterations: int = 12,
    n_threads: int = 0,
    metric: str = "l2",
    progress: Progress | None = None,
) -> Clusters:
    """Clusters vectors around k centroids by squared l2 distance.

    Args:
        vectors: [n, dim] of any real dtype, or a `VectorSource`, which is read in chunks.
        k: the number of centroids, at most n.
        seed: the same seed gives the same clusters.
        n_iterations: the most iterations of Lloyd's algorithm, on a sample of at most 256 k rows. It ends earlier if
            nothing changes any more.
        n_threads: the threads that share the chunks, besides those of BLAS. 0 stands for all cores.
        metric: "cosine" normalises the vectors first, and a zero vector stays zero. "l2" and "ip" leave them as they
            are.
        progress: see `Progress`.

    Returns:
        The clusters.

    Raises:
        InvalidInputError: there are no vectors, k is out of range, a vector holds NaN or infinity, or a component is
            beyond 1e15.
    """
    source = Source(vectors, metric)
    if not 1 <= k <= source.count:
        raise InvalidInputError(f"{source.count} vectors cannot make {k} clusters")
    if n_iterations < 0:
        raise InvalidInputError(f"n_iterations must be >= 0, not {n_iterations}")
    generator = np.random.default_rng(seed)
    with ThreadPoolExecutor(thread_count(n_threads)) as pool:
        sample = source.sample(ROWS_PER_CENTROID * k, generator)
        centre = sample.mean(axis=0, dtype=np.float64).astype(np.float32)
        sample -= centre
        centroids = initial_centroids(sample, k, generator)
        for iteration in range(n_iterations):
            moved = _lloyd_step(sample, centroids, pool)
            if progress:
                progress("train", iteration + 1, n_iterations)
            if not moved:
                break
        assignment = np.empty(source.count, np.int32)
        squares = np.zeros(k)
        sizes = np.zeros(k, np.int64)
        for start, chunk in source.chunks(chunk_rows(k, source.dim)):
            chunk -= centre
            nearest, gaps = _nearest(chunk, centroids, pool)
            assignment[start : start + len(chunk)] = nearest
            squares += np.bincount(nearest, gaps, k)
            sizes += np.bincount(nearest, minlength=k)
            if progress:
                progress("assign", start + len(chunk), source.count)
    radii = np.sqrt(squares / np.maximum(sizes, 1)).astype(np.float32)
    return Clusters(centroids + centre, assignment, sizes, radii)


def normalised(rows: npt.ArrayLike) -> Floats:
    """Scales rows to length 1, as float32[n, dim]. A zero row stays zero, as in hnswlib."""
    wide = np.asarray(rows, np.float64)
    unit: Floats = (wide / np.maximum(np.sqrt(np.square(wide).sum(axis=-1, keepdims=True)), 1e-30)).astype(np.float32)
    return unit


@dataclass(frozen=True, slots=True)
class ArraySource:
    """An array as a `VectorSource`. What is read is a view of the array where numpy can make one."""

    rows: npt.NDArray[Any]

    @property
    def shape(self) -> Any:
        """The shape of the array."""
        return self.rows.shape

    def read(self, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """Returns rows [start, stop)."""
        return self.rows[start:stop]

    def take(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Returns some rows."""
        return self.rows[rows]


class Source:
    """Reads vectors as checked float32 chunks, and normalises them for cosine.

    Args:
        vectors: [n, dim] of any real dtype, or a `VectorSource`.
        metric: "l2", "ip" or "cosine".

    Raises:
        InvalidInputError: the metric is unknown, or the vectors are not real numbers of shape [n, dim].
    """

    def __init__(self, vectors: npt.ArrayLike | VectorSource, metric: str) -> None:
        if metric not in METRICS:
            raise InvalidInputError(f"metric must be one of {', '.join(METRICS)}, not {metric!r}")
        if isinstance(vectors, VectorSource):
            self._rows, shape = vectors, tuple(vectors.shape)
        else:
            rows = np.asarray(vectors)
            if rows.dtype.kind not in "fiu":
                raise InvalidInputError(f"vectors must be real numbers, not {rows.dtype}")
            self._rows, shape = ArraySource(rows), rows.shape
        if len(shape) != 2 or not shape[0] or not shape[1]:
            raise InvalidInputError(f"vectors must be [n >= 1, dim >= 1], not {list(shape)}")
        self.count, self.dim = shape
        self._cosine = metric == "cosine"

    def _checked(self, rows: npt.NDArray[Any], numbers: Callable[[int], int]) -> Floats:
        """Converts rows to float32, and refuses those that cannot be clustered.

        Args:
            rows: [n, dim].
            numbers: returns the number of a row, for the error message.
        """
        with np.errstate(over="ignore"):
            part = np.array(rows, np.float32, order="C")
        fine = np.abs(part).max(axis=1) <= MAX_COMPONENT
        if not fine.all():
            row = int(np.flatnonzero(~fine)[0])
            what = "a component beyond 1e15" if np.isfinite(part[row]).all() else "NaN or infinity"
            raise InvalidInputError(f"vector {numbers(row)} holds {what}")
        return normalised(part) if self._cosine else part

    def chunks(self, rows: int) -> Iterator[tuple[int, Floats]]:
        """Yields (first row, float32[<= rows, dim]). The caller may change the array."""
        for start in range(0, self.count, rows):
            stop = min(start + rows, self.count)
            yield start, self._checked(self._rows.read(start, stop), partial(operator.add, start))

    def sample(self, rows: int, generator: np.random.Generator) -> Floats:
        """Draws at most so many rows, without replacement, in random order."""
        if rows >= self.count:
            wanted = np.arange(self.count)
        else:
            wanted = np.sort(generator.choice(self.count, rows, replace=False, shuffle=False))
        found = np.empty((len(wanted), self.dim), np.float32)
        for start in range(0, len(wanted), _SAMPLE_CHUNK):
            here = wanted[start : start + _SAMPLE_CHUNK]
            found[start : start + len(here)] = self._checked(self._rows.take(here), here.__getitem__)
        generator.shuffle(found, axis=0)
        return found


def thread_count(n_threads: int) -> int:
    """Returns the number of threads that `n_threads` stands for. 0 stands for all cores.

    Raises:
        InvalidInputError: the number is negative.
    """
    if n_threads < 0:
        raise InvalidInputError(f"n_threads must be >= 0, not {n_threads}")
    return n_threads or len(os.sched_getaffinity(0))


def chunk_rows(k: int, dim: int) -> int:
    """Returns the number of rows to compare with k centroids at once."""
    return max(256, _CHUNK_FLOATS // max(k, dim))


def _pieces(rows: Floats, k: int) -> list[Floats]:
    """Splits rows into pieces, one for each task of a thread."""
    step = chunk_rows(k, rows.shape[1]) // 4
    return [rows[start : start + step] for start in range(0, len(rows), step)]


def _nearest(rows: Floats, centroids: Floats, pool: ThreadPoolExecutor) -> tuple[Parts, Floats]:
    """Returns the nearest centroid of each row, int32[n], and its squared distance, float32[n]."""
    half = np.square(centroids).sum(axis=1) / 2

    def of(piece: Floats) -> tuple[Parts, Floats]:
        scores = products(piece, centroids).astype(np.float32)
        scores -= half
        best = scores.argmax(axis=1)
        gaps = np.square(piece).sum(axis=1) - 2 * scores[np.arange(len(piece)), best]
        return best.astype(np.int32), np.maximum(gaps, 0)

    found = list(pool.map(of, _pieces(rows, len(centroids))))
    return np.concatenate([best for best, _ in found]), np.concatenate([gaps for _, gaps in found])


def squared_distances(rows: Floats, centroids: Floats, pool: ThreadPoolExecutor) -> Floats:
    """Returns the squared distance of each row to each centroid, float32[n, k]."""
    squares = np.square(centroids).sum(axis=1)

    def of(piece: Floats) -> Floats:
        found = products(piece, centroids).astype(np.float32)
        found *= -2
        found += squares
        found += np.square(piece).sum(axis=1)[:, np.newaxis]
        np.maximum(found, 0, out=found)
        return found

    return np.concatenate(list(pool.map(of, _pieces(rows, len(centroids)))))


def initial_centroids(sample: Floats, k: int, generator: np.random.Generator) -> Floats:
    """Chooses k rows of the sample.

    For small k, each row is drawn with a chance in proportion to its squared distance from those before it (k-means++).
    """
    if k > _MAX_SEEDED:
        return sample[:k].copy()
    centroids = np.empty((k, sample.shape[1]), np.float32)
    gaps = np.full(len(sample), np.inf, np.float32)
    row = 0  # the sample is shuffled
    for number in range(k):
        centroids[number] = sample[row]
        np.minimum(gaps, np.square(sample - sample[row]).sum(axis=1), out=gaps)
        reached = np.cumsum(gaps, dtype=np.float64)
        if reached[-1] <= 0:  # fewer distinct vectors than centroids
            centroids[number + 1 :] = sample[row]
            break
        row = min(int(np.searchsorted(reached, generator.random() * reached[-1], side="right")), len(sample) - 1)
    return centroids


def _lloyd_step(sample: Floats, centroids: Floats, pool: ThreadPoolExecutor) -> bool:
    """Moves the centroids, and returns whether any of them moved."""
    nearest, gaps = _nearest(sample, centroids, pool)
    return move_centroids(sample, nearest, gaps, centroids)


def move_centroids(sample: Floats, part: Parts, gaps: Floats, centroids: Floats) -> bool:
    """Moves each centroid to the mean of its rows. An empty one takes the row that is farthest from its own centroid.

    Args:
        sample: float32[n, dim].
        part: the centroid of each row, int32[n].
        gaps: the squared distance of each row to its centroid, float32[n].
        centroids: float32[k, dim], which is changed.

    Returns:
        Whether any centroid moved.
    """
    k = len(centroids)
    sizes = np.bincount(part, minlength=k)
    filled = np.flatnonzero(sizes)
    order = np.argsort(part, kind="stable")
    starts = np.concatenate([[0], np.cumsum(sizes[filled])[:-1]])
    sums = np.add.reduceat(sample[order], starts, axis=0, dtype=np.float64)
    old = centroids.copy()
    centroids[filled] = sums / sizes[filled, np.newaxis]
    empty = np.flatnonzero(sizes == 0)
    if len(empty):
        farthest = np.argsort(-gaps, kind="stable")[: len(empty)]
        farthest = farthest[gaps[farthest] > 0]
        centroids[empty[: len(farthest)]] = sample[farthest]
    return not np.array_equal(old, centroids)
