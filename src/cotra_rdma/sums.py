"""Sums in a fixed order, exp and log: the same bits on every CPU, with any BLAS and any number of threads.

What a build keeps is made of these, in the place of numpy's matrix products, `linalg`, `exp` and `log`, whose last bits depend
on the machine. numpy's other operations are elementwise, or sums whose order numpy alone decides.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cotra_rdma._native import check, ffi, lib, new_error

Floats = npt.NDArray[np.float32]
Wide = npt.NDArray[np.float64]


def products(a: npt.ArrayLike, b: npt.ArrayLike, *, simd: int | None = None) -> Floats:
    """Inner products of rows [n, dim] and rows [m, dim]: float32[n, m]. `simd`: a COTRA_SIMD_* level; None: the best."""
    rows, others = np.ascontiguousarray(a, np.float32), np.ascontiguousarray(b, np.float32)
    if rows.ndim != 2 or others.ndim != 2 or rows.shape[1] != others.shape[1]:
        raise ValueError(f"rows of shapes {rows.shape} and {others.shape} have no products")
    out, err = np.empty((len(rows), len(others)), np.float32), new_error()
    buffers = [ffi.from_buffer("float[]", array) for array in (rows, others, out)]
    level = lib.cotra_simd_best() if simd is None else simd
    check(
        lib.cotra_sums_products(level, buffers[0], len(rows), buffers[1], len(others), rows.shape[1], buffers[2], err),
        err,
    )
    return out


def add_products(out: Wide, a: npt.ArrayLike, b: npt.ArrayLike, *, simd: int | None = None) -> None:
    """Adds to out[f, g] the products of the columns of a[n, f] and b[n, g], in float64."""
    left, right = np.ascontiguousarray(a, np.float64), np.ascontiguousarray(b, np.float64)
    if left.ndim != 2 or right.ndim != 2 or len(left) != len(right) or out.shape != (left.shape[1], right.shape[1]):
        raise ValueError(f"products of shapes {left.shape} and {right.shape} are not {out.shape}")
    buffers, err = [ffi.from_buffer("double[]", array) for array in (left, right, out)], new_error()
    level = lib.cotra_simd_best() if simd is None else simd
    check(
        lib.cotra_sums_add(
            level, buffers[0], *left.shape[1:], buffers[1], *right.shape[1:], len(left), buffers[2], err
        ),
        err,
    )


def solve(matrix: npt.ArrayLike, vector: npt.ArrayLike) -> Wide:
    """The x float64[n] of matrix x = vector, for a symmetric, positive definite matrix; of another one x may not be finite."""
    square, found = np.array(matrix, np.float64, order="C"), np.array(vector, np.float64)
    if square.shape != (len(found), len(found)):
        raise ValueError(f"a matrix of shape {square.shape} and a vector of {len(found)}")
    lib.cotra_sums_solve(ffi.from_buffer("double[]", square), ffi.from_buffer("double[]", found), len(found))
    return found


def exp(values: npt.ArrayLike) -> Wide:
    """e^x elementwise; below -708 it is that of -708, and above 708 that of 708."""
    found = np.ascontiguousarray(np.clip(np.asarray(values, np.float64), -708, 708))
    lib.cotra_sums_exp(ffi.from_buffer("double[]", found), found.size)
    return found


def log(values: npt.ArrayLike) -> Wide:
    """ln x elementwise, of normal numbers above 0."""
    found: npt.NDArray[Any] = np.array(values, np.float64, order="C")
    lib.cotra_sums_log(ffi.from_buffer("double[]", found), found.size)
    return found
