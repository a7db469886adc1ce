"""Collections: one data set split over several shard files, with a manifest and coarse tables beside them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from cotra_rdma.arena import Arena
from cotra_rdma.channel import Channel
from cotra_rdma.coarse import N_LISTS, CoarseTable
from cotra_rdma.compass import CALIBRATION_K, N_HELD_OUT, Calibration, HeldOut, Router, calibrate, exact_neighbours
from cotra_rdma.datasets import VectorFile
from cotra_rdma.engine import ImageInfo
from cotra_rdma.errors import FormatError, InvalidInputError
from cotra_rdma.global_graph import GraphPlan, channel_of_file, link_shard
from cotra_rdma.kmeans import balanced_partition, normalised
from cotra_rdma.shard import Shard

MANIFEST = "collection.json"
FORMAT = "cotra-collection"
FORMAT_VERSION = 2  # 1 had no partition, coarse tables or calibration, and is read still

PARTITIONS = ("range", "kmeans")
GRAPHS = ("independent", "global")
PACK_SHARE = 0.1  # of the time that a shard takes, about

_READ_ROWS = 65_536
_OWN = ".own"  # of a shard's image until it is linked to the others
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
    """

    name: str
    first_id: int
    count: int
    image_bytes: int
    coarse_name: str | None = None


