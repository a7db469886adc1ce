"""Walks and estimates looked at from outside: what a walk was told, node by node, and how wrong it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from cotra_rdma import CotraError, Shard
from cotra_rdma._core.remote_expansion import PUSH_DTYPE, Expansions
from cotra_rdma._native.channel import Channel
from cotra_rdma._native.graph_engine import Engine
from cotra_rdma._native.view import View
from helpers.image import HEADER_BYTES, RECORD_HEAD_BYTES, Image, image_bytes
from quality.families import Doubles, Floats

_ELEMENTS = {"float32": "<f4", "float16": "<f2", "uint8": "u1"}


def comparable(metric: str, rows: npt.NDArray[np.floating]) -> Doubles:
    """Vectors, or queries, as they are compared."""
    exact = rows.astype(np.float64)
    return exact / np.linalg.norm(exact, axis=1, keepdims=True) if metric == "cosine" else exact


def distances(metric: str, queries: Doubles, vectors: Doubles) -> Doubles:
    """Of pairs, in float64."""
    return ((queries - vectors) ** 2).sum(axis=-1) if metric == "l2" else 1 - (queries * vectors).sum(axis=-1)


def vectors_of(shard: Shard) -> Doubles:
    """float64[count, dim]: by the image's records, as they are compared."""
    image, info = Image(image_bytes(shard)), shard.info
    element = np.dtype(_ELEMENTS[info.vector_type])
    rows = np.frombuffer(image.data, np.uint8, info.count * info.record_bytes, HEADER_BYTES)
    own = rows.reshape(info.count, -1)[:, RECORD_HEAD_BYTES : RECORD_HEAD_BYTES + info.dim * element.itemsize]
    return comparable(info.metric, np.ascontiguousarray(own).view(element).astype(np.float64))


@dataclass(frozen=True, slots=True)
class Estimates:
    """Of the neighbours of some nodes, for some queries: all arrays float64[n]."""

    errors: Doubles
    stated: Doubles
    """The standard deviation by the estimate's weight."""
    rounding: Doubles
    """What float32 adds to it, of the distances themselves too."""

    @classmethod
    def of(cls, shard: Shard, queries: Floats, near: int, far: int) -> Estimates:
        """At the nodes that are nearest to each query, and at any others."""
        metric, vectors = shard.metric, vectors_of(shard)
        points, random = comparable(metric, queries), np.random.default_rng(1)
        pairs = []
        for i, point in enumerate(points):
            nearest = np.argsort(distances(metric, point, vectors), kind="stable")[:near]
            rows = np.unique(np.concatenate([nearest, random.integers(0, len(vectors), far)]))
            pairs.append(np.column_stack([np.full(len(rows), i), rows]))
        pushes = np.zeros(sum(map(len, pairs)), PUSH_DTYPE)
        pushes["query"], pushes["row"] = np.concatenate(pairs).T
        pushes["limit"] = np.inf
        with Channel.shm(shard.arena) as channel, View.open(channel) as view:
            told = view.expand(shard.arena, queries, pushes)

        counts = told.found["count"]
        hop = np.repeat(told.found["distance"].astype(np.float64), counts)
        query, row = (np.repeat(pushes[name], counts) for name in ("query", "row"))
        q, c, x = points[query], vectors[row], vectors[told.numbers]
        estimates = told.estimates.astype(np.float64)
        terms = np.abs(hop) + np.abs(estimates) + np.abs(estimates - hop)
        if metric != "l2":
            terms += 1 + np.linalg.norm(q, axis=1) * (np.linalg.norm(c, axis=1) + np.linalg.norm(x - c, axis=1))
        return cls(
            errors=estimates - distances(metric, q, x),
            stated=1 / told.weights.astype(np.float64),
            rounding=np.finfo(np.float32).eps * terms,
        )


# ---- walks ----


@dataclass(slots=True)
class Told:
    """One query's walk: what it was told of each node, in the order in which it expanded them."""

    rows: list[int] = field(default_factory=list)
    limits: list[float] = field(default_factory=list)
    """Of the walk, when it asked."""
    found: list[npt.NDArray[np.void]] = field(default_factory=list)
    heard: list[tuple[npt.NDArray[np.uint32], Floats, Floats]] = field(default_factory=list)
    """All neighbours of each: numbers, estimates, weights. Those above the walk's limit it was not told."""


class Recorder:
    """The owner of one shard: expands what a walk asks for, and keeps a record of it."""

    def __init__(self, shard: Shard, view: View, queries: Floats) -> None:
        self._shard, self._view, self._queries = shard, view, queries
        self.told = [Told() for _ in queries]

    def expand(self, pushes: Mapping[int, npt.NDArray[np.void]]) -> dict[int, Expansions | CotraError]:
        return {shard: self._answer(wanted) for shard, wanted in pushes.items()}

    def replace(self, shard: int, error: CotraError) -> None:
        raise error

    def _answer(self, wanted: npt.NDArray[np.void]) -> Expansions:
        everything = wanted.copy()
        everything["limit"] = np.inf
        full = self._view.expand(self._shard.arena, self._queries, everything)
        limits = np.repeat(wanted["limit"], full.found["count"])
        kept = full.estimates < limits
        ends = np.cumsum(full.found["count"])
        found = full.found.copy()
        for push, one, told, begin, end in zip(
            wanted, full.found, found, ends - full.found["count"], ends, strict=True
        ):
            walk, part = self.told[int(push["query"])], slice(int(begin), int(end))
            walk.rows.append(int(push["row"]))
            walk.limits.append(float(push["limit"]))
            walk.found.append(one)
            walk.heard.append((full.numbers[part], full.estimates[part], full.weights[part]))
            told["count"] = np.count_nonzero(kept[part])
        return replace(
            full,
            found=found,
            numbers=full.numbers[kept],
            estimates=full.estimates[kept],
            weights=full.weights[kept],
        )


@contextmanager
def recorded(shard: Shard, queries: Floats) -> Iterator[tuple[Engine, Recorder]]:
    """An engine whose walks over the shard are recorded, and the record."""
    with (
        Channel.shm(shard.arena) as channel,
        View.open(channel) as view,
        Engine.create([view], [None]) as engine,
    ):
        yield engine, Recorder(shard, view, queries)
