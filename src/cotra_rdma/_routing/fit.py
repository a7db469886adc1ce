"""Fits the model of Compass to held-out vectors, and measures what each threshold loses."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cotra_rdma._core.arrays import Floats, Ids, Wide
from cotra_rdma._core.exact import exp, log, long_products, solve, widest
from cotra_rdma._routing.calibration import Calibration
from cotra_rdma._routing.coarse_table import CoarseTable, check_tables
from cotra_rdma._routing.model import ShardModel, at_least, shard_shares, weighted_sum

N_HELD_OUT = 6000
MIN_HELD_OUT = 100
"""With fewer vectors than that, nothing can be calibrated."""

_N_DIRECTIONS = 8
_TRAINED_VECTORS = 1500  # that the first model, which has one row for each list, is fitted to
_TRAINED_LISTS = 1024  # the most promising ones of each
_THRESHOLDS = np.geomspace(1e-5, 0.3, 64)
_NEWTON_STEPS = 25
_RIDGE = 1e-5  # times the number of neighbours
_OWN_RIDGE = 3.0


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Vectors of the data set taken as queries.

    Attributes:
        vectors: float32[n, dim], as stored.
        lists: int64[n], the list that each is itself in; lists are counted over all shards, in their order.
        neighbour_lists: int64[n, k], those of its k nearest, without itself.
    """

    vectors: Floats
    lists: Ids
    neighbour_lists: Ids


def calibrate(
    tables: Sequence[CoarseTable], held_out: HeldOut, scatter: npt.NDArray[Any], metric: str = "l2"
) -> Calibration | None:
    """Fits the models to held-out vectors, and measures what each threshold loses.

    Args:
        tables: of all shards.
        held_out: see `HeldOut`; `N_HELD_OUT` are plenty.
        scatter: float64[dim, dim], the covariance of members about their centroids, up to a factor.
        metric: of the collection.

    Returns:
        None where there is nothing to choose or to learn from: one shard, or fewer than 100 held-out vectors.
    """
    check_tables(list(tables), metric)
    axes = widest_axes(scatter)
    model = ShardModel(tables, metric, axes)
    usable = model.sizes[held_out.lists] > 1
    if len(tables) < 2 or usable.sum() < MIN_HELD_OUT:
        return None
    vectors, own, found = held_out.vectors[usable], held_out.lists[usable], held_out.neighbour_lists[usable]
    chunks = [slice(start, start + model.chunk_rows) for start in range(0, len(vectors), model.chunk_rows)]
    features, counts, caps = [], [], np.zeros(2, np.float32)
    for here in chunks:
        if here.start >= _TRAINED_VECTORS:
            break
        raw = model.raw(vectors[here], own[here])
        chosen = np.zeros(raw.mean.shape, np.float32)
        np.add.at(chosen, (np.arange(len(chosen))[:, np.newaxis], found[here]), 1)
        z, gap = model.scaled(raw)
        caps = np.maximum(caps, [np.quantile(z, 0.999), np.quantile(gap, 0.999)]).astype(np.float32)
        every = np.stack(model.list_features(raw, z, gap), axis=2)
        if every.shape[1] > _TRAINED_LISTS:
            close = np.argpartition(z, _TRAINED_LISTS, axis=1)[:, :_TRAINED_LISTS]
            every = np.take_along_axis(every, close[:, :, np.newaxis], axis=1)
            chosen = np.take_along_axis(chosen, close, axis=1)
        features.append(every)
        counts.append(chosen)
    list_weights = fit_choice(np.concatenate(features), np.concatenate(counts))[0]
    del features, counts
    held = (model.shard_of[found][:, :, np.newaxis] == np.arange(len(tables))).sum(axis=1).astype(np.float32)
    shard_features = np.concatenate(
        [model.shard_features(model.raw(vectors[here], own[here]), list_weights, caps) for here in chunks]
    )
    weights = fit_choice(shard_features, held, own=True)
    shares = np.empty(held.shape)  # for the measurement, of halves by what was fitted to the other half
    for half in (slice(0, None, 2), slice(1, None, 2)):
        other = slice(1 - (half.start or 0), None, 2)
        shares[half] = shard_shares(shard_features[half], *fit_choice(shard_features[other], held[other], own=True))
    masks = [at_least(shares, threshold) for threshold in _THRESHOLDS]
    each = np.stack([(held * mask).sum(axis=1) / held.sum(axis=1) for mask in masks])
    errors = each.std(axis=1) / math.sqrt(len(vectors))
    recalls = np.minimum.accumulate(each.mean(axis=1) - errors)
    return Calibration(
        metric,
        len(tables),
        model.n_lists,
        model.dim,
        found.shape[1],
        len(vectors),
        base64.b64encode(axes.astype("<f2").tobytes()).decode(),
        six_digits(caps),
        six_digits(list_weights),
        six_digits(weights[0]),
        six_digits(weights[1]),
        six_digits(weights[2]),
        six_digits(_THRESHOLDS),
        six_digits(recalls),
        six_digits(np.array([mask.sum(axis=1).mean() for mask in masks])),
    )


