"""Readers of vector files: .npy, .fvecs/.bvecs/.ivecs (corpus-texmex.irisa.fr) and the HDF5 files of ann-benchmarks.

Files are mapped and never loaded as a whole, so they may be larger than memory.
Pages of a mapping are given back as soon as they are read, because they would count as this process's memory.
HDF5 files are read slice by slice.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from cotra_rdma.errors import FormatError

if TYPE_CHECKING:
    import h5py

TEXMEX_TYPES: dict[str, np.dtype[Any]] = {
    ".fvecs": np.dtype("<f4"),
    ".bvecs": np.dtype("u1"),
    ".ivecs": np.dtype("<i4"),
}
HDF5_SUFFIXES = (".hdf5", ".h5")
MAX_DIM = 1 << 20
_TAKEN_ROWS = 16_384

_HDF5_METRICS = {"euclidean": "l2", "l2": "l2", "angular": "cosine", "cosine": "cosine", "ip": "ip", "dot": "ip"}


@dataclass(frozen=True, slots=True)
class VectorFile:
    """The rows of one vector file.

    Attributes:
        path: the file.
        count: the number of rows.
        dim: the components of a row.
        dtype: the type of a component as stored, in this machine's byte order.
        metric: "l2", "ip" or "cosine" if the file says so (HDF5), else None.
        dataset: the name of the data set in an HDF5 file, else None.
    """

    path: Path
    count: int
    dim: int
    dtype: np.dtype[Any]
    metric: str | None
    _rows: Any  # a mapping, or an open HDF5 data set
    _file: h5py.File | None = None
    dataset: str | None = None

    def __len__(self) -> int:
        return self.count

    @property
    def shape(self) -> tuple[int, int]:
        """The number of rows and the components of a row."""
        return self.count, self.dim

    def read(self, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """Copies rows [start, stop) as `dtype`[n, dim].

        Raises:
            FormatError: a row of an .fvecs, .bvecs or .ivecs file has another dimension than the first row.
        """
        return self._copied(self._rows[start : self.count if stop is None else stop], lambda row: start + row)

    def take(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Copies some rows as `dtype`[n, dim].

        Args:
            rows: the rows, int64[n], ascending, each once.

        Raises:
            FormatError: as for `read`.
        """
        if isinstance(self._rows, np.ndarray):
            return self._copied(self._rows[rows], lambda row: int(rows[row]))
        found = np.empty((len(rows), self.dim), self.dtype)
        for start in range(0, self.count, _TAKEN_ROWS):  # HDF5 is slow at single rows
            begin, end = np.searchsorted(rows, (start, start + _TAKEN_ROWS))
            if begin < end:
                found[begin:end] = self.read(start, min(start + _TAKEN_ROWS, self.count))[rows[begin:end] - start]
        return found

    def _copied(self, rows: npt.NDArray[Any], number: Callable[[int], int]) -> npt.NDArray[Any]:
        if rows.dtype.names:
            wrong = np.flatnonzero(rows["dim"] != self.dim)
            if len(wrong):
                row = int(wrong[0])
                dim = rows["dim"][row]
                raise FormatError(f"{self.path}: row {number(row)} has dimension {dim}, and row 0 has {self.dim}")
            rows = rows["row"]
        copy = np.array(rows, self.dtype)
        self._forget()
        return copy

    def _forget(self) -> None:
        """Gives the pages of the mapping back. They are read again when they are needed."""
        mapping: Any = self._rows
        while isinstance(mapping, np.ndarray):
            mapping = mapping.base
        if isinstance(mapping, mmap.mmap):
            mapping.madvise(mmap.MADV_DONTNEED)

    def first(self, n: int) -> VectorFile:
        """Returns the first n rows as a file of their own, n <= count. Rows of an HDF5 file are read into memory."""
        return replace(self, count=n, _rows=self._rows[:n])

    def every(self, step: int) -> VectorFile:
        """Returns rows 0, step, 2 step and so on as a file of their own.

        Such a sample does not depend on how the file is sorted.
        Rows of an HDF5 file are read into memory.
        """
        rows = self._rows[::step]
        return replace(self, count=len(rows), _rows=rows)

    def chunks(self, rows: int) -> Iterator[npt.NDArray[Any]]:
        """Yields all rows, `rows` at a time."""
        for begin in range(0, self.count, rows):
            yield self.read(begin, begin + rows)

    def close(self) -> None:
        """Closes an HDF5 file. The mapping of any other file ends with the object."""
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_vectors(path: str | os.PathLike[str], dataset: str | None = None) -> VectorFile:
    """Opens a file of vectors, of any float dtype or uint8.

    Args:
        path: an .npy, .fvecs, .bvecs, .hdf5 or .h5 file.
        dataset: the data set of an HDF5 file. None stands for "train". It is ignored for other files.

    Returns:
        The open file. Close it, or use it as a context manager.

    Raises:
        FormatError: the file is malformed, truncated, empty, or of another kind.
        OSError: the file cannot be opened.
    """
    file = _open(Path(path), dataset or "train")
    if file.dtype.kind != "f" and file.dtype != np.uint8:
        file.close()
        raise FormatError(f"{path}: vectors must be of a float dtype or uint8, and these are {file.dtype}")
    return file


