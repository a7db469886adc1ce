"""k answers whenever k rows may be returned: far filters, deleted rows, graphs in parts. And a bound, on request."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import hnswlib
import numpy as np
import numpy.typing as npt
import pytest

from cotra_rdma import Arena, CotraError, Shard
from cotra_rdma._core.constants import METRICS
from cotra_rdma._core.query_checks import pack_filter
from cotra_rdma._core.remote_expansion import EXPANSION_DTYPE, PUSH_DTYPE, Expansions
from cotra_rdma._native.channel import Channel
from cotra_rdma._native.graph_engine import Engine
from cotra_rdma._native.record_cache import RecordCache
from cotra_rdma._native.view import View
from helpers.image import Image, image_bytes
from helpers.walks import recorded
from quality.families import Family
from quality.filtered import ask_with_filter
from quality.measure import Truth

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.bool_]
SWEEP = -np.inf  # the limit that a sweep sends: no neighbours are wanted


def exact(vectors: Floats, query: Floats) -> npt.NDArray[np.float64]:
    return ((vectors.astype(np.float64) - query) ** 2).sum(axis=1)


def nearest(vectors: Floats, queries: Floats, allowed: Rows, k: int) -> npt.NDArray[np.int64]:
    """The exact answers: int64[n, k], -1 where there are no more."""
    rows = np.flatnonzero(allowed)
    found = np.full((len(queries), k), -1)
    for out, query in zip(found, queries, strict=True):
        best = rows[np.argsort(exact(vectors[rows], query), kind="stable")[:k]]
        out[: len(best)] = best
    return found


# ---- filters far from the query ----


@pytest.fixture(scope="module")
def large(words: Floats) -> Iterator[tuple[hnswlib.Index, Shard]]:
    """20,000 words, and hnswlib's index that they come from."""
    index = hnswlib.Index("l2", words.shape[1])
    index.init_index(len(words), M=8, ef_construction=40, random_seed=1)
    index.add_items(words, num_threads=1)
    with Shard.from_hnswlib(index, n_threads=1) as shard:
        yield index, shard


def farthest(words: Floats, query: Floats, n: int) -> Rows:
    allowed = np.zeros(len(words), bool)
    allowed[np.argsort(exact(words, query))[-n:]] = True
    return allowed


@pytest.mark.parametrize(("n", "ef"), [(1000, 16), (5000, 16), (5000, 64), (12_000, 200)])
def test_a_filter_that_passes_far_rows_only(
    large: tuple[hnswlib.Index, Shard], words: Floats, queries: Floats, n: int, ef: int
) -> None:
    """More candidates than a walk has room for at first: none is dropped, for there is no limit before low rows were found."""
    index, shard = large
    assert n * n > 2 * ef * len(words)  # else all rows were read, without a walk
    recalls = []
    for query in queries[:5, np.newaxis]:
        allowed = farthest(words, query[0], n)
        truth = Truth.of(Family("far", "l2", words, query), 10, allowed)
        labels, distances, stats = shard.search(query, k=10, ef=ef, rows=allowed)
        assert allowed[labels].all()
        assert (np.diff(distances) >= 0).all()
        assert stats["expansions"][0] <= n // 2 + 8 + n  # a walk for as long as the sweep would take, and the sweep
        recalls.append((truth.recall(labels, 10), truth.recall(ask_with_filter(index, query, allowed, 10, ef), 10)))
    ours, hnswlibs = np.mean(recalls, axis=0)
    assert ours >= hnswlibs - 0.01


def test_a_starved_walk_reads_what_is_left_and_its_answer_is_exact(
    large: tuple[hnswlib.Index, Shard], words: Floats, queries: Floats
) -> None:
    """After half as many expansions as the filter passes rows it sweeps: each row is read once, so the answer is exact."""
    _, shard = large
    query = queries[:1]
    allowed = farthest(words, query[0], 1000)
    with recorded(shard, query) as (engine, recorder):
        labels, _, stats = engine.search(query, 10, 16, 8, filters=[pack_filter(allowed, len(words))], helper=recorder)
    (walk,) = recorder.told
    swept = np.array(walk.limits) == SWEEP
    assert 500 <= np.argmax(swept) < 500 + 8
    assert swept[np.argmax(swept) :].all()
    assert len(set(walk.rows)) == len(walk.rows) == stats["expansions"][0]
    assert set(np.flatnonzero(allowed).tolist()) <= set(walk.rows)
    assert allowed[np.array(walk.rows)[swept]].all()
    np.testing.assert_array_equal(labels[0], nearest(words, query, allowed, 10))


