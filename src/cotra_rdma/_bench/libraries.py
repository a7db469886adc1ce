"""The other libraries that `cotra bench` measures, in this process: hnswlib, faiss, usearch and rabitqlib.

All get the same M, ef_construction, metric, threads and float32 vectors.
Each library's graph has 2 M links a node.
The graph of rabitqlib is SymphonyQG's; the others are HNSW graphs, with 2 M links on level 0.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cotra_rdma._bench.data import DataSet, Queries, Rows
from cotra_rdma._bench.runner import Answer, Plan, Setting
from cotra_rdma.errors import InvalidInputError

SEED = 100
PACKAGES = {"hnswlib": "hnswlib", "faiss": "faiss-cpu", "usearch": "usearch", "rabitqlib": "rabitqlib"}
"""The name of each library's module, and the name that pip knows it by."""

SYMQG_LEAST_DIM = 64
"""The least dimension of rabitqlib's SymqgIndex."""
SYMQG_BLOCK = 32
"""The links of a node in SymqgIndex are a multiple of this."""

Progress = Callable[[str, int, int], None]
"""Called with what is built, the vectors that are done, and the number of vectors."""


class _Library:
    """The properties that all libraries share: a graph in this process's memory, which is searched directly."""

    transport = None
    algorithm = None
    n_shards = 1
    beams = False
    inflights = False
    cache_bytes = None
    rtt_s = 0.0
    zero_rtt = None

    def forget(self) -> None:
        """Does nothing: a library has no cache of records."""

    def owner_cpu_s(self) -> float | None:
        """Returns None: there is no owner."""
        return None

    def close(self) -> None:
        """Does nothing."""


class Hnswlib(_Library):
    """hnswlib's Index."""

    name = "hnswlib"

    def __init__(self, data: DataSet, plan: Plan, path: Path, progress: Progress) -> None:
        hnswlib = load("hnswlib")
        self._index = hnswlib.Index(space=data.metric, dim=data.vectors.dim)
        if path.exists():
            self._index.load_index(str(path))
            return
        self._index.init_index(data.vectors.count, ef_construction=plan.ef_construction, M=plan.M, random_seed=SEED)
        done = 0
        for chunk in data.vectors.chunks(rows=4096):
            self._index.add_items(np.asarray(chunk, np.float32), np.arange(done, done + len(chunk)))
            done += len(chunk)
            progress("hnswlib", done, data.vectors.count)
        _save(path, self._index.save_index)

    def search(self, queries: Queries, setting: Setting, rows: Rows | None = None) -> Answer:
        """Searches as `System.search` does."""
        self._index.set_ef(setting.ef)
        through = None if rows is None else rows.__getitem__
        ids, _ = self._index.knn_query(queries, setting.k, num_threads=setting.n_threads, filter=through)
        return Answer(ids.astype(np.int64))


class Faiss(_Library):
    """faiss's IndexHNSWFlat. Cosine is the inner product of normalised vectors."""

    name = "faiss"

    def __init__(self, data: DataSet, plan: Plan, path: Path, progress: Progress) -> None:
        self._faiss = faiss = load("faiss")
        if path.exists():
            self._index = faiss.read_index(str(path))
            return
        metric = faiss.METRIC_L2 if data.metric == "l2" else faiss.METRIC_INNER_PRODUCT
        self._index = faiss.IndexHNSWFlat(data.vectors.dim, plan.M, metric)
        self._index.hnsw.efConstruction = plan.ef_construction
        faiss.omp_set_num_threads(usable_cores())
        progress("faiss", 0, data.vectors.count)
        self._index.add(_float32(data))
        _save(path, lambda part: faiss.write_index(self._index, part))

    def search(self, queries: Queries, setting: Setting, rows: Rows | None = None) -> Answer:
        """Searches as `System.search` does, without a filter."""
        assert rows is None
        self._faiss.omp_set_num_threads(min(setting.n_threads, len(queries)))
        self._index.hnsw.efSearch = setting.ef
        return Answer(self._index.search(queries, setting.k)[1])


