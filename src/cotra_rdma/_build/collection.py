"""Builds a collection: splits a data set over shards, builds each, and publishes them all at once."""

from __future__ import annotations
import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self
import numpy as np
import numpy.typing as npt
from cotra_rdma._build.processes import BuildProcesses, Usage
from cotra_rdma._build.steps import PACK_SHARE, BuildSpec, GraphResult, build_here, lists_of, scatter
from cotra_rdma._clustering.balanced import balanced_partition
from cotra_rdma._routing.calibration import CALIBRATION_K, Calibration
from cotra_rdma._routing.coarse_table import N_LISTS, CoarseTable
from cotra_rdma._routing.exact_neighbours import exact_neighbours
from cotra_rdma._routing.fit import HeldOut, calibrate, held_out_rows
from cotra_rdma._routing.router import Router
from cotra_rdma._shard.shard import Shard
from cotra_rdma.datasets import VectorFile
from cotra_rdma.errors import FormatError, InvalidInputError
from cotra_rdma._collection.manifest import Collection, GRAPHS, MANIFEST, PARTITIONS, ShardFile

_READ_ROWS = 65_536
_SCATTER_ROWS = 2048  # of a shard, that tell in which directions lists are wide

Progress = Callable[[int, str, int], None]
"""Called with (shard, its phase: "build" or "pack", rows done of the whole data set), and where shards make one graph then again
with "border" and "relink"; before and after the shards also with shard -1, the phase "partition" or "calibrate", and the rows
done of that phase."""


def build_collection(
    vectors: VectorFile,
    directory: str | os.PathLike[str],
    n_shards: int = 1,
    *,
    metric: str = "l2",
    M: int = 16,
    ef_construction: int = 200,
    seed: int = 100,
    n_threads: int = 0,
    partition: str | None = None,
    graph: str = "independent",
    n_lists: int = 0,
    ivf_bits: int = 2,
    vector_type: str = "auto",
    force: bool = False,
    progress: Progress | None = None,
    processes: int = 0,
    usage: Callable[[Usage], None] | None = None,
) -> Collection:
    """Splits a file's rows into `n_shards` parts, builds each and writes them to `directory`, with their coarse tables.

    One shard is in memory at a time: its vectors while hnswlib builds, then its image; and for shards with graphs of their
    own 8 bytes for each row. Inverted lists take a second copy of the image. Files are written aside and renamed when all
    are whole: a failed run leaves the directory as it was.

    Args:
        vectors: the data set; row numbers become ids.
        directory: made when it is missing.
        n_shards: at most one a row.
        metric, M, ef_construction, seed, n_threads: as `Shard.build`; with `processes`, threads of each of them.
        partition: "range": equal ranges of rows; "kmeans": neighbours together, and no shard larger than 1.1 times the
            mean, so that Compass can leave shards out. None: "kmeans" for one graph, else "range".
        graph: "independent": each shard has a graph of its own, and is searched by itself; "global": the shards' graphs are
            linked to one (`cotra_rdma._build.cross_links`), and a query is one walk over all of them.
        n_lists, ivf_bits: inverted lists beside the graphs, of all shards together, and bits a dimension of their codes; 0
            lists for none (`Shard.build`).
        vector_type: how own vectors are held, as `Shard.build`.
        force: replace a collection that is there already.
        progress: told how far each shard is.
        processes: so many builder processes on this host, each with one shard at a time, for one graph; 0: this process
            builds. With one thread each the result is the same. On a machine for each shard: `build_machine.build_on_machine`.
        usage: told what each of these processes used, when it ended.

    Raises:
        InvalidInputError: there is a collection already, or a value is out of its range.
        PeerError: a builder process ended before its work was done.
    """
    partition = check_build(vectors, n_shards, partition, graph, n_lists, processes)
    with Publication(directory, force=force) as publication:
        aside = publication.aside
        spec = BuildSpec(
            vectors.count,
            vectors.dim,
            n_shards,
            metric,
            M,
            ef_construction,
            seed,
            n_threads,
            n_lists,
            ivf_bits,
            vector_type,
            publication.generation,
        )
        if graph == "independent" or n_shards == 1:
            collection = _build_independent(spec, vectors, aside, partition, graph, progress)
        else:
            overall = progress and _Overall(progress)
            if processes:
                with BuildProcesses(processes, spec, vectors, aside, usage=usage) as pool:
                    result = pool.run(overall)
            else:
                result = build_here(spec, vectors, aside, overall)
            collection = of_graph(spec, result)
        publication.publish(collection)
    return collection