@dataclass(frozen=True, slots=True)
class Collection:
    """What the manifest says.

    Attributes:
        dim, metric, count, M, ef_construction, seed: what it was built from and with.
        generation: counts up when a collection is built again in the same place.
        shards: in the order in which they are served.
        partition: how the rows were split: "range" or "kmeans".
        graph: "independent": each shard has a graph of its own; "global": they make one graph (`cotra_rdma.global_graph`).
        calibration: of Compass; None where there is one shard, or too few vectors to learn from.
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
            shards = tuple(ShardFile(**shard) for shard in raw.pop("shards"))
            calibration = raw.pop("calibration", None)
            loaded = cls(**raw, shards=shards)
        except FileNotFoundError:
            raise FormatError(f"{directory}: holds no {MANIFEST}: not a directory that `cotra build` made") from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise FormatError(f"{path}: malformed manifest: {error}") from error
        if form not in ((FORMAT, 1), (FORMAT, FORMAT_VERSION)):
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
        if calibration is not None:
            try:
                loaded = replace(loaded, calibration=Calibration.from_json(calibration))
            except FormatError as error:
                raise FormatError(f"{path}: {error}") from None
        return loaded

    def save(self, directory: Path) -> None:
        """Writes the manifest."""
        raw = {"format": FORMAT, "format_version": FORMAT_VERSION, **self.summary(), "calibration": None}
        text = json.dumps(raw, indent=2)
        if self.calibration is not None:  # on one line: nobody reads these numbers
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
) -> Collection:
    """Splits a file's rows into `n_shards` parts, builds each and writes them to `directory`, with their coarse tables.

    One shard is in memory at a time, and 8 bytes for each row. Files are written aside and renamed when all are whole: a
    failed run leaves the directory as it was.

    Args:
        vectors: the data set; row numbers become ids.
        directory: made when it is missing.
        n_shards: at most one a row.
        metric, M, ef_construction, seed, n_threads: as `Shard.build`.
        partition: "range": equal ranges of rows; "kmeans": neighbours together, and no shard larger than 1.1 times the
            mean, so that Compass can leave shards out. None: "kmeans" for one graph, else "range".
        graph: "independent": each shard has a graph of its own, and is searched by itself; "global": the shards' graphs are
            linked to one (`cotra_rdma.global_graph`), and a query is one walk over all of them.
        n_lists, ivf_bits: inverted lists beside the graphs, of all shards together, and bits a dimension of their codes; 0
            lists for none (`Shard.build`).
        vector_type: how own vectors are held, as `Shard.build`.
        force: replace a collection that is there already.
        progress: told how far each shard is.

    Raises:
        InvalidInputError: there is a collection already, or a value is out of its range.
    """
    out = Path(directory)
    if n_lists and not n_shards <= n_lists <= vectors.count:
        raise InvalidInputError(f"n_lists must be 0 or in [{n_shards}, {vectors.count}], not {n_lists}")
    if graph not in GRAPHS:
        raise InvalidInputError(f"graph must be one of {', '.join(GRAPHS)}, not {graph!r}")
    partition = partition or ("kmeans" if graph == "global" else "range")
    if partition not in PARTITIONS:
        raise InvalidInputError(f"partition must be one of {', '.join(PARTITIONS)}, not {partition!r}")
    one_graph = graph == "global" and n_shards > 1
    if one_graph and partition != "kmeans":
        raise InvalidInputError("one graph over all shards needs neighbours together: partition kmeans")
    if not 1 <= n_shards <= vectors.count:
        raise InvalidInputError(f"{vectors.count} rows cannot be split into {n_shards} shards")
    if out.exists() and not out.is_dir():
        raise InvalidInputError(f"{out}: exists and is not a directory")
    old = sorted([*out.glob("shard-*.cotra"), *out.glob("shard-*.coarse"), *out.glob(MANIFEST)])
    if old and not force:
        raise InvalidInputError(
            f"{out}: holds a collection already ({old[0].name}); it is replaced only with force (--force)"
        )
    generation = _generation(out) + 1
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".building-", dir=out))
    try:
        part, centroids = _partition(vectors, n_shards, partition, metric, seed, n_threads, progress)
        mean = _mean(vectors, metric) if one_graph else None
        infos: list[ImageInfo] = []
        shards: list[ShardFile] = []
        tables: list[CoarseTable] = []
        done = 0
        lists = np.empty(vectors.count, np.int32)  # of each row, counted over all shards
        scatter = np.zeros((vectors.dim, vectors.dim))
        for number in range(n_shards):
            ids = np.flatnonzero(part == number)
            rows = _gather(vectors, ids)
            name = f"shard-{number:03d}"
            with Shard.build(
                rows,
                ids=ids,
                metric=metric,
                M=M,
                ef_construction=ef_construction,
                seed=seed,
                n_threads=n_threads,
                progress=progress and _rows_done(progress, number, done, len(ids)),
                generation=generation,
                n_lists=0 if one_graph else _lists_of(n_lists, len(ids), vectors.count),
                ivf_bits=ivf_bits,
                vector_type=vector_type,
                mean=mean,
            ) as shard:
                shard.save(aside / f"{name}{_OWN if one_graph else '.cotra'}")
                infos.append(shard.info)
            table, clusters = CoarseTable.build(rows, N_LISTS, metric=metric, seed=seed, n_threads=n_threads)
            (aside / f"{name}.coarse").write_bytes(table.encode())
            lists[ids] = clusters.assignment + sum(map(len, tables))
            scatter += _scatter(rows, clusters.centroids, clusters.assignment, metric)
            tables.append(CoarseTable.decode(table.encode()))
            shards.append(ShardFile(f"{name}.cotra", int(ids[0]), len(ids), infos[-1].image_bytes, f"{name}.coarse"))
            done += len(ids)
        if one_graph:
            plan = GraphPlan.of(infos, centroids)
            for number, entry in enumerate(shards):
                lists_here = _lists_of(n_lists, entry.count, vectors.count)
                report = progress and _links_done(progress, number, int(plan.bases[number]))
                with _linked(aside, number, infos, plan, lists_here, ivf_bits, seed, n_threads, report) as shard:
                    shard.save(aside / entry.name)
                    shards[number] = replace(entry, image_bytes=shard.info.image_bytes)
        collection = Collection(
            vectors.dim,
            metric,
            vectors.count,
            M,
            ef_construction,
            seed,
            generation,
            tuple(shards),
            partition,
            graph,
            _calibration(vectors, tables, lists, scatter, metric, seed, progress),
        )
        collection.save(aside)
        made_names = [name for shard in shards for name in (shard.name, shard.coarse_name) if name is not None]
        for name in [*made_names, MANIFEST]:
            (aside / name).replace(out / name)
        for path in set(old) - {out / name for name in [MANIFEST, *made_names]}:
            path.unlink()
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if made:
            with contextlib.suppress(OSError):  # it is not empty: the run went well
                out.rmdir()
    return collection


def collection_directory(path: str | os.PathLike[str]) -> Path:
    """The directory of the collection that `path` names: itself, or its manifest. Raises `FormatError` for any other."""
    given = Path(path)
    if given.is_dir():
        return given
    if given.name == MANIFEST and given.is_file():
        return given.parent
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


def _generation(directory: Path) -> int:
    try:
        return Collection.load(directory).generation
    except FormatError:
        return 0


def _partition(
    vectors: VectorFile,
    n_shards: int,
    partition: str,
    metric: str,
    seed: int,
    n_threads: int,
    progress: Progress | None,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """The shard of each row, none of them empty; and for "kmeans" the shards' centroids, float32[n_shards, dim]."""
    if partition == "range" or n_shards == 1:
        bounds = np.linspace(0, vectors.count, n_shards + 1).astype(int)
        return np.repeat(np.arange(n_shards, dtype=np.int32), np.diff(bounds)), np.empty((0, vectors.dim), np.float32)
    report = None
    if progress is not None:

        def report(phase: str, done: int, total: int) -> None:
            progress(-1, "partition", done if phase == "assign" else 0)

    part, centroids = balanced_partition(
        vectors, n_shards, seed=seed, n_threads=n_threads, metric=metric, progress=report
    )
    counts = np.bincount(part, minlength=n_shards)
    for empty in np.flatnonzero(counts == 0):  # of equal vectors, or very few
        giver = int(counts.argmax())
        taken = np.flatnonzero(part == giver)[: max(1, counts[giver] // 2)]
        part[taken] = empty
        counts[giver] -= len(taken)
        counts[empty] += len(taken)
    return part, centroids


def _mean(vectors: VectorFile, metric: str) -> npt.NDArray[np.float32]:
    """The mean of all vectors, as they are stored."""
    total = np.zeros(vectors.dim)
    for start in range(0, vectors.count, _READ_ROWS):
        rows = vectors.read(start, min(start + _READ_ROWS, vectors.count))
        total += (normalised(rows) if metric == "cosine" else rows).sum(axis=0, dtype=np.float64)
    return (total / vectors.count).astype(np.float32)


def _lists_of(n_lists: int, count: int, total: int) -> int:
    """A shard's part of the inverted lists."""
    return min(count, max(1, round(n_lists * count / total))) if n_lists else 0


def _linked(
    aside: Path,
    number: int,
    infos: Sequence[ImageInfo],
    plan: GraphPlan,
    n_lists: int,
    ivf_bits: int,
    seed: int,
    n_threads: int,
    progress: Callable[[str, int, int], None] | None,
) -> Shard:
    """A shard as a part of the graph over all of them, made of the images that they built by themselves."""

    def open_channel(other: int) -> contextlib.AbstractContextManager[Channel]:
        return channel_of_file(aside / f"shard-{other:03d}{_OWN}", infos[other].record_bytes)

    with Arena.map_file(aside / f"shard-{number:03d}{_OWN}") as own:
        arena = link_shard(own, number, plan, open_channel, n_threads=n_threads, progress=progress)
    return Shard.of_arena(arena, n_lists=n_lists, ivf_bits=ivf_bits, seed=seed, n_threads=n_threads)


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


def _scatter(
    rows: npt.NDArray[Any], centroids: npt.NDArray[np.float32], lists: npt.NDArray[np.int32], metric: str
) -> npt.NDArray[np.float64]:
    """The covariance of a shard's members about their centroids, times their number: float64[dim, dim], from a sample."""
    chosen = np.linspace(0, len(rows) - 1, min(_SCATTER_ROWS, len(rows))).astype(np.int64)
    some = normalised(rows[chosen]) if metric == "cosine" else rows[chosen].astype(np.float32)
    gaps = some - centroids[lists[chosen]]
    return np.asarray((gaps.T @ gaps).astype(np.float64) * (len(rows) / len(chosen)))


def _calibration(
    vectors: VectorFile,
    tables: list[CoarseTable],
    lists: npt.NDArray[np.int32],
    scatter: npt.NDArray[np.float64],
    metric: str,
    seed: int,
    progress: Progress | None,
) -> Calibration | None:
    k = CALIBRATION_K
    if len(tables) < 2 or vectors.count <= k:
        return None
    generator = np.random.default_rng(seed)
    rows = np.sort(generator.choice(vectors.count, min(N_HELD_OUT, vectors.count), replace=False, shuffle=False))
    report = None
    if progress is not None:

        def report(done: int, total: int) -> None:
            progress(-1, "calibrate", done)

    near = exact_neighbours(vectors, rows, k, metric, report)
    order = generator.permutation(len(rows))  # the first model is fitted to the first of them
    held_out = HeldOut(
        _gather(vectors, rows)[order].astype(np.float32),
        lists[rows[order]].astype(np.int64),
        lists[near[order]].astype(np.int64),
    )
    return calibrate(tables, held_out, scatter, metric)


def _links_done(progress: Progress, number: int, start: int) -> Callable[[str, int, int], None]:
    return lambda phase, done, total: progress(number, phase, start + done)


def _rows_done(progress: Progress, number: int, start: int, count: int) -> Callable[[str, int, int], None]:
    def report(phase: str, done: int, total: int) -> None:
        share = done / max(total, 1)
        share = share * (1 - PACK_SHARE) if phase == "build" else 1 - PACK_SHARE + share * PACK_SHARE
        progress(number, phase, start + round(share * count))

    return report
