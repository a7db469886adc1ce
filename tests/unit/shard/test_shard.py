"""Shards: what a graph finds, what it holds, what it is made of, and what it refuses."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hnswlib
import numpy as np
import numpy.typing as npt
import pytest

from cotra_rdma import Arena, ChecksumError, CotraError, FormatError, InvalidInputError, Shard
from cotra_rdma._core.stats import STATS_DTYPE
from cotra_rdma._native.channel import Channel
from cotra_rdma._native.graph_engine import Engine
from cotra_rdma._native.library import check, ffi, lib, new_error
from cotra_rdma._native.view import View
from cotra_rdma.errors import LossyVectorError
from helpers.image import image_bytes, reader_of

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
METRICS = ("l2", "ip", "cosine")
DIMS = (2, 3, 63, 64, 65, 100, 1000, 4096)


def distances_to_all(rows: np.ndarray, queries: Floats, metric: str) -> np.ndarray:
    """float64[n_queries, n]"""
    q, x = queries.astype(np.float64), rows.astype(np.float64)
    if metric == "l2":
        return np.maximum((q**2).sum(1)[:, None] + (x**2).sum(1) - 2 * q @ x.T, 0)
    if metric == "cosine":
        q, x = (v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-30) for v in (q, x))
    return 1 - q @ x.T


def recall(shard: Shard, rows: np.ndarray, queries: Floats, k: int, ef: int) -> float:
    """The part of answers that are as near as the k-th nearest (ties count); checks their distances on the way."""
    labels, distances, _ = shard.search(queries, k=k, ef=ef)
    exact = distances_to_all(rows, queries, shard.metric)
    found = np.take_along_axis(exact, labels, axis=1)
    scale = np.abs(exact).max() + 1
    # hnswlib's normalisation sums float32 one after the other: over 4,096 dimensions that costs digits
    np.testing.assert_allclose(distances, found, rtol=0, atol=(3e-5 if shard.metric == "cosine" else 1e-5) * scale)
    bound = np.partition(exact, k - 1, axis=1)[:, k - 1 : k]
    return float((found <= bound + 1e-6 * scale).mean())


def get_node(shard: Shard, node: int) -> tuple[Floats, int, int]:
    vector = np.empty(shard.dim, np.float32)
    label, flags, err = ffi.new("int64_t *"), ffi.new("uint32_t *"), new_error()
    info = shard.arena.info
    pointer = ffi.cast("void *", info.addr)
    out = ffi.from_buffer("float[]", vector)
    check(lib.cotra_image_get_node(pointer, info.len, node, out, label, flags, err), err)
    return vector, label[0], flags[0]


@pytest.fixture(scope="module", params=METRICS)
def word_shard(request: pytest.FixtureRequest, words: Floats) -> Iterator[Shard]:
    """5,000 words in each metric."""
    with Shard.build(words[:5000], metric=request.param, ef_construction=100, n_threads=1) as shard:
        yield shard


@pytest.fixture(scope="module")
def small() -> Iterator[Shard]:
    """500 random vectors, l2, one thread."""
    rows = np.random.default_rng(0).normal(size=(500, 16)).astype(np.float32)
    with Shard.build(rows, M=8, ef_construction=50, n_threads=1) as shard:
        yield shard


# ---- what it finds ----


def test_recall_on_words(word_shard: Shard, words: Floats, queries: Floats) -> None:
    # ip: the longest words are everybody's neighbours, which graphs of metric spaces find last
    least = {"l2": 0.97, "cosine": 0.97, "ip": 0.90}[word_shard.metric]
    assert recall(word_shard, words[:5000], queries, 10, 100) >= least
    assert recall(word_shard, words[:5000], queries, 1, 100) >= least


def test_recall_grows_with_ef(word_shard: Shard, words: Floats, queries: Floats) -> None:
    found = [recall(word_shard, words[:5000], queries, 10, ef) for ef in (10, 40, 160, 640)]
    assert found == sorted(found)
    assert found[-1] > 0.99


@pytest.mark.parametrize("metric", METRICS)
def test_recall_beside_hnswlibs(metric: str, words: Floats, queries: Floats) -> None:
    rows = words[:3000]
    index = hnswlib.Index(space=metric, dim=100)
    index.init_index(max_elements=len(rows), M=16, ef_construction=100, random_seed=1)
    index.add_items(rows, num_threads=1)
    index.set_ef(64)
    with Shard.from_hnswlib(index) as shard:
        exact = np.argsort(distances_to_all(rows, queries, metric), axis=1)[:, :10]
        ours, _, _ = shard.search(queries, k=10, ef=64)
        theirs, _ = index.knn_query(queries, k=10)
        by_system = [
            np.mean([len(set(a) & set(b)) for a, b in zip(found, exact, strict=True)]) for found in (ours, theirs)
        ]
    assert by_system[0] >= by_system[1] - 0.5  # of 10: estimates, and walks that end early, cost a little


@pytest.mark.parametrize("kind", [np.float32, np.float16, np.uint8])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("metric", METRICS)
def test_dimensions_and_vector_types(metric: str, dim: int, kind: type) -> None:
    generator = np.random.default_rng(dim)
    n = 150 if dim < 1000 else 40
    octets = generator.integers(1, 256, (n, dim), np.uint8)
    rows = octets if kind is np.uint8 else generator.normal(size=(n, dim)).astype(kind)
    queries = (rows[:20].astype(np.float32) + 0.05 * generator.normal(size=(20, dim))).astype(np.float32)
    with Shard.build(rows, metric=metric, ef_construction=50, n_threads=1) as shard:
        assert (shard.dim, shard.metric, shard.info.vector_type) == (dim, metric, np.dtype(kind).name)
        assert shard.info.code_dim == -(-dim // 64) * 64
        assert recall(shard, rows, queries, 5, n) >= (0.95 if metric != "ip" else 0.9)


def test_own_vectors_are_stored_exactly() -> None:
    generator = np.random.default_rng(0)
    for rows in (
        generator.normal(size=(30, 5)).astype(np.float32),
        generator.normal(size=(30, 5)).astype(np.float16),
        generator.integers(0, 256, (30, 5), np.uint8),
        generator.integers(-(2**20), 2**20, (30, 5)),
    ):
        with Shard.build(rows, ids=np.arange(100, 130), n_threads=1) as shard:
            for node in range(30):
                vector, label, flags = get_node(shard, node)
                assert (vector == rows[label - 100]).all()
                assert flags == 0
            with pytest.raises(CotraError, match="node 30 of 30"):
                get_node(shard, 30)


@pytest.mark.parametrize(
    ("scale", "expected"), [(1.0, "uint8"), (0.5, "float16"), (-1.0, "float16"), (1 / 3, "float32"), (300.0, "float32")]
)
def test_the_smallest_type_that_is_exact(scale: float, expected: str) -> None:
    rows = (np.random.default_rng(0).integers(0, 256, (100, 8)) * scale).astype(np.float32)
    index = hnswlib.Index(space="l2", dim=8)
    index.init_index(max_elements=101)
    index.add_items(rows, num_threads=1)
    with Shard.from_hnswlib(index) as shard:
        assert shard.info.vector_type == expected
    index.add_items(np.full((1, 8), 1 / 3), [100])  # not among the first: found while packing
    with Shard.from_hnswlib(index) as shard:
        assert shard.info.vector_type == "float32"
    for kind in ("float16", "uint8"):
        with pytest.raises(LossyVectorError, match=kind):
            Shard.from_hnswlib(index, vector_type=kind)


def test_every_k_and_ef(small: Shard) -> None:
    query = np.zeros((3, 16), np.float32)
    full, _, _ = small.search(query, k=100, ef=100)
    for k, ef in ((1, 1), (1, 2), (2, 2), (7, 7), (10, 64), (33, 50), (100, 100), (500, 500), (600, 700)):
        labels, distances, stats = small.search(query, k=k, ef=ef)
        assert labels.shape == distances.shape == (3, k)
        assert (labels.dtype, distances.dtype, stats.dtype) == (np.int64, np.float32, STATS_DTYPE)
        assert (distances[:, :-1] <= distances[:, 1:]).all()
        assert (labels == labels[0]).all()
        there = labels[0][labels[0] >= 0]
        assert len(set(there.tolist())) == len(there) >= min(k, 450)
        assert (stats["expansions"] == stats["reads"]).all()
        assert (stats["read_bytes"] == stats["reads"] * small.info.record_bytes).all()
    assert len(set(full[0].tolist())) == 100


@pytest.mark.parametrize(
    ("k", "ef", "beam"), [(0, 10, 4), (11, 10, 4), (-1, 10, 4), (1, 0, 4), (1, 10, 0), (1, 10, 257)]
)
def test_impossible_numbers(small: Shard, k: int, ef: int, beam: int) -> None:
    with pytest.raises((InvalidInputError, OverflowError)):
        small.search(np.zeros(16), k=k, ef=ef, beam=beam)
    assert small.search(np.zeros(16), k=1)[0].shape == (1, 1)  # and it goes on


def test_more_answers_than_vectors() -> None:
    rows = np.arange(14, dtype=np.float32).reshape(7, 2)
    with Shard.build(rows, ids=range(10, 17)) as shard:
        labels, distances, _ = shard.search(rows[:2], k=20, ef=20)
        assert labels[0].tolist() == [10, 11, 12, 13, 14, 15, 16] + [-1] * 13
        assert np.isinf(distances[:, 7:]).all()
        assert np.isfinite(distances[:, :7]).all()


@pytest.mark.parametrize("metric", METRICS)
def test_a_single_vector(metric: str, tmp_path: Path) -> None:
    with Shard.build([[3.0, 4.0, 0.0]], ids=[2**62], metric=metric) as shard:
        assert len(shard) == 1
        shard.save(tmp_path / "one")
        with Shard.open(tmp_path / "one") as again:
            for one in (shard, again):
                labels, distances, _ = one.search([3.0, 4.0, 0.0], k=3)
                assert labels.tolist() == [[2**62, -1, -1]]
                expected = {"l2": 0.0, "ip": 1 - 25.0, "cosine": 0.0}[metric]
                assert distances[0, 0] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("k", "ef", "beam"), [(10, 64, 4), (50, 100, 3), (20, 20, 1)])
def test_copies_of_a_vector_are_each_returned_once(metric: str, k: int, ef: int, beam: int) -> None:
    """Equal vectors have equal estimates: the order among those must not lose or double any."""
    generator = np.random.default_rng(0)
    rows = generator.integers(0, 3, (600, 3)).astype(np.float32)
    queries = (rows[:100] + 0.01).astype(np.float32)
    with Shard.build(rows, metric=metric, n_threads=1) as shard:
        labels, _, stats = shard.search(queries, k=k, ef=ef, beam=beam)
        assert all(len(set(row.tolist())) == k for row in labels)
        assert (stats["reads"] <= 600).all()


def test_all_vectors_the_same() -> None:
    with Shard.build(np.ones((300, 10)), n_threads=1) as shard:
        labels, distances, _ = shard.search(np.ones((5, 10)), k=50, ef=100)
        assert all(len(set(row.tolist())) == 50 for row in labels)
        assert (distances == 0).all()


def test_zero_vectors_and_cosine() -> None:
    rows = np.eye(4, dtype=np.float32)
    rows[3] = 0
    with Shard.build(rows, metric="cosine") as shard:
        labels, distances, _ = shard.search([rows[0], rows[3]], k=4)
        assert labels[0, 0] == 0
        assert distances.ravel()[1:] == pytest.approx(1.0)


def test_very_long_and_very_short_vectors() -> None:
    for scale in (1e-30, 1e-20, 1e10, 1e15):
        rows = (np.random.default_rng(0).normal(size=(100, 20)) / 6 * scale).astype(np.float32)
        for metric in METRICS:
            with Shard.build(rows, metric=metric, n_threads=1) as shard:
                labels, distances, _ = shard.search(rows[:10], k=5)
                assert not np.isnan(distances).any()
                if scale > 1e-20 and metric == "l2":
                    assert (labels[:, 0] == np.arange(10)).all()


# ---- ids and deleted nodes ----


def test_ids_of_64_bits(words: Floats) -> None:
    ids = np.random.default_rng(0).choice(2**62, 300, replace=False).astype(np.int64) * 2
    ids[:2] = 0, 2**63 - 1
    for given in (ids, ids.astype(np.uint64), ids.tolist()):
        with Shard.build(words[:300], ids=given) as shard:
            labels, _, _ = shard.search(words[:300], k=1)
            assert (labels[:, 0] == ids).all()


def test_deleted_nodes_are_walked_through_and_never_returned(words: Floats) -> None:
    rows = words[:1000]
    index = hnswlib.Index(space="l2", dim=100)
    index.init_index(max_elements=1000, random_seed=1)
    index.add_items(rows, np.arange(1000) + 5000, num_threads=1)
    deleted = np.random.default_rng(0).choice(1000, 400, replace=False)
    for row in deleted:
        index.mark_deleted(5000 + row)
    with Shard.from_hnswlib(index) as shard:
        assert (len(shard), shard.info.count, shard.info.deleted_count) == (600, 1000, 400)
        labels, _, _ = shard.search(rows, k=10, ef=100)
        assert not np.isin(labels, deleted + 5000).any()
        kept = np.setdiff1d(np.arange(1000), deleted)
        assert (labels[kept, 0] == kept + 5000).mean() > 0.99
    for row in kept:
        index.mark_deleted(5000 + row)
    with Shard.from_hnswlib(index) as shard:
        assert len(shard) == 0
        labels, distances, _ = shard.search(rows[:3], k=2)
        assert (labels == -1).all()
        assert np.isinf(distances).all()


# ---- what it is made of ----


def test_a_file_and_a_memfd_hold_the_same_bytes(small: Shard, tmp_path: Path, queries: Floats) -> None:
    path = tmp_path / "shard"
    small.save(path)
    assert path.read_bytes() == image_bytes(small)
    assert len(path.read_bytes()) == small.info.image_bytes
    fd = small.arena.info.fd
    assert fd is not None
    assert os.pread(fd, small.info.image_bytes, 0) == path.read_bytes()
    with Shard.open(path) as opened:
        assert opened.info == small.info
        assert opened.arena.info.fd is None
        assert not opened.arena.info.writable
        pinned = opened.pinned(lock=False)
        assert pinned is opened.pinned(lock=False)
        assert pinned.info.sealed
        with pinned.view() as view:
            assert bytes(view) == path.read_bytes()
        for ours, theirs in zip(small.search(queries[:, :16]), opened.search(queries[:, :16]), strict=True):
            if ours.dtype != STATS_DTYPE:
                assert (ours == theirs).all()


def test_the_image_may_lie_anywhere(small: Shard, queries: Floats) -> None:
    """Nothing in it is a pointer: the same bytes at other addresses, in wrapped memory and in another's memfd."""
    data, rows = image_bytes(small), np.ascontiguousarray(queries[:, :16])
    expected = small.search(rows, k=10)[0]
    buffer = np.empty(len(data) + 4 * mmap.PAGESIZE, np.uint8)
    for shift in (0, 64, mmap.PAGESIZE, 2 * mmap.PAGESIZE + 8):
        place = buffer[shift : shift + len(data)]
        place[:] = np.frombuffer(data, np.uint8)
        with reader_of(place) as engine:
            assert (engine.search(rows, 10, 64, 8)[0][0] == expected).all()
        place[:] = 0
    pinned = small.pinned(lock=False)
    assert pinned.info.fd is not None
    with Arena.map_fd(pinned.info.fd, len(data)) as mapped, Channel.shm(mapped) as channel, View.open(channel) as view:
        assert mapped.info.addr != pinned.info.addr
        with Engine.create([view], [channel]) as engine:
            assert (engine.search(rows, 10, 64, 8)[0][0] == expected).all()


