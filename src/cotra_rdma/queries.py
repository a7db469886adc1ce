"""The checks that queries and filters go through, wherever they come in."""

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


def pack_filter(rows: npt.ArrayLike | bytes | None, count: int) -> bytes | None:
    """Makes a filter bitmap: bit i (of byte i // 8, lowest first) = local row i may be returned. None lets all through.

    Args:
        rows: bool[count], or a bitmap already: bytes or uint8[>= ceil(count / 8)].
        count: rows of the shard.

    Raises:
        InvalidInputError: a filter for another number of rows.
    """
    if rows is None:
        return None
    given = np.frombuffer(rows, np.uint8) if isinstance(rows, bytes | bytearray | memoryview) else np.asarray(rows)
    if given.dtype == np.bool_ and given.shape == (count,):
        given = np.packbits(given, bitorder="little")
    if given.dtype != np.uint8 or given.ndim != 1 or len(given) < (count + 7) // 8:
        raise InvalidInputError(
            f"a filter is bool[{count}] or a bitmap of {(count + 7) // 8} bytes, not {given.dtype}{list(given.shape)}"
        )
    return given.tobytes()
