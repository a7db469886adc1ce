"""Calibrates Compass: fits its models to held-out vectors, and measures what each threshold loses."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cotra_rdma._core.arrays import Floats, Ids, Wide
from cotra_rdma._core.exact import widest
from cotra_rdma._routing.calibration import Calibration
from cotra_rdma._routing.choice import fit_choice
from cotra_rdma._routing.coarse_table import CoarseTable, check_tables
from cotra_rdma._routing.model import ShardModel, at_least, shard_shares

N_HELD_OUT = 6000
MIN_HELD_OUT = 100
"""The least number of held-out vectors for a calibration."""

_N_DIRECTIONS = 8
_TRAINED_VECTORS = 1500  # that the first model is fitted to, which has a row for each list
_TRAINED_LISTS = 1024  # of each of these vectors: the most promising ones
_THRESHOLDS = np.geomspace(1e-5, 0.3, 64)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Vectors of the data set that are used as queries.

    Attributes:
        vectors: the vectors as stored, float32[n, dim].
        lists: the list that holds each vector, int64[n]. Lists are counted over all shards, in their order.
        neighbour_lists: the lists of the k nearest of each vector, without itself, int64[n, k].
    """

    vectors: Floats
    lists: Ids
    neighbour_lists: Ids


def calibrate(
    tables: Sequence[CoarseTable], held_out: HeldOut, scatter: npt.NDArray[Any], metric: str = "l2"
) -> Calibration | None:
    """Fits Compass's models to held-out vectors, and measures what each threshold loses.

    Args:
        tables: the coarse tables of all shards.
        held_out: the held-out vectors. `N_HELD_OUT` are plenty.
        scatter: the covariance of vectors about their centroids, up to a factor, float64[dim, dim].
        metric: the metric of the collection.

    Returns:
        The calibration. It is None if there is one shard, or fewer than 100 held-out vectors.

    Raises:
        FormatError: the tables do not fit each other.
        InvalidInputError: the metric is unknown.
    """
    check_tables(list(tables), metric)
    axes = widest_axes(scatter)
    model = ShardModel(tables, metric, axes)
    usable = model.sizes[held_out.lists] > 1
    if len(tables) < 2 or usable.sum() < MIN_HELD_OUT:
        return None
    used = HeldOut(held_out.vectors[usable], held_out.lists[usable], held_out.neighbour_lists[usable])
    list_weights, caps = _fit_lists(model, used)
    features = np.concatenate(
        [
            model.shard_features(model.raw(used.vectors[here], used.lists[here]), list_weights, caps)
            for here in _chunks(model, used)
        ]
    )
    shards = model.shard_of[used.neighbour_lists]
    held = (shards[:, :, np.newaxis] == np.arange(len(tables))).sum(axis=1).astype(np.float32)
    weights, offsets, slopes = fit_choice(features, held, own=True)
    recalls, asked = _losses(_unseen_shares(features, held), held)
    return Calibration(
        metric,
        len(tables),
        model.n_lists,
        model.dim,
        used.neighbour_lists.shape[1],
        len(used.vectors),
        base64.b64encode(axes.astype("<f2").tobytes()).decode(),
        six_digits(caps),
        six_digits(list_weights),
        six_digits(weights),
        six_digits(offsets),
        six_digits(slopes),
        six_digits(_THRESHOLDS),
        six_digits(recalls),
        six_digits(asked),
    )


def _chunks(model: ShardModel, used: HeldOut) -> list[slice]:
    return [slice(start, start + model.chunk_rows) for start in range(0, len(used.vectors), model.chunk_rows)]


