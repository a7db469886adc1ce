"""Builds graphs with hnswlib, and packs hnswlib's indexes into images."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cotra_rdma._clustering.kmeans import ArraySource, VectorSource
from cotra_rdma._core.constants import METRICS, VECTOR_TYPES
from cotra_rdma._core.query_checks import as_array, check_finite
from cotra_rdma._native.arena import Arena, trim_memory
from cotra_rdma._native.image import ImageInfo
from cotra_rdma._native.library import Handle, check, ffi, lib, new_error
from cotra_rdma._shard.list_packer import make_lists
from cotra_rdma._shard.params import BuildParams, check_lists
from cotra_rdma.errors import InvalidInputError, LossyVectorError

if TYPE_CHECKING:
    import hnswlib

Progress = Callable[[str, int, int], None]
"""Called as progress("build" | "link" | "pack", nodes done, nodes in all).

With inverted lists also called as progress("cluster" | "encode", steps or lists done, steps or lists in all).
"""

MIN_DIM, MAX_DIM = 1, 4096
_STATE_TIMEOUT_S = 60.0
_ADD_ROWS = 4096
_ADD_BYTES = 4 << 20  # of rows as float32, at once
_PACK_ROWS = 2048
_SOME_VECTORS = 64


def build_image(
    vectors: npt.ArrayLike | VectorSource,
    params: BuildParams,
    ids: npt.ArrayLike | None = None,
    *,
    generation: int = 1,
    mean: npt.NDArray[np.float32] | None = None,
    progress: Progress | None = None,
) -> Arena:
    """Builds a graph with hnswlib, and packs it. The arguments and errors are those of `Shard.build`.

    Returns:
        An arena that holds the image. It belongs to the caller.
    """
    rows = vectors if isinstance(vectors, VectorSource) else ArraySource(as_array(vectors, "vectors"))
    if len(rows.shape) != 2 or rows.shape[0] == 0 or not MIN_DIM <= rows.shape[1] <= MAX_DIM:
        raise InvalidInputError(f"vectors must be [n >= 1, {MIN_DIM} <= dim <= {MAX_DIM}], not {list(rows.shape)}")
    count, dim = rows.shape
    check_lists(params.n_lists, params.ivf_bits, count)
    labels = _check_ids(ids, count)
    if mean is not None and (mean.shape != (dim,) or not np.isfinite(mean).all()):
        raise InvalidInputError(f"mean must be {dim} finite numbers, not {list(mean.shape)}")
    index = _build_index(rows, params, progress)
    if params.vector_type == "auto":
        kind = rows.read(0, 1).dtype
        small = {np.dtype(np.uint8): "uint8", np.dtype(np.float16): "float16"}
        params = replace(params, vector_type=small.get(kind, "float32"))
    with _saved(index) as state:
        del index  # nearly as large as the image; the packer needs the file alone
        trim_memory()
        return _pack(state, dim, params, labels, generation, mean, progress)


def pack_index(
    index: hnswlib.Index, params: BuildParams, *, generation: int = 1, progress: Progress | None = None
) -> Arena:
    """Packs an hnswlib index. The errors are those of `Shard.from_hnswlib`.

    Args:
        index: the index, which is not changed.
        params: the seed, the threads, the vector type and the inverted lists. The index itself has the rest.
        generation: the generation that the image gets.
        progress: see `Progress`.

    Returns:
        An arena that holds the image. It belongs to the caller.
    """
    check_lists(params.n_lists, params.ivf_bits, index.get_current_count())
    candidates = [params.vector_type]
    if params.vector_type == "auto":
        small = ["uint8", "float16"]
        if index.space != "cosine":  # hnswlib normalised the vectors; only the packer finds out what they were
            some = _some_vectors(index)
            small = [name for name in small if _is_exact(some, name)]
        candidates = [*small, "float32"]
    with _saved(index) as state:
        for name in candidates[:-1]:
            with suppress(LossyVectorError):
                return _pack(state, index.dim, replace(params, vector_type=name), None, generation, None, progress)
        params = replace(params, vector_type=candidates[-1])
        return _pack(state, index.dim, params, None, generation, None, progress)


def _build_index(rows: VectorSource, params: BuildParams, progress: Progress | None) -> hnswlib.Index:
    """Gives the vectors to hnswlib, some rows at a time."""
    import hnswlib  # only a build needs it: it is compiled for one CPU, and a reader's CPU may be older

    count, dim = rows.shape
    index = hnswlib.Index(space=params.metric, dim=dim)
    index.init_index(
        max_elements=count, M=params.M, ef_construction=params.ef_construction, random_seed=params.seed % 2**64
    )
    step = max(256, min(_ADD_ROWS, _ADD_BYTES // (4 * dim)))
    for begin in range(0, count, step):
        with np.errstate(over="ignore"):  # a number that overflows float32 becomes infinite, and is refused
            part = np.asarray(rows.read(begin, min(begin + step, count)), np.float32)
        check_finite(part, "vector", begin)
        # The labels are rows, because hnswlib's own numbers depend on the order in which its threads finish.
        index.add_items(part, np.arange(begin, begin + len(part)), num_threads=params.threads)
        if progress:
            progress("build", min(begin + step, count), count)
    return index


def _check_ids(ids: npt.ArrayLike | None, count: int) -> npt.NDArray[np.int64]:
    """Returns the ids of `count` vectors, int64[count]. None stands for the row numbers."""
    if ids is None:
        return np.arange(count, dtype=np.int64)
    given = np.asarray(ids)
    if given.shape != (count,) or not np.issubdtype(given.dtype, np.integer):
        raise InvalidInputError(f"ids must be int64[{count}], not {given.dtype}{list(given.shape)}")
    labels = given.astype(np.int64)
    if (labels < 0).any() or (labels.astype(given.dtype) != given).any():
        raise InvalidInputError("ids must be in [0, 2^63)")
    unique, counts = np.unique(labels, return_counts=True)
    if len(unique) != count:
        some = unique[counts > 1][:5].tolist()
        raise InvalidInputError(f"{count - len(unique)} ids are given more than once; duplicate ids: {some}")
    return labels


def _some_vectors(index: hnswlib.Index) -> npt.NDArray[np.float32]:
    """Returns a few of an index's vectors, float32[n, dim]."""
    vectors = []
    for label in index.get_ids_list()[:_SOME_VECTORS]:
        with suppress(RuntimeError):  # hnswlib does not return a deleted vector
            vectors.append(index.get_items([label])[0])
    return np.asarray(vectors, np.float32)