def test_size(word_shard: Shard) -> None:
    """At most 1.1 x what the data is worth: vectors, labels, links, codes and factors, and the upper layers."""
    info = word_shard.info
    record = 4 * info.dim + 8 + info.degree * (4 + 8 + info.code_dim // 8)
    upper = info.upper_count * (4 * info.dim + 4 * (1 + info.M) * 1.1 + 8)
    assert info.image_bytes <= 1.1 * (info.count * record + upper)


def test_info(small: Shard, words: Floats) -> None:
    info = small.info
    assert (info.count, info.dim, info.code_dim, info.metric, info.M, info.degree) == (500, 16, 64, "l2", 8, 32)
    assert (info.ef_construction, info.seed, info.generation, info.format_version) == (50, 100, 1, 4)
    assert info.records_offset == 4096
    assert info.record_bytes % 64 == info.nav_bytes % 64 == info.nav_offset % 64 == 0
    assert info.image_bytes == info.nav_offset + info.nav_bytes == 4096 + 500 * info.record_bytes + info.nav_bytes
    assert "500 float32[16] vectors, l2" in repr(small)
    with Shard.build(words[:10], generation=2**40 + 3, seed=-1, n_threads=1) as shard:
        assert (shard.info.generation, shard.info.seed) == (2**40 + 3, 2**64 - 1)


def test_progress(words: Floats) -> None:
    seen: list[tuple[str, int, int]] = []
    Shard.build(words[:5000], ef_construction=10, M=4, progress=lambda *step: seen.append(step)).close()
    assert seen[:2] == [("build", 4096, 5000), ("build", 5000, 5000)]
    assert [phase for phase, _, _ in seen[2:]] == ["link"] * 3 + ["pack"] * 3
    assert seen[-1] == ("pack", 5000, 5000)


# ---- the same again ----


@pytest.mark.parametrize("metric", METRICS)
def test_builds_of_one_thread_are_byte_identical(metric: str, words: Floats) -> None:
    images = []
    for seed in (1, 1, 2):
        with Shard.build(words[:700], metric=metric, ef_construction=40, seed=seed, n_threads=1) as shard:
            images.append(image_bytes(shard))
    assert images[0] == images[1]
    assert images[0] != images[2]


def test_packing_does_not_depend_on_threads(words: Floats) -> None:
    index = hnswlib.Index(space="cosine", dim=100)
    index.init_index(max_elements=5000, M=8, ef_construction=20)
    index.add_items(words[:5000])
    images = set()
    for n_threads in (1, 2, 5):
        with Shard.from_hnswlib(index, n_threads=n_threads) as shard:
            images.add(bytes(image_bytes(shard)))
    assert len(images) == 1


def test_answers_depend_on_the_query_alone(word_shard: Shard, queries: Floats) -> None:
    """Not on threads, the number of queries at once, the other queries, or their order."""
    labels, distances, stats = word_shard.search(queries, k=10, ef=50)
    counts = ["reads", "rounds", "expansions", "cache_hits", "read_bytes"]

    def same(other: tuple[Any, ...], at: Any = slice(None)) -> None:
        assert (other[0] == labels[at]).all()
        assert (other[1].view(np.uint32) == distances[at].view(np.uint32)).all()
        assert (other[2][counts] == stats[at][counts]).all()

    for n_threads in (2, 3, 300):
        same(word_shard.search(queries, k=10, ef=50, n_threads=n_threads))
    for i in (0, 7, 199):
        same(word_shard.search(queries[i], k=10, ef=50), slice(i, i + 1))
    order = np.random.default_rng(0).permutation(len(queries))
    same(word_shard.search(queries[order], k=10, ef=50), order)
    with (
        Channel.shm(word_shard.arena) as channel,
        View.open(channel) as view,
        Engine.create([view], [channel]) as engine,
    ):
        for inflight in (1, 2, 17, 64, 1024):
            found = engine.search(queries, 10, 50, 8, inflight=inflight)
            same((found[0][0], found[1][0], found[2]))


def test_queries_in_any_form(small: Shard) -> None:
    generator = np.random.default_rng(1)
    rows = generator.integers(-100, 100, (20, 16)).astype(np.float32)
    expected = small.search(rows)[0]
    for same in (
        rows.astype(np.float64),
        rows.astype(np.int8),
        rows.tolist(),
        np.asfortranarray(rows),
        rows[::-1][::-1],
    ):
        assert (small.search(same)[0] == expected).all()
    assert (small.search(rows[0])[0] == expected[:1]).all()
    labels, distances, stats = small.search(np.empty((0, 16)), k=7)
    assert labels.shape == distances.shape == (0, 7)
    assert stats.shape == (0,)


# ---- what it refuses ----


def rows_with(value: float) -> Floats:
    rows = np.zeros((10, 4), np.float32)
    rows[7, 2] = value
    return rows


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Shard.build(np.zeros((0, 4))), "vectors must be"),
        (lambda: Shard.build([]), "vectors must be"),
        (lambda: Shard.build(np.zeros(4)), "vectors must be"),
        (lambda: Shard.build(np.zeros((2, 2, 2))), "vectors must be"),
        (lambda: Shard.build(np.zeros((2, 0))), "vectors must be"),
        (lambda: Shard.build(np.zeros((1, 4097))), "vectors must be"),
        (lambda: Shard.build(np.zeros((2, 2), complex)), "real numbers"),
        (lambda: Shard.build(np.zeros((2, 2), bool)), "real numbers"),
        (lambda: Shard.build([["a", "b"]]), "real numbers"),
        (lambda: Shard.build(rows_with(np.nan)), "vector 7 holds NaN or infinity"),
        (lambda: Shard.build(rows_with(np.inf)), "vector 7"),
        (lambda: Shard.build(rows_with(-np.inf)), "vector 7"),
        (lambda: Shard.build(np.zeros((2, 2)), metric="hamming"), "metric"),
        (lambda: Shard.build(np.zeros((2, 2)), metric="L2"), "metric"),
        (lambda: Shard.build(np.zeros((2, 2)), M=1), "M must be"),
        (lambda: Shard.build(np.zeros((2, 2)), M=513), "M must be"),
        (lambda: Shard.build(np.zeros((2, 2)), ef_construction=0), "ef_construction"),
        (lambda: Shard.build(np.zeros((2, 2)), n_threads=-1), "n_threads"),
        (lambda: Shard.build(np.zeros((3, 2)), ids=[1, 2, 1]), r"duplicate ids: \[1\]"),
        (lambda: Shard.build(np.zeros((3, 2)), ids=[0, -1, 2]), r"\[0, 2\^63\)"),
        (lambda: Shard.build(np.zeros((3, 2)), ids=np.array([0, 1, 2**63], np.uint64)), r"\[0, 2\^63\)"),
        (lambda: Shard.build(np.zeros((3, 2)), ids=[0, 1]), "ids must be"),
        (lambda: Shard.build(np.zeros((3, 2)), ids=[[0, 1, 2]]), "ids must be"),
        (lambda: Shard.build(np.zeros((3, 2)), ids=[0.0, 1.0, 2.0]), "ids must be"),
    ],
)
def test_bad_vectors(make: Callable[[], Shard], reason: str) -> None:
    with pytest.raises(InvalidInputError, match=reason):
        make()


