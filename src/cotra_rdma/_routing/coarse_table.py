"""`CoarseTable`: a shard described by its inverted lists, in a few KiB. Compass chooses shards by the coarse tables.

A coarse table is encoded as float16 centroids, uint32 sizes and float32 radii.
Rounding to float16 changes a component by at most 2^-11 of itself, far less than a list's radius.
The tables play the part of the coarse quantiser of an inverted file (Jégou, Douze and Schmid 2011, "Product
quantization
for nearest neighbor search", section IV).
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from cotra_rdma._clustering.kmeans import Clusters, Progress, VectorSource, kmeans
from cotra_rdma._core.constants import METRICS
from cotra_rdma.errors import FormatError, InvalidInputError

N_LISTS = 64
MAX_LISTS = 1 << 16
MAX_DIM = 4096
MIN_LIST_ROWS = 8
"""The least mean number of vectors in a list. A small shard gets fewer lists."""

_MAGIC = b"CTCR"
_VERSION = 1
# magic, version, bytes of a centroid's component (2 or 4), lists, dim; then centroids, sizes u32 and radii f32
_HEADER = struct.Struct("<4sHHII")
_FLOAT16_MAX = 65_504.0
_FLOAT16_MIN = 2.0**-14  # below it, float16 loses bits
_MAX_SCALE = 1e15


@dataclass(frozen=True, slots=True, eq=False)
class CoarseTable:
    """The lists of one shard.

    Attributes:
        centroids: float32[n_lists, dim]. For cosine, they are means of normalised vectors.
        sizes: the number of vectors in each list, int64[n_lists].
        radii: the root of the mean squared distance of each list's vectors to their centroid, float32[n_lists].

    Raises:
        FormatError: shapes do not fit each other, or a number is NaN, infinite or out of its range.
    """

    centroids: npt.NDArray[np.float32]
    sizes: npt.NDArray[np.int64]
    radii: npt.NDArray[np.float32]

    def __post_init__(self) -> None:
        shape = np.shape(self.centroids)
        if len(shape) != 2 or not 1 <= shape[0] <= MAX_LISTS or not 1 <= shape[1] <= MAX_DIM:
            raise FormatError(f"coarse table: centroids must be [1-{MAX_LISTS}, 1-{MAX_DIM}], not {list(shape)}")
        for name, dtype in (("centroids", np.float32), ("sizes", np.int64), ("radii", np.float32)):
            field = getattr(self, name)
            if field.dtype != dtype or len(field) != shape[0] or field.ndim != (2 if name == "centroids" else 1):
                raise FormatError(f"coarse table: {name} are {field.dtype}{list(field.shape)} for {shape[0]} lists")
        with np.errstate(invalid="ignore"):
            sane = (np.abs(self.centroids) <= _MAX_SCALE).all() and (
                self.radii <= math.sqrt(MAX_DIM) * _MAX_SCALE
            ).all()
        if not sane or not (self.radii >= 0).all():
            raise FormatError("coarse table: a centroid or a radius is NaN, infinite, negative or too large")
        if (self.sizes < 0).any() or (self.sizes >= 1 << 32).any() or not self.sizes.any():
            raise FormatError("coarse table: the lists' sizes are out of range, or all of them are 0")

    @classmethod
    def build(
        cls,
        vectors: npt.ArrayLike | VectorSource,
        n_lists: int = N_LISTS,
        *,
        metric: str = "l2",
        seed: int = 0,
        n_threads: int = 0,
        progress: Progress | None = None,
    ) -> tuple[Self, Clusters]:
        """Makes the coarse table of a shard.

        Args:
            vectors: the vectors of the shard, [n, dim], as for `kmeans`.
            n_lists: the number of lists. Fewer are made if they would hold less than 8 vectors on average.
            metric: as for `kmeans`.
            seed: as for `kmeans`.
            n_threads: as for `kmeans`.
            progress: as for `kmeans`.

        Returns:
            The table, and the clusters that it was made from.

        Raises:
            InvalidInputError: `n_lists` is out of range, or `kmeans` refuses the vectors.
        """
        if not 1 <= n_lists <= MAX_LISTS:
            raise InvalidInputError(f"n_lists must be in [1, {MAX_LISTS}], not {n_lists}")
        shape = vectors.shape if isinstance(vectors, VectorSource) else np.shape(vectors)
        count = max(1, min(n_lists, shape[0] // MIN_LIST_ROWS)) if shape else 1
        found = kmeans(vectors, count, metric=metric, seed=seed, n_threads=n_threads, progress=progress)
        filled = np.flatnonzero(found.sizes)
        number = np.zeros(count, np.int32)
        number[filled] = np.arange(len(filled))
        if len(filled) < count:
            found = Clusters(
                found.centroids[filled], number[found.assignment], found.sizes[filled], found.radii[filled]
            )
        return cls(found.centroids, found.sizes, found.radii), found

    @property
    def dim(self) -> int:
        """The components of a centroid."""
        return int(self.centroids.shape[1])

    @property
    def count(self) -> int:
        """The number of vectors in the shard."""
        return int(self.sizes.sum())

    def __len__(self) -> int:
        return len(self.sizes)

    def encode(self) -> bytes:
        """Encodes the table as little-endian bytes.

        Centroids are stored as float32 if float16 does not hold the range of the numbers.
        """
        top = np.abs(self.centroids).max()
        narrow = top <= _FLOAT16_MAX and (top == 0 or top >= 64 * _FLOAT16_MIN)
        dtype = "<f2" if narrow else "<f4"
        n_lists, dim = self.centroids.shape
        return b"".join(
            (
                _HEADER.pack(_MAGIC, _VERSION, 2 if narrow else 4, n_lists, dim),
                self.centroids.astype(dtype).tobytes(),
                self.sizes.astype("<u4").tobytes(),
                self.radii.astype("<f4").tobytes(),
            )
        )

    @classmethod
    def decode(cls, data: bytes | bytearray | memoryview) -> Self:
        """Decodes what `encode` made.

        Raises:
            FormatError: the bytes are anything else.
        """
        view = memoryview(data).cast("B")
        if len(view) < _HEADER.size:
            raise FormatError(f"coarse table: {len(view)} bytes are too few for a header of {_HEADER.size}")
        magic, version, width, n_lists, dim = _HEADER.unpack(view[: _HEADER.size])
        if magic != _MAGIC:
            raise FormatError(f"coarse table: the bytes do not begin with {_MAGIC!r}")
        if version != _VERSION or width not in (2, 4):
            raise FormatError(f"coarse table: version {version} with {width}-byte components is unknown")
        if not 1 <= n_lists <= MAX_LISTS or not 1 <= dim <= MAX_DIM:
            raise FormatError(f"coarse table: {n_lists} lists of dimension {dim} are out of range")
        if len(view) != _HEADER.size + n_lists * (dim * width + 8):
            raise FormatError(f"coarse table: {len(view)} bytes do not fit {n_lists} lists of dimension {dim}")
        rows = _HEADER.size + n_lists * dim * width
        centroids = np.frombuffer(view[_HEADER.size : rows], f"<f{width}").reshape(n_lists, dim)
        sizes, radii = np.frombuffer(view[rows:], "<u4", n_lists), np.frombuffer(view[rows + 4 * n_lists :], "<f4")
        return cls(centroids.astype(np.float32), sizes.astype(np.int64), radii.astype(np.float32))


def check_tables(tables: list[CoarseTable], metric: str) -> int:
    """Checks that coarse tables fit each other, and returns their dimension.

    Raises:
        FormatError: the tables are of several dimensions, or there are none.
        InvalidInputError: the metric is unknown.
    """
    if metric not in METRICS:
        raise InvalidInputError(f"metric must be one of {', '.join(METRICS)}, not {metric!r}")
    dims = sorted({table.dim for table in tables})
    if len(dims) != 1:
        raise FormatError(f"coarse tables: all must have the same dimension, and they have {dims or 'none'}")
    return dims[0]
