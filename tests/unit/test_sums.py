"""Sums in a fixed order: right, and the same bits at every SIMD level and on every machine."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import pytest

from cotra_rdma._native import lib
from cotra_rdma.errors import InvalidInputError
from cotra_rdma.sums import add_products, exp, log, products, solve

LEVELS = range(lib.cotra_simd_best() + 1)


def numbers(*shape: int, seed: int = 0) -> npt.NDArray[np.float64]:
    """The same on every machine: a generator's uniform numbers are made of whole ones."""
    return np.random.default_rng(seed).random(shape) - 0.5


@pytest.mark.parametrize(("n", "m", "dim"), [(1, 1, 1), (12, 32, 256), (13, 33, 257), (100, 70, 600), (5, 3, 4096)])
def test_products_are_right_and_the_same_at_every_level(n: int, m: int, dim: int) -> None:
    a, b = numbers(n, dim, seed=1).astype(np.float32), numbers(m, dim, seed=2).astype(np.float32)
    found = [products(a, b, simd=level) for level in LEVELS]
    np.testing.assert_allclose(found[0], a.astype(np.float64) @ b.T.astype(np.float64), atol=1e-4)
    totals = [np.full((n, m), 7.0) for _ in LEVELS]
    for total, level in zip(totals, LEVELS, strict=True):
        add_products(total, a.T, b.T, simd=level)
    np.testing.assert_allclose(totals[0] - 7, a.astype(np.float64) @ b.T.astype(np.float64), atol=1e-12)
    for level in LEVELS:
        assert np.array_equal(found[level], found[0])
        assert np.array_equal(totals[level], totals[0])


def test_a_row_has_the_same_products_wherever_it_is() -> None:
    a, b = numbers(40, 300, seed=3), numbers(50, 300, seed=4)
    whole = products(a, b)
    for row, column in ((0, 0), (17, 3), (39, 49)):
        assert products(a[row : row + 1], b[column : column + 1])[0, 0] == whole[row, column]


def test_exp_and_log_are_those_of_numpy_to_the_last_bits() -> None:
    values = 100 * numbers(20_000)
    np.testing.assert_allclose(exp(values), np.exp(values), rtol=5e-16)
    np.testing.assert_allclose(log(np.exp(values)), values, rtol=1e-15, atol=1e-15)
    assert exp([0.0, -np.inf, np.inf]).tolist() == exp([0, -708, 708]).tolist()
    assert exp([0.0])[0] == 1
    assert log([1.0])[0] == 0


def test_solve() -> None:
    half = numbers(60, 40)
    square, wanted = half.T @ half + np.eye(40), numbers(40, seed=1)
    np.testing.assert_allclose(solve(square, square @ wanted), wanted, atol=1e-12)


DIGESTS = ["fbe8a5361eb0063c", "4041c3f581603002", "d8681a437cc0564b", "11b2b95b33ccfa05", "0b22195f3c573ebd"]


def test_the_bits_are_those_of_every_machine() -> None:
    a, b = numbers(30, 300, seed=5), numbers(40, 300, seed=6)
    square = np.zeros((30, 30))
    add_products(square, a.T, a.T)
    results = (products(a, b), square, solve(square + np.eye(30), a[:, 0]), exp(20 * a), log(a + 0.75))
    assert [hashlib.sha256(result.tobytes()).hexdigest()[:16] for result in results] == DIGESTS


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="no products"):
        products(numbers(2, 3), numbers(2, 4))
    with pytest.raises(ValueError, match="products of shapes"):
        add_products(np.zeros((3, 3)), numbers(2, 3), numbers(2, 4))
    with pytest.raises(ValueError, match="a vector of 3"):
        solve(np.eye(2), np.zeros(3))
    with pytest.raises(InvalidInputError, match="neon"):
        products(numbers(1, 1), numbers(1, 1), simd=lib.COTRA_SIMD_NEON)
