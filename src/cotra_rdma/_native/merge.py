"""Merges the sorted answers of several shards."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cotra_rdma._native.library import ffi, lib
from cotra_rdma._native.search_call import FLOATS, LABELS, PLACES, buffer_of


def merge(
    labels: npt.NDArray[np.int64], distances: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.int32]]:
    """Merges sorted answers of several shards by distance, then shard, then label. A label is kept once.

    Args:
        labels: int64[n_shards, n_queries, k], with -1 where a row has fewer answers.
        distances: float32[n_shards, n_queries, k].

    Returns:
        Labels int64[n_queries, k], distances float32[n_queries, k], and the position of each answer's shard
        int32[n_queries, k], with -1 where there is no answer.
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
