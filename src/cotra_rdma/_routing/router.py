"""Compass: selects the shards that a query has to ask, by their coarse tables, before anything is sent."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cotra_rdma._core.arrays import Ids, Mask, Wide
from cotra_rdma._core.query_checks import check_queries
from cotra_rdma._routing.calibration import Calibration
from cotra_rdma._routing.coarse_table import CoarseTable
from cotra_rdma._routing.model import ShardModel, at_least
from cotra_rdma.errors import FormatError, InvalidInputError

DEFAULT_TARGET = 0.99


class Router:
    """Selects shards for queries. It may be used from several threads.

    Args:
        tables: the coarse tables of all shards, in the order of the shards.
        calibration: the calibration of their build. With None, all shards are always asked.
        metric: the metric of the collection.

    Raises:
        FormatError: the tables do not fit each other or the calibration.
    """

    def __init__(self, tables: Sequence[CoarseTable], calibration: Calibration | None, metric: str = "l2") -> None:
        self._n_shards = len(tables)
        self._model = ShardModel(
            tables, metric, np.empty((0, 0), np.float32) if calibration is None else calibration.axes()
        )
        self._calibration = calibration
        if calibration is not None:
            ours = (metric, len(tables), self._model.n_lists, self._model.dim)
            theirs = (calibration.metric, calibration.n_shards, calibration.n_lists, calibration.dim)
            if ours != theirs:
                raise FormatError(
                    f"compass: the calibration is for other coarse tables: (metric, shards, lists, dim) are {ours} "
                    f"for the tables and {theirs} for the calibration"
                )

    @property
    def n_shards(self) -> int:
        """The number of shards to choose from."""
        return self._n_shards

    @property
    def dim(self) -> int:
        """The components of a query."""
        return self._model.dim

    @property
    def calibration(self) -> Calibration | None:
        """The calibration that the router was made with."""
        return self._calibration

    def shares(self, queries: npt.ArrayLike) -> Wide:
        """Predicts the share of each query's nearest vectors that each shard holds.

        Args:
            queries: float32[n_queries, dim] or float32[dim].

        Returns:
            float64[n_queries, n_shards]. Each row sums to 1. Without a calibration, all shards have the same share.

        Raises:
            InvalidInputError: a query has a wrong dimension, or holds NaN or infinity.
        """
        rows = check_queries(queries, self.dim)
        if self._calibration is None:
            return np.full((len(rows), self._n_shards), 1 / self._n_shards)
        return self._model.shares(rows, self._calibration)

    def nearest(self, queries: npt.ArrayLike) -> Ids:
        """Returns the shard with the nearest list to each query, int64[n_queries]. It needs no calibration.

        Raises:
            InvalidInputError: a query has a wrong dimension, or holds NaN or infinity.
        """
        return self._model.nearest_shards(check_queries(queries, self.dim))

    def select(self, queries: npt.ArrayLike, target_recall: float = DEFAULT_TARGET, among: Mask | None = None) -> Mask:
        """Selects the shards to ask for each query.

        Args:
            queries: float32[n_queries, dim] or float32[dim].
            target_recall: the mean recall to keep, as a share of the recall of asking all shards, in (0, 1].
            among: the shards that each query may ask, bool[n_queries, n_shards]. Shares are then relative to what these
                shards hold. None stands for all shards.

        Returns:
            bool[n_queries, n_shards]. A query that may ask any shard asks at least one. All of `among` is True if there
            is no
            calibration, or if it found that leaving shards out loses too much.

        Raises:
            InvalidInputError: a query has a wrong dimension, or holds NaN or infinity, or the target is out of range.
        """
        if not 0 < target_recall <= 1:
            raise InvalidInputError(f"target_recall must be in (0, 1], not {target_recall}")
        threshold = None if self._calibration is None else self._calibration.threshold(target_recall)
        if threshold is None:
            every = np.ones((len(check_queries(queries, self.dim)), self._n_shards), np.bool_)
            return every if among is None else every & among
        shares = self.shares(queries)
        if among is None:
            return at_least(shares, threshold)
        shares = np.where(among, shares + np.finfo(np.float64).tiny, 0)
        shares /= np.maximum(shares.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
        return at_least(shares, threshold) & among
