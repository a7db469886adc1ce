"""How long a graph takes to build and pack beside hnswlib's own, and what an image holds."""

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
    """Building all vectors with one number of threads: `Shard.build`, packing included, and hnswlib's `add_items`.

    Medians and ranges of the repeats, in seconds. seconds_ratio: ours over hnswlib's, repeat by repeat.
    image_ratio: the image's bytes over those of the raw float32 vectors.
    record_padding_bytes: of a record, those that hold neither a field nor a link's place.
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
    """Builds with each number of threads, the plan's repeats, ours and hnswlib's in turn; nothing is kept."""
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
    """Bytes of a record that mean something: head, own vector, and each link's number, factors and code."""
    link = LINK_BYTES + info.code_dim // 8
    return HEAD.itemsize + vector_bytes(info) + info.degree * link
