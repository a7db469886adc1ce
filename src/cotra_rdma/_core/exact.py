"""Arithmetic whose results have the same bits on every CPU.

A build stores what it computes, so its results must not depend on the machine.
A floating-point sum depends on its order, and BLAS chooses that order by CPU and by number of threads.
The exponentials and logarithms of vector libraries differ in their last bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_BITS = 20  # bits of an operand: the sum of 4,096 products of two operands stays below 2^53
_AT_ONCE = 1 << 16  # the numbers of a block that is computed at once
# The sum of the two is ln 2. The first ends in zero bits.
_LN2_HIGH, _LN2_LOW = 0.6931471803691238, 1.9082149292705877e-10

Wide = npt.NDArray[np.float64]


def _whole(rows: npt.NDArray[Any]) -> tuple[Wide, npt.NDArray[np.intc]]:
    """Scales each row to whole numbers of at most 2^20 in size.

    Returns:
        The whole numbers as float64[n, d], and for each row the power of two that undoes the scaling, intc[n].
    """
    wide = np.asarray(rows, np.float64)
    _, exponents = np.frexp(np.maximum(wide.max(axis=1, initial=0), -wide.min(axis=1, initial=0)))
    exponents = (exponents - _BITS).astype(np.intc)
    scaled: Wide = np.ldexp(wide, -exponents[:, np.newaxis])
    return np.rint(scaled, out=scaled), exponents


def products(rows: npt.NDArray[Any], others: npt.NDArray[Any]) -> Wide:
    """Computes the inner products of rows [n, d] with others [k, d].

    Each row is first rounded to 20 bits of its largest component.
    Then all sums are exact, and their order does not matter.

    Args:
        rows: [n, d], with d at most 4,096.
        others: [k, d].

    Returns:
        float64[n, k].
    """
    a, by_a = _whole(rows)
    b, by_b = _whole(others)
    found: Wide = a @ b.T
    np.ldexp(found, by_a[:, np.newaxis] + by_b, out=found)
    return found


def long_products(rows: npt.NDArray[Any], others: npt.NDArray[Any]) -> Wide:
    """Computes inner products as `products` does, for rows of any length.

    It works on some components at a time, so that it takes little memory.
    """
    total = np.zeros((len(rows), len(others)))
    step = min(4096, max(32, _AT_ONCE // max(len(rows), len(others), 1)))
    for start in range(0, rows.shape[1], step):
        total += products(rows[:, start : start + step], others[:, start : start + step])
    return total


def exp(values: npt.NDArray[Any]) -> Wide:
    """Computes e to the power of each value.

    The result is 0 for a value below -700.
    The relative error is about 1e-15.
    """
    x = np.clip(np.asarray(values, np.float64), -700, 700)
    n = np.rint(x * 1.4426950408889634)
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    total = np.ones_like(r)
    for i in range(13, 0, -1):  # Horner's rule in separate operations, so that nothing is fused
        total = total * r / i + 1
    return np.where(np.asarray(values) < -700, 0, np.ldexp(total, n.astype(np.intc)))


def log(values: npt.NDArray[Any]) -> Wide:
    """Computes the natural logarithm of each value.

    All values must be above 0.
    The relative error is about 1e-15.
    """
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
    """Solves matrix x = right by Gaussian elimination, row by row.

    Args:
        matrix: [n, n], symmetric and positive definite.
        right: [n].

    Returns:
        x as float64[n].
    """
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
    """Approximates the eigenvectors of the n largest eigenvalues of a symmetric matrix.

    The method is subspace iteration: the rows are multiplied by the matrix and made orthogonal, `steps` times.
    Eigenvectors whose eigenvalues are nearly equal may be mixed with each other.

    Args:
        matrix: [dim, dim].
        n: how many eigenvectors.
        steps: iterations.

    Returns:
        The eigenvectors as rows, the one of the largest eigenvalue first: float64[n, dim].
    """
    dim = len(matrix)
    a = np.asarray(matrix, np.float64)
    rows = np.zeros((n, dim))
    order = np.argsort(-np.diag(a), kind="stable")[:n]
    rows[np.arange(n), order] = 1
    for _ in range(steps):
        rows = _orthogonal(long_products(rows, a))
    # the matrix within the subspace, which gives the order of the directions
    turned = long_products(long_products(rows, a), rows)
    values = np.diag(turned)
    return rows[np.argsort(-values, kind="stable")]


def _orthogonal(rows: Wide) -> Wide:
    """Makes rows orthonormal by the Gram-Schmidt process, with each projection done twice.

    A row that vanishes stays as it is.
    """
    made = np.zeros_like(rows)
    for i, row in enumerate(rows):
        for _ in range(2):
            for before in made[:i]:
                row = row - (row * before).sum() * before
        length = np.sqrt((row * row).sum())
        made[i] = row / length if length > 0 else row
    return made
