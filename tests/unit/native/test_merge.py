"""Merging shards' answers: against a plain sort, ties to the lower shard, a label once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotra_rdma._native.library import ffi, lib, new_error
from cotra_rdma._native.merge import merge
from helpers.properties import fixed

Answers = list[list[list[tuple[float, int]]]]  # [shard][query], each sorted by distance, then label


def padded(answers: Answers, k: int) -> tuple[np.ndarray, np.ndarray]:
    labels = np.full((len(answers), len(answers[0]), k), -1, np.int64)
    distances = np.full(labels.shape, np.inf, np.float32)
    for s, shard in enumerate(answers):
        for q, row in enumerate(shard):
            for i, (distance, label) in enumerate(row):
                labels[s, q, i], distances[s, q, i] = label, distance
    return labels, distances


def by_hand(answers: Answers, query: int, k: int) -> list[tuple[float, int, int]]:
    """Sorted by distance, then shard, then label; the first of each label."""
    rows = sorted((d, s, label) for s, shard in enumerate(answers) for d, label in shard[query])
    seen: set[int] = set()
    return [(d, s, label) for d, s, label in rows if not (label in seen or seen.add(label))][:k]


@st.composite
def shard_answers(draw: st.DrawFn) -> tuple[Answers, int]:
    k, n_shards, n_queries = draw(st.integers(1, 6)), draw(st.integers(1, 5)), draw(st.integers(1, 3))
    distance = st.sampled_from([-1.5, 0.0, 0.25, 0.5, 1.0, 2.0**127]) | st.floats(-10, 10, width=32)
    label = st.integers(0, 9) | st.integers(0, 2**63 - 1)
    row = st.lists(st.tuples(distance, label), max_size=k, unique_by=lambda hit: hit[1]).map(sorted)
    return [[draw(row) for _ in range(n_queries)] for _ in range(n_shards)], k


@fixed(400)
@given(case=shard_answers())
def test_like_a_sort(case: tuple[Answers, int]) -> None:
    answers, k = case
    labels, distances, shards = merge(*padded(answers, k))
    assert (labels.dtype, distances.dtype, shards.dtype) == (np.int64, np.float32, np.int32)
    assert labels.shape == distances.shape == shards.shape == (len(answers[0]), k)
    for q in range(len(answers[0])):
        expected = by_hand(answers, q, k)
        found = list(zip(distances[q].tolist(), shards[q].tolist(), labels[q].tolist(), strict=True))
        assert found[: len(expected)] == expected
        assert found[len(expected) :] == [(np.inf, -1, -1)] * (k - len(expected))


def test_ties_and_copies() -> None:
    answers: Answers = [[[(1.0, 9), (2.0, 5)]], [[(1.0, 3), (2.0, 4)]], [[(0.5, 5), (1.0, 9)]]]
    labels, distances, shards = merge(*padded(answers, 5))
    assert labels.tolist() == [[5, 9, 3, 4, -1]]
    assert distances.tolist() == [[0.5, 1.0, 1.0, 2.0, np.inf]]
    assert shards.tolist() == [[2, 0, 1, 1, -1]]


def test_one_shard_is_its_answer() -> None:
    labels = np.array([[[3, 1, -1], [7, 8, 9]]])
    distances = np.array([[[0.5, 0.75, np.inf], [1, 2, 3]]], np.float32)
    merged = merge(labels, distances)
    assert (merged[0] == labels[0]).all()
    assert (merged[1] == distances[0]).all()
    assert merged[2].tolist() == [[0, 0, -1], [0, 0, 0]]


def test_an_empty_shard_and_no_queries() -> None:
    labels, _, shards = merge(*padded([[[]], [[(1.0, 1)]]], 2))
    assert (labels.tolist(), shards.tolist()) == ([[1, -1]], [[1, -1]])
    labels, distances, shards = merge(np.empty((2, 0, 3), np.int64), np.empty((2, 0, 3), np.float32))
    assert labels.shape == distances.shape == shards.shape == (0, 3)


def test_no_shards_at_all() -> None:
    labels, distances, shards = np.zeros((1, 2), np.int64), np.zeros((1, 2), np.float32), np.zeros((1, 2), np.int32)
    status = lib.cotra_merge(
        ffi.NULL,
        ffi.NULL,
        0,
        1,
        2,
        ffi.from_buffer("int64_t[]", labels),
        ffi.from_buffer("float[]", distances),
        ffi.from_buffer("int32_t[]", shards),
        new_error(),
    )
    assert status == 0
    assert labels.tolist() == [[-1, -1]]


@pytest.mark.parametrize("order", ["F", "C"])
def test_other_memory_orders_and_dtypes(order: str) -> None:
    answers: Answers = [[[(1.0, 1), (4.0, 4)], [(2.0, 2)]], [[(3.0, 3)], [(0.5, 5), (9.0, 6)]]]
    labels, distances = padded(answers, 2)
    merged = merge(np.array(labels.astype(np.int32), order=order), np.array(distances.astype(np.float64), order=order))
    assert merged[0].tolist() == [[1, 3], [5, 2]]
