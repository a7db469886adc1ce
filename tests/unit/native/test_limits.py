"""Estimates of data that were once estimated badly; a walk's limit is the documented one; and it drops as seldom as it says."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from cotra_rdma import Shard
from cotra_rdma._core.remote_expansion import PUSH_DTYPE
from cotra_rdma._native.channel import Channel
from cotra_rdma._native.view import View
from helpers.image import Image, image_bytes
from helpers.walks import Estimates, Told, comparable, distances, recorded, vectors_of
from quality.families import Doubles, Family, Floats, make
from quality.measure import Truth, ask_hnswlib, build_graph

CENTRED = 2
FAMILIES = (
    "towns-2d",
    "earth-3d",
    "normal-7d",
    "clusters-16d",
    "clusters-64d",
    "near-duplicates-32d",
    "series-offset-10000-128d",
    "ip-queries-x0.01-64d",
    "ip-queries-x100-64d",
    "ip-norms-100x-64d",
    "ip-offset-3-64d",
    "ip-clusters-32d",
    "cosine-cone-0.01-32d",
    "cosine-cone-0.001-32d",
    "embeddings-384d",
)


def smaller(name: str, rows: int, queries: int) -> Family:
    family = make(name)
    return replace(family, base=family.base[:rows], queries=family.queries[:queries])


@pytest.mark.parametrize("name", FAMILIES)
def test_errors_are_as_large_as_weights_say_on_any_data(name: str) -> None:
    family = smaller(name, 1500, 30)
    with Shard.build(family.base, metric=family.metric, ef_construction=60, n_threads=1) as shard:
        found = Estimates.of(shard, family.queries, near=6, far=6)
    assert len(found.errors) > 4000
    whole = found.errors / np.hypot(found.stated, found.rounding)
    assert np.sqrt((whole**2).mean()) < 1.4  # between tight clusters 1.3: weights do not count the rounding of f1
    assert (np.abs(whole) < 4).mean() > 0.999
    plain = (
        found.rounding < found.stated / 8
    )  # float32 can tell: its errors are those of a node, the same for all its links
    if plain.sum() < 1000:
        assert name == "cosine-cone-0.001-32d"
        return
    alone = (found.errors / found.stated)[plain]
    assert abs(alone.mean()) < 0.2
    if family.dim >= 7:  # a code of 64 bits knows more of fewer components than it says
        assert np.sqrt((alone**2).mean()) > 0.5


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_an_estimate_at_a_query_that_is_the_node_has_no_deviation_but_that_of_its_factors(metric: str) -> None:
    """Nothing of the query is left to be coded: its table is empty."""
    generator = np.random.default_rng(3)
    centres = generator.standard_normal((20, 64))
    base = (centres.repeat(30, axis=0) + 1e-3 * generator.standard_normal((600, 64))).astype(np.float32)
    with (
        Shard.build(base, metric=metric, ef_construction=60, n_threads=1) as shard,
        Channel.shm(shard.arena) as channel,
        View.open(channel) as view,
    ):
        vectors = vectors_of(shard)
        queries = vectors[:40].astype(np.float32)
        pushes = np.zeros(40, PUSH_DTYPE)
        pushes["query"] = pushes["row"] = np.arange(40)
        pushes["limit"] = np.inf
        told = view.expand(shard.arena, queries, pushes)
        row, flags = (np.repeat(each, told.found["count"]) for each in (pushes["row"], told.found["flags"]))
        centred = flags == CENTRED  # f0 is of the link alone
        assert centred.mean() > 0.8
        own, neighbour = vectors[row][centred], vectors[told.numbers][centred]
        factors = distances("l2", own, neighbour) if metric == "l2" else np.abs((own * (neighbour - own)).sum(axis=1))
        assert (1 / told.weights[centred] <= 1.01e-3 * factors + 1e-5).all()
        wrong = np.abs(told.estimates[centred] - distances(metric, own, neighbour))
        assert (wrong <= 2**-8 * factors + 1e-4).all()


# ---- walks ----

WALKED = ("clusters-64d", "normal-65d", "embeddings-384d", "ip-norms-100x-64d", "cosine-clusters-32d")
K = 10


class Walks:
    """Recorded walks over hnswlib's graph of a family, one expansion a round."""

    def __init__(self, name: str, ef: int) -> None:
        family = smaller(name, 2000, 60)
        self.metric, self.ef, self.low = family.metric, ef, max(K, (ef + 1) // 2)
        index = build_graph(family)
        truth = Truth.of(family, K)
        with Shard.from_hnswlib(index, n_threads=1) as shard, recorded(shard, family.queries) as (engine, recorder):
            labels, _, stats = engine.search(family.queries, K, ef, 1, helper=recorder)
            image = Image(image_bytes(shard))
            self.vectors, self.unit = vectors_of(shard), 1 / math.sqrt(shard.info.code_dim)
        upper = np.frombuffer(image.data, "<u4", image.header["upper_count"], image.nav_nodes)
        self.upper = set(upper.tolist())
        self.told, self.queries = recorder.told, comparable(family.metric, family.queries)
        self.recall = truth.recall(labels[0], K)
        self.hnswlibs = truth.recall(ask_hnswlib(index, family.queries, K, ef), K)
        assert [len(walk.rows) for walk in self.told] == stats["expansions"].tolist()

    def limit(self, found: Floats, scales: Floats) -> float:
        """docs/explanation/how-it-works.md#when-a-walk-ends, after these expansions."""
        if len(found) < self.low:
            return math.inf
        order = np.argsort(found, kind="stable")
        ranked = found[order].astype(np.float64)
        scale = float(scales[order[K - 1]]) if self.metric == "ip" else ranked[K - 1]
        slack, scale = 0.25 * self.unit, max(scale, 0.0)
        slack_k = (0.25 + max(math.log(self.ef / K), 0.13 * math.log(2))) * self.unit
        least = ranked[self.low - 1] + slack * scale
        most = ranked[2 * self.low - 1] + slack * scale if len(found) >= 2 * self.low else math.inf
        return float(max(least, min(ranked[K - 1] + slack_k * scale, most)))

    def limits(self, walk: Told) -> Doubles:
        """The limit before each of the walk's expansions, and at its end."""
        found, scales = (np.array([one[name] for one in walk.found]) for name in ("distance", "scale"))
        return np.array([self.limit(found[:n], scales[:n]) for n in range(len(found) + 1)])


@pytest.fixture(scope="module", params=[(name, ef) for name in WALKED for ef in (16, 64)], ids=str)
def walks(request: pytest.FixtureRequest) -> Walks:
    return Walks(*request.param)


def test_the_limit_is_the_one_of_the_page(walks: Walks) -> None:
    for walk in walks.told:
        expected = walks.limits(walk)[:-1]
        if walks.metric == "ip":  # it may rise again: owners tell all
            assert np.isposinf(walk.limits).all()
        else:
            np.testing.assert_allclose(walk.limits, expected, rtol=1e-5)


def test_a_walk_expands_all_that_is_below_its_limit_and_nothing_twice(walks: Walks) -> None:
    """A candidate's key is the mean of what the walk was told of it, weighted by the inverse deviations."""
    for walk in walks.told:
        assert len(set(walk.rows)) == len(walk.rows)
        limits, taken = walks.limits(walk), set()
        sums: dict[int, tuple[float, float]] = {}
        for n, (row, (numbers, estimates, weights)) in enumerate(zip(walk.rows, walk.heard, strict=True)):
            taken.add(row)
            if row in sums and row not in walks.upper:
                assert sums[row][0] / sums[row][1] < limits[n] + 1e-4 * abs(limits[n])
            for each in np.flatnonzero(estimates < limits[n + 1]):  # the node's own distance is in the limit by then
                total, weighed = sums.get(int(numbers[each]), (0.0, 0.0))
                weight = float(weights[each])
                sums[int(numbers[each])] = total + weight * float(estimates[each]), weighed + weight
        # Of nodes of the upper layers the reader knows more.
        left = [total / weighed for node, (total, weighed) in sums.items() if node not in taken | walks.upper]
        assert not left or min(left) >= limits[-1] - 1e-4 * abs(limits[-1])


def test_neighbours_are_dropped_as_seldom_as_their_estimates_say(walks: Walks) -> None:
    """Of the nearest rows that a walk heard of, it drops those whose mean is above the limit. The probabilities of that, by the
    deviations of their estimates, add up to no less than what was dropped. Few of the nearest are dropped at all."""
    dropped, expected, nearest = 0, 0.0, 0
    for query, walk in zip(walks.queries, walks.told, strict=True):
        exact = distances(walks.metric, query, walks.vectors)
        limit, taken = walks.limits(walk)[-1], set(walk.rows)
        numbers, weights = (np.concatenate([heard[i] for heard in walk.heard]) for i in (0, 2))
        for row in np.argsort(exact, kind="stable")[:K].tolist():
            nearest += 1
            told = weights[numbers == row].astype(np.float64)
            if len(told):
                deviation = math.sqrt(len(told)) / told.sum()
                expected += 0.5 * math.erfc((limit - exact[row]) / deviation / math.sqrt(2))
                dropped += row not in taken
    assert dropped <= expected + 3 * math.sqrt(expected) + 1
    assert dropped <= (0.03 if walks.ef == 16 else 0.003) * nearest


def test_recall_is_hnswlibs_at_the_same_ef(walks: Walks) -> None:
    assert walks.recall >= walks.hnswlibs - 0.01
