"""Side-by-side measurements: recall against speed, this package beside others, in one interleaved run.

Every configuration is measured once a repeat, in turn, so that a noisy machine is noisy for all; medians are reported,
with the smallest and the largest beside them.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cotra_rdma._bench.data import DataSet, Ids, Queries, Rows
from cotra_rdma.datasets import recall

LATENCY_QUERIES = 200
WARM_UP_QUERIES = 64


@dataclass(frozen=True, slots=True)
class Setting:
    """The parameters of a search. `inflight`: queries in progress at once in a thread, 0: chosen by the engine."""

    k: int
    ef: int
    beam: int = 1
    n_threads: int = 1
    inflight: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """Ids int64[n, k] of each query's answers, -1 where there are fewer; and what they cost, where a system counts it:
    a `STATS_DTYPE` record a query, and how many shards a query asked on average."""

    ids: Ids
    stats: npt.NDArray[np.void] | None = None
    shards: float = 1.0
    in_process: bool = False


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

    @property
    def inflights(self) -> bool:
        """Whether the number of queries in progress at once is its parameter."""

    @property
    def cache_bytes(self) -> int | None:
        """The budget of its cache of records; 0: it has none; None: nor could it."""

    @property
    def rtt_s(self) -> float:
        """The round trip of the modelled fabric that it is reached over; 0 where there is none."""

    @property
    def zero_rtt(self) -> System | None:
        """The same, over the same fabric without a round trip; None where `rtt_s` is 0."""

    def search(self, queries: Queries, setting: Setting, rows: Rows | None = None) -> Answer:
        """Each query's answers, among `rows` when given."""

    def forget(self) -> None:
        """Empties its cache of records, where it has one."""

    def owner_cpu_s(self) -> float | None:
        """CPU seconds that the process which owns the vectors has used so far, where that is another one."""

    def close(self) -> None:
        """Ends it."""


@dataclass(frozen=True, slots=True)
class Point:
    """One row of a benchmark: a system with one setting. None: the system has no such figure.

    qps, qps_min, qps_max: median and range of `qps_repeats`, for the whole batch of queries.
    batch_overhead: the batch call's time over that of the engine's C call in it, less 1; the median.
    p50_us, p99_us: latency of calls with one query; by the engine's own clock, of other libraries by the wall clock.
    call_us: median wall clock of such a call. overhead_us: median of wall clock less the engine's clock of the same call.
    latency_model_ratio: p50 / (median rounds x RTT + p50 over the same fabric without a round trip).
    distances_per_query: of graph walks without a filter: estimates of the expanded records' neighbours (every place of a record
    is estimated, whether it is new or not) and exact distances, of records and of upper nodes.
    cpu_us_per_query: CPU time of this process while the batch is searched; the median.
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
    inflight: int | None
    n_threads: int
    cache_bytes: int | None
    recall: float
    qps: float
    qps_min: float
    qps_max: float
    qps_repeats: tuple[float, ...]
    batch_overhead: float | None
    p50_us: float
    p99_us: float
    call_us: float
    overhead_us: float | None
    latency_model_ratio: float | None
    reads_per_query: float | None
    cached_records_per_query: float | None
    rounds_per_query: float | None
    bytes_per_query: float | None
    distances_per_query: float | None
    shards_per_query: float | None
    cpu_us_per_query: float
    owner_cpu_us_per_query: float | None
    M: int
    ef_construction: int
    repeats: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What to sweep, and how the graphs were built."""

    k: int = 10
    efs: Sequence[int] = (16, 24, 32, 48, 64, 96, 128, 192, 256)
    beams: Sequence[int] = (8,)
    threads: Sequence[int] = (1,)
    inflights: Sequence[int] = (0,)
    repeats: int = 5
    M: int = 16
    ef_construction: int = 200

    def configurations(self, systems: Iterable[System]) -> list[tuple[System, Setting]]:
        """Every system with every setting, in the order of a repeat: all systems at one ef after the other."""
        return [
            (system, Setting(self.k, ef, beam, threads, inflight))
            for ef, threads, system in itertools.product(self.efs, self.threads, list(systems))
            for beam in (self.beams if system.beams else (1,))
            for inflight in (self.inflights if system.inflights else (0,))
        ]


