"""Side-by-side measurements: recall against speed, this package beside hnswlib, in one interleaved run.

Every configuration is measured once a repeat, in turn, so that a noisy machine is noisy for all; medians are reported,
with the smallest and the largest beside them.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from cotra_rdma.datasets import HDF5_SUFFIXES, VectorFile, open_vectors, read_ground_truth, read_queries
from cotra_rdma.engine import METRICS
from cotra_rdma.errors import InvalidInputError

Ids = npt.NDArray[np.int64]
Queries = npt.NDArray[np.float32]
Rows = npt.NDArray[np.bool_]
"""bool[n]: the vectors of a data set that a filter lets through."""

LATENCY_QUERIES = 200
WARM_UP_QUERIES = 64
FILTER_SEED = 12


@dataclass(frozen=True, slots=True)
class DataSet:
    """Vectors, queries float32[n, dim], and the ids of each query's nearest vectors, nearest first: int64[n, >= k]."""

    name: str
    vectors: VectorFile
    queries: Queries
    ground_truth: Ids
    metric: str

    @classmethod
    def open(
        cls,
        stem: str | os.PathLike[str] | None = None,
        *,
        base: str | os.PathLike[str] | None = None,
        queries: str | os.PathLike[str] | None = None,
        ground_truth: str | os.PathLike[str] | None = None,
        metric: str | None = None,
    ) -> DataSet:
        """Opens a data set.

        Args:
            stem: an ann-benchmarks HDF5 file, or DIR/NAME of NAME_base.npy, NAME_queries.npy and NAME_gt.npy.
            base, queries, ground_truth: files that take the place of the stem's.
            metric: None: the file's own, else the one that the ground truth is sorted by.

        Raises:
            InvalidInputError: parts are missing or do not fit each other, or the ground truth is of another metric.
            FormatError, OSError: as `open_vectors`.
        """
        if stem is not None:
            hdf5 = Path(stem).suffix.lower() in HDF5_SUFFIXES
            base = base or (stem if hdf5 else f"{os.fspath(stem)}_base.npy")
            queries = queries or (stem if hdf5 else f"{os.fspath(stem)}_queries.npy")
            ground_truth = ground_truth or (stem if hdf5 else f"{os.fspath(stem)}_gt.npy")
        if base is None or queries is None or ground_truth is None:
            raise InvalidInputError("a data set needs a stem, or base, queries and ground truth files")
        vectors, wanted, truth = open_vectors(base), read_queries(queries), read_ground_truth(ground_truth)
        if wanted.shape[1] != vectors.dim or len(truth) != len(wanted):
            raise InvalidInputError(
                f"{base} is {list(vectors.shape)}, {queries} {list(wanted.shape)}, {ground_truth} {list(truth.shape)}: "
                "these do not belong together"
            )
        if truth.min() < 0 or truth.max() >= vectors.count:
            raise InvalidInputError(f"{ground_truth}: names row {truth.max()} of {vectors.count}")
        fitting = _metrics_of(vectors, wanted, truth)
        metric = metric or vectors.metric or next(iter(fitting), None)
        if metric not in fitting:
            found = " or ".join(fitting) or "none that is known"
            raise InvalidInputError(f"{ground_truth}: is not sorted by {metric or 'any metric'}, but by {found}")
        return cls(Path(stem or base).stem, vectors, wanted, truth, metric)


def _metrics_of(vectors: VectorFile, queries: Queries, truth: Ids, sample: int = 20) -> list[str]:
    """The metrics by which the first rows of the ground truth are sorted."""
    fitting = []
    for metric in METRICS:
        for query, ids in zip(queries[:sample].astype(np.float64), truth[:sample], strict=True):
            rows = np.stack([vectors.read(row, row + 1)[0] for row in ids]).astype(np.float64)
            gaps = np.diff(distances(metric, query, rows))
            if (gaps < -1e-5 * (1 + np.abs(gaps).max(initial=0))).any():
                break
        else:
            fitting.append(metric)
    return fitting


