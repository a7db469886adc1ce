"""What changes no ranking changes no answer: a longer query, all data moved or scaled, vectors of other lengths."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cotra_rdma import Shard
from helpers.properties import fixed
from quality.families import Doubles, Family, Floats, around
from quality.measure import SEED, Case, Ids, Truth, build_graph, distances

K, EF = 10, 64
ROWS, QUERIES, DIM = 1500, 100, 24
BOUND = 0.005 + 1e-9

factors = st.floats(-3, 3).map(lambda exponent: float(np.float32(10**exponent)))


def data() -> tuple[Doubles, Doubles]:
    """Clusters that overlap, beside the origin."""
    random = np.random.default_rng(11)
    return around(random, 1.5 * random.standard_normal((30, DIM)) + 0.5, 1.0, ROWS, QUERIES)


def family(metric: str, base: Doubles, queries: Doubles) -> Family:
    return Family("moved", metric, base.astype(np.float32), queries.astype(np.float32))


def case_of(metric: str, base: Doubles, queries: Doubles) -> Case:
    made = family(metric, base, queries)
    index = build_graph(made)
    return Case(made, index, Shard.from_hnswlib(index, n_threads=1, seed=SEED), Truth.of(made, K))


def recall_of(metric: str, base: Doubles, queries: Doubles) -> float:
    case = case_of(metric, base, queries)
    with case.shard:
        return case.truth.recall(case.answers(K, EF), K)


@pytest.fixture(scope="module")
def inner() -> Iterator[Case]:
    case = case_of("ip", *data())
    with case.shard:
        yield case


@pytest.fixture(scope="module")
def cosine() -> Iterator[Case]:
    case = case_of("cosine", *data())
    with case.shard:
        yield case


@pytest.fixture(scope="module")
def still() -> float:
    """The recall before anything is moved."""
    return recall_of("l2", *data())


def assert_same(case: Case, queries: Floats, ids: Ids, rounding: Floats) -> None:
    """The ids are those of the queries as they were; two that float32 cannot tell apart may change places.

    Args:
        queries: as they are now.
        rounding: float32[n_queries]: what float32 rounds of a distance.
    """
    before = case.answers(K, EF)
    now = Family("now", case.family.metric, case.family.base, queries)
    apart = np.abs(distances(now, ids) - distances(now, before))
    moved = float((apart > rounding[:, np.newaxis]).mean())
    assert ((ids < 0).mean(), moved) == (0, 0)


@given(factor=factors)
@example(factor=1e-3)
@example(factor=1e3)
@example(factor=2.0**-8)
@fixed(20)
def test_an_inner_product_does_not_care_how_long_the_query_is(inner: Case, factor: float) -> None:
    queries = (inner.family.queries * np.float32(factor)).astype(np.float32)
    ids = inner.shard.search(queries, K, EF)[0]
    lengths = np.linalg.norm(queries, axis=1) * np.linalg.norm(inner.family.base, axis=1).max()
    assert_same(inner, queries, ids, 4 * np.finfo(np.float32).eps * (1 + lengths))


@pytest.mark.parametrize("metric", ["ip", "cosine"])
def test_each_query_may_have_a_length_of_its_own(inner: Case, cosine: Case, metric: str) -> None:
    case = inner if metric == "ip" else cosine
    factors = 10 ** np.random.default_rng(13).uniform(-3, 3, (QUERIES, 1))
    queries = (case.family.queries * factors).astype(np.float32)
    ids = case.shard.search(queries, K, EF)[0]
    longest = np.linalg.norm(case.family.base, axis=1).max()
    lengths = np.linalg.norm(queries, axis=1) * longest if metric == "ip" else np.ones(QUERIES)
    assert_same(case, queries, ids, 4 * np.finfo(np.float32).eps * (1 + lengths))


@given(seed=st.integers(0, 2**16), octaves=st.integers(1, 20))
@fixed(6)
def test_a_cosine_does_not_care_how_long_vectors_are(cosine: Case, seed: int, octaves: int) -> None:
    random = np.random.default_rng(seed)
    base, queries = (
        rows
        * np.ldexp(1 + random.random(len(rows)), random.integers(-octaves // 2, octaves // 2 + 1, len(rows)))[:, None]
        for rows in data()
    )
    before = cosine.truth.recall(cosine.answers(K, EF), K)
    assert recall_of("cosine", base, queries) == pytest.approx(before, abs=BOUND)


@given(seed=st.integers(0, 2**16), distance=st.floats(0, 4).map(lambda exponent: 10**exponent))
@example(seed=1, distance=1e4)
@example(seed=2, distance=1e3)
@fixed(8)
def test_all_may_be_moved(still: float, seed: int, distance: float) -> None:
    """Data whose spread is about 2 a component, moved by up to 1e4 times as much in every component."""
    base, queries = data()
    moved = distance * base.std() * np.random.default_rng(seed).uniform(-1, 1, DIM)
    assert recall_of("l2", base + moved, queries + moved) >= still - BOUND


@given(factor=factors)
@example(factor=1e-3)
@example(factor=1e3)
@fixed(6)
def test_all_may_be_scaled(still: float, factor: float) -> None:
    base, queries = data()
    assert recall_of("l2", base * factor, queries * factor) == pytest.approx(still, abs=BOUND)


@given(distance=st.floats(0, 3).map(lambda exponent: 10**exponent))
@example(distance=1e3)
@fixed(4)
def test_tight_clusters_may_be_moved_and_scaled(distance: float) -> None:
    random = np.random.default_rng(12)
    base, queries = around(random, random.standard_normal((40, 12)), 1e-3, ROWS, QUERIES)
    for factor in (1.0, 1e-3, 1e3):
        case = case_of("l2", (base + distance) * factor, (queries + distance) * factor)
        with case.shard:
            theirs, ours = case.recalls(K, EF)
        assert ours >= theirs - BOUND
