"""Filters: only rows that they let through are returned, and those are found."""

from __future__ import annotations

import hnswlib
import numpy as np
import numpy.typing as npt
import pytest

from cotra_rdma import InvalidInputError, Shard
from cotra_rdma._core.query_checks import pack_filter
from cotra_rdma.datasets import recall

Floats = npt.NDArray[np.float32]
COUNT = 5000


@pytest.fixture(scope="module")
def shard(words: Floats) -> Shard:
    return Shard.build(words[:COUNT], ids=np.arange(COUNT) * 3, metric="cosine", n_threads=1)


def exact(vectors: Floats, allowed: npt.NDArray[np.bool_], queries: Floats, k: int) -> npt.NDArray[np.int64]:
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    similar = queries @ unit.T
    similar[:, ~allowed] = -np.inf
    return np.argsort(-similar, axis=1)[:, :k]


@pytest.mark.parametrize(("share", "least"), [(0.9, 0.97), (0.5, 0.97), (0.1, 0.97), (0.05, 1.0), (0.01, 1.0)])
def test_what_is_let_through_is_found_and_nothing_else(
    shard: Shard, words: Floats, queries: Floats, share: float, least: float
) -> None:
    allowed = np.random.default_rng(3).random(COUNT) < share
    labels, distances, stats = shard.search(queries, k=10, ef=64, rows=allowed)
    assert allowed[labels // 3].all()
    assert recall(labels // 3, exact(words[:COUNT], allowed, queries, 10)) >= least
    assert (np.diff(distances, axis=1) >= 0).all()
    if share <= 0.05:  # fewer rows than a walk would read: they are read themselves, each once
        assert (stats["reads"] == allowed.sum()).all()


def test_the_bitmap_is_lowest_bit_first(shard: Shard, queries: Floats) -> None:
    bitmap = bytearray((COUNT + 7) // 8)
    for row in (0, 9, 4999):
        bitmap[row // 8] |= 1 << row % 8
    labels, distances, _ = shard.search(queries, k=5, ef=5, rows=bytes(bitmap))
    assert {tuple(sorted(found[:3])) for found in labels.tolist()} == {(0, 27, 14997)}
    assert (labels[:, 3:] == -1).all()
    assert np.isinf(distances[:, 3:]).all()


def test_all_and_none(shard: Shard, queries: Floats) -> None:
    everything = shard.search(queries, k=10, ef=64)
    through = shard.search(queries, k=10, ef=64, rows=np.ones(COUNT, bool))
    for a, b in zip(everything[:2], through[:2], strict=True):
        np.testing.assert_array_equal(a, b)
    labels, distances, stats = shard.search(queries, k=10, ef=64, rows=np.zeros(COUNT, bool))
    assert (labels == -1).all()
    assert np.isinf(distances).all()
    assert (stats["reads"] == 0).all()


def test_threads_and_batches_change_nothing(shard: Shard, queries: Floats) -> None:
    for share in (0.3, 0.02):
        allowed = np.random.default_rng(4).random(COUNT) < share
        one = shard.search(queries, k=10, ef=32, rows=allowed)
        several = shard.search(queries, k=10, ef=32, rows=allowed, n_threads=3)
        alone = [shard.search(query, k=10, ef=32, rows=allowed) for query in queries[:5]]
        for i in range(2):
            np.testing.assert_array_equal(one[i], several[i])
            np.testing.assert_array_equal(one[i][:5], np.concatenate([answer[i] for answer in alone]))


def test_deleted_rows_stay_deleted(words: Floats, queries: Floats) -> None:
    index = hnswlib.Index(space="l2", dim=words.shape[1])
    index.init_index(1000, M=8, ef_construction=50)
    index.add_items(words[:1000], num_threads=1)
    for label in range(0, 1000, 2):
        index.mark_deleted(label)
    with Shard.from_hnswlib(index) as shard:
        for share in (0.5, 0.02):
            allowed = np.random.default_rng(5).random(1000) < share
            labels = shard.search(queries, k=5, ef=50, rows=allowed)[0]
            there = labels[labels >= 0]
            assert (there % 2 == 1).all()
            assert allowed[there].all()


@pytest.mark.parametrize(
    "rows",
    [
        np.ones(COUNT, np.uint8),
        np.ones(COUNT - 1, bool),
        np.ones(COUNT, np.int64),
        bytes(COUNT // 8 - 1),
        np.ones((2, COUNT), bool),
    ],
)
def test_filters_for_another_shard(shard: Shard, queries: Floats, rows: object) -> None:
    with pytest.raises(InvalidInputError, match="a filter is bool"):
        shard.search(queries, rows=rows)  # type: ignore[arg-type]


@pytest.mark.parametrize("n_threads", [1, 2])
def test_local_rows_are_those_that_build_was_given(words: Floats, n_threads: int) -> None:
    """hnswlib's threads number vectors as they come; a filter's bits must not depend on that."""
    ids = np.random.default_rng(6).permutation(10**6)[:3000]
    with Shard.build(words[:3000], ids=ids, n_threads=n_threads, ef_construction=40) as built:
        np.testing.assert_array_equal(built.labels(), ids)
        for row in (0, 17, 2999):
            alone = np.zeros(3000, bool)
            alone[row] = True
            labels, distances, _ = built.search(words[row], k=1, rows=alone)
            assert (labels[0, 0], distances[0, 0]) == (ids[row], 0)
        found = built.search(words[:3000], k=1, ef=400)[0]
        assert (found[:, 0] == ids).mean() > 0.995


def test_packing() -> None:
    assert pack_filter(None, 5) is None
    assert pack_filter([True, False, False, True, False, False, False, False, True], 9) == b"\x09\x01"
    assert pack_filter(b"\x09\x01", 9) == b"\x09\x01"
