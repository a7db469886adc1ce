"""Checks of queries, filters and search parameters, the same at every entry point."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cotra_rdma.errors import InvalidInputError

MAX_COMPONENT = 1e15
"""The largest component of a vector, in absolute value. Squared distances between larger ones do not fit float32."""
MAX_EF, MAX_BEAM, MAX_INFLIGHT = 1 << 20, 256, 1024
MAX_TIMEOUT_S = 1e6
MAX_EXPANSIONS = 2**32 - 1


def as_array(values: npt.ArrayLike, what: str) -> npt.NDArray[Any]:
    """Makes an array of real numbers.

    Args:
        values: anything that numpy can turn into an array.
        what: the name of the values in an error message.

    Raises:
        InvalidInputError: the values are not real numbers, or the rows differ in length.
    """
    try:
        rows = np.asarray(values)
    except ValueError as error:
        raise InvalidInputError(f"{what} must be an array of numbers: {error}") from None
    if rows.dtype.kind not in "fiu":
        raise InvalidInputError(f"{what} must be real numbers, not {rows.dtype}")
    return rows


def check_finite(rows: npt.NDArray[np.float32], what: str, first: int = 0) -> None:
    """Checks that rows hold neither NaN, nor infinity, nor a component beyond 1e15.

    Args:
        rows: float32[n, dim].
        what: the name of a row in an error message.
        first: the number of the first row in an error message.

    Raises:
        InvalidInputError: a row fails the check. The message names the first such row.
    """
    if rows.size and not (  # NaN fails both comparisons
        np.minimum.reduce(rows, axis=None) >= -MAX_COMPONENT and np.maximum.reduce(rows, axis=None) <= MAX_COMPONENT
    ):
        bad = np.flatnonzero(~(np.abs(rows) <= MAX_COMPONENT).all(axis=1))[0]
        why = "a component beyond 1e15" if np.isfinite(rows[bad]).all() else "NaN or infinity"
        raise InvalidInputError(f"{what} {first + int(bad)} holds {why}")


def check_queries(queries: npt.ArrayLike, dim: int) -> npt.NDArray[np.float32]:
    """Makes C-contiguous float32[n, dim] of queries.

    Args:
        queries: [n, dim], or [dim] for one query.
        dim: the dimension of the collection.

    Raises:
        InvalidInputError: the dimension is another one, or a query holds NaN, infinity or a component beyond 1e15.
    """
    rows = as_array(queries, "queries")
    if rows.dtype != np.float32:
        with np.errstate(over="ignore"):
            rows = rows.astype(np.float32)
    if rows.ndim == 1:
        rows = rows[np.newaxis]
    if rows.ndim != 2 or rows.shape[1] != dim:
        raise InvalidInputError(f"queries must be float32[n, {dim}], not {rows.dtype}{list(np.shape(queries))}")
    check_finite(rows, "query")
    return np.ascontiguousarray(rows)


def check_search(k: int, ef: int, beam: int, inflight: int = 0, timeout_s: float | None = None) -> None:
    """Checks the parameters of a search.

    Raises:
        InvalidInputError: a parameter is out of its range.
    """
    plain = type(k) is type(ef) is type(beam) is type(inflight) is int
    if not (plain and 1 <= k <= ef <= MAX_EF and 1 <= beam <= MAX_BEAM and 0 <= inflight <= MAX_INFLIGHT):
        check_whole("ef", ef, 1, MAX_EF)
        check_whole("k", k, 1, ef, ", which is ef")
        check_whole("beam", beam, 1, MAX_BEAM)
        check_whole("inflight", inflight, 0, MAX_INFLIGHT)
    if timeout_s is not None:
        check_timeout(timeout_s)


def check_most(max_expansions: int | None) -> int:
    """Turns a bound on expansions into the number that C and the messages use, which is 0 for None.

    Raises:
        InvalidInputError: the bound is out of its range.
    """
    if max_expansions is None:
        return 0
    check_whole("max_expansions", max_expansions, 1, MAX_EXPANSIONS)
    return max_expansions


def check_whole(name: str, value: int, low: int, high: int, why: str = "") -> None:
    """Checks that `value` is a whole number in [low, high].

    Args:
        name: the name of the value in the error message.
        value: the value.
        low: the least value that is allowed.
        high: the largest value that is allowed.
        why: text that follows `high` in the error message.

    Raises:
        InvalidInputError: it is not.
    """
    if not isinstance(value, (int, np.integer)) or not low <= value <= high:
        raise InvalidInputError(f"{name} must be a whole number in [{low}, {high}{why}], not {value!r}")


def check_timeout(timeout_s: float) -> None:
    """Checks that a time-out in seconds is positive and at most `MAX_TIMEOUT_S`.

    Raises:
        InvalidInputError: it is not.
    """
    if not 0 < timeout_s <= MAX_TIMEOUT_S:
        raise InvalidInputError(f"timeout_s must be in (0, {MAX_TIMEOUT_S:g}], not {timeout_s!r}")


def check_rows(queries: npt.NDArray[np.float32], dim: int) -> npt.NDArray[np.float32]:
    """Makes queries C-contiguous float32, and checks their shape.

    Raises:
        InvalidInputError: the queries are not [n, dim].
    """
    if queries.ndim != 2 or queries.shape[1] != dim:
        raise InvalidInputError(f"queries must be float32[n, {dim}], not {queries.dtype}{list(queries.shape)}")
    return np.ascontiguousarray(queries, np.float32)


def pack_filter(rows: npt.ArrayLike | bytes | None, count: int) -> bytes | None:
    """Makes a filter bitmap.

    Bit i says whether row i of the shard may be in an answer.
    It is bit i % 8 of byte i // 8, counted from the lowest bit.

    Args:
        rows: bool[count]; or a bitmap, as bytes or uint8[ceil(count / 8)]; or None, which lets all rows through.
        count: the number of rows of the shard.

    Returns:
        The bitmap of ceil(count / 8) bytes, or None for None.

    Raises:
        InvalidInputError: the filter is for another number of rows.
    """
    if rows is None:
        return None
    given = np.frombuffer(rows, np.uint8) if isinstance(rows, bytes | bytearray | memoryview) else np.asarray(rows)
    if given.dtype == np.bool_ and given.shape == (count,):
        given = np.packbits(given, bitorder="little")
    if given.dtype != np.uint8 or given.ndim != 1 or len(given) != (count + 7) // 8:
        raise InvalidInputError(
            f"a filter is bool[{count}] or a bitmap of {(count + 7) // 8} bytes, not {given.dtype}{list(given.shape)}"
        )
    return given.tobytes()
