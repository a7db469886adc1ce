"""Coarse tables: what they say of a shard, and what bytes are refused."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotra_rdma._routing.coarse_table import CoarseTable, check_tables
from cotra_rdma.errors import FormatError, InvalidInputError

Floats = npt.NDArray[np.float32]


def table(n_lists: int = 3, dim: int = 4, scale: float = 1.0) -> CoarseTable:
    generator = np.random.default_rng(n_lists)
    return CoarseTable(
        (generator.normal(size=(n_lists, dim)) * scale).astype(np.float32),
        np.arange(1, n_lists + 1, dtype=np.int64),
        np.ones(n_lists, np.float32),
    )


def test_a_shard_in_a_few_kib(words: Floats) -> None:
    made, clusters = CoarseTable.build(words[:5000], metric="cosine", seed=1)
    assert (len(made), made.dim, made.count) == (64, 100, 5000)
    assert np.bincount(clusters.assignment).tolist() == made.sizes.tolist()
    data = made.encode()
    assert len(data) == 16 + 64 * (2 * 100 + 8) < 16 << 10
    read = CoarseTable.decode(data)
    assert read.encode() == data
    assert np.array_equal(read.sizes, made.sizes)
    assert np.array_equal(read.radii, made.radii)
    lost = np.linalg.norm(read.centroids - made.centroids, axis=1)
    assert (lost < 0.001 * made.radii).all()


def test_small_shards_have_fewer_lists_and_no_empty_ones() -> None:
    generator = np.random.default_rng(1)
    assert len(CoarseTable.build(generator.normal(size=(100, 3)))[0]) == 12
    assert len(CoarseTable.build(generator.normal(size=(3, 3)))[0]) == 1
    made, clusters = CoarseTable.build(np.repeat(np.eye(3), 100, axis=0))
    assert made.sizes.tolist() == [100, 100, 100]
    assert np.bincount(clusters.assignment).tolist() == [100, 100, 100]


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1.0, 255.0, 1e6, 1e14])
def test_numbers_of_any_scale_survive(scale: float) -> None:
    made = table(scale=scale)
    read = CoarseTable.decode(memoryview(made.encode()))
    assert np.allclose(read.centroids, made.centroids, rtol=0, atol=2e-3 * scale)


@given(st.binary(max_size=200))
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(FormatError):
        CoarseTable.decode(data)


@given(st.integers(0, 16 + 3 * 16 - 1), st.integers(0, 255))
def test_changed_bytes_are_refused_or_make_a_sane_table(place: int, value: int) -> None:
    data = bytearray(table().encode())
    data[place] = value
    try:
        read = CoarseTable.decode(data)
    except FormatError:
        return
    assert np.isfinite(read.centroids).all()
    assert (read.radii >= 0).all()
    assert read.count > 0


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ((b"XXXX", 1, 2, 3, 4), "begin with"),
        ((b"CTCR", 2, 2, 3, 4), "version 2"),
        ((b"CTCR", 1, 3, 3, 4), "3-byte"),
        ((b"CTCR", 1, 2, 0, 4), "out of range"),
        ((b"CTCR", 1, 2, 3, 0), "out of range"),
        ((b"CTCR", 1, 2, 3, 1 << 30), "out of range"),
        ((b"CTCR", 1, 2, 4, 4), "do not fit"),
    ],
)
def test_headers_that_lie(header: tuple[Any, ...], reason: str) -> None:
    data = table().encode()
    with pytest.raises(FormatError, match=reason):
        CoarseTable.decode(struct.pack("<4sHHII", *header) + data[16:])
    for length in (0, 15, 16, len(data) - 1):
        with pytest.raises(FormatError):
            CoarseTable.decode(data[:length])


@pytest.mark.parametrize(
    "change",
    [
        {"centroids": np.full((3, 4), np.nan, np.float32)},
        {"centroids": np.full((3, 4), 1e30, np.float32)},
        {"centroids": np.ones((3, 4))},
        {"centroids": np.ones(3, np.float32)},
        {"centroids": np.ones((0, 4), np.float32)},
        {"sizes": np.zeros(3, np.int64)},
        {"sizes": np.array([1, -1, 1])},
        {"sizes": np.array([1, 1 << 32, 1])},
        {"sizes": np.ones(2, np.int64)},
        {"radii": np.array([1, -1, 1], np.float32)},
        {"radii": np.array([1, np.inf, 1], np.float32)},
        {"radii": np.array([1, np.nan, 1], np.float32)},
    ],
)
def test_tables_that_make_no_sense(change: dict[str, Any]) -> None:
    good = table()
    fields = {name: getattr(good, name) for name in ("centroids", "sizes", "radii")}
    with pytest.raises(FormatError, match="coarse table"):
        CoarseTable(**fields | change)


def test_tables_of_one_collection_agree() -> None:
    assert check_tables([table(), table(5)], "l2") == 4
    with pytest.raises(FormatError, match="same dimension"):
        check_tables([table(), table(dim=5)], "l2")
    with pytest.raises(FormatError, match="same dimension"):
        check_tables([], "l2")
    with pytest.raises(InvalidInputError, match="metric"):
        check_tables([table()], "manhattan")
    with pytest.raises(InvalidInputError, match="n_lists"):
        CoarseTable.build(np.ones((3, 3)), 0)
