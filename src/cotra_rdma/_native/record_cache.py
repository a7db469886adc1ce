"""The records that walks read most often, kept by the reader."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from cotra_rdma._native.library import Handle, check, ffi, lib, new_error
from cotra_rdma._native.view import View
from cotra_rdma.errors import InvalidInputError


@dataclass(frozen=True, slots=True)
class CacheInfo:
    """A cache's memory in bytes, all in all; how many records it may hold, and how many it holds now."""

    nbytes: int
    places: int
    records: int


class RecordCache(Handle):
    """The records of one shard that walks read most often, as many as fit a budget: each is taken from here in place of a READ.

    Engines of several threads may share it; none of them waits for another. A record takes the place of another only when
    it was asked for more often of late: TinyLFU (Einziger, Friedman, Manes, ACM Transactions on Storage 13(4), 2017).
    """

    @classmethod
    def create(cls, view: View, budget_bytes: int) -> Self:
        """For the shard of `view`; never takes more than the budget, nor than all records need. Raises `InvalidInputError`
        where the budget holds no record."""
        if not 0 <= budget_bytes < 2**63:
            raise InvalidInputError(f"a cache cannot have {budget_bytes} bytes")
        out, err = ffi.new("cotra_cache **"), new_error()
        check(lib.cotra_cache_create(view.ptr, budget_bytes, out, err), err)
        return cls(out[0])

    def _destroy(self, ptr: Any) -> None:
        lib.cotra_cache_destroy(ptr)

    @property
    def info(self) -> CacheInfo:
        """Memory and records."""
        raw = ffi.new("cotra_cache_info *")
        lib.cotra_cache_get_info(self.ptr, raw)
        return CacheInfo(raw.bytes, raw.places, raw.records)

    def put(self, row: int, record: bytes | memoryview | npt.NDArray[np.uint8]) -> None:
        """Keeps a record (all its bytes) that was read another way, as if it were read often; a broken one is not kept."""
        lib.cotra_cache_put(self.ptr, row, ffi.from_buffer(record))

    def clear(self) -> None:
        """Forgets all records, and how often each was asked for."""
        lib.cotra_cache_clear(self.ptr)
