"""The one check that queries go through, wherever they come in."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cotra_rdma.errors import InvalidInputError


def check_queries(queries: npt.ArrayLike, dim: int) -> npt.NDArray[np.float32]:
    """Makes float32[n, dim] (C-contiguous) of queries, one of which may be given as [dim].

    Raises `InvalidInputError` for another dimension, and for NaN or infinity.
    """
    rows = np.asarray(queries)
    if rows.dtype != np.float32:
        if not (np.issubdtype(rows.dtype, np.floating) or np.issubdtype(rows.dtype, np.integer)):
            raise InvalidInputError(f"queries must be real numbers, not {rows.dtype}")
        with np.errstate(over="ignore"):
            rows = rows.astype(np.float32)
    if rows.ndim == 1:
        rows = rows[np.newaxis]
    if rows.ndim != 2 or rows.shape[1] != dim:
        raise InvalidInputError(f"queries must be float32[n, {dim}], not {rows.dtype}{list(np.shape(queries))}")
    # A sum is finite unless a component is not, or the sum overflows: only then look at each one.
    with np.errstate(over="ignore", invalid="ignore"):
        suspicious = not np.isfinite(rows.sum(dtype=np.float32))
    if suspicious:
        bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        if len(bad):
            raise InvalidInputError(f"query {int(bad[0])} holds NaN or infinity")
    return np.ascontiguousarray(rows)
