"""Collections: one data set split over several shard files, with a manifest and coarse tables beside them."""

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
from cotra_rdma._routing.coarse_table import N_LISTS, CoarseTable
from cotra_rdma._routing.compass import (
    CALIBRATION_K,
    Calibration,
    HeldOut,
    Router,
    calibrate,
    exact_neighbours,
    held_out_rows,
)
from cotra_rdma._shard.shard import Shard
from cotra_rdma.datasets import VectorFile
from cotra_rdma.errors import FormatError, InvalidInputError

MANIFEST = "collection.json"
FORMAT = "cotra-collection"
FORMAT_VERSION = 3
"""1 had no partition, coarse tables or calibration, 2 no graph's name, and of shards no bases, generations, checksums and
centroids; both are read still."""

PARTITIONS = ("range", "kmeans")
GRAPHS = ("independent", "global")
_READ_ROWS = 65_536
_SCATTER_ROWS = 2048  # of a shard, that tell in which directions lists are wide

Progress = Callable[[int, str, int], None]
"""Called with (shard, its phase: "build" or "pack", rows done of the whole data set), and where shards make one graph then again
with "border" and "relink"; before and after the shards also with shard -1, the phase "partition" or "calibrate", and the rows
done of that phase."""


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One shard of a collection: `count` rows of the data set, under their row numbers as ids.

    Attributes:
        name: of the file.
        first_id: the smallest id; in a range partition the others follow one by one.
        count: vectors.
        image_bytes: the file's length.
        coarse_name: of the file of its coarse table; None in a collection of version 1.
        base: the number of its first node in the graph over all shards; 0 where each has a graph of its own.
        generation, image_checksum: of the image; None in collections of versions 1 and 2.
        centroid: dim numbers, of the partition (for cosine of normalised vectors); None where that has none.
    """

    name: str
    first_id: int
    count: int
    image_bytes: int
    coarse_name: str | None = None
    base: int = 0
    generation: int | None = None
    image_checksum: int | None = None
    centroid: tuple[float, ...] | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Collection:
    """What the manifest says.

    Attributes:
        dim, metric, count, M, ef_construction, seed: what it was built from and with.
        generation: counts up when a collection is built again in the same place.
        shards: in the order in which they are served.
        partition: how the rows were split: "range" or "kmeans".
        graph: "independent": each shard has a graph of its own; "global": they make one graph (`cotra_rdma._build.cross_links`).
        calibration: of Compass; None where there is one shard, or too few vectors to learn from.
        graph_id: names the graph over all shards, as their images do; 0 where there is none, or the version does not tell.
    """

    dim: int
    metric: str
    count: int
    M: int
    ef_construction: int
    seed: int
    generation: int
    shards: tuple[ShardFile, ...]
    partition: str = "range"
    graph: str = "independent"
    calibration: Calibration | None = field(default=None, repr=False)
    graph_id: int = 0

    @classmethod
    def load(cls, directory: str | os.PathLike[str], *, shard_files: bool = True) -> Self:
        """Reads the manifest in `directory`.

        Args:
            shard_files: whether the files that it names must be there too. A reader needs none of them, and the owner of
                some shards only those.

        Raises `FormatError` when it is not a manifest, or a file is missing.
        """
        path = Path(directory) / MANIFEST
        try:
            raw = json.loads(path.read_bytes())
            form = raw.pop("format"), raw.pop("format_version")
            shards = tuple(_shard_file(shard) for shard in raw.pop("shards"))
            calibration = raw.pop("calibration", None)
            loaded = cls(**raw, shards=shards)
        except FileNotFoundError:
            raise FormatError(f"{directory}: holds no {MANIFEST}: not a directory that `cotra build` made") from None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise FormatError(f"{path}: malformed manifest: {error}") from error
        if form not in [(FORMAT, version) for version in range(1, FORMAT_VERSION + 1)]:
            raise FormatError(
                f"{path}: is {form[0]} version {form[1]}, and this release reads {FORMAT} {FORMAT_VERSION}"
            )
        for name in (name for shard in shards for name in (shard.name, shard.coarse_name) if name is not None):
            if not isinstance(name, str) or Path(name).name != name:
                raise FormatError(f"{path}: names {name!r}, which is not a file beside it")
            if shard_files and not (path.parent / name).is_file():
                raise FormatError(f"{path}: names {name!r}, which is not a file beside it")
        if loaded.partition not in PARTITIONS:
            raise FormatError(f"{path}: its partition {loaded.partition!r} is not one of {', '.join(PARTITIONS)}")
        if loaded.graph not in GRAPHS:
            raise FormatError(f"{path}: its graph {loaded.graph!r} is not one of {', '.join(GRAPHS)}")
        if why := _fault(loaded, form[1]):
            raise FormatError(f"{path}: {why}")
        if calibration is not None:
            try:
                loaded = replace(loaded, calibration=Calibration.from_json(calibration))
            except FormatError as error:
                raise FormatError(f"{path}: {error}") from None
        return loaded

    def save(self, directory: Path) -> None:
        """Writes the manifest."""
        raw = {"format": FORMAT, "format_version": FORMAT_VERSION, **self.summary(), "calibration": None}
        shards = []
        for number, shard in enumerate(self.shards):
            text = json.dumps(raw["shards"][number] | {"centroid": None}, indent=2)
            shards.append(text.removesuffix("null\n}") + json.dumps(shard.centroid) + "\n}")
        text = json.dumps(raw | {"shards": []}, indent=2).replace(
            '"shards": []', '"shards": [' + ",".join(f"\n{shard}" for shard in shards).replace("\n", "\n    ") + "\n  ]"
        )
        if self.calibration is not None:  # on one line, as centroids are: nobody reads these numbers
            text = text.removesuffix("null\n}") + json.dumps(self.calibration.to_json()) + "\n}"
        (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")

    def summary(self) -> dict[str, Any]:
        """All but the calibration, as values that JSON knows."""
        return {name: value for name, value in asdict(self).items() if name != "calibration"}

    def coarse_table(self, directory: str | os.PathLike[str], shard: int) -> CoarseTable | None:
        """The coarse table of a shard; None in a collection of version 1. Raises `FormatError`, also for another shard's."""
        entry = self.shards[shard]
        if entry.coarse_name is None:
            return None
        path = Path(directory) / entry.coarse_name
        try:
            table = CoarseTable.decode(path.read_bytes())
        except FormatError as error:
            raise FormatError(f"{path}: {error}") from None
        if (table.count, table.dim) != (entry.count, self.dim):
            raise FormatError(f"{path}: is of {table.count} vectors of dimension {table.dim}, and the shard is not")
        return table

    def router(self, directory: str | os.PathLike[str]) -> Router | None:
        """Compass over the shards of `directory`; None in a collection of version 1. Raises `FormatError`."""
        tables = [self.coarse_table(directory, number) for number in range(len(self.shards))]
        known = [table for table in tables if table is not None]
        return Router(known, self.calibration, self.metric) if len(known) == len(tables) else None


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


