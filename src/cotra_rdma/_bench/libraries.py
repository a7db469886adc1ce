"""Other libraries that `cotra bench` measures beside this package, in this process: hnswlib, faiss, usearch, rabitqlib.

All get the same M, ef_construction, metric, threads and float32 vectors. Each is a graph with 2 M links a node: rabitqlib's
is SymphonyQG's, the others are HNSW graphs with as many on level 0.
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
"""Each library's module, and what pip calls it."""

SYMQG_LEAST_DIM = 64
"""rabitqlib's SymqgIndex takes no vectors with fewer dimensions."""
SYMQG_BLOCK = 32
"""Its nodes have a multiple of so many links."""

Progress = Callable[[str, int, int], None]
"""Called with (what is built, vectors done, vectors in all)."""


class _Library:
    """What the libraries have in common: a graph in this process's memory, searched without anything between."""

    transport = None
    algorithm = None
    n_shards = 1
    beams = False
    inflights = False
    cache_bytes = None
    rtt_s = 0.0
    zero_rtt = None

    def forget(self) -> None:
        """It has no cache of records."""

    def owner_cpu_s(self) -> float | None:
        """None: there is no owner."""
        return None

    def close(self) -> None:
        """Nothing to end."""


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
        """As `System`."""
        self._index.set_ef(setting.ef)
        through = None if rows is None else rows.__getitem__
        ids, _ = self._index.knn_query(queries, setting.k, num_threads=setting.n_threads, filter=through)
        return Answer(ids.astype(np.int64))


class Faiss(_Library):
    """faiss's IndexHNSWFlat; cosine as the inner product of normalised vectors."""

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
        """As `System`, without a filter."""
        assert rows is None
        self._faiss.omp_set_num_threads(min(setting.n_threads, len(queries)))
        self._index.hnsw.efSearch = setting.ef
        return Answer(self._index.search(queries, setting.k)[1])


class Usearch(_Library):
    """usearch's Index; cosine as the inner product of normalised vectors."""

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
        """As `System`, without a filter."""
        assert rows is None
        self._index.expansion_search = setting.ef
        found = self._index.search(queries, setting.k, threads=min(setting.n_threads, len(queries)))
        return Answer(np.asarray(found.keys).astype(np.int64).reshape(len(queries), -1))


class Rabitqlib(_Library):
    """rabitqlib's SymqgIndex, of the authors of SymphonyQG; cosine as the inner product of normalised vectors.

    Of its two equal calls `search` is used, for a batch and for one query. It seeds its builds anew each time.
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
        """As `System`, without a filter."""
        assert rows is None
        n_threads = min(setting.n_threads, len(queries))
        ids, _ = self._index.search(self._padded(queries), setting.k, setting.ef, num_threads=n_threads)
        return Answer(ids.astype(np.int64))

    def _padded(self, vectors: Queries) -> Queries:
        """Vectors with as many zeros as the library needs: they change no distance."""
        return np.pad(vectors, ((0, 0), (0, self._padding))) if self._padding else vectors


LIBRARIES: dict[str, type[Hnswlib] | type[Faiss] | type[Usearch] | type[Rabitqlib]] = {
    "hnswlib": Hnswlib,
    "faiss": Faiss,
    "usearch": Usearch,
    "rabitqlib": Rabitqlib,
}
FILTERED = ("hnswlib",)
"""Those that are measured under filters."""


def check_libraries(names: Sequence[str], *, M: int, filtered: bool = False) -> None:
    """Raises `InvalidInputError` for a library that is not installed or cannot be measured so: before a long build."""
    for name in names:
        load(name)
        if name == "rabitqlib" and 2 * M % SYMQG_BLOCK:
            raise InvalidInputError(
                f"rabitqlib's nodes have a multiple of {SYMQG_BLOCK} links, not 2 M = {2 * M}: "
                "leave it out of --compare, or give another --M"
            )
        if filtered and name not in FILTERED:
            raise InvalidInputError(
                f"{name} is measured without filters only: leave it out of --compare, or leave out --filter"
            )


def load(module: str) -> Any:
    """Imports a library. Raises `InvalidInputError` where it is not installed."""
    try:
        with warnings.catch_warnings():
            # SWIG's own types, in faiss before Python's and SWIG's newer versions agreed
            warnings.filterwarnings("ignore", "builtin type [Ss]wig.* has no __module__", DeprecationWarning)
            return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise InvalidInputError(f"{name} cannot be imported ({error}): pip install {PACKAGES[name]}") from None


def library_version(name: str) -> str | None:
    """The installed version of a library, by its module's name; None where it is not installed."""
    try:
        return metadata.version(PACKAGES.get(name, name))
    except metadata.PackageNotFoundError:
        return None


def _float32(data: DataSet) -> npt.NDArray[np.float32]:
    """All vectors; normalised for cosine."""
    rows = np.array(data.vectors.read(), np.float32)
    if data.metric == "cosine":
        rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return rows


def usable_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _save(path: Path, write: Callable[[str], Any]) -> None:
    """Writes a file whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    write(str(part))
    part.replace(path)