def test_float64_that_overflows_float32() -> None:
    with pytest.raises(InvalidInputError, match="vector 0 holds NaN or infinity"):
        Shard.build(np.full((2, 2), 1e300))


def test_bad_indexes() -> None:
    index = hnswlib.Index(space="l2", dim=4)
    index.init_index(max_elements=10)
    with pytest.raises(InvalidInputError, match="empty"):
        Shard.from_hnswlib(index)
    index.add_items(rows_with(np.nan))
    with pytest.raises(InvalidInputError, match="component 2 of its vector is not finite"):
        Shard.from_hnswlib(index, vector_type="float32")
    with pytest.raises(InvalidInputError, match="vector_type"):
        Shard.from_hnswlib(index, vector_type="int8")


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        (np.zeros(15), "queries must be"),
        (np.zeros((2, 17)), "queries must be"),
        (np.zeros((1, 2, 16)), "queries must be"),
        (np.float32(1), "queries must be"),
        (np.zeros((2, 16), complex), "real numbers"),
        (np.full((2, 16), np.nan), "query 0 holds NaN"),
        (np.r_[np.zeros((3, 16)), np.full((1, 16), np.inf)], "query 3"),
        (np.full((1, 16), 1e300), "query 0"),
    ],
)
def test_bad_queries(small: Shard, query: Any, reason: str) -> None:
    with pytest.raises(InvalidInputError, match=reason):
        small.search(query)


