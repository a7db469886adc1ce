"""What recall counts: the tier's own measure."""

from __future__ import annotations

import numpy as np
import pytest

from quality.families import Family
from quality.measure import Truth, ask_hnswlib, build_graph, distances

ROWS = np.array([[0, 0], [1, 0], [0, 1], [2, 0], [3, 0], [3, 0], [9, 9]], np.float32)
QUERIES = np.array([[0, 0], [3, 0]], np.float32)


def family(metric: str = "l2", rows: np.ndarray = ROWS) -> Family:
    return Family("small", metric, rows.astype(np.float32), QUERIES)


@pytest.mark.parametrize(
    ("first", "k", "recall"),
    [
        ([0, 1, 2], 3, 1.0),
        ([2, 1, 0], 3, 1.0),  # the order does not count
        ([0, 2], 2, 1.0),  # 1 and 2 are equally far
        ([0, 0], 2, 0.75),
        ([0, 3], 2, 0.75),
        ([0, -1], 2, 0.75),
        ([6, -1], 2, 0.5),
    ],
)
def test_recall(first: list[int], k: int, recall: float) -> None:
    second = [5, 4, 3][:k]
    assert Truth.of(family()).recall(np.array([first, second]), k) == recall


def test_rows_that_may_not_be_returned_do_not_count() -> None:
    allowed = np.array([False, True, True, True, False, False, False])
    truth = Truth.of(family(), 5, allowed)
    np.testing.assert_array_equal(truth.nearest[0], [1, 1, 4, np.inf, np.inf])
    assert truth.recall(np.array([[1, 2, 3, -1, -1], [3, 1, 2, -1, -1]]), 5) == 1.0
    assert truth.recall(np.array([[0, 1, 2, 6, -1], [3, 1, 2, -1, -1]]), 5) == 5 / 6
    assert Truth.of(family(), 5, np.zeros(7, bool)).recall(np.full((2, 5), -1), 5) == 1.0


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_the_nearest_are_those_of_a_plain_comparison(metric: str, offset: float) -> None:
    random = np.random.default_rng(1)
    base, queries = ((random.standard_normal((n, 24)) + offset).astype(np.float32) for n in (500, 20))
    data = Family("plain", metric, base, queries)
    everything = np.tile(np.arange(500), (20, 1))
    plain = np.sort(distances(data, everything), axis=1)[:, :30]
    np.testing.assert_allclose(Truth.of(data, 30).nearest, plain, rtol=1e-12, atol=1e-11 * max(1, offset**2))
    if metric == "l2":
        wide = base.astype(np.float64)
        assert distances(data, everything)[3, 7] == pytest.approx(((wide[7] - queries[3]) ** 2).sum(), rel=1e-12)


def test_places_that_hnswlib_leaves_empty() -> None:
    index = build_graph(family())
    for row in range(4):
        index.mark_deleted(row)
    ids = ask_hnswlib(index, QUERIES, 5, 16)
    np.testing.assert_array_equal(np.sort(ids, axis=1), [[-1, -1, 4, 5, 6]] * 2)
    index.unmark_deleted(3)
    assert (ask_hnswlib(index, QUERIES, 5, 16, lambda row: row > 4) >= 0).sum(axis=1).tolist() == [2, 2]
