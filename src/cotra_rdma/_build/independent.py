"""Builds independent shards: each has a graph of its own, and one shard is in memory at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cotra_rdma._build.spec import BuildSpec, Progress, rows_done, scatter
from cotra_rdma._clustering.balanced import balanced_partition
from cotra_rdma._collection.manifest import Collection, ShardFile
from cotra_rdma._native.image import ImageInfo
from cotra_rdma._routing.calibration import CALIBRATION_K, Calibration
from cotra_rdma._routing.coarse_table import N_LISTS, CoarseTable
from cotra_rdma._routing.exact_neighbours import exact_neighbours
from cotra_rdma._routing.fit import HeldOut, calibrate, held_out_rows
from cotra_rdma._shard.hnsw_packer import build_image
from cotra_rdma._shard.shard import Shard
from cotra_rdma.datasets import VectorFile

_READ_ROWS = 65_536
_SCATTER_SAMPLE = 2048  # rows of a shard that say in which directions lists are wide


def build_independent(
    spec: BuildSpec, vectors: VectorFile, aside: Path, partition: str, graph: str, progress: Progress | None
) -> Collection:
    """Builds independent shards, one after the other.

    Args:
        spec: what is built.
        vectors: the data set.
        aside: the directory for the shards' files and their coarse tables.
        partition: "range" or "kmeans".
        graph: the name of the graph in the manifest. One shard may count as one graph.
        progress: see `build_collection`.

    Returns:
        The manifest of the collection.
    """
    params = spec.params
    part, centroids = _partition(vectors, spec, partition, progress)
    shards: list[ShardFile] = []
    tables: list[CoarseTable] = []
    lists = np.empty(vectors.count, np.int32)  # the list of each row, counted over all shards
    total = np.zeros((vectors.dim, vectors.dim))
    done = 0
    for number in range(spec.n_shards):
        ids = np.flatnonzero(part == number)
        rows = _gather(vectors, ids)
        name = f"shard-{number:03d}"
        info = _build_shard(spec, rows, ids, aside / f"{name}.cotra", number, done, progress)
        table, clusters = CoarseTable.build(
            rows, N_LISTS, metric=params.metric, seed=params.seed, n_threads=params.n_threads
        )
        (aside / f"{name}.coarse").write_bytes(table.encode())
        lists[ids] = clusters.assignment + sum(map(len, tables))
        chosen = np.linspace(0, len(rows) - 1, min(_SCATTER_SAMPLE, len(rows))).astype(np.int64)
        total += scatter(rows[chosen], clusters.centroids, clusters.assignment[chosen], len(rows), params.metric)
        tables.append(CoarseTable.decode(table.encode()))
        centroid = tuple(map(float, centroids[number])) if len(centroids) else None
        shards.append(
            ShardFile(
                f"{name}.cotra",
                int(ids[0]),
                len(ids),
                info.image_bytes,
                f"{name}.coarse",
                0,
                spec.generation,
                info.image_checksum,
                centroid,
            )
        )
        done += len(ids)
    calibration = _calibration(vectors, tables, lists, total, spec, progress)
    return spec.collection(shards, partition, graph, calibration)


def _build_shard(
    spec: BuildSpec,
    rows: npt.NDArray[Any],
    ids: npt.NDArray[np.int64],
    path: Path,
    number: int,
    start: int,
    progress: Progress | None,
) -> ImageInfo:
    """Builds a shard, saves it to a file, and returns its header. `start` rows are in the shards before it."""
    arena = build_image(
        rows,
        replace(spec.params, n_lists=spec.lists_of(len(ids))),
        ids,
        generation=spec.generation,
        progress=progress and rows_done(len(ids), lambda phase, done: progress(number, phase, start + done)),
    )
    with Shard.of_arena(arena) as shard:
        shard.save(path)
        return shard.info


def _partition(
    vectors: VectorFile, spec: BuildSpec, partition: str, progress: Progress | None
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Divides the rows among the shards. No shard is empty.

    Returns:
        The shard of each row, int32[n]. The shards' centroids, float32[n_shards, dim] for "kmeans" and [0, dim]
        otherwise.
    """
    if partition == "range" or spec.n_shards == 1:
        bounds = np.linspace(0, vectors.count, spec.n_shards + 1).astype(int)
        part = np.repeat(np.arange(spec.n_shards, dtype=np.int32), np.diff(bounds))
        return part, np.empty((0, vectors.dim), np.float32)
    report = None
    if progress is not None:

        def report(phase: str, done: int, total: int) -> None:
            progress(-1, "partition", done if phase == "assign" else 0)

    params = spec.params
    part, centroids = balanced_partition(
        vectors, spec.n_shards, seed=params.seed, n_threads=params.n_threads, metric=params.metric, progress=report
    )
    counts = np.bincount(part, minlength=spec.n_shards)
    for empty in np.flatnonzero(counts == 0):  # vectors are equal, or very few
        giver = int(counts.argmax())
        taken = np.flatnonzero(part == giver)[: max(1, counts[giver] // 2)]
        part[taken] = empty
        counts[giver] -= len(taken)
        counts[empty] += len(taken)
    return part, centroids


def _gather(vectors: VectorFile, ids: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """Reads some rows, int64[n] ascending, in the file's own type."""
    first, last = int(ids[0]), int(ids[-1])
    if last - first + 1 == len(ids):
        return vectors.read(first, last + 1)
    rows = np.empty((len(ids), vectors.dim), vectors.dtype)
    for start in range(first, last + 1, _READ_ROWS):
        begin, end = np.searchsorted(ids, (start, start + _READ_ROWS))
        rows[begin:end] = vectors.read(start, min(start + _READ_ROWS, vectors.count))[ids[begin:end] - start]
    return rows


def _calibration(
    vectors: VectorFile,
    tables: list[CoarseTable],
    lists: npt.NDArray[np.int32],
    total: npt.NDArray[np.float64],
    spec: BuildSpec,
    progress: Progress | None,
) -> Calibration | None:
    """Calibrates Compass for independent shards.

    Args:
        vectors: the data set.
        tables: the coarse tables of all shards.
        lists: the list of each row, int32[n], counted over all shards.
        total: the sum of the shards' scatters, float64[dim, dim].
        spec: what is built.
        progress: see `build_collection`.

    Returns:
        The calibration, or None if there is one shard, or too few vectors.
    """
    k, metric = CALIBRATION_K, spec.params.metric
    if len(tables) < 2 or vectors.count <= k:
        return None
    rows, order = held_out_rows(vectors.count, spec.params.seed)
    report = None
    if progress is not None:

        def report(done: int, total: int) -> None:
            progress(-1, "calibrate", done)

    near = exact_neighbours(vectors, rows, k, metric, report)
    held_out = HeldOut(
        _gather(vectors, rows)[order].astype(np.float32),
        lists[rows[order]].astype(np.int64),
        lists[near[order]].astype(np.int64),
    )
    return calibrate(tables, held_out, total, metric)
