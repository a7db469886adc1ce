"""The models of Compass: features of queries, and the share of the neighbours that each shard is expected to hold.

There are two conditional logit models (`choice`), one on top of the other.

1. The first model is over all inverted lists of all shards. It gives the chance that one of the query's k nearest
vectors
   is in a list. Take a list of n vectors, with centroid c and radius r, and a query q at distance d = |q - c|. The mean
   squared distance of the list's vectors to q is d^2 + r^2, and its spread is about d r. The features are log n; z, the
   number of spreads by which the query's k-th neighbour probably lies below that mean; d^2 less that of the nearest
   list;
   and the part of d^2 in the few directions in which the lists are widest.
2. The second model is over the shards. Its features are the logarithm of the sum of the first model's chances, the
   distances to the shard's mean and to its nearest list, and how uncertain the first model is. Each shard also has an
   offset and a slope on that logarithm. A ridge holds them near 0. They are there because some data has shards that are
   neighbours of everything, and shards that are near nothing.

A shard is left out if its expected share is below a threshold.
The build measures how much recall each threshold loses, on held-out vectors and their exact neighbours.
Queries from another distribution lose another amount.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cotra_rdma._clustering.kmeans import normalised
from cotra_rdma._core.arrays import Floats, Ids, Mask, Wide
from cotra_rdma._core.exact import exp, log, products
from cotra_rdma._routing.calibration import Calibration
from cotra_rdma._routing.coarse_table import CoarseTable, check_tables
from cotra_rdma._routing.exact_neighbours import CHUNK_FLOATS

_EDGE = 0.45  # spreads below the mean of the nearest list: its nearest vectors are about there


@dataclass(slots=True)
class RawFeatures:
    """What the coarse tables say of some queries. All arrays are float32.

    Attributes:
        gaps: [n, lists], d^2, or for ip a value in its place.
        mean: [n, lists], the means of the vectors' squared distances.
        spread: [n, lists], half of the spreads of these squared distances.
        along: [n, lists], the part of d^2 along the axes.
        shard_gaps: [n, shards], d^2 to the shard's mean.
    """

    gaps: Floats
    mean: Floats
    spread: Floats
    along: Floats
    shard_gaps: Floats


class ShardModel:
    """The coarse tables, prepared for matrix products, and the features of queries.

    For cosine, queries are normalised: squared l2 distances then rank as cosine does.
    For ip, only the direction of a query matters. The query is scaled to the length of the vectors, and a constant less
    2 <q, c> takes the place of d^2.

    Args:
        tables: the coarse tables of all shards.
        metric: the metric of the collection.
        axes: the directions in which lists are widest, float32[n, dim].

    Attributes:
        chunk_rows: the number of queries to compare with all lists at once.

    Raises:
        FormatError: the tables do not fit each other.
        InvalidInputError: the metric is unknown.
    """

    def __init__(self, tables: Sequence[CoarseTable], metric: str, axes: Floats) -> None:
        self.dim = check_tables(list(tables), metric)
        self.metric = metric
        lengths = [len(table) for table in tables]
        self.n_lists = sum(lengths)
        self.starts = np.cumsum([0, *lengths[:-1]])
        self.shard_of = np.repeat(np.arange(len(tables)), lengths)
        centroids = np.concatenate([table.centroids for table in tables])
        self.sizes = np.concatenate([table.sizes for table in tables])
        radii = np.concatenate([table.radii for table in tables])
        self.centre = np.zeros(self.dim, np.float32)
        if metric != "ip":
            self.centre = np.average(centroids, axis=0, weights=self.sizes).astype(np.float32)
        self.centroids = centroids - self.centre
        weighted = self.centroids * self.sizes[:, np.newaxis].astype(np.float64)
        counts = np.maximum(np.add.reduceat(self.sizes, self.starts), 1)
        self.means = (np.add.reduceat(weighted, self.starts, axis=0) / counts[:, np.newaxis]).astype(np.float32)
        unit = math.sqrt(float(np.average(np.square(radii.astype(np.float64)), weights=self.sizes)))
        squares = np.square(self.centroids.astype(np.float64)).sum(axis=1)
        # If each list is one point, the distances between the lists give the unit.
        self.unit = unit or math.sqrt(float(squares.mean())) or 1.0
        self.length = math.sqrt(float(np.average(squares, weights=self.sizes)) + unit**2)
        self.offset = float(squares.max()) + self.length**2
        self.radii = np.maximum(radii, 0.2 * self.unit).astype(np.float32)
        self.radii_squared = np.square(radii)
        self.squares = squares.astype(np.float32)
        self.mean_squares = np.square(self.means).sum(axis=1)
        self.log_sizes = log(np.maximum(self.sizes, 1e-3)).astype(np.float32)
        self.axes = axes
        self.projected = np.empty((self.n_lists, 0), np.float32)
        if axes.size:
            self.projected = products(self.centroids, axes).astype(np.float32)
        self.chunk_rows = max(16, CHUNK_FLOATS // self.n_lists)

    def raw(self, queries: Floats, own: Ids | None = None) -> RawFeatures:
        """Computes the raw features of queries.

        Args:
            queries: float32[n, dim].
            own: the list that holds each query, int64[n]. The query is first taken out of the list. None if no list
                holds them.
        """
        rows = self._prepared(queries)
        gaps = self._gaps(rows, self.centroids, self.squares)
        along = np.zeros((1, 1), np.float32)
        if self.axes.size:
            flat = products(rows, self.axes).astype(np.float32)
            along = squared_gaps(flat, self.projected, np.square(self.projected).sum(axis=1))
        if own is not None:
            n = self.sizes[own].astype(np.float64)[:, np.newaxis]
            members = normalised(queries) if self.metric == "cosine" else queries
            without = ((n * self.centroids[own] - (members - self.centre)) / (n - 1)).astype(np.float32)
            row = np.arange(len(rows))
            if self.metric == "ip":
                gaps[row, own] = np.maximum(self.offset - 2 * (rows * without).sum(axis=1), 0)
            else:
                gaps[row, own] = np.square(rows - without).sum(axis=1)
            if self.axes.size:
                along[row, own] = np.square(products(rows - without, self.axes)).sum(axis=1)
        if self.metric == "ip":
            mean, spread = gaps, np.broadcast_to(np.float32(self.length) * self.radii, gaps.shape)
        else:
            mean, spread = gaps + self.radii_squared, np.sqrt(gaps) * self.radii
        spread = np.maximum(spread, np.float32(1e-3 * self.unit**2))
        return RawFeatures(gaps, mean, spread, along, self._gaps(rows, self.means, self.mean_squares))

    def nearest_shards(self, queries: Floats) -> Ids:
        """Returns the shard of the nearest list to each query, int64[n]."""
        found = np.empty(len(queries), np.int64)
        for start in range(0, len(queries), self.chunk_rows):
            rows = self._prepared(queries[start : start + self.chunk_rows])
            gaps = self._gaps(rows, self.centroids, self.squares)
            found[start : start + self.chunk_rows] = self.shard_of[gaps.argmin(axis=1)]
        return found

    def scaled(self, raw: RawFeatures) -> tuple[Floats, Floats]:
        """Returns z, and d^2 less that of the nearest list, float32[n, lists] each.

        Both have no unit and are at least 0.
        """
        edge = (raw.mean - np.float32(2 * _EDGE) * raw.spread).min(axis=1, keepdims=True)
        z = (raw.mean - edge) / (2 * raw.spread)
        return z, (raw.gaps - raw.gaps.min(axis=1, keepdims=True)) / np.float32(self.unit**2)

    def list_features(self, raw: RawFeatures, z: Floats, gap: Floats) -> list[Floats]:
        """Returns the features of the first model, float32[n, lists] each."""
        nearest = np.sqrt(raw.gaps.min(axis=1, keepdims=True)) / np.float32(self.unit)
        far = log(nearest + np.float32(0.1)).astype(np.float32)
        along = raw.along / np.float32(self.unit**2)
        share = raw.along / (raw.gaps + np.float32(1e-6 * self.unit**2))
        shape = z.shape
        features = [self.log_sizes, z, z * z, z * far, z * z * far, gap, np.sqrt(gap), along, np.sqrt(along), share * z]
        features.append(log(self.radii / np.float32(self.unit)).astype(np.float32))
        return [np.broadcast_to(feature, shape) for feature in features]

    def shard_features(self, raw: RawFeatures, list_weights: Wide, caps: Floats) -> Floats:
        """Computes the features of the second model from the answer of the first.

        Args:
            raw: the raw features of n queries.
            list_weights: the weights of the first model, float64[f].
            caps: the largest z and d^2 to use, float32[2].

        Returns:
            float32[n, shards, features].
        """
        z, gap = self.scaled(raw)
        np.minimum(z, caps[0], out=z)
        np.minimum(gap, caps[1], out=gap)
        utility = np.zeros(z.shape, np.float32)
        for weight, feature in zip(list_weights, self.list_features(raw, z, gap), strict=True):
            utility += np.float32(weight) * feature
        chances = softmax(utility)
        shares = np.add.reduceat(chances, self.starts, axis=1)
        log_shares = log(shares + np.float32(1e-6)).astype(np.float32)
        doubt = -(shares * log_shares).sum(axis=1, keepdims=True)
        unit = np.float32(self.unit)
        mean = (raw.shard_gaps - raw.shard_gaps.min(axis=1, keepdims=True)) / unit**2
        closest = np.sqrt(np.minimum.reduceat(raw.gaps, self.starts, axis=1)) / unit
        closest = closest - closest.min(axis=1, keepdims=True)
        features = [log_shares, mean, np.sqrt(mean), closest, log_shares**2, log_shares * doubt, mean * doubt]
        return np.stack(features, axis=2)

    def shares(self, queries: Floats, calibration: Calibration) -> Wide:
        """Returns the share of each query's neighbours that each shard is expected to hold, float64[n, shards]."""
        list_weights = np.array(calibration.list_weights)
        weights = [
            np.array(values)
            for values in (calibration.shard_weights, calibration.shard_offsets, calibration.shard_slopes)
        ]
        caps = np.array(calibration.list_caps, np.float32)
        found = np.empty((len(queries), len(self.starts)))
        for start in range(0, len(queries), self.chunk_rows):
            raw = self.raw(queries[start : start + self.chunk_rows])
            features = self.shard_features(raw, list_weights, caps)
            found[start : start + self.chunk_rows] = shard_shares(features, *weights)
        return found

    def _prepared(self, queries: Floats) -> Floats:
        if self.metric == "l2":
            return queries - self.centre
        unit = normalised(queries)
        return unit * np.float32(self.length) if self.metric == "ip" else unit - self.centre

    def _gaps(self, rows: Floats, centroids: Floats, squares: Floats) -> Floats:
        if self.metric != "ip":
            return squared_gaps(rows, centroids, squares)
        gaps: Floats = np.float32(self.offset) - 2 * products(rows, centroids).astype(np.float32)
        return np.maximum(gaps, 0, out=gaps)


