"""Compass: recall kept, shards saved, and nothing pruned where that loses recall. Recall is against brute force."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from cotra_rdma._clustering.balanced import balanced_partition
from cotra_rdma._clustering.kmeans import normalised
from cotra_rdma._routing.calibration import Calibration
from cotra_rdma._routing.coarse_table import CoarseTable
from cotra_rdma._routing.exact_neighbours import exact_neighbours
from cotra_rdma._routing.fit import HeldOut, calibrate
from cotra_rdma._routing.router import Router
from cotra_rdma.errors import FormatError, InvalidInputError

Floats = npt.NDArray[np.float32]
K = 10


class Rows:
    """A `VectorSource` in memory."""

    def __init__(self, rows: Floats) -> None:
        self.rows = rows

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.shape[0], self.rows.shape[1]

    def take(self, rows: npt.NDArray[np.int64]) -> Floats:
        return self.read()[rows]

    def read(self, start: int = 0, stop: int | None = None) -> Floats:
        return self.rows[start:stop]


@dataclasses.dataclass(eq=False)
class Split:
    """Rows in shards, their tables, and the calibration of these."""

    rows: Floats
    part: npt.NDArray[Any]
    metric: str
    tables: list[CoarseTable]
    calibration: Calibration | None

    @property
    def router(self) -> Router:
        return Router(self.tables, self.calibration, self.metric)

    def truth(self, queries: Floats) -> npt.NDArray[np.float64]:
        """How many of each query's exact k nearest every shard holds."""
        near = brute_force(self.rows, queries, K, self.metric)
        return np.stack([(self.part[near] == s).sum(axis=1) for s in range(len(self.tables))], axis=1) / K


def brute_force(rows: Floats, queries: Floats, k: int, metric: str) -> npt.NDArray[np.int64]:
    if metric == "cosine":
        rows, queries = normalised(rows), normalised(queries)
    scores = queries.astype(np.float64) @ rows.T.astype(np.float64)
    if metric != "ip":
        scores = 2 * scores - np.square(rows.astype(np.float64)).sum(axis=1)
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def split(rows: Floats, part: npt.NDArray[Any], metric: str, n_held_out: int = 1000) -> Split:
    tables, lists, scatter, first = [], np.empty(len(rows), np.int64), np.zeros((rows.shape[1],) * 2), 0
    for shard in range(part.max() + 1):
        ids = np.flatnonzero(part == shard)
        table, clusters = CoarseTable.build(rows[ids], metric=metric, seed=1)
        tables.append(CoarseTable.decode(table.encode()))
        lists[ids] = clusters.assignment + first
        first += len(table)
        members = normalised(rows[ids]) if metric == "cosine" else rows[ids]
        gaps = members - table.centroids[clusters.assignment]
        scatter += gaps.T @ gaps
    held = np.random.default_rng(2).choice(len(rows), min(n_held_out, len(rows)), replace=False)
    near = exact_neighbours(Rows(rows), held, K, metric)
    return Split(
        rows, part, metric, tables, calibrate(tables, HeldOut(rows[held], lists[held], lists[near]), scatter, metric)
    )


@cache
def blobs(metric: str = "l2") -> Split:
    """20 blobs of 200 in 24 dimensions, over 8 shards."""
    generator = np.random.default_rng(3)
    centres = 2 * generator.normal(size=(20, 24))
    rows = (centres[np.arange(4000) % 20] + generator.normal(size=(4000, 24))).astype(np.float32)
    return split(rows, balanced_partition(rows, 8, seed=1, metric=metric)[0], metric)


@pytest.fixture(scope="module")
def word_shards(words: Floats) -> Split:
    return split(words, balanced_partition(words, 8, seed=1, metric="cosine")[0], "cosine")


def kept(shards: Split, queries: Floats, target: float) -> tuple[float, float]:
    """Recall against asking all, and shards asked."""
    mask = shards.router.select(queries, target)
    return float((shards.truth(queries) * mask).sum(axis=1).mean()), float(mask.sum(axis=1).mean())


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
def test_blobs_need_few_shards(metric: str) -> None:
    shards = blobs(metric)
    generator = np.random.default_rng(4)
    queries = shards.rows[::8] + 0.3 * generator.normal(size=(500, 24)).astype(np.float32)
    recall, asked = kept(shards, queries, 0.99)
    assert recall > 0.985
    assert asked < (4.5 if metric == "ip" else 3)


def test_words_keep_their_neighbours(word_shards: Split, queries: Floats) -> None:
    asked = []
    for target in (0.9, 0.95, 0.99):
        recall, shards = kept(word_shards, queries, target)
        assert recall > target - 0.015
        asked.append(shards)
    assert asked == sorted(asked)
    assert asked[0] < 3
    assert asked[2] < 6


def test_all_is_kept_on_a_random_partition(words: Floats, queries: Floats) -> None:
    rows = words[:4000]
    shards = split(rows, np.random.default_rng(1).integers(0, 8, len(rows)), "cosine")
    assert shards.calibration is not None
    assert shards.calibration.expected(0.99) == 8
    assert shards.router.select(queries).all()


def test_shares_are_those_of_the_neighbours(word_shards: Split, queries: Floats) -> None:
    shares, truth = word_shards.router.shares(queries), word_shards.truth(queries)
    assert np.allclose(shares.sum(axis=1), 1)
    assert np.abs(shares - truth).mean() < 0.06
    assert np.abs(shares.mean(axis=0) - truth.mean(axis=0)).max() < 0.03
    assert (shares.argmax(axis=1) == truth.argmax(axis=1)).mean() > 0.8


