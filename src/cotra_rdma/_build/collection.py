"""Builds a collection: splits a data set into shards, builds each shard, and publishes all of them at once."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from cotra_rdma._build.processes import BuildProcesses, Usage
from cotra_rdma._build.steps import BuildSpec, GraphResult, Progress, build_here, rows_done, scatter
from cotra_rdma._clustering.balanced import balanced_partition
from cotra_rdma._collection.manifest import GRAPHS, MANIFEST, PARTITIONS, Collection, ShardFile
from cotra_rdma._core.files import sync_directory, sync_file
from cotra_rdma._native.image import ImageInfo
from cotra_rdma._routing.calibration import CALIBRATION_K, Calibration
from cotra_rdma._routing.coarse_table import N_LISTS, CoarseTable
from cotra_rdma._routing.exact_neighbours import exact_neighbours
from cotra_rdma._routing.fit import HeldOut, calibrate, held_out_rows
from cotra_rdma._shard.hnsw_packer import build_image
from cotra_rdma._shard.params import BuildParams
from cotra_rdma._shard.shard import Shard
from cotra_rdma.datasets import VectorFile
from cotra_rdma.errors import FormatError, InvalidInputError

_READ_ROWS = 65_536
_SCRATCH = ".building-"
_SCATTER_SAMPLE = 2048  # rows of a shard that say in which directions lists are wide


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
    """Splits the rows of a file into shards, builds each shard, and writes the shards to a directory.

    The coarse tables of the shards and the manifest lie beside them.

    One shard is in memory at a time: its vectors while hnswlib builds, and then its image.
    Independent shards take 8 more bytes for each row of the data set.
    Inverted lists take a second copy of the image.
    The files are written to a temporary directory, and renamed when all are complete.
    So a build that fails leaves the directory as it was.

    Args:
        vectors: the data set. Row numbers become ids.
        directory: the directory of the collection. It is made if it is missing.
        n_shards: the number of shards, at most the number of rows.
        metric: as for `Shard.build`.
        M: as for `Shard.build`.
        ef_construction: as for `Shard.build`.
        seed: as for `Shard.build`.
        n_threads: as for `Shard.build`. With `processes`, it is the number of threads of each process.
        partition: "range" makes equal ranges of rows. "kmeans" keeps neighbours together, so that Compass can leave
            shards out; no shard is then larger than 1.1 times the mean. None stands for "kmeans" for one graph, and for
            "range" otherwise.
        graph: "independent" makes shards that are searched by themselves. "global" makes one graph over all shards
            (`cotra_rdma._build.cross_links`), so that a query is one walk.
        n_lists: the number of inverted lists beside the graphs, of all shards together. 0 stands for none.
        ivf_bits: the bits of each dimension in the lists' codes, 1 to 8.
        vector_type: the type in which vectors are stored, as for `Shard.build`.
        force: whether to replace a collection that is already in the directory.
        progress: called with (shard, phase, rows done). Rows are counted over the whole data set, anew for each of
            "build" and "pack" (counted as one), "border" and "relink". The last two are phases of one graph. For the
            phases "partition" and "calibrate" the shard is -1.
        processes: the number of builder processes on this host, for one graph. Each builds one shard at a time. 0
            builds in this process. The result is the same if each builder has one thread. `build_on_machine` builds on
            a machine for each shard.
        usage: called with the usage of each of these processes when its work is done.

    Returns:
        The collection.

    Raises:
        InvalidInputError: there is a collection already, or a value is out of its range.
        PeerError: a builder process ended before its work was done.
    """
    partition = check_build(vectors, n_shards, partition, graph, n_lists, processes)
    params = BuildParams(metric, M, ef_construction, seed, n_threads, n_lists, ivf_bits, vector_type)
    with Publication(directory, force=force) as publication:
        aside = publication.aside
        spec = BuildSpec(vectors.count, vectors.dim, n_shards, params, publication.generation)
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
        return publication.publish(collection)


def check_build(
    vectors: VectorFile, n_shards: int, partition: str | None, graph: str, n_lists: int, processes: int = 0
) -> str:
    """Checks that the arguments of a build fit each other.

    Returns:
        The partition, with None replaced by the default.

    Raises:
        InvalidInputError: a value is out of its range, or does not fit the others.
    """
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
        raise InvalidInputError("one graph over all shards needs neighbours together: use partition kmeans")
    if processes < 0:
        raise InvalidInputError(f"processes must be >= 0, not {processes}")
    if processes and (graph != "global" or n_shards < 2):
        raise InvalidInputError("builder processes can only build one graph over several shards (graph global)")
    return partition


class Publication:
    """Makes a collection in a temporary directory, and moves it into place when it is complete. A context manager.

    Args:
        directory: the directory of the collection.
        force: whether to replace a collection that is already there.

    Attributes:
        aside: the temporary directory, inside that of the collection. It is removed at the end.
        generation: the generation of the new collection.

    Raises:
        InvalidInputError: there is a collection and `force` is not set, or a file is in the way.
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
        self._old = old
        self.generation = 1 + max((_generation_of(path) for path in old), default=0)
        self._made = not out.exists()

    def __enter__(self) -> Self:
        self._out.mkdir(parents=True, exist_ok=True)
        self._remove_scratch()
        self.aside = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=self._out))
        self._hold = os.open(self.aside, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(self._hold, fcntl.LOCK_EX)  # as long as this process lives
        return self

    def _remove_scratch(self) -> None:
        """Removes what builds that were killed have left."""
        for left in self._out.glob(f"{_SCRATCH}*"):
            with contextlib.suppress(OSError):
                fd = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # its builder is gone
                    shutil.rmtree(left, ignore_errors=True)
                finally:
                    os.close(fd)

    def publish(self, collection: Collection, numbers: Iterable[int] | None = None) -> Collection:
        """Renames the files of the shards into place, then the manifest, and removes those of an earlier build.

        Files of another generation have other names, so the old collection is whole until its manifest is replaced, and the
        new one from then on. Whoever kills this process, or the machine, gets the one or the other.

        Args:
            collection: the new collection, with the names that the files have in `aside`.
            numbers: the shards that were made here. None stands for all. Other builders may make the rest in the same
                directory at the same time.

        Returns:
            The collection with the names that its files have in the directory.
        """
        published = replace(
            collection,
            shards=tuple(
                replace(
                    shard,
                    name=_name_of(shard.name, collection.generation),
                    coarse_name=shard.coarse_name and _name_of(shard.coarse_name, collection.generation),
                )
                for shard in collection.shards
            ),
        )
        for number in range(len(collection.shards)) if numbers is None else numbers:
            made, named = collection.shards[number], published.shards[number]
            for name, to in ((made.name, named.name), (made.coarse_name, named.coarse_name)):
                if name is not None and to is not None:
                    sync_file(self.aside / name)
                    (self.aside / name).replace(self._out / to)
        sync_directory(self._out)
        published.save(self._out)
        kept = {name for shard in published.shards for name in (shard.name, shard.coarse_name)} | {MANIFEST}
        for path in self._old:
            if path.name not in kept:
                path.unlink(missing_ok=True)
        return published

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.aside, ignore_errors=True)
        os.close(self._hold)
        if self._made:
            with contextlib.suppress(OSError):  # the directory is not empty if the build went well
                self._out.rmdir()


