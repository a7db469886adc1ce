"""Arguments that every search in C takes: buffers, a deadline, pauses, filters and masks."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cotra_rdma._core.stop import LOOK_S, Stop
from cotra_rdma._native.library import ffi
from cotra_rdma.errors import InvalidInputError

buffer_of = ffi.from_buffer
FLOATS, LABELS, PLACES = ffi.typeof("float[]"), ffi.typeof("int64_t[]"), ffi.typeof("int32_t[]")
STATS = ffi.typeof("cotra_query_stats[]")
PUSHES, EXPANSIONS = ffi.typeof("cotra_push[]"), ffi.typeof("cotra_expansion[]")
NUMBERS = ffi.typeof("uint32_t[]")
WATCH = ffi.typeof("cotra_watch[]")
PAUSE_NS = round(LOOK_S * 1e9)
"""The time until a search pauses first, in nanoseconds. `pause_ns` gives the time until each further pause."""


def end_by(params: Any, deadline: float, stop: Stop | None) -> Any:
    """Sets the fields of a search's parameters that can end it early.

    Args:
        params: the C struct of the search's parameters.
        deadline: the end of the search on `time.monotonic`'s clock; infinity for none.
        stop: ends the search, or None.

    Returns:
        What must live as long as the search.
    """
    params.deadline_ns = 0 if deadline == math.inf else max(1, round(deadline * 1e9))
    params.watch = watch = ffi.NULL if stop is None else buffer_of(WATCH, stop.memory)
    return watch


def pause_ns(stop: Stop | None) -> int:
    """Returns the time until the next pause, for a search that is in a pause. 0 means no more pauses.

    Python handles signals such as Ctrl-C only in its main thread, and only between two calls of C.
    A search in another thread is ended by the thread that waits for it.
    Such a search pauses only to report its progress, since each pause takes the GIL.
    """
    if stop is not None and stop.is_heard:
        stop.tell()
    elif threading.get_ident() != threading.main_thread().ident:
        return 0
    return PAUSE_NS


def search_scope(
    filters: Sequence[bytes | None] | None, mask: npt.NDArray[np.bool_] | None, n_queries: int, n_shards: int
) -> tuple[Any, list[Any]]:
    """Makes a `cotra_search_scope *` of filters and a mask.

    Args:
        filters: as `Engine.search` takes them.
        mask: as `Engine.search` takes it.
        n_queries: the number of queries.
        n_shards: the number of shards.

    Returns:
        The scope, and the objects that it points into.

    Raises:
        InvalidInputError: the filters or the mask are for another number of shards or queries.
    """
    if filters is None and mask is None:
        return ffi.NULL, []
    scope, held = ffi.new("cotra_search_scope *"), []
    if filters is not None:
        if len(filters) != n_shards:
            raise InvalidInputError(f"{len(filters)} filters for {n_shards} shards")
        buffers = [ffi.NULL if bitmap is None else ffi.from_buffer("uint8_t[]", bitmap) for bitmap in filters]
        pointers = ffi.new("uint8_t *[]", buffers)
        lengths = ffi.new("uint64_t[]", [0 if bitmap is None else len(bitmap) for bitmap in filters])
        scope.filters, scope.filter_bytes = pointers, lengths
        held += [buffers, pointers, lengths]
    if mask is not None:
        bits = np.ascontiguousarray(mask, np.uint8)
        if bits.shape != (n_queries, n_shards):
            raise InvalidInputError(f"a mask must be bool[{n_queries}, {n_shards}], not {list(bits.shape)}")
        scope.mask = ffi.from_buffer("uint8_t[]", bits)
        held.append(bits)
    return scope, held
