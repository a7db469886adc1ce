"""Measures recall against speed, of this package and others in one interleaved run.

Each repeat measures every configuration once, in turn.
So a noisy machine is noisy for all of them.
The figures are medians, with the smallest and the largest beside them.
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
    """The parameters of a search.

    Attributes:
        k: the answers to a query.
        ef: the candidates that a search keeps.
        beam: the most expansions in a round.
        n_threads: the threads that share the queries.
        inflight: the queries in progress at once in a thread; 0 if the engine chooses.
    """

    k: int
    ef: int
    beam: int = 1
    n_threads: int = 1
    inflight: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """The answers to a batch of queries, and what they cost if the system counts it.

    Attributes:
        ids: int64[n, k], with -1 where there are fewer answers.
        stats: `STATS_DTYPE`[n], or None.
        shards: how many shards a query asked, on average.
        in_process: whether this package's engines in this process made the whole search.
    """

    ids: Ids
    stats: npt.NDArray[np.void] | None = None
    shards: float = 1.0
    in_process: bool = False


class System(Protocol):
    """Something that is measured."""

    @property
    def name(self) -> str:
        """The name in the rows."""

    @property
    def transport(self) -> str | None:
        """The path to the vectors; None for a library."""

    @property
    def algorithm(self) -> str | None:
        """How several shards are searched; None for one shard."""

    @property
    def n_shards(self) -> int:
        """The number of shards that the vectors are split over."""

    @property
    def beams(self) -> bool:
        """Whether the number of expansions in a round is a parameter."""

    @property
    def inflights(self) -> bool:
        """Whether the number of queries in progress at once is a parameter."""

    @property
    def cache_bytes(self) -> int | None:
        """The budget of the cache of records: 0 for no cache, None if it cannot have one."""

    @property
    def rtt_s(self) -> float:
        """The round trip of the modelled fabric, in seconds; 0 if there is none."""

    @property
    def zero_rtt(self) -> System | None:
        """The same system over the same fabric without a round trip; None if `rtt_s` is 0."""

    def search(self, queries: Queries, setting: Setting, rows: Rows | None = None) -> Answer:
        """Searches for each query's nearest vectors, among `rows` if a filter is given."""

    def forget(self) -> None:
        """Empties the cache of records, if there is one."""

    def owner_cpu_s(self) -> float | None:
        """Returns the CPU seconds that the owner's process has used so far; None if there is no such process."""

    def close(self) -> None:
        """Ends the system."""


@dataclass(frozen=True, slots=True)
class Point:
    """One row of a benchmark: a system with one setting. A figure that the system does not have is None.

    Attributes:
        system: the name of the system.
        transport: as `System`.
        algorithm: as `System`.
        dataset: the name of the data set.
        n: the number of vectors.
        dim: the dimension.
        metric: the metric.
        shards: the number of shards.
        filter: the share of the vectors that a filter lets through; None without a filter.
        k: as `Setting`.
        ef: as `Setting`.
        beam: as `Setting`.
        inflight: as `Setting`.
        n_threads: as `Setting`.
        cache_bytes: as `System`.
        recall: recall@k.
        qps: queries a second of the whole batch in one call; the median.
        qps_min: the smallest QPS of a repeat.
        qps_max: the largest QPS of a repeat.
        qps_repeats: the QPS of each repeat.
        batch_overhead: the time of a batch call over the sum of its queries' latencies, less 1; the median.
            One thread searches one query at a time in that call.
        p50_us: the median latency of calls with one query.
            It is measured by the engine's clock, or by the wall clock for other libraries.
        p99_us: the 99th percentile of the same latencies.
        call_us: the median time of such a call by the wall clock.
        overhead_us: the median of wall clock less engine's clock, call by call.
        latency_model_ratio: p50 / (median rounds x RTT + p50 over the same fabric without a round trip).
        reads_per_query: READs, on average.
        cached_records_per_query: records from the cache, on average.
        rounds_per_query: rounds, on average.
        bytes_per_query: bytes that were read, on average.
        distances_per_query: the distances that graph walks without a filter compute, on average.
            Each place for a neighbour in an expanded record costs an estimate, new or not.
            Each record, and each node on the upper layers, costs an exact distance.
        shards_per_query: the shards that a query asked, on average.
        cpu_us_per_query: CPU time of this process during the batch, a query; the median.
        owner_cpu_us_per_query: CPU time of the owner's process during the batch, a query, on average.
        M: as `Plan`.
        ef_construction: as `Plan`.
        repeats: as `Plan`.
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
    """The settings to sweep, and the parameters of the graphs.

    Attributes:
        k: the answers to a query.
        efs: the values of ef, ascending.
        beams: the values of beam.
        threads: the numbers of threads.
        inflights: the numbers of queries in progress at once in a thread.
        repeats: how often each configuration is measured.
        M: the most links of a node on an upper layer.
        ef_construction: the ef of the searches of a build.
    """

    k: int = 10
    efs: Sequence[int] = (16, 24, 32, 48, 64, 96, 128, 192, 256)
    beams: Sequence[int] = (8,)
    threads: Sequence[int] = (1,)
    inflights: Sequence[int] = (0,)
    repeats: int = 5
    M: int = 16
    ef_construction: int = 200

    def configurations(self, systems: Iterable[System]) -> list[tuple[System, Setting]]:
        """Returns each system with each setting, in the order of a repeat: all systems at one ef, then at the next."""
        return [
            (system, Setting(self.k, ef, beam, threads, inflight))
            for ef, threads, system in itertools.product(self.efs, self.threads, list(systems))
            for beam in (self.beams if system.beams else (1,))
            for inflight in (self.inflights if system.inflights else (0,))
        ]


@dataclass(slots=True)
class _Samples:
    """What the repeats of one configuration have measured so far. A name ends in the unit of its values."""

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
        """Measures one repeat: the batch, with an empty cache of records at first, then calls with one query each."""
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
        for query in singles:  # after the others, since a query right after its twin would find warm CPU caches
            stats = _one(twin, query, setting, rows)[1].stats
            assert stats is not None
            self.zero_rtt_us.append(float(stats["latency_ns"][0]) / 1e3)

    def latency_model_ratio(self, rtt_s: float) -> float | None:
        """Computes `Point.latency_model_ratio`."""
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
    """Makes a call with one query, and returns its time by the wall clock in us."""
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
    """Measures every configuration of a plan.

    Args:
        data: the data set.
        systems: the systems.
        plan: the settings.
        progress: called with the measurements that are done, and the number of measurements.
        share: search under a filter that lets this share of the vectors through, the same for all systems.
            The ground truth among those vectors is computed.
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
    """Computes `Point.distances_per_query`. A record has places for 2 M neighbours, in blocks of 32."""
    expansions, upper = _mean(stats, "expansions"), _mean(stats, "cache_hits")
    return None if expansions is None or upper is None else expansions * (1 + -(-2 * M // 32) * 32) + upper