def _is_exact(vectors: npt.NDArray[np.float32], name: str) -> bool:
    """Returns whether a vector type stores the vectors exactly."""
    with np.errstate(over="ignore", invalid="ignore"):
        return bool((vectors.astype(name).astype(np.float32) == vectors).all())


@contextmanager
def _saved(index: hnswlib.Index) -> Iterator[Path]:
    """Saves an index to a temporary file, which the packer reads from front to back.

    So there is no second copy in memory.
    A pipe would do without the file, but `save_index` holds the GIL while it writes, so nothing could read from it.
    """
    # TMPDIR or /var/tmp is a disk; /tmp may be memory.
    directory = os.environ.get("TMPDIR") or ("/var/tmp" if Path("/var/tmp").is_dir() else None)
    with tempfile.TemporaryDirectory(prefix="cotra-", dir=directory) as scratch:
        state = Path(scratch) / "state"
        index.save_index(os.fspath(state))
        _check_saved(state, index.index_file_size())
        del index  # else this generator would keep the index alive until the file is packed
        yield state


def _check_saved(state: Path, n_bytes: int) -> None:
    """Raises `OSError` if a saved index is not whole: `save_index` is silent about a disk that is full."""
    there = state.stat().st_size if state.exists() else 0
    if there == n_bytes:
        return
    directory = state.parent.parent
    usage = shutil.disk_usage(directory)
    code = errno.ENOSPC if usage.free < n_bytes - there else errno.EIO
    raise OSError(
        code,
        f"{os.strerror(code)}: the index takes {n_bytes:,} bytes for a while, and {there:,} could be written; "
        "set TMPDIR to a directory with more space",
        os.fspath(directory),
    )


class _Packer(Handle):
    def _destroy(self, ptr: Any) -> None:
        lib.cotra_packer_destroy(ptr)


def _pack(
    state: Path,
    dim: int,
    params: BuildParams,
    ids: npt.NDArray[np.int64] | None,
    generation: int,
    mean: npt.NDArray[np.float32] | None,
    progress: Progress | None,
) -> Arena:
    """Packs a saved index, and appends inverted lists where they are asked for.

    Args:
        state: the saved index.
        dim: the components of a vector.
        params: as for `build_image`, with a vector type other than "auto".
        ids: the ids of the rows, int64[n]. The index's labels are then rows, and nodes are numbered by rows. With None
            the index's labels are the ids.
        generation: the generation that the image gets.
        mean: the vector that codes are relative to, float32[dim]. None stands for the mean of the vectors.
        progress: see `Progress`.
    """
    centre = None if mean is None else np.ascontiguousarray(mean, np.float32)
    raw = ffi.new(
        "cotra_packer_params *",
        {
            "dim": dim,
            "metric": METRICS.index(params.metric),
            "vector_type": VECTOR_TYPES.index(params.vector_type),
            "arena_flags": lib.COTRA_ARENA_HUGE,
            "seed": params.seed % 2**64,
            "generation": generation,
            "ids": ffi.NULL if ids is None else ffi.from_buffer("int64_t[]", ids),
            "n_ids": 0 if ids is None else len(ids),
            "mean": ffi.NULL if centre is None else ffi.from_buffer("float[]", centre),
            "round_vectors": ids is not None,
        },
    )
    out, err = ffi.new("cotra_packer **"), new_error()
    check(lib.cotra_packer_create(raw, out, err), err)
    with _Packer(out[0]) as packer:
        with state.open("rb", buffering=0) as file:
            err = new_error()
            check(lib.cotra_packer_read(packer.ptr, file.fileno(), round(_STATE_TIMEOUT_S * 1e9), err), err)
        for phase, step in (("link", lib.cotra_packer_link), ("pack", lib.cotra_packer_encode)):
            _for_all_nodes(packer, phase, step, params.threads, progress)
        arena_out, err = ffi.new("cotra_arena **"), new_error()
        check(lib.cotra_packer_finish(packer.ptr, arena_out, err), err)
        arena = Arena(arena_out[0])
    if params.n_lists:
        make_lists(
            arena,
            ImageInfo.of_arena(arena),
            params.n_lists,
            params.ivf_bits,
            seed=params.seed,
            n_threads=params.threads,
            progress=progress,
        )
    return arena


def _for_all_nodes(
    packer: _Packer, phase: str, step: Callable[..., int], threads: int, progress: Progress | None
) -> None:
    """Takes one step of the packer over all nodes, a range of nodes at a time."""
    count: int = lib.cotra_packer_count(packer.ptr)
    done = 0

    def run(begin: int) -> int:
        end, err = min(begin + _PACK_ROWS, count), new_error()
        check(step(packer.ptr, begin, end, err), err)
        return end - begin

    with ThreadPoolExecutor(threads) as pool:
        for future in as_completed([pool.submit(run, begin) for begin in range(0, count, _PACK_ROWS)]):
            done += future.result()
            if progress:
                progress(phase, done, count)