def _fit_lists(model: ShardModel, used: HeldOut) -> tuple[Wide, Floats]:
    """Fits the first model, that of the lists.

    Returns:
        The weights of the features, float64[f]. The caps of z and of d^2, float32[2].
    """
    features, counts, caps = [], [], np.zeros(2, np.float32)
    for here in _chunks(model, used):
        if here.start >= _TRAINED_VECTORS:
            break
        raw = model.raw(used.vectors[here], used.lists[here])
        chosen = np.zeros(raw.mean.shape, np.float32)
        np.add.at(chosen, (np.arange(len(chosen))[:, np.newaxis], used.neighbour_lists[here]), 1)
        z, gap = model.scaled(raw)
        caps = np.maximum(caps, [np.quantile(z, 0.999), np.quantile(gap, 0.999)]).astype(np.float32)
        every = np.stack(model.list_features(raw, z, gap), axis=2)
        if every.shape[1] > _TRAINED_LISTS:
            close = np.argpartition(z, _TRAINED_LISTS, axis=1)[:, :_TRAINED_LISTS]
            every = np.take_along_axis(every, close[:, :, np.newaxis], axis=1)
            chosen = np.take_along_axis(chosen, close, axis=1)
        features.append(every)
        counts.append(chosen)
    return fit_choice(np.concatenate(features), np.concatenate(counts))[0], caps


def _unseen_shares(features: Floats, held: Floats) -> Wide:
    """Predicts the shards' shares for vectors that the model was not fitted to.

    Each half of the vectors is predicted by the second model, fitted to the other half.

    Args:
        features: the features of the second model, float32[n, shards, f].
        held: the neighbours of each vector that each shard holds, float32[n, shards].

    Returns:
        float64[n, shards].
    """
    shares = np.empty(held.shape)
    for half in (slice(0, None, 2), slice(1, None, 2)):
        other = slice(1 - (half.start or 0), None, 2)
        shares[half] = shard_shares(features[half], *fit_choice(features[other], held[other], own=True))
    return shares


def _losses(shares: Wide, held: Floats) -> tuple[Wide, Wide]:
    """Measures each threshold.

    Args:
        shares: the predicted shares, float64[n, shards].
        held: the neighbours that each shard holds, float32[n, shards].

    Returns:
        For each threshold, the recall less one standard error, and the mean number of shards asked.
        float64[thresholds].
    """
    masks = [at_least(shares, threshold) for threshold in _THRESHOLDS]
    each = np.stack([(held * mask).sum(axis=1) / held.sum(axis=1) for mask in masks])
    errors = each.std(axis=1) / math.sqrt(len(held))
    recalls = np.minimum.accumulate(each.mean(axis=1) - errors)
    return recalls, np.array([mask.sum(axis=1).mean() for mask in masks])


def held_out_rows(count: int, seed: int, most: int = N_HELD_OUT) -> tuple[Ids, Ids]:
    """Chooses the rows of a data set that Compass is calibrated with.

    Args:
        count: the number of rows of the data set.
        seed: the seed of the choice.
        most: the most rows to choose.

    Returns:
        The rows, int64[n], ascending. The order in which to use them, int64[n]: the first model is fitted to the first.
    """
    generator = np.random.default_rng(seed)
    rows = np.sort(generator.choice(count, min(most, count), replace=False, shuffle=False))
    return rows, generator.permutation(len(rows))


def widest_axes(scatter: npt.NDArray[Any]) -> Floats:
    """Returns the directions in which lists are widest.

    Args:
        scatter: the covariance of vectors about their centroids, float64[dim, dim].

    Returns:
        The eigenvectors of the largest eigenvalues, float32[n, dim]. The largest component of each is positive.
    """
    dim = len(scatter)
    axes = widest(scatter, min(_N_DIRECTIONS, dim // 4))
    signs = np.sign(np.take_along_axis(axes, np.abs(axes).argmax(axis=1)[:, np.newaxis], axis=1)) if axes.size else 1
    return np.ascontiguousarray(axes * signs).astype(np.float16).astype(np.float32)


def six_digits(values: npt.NDArray[Any]) -> tuple[float, ...]:
    """Rounds numbers to six significant digits."""
    return tuple(float(f"{value:.6g}") for value in values)