def test_components_whose_squares_do_not_fit_are_refused(small: Shard) -> None:
    far = np.full((1, 16), 1e15, np.float32)
    assert np.isfinite(small.search(far)[1]).all()
    for beyond in (2e15, -3e38):
        with pytest.raises(InvalidInputError, match=r"query 0 holds a component beyond 1e15"):
            small.search(np.full((1, 16), beyond, np.float32))
        with pytest.raises(InvalidInputError, match=r"vector 1 holds a component beyond 1e15"):
            Shard.build(np.stack([far[0], np.full(16, beyond, np.float32)]))
    index = hnswlib.Index(space="l2", dim=4)
    index.init_index(4)
    index.add_items(np.full((4, 4), 1e20, np.float32))
    with pytest.raises(InvalidInputError, match="beyond 1e15"):
        Shard.from_hnswlib(index)


def test_what_is_no_index() -> None:
    for index in (hnswlib.Index("l2", 4), hnswlib.BFIndex("l2", 4), None):
        with pytest.raises(InvalidInputError):
            Shard.from_hnswlib(index)


@pytest.mark.parametrize(
    "change",
    [{"k": 10**10}, {"ef": 10**10}, {"beam": 10**10}, {"k": 2.5}, {"k": 65}, {"beam": 0}, {"ef": 0}],
)
def test_parameters_out_of_range(small: Shard, change: dict[str, object]) -> None:
    with pytest.raises(InvalidInputError, match="must be a whole number in"):
        small.search(np.zeros((1, 16), np.float32), **{"k": 10, "ef": 64, "beam": 4, **change})