def read_queries(path: str | os.PathLike[str]) -> npt.NDArray[np.float32]:
    """Reads all vectors of a file as float32[n, dim], C-contiguous. From an HDF5 file, it reads the data set "test".

    Raises:
        FormatError: as for `open_vectors`.
        OSError: as for `open_vectors`.
    """
    with open_vectors(path, "test") as file:
        return np.ascontiguousarray(file.read(), np.float32)


def read_ground_truth(path: str | os.PathLike[str]) -> npt.NDArray[np.int64]:
    """Reads the ids of each query's nearest rows.

    Args:
        path: an .npy file of any integer dtype, an .ivecs file, or an .hdf5 or .h5 file with a data set "neighbors".

    Returns:
        int64[n_queries, k], nearest first.

    Raises:
        FormatError: as for `open_vectors`, or the file holds no integers.
        OSError: as for `open_vectors`.
    """
    with _open(Path(path), "neighbors") as file:
        if file.dtype.kind not in "iu":
            raise FormatError(f"{path}: ground truth must be integer ids, and these are {file.dtype}")
        return np.ascontiguousarray(file.read(), np.int64)


def _open(path: Path, dataset: str) -> VectorFile:
    suffix = path.suffix.lower()
    if suffix == ".npy":
        file = _open_npy(path)
    elif suffix in TEXMEX_TYPES:
        file = _open_texmex(path, TEXMEX_TYPES[suffix])
    elif suffix in HDF5_SUFFIXES:
        file = _open_hdf5(path, dataset)
    else:
        known = ", ".join([".npy", *TEXMEX_TYPES, *HDF5_SUFFIXES])
        raise FormatError(f"{path}: unknown kind of vector file {suffix!r}; known kinds are {known}")
    if not file.count or not file.dim:
        file.close()
        raise FormatError(f"{path}: holds no vectors (shape {list(file.shape)})")
    return file


def _open_npy(path: Path) -> VectorFile:
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:  # numpy's own words on other files advise to unpickle them
        why = "it is no .npy file" if "pickle" in str(error).lower() else str(error)
        raise FormatError(f"{path}: not a whole .npy file: {why}") from error
    if not isinstance(rows, np.ndarray) or rows.ndim != 2 or rows.dtype.names:
        what = f"shape {list(rows.shape)}, {rows.dtype}" if isinstance(rows, np.ndarray) else "an archive of arrays"
        raise FormatError(f"{path}: must hold one array [rows, dim], and holds {what}")
    return VectorFile(path, rows.shape[0], rows.shape[1], rows.dtype.newbyteorder("="), None, rows)


def _open_texmex(path: Path, dtype: np.dtype[Any]) -> VectorFile:
    """Maps a file whose rows are a dimension as int32, then so many numbers, all little-endian."""
    size = path.stat().st_size
    if size < 4:
        raise FormatError(f"{path}: {size} bytes are too few for one row")
    dim = int(np.fromfile(path, "<i4", 1)[0])
    if not 0 < dim <= MAX_DIM:
        raise FormatError(f"{path}: its first row has dimension {dim}: not a {path.suffix} file")
    row = np.dtype([("dim", "<i4"), ("row", dtype, (dim,))])
    if size % row.itemsize:
        raise FormatError(f"{path}: {size} bytes are not whole {dim}-d rows of {row.itemsize} bytes: truncated?")
    rows = np.memmap(path, row, "r")
    return VectorFile(path, len(rows), dim, dtype.newbyteorder("="), None, rows)


def _open_hdf5(path: Path, dataset: str) -> VectorFile:
    import h5py  # costs 0.2 s, and only HDF5 needs it

    path.stat()  # a missing file is an OSError that says so; h5py's would not
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise FormatError(f"{path}: not a whole HDF5 file: {error}") from error
    rows = file.get(dataset)
    problem = None
    if not isinstance(rows, h5py.Dataset):
        problem = f"has no data set {dataset!r}; it has {', '.join(sorted(file)) or 'none'}"
    elif rows.ndim != 2:
        problem = f"its data set {dataset!r} must be [rows, dim], and is {list(rows.shape)}"
    distance = file.attrs.get("distance")
    name = distance.decode() if isinstance(distance, bytes) else distance
    if name is not None and name not in _HDF5_METRICS:
        problem = f"its distance {name!r} is not one of {', '.join(sorted(_HDF5_METRICS))}"
    if problem:
        file.close()
        raise FormatError(f"{path}: {problem}")
    metric = None if name is None else _HDF5_METRICS[name]
    return VectorFile(path, rows.shape[0], rows.shape[1], rows.dtype.newbyteorder("="), metric, rows, file, dataset)


def recall(found: npt.NDArray[np.int64], truth: npt.NDArray[np.int64]) -> float:
    """Computes recall@k: the share of each query's k true nearest that were found, as a mean over the queries.

    Args:
        found: the ids that were found, int64[n, k].
        truth: the true nearest ids, int64[n, >= k], nearest first.
    """
    k = found.shape[1]
    hits = sum(len(np.intersect1d(row, nearest[:k])) for row, nearest in zip(found, truth, strict=True))
    return hits / found.size