def distances(metric: str, query: npt.NDArray[Any], rows: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Exact distances of one query [dim] to rows [n, dim]: squared l2, 1 - ip, or 1 - cosine, as hnswlib has them."""
    query, rows = query.astype(np.float64), rows.astype(np.float64)
    if metric == "l2":
        return np.asarray(np.square(rows - query).sum(axis=1))
    scale = 1.0 if metric == "ip" else np.linalg.norm(query) * np.linalg.norm(rows, axis=1)
    return np.asarray(1.0 - rows @ query / scale)


def recall(found: Ids, truth: Ids) -> float:
    """Recall@k of ids int64[n, k]: the share of each query's k true nearest that were found, on average."""
    k = found.shape[1]
    hits = sum(len(np.intersect1d(row, nearest[:k])) for row, nearest in zip(found, truth, strict=True))
    return hits / found.size


@dataclass(frozen=True, slots=True)
class Cost:
    """What queries cost on average, where a system counts it."""

    reads: float
    rounds: float
    bytes: float
    shards: float = 1.0


class System(Protocol):
    """What is measured."""

    @property
    def name(self) -> str:
        """As the rows name it."""

    @property
    def transport(self) -> str | None:
        """The path to the vectors, where it has one."""

    @property
    def algorithm(self) -> str | None:
        """How several shards are searched; None where there is one, and no such choice."""

    @property
    def n_shards(self) -> int:
        """Over how many shards its vectors are split."""

    @property
    def beams(self) -> bool:
        """Whether the number of expansions a round is its parameter."""

    def search(self, queries: Queries, k: int, ef: int, beam: int, rows: Rows | None = None) -> tuple[Ids, Cost | None]:
        """Ids int64[n, k] of each query's answers (among `rows`, when given), and the cost of a query."""

    def owner_cpu_s(self) -> float | None:
        """CPU seconds that the process which owns the vectors has used so far, where that is another one."""

    def close(self) -> None:
        """Ends it."""


@dataclass(frozen=True, slots=True)
class Point:
    """One row of a benchmark: a system at one ef and beam.

    QPS is the median of the repeats, for the whole batch of queries; latencies are of calls with one query. None: the
    system has no such figure.
    """

    system: str
    transport: str | None
    algorithm: str | None
    dataset: str
    n: int
    dim: int
    metric: str
    shards: int
    filter: float | None
    k: int
    ef: int
    beam: int | None
    n_threads: int
    recall: float
    qps: float
    qps_min: float
    qps_max: float
    p50_us: float
    p99_us: float
    reads_per_query: float | None
    rounds_per_query: float | None
    bytes_per_query: float | None
    shards_per_query: float | None
    owner_cpu_us_per_query: float | None
    M: int
    ef_construction: int
    repeats: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What to sweep, and how the graphs were built."""

    k: int = 10
    efs: Sequence[int] = (16, 24, 32, 48, 64, 96, 128, 192, 256)
    beams: Sequence[int] = (4,)
    n_threads: int = 1
    repeats: int = 5
    M: int = 16
    ef_construction: int = 200

    def configurations(self, systems: Iterable[System]) -> list[tuple[System, int, int]]:
        """Every (system, ef, beam), in the order of a repeat: all systems at one ef after the other."""
        return [
            (system, ef, beam)
            for ef in self.efs
            for system in systems
            for beam in (self.beams if system.beams else (1,))
        ]


def run(
    data: DataSet,
    systems: Sequence[System],
    plan: Plan,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    share: float | None = None,
) -> list[Point]:
    """Measures every configuration of the plan; `progress` is called with (measurements done, all).

    share: searches under a filter that lets this share of the vectors through, the same for all; the ground truth among
    those is computed.
    """
    rows, truth = (None, data.ground_truth) if share is None else _filtered(data, share, plan.k)
    configurations = plan.configurations(systems)
    samples: list[list[float]] = [[] for _ in configurations]
    owner_cpu: list[float | None] = [0.0 for _ in configurations]
    total = len(configurations) * (plan.repeats + 1)
    for repeat in range(plan.repeats):
        for i, (system, ef, beam) in enumerate(configurations):
            system.search(data.queries[:WARM_UP_QUERIES], plan.k, ef, beam, rows)
            before = system.owner_cpu_s()
            begin = time.perf_counter()
            system.search(data.queries, plan.k, ef, beam, rows)
            samples[i].append(len(data.queries) / (time.perf_counter() - begin))
            after, so_far = system.owner_cpu_s(), owner_cpu[i]
            owner_cpu[i] = None if before is None or after is None or so_far is None else so_far + after - before
            progress(repeat * len(configurations) + i + 1, total)
    points = []
    for i, (system, ef, beam) in enumerate(configurations):
        found, cost = system.search(data.queries, plan.k, ef, beam, rows)
        p50, p99 = _latency_us(system, data.queries[:LATENCY_QUERIES], plan.k, ef, beam, rows)
        cpu = owner_cpu[i]
        points.append(
            Point(
                system=system.name,
                transport=system.transport,
                algorithm=system.algorithm,
                dataset=data.name,
                n=data.vectors.count,
                dim=data.vectors.dim,
                metric=data.metric,
                shards=system.n_shards,
                filter=share,
                k=plan.k,
                ef=ef,
                beam=beam if system.beams else None,
                n_threads=plan.n_threads,
                recall=recall(found, truth),
                qps=float(np.median(samples[i])),
                qps_min=min(samples[i]),
                qps_max=max(samples[i]),
                p50_us=p50,
                p99_us=p99,
                reads_per_query=None if cost is None else cost.reads,
                rounds_per_query=None if cost is None else cost.rounds,
                bytes_per_query=None if cost is None else cost.bytes,
                shards_per_query=None if cost is None else cost.shards,
                owner_cpu_us_per_query=None if cpu is None else cpu * 1e6 / (plan.repeats * len(data.queries)),
                M=plan.M,
                ef_construction=plan.ef_construction,
                repeats=plan.repeats,
            )
        )
        progress(plan.repeats * len(configurations) + i + 1, total)
    return points


def _filtered(data: DataSet, share: float, k: int) -> tuple[Rows, Ids]:
    """A random filter, and each query's k nearest among what it lets through."""
    rows = np.random.default_rng(FILTER_SEED).random(data.vectors.count) < share
    (numbers,) = rows.nonzero()
    if len(numbers) < k:
        raise InvalidInputError(f"a filter of {share} lets {len(numbers)} vectors through, and {k} are wanted")
    vectors = np.concatenate(
        [np.asarray(chunk, np.float32)[rows[start : start + len(chunk)]] for start, chunk in _chunks(data)]
    )
    nearest = [numbers[np.argsort(distances(data.metric, query, vectors), kind="stable")[:k]] for query in data.queries]
    return rows, np.stack(nearest).astype(np.int64)


def _chunks(data: DataSet) -> Iterable[tuple[int, npt.NDArray[Any]]]:
    start = 0
    for chunk in data.vectors.chunks(rows=16384):
        yield start, chunk
        start += len(chunk)


def _latency_us(system: System, queries: Queries, k: int, ef: int, beam: int, rows: Rows | None) -> tuple[float, float]:
    latencies = []
    for i in range(len(queries)):
        begin = time.perf_counter_ns()
        system.search(queries[i : i + 1], k, ef, beam, rows)
        latencies.append((time.perf_counter_ns() - begin) / 1e3)
    p50, p99 = np.percentile(latencies, (50, 99))
    return float(p50), float(p99)


@dataclass(frozen=True, slots=True)
class Comparison:
    """One curve at one recall, interpolated between its points; None where the sweep did not reach that recall.

    `qps_ratio`: its QPS over that of hnswlib at the same recall.
    """

    system: str
    transport: str | None
    algorithm: str | None
    filter: float | None
    beam: int | None
    recall: float
    qps: float | None
    qps_ratio: float | None
    reads_per_query: float | None
    rounds_per_query: float | None
    bytes_per_query: float | None


def compare(
    points: Sequence[Point], targets: Sequence[float] = (0.95, 0.99), reference: str = "hnswlib"
) -> list[Comparison]:
    """Every curve (a system, its transport, algorithm, filter and beam) at each recall of `targets`."""
    curves: dict[tuple[str, str | None, str | None, float | None, int | None], list[Point]] = {}
    for point in points:
        key = (point.system, point.transport, point.algorithm, point.filter, point.beam)
        curves.setdefault(key, []).append(point)
    found = []
    for target in targets:
        base = _at(curves.get((reference, None, None, None, None), []), target, "qps")
        for (system, transport, algorithm, share, beam), curve in curves.items():
            qps = _at(curve, target, "qps")
            found.append(
                Comparison(
                    system=system,
                    transport=transport,
                    algorithm=algorithm,
                    filter=share,
                    beam=beam,
                    recall=target,
                    qps=qps,
                    qps_ratio=qps / base if qps and base else None,
                    reads_per_query=_at(curve, target, "reads_per_query"),
                    rounds_per_query=_at(curve, target, "rounds_per_query"),
                    bytes_per_query=_at(curve, target, "bytes_per_query"),
                )
            )
    return found


def _at(curve: Sequence[Point], target: float, field: str) -> float | None:
    """`field` where the curve passes the recall `target`: linear between the two points around it."""
    curve = sorted(curve, key=lambda point: point.ef)
    for low, high in itertools.pairwise(curve):
        a, b = getattr(low, field), getattr(high, field)
        if low.recall <= target <= high.recall and a is not None and b is not None:
            share = (target - low.recall) / (high.recall - low.recall) if high.recall > low.recall else 0.0
            return float(a + share * (b - a))
    return None


def label(row: Point | Comparison) -> str:
    """A curve's name."""
    parts = [row.system if row.transport is None else f"{row.system} {row.transport}", row.algorithm]
    parts += [
        None if row.beam is None else f"beam {row.beam}",
        None if row.filter is None else f"filter {row.filter:g}",
    ]
    return ", ".join(part for part in parts if part)
