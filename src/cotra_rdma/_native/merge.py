"""Sorted answers of several shards, merged."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cotra_rdma._native.library import ffi, lib
from cotra_rdma._native.search_call import FLOATS, LABELS, PLACES, buffer_of


def merge(
    labels: npt.NDArray[np.int64], distances: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.int32]]:
    """Merges sorted answers of several shards by distance, then shard, then label; a label is kept once.

    Args:
        labels: int64[n_shards, n_queries, k], -1 where a row has fewer. distances: float32, likewise.

    Returns:
        labels int64[n_queries, k], distances float32[n_queries, k], and the position of the shard of each: int32 (-1: none).
    """
    labels = np.ascontiguousarray(labels, np.int64)
    distances = np.ascontiguousarray(distances, np.float32)
    n_shards, n, k = labels.shape
    out_labels = np.empty((n, k), np.int64)
    out_distances = np.empty((n, k), np.float32)
    out_shards = np.empty((n, k), np.int32)
    status = lib.cotra_merge(
        buffer_of(LABELS, labels),
        buffer_of(FLOATS, distances),
        n_shards,
        n,
        k,
        buffer_of(LABELS, out_labels),
        buffer_of(FLOATS, out_distances),
        buffer_of(PLACES, out_shards),
        ffi.NULL,
    )
    if status:
        raise MemoryError(f"merging {n_shards} shards")
    return out_labels, out_distances, out_shards