def check_build(
    vectors: VectorFile, n_shards: int, partition: str | None, graph: str, n_lists: int, processes: int = 0
) -> str:
    """The partition that is meant. Raises `InvalidInputError` for values that do not fit each other."""
    if n_lists and not n_shards <= n_lists <= vectors.count:
        raise InvalidInputError(f"n_lists must be 0 or in [{n_shards}, {vectors.count}], not {n_lists}")
    if graph not in GRAPHS:
        raise InvalidInputError(f"graph must be one of {', '.join(GRAPHS)}, not {graph!r}")
    partition = partition or ("kmeans" if graph == "global" else "range")
    if partition not in PARTITIONS:
        raise InvalidInputError(f"partition must be one of {', '.join(PARTITIONS)}, not {partition!r}")
    if not 1 <= n_shards <= vectors.count:
        raise InvalidInputError(f"{vectors.count} rows cannot be split into {n_shards} shards")
    if graph == "global" and n_shards > 1 and partition != "kmeans":
        raise InvalidInputError("one graph over all shards needs neighbours together: partition kmeans")
    if processes < 0:
        raise InvalidInputError(f"processes must be >= 0, not {processes}")
    if processes and (graph != "global" or n_shards < 2):
        raise InvalidInputError("builder processes are for one graph over several shards")
    return partition


class Publication:
    """Where a collection is made: aside, until all is whole. A context manager.

    Attributes:
        aside: a directory inside that of the collection, for what is made; gone at the end.
        generation: that the new collection gets.

    Raises:
        InvalidInputError: there is a collection already and it is not to be replaced, or a file is in the way.
    """

    def __init__(self, directory: str | os.PathLike[str], *, force: bool) -> None:
        self._out = out = Path(directory)
        if out.exists() and not out.is_dir():
            raise InvalidInputError(f"{out}: exists and is not a directory")
        old = sorted([*out.glob("shard-*.cotra"), *out.glob("shard-*.coarse"), *out.glob(MANIFEST)])
        if old and not force:
            raise InvalidInputError(
                f"{out}: holds a collection already ({old[0].name}); it is replaced only with force (--force)"
            )
        self._old = {path: path.stat().st_ino for path in old}
        try:
            self.generation = Collection.load(out).generation + 1
        except FormatError:
            self.generation = 1
        self._made = not out.exists()

    def __enter__(self) -> Self:
        self._out.mkdir(parents=True, exist_ok=True)
        self.aside = Path(tempfile.mkdtemp(prefix=".building-", dir=self._out))
        return self

    def publish(self, collection: Collection, numbers: Iterable[int] | None = None) -> None:
        """Renames the shards' files into place, then the manifest; what was there before and is no part of it goes.

        Args:
            numbers: of the shards that were made here; None: all. Others may be made in the same directory meanwhile.
        """
        collection.save(self.aside)
        here = range(len(collection.shards)) if numbers is None else numbers
        shards = [collection.shards[number] for number in here]
        made = [name for shard in shards for name in (shard.name, shard.coarse_name) if name is not None]
        for name in [*made, MANIFEST]:
            (self.aside / name).replace(self._out / name)
        for path in set(self._old) - {self._out / name for name in [MANIFEST, *made]}:
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_ino == self._old[path]:  # else another builder's, and new
                    path.unlink()

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.aside, ignore_errors=True)
        if self._made:
            with contextlib.suppress(OSError):  # it is not empty: the run went well
                self._out.rmdir()


def of_graph(spec: BuildSpec, result: GraphResult) -> Collection:
    """The manifest of one graph."""
    shards = tuple(
        ShardFile(
            f"shard-{number:03d}.cotra",
            shard.first_id,
            shard.count,
            shard.image_bytes,
            f"shard-{number:03d}.coarse",
            shard.base,
            spec.generation,
            shard.image_checksum,
            shard.centroid,
        )
        for number, shard in enumerate(result.shards)
    )
    return _collection(spec, shards, "kmeans", "global", result.calibration, result.graph_id)