@dataclass(slots=True)
class _Samples:
    """What the repeats of one configuration have shown so far. Times in seconds, those of single calls in us."""

    qps: list[float] = field(default_factory=list)
    overhead: list[float] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)
    owner_cpu_s: float = 0.0
    owner: bool = False
    answer: Answer | None = None
    call_us: list[float] = field(default_factory=list)
    engine_us: list[float] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    zero_rtt_us: list[float] = field(default_factory=list)

    def measure(self, system: System, setting: Setting, queries: Queries, rows: Rows | None) -> None:
        """One repeat: the batch, from an empty cache of records on, then calls with one query."""
        system.search(queries[:WARM_UP_QUERIES], setting, rows)
        system.forget()
        before = system.owner_cpu_s()
        begin, cpu_begin = time.perf_counter(), time.process_time()
        self.answer = system.search(queries, setting, rows)
        seconds, cpu_s = time.perf_counter() - begin, time.process_time() - cpu_begin
        after = system.owner_cpu_s()
        self.qps.append(len(queries) / seconds)
        self.cpu_us.append(1e6 * cpu_s / len(queries))
        if self.answer.in_process:
            self.overhead.append(_batch_overhead(system, setting, queries, rows))
        if before is not None and after is not None:
            self.owner, self.owner_cpu_s = True, self.owner_cpu_s + after - before
        singles = [queries[i : i + 1] for i in range(min(LATENCY_QUERIES, len(queries)))]
        for query in singles:
            wall_us, answer = _one(system, query, setting, rows)
            self.call_us.append(wall_us)
            if answer.stats is not None:
                self.engine_us.append(float(answer.stats["latency_ns"][0]) / 1e3)
                self.rounds.append(int(answer.stats["rounds"][0]))
        twin = system.zero_rtt
        if twin is None:
            return
        for query in singles:  # after all of the others: right behind its like, a query would find warm caches
            stats = _one(twin, query, setting, rows)[1].stats
            assert stats is not None
            self.zero_rtt_us.append(float(stats["latency_ns"][0]) / 1e3)

    def latency_model_ratio(self, rtt_s: float) -> float | None:
        """See `Point`."""
        if not self.zero_rtt_us:
            return None
        expected_us = np.median(self.rounds) * rtt_s * 1e6 + np.median(self.zero_rtt_us)
        return float(np.median(self.engine_us) / expected_us)


def _batch_overhead(system: System, setting: Setting, queries: Queries, rows: Rows | None) -> float:
    """Measures what a batch call adds to the time of its queries, as `Point.batch_overhead`.

    One thread searches one query at a time, so that the queries' latencies add up to the time in the engine.
    """
    system.forget()
    begin = time.perf_counter()
    stats = system.search(queries, replace(setting, n_threads=1, inflight=1), rows).stats
    seconds = time.perf_counter() - begin
    assert stats is not None
    return seconds / (float(stats["latency_ns"].sum()) / 1e9) - 1


def _one(system: System, query: Queries, setting: Setting, rows: Rows | None) -> tuple[float, Answer]:
    """A call with one query, and its wall clock in us."""
    begin = time.perf_counter_ns()
    answer = system.search(query, setting, rows)
    return (time.perf_counter_ns() - begin) / 1e3, answer


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
    rows, truth = (None, data.ground_truth) if share is None else data.filtered(share, plan.k)
    configurations = plan.configurations(systems)
    samples = [_Samples() for _ in configurations]
    done = 0
    for _ in range(plan.repeats):
        for (system, setting), sample in zip(configurations, samples, strict=True):
            sample.measure(system, setting, data.queries, rows)
            done += 1
            progress(done, plan.repeats * len(configurations))
    return [
        _point(data, plan, system, setting, sample, truth, share)
        for (system, setting), sample in zip(configurations, samples, strict=True)
    ]


def _point(
    data: DataSet, plan: Plan, system: System, setting: Setting, sample: _Samples, truth: Ids, share: float | None
) -> Point:
    answer = sample.answer
    assert answer is not None
    stats = answer.stats
    p50, p99 = np.percentile(sample.engine_us or sample.call_us, (50, 99))
    return Point(
        system=system.name,
        transport=system.transport,
        algorithm=system.algorithm,
        dataset=data.name,
        n=data.vectors.count,
        dim=data.vectors.dim,
        metric=data.metric,
        shards=system.n_shards,
        filter=share,
        k=setting.k,
        ef=setting.ef,
        beam=setting.beam if system.beams else None,
        inflight=setting.inflight if system.inflights else None,
        n_threads=setting.n_threads,
        cache_bytes=system.cache_bytes,
        recall=recall(answer.ids, truth),
        qps=float(np.median(sample.qps)),
        qps_min=min(sample.qps),
        qps_max=max(sample.qps),
        qps_repeats=tuple(sample.qps),
        batch_overhead=float(np.median(sample.overhead)) if sample.overhead else None,
        p50_us=float(p50),
        p99_us=float(p99),
        call_us=float(np.median(sample.call_us)),
        overhead_us=float(np.median(np.subtract(sample.call_us, sample.engine_us))) if sample.engine_us else None,
        latency_model_ratio=sample.latency_model_ratio(system.rtt_s),
        reads_per_query=_mean(stats, "reads"),
        cached_records_per_query=_mean(stats, "cached_records"),
        rounds_per_query=_mean(stats, "rounds"),
        bytes_per_query=_mean(stats, "read_bytes"),
        distances_per_query=_distances(stats, plan.M) if system.beams and share is None else None,
        shards_per_query=None if stats is None else answer.shards,
        cpu_us_per_query=float(np.median(sample.cpu_us)),
        owner_cpu_us_per_query=(
            sample.owner_cpu_s * 1e6 / (plan.repeats * len(data.queries)) if sample.owner else None
        ),
        M=plan.M,
        ef_construction=plan.ef_construction,
        repeats=plan.repeats,
    )


def _mean(stats: npt.NDArray[np.void] | None, name: str) -> float | None:
    return None if stats is None else float(stats[name].mean())


def _distances(stats: npt.NDArray[np.void] | None, M: int) -> float | None:
    """See `Point`. A record has 2 M places, in blocks of 32."""
    expansions, upper = _mean(stats, "expansions"), _mean(stats, "cache_hits")
    return None if expansions is None or upper is None else expansions * (1 + -(-2 * M // 32) * 32) + upper
