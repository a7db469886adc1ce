"""Arithmetic whose results are the same bits on every CPU, whatever BLAS does and with how many threads.

A build keeps what it computes, so it may not depend on the machine. Floating-point sums depend on their order, and BLAS
chooses that by CPU and by threads; exponentials and logarithms of a vector library differ in their last bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_BITS = 20  # of an operand: 4,096 products of two of them add up to less than 2^53
_AT_ONCE = 1 << 16  # numbers
_LN2_HIGH, _LN2_LOW = 0.6931471803691238, 1.9082149292705877e-10  # their sum is ln 2; the first has trailing zeros

Wide = npt.NDArray[np.float64]


def _whole(rows: npt.NDArray[Any]) -> tuple[Wide, npt.NDArray[np.intc]]:
    """Rows as whole numbers of at most 2^20 in size, and the power of two to multiply each by."""
    wide = np.asarray(rows, np.float64)
    _, exponents = np.frexp(np.maximum(wide.max(axis=1, initial=0), -wide.min(axis=1, initial=0)))
    exponents = (exponents - _BITS).astype(np.intc)
    scaled: Wide = np.ldexp(wide, -exponents[:, np.newaxis])
    return np.rint(scaled, out=scaled), exponents


def products(rows: npt.NDArray[Any], others: npt.NDArray[Any]) -> Wide:
    """The inner products of rows [n, d] with others [k, d], d at most 4,096: float64[n, k].

    Each row is rounded to 20 bits of its largest component. Then all sums are exact, and their order does not matter.
    """
    a, by_a = _whole(rows)
    b, by_b = _whole(others)
    found: Wide = a @ b.T
    np.ldexp(found, by_a[:, np.newaxis] + by_b, out=found)
    return found


def long_products(rows: npt.NDArray[Any], others: npt.NDArray[Any]) -> Wide:
    """The same of rows of any length, some components at a time: so many that little memory is taken."""
    total = np.zeros((len(rows), len(others)))
    step = min(4096, max(32, _AT_ONCE // max(len(rows), len(others), 1)))
    for start in range(0, rows.shape[1], step):
        total += products(rows[:, start : start + step], others[:, start : start + step])
    return total


def exp(values: npt.NDArray[Any]) -> Wide:
    """e to the power of each value; 0 below -700. Relative error about 1e-15."""
    x = np.clip(np.asarray(values, np.float64), -700, 700)
    n = np.rint(x * 1.4426950408889634)
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    total = np.ones_like(r)
    for i in range(13, 0, -1):  # Horner, in separate operations: nothing is fused
        total = total * r / i + 1
    return np.where(np.asarray(values) < -700, 0, np.ldexp(total, n.astype(np.intc)))


def log(values: npt.NDArray[Any]) -> Wide:
    """The natural logarithm of each value, all of which are above 0. Relative error about 1e-15."""
    m, n = np.frexp(np.asarray(values, np.float64))
    low = m < 0.7071067811865476
    m, n = np.where(low, 2 * m, m), n - low
    s = (m - 1) / (m + 1)  # ln m = 2 (s + s^3/3 + s^5/5 + ...), |s| <= 0.172
    square = s * s
    total = np.zeros_like(s)
    for i in range(23, 0, -2):
        total = total * square + 1 / i
    return np.asarray(2 * s * total + n * _LN2_LOW + n * _LN2_HIGH)


def solve(matrix: npt.NDArray[Any], right: npt.NDArray[Any]) -> Wide:
    """x with matrix x = right, of a symmetric positive definite matrix [n, n]: elimination, row by row."""
    a, x = np.array(matrix, np.float64), np.array(right, np.float64)
    n = len(a)
    for i in range(n):
        factors = a[i + 1 :, i] / a[i, i]
        a[i + 1 :, i:] -= factors[:, np.newaxis] * a[i, i:]
        x[i + 1 :] -= factors * x[i]
    for i in range(n - 1, -1, -1):
        x[i] /= a[i, i]
        x[:i] -= a[:i, i] * x[i]
    return x


def widest(matrix: npt.NDArray[Any], n: int, steps: int = 40) -> Wide:
    """About the eigenvectors of the n largest eigenvalues of a symmetric matrix [dim, dim], as rows, the largest first.

    Subspace iteration: `steps` times the matrix, with the rows made orthogonal each time. Rows whose eigenvalues are
    nearly the same need not be told apart.
    """
    dim = len(matrix)
    a = np.asarray(matrix, np.float64)
    rows = np.zeros((n, dim))
    order = np.argsort(-np.diag(a), kind="stable")[:n]
    rows[np.arange(n), order] = 1
    for _ in range(steps):
        rows = _orthogonal(long_products(rows, a))
    turned = long_products(long_products(rows, a), rows)  # the matrix within the subspace: order its directions
    values = np.diag(turned)
    return rows[np.argsort(-values, kind="stable")]


def _orthogonal(rows: Wide) -> Wide:
    """Gram and Schmidt's, twice each; a row that vanishes stays zero."""
    made = np.zeros_like(rows)
    for i, row in enumerate(rows):
        for _ in range(2):
            for before in made[:i]:
                row = row - (row * before).sum() * before
        length = np.sqrt((row * row).sum())
        made[i] = row / length if length > 0 else row
    return made
