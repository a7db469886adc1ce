"""Reads the curves of a benchmark off at equal recall, and compares them with the spread of the repeats."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cotra_rdma._bench.runner import Point
from cotra_rdma._bench.transports import is_zero_rtt

TARGETS = (0.95, 0.99)


@dataclass(frozen=True, slots=True)
class Ratio:
    """The ratio of two curves' QPS at one recall. Each repeat has a ratio of its own.

    Attributes:
        median: the median over the repeats.
        min: the smallest.
        max: the largest.
    """

    median: float
    min: float
    max: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """One curve at one recall, interpolated between its points.

    A figure is None if the sweep did not reach that recall.

    Attributes:
        qps_ratios: for each other library of the run, the ratio to its curve with as many threads and no filter.
        threads_ratio: for several threads, the ratio to one thread.
        zero_rtt_ratio: for a modelled fabric, the ratio to the first fabric of the run that has no round trip.

    The other fields are those of `Point`.
    """

    system: str
    transport: str | None
    algorithm: str | None
    shards: int
    filter: float | None
    beam: int | None
    inflight: int | None
    n_threads: int
    cache_bytes: int | None
    recall: float
    qps: float | None
    qps_ratios: dict[str, Ratio]
    threads_ratio: Ratio | None
    zero_rtt_ratio: Ratio | None
    reads_per_query: float | None
    rounds_per_query: float | None
    bytes_per_query: float | None


class CurveKey(NamedTuple):
    """What all points of one curve share."""

    system: str
    transport: str | None = None
    algorithm: str | None = None
    shards: int = 1
    filter: float | None = None
    beam: int | None = None
    inflight: int | None = None
    n_threads: int = 1
    cache_bytes: int | None = None


def curve_key(row: Point | Comparison) -> CurveKey:
    """Returns the curve that a row belongs to."""
    return CurveKey(*(getattr(row, name) for name in CurveKey._fields))


def curves(points: Sequence[Point]) -> dict[CurveKey, list[Point]]:
    """Returns the points of each curve, sorted by ef."""
    found: dict[CurveKey, list[Point]] = {}
    for point in points:
        found.setdefault(curve_key(point), []).append(point)
    return {key: sorted(curve, key=lambda point: point.ef) for key, curve in found.items()}


def compare(points: Sequence[Point], targets: Sequence[float] = TARGETS) -> list[Comparison]:
    """Compares every curve at each recall of `targets`."""
    known = curves(points)
    libraries = list(dict.fromkeys(key.system for key in known if key.transport is None))
    zero_rtt = next((key.transport for key in known if is_zero_rtt(key.transport)), None)
    found = []
    for target, (key, curve) in itertools.product(targets, known.items()):
        others = [name for name in libraries if name != key.system]
        alike = {at.system: at for at in known if at == CurveKey(at.system, shards=at.shards, n_threads=key.n_threads)}
        references = {name: known[alike[name]] if name in alike else [] for name in others}
        ratios = {name: ratio_at(curve, reference, target) for name, reference in references.items()}
        alone = known.get(key._replace(n_threads=1), []) if key.n_threads > 1 else []
        modelled = zero_rtt not in (None, key.transport) and (key.transport or "").startswith("model:")
        ideal = known.get(key._replace(transport=zero_rtt), []) if modelled else []
        found.append(
            Comparison(
                *key,
                recall=target,
                qps=at_recall(curve, target, [point.qps for point in curve]),
                qps_ratios={name: ratio for name, ratio in ratios.items() if ratio is not None},
                threads_ratio=ratio_at(curve, alone, target),
                zero_rtt_ratio=ratio_at(curve, ideal, target),
                reads_per_query=at_recall(curve, target, [point.reads_per_query for point in curve]),
                rounds_per_query=at_recall(curve, target, [point.rounds_per_query for point in curve]),
                bytes_per_query=at_recall(curve, target, [point.bytes_per_query for point in curve]),
            )
        )
    return found


def ratio_at(curve: Sequence[Point], reference: Sequence[Point], target: float) -> Ratio | None:
    """Computes the ratio of two curves' QPS at one recall, repeat by repeat; None if one does not reach it."""
    ratios = []
    for repeat in range(len(curve[0].qps_repeats)):
        ours, theirs = (at_recall(both, target, [p.qps_repeats[repeat] for p in both]) for both in (curve, reference))
        if ours is None or theirs is None:
            return None
        ratios.append(ours / theirs)
    return Ratio(float(np.median(ratios)), min(ratios), max(ratios)) if ratios else None


def at_recall(curve: Sequence[Point], target: float, values: Sequence[float | None]) -> float | None:
    """Returns the value where a curve has the recall `target`, linear between the two points around it."""
    for (low, a), (high, b) in itertools.pairwise(zip(curve, values, strict=True)):
        if low.recall <= target <= high.recall and a is not None and b is not None:
            share = (target - low.recall) / (high.recall - low.recall) if high.recall > low.recall else 0.0
            return a + share * (b - a)
    return None


def why_not(points: Sequence[Point], row: Comparison) -> str:
    """Says on which side of a recall a curve lies that does not reach it, and which sweep would reach it."""
    recalls = [point.recall for point in points if curve_key(point) == curve_key(row)]
    return "above: smaller --ef" if min(recalls) > row.recall else "below: larger --ef"


def label(row: Point | Comparison) -> str:
    """Returns the name of a curve."""
    parts = [row.system if row.transport is None else f"{row.system} {row.transport}", row.algorithm]
    parts += [
        f"{row.shards} shards" if row.shards > 1 else None,
        None if row.beam is None else f"beam {row.beam}",
        f"inflight {row.inflight}" if row.inflight else None,
        f"{row.n_threads} threads" if row.n_threads > 1 else None,
        f"cache {row.cache_bytes:,} bytes" if row.cache_bytes else None,
        None if row.filter is None else f"filter {row.filter:g}",
    ]
    return ", ".join(part for part in parts if part)
