"""Adds inverted lists to an image: clusters its vectors, and packs the clusters."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cotra_rdma._clustering.kmeans import kmeans
from cotra_rdma._core.record_layout import DELETED, ELEMENTS, HEAD, heads_of, records_of
from cotra_rdma._native.image import ImageInfo
from cotra_rdma._native.library import Handle, check, ffi, lib, new_error
from cotra_rdma._native.list_engine import MAX_BITS, MAX_LISTS
from cotra_rdma.errors import InvalidInputError

if TYPE_CHECKING:
    from cotra_rdma._native.arena import Arena

_LISTS_AT_ONCE = 16


class _IvfPacker(Handle):
    def _destroy(self, ptr: Any) -> None:
        lib.cotra_ivf_packer_destroy(ptr)


def own_vectors(arena: Arena, info: ImageInfo) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Returns the vectors of an image in an arena, without a copy.

    The vectors are a view of the arena's memory.
    Drop them before the arena is closed or grows.

    Args:
        arena: the arena.
        info: the header of the image.

    Returns:
        The vectors by row, `vector_type`[count, dim]. Which rows are not deleted, bool[count].
    """
    memory, kind = arena.view(), ELEMENTS[info.vector_type]
    shape, strides = (info.count, info.dim), (info.record_bytes, kind.itemsize)
    vectors: npt.NDArray[Any] = np.ndarray(shape, kind, memory, info.records_offset + HEAD.itemsize, strides)
    return vectors, heads_of(records_of(memory, info))["flags"] & DELETED == 0


def append_lists(
    arena: Arena,
    centroids: npt.NDArray[np.float32],
    assignment: npt.ArrayLike,
    *,
    bits: int = 2,
    n_threads: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Appends inverted lists to the image in an arena. The arena grows, and its address may change.

    Args:
        arena: a memfd that is not locked, sealed or read by anybody yet, with a valid image without lists.
        centroids: float32[n_lists, dim].
        assignment: the list of each row, int[count]. Those of deleted rows are ignored.
        bits: the bits of each dimension in the codes, 1 to 8.
        n_threads: the number of threads that encode.
        progress: called as progress(lists done, lists in all).

    Raises:
        InvalidInputError: a shape is wrong, a list is out of range, a centroid is not finite, or the arena is in use.
    """
    info = arena.info
    raw, err = ffi.new("cotra_image_info *"), new_error()
    check(lib.cotra_image_validate(ffi.cast("void *", info.addr), info.len, 0, raw, err), err)
    lists = np.ascontiguousarray(centroids, np.float32)
    given = np.asarray(assignment)
    if lists.ndim != 2 or lists.shape[1] != raw.dim or not 1 <= len(lists) <= MAX_LISTS:
        raise InvalidInputError(f"centroids must be float32[1 ... {MAX_LISTS}, {raw.dim}], not {list(lists.shape)}")
    if given.shape != (raw.count,) or not np.issubdtype(given.dtype, np.integer):
        raise InvalidInputError(f"assignment must be int[{raw.count}], not {given.dtype}{list(given.shape)}")
    if not 1 <= bits <= MAX_BITS:
        raise InvalidInputError(f"bits must be in [1, {MAX_BITS}], not {bits}")
    rows = np.where((given < 0) | (given >= len(lists)), 2**32 - 1, given).astype(np.uint32)
    buffers = ffi.from_buffer("float[]", lists), ffi.from_buffer("uint32_t[]", rows)
    params = ffi.new("cotra_ivf_params *", (*buffers, len(lists), bits))
    out = ffi.new("cotra_ivf_packer **")
    check(lib.cotra_ivf_packer_create(arena.ptr, params, out, err), err)
    with _IvfPacker(out[0], arena) as packer:

        def encode(begin: int) -> int:
            end, failed = min(begin + _LISTS_AT_ONCE, len(lists)), new_error()
            check(lib.cotra_ivf_packer_encode(packer.ptr, begin, end, failed), failed)
            return end - begin

        done = 0
        with ThreadPoolExecutor(n_threads) as pool:
            for future in as_completed([pool.submit(encode, begin) for begin in range(0, len(lists), _LISTS_AT_ONCE)]):
                done += future.result()
                if progress:
                    progress(done, len(lists))
        check(lib.cotra_ivf_packer_finish(packer.ptr, err), err)


def make_lists(
    arena: Arena,
    info: ImageInfo,
    n_lists: int,
    bits: int,
    *,
    seed: int = 0,
    n_threads: int = 1,
    progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Clusters the vectors of the image in an arena by k-means, and appends the clusters as inverted lists.

    Args:
        arena: as for `append_lists`.
        info: the header of the image.
        n_lists: the number of lists, at most the number of vectors that are not deleted.
        bits: as for `append_lists`.
        seed: the seed of k-means.
        n_threads: as for `append_lists`.
        progress: called as progress("cluster" | "encode", done, in all).

    Raises:
        InvalidInputError: `n_lists` or `bits` is out of range, or a component is beyond 1e15.
    """
    if not 1 <= n_lists <= min(info.count - info.deleted_count, MAX_LISTS):
        raise InvalidInputError(f"{info.count - info.deleted_count} vectors cannot make {n_lists} lists")
    vectors, live = own_vectors(arena, info)
    if not live.all():
        vectors = vectors[live]
    report = (lambda done, total: progress("encode", done, total)) if progress else None
    clusters = kmeans(
        vectors,
        n_lists,
        seed=seed,
        n_threads=n_threads,
        metric="cosine" if info.metric == "cosine" else "l2",
        progress=(lambda _, done, total: progress("cluster", done, total)) if progress else None,
    )
    del vectors  # it is a view of the arena, which grows now and moves
    assignment = np.zeros(info.count, np.uint32)
    assignment[live] = clusters.assignment
    append_lists(arena, clusters.centroids, assignment, bits=bits, n_threads=n_threads, progress=report)