def squared_gaps(rows: Floats, others: Floats, squares: Floats) -> Floats:
    """Computes squared distances.

    Args:
        rows: float32[n, dim].
        others: float32[m, dim].
        squares: the squared lengths of `others`, float32[m].

    Returns:
        float32[n, m], at least 0.
    """
    found = products(rows, others).astype(np.float32)
    found *= -2
    found += squares
    found += np.square(rows).sum(axis=1)[:, np.newaxis]
    return np.maximum(found, 0, out=found)


def softmax(utility: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Computes the softmax along the second axis."""
    chances = exp(utility - utility.max(axis=1, keepdims=True)).astype(utility.dtype)
    chances /= chances.sum(axis=1, keepdims=True)
    return np.asarray(chances)


def at_least(shares: npt.NDArray[Any], threshold: float) -> Mask:
    """Selects the shards with at least some share, and always the best one."""
    mask = shares >= threshold
    mask[np.arange(len(mask)), shares.argmax(axis=1)] = True
    return np.asarray(mask)


def weighted_sum(features: npt.NDArray[Any], weights: Wide) -> Wide:
    """Sums features [..., f], each times its weight.

    The features are added one after the other, in the same order on every machine.
    """
    total = np.zeros(features.shape[:-1])
    for number, weight in enumerate(weights):
        total += features[..., number] * weight
    return total


def shard_shares(features: Floats, weights: Wide, offsets: Wide, slopes: Wide) -> npt.NDArray[Any]:
    """Computes the answer of the second model.

    Args:
        features: the features of the second model, float32[n, shards, f].
        weights: the weights of the features, float64[f].
        offsets: the offset of each shard, float64[shards].
        slopes: the slope of each shard, float64[shards].

    Returns:
        float64[n, shards].
    """
    return softmax(weighted_sum(features, weights) + offsets + features[:, :, 0] * slopes)
