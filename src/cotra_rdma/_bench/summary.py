"""What the rows of a benchmark come to: curves read off at equal recall, and their ratios with the spread of the repeats."""

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
    """Of two curves' QPS at one recall: median and range over the repeats, each of which has a ratio of its own."""

    median: float
    min: float
    max: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """One curve at one recall, interpolated between its points; None where the sweep did not reach that recall.

    qps_ratios: to each other library in the same run, with as many threads and without a filter. threads_ratio: of several
    threads, to one. zero_rtt_ratio: of a modelled fabric, to the first one in the run without a round trip.
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
    """What the points of one curve have in common."""

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
    """The curve that a row belongs to."""
    return CurveKey(*(getattr(row, name) for name in CurveKey._fields))


def curves(points: Sequence[Point]) -> dict[CurveKey, list[Point]]:
    """The points of each curve, by ef."""
    found: dict[CurveKey, list[Point]] = {}
    for point in points:
        found.setdefault(curve_key(point), []).append(point)
    return {key: sorted(curve, key=lambda point: point.ef) for key, curve in found.items()}


def compare(points: Sequence[Point], targets: Sequence[float] = TARGETS) -> list[Comparison]:
    """Every curve at each recall of `targets`."""
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
    """The ratio of two curves' QPS at one recall, repeat by repeat; None where one of them does not reach it."""
    ratios = []
    for repeat in range(len(curve[0].qps_repeats)):
        ours, theirs = (at_recall(both, target, [p.qps_repeats[repeat] for p in both]) for both in (curve, reference))
        if ours is None or theirs is None:
            return None
        ratios.append(ours / theirs)
    return Ratio(float(np.median(ratios)), min(ratios), max(ratios)) if ratios else None


def at_recall(curve: Sequence[Point], target: float, values: Sequence[float | None]) -> float | None:
    """The value where the curve passes the recall `target`: linear between the two points around it."""
    for (low, a), (high, b) in itertools.pairwise(zip(curve, values, strict=True)):
        if low.recall <= target <= high.recall and a is not None and b is not None:
            share = (target - low.recall) / (high.recall - low.recall) if high.recall > low.recall else 0.0
            return a + share * (b - a)
    return None


def why_not(points: Sequence[Point], row: Comparison) -> str:
    """Where a curve lies that has no figure at a recall, and which sweep would reach it."""
    recalls = [point.recall for point in points if curve_key(point) == curve_key(row)]
    return "above: smaller --ef" if min(recalls) > row.recall else "below: larger --ef"


def label(row: Point | Comparison) -> str:
    """A curve's name."""
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
