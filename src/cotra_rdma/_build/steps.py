"""The build of one graph, shard by shard: the same steps in one process, in several, and on a machine for each shard.

A `ShardBuilder` does the work of one shard, a step at a time, and knows of the others only what they told it (`Mail`):

    train      the first one learns what decides a row's shard from a sample, and tells all
    count      each counts for its slice of the rows what shard they would take, and tells all
    divide     each decides that for its slice, and tells every shard which of these rows are its own
    build      each builds its own graph, and tells all what became of it
    link       each links its own to near nodes of the others (`cross_links`), whose images it READs; tells all
    calibrate  the first one fits Compass to what all found for some vectors, and tells all

What is told is a file where the builders share a directory, an envelope where they do not. Rows are read from the input, which
every builder can read; none holds more of them than some thousand, nor the numbers of other rows than its own and its
slice's.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from cotra_rdma._native.arena import Arena, trim_memory
from cotra_rdma._build.mail import (
    DirectoryMail,
    Mail,
    ToldCalibration,
    ToldCounts,
    ToldEvidence,
    ToldImage,
    ToldLinks,
    ToldModel,
    ToldRows,
    numbers,
    told,
)
from cotra_rdma._native.channel import Channel
from cotra_rdma._routing.coarse_table import N_LISTS, CoarseTable
from cotra_rdma._routing.calibration import CALIBRATION_K, Calibration
from cotra_rdma._routing.fit import HeldOut, calibrate, held_out_rows
from cotra_rdma._routing.exact_neighbours import nearest
from cotra_rdma.datasets import VectorFile, open_vectors
from cotra_rdma._native.image import ImageInfo
from cotra_rdma.errors import FormatError
from cotra_rdma._core.exact import long_products
from cotra_rdma._build.cross_links import GraphPlan, channel_of_file, link_shard
from cotra_rdma._clustering.kmeans import Clusters, normalised
from cotra_rdma.protocol.tables import BuildExchangeRequest, CentroidTable
from cotra_rdma._clustering.balanced import (
    PartModel,
    SlicePlan,
    capacity,
    cheapest,
    fill_slice,
    plan_slices,
    slice_of,
    train_parts,
)
from cotra_rdma._shard.shard import Shard

STEPS = ("train", "count", "divide", "build", "link", "calibrate")
FIRST_ALONE = ("train", "calibrate")
"""Steps that only the builder of shard 0 takes."""
PACK_SHARE = 0.1  # of the time that a shard takes, about

_COPY_BYTES = 4 << 20  # of rows, at once
_HELD_OUT = 1000  # fewer than where each shard is walked by itself: Compass has little to save before one walk over all
_SCATTER_ROWS = 2048  # of a shard, that tell in which directions lists are wide

Progress = Callable[[str, int], None]
"""Called with a step's phase ("partition", "build", "link", "pack", "border", "relink", "calibrate") and the rows done of
those that this builder has to do in it."""

AllProgress = Callable[[int, str, int], None]
"""The same of all builders: called with (shard, phase, rows done)."""

_SCATTER_ROWS = 128  # of a covariance, at once
T = TypeVar("T", bound=msgspec.Struct)


@dataclass(frozen=True, slots=True)
class BuildSpec:
    """What all builders of one graph have to agree on; as the arguments of `build_collection`.

    Attributes:
        count, dim: of the input.
        n_threads: of each builder; 0 for all cores.
    """

    count: int
    dim: int
    n_shards: int
    metric: str
    M: int
    ef_construction: int
    seed: int
    n_threads: int
    n_lists: int
    ivf_bits: int
    vector_type: str
    generation: int


@dataclass(slots=True)
class ShardBuilder:
    """The builder of shard `number`.

    Attributes:
        vectors: the input.
        scratch: a directory for what it keeps between steps, and for what it makes: `shard-000.cotra` and `.coarse`.
    """

    spec: BuildSpec
    number: int
    vectors: VectorFile
    mail: Mail
    scratch: Path
    progress: Progress | None = None
    _begin: int = field(init=False)
    _end: int = field(init=False)

    def __post_init__(self) -> None:
        self._begin, self._end = slice_of(self.spec.count, self.spec.n_shards, self.number)

    def path(self, suffix: str, number: int | None = None) -> Path:
        """A shard's file in `scratch`: .own, .cotra or .coarse."""
        return self.scratch / f"shard-{self.number if number is None else number:03d}{suffix}"

    def _tell(self, content: msgspec.Struct, to: int | None = None, table: CentroidTable | None = None) -> None:
        message = BuildExchangeRequest.empty(self.number, msgspec.to_builtins(content, builtin_types=(bytes,)))
        if table is not None:
            none = np.zeros(len(table.sizes), np.uint64)
            message = replace(message, table=table, offsets=none, lengths=none.astype(np.uint32))
        self.mail.tell(replace(message, generation=self.spec.generation), to)

    def _hear(self, step: str, kind: type[T], sender: int) -> T:
        return told(self.mail.hear(step, sender), kind)

    def _done(self, phase: str) -> Callable[[int, int], None] | None:
        progress = self.progress
        return None if progress is None else lambda done, _total: progress(phase, done)

    def _slice(self) -> _Slice:
        return _Slice(self.vectors, self._begin, self._end)

    def run(self, step: str) -> None:
        """A step, where builders share the directory: own images are files in it."""
        if step == "build":
            with self.build_image() as shard:
                shard.save(self.path(".own"))
                self.tell_image(shard)
        elif step == "link":
            with Arena.map_file(self.path(".own")) as own:
                self.link(own, lambda other, info: channel_of_file(self.path(".own", other), info.record_bytes))
        else:
            {"train": self.train, "count": self.count, "divide": self.divide, "calibrate": self.calibrate}[step]()
        trim_memory()

    # ---- whose rows are whose ----

    def train(self) -> None:
        """Learns the partition."""
        spec, progress = self.spec, self.progress
        model = train_parts(
            self.vectors,
            spec.n_shards,
            seed=spec.seed,
            n_threads=spec.n_threads,
            metric=spec.metric,
            progress=progress and (lambda _phase, _done, _total: progress("partition", 0)),
        )
        fields = (np.ascontiguousarray(part, "<f4").tobytes() for part in (model.centre, model.offsets, model.prices))
        self._tell(ToldModel("train", *fields))

    def _model(self) -> PartModel:
        raw, dim, parts = self._hear("train", ToldModel, 0), self.spec.dim, self.spec.n_shards
        return PartModel(
            self.spec.metric,
            numbers(raw.centre, "<f4", (dim,), "partition"),
            numbers(raw.offsets, "<f4", (parts, dim), "partition"),
            numbers(raw.prices, "<f4", (parts,), "partition"),
        )

    def count(self) -> None:
        """Counts what the slice's rows would take."""
        report = self._done("partition")
        part, total = cheapest(
            self._model(),
            self._slice(),
            n_threads=self.spec.n_threads,
            progress=report and (lambda _phase, done, all_rows: report(done, all_rows)),
        )
        np.save(self.scratch / f"part-{self.number}.npy", part)
        counts = np.bincount(part, minlength=self.spec.n_shards).astype("<i8")
        self._tell(ToldCounts("count", counts.tobytes(), total.astype("<f8").tobytes()))

    def _counts(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """What all slices counted, int64[n_shards, n_shards]; and the mean of all vectors, float32[dim]."""
        n, counts, total = self.spec.n_shards, [], np.zeros(self.spec.dim)
        for sender in range(n):
            raw = self._hear("count", ToldCounts, sender)
            counts.append(numbers(raw.counts, "<i8", (n,), f"counts of slice {sender}").astype(np.int64))
            begin, end = slice_of(self.spec.count, n, sender)
            if (counts[-1] < 0).any() or (counts[-1] > end - begin).any() or counts[-1].sum() != end - begin:
                raise FormatError(f"counts of slice {sender}: are not those of {end - begin} rows")
            total += numbers(raw.total, "<f8", (self.spec.dim,), f"sum of slice {sender}")
        return np.stack(counts), (total / self.spec.count).astype(np.float32)

    def _plan_of(self, counts: npt.NDArray[np.int64]) -> SlicePlan:
        return plan_slices(counts, capacity(self.spec.count, self.spec.n_shards))

    def divide(self) -> None:
        """Decides whose the slice's rows are."""
        path = self.scratch / f"part-{self.number}.npy"
        part, (counts, _) = np.load(path), self._counts()
        plan, model = self._plan_of(counts), self._model()
        fill_slice(model, self._slice(), part, counts, plan, self.number, n_threads=self.spec.n_threads)
        path.unlink()
        for shard in range(self.spec.n_shards):
            rows = np.flatnonzero(part == shard).astype("<u4")
            self._tell(ToldRows("divide", rows.tobytes()), shard)

    def _ids(self) -> npt.NDArray[np.int64]:
        """This shard's rows, ascending."""
        found = []
        for sender in range(self.spec.n_shards):
            raw = self._hear("divide", ToldRows, sender).rows
            rows = numbers(raw, "<u4", (len(raw) // 4,), f"rows of slice {sender}").astype(np.int64)
            begin, end = slice_of(self.spec.count, self.spec.n_shards, sender)
            if len(rows) and (rows[-1] >= end - begin or (np.diff(rows) <= 0).any()):
                raise FormatError(f"rows of slice {sender}: do not ascend, or are not among its {end - begin}")
            found.append(rows + begin)
        ids = np.concatenate(found)
        if not 1 <= len(ids) <= capacity(self.spec.count, self.spec.n_shards):
            raise FormatError(f"shard {self.number}: {len(ids)} rows were given to it")
        return ids

    # ---- its own graph ----

    def build_image(self) -> Shard:
        """Builds the shard by itself; it is the caller's."""
        spec, ids = self.spec, self._ids()
        mean = self._counts()[1]
        own_rows = self.scratch / f"rows-{self.number}.npy"
        _copy_rows(self.vectors, ids, own_rows)
        with open_vectors(own_rows) as rows:
            table, clusters = CoarseTable.build(
                rows, N_LISTS, metric=spec.metric, seed=spec.seed, n_threads=spec.n_threads
            )
            self.path(".coarse").write_bytes(table.encode())
            evidence = self._evidence(rows, ids, clusters)
            shard = Shard.build(
                rows,
                ids=ids,
                metric=spec.metric,
                M=spec.M,
                ef_construction=spec.ef_construction,
                seed=spec.seed,
                n_threads=spec.n_threads,
                progress=self._rows_done(len(ids)),
                generation=spec.generation,
                vector_type=spec.vector_type,
                mean=mean,
            )
        own_rows.unlink()
        self._tell(evidence, 0)
        return shard

    def tell_image(self, shard: Shard) -> None:
        """Tells all what `build_image` made: it can be READ from now on."""
        info, centroid = shard.info, self._model().centroids[self.number]
        table = CoarseTable.decode(self.path(".coarse").read_bytes())
        names = [name for name in ToldImage.__struct_fields__ if hasattr(info, name)]
        image = ToldImage(
            "build",
            first_id=int(shard.labels().min()),
            centroid=centroid.astype("<f4").tobytes(),
            **{name: getattr(info, name) for name in names},
        )
        self._tell(image, table=CentroidTable.of(table))

    def _rows_done(self, count: int) -> Callable[[str, int, int], None] | None:
        progress = self.progress
        if progress is None:
            return None

        def report(phase: str, done: int, total: int) -> None:
            share = done / max(total, 1)
            share = share * (1 - PACK_SHARE) if phase == "build" else 1 - PACK_SHARE + share * PACK_SHARE
            progress(phase, round(share * count))

        return report

    def _evidence(self, rows: VectorFile, ids: npt.NDArray[np.int64], clusters: Clusters) -> ToldEvidence:
        held, _ = held_out_rows(self.spec.count, self.spec.seed, _HELD_OUT)
        queries = self.vectors.take(held).astype(np.float32)
        place = np.searchsorted(ids, held)
        place[place == len(ids)] = 0
        own = np.where(ids[place] == held, place, -1)
        found, gaps = nearest(rows, queries, own, CALIBRATION_K, self.spec.metric)
        lists = clusters.assignment
        some = rows.take(np.linspace(0, len(rows) - 1, min(_SCATTER_ROWS, len(rows))).astype(np.int64))
        chosen = lists[np.linspace(0, len(rows) - 1, len(some)).astype(np.int64)]
        return ToldEvidence(
            "evidence",
            scatter(some, clusters.centroids, chosen, len(rows), self.spec.metric).astype("<f8").tobytes(),
            np.where(own >= 0, lists[own], -1).astype("<i4").tobytes(),
            np.where(found >= 0, gaps, np.finfo(np.float32).max).astype("<f4").tobytes(),
            np.where(found >= 0, lists[found], -1).astype("<i4").tobytes(),
        )

    # ---- one graph ----

    def images(self) -> tuple[list[ToldImage], list[CoarseTable], GraphPlan]:
        """What all shards told of themselves. Raises `FormatError`, `InvalidInputError` where they are no graph."""
        images, tables, centroids = [], [], []
        for sender in range(self.spec.n_shards):
            message = self.mail.hear("build", sender)
            image, table = told(message, ToldImage), message.table
            tables.append(
                CoarseTable(
                    table.centroids.astype(np.float32), table.sizes.astype(np.int64), table.radii.astype(np.float32)
                )
            )
            centroids.append(numbers(image.centroid, "<f4", (self.spec.dim,), f"centroid of shard {sender}"))
            if (image.dim, image.metric) != (self.spec.dim, self.spec.metric):
                raise FormatError(f"shard {sender}: is of dim {image.dim} and metric {image.metric}")
            if not 1 <= image.count < 2**31 or (tables[-1].count, tables[-1].dim) != (image.count, image.dim):
                raise FormatError(f"shard {sender}: {image.count} vectors, and a coarse table of {tables[-1].count}")
            if not 0 <= image.image_checksum < 2**64 or not 0 <= image.first_id < self.spec.count:
                raise FormatError(f"shard {sender}: its checksum or first id is out of range")
            images.append(image)
        if sum(image.count for image in images) != self.spec.count:
            raise FormatError(f"the shards hold {sum(image.count for image in images)} of {self.spec.count} vectors")
        return images, tables, GraphPlan.of(images, np.stack(centroids))

    def link(self, own: Arena, open_image: Callable[[int, ImageInfo], AbstractContextManager[Channel]]) -> None:
        """Writes the shard as a part of the graph.

        Args:
            own: what `build_image` made.
            open_image: a channel to another shard's own image, which is like this one's.
        """
        spec, (images, _, plan) = self.spec, self.images()
        progress = self.progress
        info = ImageInfo.of_arena(own)
        made = link_shard(
            own,
            self.number,
            plan,
            lambda other: open_image(other, info),
            self.path(".cotra"),
            n_threads=spec.n_threads,
            progress=progress and (lambda phase, done, _total: progress(phase, done)),
        )
        lists = lists_of(spec.n_lists, images[self.number].count, spec.count)
        if lists:
            made = self._add_lists(lists)
        self._tell(ToldLinks("link", made.image_bytes, made.image_checksum))

    def _add_lists(self, n_lists: int) -> ImageInfo:
        """Inverted lists are put beside the graph in memory."""
        path = self.path(".cotra")
        arena = Arena.create(path.stat().st_size, huge=True)
        with path.open("rb") as file, arena.view() as view:
            file.readinto(view)
        spec = self.spec
        with Shard.of_arena(
            arena, n_lists=n_lists, ivf_bits=spec.ivf_bits, seed=spec.seed, n_threads=spec.n_threads
        ) as shard:
            shard.save(path)
            return shard.info

    # ---- Compass ----

    def calibrate(self) -> None:
        """Fits Compass to what all found."""
        spec, tables = self.spec, self.images()[1]
        held, order = held_out_rows(spec.count, spec.seed, _HELD_OUT)
        k, shape = CALIBRATION_K, (len(held), CALIBRATION_K)
        total, start = np.zeros((spec.dim, spec.dim)), 0
        lists = np.full(len(held), -1, np.int64)
        gaps = np.full(shape, np.finfo(np.float32).max, np.float32)
        near = np.full(shape, -1, np.int64)
        for sender, table in enumerate(tables):
            raw, what = self._hear("evidence", ToldEvidence, sender), f"evidence of shard {sender}"
            total += numbers(raw.scatter, "<f8", total.shape, what)
            own = numbers(raw.lists, "<i4", lists.shape, what)
            found = numbers(raw.near, "<i4", shape, what)
            if max(own.max(initial=-1), found.max(initial=-1)) >= len(table):
                raise FormatError(f"{what}: names a list that the shard has not")
            lists = np.where(own >= 0, own + start, lists)
            gaps = np.concatenate([gaps, numbers(raw.gaps, "<f4", shape, what)], axis=1)
            near = np.concatenate([near, np.where(found >= 0, found + start, -1)], axis=1)
            best = np.argsort(gaps, axis=1, kind="stable")[:, :k]
            gaps, near = np.take_along_axis(gaps, best, 1), np.take_along_axis(near, best, 1)
            start += len(table)
        found_all = len(held) and spec.count > k
        if found_all and ((lists < 0).any() or (near < 0).any()):
            raise FormatError("the shards' evidence leaves vectors out")
        calibration = None
        if found_all:
            queries = self.vectors.take(held).astype(np.float32)
            calibration = calibrate(tables, HeldOut(queries[order], lists[order], near[order]), total, spec.metric)
        self._tell(ToldCalibration("calibrate", None if calibration is None else calibration.to_json()))
        if self.progress:
            self.progress("calibrate", spec.count)


# ---- what became of it ----


@dataclass(frozen=True, slots=True)
class BuiltShard:
    """A finished shard of a graph."""

    count: int
    first_id: int
    base: int
    image_bytes: int
    image_checksum: int
    centroid: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class GraphResult:
    """What a build made: the graph's name, its shards, and Compass's calibration."""

    graph_id: int
    shards: tuple[BuiltShard, ...]
    calibration: Calibration | None


def result_of(builder: ShardBuilder) -> GraphResult:
    """What all builders told at the end; the same in each of them. Raises as `ShardBuilder.images`."""
    images, _, plan = builder.images()
    shards = []
    for sender, (image, base, centroid) in enumerate(zip(images, plan.bases, plan.centroids, strict=True)):
        done = told(builder.mail.hear("link", sender), ToldLinks)
        if done.image_bytes <= 0 or not 0 <= done.image_checksum < 2**64:
            raise FormatError(f"shard {sender}: its length or checksum is out of range")
        place = tuple(float(value) for value in centroid)
        shards.append(BuiltShard(image.count, image.first_id, int(base), done.image_bytes, done.image_checksum, place))
    raw = told(builder.mail.hear("calibrate", 0), ToldCalibration).calibration
    return GraphResult(plan.graph_id, tuple(shards), None if raw is None else Calibration.from_json(raw))


def builder_in(
    spec: BuildSpec, vectors: VectorFile, directory: Path, number: int, progress: AllProgress | None
) -> ShardBuilder:
    """The builder of a shard, among others that share the directory."""

    def report(phase: str, done: int) -> None:
        if progress:
            progress(number, phase, done)

    return ShardBuilder(
        spec, number, vectors, DirectoryMail(directory, number), directory, report if progress else None
    )


def build_here(
    spec: BuildSpec, vectors: VectorFile, directory: Path, progress: AllProgress | None = None
) -> GraphResult:
    """All shards in this process, one after the other."""
    for step in STEPS:
        for number in range(1 if step in FIRST_ALONE else spec.n_shards):
            builder_in(spec, vectors, directory, number, progress).run(step)
    return result_of(builder_in(spec, vectors, directory, 0, None))


def lists_of(n_lists: int, count: int, total: int) -> int:
    """A shard's part of the inverted lists."""
    return min(count, max(1, round(n_lists * count / total))) if n_lists else 0


def scatter(
    some: npt.NDArray[Any], centroids: npt.NDArray[np.float32], lists: npt.NDArray[np.int32], count: int, metric: str
) -> npt.NDArray[np.float64]:
    """The covariance of a shard's members about their centroids, times their number: float64[dim, dim].

    Args:
        some: [n, dim], of its `count` members, and `lists` int32[n] that they are in.
    """
    rows = normalised(some) if metric == "cosine" else some.astype(np.float32)
    gaps = rows - centroids[lists]
    found = np.empty((gaps.shape[1], gaps.shape[1]))
    for start in range(0, len(found), _SCATTER_ROWS):
        found[start : start + _SCATTER_ROWS] = long_products(gaps.T[start : start + _SCATTER_ROWS], gaps.T)
    found *= count / len(some)
    return found


@dataclass(frozen=True, slots=True)
class _Slice:
    """Some rows of a file, one after the other, as a `VectorSource`."""

    vectors: VectorFile
    begin: int
    end: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.end - self.begin, self.vectors.dim

    def read(self, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        return self.vectors.read(self.begin + start, self.end if stop is None else self.begin + stop)

    def take(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        return self.vectors.take(rows + self.begin)


def _copy_rows(vectors: VectorFile, ids: npt.NDArray[np.int64], path: Path) -> None:
    """Some rows as a .npy file, in the input's type: read once here, then as often as need be without holding them."""
    header = {"descr": np.lib.format.dtype_to_descr(vectors.dtype), "fortran_order": False}
    with path.open("wb") as file:
        np.lib.format.write_array_header_2_0(file, header | {"shape": (len(ids), vectors.dim)})
        step = max(1, _COPY_BYTES // (vectors.dim * vectors.dtype.itemsize))
        for start in range(0, len(ids), step):
            file.write(vectors.take(ids[start : start + step]).data)