def collection_directory(path: str | os.PathLike[str]) -> Path:
    """The directory of the collection that `path` names: itself, or its manifest. Raises `FormatError` for any other."""
    given = Path(path)
    if given.is_dir():
        return given
    if given.name == MANIFEST and given.is_file():
        return given.parent
    if given.suffix == ".json" and given.is_file():
        try:
            json.loads(given.read_bytes())
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{given}: malformed manifest: {error}") from None
    raise FormatError(f"{given}: is neither a directory that `cotra build` made nor its {MANIFEST}")


def place_of(path: str | os.PathLike[str]) -> tuple[Collection, int] | None:
    """The collection in whose directory a shard's file lies, and the shard's number in it; None where it is in none.

    Raises `FormatError` for a manifest that is malformed.
    """
    file = Path(path)
    if not (file.parent / MANIFEST).is_file():
        return None
    collection = Collection.load(file.parent, shard_files=False)
    numbers = [number for number, shard in enumerate(collection.shards) if shard.name == file.name]
    return (collection, numbers[0]) if numbers else None


def coarse_of(path: str | os.PathLike[str]) -> tuple[CoarseTable, dict[str, Any]] | None:
    """The coarse table of a shard's file, and what goes with it on the wire (type 53): its number in the collection that it
    lies in, and that one's calibration. None where it is in none.

    Raises `FormatError` for a collection that is broken, OSError where the table is missing.
    """
    place = place_of(path)
    if place is None:
        return None
    collection, number = place
    table = collection.coarse_table(Path(path).parent, number)
    if table is None:
        return None
    calibration = collection.calibration
    return table, {"shard": number, "calibration": None if calibration is None else calibration.to_json()}


def shard_paths(paths: Iterable[str | os.PathLike[str]], shards: Sequence[int] | None = None) -> list[Path]:
    """The shard files that `paths` name: files as they are, collections by their directory or manifest.

    Args:
        paths: files and collections.
        shards: of collections only those with these numbers; None: all. The files of others need not be there.

    Raises:
        FormatError: no collection, a malformed one, or one with files missing. InvalidInputError: a number that it does not
        have, or numbers for what is no collection.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir() and path.name != MANIFEST:
            if shards is not None:
                raise InvalidInputError(f"{path}: is no collection, and shards cannot be chosen of it")
            found.append(path)
            continue
        directory = collection_directory(path)
        entries = Collection.load(directory, shard_files=shards is None).shards
        for number in range(len(entries)) if shards is None else shards:
            if not 0 <= number < len(entries):
                raise InvalidInputError(f"{path}: has no shard {number}: its shards are 0 to {len(entries) - 1}")
            found.append(directory / entries[number].name)
    return found


def _shard_file(raw: dict[str, Any]) -> ShardFile:
    centroid = raw.get("centroid")
    return ShardFile(**raw | ({} if centroid is None else {"centroid": tuple(centroid)}))


def _fault(collection: Collection, version: int) -> str:
    """What is wrong with a manifest's numbers; "" when nothing is."""
    shards = collection.shards

    def whole(value: object, low: int, bits: int) -> bool:
        return type(value) is int and low <= value < 1 << bits

    if not whole(collection.dim, 1, 31) or not whole(collection.count, 1, 63) or not whole(collection.graph_id, 0, 64):
        return "its dim, count or graph_id is out of range"
    base = 0
    for number, shard in enumerate(shards):
        sizes = (shard.count, 1, 31), (shard.first_id, 0, 63), (shard.image_bytes, 1, 63), (shard.base, 0, 31)
        if not all(whole(*size) for size in sizes):
            return f"shard {number}: its count, first_id, image_bytes or base is out of range"
        if version >= 3 and not (whole(shard.generation, 0, 64) and whole(shard.image_checksum, 0, 64)):
            return f"shard {number}: its generation or image_checksum is out of range"
        if shard.base != (base if collection.graph_id else 0):
            return f"shard {number}: its base is {shard.base}, and the shards before it hold {base} nodes"
        base += shard.count
        place = shard.centroid
        if place is not None and not (
            len(place) == collection.dim
            and all(type(value) in (int, float) and math.isfinite(value) for value in place)
        ):
            return f"shard {number}: its centroid is not {collection.dim} finite numbers"
    return ""


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