def _build_independent(
    spec: BuildSpec, vectors: VectorFile, aside: Path, partition: str, graph: str, progress: Progress | None
) -> Collection:
    """Shards with graphs of their own, one after the other."""
    part, centroids = _partition(vectors, spec, partition, progress)
    shards: list[ShardFile] = []
    tables: list[CoarseTable] = []
    done = 0
    lists = np.empty(vectors.count, np.int32)  # of each row, counted over all shards
    total = np.zeros((vectors.dim, vectors.dim))
    for number in range(spec.n_shards):
        ids = np.flatnonzero(part == number)
        rows = _gather(vectors, ids)
        name = f"shard-{number:03d}"
        with Shard.build(
            rows,
            ids=ids,
            metric=spec.metric,
            M=spec.M,
            ef_construction=spec.ef_construction,
            seed=spec.seed,
            n_threads=spec.n_threads,
            progress=progress and _rows_done(progress, number, done, len(ids)),
            generation=spec.generation,
            n_lists=lists_of(spec.n_lists, len(ids), vectors.count),
            ivf_bits=spec.ivf_bits,
            vector_type=spec.vector_type,
        ) as shard:
            shard.save(aside / f"{name}.cotra")
            info = shard.info
        table, clusters = CoarseTable.build(rows, N_LISTS, metric=spec.metric, seed=spec.seed, n_threads=spec.n_threads)
        (aside / f"{name}.coarse").write_bytes(table.encode())
        lists[ids] = clusters.assignment + sum(map(len, tables))
        chosen = np.linspace(0, len(rows) - 1, min(_SCATTER_ROWS, len(rows))).astype(np.int64)
        total += scatter(rows[chosen], clusters.centroids, clusters.assignment[chosen], len(rows), spec.metric)
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
    return _collection(spec, shards, partition, graph, calibration)


def _collection(
    spec: BuildSpec,
    shards: Sequence[ShardFile],
    partition: str,
    graph: str,
    calibration: Calibration | None,
    graph_id: int = 0,
) -> Collection:
    return Collection(
        spec.dim,
        spec.metric,
        spec.count,
        spec.M,
        spec.ef_construction,
        spec.seed,
        spec.generation,
        tuple(shards),
        partition,
        graph,
        calibration,
        graph_id,
    )


class _Overall:
    """How far a build is, from how far each shard is: rows of the phase, and "build", "link" and "pack" are one."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._done: dict[str, dict[int, int]] = {}

    def __call__(self, number: int, phase: str, done: int) -> None:
        part = self._done.setdefault("build" if phase in ("link", "pack") else phase, {})
        part[number] = done
        self._progress(-1 if phase in ("partition", "calibrate") else number, phase, sum(part.values()))


def _partition(
    vectors: VectorFile, spec: BuildSpec, partition: str, progress: Progress | None
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """The shard of each row, none of them empty; and for "kmeans" the shards' centroids, float32[n_shards, dim]."""
    if partition == "range" or spec.n_shards == 1:
        bounds = np.linspace(0, vectors.count, spec.n_shards + 1).astype(int)
        return np.repeat(np.arange(spec.n_shards, dtype=np.int32), np.diff(bounds)), np.empty(
            (0, vectors.dim), np.float32
        )
    report = None
    if progress is not None:

        def report(phase: str, done: int, total: int) -> None:
            progress(-1, "partition", done if phase == "assign" else 0)

    part, centroids = balanced_partition(
        vectors, spec.n_shards, seed=spec.seed, n_threads=spec.n_threads, metric=spec.metric, progress=report
    )
    counts = np.bincount(part, minlength=spec.n_shards)
    for empty in np.flatnonzero(counts == 0):  # of equal vectors, or very few
        giver = int(counts.argmax())
        taken = np.flatnonzero(part == giver)[: max(1, counts[giver] // 2)]
        part[taken] = empty
        counts[giver] -= len(taken)
        counts[empty] += len(taken)
    return part, centroids


def _gather(vectors: VectorFile, ids: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """Some rows, ascending, in the file's own type."""
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
    k = CALIBRATION_K
    if len(tables) < 2 or vectors.count <= k:
        return None
    rows, order = held_out_rows(vectors.count, spec.seed)
    report = None
    if progress is not None:

        def report(done: int, total: int) -> None:
            progress(-1, "calibrate", done)

    near = exact_neighbours(vectors, rows, k, spec.metric, report)
    held_out = HeldOut(
        _gather(vectors, rows)[order].astype(np.float32),
        lists[rows[order]].astype(np.int64),
        lists[near[order]].astype(np.int64),
    )
    return calibrate(tables, held_out, total, spec.metric)


def _rows_done(progress: Progress, number: int, start: int, count: int) -> Callable[[str, int, int], None]:
    def report(phase: str, done: int, total: int) -> None:
        share = done / max(total, 1)
        share = share * (1 - PACK_SHARE) if phase == "build" else 1 - PACK_SHARE + share * PACK_SHARE
        progress(number, phase, start + round(share * count))

    return report