def test_rows_of_different_lengths(small: Shard) -> None:
    with pytest.raises(InvalidInputError, match="must be an array of numbers"):
        Shard.build([[1, 2], [3]])
    with pytest.raises(InvalidInputError, match="must be an array of numbers"):
        small.search([[1, 2], [3]])


def test_bad_files(small: Shard, tmp_path: Path) -> None:
    path, data = tmp_path / "shard", image_bytes(small)
    for content in (b"", b"x", bytes(5000), data[:4095], data[:4096], data[:-1], data[:-64], b"\0" + data, data[1:]):
        path.write_bytes(content)
        with pytest.raises(FormatError, match="shard"):
            Shard.open(path)
    for place in (4096 + 100, len(data) - 64 * 20):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(ChecksumError):
            Shard.open(path)
    with pytest.raises(FileNotFoundError):
        Shard.open(tmp_path / "gone")
    with pytest.raises(IsADirectoryError):
        Shard.open(tmp_path)


def test_without_verification_a_corrupt_record_is_found_when_it_is_read(small: Shard, tmp_path: Path) -> None:
    path, data = tmp_path / "shard", bytearray(image_bytes(small))
    for node in range(500):
        data[4096 + node * small.info.record_bytes + 40] ^= 1
    path.write_bytes(data)
    with pytest.raises(ChecksumError):
        Shard.open(path)
    with Shard.open(path, verify=False) as shard:
        for _ in range(2):
            with pytest.raises(ChecksumError, match="torn or corrupt"):
                shard.search(np.zeros(16))


