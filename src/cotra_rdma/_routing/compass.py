"""Compass: which shards a query has to ask, told from their coarse tables before anything is sent.

Two conditional logit models (McFadden 1974, "Conditional logit analysis of qualitative choice behavior"), one over the other:

1. Over all inverted lists of all shards: the chance that one of the query's k nearest is in the list. Of list l, of n members
   with centroid c and radius r, the mean squared distance to query q is d^2 + r^2 (d = |q - c|), and it spreads by about d r.
   The model's features are log n; z, how many such spreads the query's k-th neighbour is likely below that mean; d^2 less that
   of the nearest list; and the part of d^2 in the few directions in which the lists are widest.
2. Over the shards: the logarithm of the sum of 1., how far the query is from the shard's mean and from its closest list, and
   how uncertain 1. is. Each shard also has an offset and a slope of its own on that logarithm, held near 0 by a ridge: data
   has shards that are neighbours of everything, and shards that nothing is near to.

Shards whose expected share of the neighbours is below a threshold are left out. Which threshold loses how much recall was
measured, at build, on held-out vectors with their exact neighbours; queries that are distributed otherwise lose otherwise.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from cotra_rdma._clustering.kmeans import METRICS, VectorSource, normalised
from cotra_rdma._core.exact import exp, log, long_products, products, solve, widest
from cotra_rdma._core.query_checks import check_queries
from cotra_rdma._routing.coarse_table import CoarseTable, check_tables
from cotra_rdma.errors import FormatError, InvalidInputError

Floats = npt.NDArray[np.float32]
Wide = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

DEFAULT_TARGET = 0.99
CALIBRATION_K = 10
N_HELD_OUT = 6000
MIN_HELD_OUT = 100
"""With fewer vectors than that, nothing can be calibrated."""

_N_DIRECTIONS = 8
_N_LIST_FEATURES, _N_SHARD_FEATURES = 11, 7
_TRAINED_VECTORS = 1500  # that the first model, which has one row for each list, is fitted to
_TRAINED_LISTS = 1024  # the most promising ones of each
_EDGE = 0.45  # spreads below the mean of the closest list: about where its nearest members are
_THRESHOLDS = np.geomspace(1e-5, 0.3, 64)
_ALL_SHARE = 0.8  # of the shards: where more than that would be asked on average, all are
_CHUNK_FLOATS = 1 << 20
_NEWTON_STEPS = 25
_RIDGE = 1e-5  # times the number of neighbours
_OWN_RIDGE = 3.0

Progress = Callable[[int, int], None]
"""Called as progress(rows done, rows in all)."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was learned at build, for the tables of that build only.

    Attributes:
        metric, n_shards, n_lists, dim: of the collection.
        k: the neighbours that recall was measured on.
        n_held_out: the vectors that it was measured with.
        directions: base64 of float16[n, dim], in which the lists are widest.
        list_caps: the largest z and d^2 that the model has seen; larger ones count as these.
        list_weights, shard_weights: of the models' features.
        shard_offsets, shard_slopes: of each shard.
        thresholds, recalls, shards: on the held-out vectors, thresholds on a shard's share, ascending, with the recall
            (against asking all, less one standard error) and the mean number of shards asked.
    """

    metric: str
    n_shards: int
    n_lists: int
    dim: int
    k: int
    n_held_out: int
    directions: str
    list_caps: tuple[float, ...]
    list_weights: tuple[float, ...]
    shard_weights: tuple[float, ...]
    shard_offsets: tuple[float, ...]
    shard_slopes: tuple[float, ...]
    thresholds: tuple[float, ...]
    recalls: tuple[float, ...]
    shards: tuple[float, ...]

    def __post_init__(self) -> None:
        numbers = (self.n_shards, self.n_lists, self.dim, self.k, self.n_held_out)
        if self.metric not in METRICS or not all(type(n) is int and n > 0 for n in numbers):
            raise FormatError("calibration: its metric or a number is out of range")
        lengths = {"list_caps": 2, "list_weights": _N_LIST_FEATURES, "shard_weights": _N_SHARD_FEATURES}
        lengths |= {"shard_offsets": self.n_shards, "shard_slopes": self.n_shards}
        lengths |= dict.fromkeys(("thresholds", "recalls", "shards"), len(self.thresholds))
        for name, length in lengths.items():
            values = getattr(self, name)
            if len(values) != length or not all(isinstance(v, int | float) and math.isfinite(v) for v in values):
                raise FormatError(f"calibration: {name} must be {length} finite numbers")
        if not self.thresholds or list(self.thresholds) != sorted(self.thresholds) or self.thresholds[0] <= 0:
            raise FormatError("calibration: thresholds must be positive and ascend")
        if list(self.recalls) != sorted(self.recalls, reverse=True):
            raise FormatError("calibration: recalls must not ascend")
        self.axes()

    def axes(self) -> Floats:
        """`directions` as float32[n, dim]. Raises `FormatError`."""
        try:
            flat = np.frombuffer(base64.b64decode(self.directions, validate=True), "<f2").astype(np.float32)
        except (binascii.Error, ValueError, TypeError) as error:
            raise FormatError(f"calibration: directions: {error}") from error
        if len(flat) % self.dim or not (np.abs(flat) <= 2).all():
            raise FormatError(f"calibration: directions of {len(flat)} numbers do not fit dimension {self.dim}")
        return flat.reshape(-1, self.dim)

    def threshold(self, target_recall: float) -> float | None:
        """The share below which a shard is left out; None: ask all, since leaving any out would lose more or save little."""
        recalls, shards = np.asarray(self.recalls)[::-1], np.asarray(self.shards)[::-1]
        if target_recall > recalls[-1] or target_recall >= 1:
            return None
        if np.interp(target_recall, recalls, shards) > _ALL_SHARE * self.n_shards:
            return None
        # Between two points: the smaller threshold's recall is the larger one.
        return float(np.exp(np.interp(target_recall, recalls, np.log(np.asarray(self.thresholds)[::-1]))))

    def expected(self, target_recall: float) -> float:
        """The shards asked for a held-out vector, on average, at this target."""
        if self.threshold(target_recall) is None:
            return float(self.n_shards)
        return float(np.interp(target_recall, self.recalls[::-1], self.shards[::-1]))

    def to_json(self) -> dict[str, Any]:
        """As values that JSON knows."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, raw: Any) -> Self:
        """Reads what `to_json` made. Raises `FormatError` for anything else."""
        if not isinstance(raw, dict):
            raise FormatError("calibration: must be an object")
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in raw.items()}
        try:
            return cls(**fields)
        except (TypeError, AttributeError) as error:
            raise FormatError(f"calibration: {error}") from error