def held_out_rows(count: int, seed: int, most: int = N_HELD_OUT) -> tuple[Ids, Ids]:
    """The rows of a data set that Compass is calibrated with, `most` at most: int64[n] ascending, and the order to use them
    in, for the first model is fitted to the first of them."""
    generator = np.random.default_rng(seed)
    rows = np.sort(generator.choice(count, min(most, count), replace=False, shuffle=False))
    return rows, generator.permutation(len(rows))


def widest_axes(scatter: npt.NDArray[Any]) -> Floats:
    """float32[n, dim]: eigenvectors of the largest eigenvalues, each with its largest component positive."""
    dim = len(scatter)
    axes = widest(scatter, min(_N_DIRECTIONS, dim // 4))
    signs = np.sign(np.take_along_axis(axes, np.abs(axes).argmax(axis=1)[:, np.newaxis], axis=1)) if axes.size else 1
    return np.ascontiguousarray(axes * signs).astype(np.float16).astype(np.float32)


def six_digits(values: npt.NDArray[Any]) -> tuple[float, ...]:
    return tuple(float(f"{value:.6g}") for value in values)


def fit_choice(features: Floats, counts: Floats, *, own: bool = False) -> tuple[Wide, Wide, Wide]:
    """Fits a conditional logit model by damped Newton steps (its likelihood is concave).

    Args:
        features: float32[n, alternatives, f]. counts: float32[n, alternatives], how often each was chosen.
        own: whether each alternative gets an offset, and a slope on the first feature, of its own.

    Returns:
        The features' weights float64[f], and offsets and slopes float64[alternatives] (empty without `own`).
    """
    n, alternatives, f = features.shape
    flat = features.reshape(-1, f)
    scale = np.maximum(flat.std(axis=0, dtype=np.float64), 1e-6)
    centre = flat.mean(axis=0, dtype=np.float64)
    flat = ((flat - centre) / scale).astype(np.float32)
    cube = flat.reshape(n, alternatives, f)
    columns = flat.T.astype(np.float64, order="C")
    first, groups = cube[:, :, 0], alternatives if own else 0
    chosen = counts.sum(axis=1, dtype=np.float64)
    total = float(chosen.sum())
    ridge = np.concatenate([np.full(f, _RIDGE * total), np.full(2 * groups, _OWN_RIDGE)])
    offsets, slopes = slice(f, f + groups), slice(f + groups, f + 2 * groups)

    def sums(mass: Floats) -> Wide:
        """Of all features, own ones too, times `mass`."""
        parts: list[npt.NDArray[Any]] = [(columns * mass.reshape(-1)).sum(axis=1)]
        if own:
            parts += [mass.sum(axis=0, dtype=np.float64), (mass * first).sum(axis=0, dtype=np.float64)]
        return np.concatenate(parts)

    wanted = sums(counts)

    def likelihood(weights: Wide) -> tuple[float, Floats]:
        utility = weighted_sum(cube, weights[:f]).astype(np.float32)
        if own:
            utility += (weights[offsets] + first * weights[slopes]).astype(np.float32)
        top = utility.max(axis=1, keepdims=True)
        chances = exp(utility - top).astype(np.float32)
        norms = chances.sum(axis=1, keepdims=True)
        chances /= norms
        logs = (top + log(norms))[:, 0]
        parts = (wanted * weights).sum() - (chosen * logs).sum() - 0.5 * (ridge * np.square(weights)).sum()
        return float(parts) / total, chances

    def hessian(chances: Floats, mass: Floats) -> Wide:
        means = [(cube * chances[:, :, np.newaxis]).sum(axis=1, dtype=np.float64)]
        square = np.diag(ridge + 1e-6 * total)
        for number, weighed in enumerate(columns * mass.reshape(-1)):
            square[number, :f] += (weighed * columns).sum(axis=1)
        if own:
            means += [chances.astype(np.float64), (chances * first).astype(np.float64)]
            for block, part in ((offsets, mass), (slopes, mass * first)):
                cross = (cube * part[:, :, np.newaxis]).sum(axis=0, dtype=np.float64).T
                square[:f, block] += cross
                square[block, :f] += cross.T
            for row, column, part in (
                (offsets, offsets, mass),
                (offsets, slopes, mass * first),
                (slopes, offsets, mass * first),
            ):
                square[row, column] += np.diag(part.sum(axis=0, dtype=np.float64))
            square[slopes, slopes] += np.diag((mass * first**2).sum(axis=0, dtype=np.float64))
        joined = np.concatenate(means, axis=1)
        return np.asarray(square - long_products((joined * chosen[:, np.newaxis]).T, joined.T))

    weights = np.zeros(f + 2 * groups)
    value, chances = likelihood(weights)
    for _ in range(_NEWTON_STEPS):
        mass = chances * chosen[:, np.newaxis].astype(np.float32)
        step = solve(hessian(chances, mass), wanted - sums(mass) - ridge * weights)
        size = 1.0
        while size > 1e-3:
            new_value, new_chances = likelihood(weights + size * step)
            if new_value > value:
                break
            size /= 2
        else:
            break
        gain, value, chances, weights = new_value - value, new_value, new_chances, weights + size * step
        if gain < 1e-6:
            break
    slope = weights[slopes] / scale[0]
    return weights[:f] / scale, weights[offsets] - slope * centre[0], slope
