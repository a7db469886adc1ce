"""Measures how long building and packing a graph takes, beside hnswlib's building, and what an image holds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cotra_rdma._bench.data import DataSet
from cotra_rdma._bench.libraries import SEED, load
from cotra_rdma._bench.runner import Plan
from cotra_rdma._bench.summary import Ratio
from cotra_rdma._core.record_layout import HEAD, LINK_BYTES, vector_bytes
from cotra_rdma._native.image import ImageInfo
from cotra_rdma._shard.shard import Shard


@dataclass(frozen=True, slots=True)
class BuildPoint:
    """The time to build all vectors with one number of threads, by `Shard.build` with packing and by hnswlib's
    `add_items`.

    Attributes:
        dataset: the name of the data set.
        n: the number of vectors.
        dim: the dimension.
        metric: the metric.
        M: as `Plan`.
        ef_construction: as `Plan`.
        n_threads: the threads of both builds.
        repeats: how often each was built.
        seconds: the median time of `Shard.build`.
        seconds_min: the shortest time.
        seconds_max: the longest time.
        hnswlib_seconds: the median time of hnswlib.
        hnswlib_seconds_min: the shortest time.
        hnswlib_seconds_max: the longest time.
        seconds_ratio: our time over hnswlib's, repeat by repeat.
        image_bytes: the length of the image.
        raw_bytes: the length of the raw float32 vectors.
        image_ratio: the image's bytes over the raw bytes.
        record_bytes: the length of a record.
        record_padding_bytes: the bytes of a record that hold neither a field nor a place for a link.
    """

    dataset: str
    n: int
    dim: int
    metric: str
    M: int
    ef_construction: int
    n_threads: int
    repeats: int
    seconds: float
    seconds_min: float
    seconds_max: float
    hnswlib_seconds: float
    hnswlib_seconds_min: float
    hnswlib_seconds_max: float
    seconds_ratio: Ratio
    image_bytes: int
    raw_bytes: int
    image_ratio: float
    record_bytes: int
    record_padding_bytes: int


def measure_builds(
    data: DataSet, plan: Plan, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[BuildPoint]:
    """Builds all vectors with each number of threads, by this package and by hnswlib in turn, and keeps nothing.

    Args:
        data: the data set.
        plan: the threads, the repeats and the parameters of the graph.
        progress: called with the builds that are done, and the number of builds.
    """
    vectors = np.array(data.vectors.read())
    ours: dict[int, list[float]] = {threads: [] for threads in plan.threads}
    theirs: dict[int, list[float]] = {threads: [] for threads in plan.threads}
    infos = {}
    rounds = [threads for _ in range(plan.repeats) for threads in plan.threads]
    for done, threads in enumerate(rounds):
        theirs[threads].append(_hnswlib_seconds(data, plan, vectors, threads))
        begin = time.perf_counter()
        with Shard.build(
            vectors, metric=data.metric, M=plan.M, ef_construction=plan.ef_construction, seed=SEED, n_threads=threads
        ) as shard:
            ours[threads].append(time.perf_counter() - begin)
            infos[threads] = shard.info
        progress(done + 1, len(rounds))
    return [_point(data, plan, threads, ours[threads], theirs[threads], infos[threads]) for threads in plan.threads]


def _hnswlib_seconds(data: DataSet, plan: Plan, vectors: npt.NDArray[np.generic], threads: int) -> float:
    hnswlib = load("hnswlib")
    begin = time.perf_counter()
    index = hnswlib.Index(space=data.metric, dim=data.vectors.dim)
    index.init_index(len(vectors), ef_construction=plan.ef_construction, M=plan.M, random_seed=SEED)
    index.add_items(vectors, num_threads=threads)
    return time.perf_counter() - begin


def _point(
    data: DataSet, plan: Plan, threads: int, ours: Sequence[float], theirs: Sequence[float], info: ImageInfo
) -> BuildPoint:
    ratios = np.divide(ours, theirs)
    raw_bytes = 4 * data.vectors.count * data.vectors.dim
    return BuildPoint(
        dataset=data.name,
        n=data.vectors.count,
        dim=data.vectors.dim,
        metric=data.metric,
        M=plan.M,
        ef_construction=plan.ef_construction,
        n_threads=threads,
        repeats=plan.repeats,
        seconds=float(np.median(ours)),
        seconds_min=min(ours),
        seconds_max=max(ours),
        hnswlib_seconds=float(np.median(theirs)),
        hnswlib_seconds_min=min(theirs),
        hnswlib_seconds_max=max(theirs),
        seconds_ratio=Ratio(float(np.median(ratios)), float(ratios.min()), float(ratios.max())),
        image_bytes=info.image_bytes,
        raw_bytes=raw_bytes,
        image_ratio=info.image_bytes / raw_bytes,
        record_bytes=info.record_bytes,
        record_padding_bytes=info.record_bytes - payload_bytes(info),
    )


def payload_bytes(info: ImageInfo) -> int:
    """Returns the bytes of a record that mean something: the head, the vector, and the number, factors and code of
    each link.
    """
    link = LINK_BYTES + info.code_dim // 8
    return HEAD.itemsize + vector_bytes(info) + info.degree * link