class Usearch(_Library):
    """usearch's Index. Cosine is the inner product of normalised vectors."""

    name = "usearch"

    def __init__(self, data: DataSet, plan: Plan, path: Path, progress: Progress) -> None:
        self._index = load("usearch.index").Index(
            ndim=data.vectors.dim,
            metric="l2sq" if data.metric == "l2" else "ip",
            dtype="f32",
            connectivity=plan.M,
            expansion_add=plan.ef_construction,
        )
        if path.exists():
            self._index.load(str(path))
            return
        progress("usearch", 0, data.vectors.count)
        self._index.add(np.arange(data.vectors.count), _float32(data), threads=usable_cores())
        _save(path, self._index.save)

    def search(self, queries: Queries, setting: Setting, rows: Rows | None = None) -> Answer:
        """Searches as `System.search` does, without a filter."""
        assert rows is None
        self._index.expansion_search = setting.ef
        found = self._index.search(queries, setting.k, threads=min(setting.n_threads, len(queries)))
        return Answer(np.asarray(found.keys).astype(np.int64).reshape(len(queries), -1))


class Rabitqlib(_Library):
    """rabitqlib's SymqgIndex, by the authors of SymphonyQG. Cosine is the inner product of normalised vectors.

    The library has two equal calls for a search; `search` is used, for a batch and for one query.
    Each build has another seed.
    """

    name = "rabitqlib"

    def __init__(self, data: DataSet, plan: Plan, path: Path, progress: Progress) -> None:
        symqg, degree, count = load("rabitqlib").SymqgIndex, 2 * plan.M, data.vectors.count
        if count <= degree:
            raise InvalidInputError(f"rabitqlib needs more than 2 M = {degree} vectors, not {count}")
        self._padding = max(0, SYMQG_LEAST_DIM - data.vectors.dim)
        if path.exists():
            self._index = symqg.load(str(path))
            return
        dim = data.vectors.dim + self._padding
        self._index = symqg(dim, degree, metric="l2" if data.metric == "l2" else "ip")
        progress("rabitqlib", 0, count)
        self._index.build(self._padded(_float32(data)), plan.ef_construction, num_threads=usable_cores())
        _save(path, self._index.save)

    def search(self, queries: Queries, setting: Setting, rows: Rows | None = None) -> Answer:
        """Searches as `System.search` does, without a filter."""
        assert rows is None
        n_threads = min(setting.n_threads, len(queries))
        ids, _ = self._index.search(self._padded(queries), setting.k, setting.ef, num_threads=n_threads)
        return Answer(ids.astype(np.int64))

    def _padded(self, vectors: Queries) -> Queries:
        """Appends as many zeros to vectors as the library needs. They change no distance."""
        return np.pad(vectors, ((0, 0), (0, self._padding))) if self._padding else vectors


LIBRARIES: dict[str, type[Hnswlib] | type[Faiss] | type[Usearch] | type[Rabitqlib]] = {
    "hnswlib": Hnswlib,
    "faiss": Faiss,
    "usearch": Usearch,
    "rabitqlib": Rabitqlib,
}
FILTERED = ("hnswlib",)
"""The libraries that are measured under filters."""


def check_libraries(names: Sequence[str], *, M: int, filtered: bool = False) -> None:
    """Checks libraries before a long build.

    Raises:
        InvalidInputError: a library is not installed, or cannot be measured in this way.
    """
    for name in names:
        load(name)
        if name == "rabitqlib" and 2 * M % SYMQG_BLOCK:
            raise InvalidInputError(
                f"rabitqlib needs a multiple of {SYMQG_BLOCK} links a node, not 2 M = {2 * M}: "
                "leave it out of --compare, or give another --M"
            )
        if filtered and name not in FILTERED:
            raise InvalidInputError(
                f"{name} is measured without filters only: leave it out of --compare, or leave out --filter"
            )


def load(module: str) -> Any:
    """Imports a library.

    Raises:
        InvalidInputError: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            # older SWIG types in faiss make newer versions of Python warn
            warnings.filterwarnings("ignore", "builtin type [Ss]wig.* has no __module__", DeprecationWarning)
            return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise InvalidInputError(f"{name} cannot be imported ({error}): pip install {PACKAGES[name]}") from None


def library_version(name: str) -> str | None:
    """Returns the installed version of a library, by the name of its module, or None if it is not installed."""
    try:
        return metadata.version(PACKAGES.get(name, name))
    except metadata.PackageNotFoundError:
        return None


def _float32(data: DataSet) -> npt.NDArray[np.float32]:
    """Returns all vectors, normalised for cosine."""
    rows = np.array(data.vectors.read(), np.float32)
    if data.metric == "cosine":
        rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return rows


def usable_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _save(path: Path, write: Callable[[str], Any]) -> None:
    """Writes a file as a whole, or not at all."""
    part = path.with_name(f"{path.name}.part")
    write(str(part))
    part.replace(path)