class Router:
    """Selects shards for queries. Safe to use from several threads.

    Args:
        tables: of all shards, in their order.
        calibration: of their build; None: all shards are always asked.
        metric: of the collection.

    Raises:
        FormatError: the tables do not fit each other or the calibration.
    """

    def __init__(self, tables: Sequence[CoarseTable], calibration: Calibration | None, metric: str = "l2") -> None:
        self._n_shards = len(tables)
        self._model = _Model(
            tables, metric, np.empty((0, 0), np.float32) if calibration is None else calibration.axes()
        )
        self._calibration = calibration
        if calibration is not None:
            ours = (metric, len(tables), self._model.n_lists, self._model.dim)
            theirs = (calibration.metric, calibration.n_shards, calibration.n_lists, calibration.dim)
            if ours != theirs:
                raise FormatError(
                    f"compass: the tables are of {ours} (metric, shards, lists, dim), and the calibration of {theirs}"
                )

    @property
    def n_shards(self) -> int:
        """Shards to choose from."""
        return self._n_shards

    @property
    def dim(self) -> int:
        """Components of a query."""
        return self._model.dim

    @property
    def calibration(self) -> Calibration | None:
        """What it was made with."""
        return self._calibration

    def shares(self, queries: npt.ArrayLike) -> Wide:
        """The share of each query's nearest that each shard is expected to hold: float64[n_queries, n_shards].

        Rows sum to 1. Without a calibration all shards count as equal. Raises `InvalidInputError` as `Cluster.search`.
        """
        rows = check_queries(queries, self.dim)
        if self._calibration is None:
            return np.full((len(rows), self._n_shards), 1 / self._n_shards)
        return self._model.shares(rows, self._calibration)

    def nearest(self, queries: npt.ArrayLike) -> Ids:
        """The shard that has the list nearest to each query: int64[n_queries]. It takes no calibration.

        Raises `InvalidInputError` as `Cluster.search`.
        """
        return self._model.nearest_shards(check_queries(queries, self.dim))

    def select(self, queries: npt.ArrayLike, target_recall: float = DEFAULT_TARGET, among: Mask | None = None) -> Mask:
        """The shards to ask for each query.

        Args:
            queries: float32[n_queries, dim] or float32[dim].
            target_recall: the mean recall to keep, of that which asking all shards has; in (0, 1].
            among: bool[n_queries, n_shards]: which shards each query may ask; None: all. Shares are then of what these hold.

        Returns:
            bool[n_queries, n_shards], with at least one shard each that may ask any; all of `among` are True where nothing
            is calibrated, or where the calibration found that leaving shards out loses too much.

        Raises:
            InvalidInputError: a wrong dim, NaN or infinity, a target out of range.
        """
        if not 0 < target_recall <= 1:
            raise InvalidInputError(f"target_recall must be in (0, 1], not {target_recall}")
        threshold = None if self._calibration is None else self._calibration.threshold(target_recall)
        if threshold is None:
            every = np.ones((len(check_queries(queries, self.dim)), self._n_shards), np.bool_)
            return every if among is None else every & among
        shares = self.shares(queries)
        if among is None:
            return _at_least(shares, threshold)
        shares = np.where(among, shares + np.finfo(np.float64).tiny, 0)
        shares /= np.maximum(shares.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
        return _at_least(shares, threshold) & among


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
    axes = _widest(scatter)
    model = _Model(tables, metric, axes)
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
    list_weights = _fit(np.concatenate(features), np.concatenate(counts))[0]
    del features, counts
    held = (model.shard_of[found][:, :, np.newaxis] == np.arange(len(tables))).sum(axis=1).astype(np.float32)
    shard_features = np.concatenate(
        [model.shard_features(model.raw(vectors[here], own[here]), list_weights, caps) for here in chunks]
    )
    weights = _fit(shard_features, held, own=True)
    shares = np.empty(held.shape)  # for the measurement, of halves by what was fitted to the other half
    for half in (slice(0, None, 2), slice(1, None, 2)):
        other = slice(1 - (half.start or 0), None, 2)
        shares[half] = _shard_shares(shard_features[half], *_fit(shard_features[other], held[other], own=True))
    masks = [_at_least(shares, threshold) for threshold in _THRESHOLDS]
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
        _numbers(caps),
        _numbers(list_weights),
        _numbers(weights[0]),
        _numbers(weights[1]),
        _numbers(weights[2]),
        _numbers(_THRESHOLDS),
        _numbers(recalls),
        _numbers(np.array([mask.sum(axis=1).mean() for mask in masks])),
    )


