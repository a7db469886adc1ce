"""Divides vectors into parts of neighbours, none of which is much larger than the mean.

This is k-means in which a full part asks a price for each further row, on top of the squared distance.
The prices are the dual of the transport problem with capacities (Bradley, Bennett and Demiriz 2000, "Constrained
k-means
clustering").

It works in one process, or in several of which each has a slice of the rows:

1. One process trains the `PartModel` on a sample.
2. Each process counts what the rows of its slice would take (`cheapest`).
3. From the counts of all slices, each process computes how many of its rows a full part keeps, and how much room other
   parts have for the rest (`plan_slices`).
4. Each process finds a part for the rest (`fill_slice`).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cotra_rdma._clustering.kmeans import (
    ROWS_PER_CENTROID,
    Counts,
    Floats,
    Parts,
    Progress,
    Source,
    VectorSource,
    chunk_rows,
    initial_centroids,
    move_centroids,
    squared_distances,
    thread_count,
)
from cotra_rdma.errors import InvalidInputError

MAX_SHARE = 1.1
ROWS_PER_PART = 4096
"""The rows of the sample for each part.

There are so many because the parts' shares must be known to a percent or two.
"""

_PRICE_STEPS = 60
_SPARE = 0.4  # of the room above the mean, kept because the sample is not exact


@dataclass(frozen=True, slots=True, eq=False)
class PartModel:
    """What decides the part of a row: the smallest sum of squared distance and price.

    Attributes:
        metric: for "cosine", vectors are normalised first.
        centre: what is subtracted from vectors before anything else, float32[dim].
        offsets: the centroids less `centre`, float32[n_parts, dim].
        prices: float32[n_parts].
    """

    metric: str
    centre: Floats
    offsets: Floats
    prices: Floats

    @property
    def n_parts(self) -> int:
        """The number of parts."""
        return len(self.prices)

    @property
    def centroids(self) -> Floats:
        """The centroids, float32[n_parts, dim]."""
        return self.offsets + self.centre


def train_parts(
    vectors: npt.ArrayLike | VectorSource,
    n_parts: int,
    *,
    max_share: float = MAX_SHARE,
    seed: int = 0,
    n_iterations: int = 12,
    n_threads: int = 0,
    metric: str = "l2",
    progress: Progress | None = None,
) -> PartModel:
    """Learns centroids and prices from a sample of at most 4096 rows for each part.

    The arguments and errors are those of `balanced_partition`.
    """
    source = Source(vectors, metric)
    if not 1 <= n_parts <= source.count:
        raise InvalidInputError(f"{source.count} vectors cannot be split into {n_parts} parts")
    if not 1 <= max_share < np.inf:
        raise InvalidInputError(f"max_share must be at least 1, not {max_share}")
    generator = np.random.default_rng(seed)
    with ThreadPoolExecutor(thread_count(n_threads)) as pool:
        sample = source.sample(ROWS_PER_PART * n_parts, generator)
        centre = sample.mean(axis=0, dtype=np.float64).astype(np.float32)
        sample -= centre
        offsets = initial_centroids(sample[: ROWS_PER_CENTROID * n_parts], n_parts, generator)
        prices = np.zeros(n_parts, np.float32)
        room = (1 + (max_share - 1) * (1 - _SPARE)) * len(sample) / n_parts
        for iteration in range(max(n_iterations, 1)):
            costs = squared_distances(sample, offsets, pool)
            part = _price(costs, prices, room)
            if progress:
                progress("train", iteration + 1, n_iterations)
            if iteration + 1 < n_iterations:
                move_centroids(sample, part, costs[np.arange(len(sample)), part], offsets)
    return PartModel(metric, centre, offsets, prices)


def capacity(count: int, n_parts: int, max_share: float = MAX_SHARE) -> int:
    """Returns the most rows of a part. It is at least the mean, rounded up, even if `max_share` allows less."""
    return max(int(max_share * count / n_parts), -(-count // n_parts))


def balanced_partition(
    vectors: npt.ArrayLike | VectorSource,
    n_parts: int,
    *,
    max_share: float = MAX_SHARE,
    seed: int = 0,
    n_iterations: int = 12,
    n_threads: int = 0,
    metric: str = "l2",
    progress: Progress | None = None,
) -> tuple[Parts, Floats]:
    """Divides vectors into parts of neighbours, none of which is larger than `max_share` times the mean.

    Args:
        vectors: as for `kmeans.kmeans`.
        n_parts: the number of parts, at most n.
        max_share: at least 1.
        seed: as for `kmeans.kmeans`.
        n_iterations: as for `kmeans.kmeans`.
        n_threads: as for `kmeans.kmeans`.
        metric: as for `kmeans.kmeans`.
        progress: as for `kmeans.kmeans`.

    Returns:
        The part of each row, int32[n]. The centroids by which the rows were assigned, float32[n_parts, dim].

    Raises:
        InvalidInputError: `max_share` is below 1, or `kmeans.kmeans` would refuse the arguments.
    """
    model = train_parts(
        vectors,
        n_parts,
        max_share=max_share,
        seed=seed,
        n_iterations=n_iterations,
        n_threads=n_threads,
        metric=metric,
        progress=progress,
    )
    source = Source(vectors, metric)
    free = np.full(n_parts, capacity(source.count, n_parts, max_share), np.int64)
    result = np.empty(source.count, np.int32)
    with ThreadPoolExecutor(thread_count(n_threads)) as pool:
        for start, chunk in source.chunks(chunk_rows(n_parts, source.dim)):
            chunk -= model.centre
            part = _fill(squared_distances(chunk, model.offsets, pool) + model.prices, free)
            free -= np.bincount(part, minlength=n_parts)
            result[start : start + len(chunk)] = part
            if progress:
                progress("assign", start + len(chunk), source.count)
    return result, model.centroids


# ---- slice by slice ----


def slice_of(count: int, n_slices: int, number: int) -> tuple[int, int]:
    """Returns the rows [begin, end) of a slice."""
    return count * number // n_slices, count * (number + 1) // n_slices


def cheapest(
    model: PartModel, vectors: npt.ArrayLike | VectorSource, *, n_threads: int = 0, progress: Progress | None = None
) -> tuple[Parts, npt.NDArray[np.float64]]:
    """Finds the part that each row of a slice would take if every part had room.

    Args:
        model: the partition.
        vectors: the rows of the slice.
        n_threads: as for `kmeans.kmeans`.
        progress: as for `kmeans.kmeans`.

    Returns:
        The part of each row, int32[n]. The sum of all rows, float64[dim].

    Raises:
        InvalidInputError: `kmeans.kmeans` would refuse the vectors.
    """
    source = Source(vectors, model.metric)
    part, total = np.empty(source.count, np.int32), np.zeros(source.dim)
    with ThreadPoolExecutor(thread_count(n_threads)) as pool:
        for start, chunk in source.chunks(chunk_rows(model.n_parts, source.dim)):
            total += chunk.sum(axis=0, dtype=np.float64)
            chunk -= model.centre
            costs = squared_distances(chunk, model.offsets, pool) + model.prices
            part[start : start + len(chunk)] = costs.argmin(axis=1)
            if progress:
                progress("assign", start + len(chunk), source.count)
    return part, total


@dataclass(frozen=True, slots=True, eq=False)
class SlicePlan:
    """How the rows of all slices fit into the parts. It is the same in every process, because it holds only whole
    numbers.

    Attributes:
        moves: (giver, taker, rows) in the order in which they happen. The first rows of a part go to one that would be
            empty, because vectors are equal or very few.
        demand: the rows whose cheapest part is each part, after the moves, int64[n_slices, n_parts].
        kept: how many of these rows stay, int64[n_slices, n_parts]. All of them stay in a part with room.
        spare: the room for rows that do not stay, int64[n_slices, n_parts].
    """

    moves: tuple[tuple[int, int, int], ...]
    demand: Counts
    kept: Counts
    spare: Counts


def plan_slices(counts: Counts, room: int) -> SlicePlan:
    """Plans how the rows of all slices fit into the parts.

    Args:
        counts: the counts from `cheapest`, int64[n_slices, n_parts].
        room: the most rows of a part.

    Raises:
        InvalidInputError: the rows do not fit, or are fewer than the parts.
    """
    demand = counts.copy()
    n_parts = demand.shape[1]
    if demand.sum() > room * n_parts or demand.sum() < n_parts:
        raise InvalidInputError(f"{demand.sum()} rows do not fill {n_parts} parts of at most {room}")
    moves = []
    for empty in np.flatnonzero(demand.sum(axis=0) == 0):
        giver = int(demand.sum(axis=0).argmax())
        rows = max(1, int(demand[:, giver].sum()) // 2)
        taken = np.diff(np.minimum(np.cumsum(demand[:, giver]), rows), prepend=0)
        demand[:, giver] -= taken
        demand[:, empty] += taken
        moves.append((giver, int(empty), rows))
    totals = demand.sum(axis=0)
    kept, spare = demand.copy(), np.zeros_like(demand)
    for part in np.flatnonzero(totals > room):  # each slice keeps its share, and all together keep exactly `room`
        kept[:, part] = np.diff(np.cumsum(demand[:, part]) * room // totals[part], prepend=0)
    leaving = (demand - kept).sum(axis=1)
    left = np.maximum(room - totals, 0)
    if leaving.any():
        spare = left[np.newaxis, :] * leaving[:, np.newaxis] // leaving.sum()
        left = left - spare.sum(axis=0)
        missing = np.maximum(leaving - spare.sum(axis=1), 0)
        for number in np.flatnonzero(missing):  # rounding down left some rows without room
            for part in np.flatnonzero(left):
                more = min(int(missing[number]), int(left[part]))
                spare[number, part] += more
                left[part] -= more
                missing[number] -= more
    return SlicePlan(tuple(moves), demand, kept, spare)


def fill_slice(
    model: PartModel,
    vectors: npt.ArrayLike | VectorSource,
    part: Parts,
    counts: Counts,
    plan: SlicePlan,
    number: int,
    *,
    n_threads: int = 0,
) -> None:
    """Changes the parts that `cheapest` found for the rows of a slice to parts that have room.

    The rows that leave a full part are those that lose least by it.

    Args:
        model: the partition.
        vectors: the rows of the slice.
        part: the part of each row, int32[n], which is changed.
        counts: the counts that the plan was made from, int64[n_slices, n_parts].
        plan: the plan.
        number: the number of the slice.
        n_threads: as for `kmeans.kmeans`.
    """
    demand = counts.copy()
    for giver, taker, rows in plan.moves:
        taken = np.diff(np.minimum(np.cumsum(demand[:, giver]), rows), prepend=0)
        part[np.flatnonzero(part == giver)[: taken[number]]] = taker
        demand[:, giver] -= taken
        demand[:, taker] += taken
    full = plan.kept[number] < plan.demand[number]
    if not full.any():
        return
    waiting = np.where(full, plan.demand[number], 0)
    free = np.where(full, plan.kept[number], plan.spare[number])
    source = Source(vectors, model.metric)
    with ThreadPoolExecutor(thread_count(n_threads)) as pool:
        for start, chunk in source.chunks(chunk_rows(model.n_parts, source.dim)):
            mine = part[start : start + len(chunk)]
            here = np.flatnonzero(full[mine])
            if not len(here):
                continue
            here_counts = np.bincount(mine[here], minlength=model.n_parts)
            # Each chunk gets its share of the room, so that the last chunks are not worse off than the first.
            share = np.where(free < waiting, -(-free * here_counts // np.maximum(waiting, 1)), free)
            costs = squared_distances(chunk[here] - model.centre, model.offsets, pool) + model.prices
            found = _fill(costs, share)
            mine[here] = found
            free = free - np.bincount(found, minlength=model.n_parts)
            waiting -= here_counts


def _price(costs: Floats, prices: Floats, room: float) -> Parts:
    """Raises the prices until no part has much more than `room` rows.

    Args:
        costs: squared distances, float32[n, n_parts].
        prices: float32[n_parts], which is changed.
        room: the most rows of a part.

    Returns:
        The part of each row at the final prices, int32[n].
    """
    step = float(costs.min(axis=1).mean()) or 1.0
    mean = len(costs) / len(prices)
    best = (costs + prices).argmin(axis=1)
    last: npt.NDArray[np.floating[Any]] = np.zeros(len(prices))
    rates = np.full(len(prices), step)
    for _ in range(_PRICE_STEPS):
        excess = (np.bincount(best, minlength=len(prices)) - room) / mean
        if (excess <= 0.005).all() and ((excess >= -0.005) | (prices == 0)).all():
            break
        # Each part has a rate of its own (Rprop): halved if its excess changed sign, and otherwise a little larger.
        rates *= np.where(excess * last < 0, 0.5, 1.1)
        prices += (rates * np.clip(excess, -1, 1)).astype(np.float32)
        np.maximum(prices, 0, out=prices)
        last = excess
        best = (costs + prices).argmin(axis=1)
    part: Parts = best.astype(np.int32)
    return part


def _fill(costs: Floats, free: Counts) -> Parts:
    """Assigns each row to the cheapest part that has room left. The rows that lose least by it give way.

    Args:
        costs: the costs of each part, float32[n, n_parts], which are changed.
        free: the room of each part, int64[n_parts].

    Returns:
        The part of each row, int32[n].
    """
    part: Parts = costs.argmin(axis=1).astype(np.int32)
    while True:
        full = np.flatnonzero(np.bincount(part, minlength=len(free)) > free)
        if not len(full):
            return part
        for number in full:
            here = np.flatnonzero(part == number)
            others = np.delete(costs[here], number, axis=1).min(axis=1)
            with np.errstate(invalid="ignore"):
                loss = others - costs[here, number]
            leaving = here[np.argsort(loss, kind="stable")[: len(here) - free[number]]]
            costs[leaving, number] = np.inf
            part[leaving] = costs[leaving].argmin(axis=1)