def test_one_query_or_many_give_the_same(word_shards: Split, queries: Floats) -> None:
    at_once = word_shards.router.shares(queries)
    many = word_shards.router.shares(np.tile(queries, (12, 1)))  # more than are compared at once
    assert np.allclose(many, np.tile(at_once, (12, 1)), atol=1e-5)
    assert np.allclose(word_shards.router.shares(queries[3]), at_once[3], atol=1e-5)
    assert np.allclose(word_shards.router.shares(7 * queries), at_once, atol=1e-5), "cosine has no lengths"
    mask = word_shards.router.select(queries)
    assert (mask.dtype, mask.shape) == (np.bool_, (200, 8))
    assert mask.any(axis=1).all()
    assert np.take_along_axis(mask, at_once.argmax(axis=1)[:, np.newaxis], axis=1).all()


def test_a_target_of_one_asks_all_and_a_low_one_one(word_shards: Split, queries: Floats) -> None:
    assert word_shards.router.select(queries, 1.0).all()
    assert word_shards.router.select(queries, 0.01).sum(axis=1).max() <= 3
    for target in (0.0, -1.0, 1.1, float("nan")):
        with pytest.raises(InvalidInputError, match="target_recall"):
            word_shards.router.select(queries, target)


def test_far_queries_get_an_answer(word_shards: Split) -> None:
    shards = blobs()
    for scale in (1e-6, 1e3, 1e6):
        mask = shards.router.select(np.full((1, 24), scale, np.float32))
        assert mask.any()
        assert np.isfinite(shards.router.shares(np.full((1, 24), scale, np.float32))).all()
    assert word_shards.router.select(np.zeros(100, np.float32)).any()
    for bad in (np.ones((2, 99)), np.full((1, 100), np.nan)):
        with pytest.raises(InvalidInputError):
            word_shards.router.select(bad)


def test_a_calibration_is_the_same_each_time_and_survives_json() -> None:
    one = blobs()
    other = split(one.rows, one.part, "l2")
    assert one.calibration is not None
    assert other.calibration == one.calibration
    text = json.dumps(one.calibration.to_json(), allow_nan=False)
    assert len(text) < 10_000
    assert Calibration.from_json(json.loads(text)) == one.calibration


def test_nothing_to_learn_from() -> None:
    rows = np.random.default_rng(1).normal(size=(80, 4)).astype(np.float32)
    few = split(rows, np.arange(80) % 2, "l2")
    assert few.calibration is None
    assert few.router.select(rows).all()
    assert few.router.shares(rows[:1]).tolist() == [[0.5, 0.5]]
    assert split(np.tile(rows, (5, 1)), np.zeros(400, np.int64), "l2").calibration is None


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
def test_equal_and_degenerate_vectors(metric: str) -> None:
    """Lists without a radius, neighbours without a distance: any answer will do, and it holds a shard."""
    for rows in (
        np.ones((400, 4), np.float32),
        np.zeros((400, 4), np.float32),
        np.repeat(np.eye(4, dtype=np.float32), 100, 0),
    ):
        shards = split(rows, np.arange(400) * 4 // 400, metric)
        assert shards.router.select(rows).any(axis=1).all()


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
def test_exact_neighbours_leave_the_row_itself_out(words: Floats, metric: str) -> None:
    rows = words[:1100].copy()
    rows[700] = rows[3]
    chosen = np.array([3, 700, 1099, 5])
    seen: list[tuple[int, int]] = []
    found = exact_neighbours(Rows(rows), chosen, K, metric, lambda *step: seen.append(step), chunk_rows=256)
    wanted = brute_force(rows, rows[chosen], K + 1, metric)
    for row, ids, near in zip(chosen, found, wanted, strict=True):
        assert set(ids) == set([i for i in near if i != row][:K])
    assert seen[-1] == (1100, 1100)
    if metric != "ip":
        assert found[:2, 0].tolist() == [700, 3]
    with pytest.raises(InvalidInputError, match="no 1100 neighbours"):
        exact_neighbours(Rows(rows), chosen, 1100)


def test_tables_and_calibration_must_fit() -> None:
    shards = blobs()
    for tables, metric in ((shards.tables[:-1], "l2"), (shards.tables, "cosine"), ([], "l2")):
        with pytest.raises(FormatError):
            Router(tables, shards.calibration, metric)
    with pytest.raises(InvalidInputError, match="metric"):
        Router(shards.tables, None, "manhattan")


@pytest.mark.parametrize(
    "change",
    [
        {"metric": "manhattan"},
        {"n_shards": 0},
        {"n_shards": "8"},
        {"k": True},
        {"directions": "!"},
        {"directions": "AAAA"},
        {"directions": 7},
        {"list_weights": [1.0]},
        {"list_weights": 7},
        {"shard_weights": [float("nan")] * 7},
        {"shard_weights": ["1"] * 7},
        {"shard_offsets": [0.0] * 7},
        {"shard_slopes": [float("inf")] * 8},
        {"thresholds": []},
        {"thresholds": [0.0] * 64},
        {"recalls": [0.5] * 63},
        {"recalls": list(np.linspace(0, 1, 64))},
        {"other": 1},
    ],
)
def test_malformed_calibrations(change: dict[str, Any]) -> None:
    calibration = blobs().calibration
    assert calibration is not None
    with pytest.raises(FormatError, match="calibration"):
        Calibration.from_json(calibration.to_json() | change)
    for other in (None, [], 7, {}):
        with pytest.raises(FormatError, match="calibration"):
            Calibration.from_json(other)
