"""k answers whenever k rows may be returned, and at least hnswlib's recall, whatever a filter or a deletion excludes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import hnswlib
import numpy as np
import pytest

from cotra_rdma import Shard
from quality.families import Family, Floats
from quality.filtered import (
    CORRELATIONS,
    DELETED,
    OTHERS,
    SHARES,
    Grouped,
    Rows,
    ask_among,
    ask_with_filter,
    check_answers,
    grouped,
    only,
    padded,
)
from quality.measure import Truth, ask_hnswlib, build_graph

ROWS, GROUPS, PER_GROUP = 6000, 2, 50
K, EFS = 10, (16, 64, 256)
MARGIN = 0.01 + 1e-9


@pytest.fixture(scope="module")
def data() -> Grouped:
    return grouped(ROWS, GROUPS, PER_GROUP)


@pytest.fixture(scope="module")
def index(data: Grouped) -> hnswlib.Index:
    return build_graph(data.family)


@pytest.fixture(scope="module")
def shard(index: hnswlib.Index) -> Iterator[Shard]:
    with Shard.from_hnswlib(index, n_threads=1) as shard:
        yield shard


def check_groups(index: hnswlib.Index, shard: Shard, groups: list[tuple[Family, Rows]], ef: int) -> None:
    """Each group of queries has a filter of its own."""
    theirs, ours = [], []
    for family, allowed in groups:
        truth = Truth.of(family, K, allowed)
        with only(index, allowed):
            theirs.append(truth.recall(ask_among(index, family.queries, int(allowed.sum()), K, ef), K))
        ids = shard.search(family.queries, K, ef, rows=allowed)[0]
        check_answers(ids, allowed)
        ours.append(truth.recall(ids, K))
    assert np.mean(ours) >= np.mean(theirs) - MARGIN


@pytest.mark.parametrize("ef", EFS)
@pytest.mark.parametrize("correlation", CORRELATIONS)
@pytest.mark.parametrize("share", SHARES)
def test_filters_by_share_and_correlation(
    data: Grouped, index: hnswlib.Index, shard: Shard, share: float, correlation: float, ef: int
) -> None:
    groups = [(group, data.allowed(i, share, correlation)) for i, group in enumerate(data.groups)]
    check_groups(index, shard, groups, ef)


@pytest.mark.parametrize("ef", EFS)
@pytest.mark.parametrize("kind", OTHERS)
def test_other_filters(data: Grouped, index: hnswlib.Index, shard: Shard, kind: str, ef: int) -> None:
    groups = [(group, OTHERS[kind](data, i)) for i, group in enumerate(data.groups)]
    check_groups(index, shard, groups, ef)


@pytest.mark.parametrize("kind", DELETED)
def test_deleted_rows(data: Grouped, index: hnswlib.Index, kind: str) -> None:
    left = DELETED[kind](data)
    family = data.groups[0] if "group" in kind else data.family
    truth = Truth.of(family, K, left)
    with only(index, left), Shard.from_hnswlib(index, n_threads=1) as shard:
        assert len(shard) == left.sum()
        for ef in EFS:
            theirs = truth.recall(ask_among(index, family.queries, int(left.sum()), K, ef), K)
            ids = shard.search(family.queries, K, ef)[0]
            check_answers(ids, left)
            ours = truth.recall(ids, K)
            assert ours >= theirs - MARGIN


@pytest.mark.parametrize("ef", EFS)
@pytest.mark.parametrize("correlation", [-1.0, 0.0, 1.0])
def test_deleted_rows_and_a_filter(data: Grouped, index: hnswlib.Index, correlation: float, ef: int) -> None:
    """They exclude rows together: half are deleted, and of the others 1 of 10 passes."""
    left, passes = data.allowed(0, 0.5, 0.0), data.allowed(1, 0.1, correlation)
    family = data.groups[1]
    truth = Truth.of(family, K, left & passes)
    with only(index, left), Shard.from_hnswlib(index, n_threads=1) as shard:
        ids = shard.search(family.queries, K, ef, rows=passes)[0]
    with only(index, left & passes):
        theirs = truth.recall(ask_among(index, family.queries, int((left & passes).sum()), K, ef), K)
    check_answers(ids, left & passes)
    ours = truth.recall(ids, K)
    assert ours >= theirs - MARGIN


def test_deleting_is_a_filter_to_hnswlib(data: Grouped, index: hnswlib.Index) -> None:
    """The comparison above is with hnswlib's own filter, which calls Python for each node: it has the same answers."""
    group = data.groups[0]
    for share, correlation in ((0.5, -1.0), (0.01, 0.5)):
        allowed = data.allowed(0, share, correlation)
        filtered = ask_with_filter(index, group.queries, allowed, K, 64)
        with only(index, allowed):
            np.testing.assert_array_equal(ask_among(index, group.queries, int(allowed.sum()), K, 64), filtered)


def test_a_group_of_rows_far_from_all_others() -> None:
    """A filter that excludes it, asked from its midst: 95 % of the rows pass, all of them far away."""
    random = np.random.default_rng(7)
    base = random.standard_normal((20_000, 32)).astype(np.float32)
    base[:1000] += 6
    family = Family("apart", "l2", base, random.standard_normal((20, 32)).astype(np.float32) + np.float32(6))
    allowed = np.arange(20_000) >= 1000
    index = build_graph(replace(family, ef_construction=100))
    truth = Truth.of(family, K, allowed)
    with Shard.from_hnswlib(index, n_threads=1) as shard:
        for ef in (16, 64, 128, 256):
            ids = shard.search(family.queries, K, ef, rows=allowed)[0]
            check_answers(ids, allowed)
            theirs = truth.recall(ask_with_filter(index, family.queries, allowed, K, ef), K)
            ours = truth.recall(ids, K)
            assert ours >= theirs - MARGIN


def test_an_index_with_all_but_a_hundred_rows_deleted() -> None:
    random = np.random.default_rng(6)
    base, queries = (random.standard_normal((n, 32)).astype(np.float32) for n in (10_000, 50))
    family = Family("deleted", "l2", base, queries)
    left = np.arange(10_000) >= 9900
    index = build_graph(replace(family, ef_construction=100))
    for row in np.flatnonzero(~left).tolist():
        index.mark_deleted(row)
    with Shard.from_hnswlib(index, n_threads=1) as shard:
        ids = shard.search(queries, K, 64)[0]
    check_answers(ids, left)
    truth = Truth.of(family, K, left)
    theirs, ours = truth.recall(ask_hnswlib(index, queries, K, 64), K), truth.recall(ids, K)
    assert ours >= theirs - MARGIN


def test_one_allowed_row_of_each_kind(shard: Shard, data: Grouped) -> None:
    """A filter of one row finds it from anywhere, and one of none finds nothing."""
    queries: Floats = data.family.queries
    for row in (0, 17, ROWS - 1):
        ids = shard.search(queries, K, 16, rows=np.arange(ROWS) == row)[0]
        np.testing.assert_array_equal(ids, padded(np.full((len(queries), 1), row), K))
    assert (shard.search(queries, K, 16, rows=np.zeros(ROWS, bool))[0] == -1).all()