def test_saving_is_whole_or_not_at_all(small: Shard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "shard"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        small.save(path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["shard"]
    monkeypatch.undo()
    umask = os.umask(0o027)
    try:
        small.save(path)
    finally:
        os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path) == ["shard"]
    with pytest.raises(FileNotFoundError):
        small.save(tmp_path / "no" / "directory")


def test_an_index_that_the_disk_does_not_hold_is_named(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _NO_SPACE],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "set TMPDIR to a directory with more space" in done.stdout
    assert str(tmp_path) in done.stdout
    assert list(tmp_path.iterdir()) == []


_NO_SPACE = """
import resource, signal
import numpy as np
from cotra_rdma import Shard
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))  # as a disk that is full: writes end early
try:
    Shard.build(np.random.default_rng(1).standard_normal((3000, 16)).astype(np.float32))
except OSError as error:
    print(error)
"""


def test_closed(words: Floats, tmp_path: Path) -> None:
    shard = Shard.build(words[:50], n_threads=1)
    shard.search(words[:5])
    shard.close()
    shard.close()
    for use in (lambda: shard.search(words[:5]), lambda: shard.save(tmp_path / "x"), lambda: shard.pinned(lock=False)):
        with pytest.raises(CotraError, match="closed"):
            use()
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_vectors_are_rounded_to_float16_on_request(metric: str, words: Floats) -> None:
    rows = words[:2000]
    with (
        Shard.build(rows, metric=metric, n_threads=1) as exact,
        Shard.build(rows, metric=metric, n_threads=1, vector_type="float16") as half,
    ):
        assert (exact.info.vector_type, half.info.vector_type) == ("float32", "float16")
        assert half.info.record_bytes == exact.info.record_bytes - 192
        (labels, near, _), (same, also_near, _) = (shard.search(rows[:200], k=5, ef=100) for shard in (exact, half))
        assert (labels == same).mean() > 0.97
        np.testing.assert_allclose(also_near, near, rtol=2e-3, atol=2e-3 * near.max())


def test_what_a_vector_type_cannot_hold(words: Floats) -> None:
    with pytest.raises(LossyVectorError, match="float16"):
        Shard.build(words[:10] * 1e6, vector_type="float16")
    with pytest.raises(LossyVectorError, match="uint8"):
        Shard.build(words[:10], vector_type="uint8")
    with pytest.raises(InvalidInputError, match="vector_type must be auto"):
        Shard.build(words[:10], vector_type="float64")
    with Shard.build(np.arange(64).reshape(8, 8), vector_type="uint8", n_threads=1) as shard:
        assert shard.info.vector_type == "uint8"


def test_more_candidates_than_there_is_room_for() -> None:
    """Until k answers are found all that is heard of is a candidate: with k = ef more than a walk keeps room for."""
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((12000, 64), np.float32)
    asked = generator.standard_normal((20, 64), np.float32)
    with Shard.build(rows, M=8, ef_construction=20, n_threads=1) as shard:
        labels, found, _ = shard.search(asked, k=256, ef=256)
    exact = np.square(rows[np.newaxis] - asked[:, np.newaxis]).sum(axis=2)
    np.testing.assert_allclose(found, np.take_along_axis(exact, labels, 1), rtol=1e-4)
    assert (np.diff(found, axis=1) >= 0).all()
    assert all(len(set(row)) == 256 for row in labels.tolist())
    nearest = np.argsort(exact, axis=1)[:, :256]
    assert np.mean([len(np.intersect1d(*pair)) for pair in zip(labels, nearest, strict=True)]) > 0.75 * 256