def held_out_rows(count: int, seed: int, most: int = N_HELD_OUT) -> tuple[Ids, Ids]:
    """The rows of a data set that Compass is calibrated with, `most` at most: int64[n] ascending, and the order to use them
    in, for the first model is fitted to the first of them."""
    generator = np.random.default_rng(seed)
    rows = np.sort(generator.choice(count, min(most, count), replace=False, shuffle=False))
    return rows, generator.permutation(len(rows))


def exact_neighbours(
    vectors: VectorSource, rows: Ids, k: int, metric: str = "l2", progress: Progress | None = None
) -> Ids:
    """The k nearest of each of some rows among all others, by exact distances: int64[len(rows), k].

    The source is read once, in chunks. A row itself does not count, and copies of it do.

    Raises:
        InvalidInputError: k is not less than the number of vectors.
    """
    count, _ = vectors.shape
    if not 1 <= k < count:
        raise InvalidInputError(f"{count} vectors have no {k} neighbours each")
    queries = np.concatenate([np.asarray(vectors.read(int(row), int(row) + 1), np.float32) for row in rows])
    return nearest(vectors, queries, rows, k, metric, progress)[0]


def nearest(
    vectors: VectorSource, queries: Floats, own: Ids, k: int, metric: str = "l2", progress: Progress | None = None
) -> tuple[Ids, Floats]:
    """The k nearest vectors to each query, by exact distances.

    Args:
        queries: float32[n, dim].
        own: int64[n], the row of each query, which does not count; -1 where it is not among the vectors.

    Returns:
        Rows int64[n, k], -1 where there are fewer, and float32[n, k], which ranks them (infinite where there are fewer), also
        beside those of other vectors for the same queries.
    """
    count, dim = vectors.shape
    centre = np.zeros(dim, np.float32) if metric == "ip" else queries.mean(axis=0)
    queries = (normalised(queries) if metric == "cosine" else queries - centre).astype(np.float32)
    best = np.full((len(queries), k), np.inf, np.float32)
    found = np.full((len(queries), k), -1, np.int64)
    step = max(256, 4 * _CHUNK_FLOATS // max(len(queries), dim))
    for start in range(0, count, step):
        chunk = np.asarray(vectors.read(start, min(start + step, count)), np.float32)
        chunk = normalised(chunk) if metric == "cosine" else chunk - centre
        gaps = products(queries, chunk).astype(np.float32)
        gaps *= -2
        if metric != "ip":
            gaps += np.square(chunk).sum(axis=1)
        inside = np.flatnonzero((own >= start) & (own < start + len(chunk)))
        gaps[inside, own[inside] - start] = np.inf
        if not start:
            near = np.argpartition(gaps, min(k, len(chunk)) - 1, axis=1)[:, :k]
            query, column = np.repeat(np.arange(len(queries)), near.shape[1]), near.ravel()
        else:  # few are closer than the k-th so far, and ever fewer
            query, column = np.nonzero(gaps < best[:, -1:])
        _merge(best, found, query, gaps[query, column], column + start)
        if progress:
            progress(start + len(chunk), count)
    found[np.isinf(best)] = -1
    return found, best


def _merge(best: Floats, found: Ids, query: Ids, gaps: Floats, ids: Ids) -> None:
    """Takes candidates into the k nearest of each query, in place."""
    n, k = best.shape
    query = np.concatenate([np.repeat(np.arange(n), k), query])
    gaps, ids = np.concatenate([best.ravel(), gaps]), np.concatenate([found.ravel(), ids])
    order = np.lexsort((ids, gaps, query))
    first = np.searchsorted(query[order], np.arange(n))
    order = order[(first[:, np.newaxis] + np.arange(k)).ravel()]  # each query has k at least: those it had
    best[:], found[:] = gaps[order].reshape(n, k), ids[order].reshape(n, k)


@dataclass(slots=True)
class _Raw:
    """What the tables tell of some queries; all float32."""

    gaps: Floats  # [n, lists]: d^2, or for ip what stands for it
    mean: Floats  # [n, lists]: of the members' squared distances
    spread: Floats  # [n, lists]: half of what they spread by
    along: Floats  # [n, lists]: the part of d^2 along the axes
    shard_gaps: Floats  # [n, shards]: d^2 to the shard's mean


class _Model:
    """The tables made ready for matrix products, and the features of queries.

    For cosine, queries are normalised: then squared l2 ranks as cosine does. For ip only a query's direction matters; it is
    scaled to the length of the vectors, and a constant less 2 <q, c> stands for d^2.
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
        # Every list a single point, or copies of one: distances count by those between the lists.
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
        self.chunk_rows = max(16, _CHUNK_FLOATS // self.n_lists)

    def raw(self, queries: Floats, own: Ids | None = None) -> _Raw:
        """Of queries float32[n, dim]; of `own`, the list that each is a member of, it is taken out first."""
        rows = self._prepared(queries)
        gaps = self._gaps(rows, self.centroids, self.squares)
        along = np.zeros((1, 1), np.float32)
        if self.axes.size:
            flat = products(rows, self.axes).astype(np.float32)
            along = _squared(flat, self.projected, np.square(self.projected).sum(axis=1))
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
        return _Raw(gaps, mean, spread, along, self._gaps(rows, self.means, self.mean_squares))

    def nearest_shards(self, queries: Floats) -> Ids:
        """int64[n]: the shard of the nearest list."""
        found = np.empty(len(queries), np.int64)
        for start in range(0, len(queries), self.chunk_rows):
            rows = self._prepared(queries[start : start + self.chunk_rows])
            gaps = self._gaps(rows, self.centroids, self.squares)
            found[start : start + self.chunk_rows] = self.shard_of[gaps.argmin(axis=1)]
        return found

    def scaled(self, raw: _Raw) -> tuple[Floats, Floats]:
        """z, and d^2 less that of the nearest list: float32[n, lists], both without a unit and at least 0."""
        edge = (raw.mean - np.float32(2 * _EDGE) * raw.spread).min(axis=1, keepdims=True)
        z = (raw.mean - edge) / (2 * raw.spread)
        return z, (raw.gaps - raw.gaps.min(axis=1, keepdims=True)) / np.float32(self.unit**2)

    def list_features(self, raw: _Raw, z: Floats, gap: Floats) -> list[Floats]:
        """float32[n, lists] each."""
        nearest = np.sqrt(raw.gaps.min(axis=1, keepdims=True)) / np.float32(self.unit)
        far = log(nearest + np.float32(0.1)).astype(np.float32)
        along = raw.along / np.float32(self.unit**2)
        share = raw.along / (raw.gaps + np.float32(1e-6 * self.unit**2))
        shape = z.shape
        features = [self.log_sizes, z, z * z, z * far, z * z * far, gap, np.sqrt(gap), along, np.sqrt(along), share * z]
        features.append(log(self.radii / np.float32(self.unit)).astype(np.float32))
        return [np.broadcast_to(feature, shape) for feature in features]

    def shard_features(self, raw: _Raw, list_weights: Wide, caps: Floats) -> Floats:
        """float32[n, shards, features], from the first model's answer."""
        z, gap = self.scaled(raw)
        np.minimum(z, caps[0], out=z)
        np.minimum(gap, caps[1], out=gap)
        utility = np.zeros(z.shape, np.float32)
        for weight, feature in zip(list_weights, self.list_features(raw, z, gap), strict=True):
            utility += np.float32(weight) * feature
        chances = _softmax(utility)
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
        """float64[n, shards]."""
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
            found[start : start + self.chunk_rows] = _shard_shares(features, *weights)
        return found

    def _prepared(self, queries: Floats) -> Floats:
        if self.metric == "l2":
            return queries - self.centre
        unit = normalised(queries)
        return unit * np.float32(self.length) if self.metric == "ip" else unit - self.centre

    def _gaps(self, rows: Floats, centroids: Floats, squares: Floats) -> Floats:
        if self.metric != "ip":
            return _squared(rows, centroids, squares)
        gaps: Floats = np.float32(self.offset) - 2 * products(rows, centroids).astype(np.float32)
        return np.maximum(gaps, 0, out=gaps)


def _squared(rows: Floats, others: Floats, squares: Floats) -> Floats:
    found = products(rows, others).astype(np.float32)
    found *= -2
    found += squares
    found += np.square(rows).sum(axis=1)[:, np.newaxis]
    return np.maximum(found, 0, out=found)


def _softmax(utility: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Along the second axis."""
    chances = exp(utility - utility.max(axis=1, keepdims=True)).astype(utility.dtype)
    chances /= chances.sum(axis=1, keepdims=True)
    return np.asarray(chances)


def _at_least(shares: npt.NDArray[Any], threshold: float) -> Mask:
    """Shards with such a share, and always the best one."""
    mask = shares >= threshold
    mask[np.arange(len(mask)), shares.argmax(axis=1)] = True
    return np.asarray(mask)


def _widest(scatter: npt.NDArray[Any]) -> Floats:
    """float32[n, dim]: eigenvectors of the largest eigenvalues, each with its largest component positive."""
    dim = len(scatter)
    axes = widest(scatter, min(_N_DIRECTIONS, dim // 4))
    signs = np.sign(np.take_along_axis(axes, np.abs(axes).argmax(axis=1)[:, np.newaxis], axis=1)) if axes.size else 1
    return np.ascontiguousarray(axes * signs).astype(np.float16).astype(np.float32)


def _numbers(values: npt.NDArray[Any]) -> tuple[float, ...]:
    return tuple(float(f"{value:.6g}") for value in values)


def _weighed(features: npt.NDArray[Any], weights: Wide) -> Wide:
    """The sum of features [..., f], each times its weight: one after the other, in this order on every machine."""
    total = np.zeros(features.shape[:-1])
    for number, weight in enumerate(weights):
        total += features[..., number] * weight
    return total


def _shard_shares(features: Floats, weights: Wide, offsets: Wide, slopes: Wide) -> npt.NDArray[Any]:
    """The second model's answer: float64[n, shards]."""
    return _softmax(_weighed(features, weights) + offsets + features[:, :, 0] * slopes)


def _fit(features: Floats, counts: Floats, *, own: bool = False) -> tuple[Wide, Wide, Wide]:
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
        utility = _weighed(cube, weights[:f]).astype(np.float32)
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