def _generation_of(path: Path) -> int:
    """The generation of a file of a collection; 1 where that cannot be told."""
    if path.name == MANIFEST:
        try:
            return Collection.load(path.parent, shard_files=False).generation
        except FormatError:
            return 1
    found = re.search(r"-g([0-9]{1,18})\.", path.name)
    return int(found[1]) if found else 1


def _name_of(name: str, generation: int) -> str:
    """The name of a shard's file in the collection: the first generation has the plain ones."""
    stem, dot, suffix = name.partition(".")
    return name if generation == 1 else f"{stem}-g{generation}{dot}{suffix}"


def of_graph(spec: BuildSpec, result: GraphResult) -> Collection:
    """Makes the manifest of one graph."""
    shards = [
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
    ]
    return _collection(spec, shards, "kmeans", "global", result.calibration, result.graph_id)


def _collection(
    spec: BuildSpec,
    shards: Sequence[ShardFile],
    partition: str,
    graph: str,
    calibration: Calibration | None,
    graph_id: int = 0,
) -> Collection:
    params = spec.params
    return Collection(
        spec.dim,
        params.metric,
        spec.count,
        params.M,
        params.ef_construction,
        params.seed,
        spec.generation,
        tuple(shards),
        partition,
        graph,
        calibration,
        graph_id,
    )


class _Overall:
    """Reports the progress of a whole build, from the progress of each shard.

    Rows are summed over the shards. The phases "build", "link" and "pack" count as one.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._done: dict[str, dict[int, int]] = {}

    def __call__(self, number: int, phase: str, done: int) -> None:
        part = self._done.setdefault("build" if phase in ("link", "pack") else phase, {})
        part[number] = done
        self._progress(-1 if phase in ("partition", "calibrate") else number, phase, sum(part.values()))


# ---- independent shards ----


def _build_independent(
    spec: BuildSpec, vectors: VectorFile, aside: Path, partition: str, graph: str, progress: Progress | None
) -> Collection:
    """Builds shards with graphs of their own, one after the other."""
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
    return _collection(spec, shards, partition, graph, calibration)


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
