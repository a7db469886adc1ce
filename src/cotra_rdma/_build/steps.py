"""The steps of a build of one graph.

They are the same in one process, in several processes, and on a machine for each shard.
A `ShardBuilder` does the work of one shard, one step at a time.
It knows about the others only what their messages say (`mail`).

    train      The first builder learns the partition from a sample, and sends it to all.
    count      Each builder counts what its slice of the rows would take, and sends the counts to all.
    divide     Each builder decides the shard of each row of its slice, and sends every shard its rows.
    build      Each builder builds a graph of its own rows, and sends all a description of its image.
    link       Each builder links its nodes to near nodes of the others (`cross_links`), whose images it READs.
    calibrate  The first builder fits Compass to the evidence of all, and sends the calibration to all.

Every builder reads rows from the input.
No builder holds more than some thousand vectors of it at once.
No builder holds the numbers of rows other than those of its shard and its slice.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cotra_rdma._build.cross_links import channel_of_file, link_shard
from cotra_rdma._build.graph_plan import GraphPlan
from cotra_rdma._build.mail import (
    CalibrationMessage,
    CountsMessage,
    DirectoryMail,
    EvidenceMessage,
    ImageMessage,
    LinksMessage,
    M,
    Mail,
    PartitionMessage,
    RowsMessage,
    array_of,
)
from cotra_rdma._build.spec import BuildSpec, Progress, ShardProgress, rows_done, scatter
from cotra_rdma._clustering.balanced import (
    PartModel,
    capacity,
    cheapest,
    fill_slice,
    plan_slices,
    slice_of,
    train_parts,
)
from cotra_rdma._clustering.kmeans import Clusters
from cotra_rdma._native.arena import Arena, trim_memory
from cotra_rdma._native.channel import Channel
from cotra_rdma._native.image import ImageInfo
from cotra_rdma._routing.calibration import CALIBRATION_K, Calibration
from cotra_rdma._routing.coarse_table import N_LISTS, CoarseTable
from cotra_rdma._routing.exact_neighbours import nearest
from cotra_rdma._routing.fit import HeldOut, calibrate, held_out_rows
from cotra_rdma._shard.hnsw_packer import build_image
from cotra_rdma._shard.shard import Shard
from cotra_rdma.datasets import VectorFile, open_vectors
from cotra_rdma.errors import FormatError
from cotra_rdma.protocol.tables import BuildExchangeRequest, CentroidTable

STEPS = ("train", "count", "divide", "build", "link", "calibrate")
FIRST_ALONE = ("train", "calibrate")
"""The steps that only the builder of shard 0 takes."""

_COPY_BYTES = 4 << 20  # of rows that are copied at once
_HELD_OUT = 1000  # fewer than for independent shards: before one walk over all of them, Compass can save little
_SCATTER_SAMPLE = 128  # rows of a shard that say in which directions lists are wide


@dataclass(slots=True)
class ShardBuilder:
    """The builder of one shard.

    Attributes:
        spec: what is built.
        number: the number of the shard.
        vectors: the input.
        mail: the messages to and from the other builders.
        scratch: a directory for the builder's files. Some are kept between steps; `shard-000.cotra` and
            `shard-000.coarse` are the results.
        progress: see `ShardProgress`.
    """

    spec: BuildSpec
    number: int
    vectors: VectorFile
    mail: Mail
    scratch: Path
    progress: ShardProgress | None = None
    _slice: _Slice = field(init=False)

    def __post_init__(self) -> None:
        self._slice = _Slice(self.vectors, *slice_of(self.spec.count, self.spec.n_shards, self.number))

    def path(self, suffix: str, number: int | None = None) -> Path:
        """Returns the path of a shard's file in `scratch`.

        Args:
            suffix: ".own", ".cotra" or ".coarse".
            number: the number of the shard. None stands for this builder's.
        """
        return self.scratch / f"shard-{self.number if number is None else number:03d}{suffix}"

    def _receive(self, kind: type[M], sender: int) -> M:
        return self.mail.receive(kind, sender)[0]

    def run(self, step: str) -> None:
        """Takes a step, in a build whose builders share the directory. Each own image is a file in it."""
        if step == "build":
            with self.build_image() as shard:
                shard.save(self.path(".own"))
                self.announce_image(shard)
        elif step == "link":
            with Arena.map_file(self.path(".own")) as own:
                self.link(own, lambda other, info: channel_of_file(self.path(".own", other), info.record_bytes))
        else:
            {"train": self.train, "count": self.count, "divide": self.divide, "calibrate": self.calibrate}[step]()
        trim_memory()

    # ---- the partition ----

    def train(self) -> None:
        """Learns the partition from a sample, and sends it to all."""
        params, progress = self.spec.params, self.progress
        model = train_parts(
            self.vectors,
            self.spec.n_shards,
            seed=params.seed,
            n_threads=params.n_threads,
            metric=params.metric,
            progress=progress and (lambda _phase, _done, _total: progress("partition", 0)),
        )
        arrays = (model.centre, model.offsets, model.prices)
        self.mail.send(PartitionMessage(*(np.ascontiguousarray(array, "<f4").tobytes() for array in arrays)))

    def _partition(self) -> PartModel:
        """Returns the partition that the first builder learned."""
        raw, dim, parts = self._receive(PartitionMessage, 0), self.spec.dim, self.spec.n_shards
        return PartModel(
            self.spec.params.metric,
            array_of(raw.centre, "<f4", (dim,), "partition"),
            array_of(raw.offsets, "<f4", (parts, dim), "partition"),
            array_of(raw.prices, "<f4", (parts,), "partition"),
        )

    def count(self) -> None:
        """Counts what the rows of this builder's slice would take, and sends the counts to all."""
        progress = self.progress
        part, total = cheapest(
            self._partition(),
            self._slice,
            n_threads=self.spec.params.n_threads,
            progress=progress and (lambda _phase, done, _total: progress("partition", done)),
        )
        np.save(self.scratch / f"part-{self.number}.npy", part)
        counts = np.bincount(part, minlength=self.spec.n_shards).astype("<i8")
        self.mail.send(CountsMessage(counts.tobytes(), total.astype("<f8").tobytes()))

    def _counts(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Returns the counts of all slices, int64[n_shards, n_shards], and the mean of all vectors, float32[dim]."""
        n, counts, total = self.spec.n_shards, [], np.zeros(self.spec.dim)
        for sender in range(n):
            raw = self._receive(CountsMessage, sender)
            counts.append(array_of(raw.counts, "<i8", (n,), f"counts of slice {sender}").astype(np.int64))
            begin, end = slice_of(self.spec.count, n, sender)
            if (counts[-1] < 0).any() or (counts[-1] > end - begin).any() or counts[-1].sum() != end - begin:
                raise FormatError(f"counts of slice {sender}: they are not those of {end - begin} rows")
            total += array_of(raw.total, "<f8", (self.spec.dim,), f"sum of slice {sender}")
        return np.stack(counts), (total / self.spec.count).astype(np.float32)

    def divide(self) -> None:
        """Decides the shard of each row of this builder's slice, and sends every shard its rows."""
        path = self.scratch / f"part-{self.number}.npy"
        part, (counts, _), n_shards = np.load(path), self._counts(), self.spec.n_shards
        plan = plan_slices(counts, capacity(self.spec.count, n_shards))
        n_threads = self.spec.params.n_threads
        fill_slice(self._partition(), self._slice, part, counts, plan, self.number, n_threads=n_threads)
        path.unlink()
        for shard in range(n_shards):
            self.mail.send(RowsMessage(np.flatnonzero(part == shard).astype("<u4").tobytes()), shard)

    def _ids(self) -> npt.NDArray[np.int64]:
        """Returns the rows of this builder's shard, int64[n], ascending."""
        found = []
        for sender in range(self.spec.n_shards):
            raw = self._receive(RowsMessage, sender).rows
            rows = array_of(raw, "<u4", (len(raw) // 4,), f"rows of slice {sender}").astype(np.int64)
            begin, end = slice_of(self.spec.count, self.spec.n_shards, sender)
            if len(rows) and (rows[-1] >= end - begin or (np.diff(rows) <= 0).any()):
                raise FormatError(
                    f"rows of slice {sender}: they do not ascend, or are not among its {end - begin} rows"
                )
            found.append(rows + begin)
        ids = np.concatenate(found)
        most = capacity(self.spec.count, self.spec.n_shards)
        if not 1 <= len(ids) <= most:
            raise FormatError(f"shard {self.number}: it was given {len(ids)} rows, and must have 1 to {most}")
        return ids

    # ---- its own graph ----

    def build_image(self) -> Shard:
        """Builds the shard by itself. The shard belongs to the caller."""
        spec, params, ids = self.spec, self.spec.params, self._ids()
        mean = self._counts()[1]
        own_rows = self.scratch / f"rows-{self.number}.npy"
        _copy_rows(self.vectors, ids, own_rows)
        with open_vectors(own_rows) as rows:
            table, clusters = CoarseTable.build(
                rows, N_LISTS, metric=params.metric, seed=params.seed, n_threads=params.n_threads
            )
            self.path(".coarse").write_bytes(table.encode())
            evidence = self._evidence(rows, ids, clusters)
            image = build_image(
                rows,
                replace(params, n_lists=0),  # they follow the links
                ids,
                generation=spec.generation,
                mean=mean,
                progress=self.progress and rows_done(len(ids), self.progress),
            )
        own_rows.unlink()
        self.mail.send(evidence, 0)
        return Shard.of_arena(image)

    def announce_image(self, shard: Shard) -> None:
        """Sends all a description of the image that `build_image` made. From then on, others READ the image."""
        info, centroid = shard.info, self._partition().centroids[self.number]
        fields = {name: getattr(info, name) for name in ImageMessage.__struct_fields__ if hasattr(info, name)}
        message = ImageMessage(**fields, first_id=int(shard.labels().min()), centroid=centroid.astype("<f4").tobytes())
        table = CentroidTable.of(CoarseTable.decode(self.path(".coarse").read_bytes()))
        none = np.zeros(len(table.sizes), np.uint64)
        with_table = BuildExchangeRequest(self.number, table, none, none.astype(np.uint32), 0, self.spec.generation)
        self.mail.send(message, table=with_table)

    def _evidence(self, rows: VectorFile, ids: npt.NDArray[np.int64], clusters: Clusters) -> EvidenceMessage:
        """Finds out what this shard holds of the neighbours of the held-out vectors.

        Args:
            rows: the vectors of the shard.
            ids: their row numbers in the input, int64[n].
            clusters: the shard's lists.
        """
        params = self.spec.params
        held, _ = held_out_rows(self.spec.count, params.seed, _HELD_OUT)
        queries = self.vectors.take(held).astype(np.float32)
        place = np.searchsorted(ids, held)
        place[place == len(ids)] = 0
        own = np.where(ids[place] == held, place, -1)
        found, gaps = nearest(rows, queries, own, CALIBRATION_K, params.metric)
        lists = clusters.assignment
        chosen = np.linspace(0, len(rows) - 1, min(_SCATTER_SAMPLE, len(rows))).astype(np.int64)
        spread = scatter(rows.take(chosen), clusters.centroids, lists[chosen], len(rows), params.metric)
        return EvidenceMessage(
            spread.astype("<f8").tobytes(),
            np.where(own >= 0, lists[own], -1).astype("<i4").tobytes(),
            np.where(found >= 0, gaps, np.finfo(np.float32).max).astype("<f4").tobytes(),
            np.where(found >= 0, lists[found], -1).astype("<i4").tobytes(),
        )

    # ---- one graph ----

    def images(self) -> tuple[list[ImageMessage], list[CoarseTable], GraphPlan]:
        """Returns the descriptions of all shards' images, their coarse tables, and the plan of the graph.

        Raises:
            FormatError: a description is malformed, or does not fit the build.
            InvalidInputError: the shards cannot be one graph.
        """
        images, tables, centroids = [], [], []
        for sender in range(self.spec.n_shards):
            image, table = self.mail.receive(ImageMessage, sender)
            tables.append(
                CoarseTable(
                    table.centroids.astype(np.float32), table.sizes.astype(np.int64), table.radii.astype(np.float32)
                )
            )
            centroids.append(array_of(image.centroid, "<f4", (self.spec.dim,), f"centroid of shard {sender}"))
            if (image.dim, image.metric) != (self.spec.dim, self.spec.params.metric):
                raise FormatError(
                    f"shard {sender}: its image is of dim {image.dim} and metric {image.metric}, "
                    f"not {self.spec.dim} and {self.spec.params.metric}"
                )
            if not 1 <= image.count < 2**31 or (tables[-1].count, tables[-1].dim) != (image.count, image.dim):
                raise FormatError(
                    f"shard {sender}: its image holds {image.count} vectors, and a coarse table of {tables[-1].count} "
                    "came with it"
                )
            if not 0 <= image.image_checksum < 2**64 or not 0 <= image.first_id < self.spec.count:
                raise FormatError(f"shard {sender}: its checksum or first id is out of range")
            images.append(image)
        total = sum(image.count for image in images)
        if total != self.spec.count:
            raise FormatError(f"the shards hold {total} vectors together, not {self.spec.count}")
        return images, tables, GraphPlan.of(images, np.stack(centroids))

    def link(self, own: Arena, open_image: Callable[[int, ImageInfo], AbstractContextManager[Channel]]) -> None:
        """Writes the shard as a part of the graph.

        Args:
            own: the image that `build_image` made.
            open_image: opens a channel to another shard's own image. It gets the shard's number, and this image's
                header, which is like the other's.
        """
        images, _, plan = self.images()
        progress = self.progress
        info = ImageInfo.of_arena(own)
        made = link_shard(
            own,
            self.number,
            plan,
            lambda other: open_image(other, info),
            self.path(".cotra"),
            n_threads=self.spec.params.n_threads,
            progress=progress and (lambda phase, done, _total: progress(phase, done)),
        )
        n_lists = self.spec.lists_of(images[self.number].count)
        if n_lists:
            made = self._add_lists(n_lists)
        self.mail.send(LinksMessage(made.image_bytes, made.image_checksum))

    def _add_lists(self, n_lists: int) -> ImageInfo:
        """Adds inverted lists to the finished file, and returns its header. The image is in memory meanwhile."""
        path, params = self.path(".cotra"), self.spec.params
        arena = Arena.create(path.stat().st_size, huge=True)
        with path.open("rb") as file, arena.view() as view:
            file.readinto(view)
        with Shard.of_arena(
            arena, n_lists=n_lists, ivf_bits=params.ivf_bits, seed=params.seed, n_threads=params.n_threads
        ) as shard:
            shard.save(path)
            return shard.info

    # ---- Compass ----

    def calibrate(self) -> None:
        """Fits Compass to the evidence of all shards, and sends the calibration to all."""
        spec, tables = self.spec, self.images()[1]
        held, order = held_out_rows(spec.count, spec.params.seed, _HELD_OUT)
        total, lists, near = self._all_evidence(tables, len(held))
        calibration = None
        if len(held) and spec.count > CALIBRATION_K:
            if (lists < 0).any() or (near < 0).any():
                raise FormatError("the shards' evidence does not cover all held-out vectors")
            queries = self.vectors.take(held).astype(np.float32)
            held_out = HeldOut(queries[order], lists[order], near[order])
            calibration = calibrate(tables, held_out, total, spec.params.metric)
        self.mail.send(CalibrationMessage(None if calibration is None else calibration.to_json()))
        if self.progress:
            self.progress("calibrate", spec.count)

    def _all_evidence(
        self, tables: list[CoarseTable], n_held: int
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Merges the evidence of all shards.

        Returns:
            The sum of the scatters, float64[dim, dim]. The list that holds each held-out vector, int64[n_held]. The
            lists that hold its nearest neighbours, int64[n_held, k]. Lists are counted over all shards, and -1 stands
            for none.
        """
        shape = (n_held, CALIBRATION_K)
        total, start = np.zeros((self.spec.dim, self.spec.dim)), 0
        lists = np.full(n_held, -1, np.int64)
        gaps = np.full(shape, np.finfo(np.float32).max, np.float32)
        near = np.full(shape, -1, np.int64)
        for sender, table in enumerate(tables):
            raw, what = self._receive(EvidenceMessage, sender), f"evidence of shard {sender}"
            total += array_of(raw.scatter, "<f8", total.shape, what)
            own = array_of(raw.lists, "<i4", lists.shape, what)
            found = array_of(raw.near, "<i4", shape, what)
            if max(own.max(initial=-1), found.max(initial=-1)) >= len(table):
                raise FormatError(f"{what}: it names a list beyond the {len(table)} of the shard")
            lists = np.where(own >= 0, own + start, lists)
            gaps = np.concatenate([gaps, array_of(raw.gaps, "<f4", shape, what)], axis=1)
            near = np.concatenate([near, np.where(found >= 0, found + start, -1)], axis=1)
            best = np.argsort(gaps, axis=1, kind="stable")[:, :CALIBRATION_K]
            gaps, near = np.take_along_axis(gaps, best, 1), np.take_along_axis(near, best, 1)
            start += len(table)
        return total, lists, near


# ---- the result ----


@dataclass(frozen=True, slots=True)
class BuiltShard:
    """A finished shard of a graph.

    Attributes:
        count: the number of vectors.
        first_id: the smallest row number.
        base: the number of the shard's first node in the graph.
        image_bytes: the length of the image.
        image_checksum: the checksum of the image.
        centroid: the shard's centroid in the partition, dim numbers.
    """

    count: int
    first_id: int
    base: int
    image_bytes: int
    image_checksum: int
    centroid: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class GraphResult:
    """The result of a build: the graph's number, its shards, and the calibration of Compass."""

    graph_id: int
    shards: tuple[BuiltShard, ...]
    calibration: Calibration | None


def result_of(builder: ShardBuilder) -> GraphResult:
    """Returns the result of a build, from the last messages of all builders. It is the same in each of them.

    Raises:
        FormatError: a message is malformed.
        InvalidInputError: the shards cannot be one graph.
    """
    images, _, plan = builder.images()
    shards = []
    for sender, (image, base, centroid) in enumerate(zip(images, plan.bases, plan.centroids, strict=True)):
        done, _ = builder.mail.receive(LinksMessage, sender)
        if done.image_bytes <= 0 or not 0 <= done.image_checksum < 2**64:
            raise FormatError(f"shard {sender}: the length or checksum of its image is out of range")
        place = tuple(float(value) for value in centroid)
        shards.append(BuiltShard(image.count, image.first_id, int(base), done.image_bytes, done.image_checksum, place))
    raw = builder.mail.receive(CalibrationMessage, 0)[0].calibration
    return GraphResult(plan.graph_id, tuple(shards), None if raw is None else Calibration.from_json(raw))


# ---- builders in one directory ----


def builder_in(
    spec: BuildSpec, vectors: VectorFile, directory: Path, number: int, progress: Progress | None
) -> ShardBuilder:
    """Makes the builder of a shard, among others that share the directory."""

    def report(phase: str, done: int) -> None:
        if progress:
            progress(number, phase, done)

    return ShardBuilder(
        spec, number, vectors, DirectoryMail(directory, number), directory, report if progress else None
    )


def build_here(spec: BuildSpec, vectors: VectorFile, directory: Path, progress: Progress | None = None) -> GraphResult:
    """Builds all shards in this process, one after the other in each step."""
    for step in STEPS:
        for number in range(1 if step in FIRST_ALONE else spec.n_shards):
            builder_in(spec, vectors, directory, number, progress).run(step)
    return result_of(builder_in(spec, vectors, directory, 0, None))


@dataclass(frozen=True, slots=True)
class _Slice:
    """The rows [begin, end) of a file, as a `VectorSource`."""

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
    """Copies some rows to a .npy file, in the input's type. The file can be read often, and is never held in memory."""
    header = {"descr": np.lib.format.dtype_to_descr(vectors.dtype), "fortran_order": False}
    with path.open("wb") as file:
        np.lib.format.write_array_header_2_0(file, header | {"shape": (len(ids), vectors.dim)})
        step = max(1, _COPY_BYTES // (vectors.dim * vectors.dtype.itemsize))
        for start in range(0, len(ids), step):
            file.write(vectors.take(ids[start : start + step]).data)