@pytest.mark.parametrize("beam", [1, 8, 256])
def test_candidates_grow_as_far_as_the_graph(large: tuple[hnswlib.Index, Shard], words: Floats, beam: int) -> None:
    """With k as large as the graph there is never a limit: every node that links lead to is a candidate, and expanded once."""
    _, shard = large
    labels, distances, stats = shard.search(words[:1], k=len(words), ef=len(words), beam=beam)
    assert sorted(labels[0].tolist()) == list(range(len(words)))
    assert (np.diff(distances[0]) >= 0).all()
    assert stats["expansions"][0] == len(words)


# ---- graphs in parts ----


N, HALF = 400, 200


@pytest.fixture(scope="module", params=["l2", "ip", "cosine"])
def parted(request: pytest.FixtureRequest, words: Floats) -> bytes:
    """An image whose rows below HALF have links among themselves alone, as the others have; and no links on upper layers."""
    with Shard.build(words[:N], metric=request.param, M=8, ef_construction=40, n_threads=1) as shard:
        image = Image(image_bytes(shard))
    for node in range(N):
        at = image.record(node) + image.numbers
        links = [image.get_word(at + 4 * slot) for slot in range(image.slots)]
        same = [slot for slot, link in enumerate(links) if link < N and (link < HALF) == (node < HALF)]
        for slot in range(image.slots):  # codes and factors are those of other links: estimates do not matter here
            image.set_word(at + 4 * slot, links[same[slot]] if slot < len(same) else 2**32 - 1)
        image.set_record(node, "count", len(same))
    width = 4 * (1 + image.header["M"])
    n_rows = image.get_word(image.nav_first_row + 4 * image.header["upper_count"])
    for row in range(n_rows):
        for word in range(width // 4):
            image.set_word(image.nav_rows + row * width + 4 * word, 0)
    return bytes(image.seal(*range(N)))


@contextmanager
def engine_of(data: bytes, kind: str = "read") -> Iterator[tuple[Engine, View]]:
    memory = np.frombuffer(bytearray(data), np.uint8)
    with ExitStack() as stack:
        arena = stack.enter_context(Arena.wrap(memory))
        channel = stack.enter_context(Channel.shm(arena))
        view = stack.enter_context(View.open(channel))
        cache = stack.enter_context(RecordCache.create(view, 1 << 16)) if kind == "cache" else None
        source = arena if kind == "own" else channel
        yield stack.enter_context(Engine.create([view], [source], [cache])), view


@pytest.mark.parametrize("beam", [1, 8, 256])
@pytest.mark.parametrize("kind", ["read", "own", "cache"])
def test_rows_that_no_link_leads_to_are_found(parted: bytes, words: Floats, beam: int, kind: str) -> None:
    entry = Image(parted).header["entry_node"]
    here, there = (range(HALF), range(HALF, N)) if entry < HALF else (range(HALF, N), range(HALF))
    with engine_of(parted, kind) as (engine, _):
        few, _, stats = engine.search(words[:7], 10, 20, beam)
        assert set(few.ravel().tolist()) <= set(here)  # enough answers: there is no sweep
        assert (stats["expansions"] <= HALF).all()
        for k in (HALF + 1, N):
            labels, distances, stats = engine.search(words[:7], k, N, beam)
            assert (labels >= 0).all()
            assert (stats["expansions"] == N).all()
            assert (stats["rounds"] >= np.ceil(stats["reads"] / max(beam, 1))).all()
            assert (np.diff(distances, axis=2) >= 0).all()
            assert all(len(set(row)) == k for row in labels[0].tolist())
            assert all(set(row) & set(there) for row in labels[0].tolist())


def test_a_filter_that_passes_the_other_part_only(parted: bytes, words: Floats) -> None:
    entry = Image(parted).header["entry_node"]
    there = (np.arange(N) >= HALF) if entry < HALF else (np.arange(N) < HALF)
    assert HALF**2 > 2 * 20 * N
    with engine_of(parted) as (engine, _):
        labels, _, stats = engine.search(words[:7], 10, 20, 8, filters=[pack_filter(there, N)])
    assert there[labels[0]].all()
    assert (stats["expansions"] > HALF).all()  # some of the one part by the walk, and all of the other by the sweep
    assert (stats["expansions"] <= N).all()
    truth = Truth.of(Family("parted", METRICS[Image(parted).header["metric"]], words[:N], words[:7]), 10, there)
    assert truth.recall(labels[0], 10) == 1


# ---- deleted rows ----


def index_of(vectors: Floats, deleted: Rows, metric: str = "l2") -> hnswlib.Index:
    index = hnswlib.Index(metric, vectors.shape[1])
    index.init_index(len(vectors), M=8, ef_construction=60, random_seed=1)
    index.add_items(vectors, num_threads=1)
    for row in np.flatnonzero(deleted).tolist():
        index.mark_deleted(row)
    return index


@pytest.mark.parametrize("beam", [1, 8, 256])
@pytest.mark.parametrize("left", [0, 1, 9, 10, 11, 30])
def test_almost_all_rows_are_deleted(words: Floats, queries: Floats, left: int, beam: int) -> None:
    vectors, deleted = words[:1500], np.ones(1500, bool)
    deleted[np.random.default_rng(left).permutation(1500)[:left]] = False
    with Shard.from_hnswlib(index_of(vectors, deleted), n_threads=1) as shard:
        labels, distances, stats = shard.search(queries[:20], k=10, ef=40, beam=beam)
        if left <= 20:  # fewer than `low`: there was no limit
            np.testing.assert_array_equal(labels, nearest(vectors, queries[:20], ~deleted, 10))
    assert ((labels >= 0).sum(axis=1) == min(left, 10)).all()
    assert not deleted[labels[labels >= 0]].any()
    assert np.isinf(distances[labels < 0]).all()
    if left == 0:
        assert (stats["expansions"] == 0).all()  # the header says so
    assert (stats["expansions"] <= 1500).all()


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_the_nearest_half_is_deleted(words: Floats, queries: Floats, metric: str) -> None:
    vectors = words[:2000]
    distance = exact(vectors, queries[0]) if metric == "l2" else -(vectors @ queries[0]).astype(np.float64)
    deleted = np.zeros(2000, bool)
    deleted[np.argsort(distance)[:1000]] = True
    index = index_of(vectors, deleted, metric)
    family = Family("half", metric, vectors, queries[:40])
    truth = Truth.of(family, 10, ~deleted)
    with Shard.from_hnswlib(index, n_threads=1) as shard:
        labels = shard.search(queries[:40], k=10, ef=64)[0]
    index.set_ef(64)
    assert truth.recall(labels, 10) >= truth.recall(index.knn_query(queries[:40], 10)[0].astype(np.int64), 10) - 0.01


@pytest.mark.parametrize("share", [0.5, 0.05, 0.004])
def test_filter_and_deleted_rows_together(words: Floats, queries: Floats, share: float) -> None:
    """A filter that passes mostly deleted rows: the rest is found, and all of it."""
    vectors, generator = words[:2000], np.random.default_rng(5)
    deleted = generator.random(2000) < 0.9
    passed = generator.random(2000) < share
    with Shard.from_hnswlib(index_of(vectors, deleted), n_threads=1) as shard:
        labels, _, stats = shard.search(queries[:20], k=10, ef=32, rows=passed)
    allowed = passed & ~deleted
    expected = nearest(vectors, queries[:20], allowed, 10)
    assert ((labels >= 0).sum(axis=1) == min(10, allowed.sum())).all()
    assert allowed[labels[labels >= 0]].all()
    if allowed.sum() <= 20:
        np.testing.assert_array_equal(labels, expected)
    else:
        assert np.mean([len(set(a) & set(b)) for a, b in zip(labels.tolist(), expected.tolist(), strict=True)]) > 9.7
    assert (stats["expansions"] <= 2000).all()


# ---- over owners ----


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize("beam", [1, 8, 256])
def test_a_sweep_over_owners_wants_no_neighbours(words: Floats, queries: Floats, metric: str, beam: int) -> None:
    vectors, deleted = words[:600], np.ones(600, bool)
    deleted[::90] = False  # 7 rows
    with (
        Shard.from_hnswlib(index_of(vectors, deleted, metric), n_threads=1) as shard,
        recorded(shard, queries[:5]) as (engine, recorder),
        Channel.shm(shard.arena) as channel,
        View.open(channel) as view,
        Engine.create([view], [channel]) as reader,
    ):
        for filters in (None, [pack_filter(np.arange(600) % 2 == 0, 600)]):
            wanted = reader.search(queries[:5], 10, 20, beam, filters=filters)
            found = engine.search(queries[:5], 10, 20, beam, filters=filters, helper=recorder)
            np.testing.assert_array_equal(found[0], wanted[0])
            np.testing.assert_array_equal(found[1], wanted[1])
            np.testing.assert_array_equal(found[2]["expansions"], wanted[2]["expansions"])
        direct = [pack_filter(np.arange(600) % 90 == 0, 600)]  # no walk at all
        before = [len(walk.rows) for walk in recorder.told]
        labels, _, _ = engine.search(queries[:5], 10, 20, beam, filters=direct, helper=recorder)
        assert ((labels >= 0).sum(axis=2) == 7).all()
        for walk, n in zip(recorder.told, before, strict=True):
            assert sorted(walk.rows[n:]) == list(range(0, 600, 90))
            assert set(walk.limits[n:]) == {SWEEP}
        pushes = np.zeros(1, PUSH_DTYPE)
        pushes["limit"] = SWEEP
        told = view.expand(shard.arena, queries[:1], pushes)
    assert (told.found["count"][0], len(told.numbers), len(told.weights)) == (0, 0, 0)
    assert np.isfinite(told.found["distance"][0])


class Liar:
    """An owner that tells of any neighbours, that they are as near as can be, and that it is sure or unsure of it."""

    def __init__(self, view: View, seed: int) -> None:
        self._info, self._random = view.info, np.random.default_rng(seed)
        self.rows: list[tuple[int, int]] = []

    def expand(self, pushes: Mapping[int, npt.NDArray[np.void]]) -> dict[int, Expansions]:
        return {shard: self._answer(wanted) for shard, wanted in pushes.items()}

    def replace(self, shard: int, error: CotraError) -> None:
        raise error

    def _answer(self, wanted: npt.NDArray[np.void]) -> Expansions:
        self.rows += zip(wanted["query"].tolist(), wanted["row"].tolist(), strict=True)
        found = np.zeros(len(wanted), EXPANSION_DTYPE)
        found["distance"], found["scale"] = self._random.choice([-3e38, 0, 1, 3e38], (2, len(wanted)))
        found["label"], found["count"] = wanted["row"], self._info.degree
        n = len(wanted) * self._info.degree
        return Expansions(
            found,
            self._random.integers(0, self._info.graph_count, n).astype(np.uint32),
            self._random.choice([-np.inf, -3e38, 0, 3e38], n).astype(np.float32),
            self._random.choice([1e-30, 1, 1e30], n).astype(np.float32),
        )


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize("seed", range(4))
def test_a_walk_over_owners_that_lie_ends(words: Floats, metric: str, seed: int) -> None:
    """It asks for each node once at most: there is no other bound, and none is needed."""
    with (
        Shard.build(words[:500], metric=metric, M=8, ef_construction=40, n_threads=1) as shard,
        Channel.shm(shard.arena) as channel,
        View.open(channel) as view,
        Engine.create([view], [None]) as engine,
    ):
        for k, ef in ((1, 1), (10, 64), (500, 500)):
            liar = Liar(view, seed)
            labels, distances, stats = engine.search(words[:5], k, ef, 8, helper=liar)
            assert len(set(liar.rows)) == len(liar.rows) == stats["expansions"].sum()
            assert (distances[..., :-1] <= distances[..., 1:]).all()
            assert all(len(set(row)) == k for row in labels[0].tolist())


# ---- a bound on request ----


@pytest.mark.parametrize("beam", [1, 8, 256])
def test_a_walk_ends_at_the_bound_that_the_caller_set_and_says_so(words: Floats, queries: Floats, beam: int) -> None:
    with (
        Shard.build(words[:2000], metric="l2", M=8, ef_construction=40, n_threads=1) as shard,
        Channel.shm(shard.arena) as channel,
        View.open(channel) as view,
        Engine.create([view], [channel]) as engine,
    ):
        free = engine.search(queries, 10, 40, beam)
        assert not free[2]["incomplete"].any()
        for most in (1, 20, 60):
            engine._params.most = most
            labels, _, stats = engine.search(queries, 10, 40, beam)
            assert (stats["expansions"] == np.minimum(free[2]["expansions"], most)).all()
            assert (stats["incomplete"][free[2]["expansions"] > most] == 1).all()
            whole = free[2]["expansions"] < most
            assert not stats["incomplete"][whole].any()
            np.testing.assert_array_equal(labels[0][whole], free[0][0][whole])
        passed = [pack_filter(np.arange(2000) % 40 == 0, 2000)]  # 50 rows, read without a walk
        engine._params.most = 20
        labels, _, stats = engine.search(queries, 10, 40, beam, filters=passed)
        assert (stats["expansions"] == 20).all()
        assert (stats["incomplete"] == 1).all()
        engine._params.most = 0
        assert not engine.search(queries, 10, 40, beam, filters=passed)[2]["incomplete"].any()
