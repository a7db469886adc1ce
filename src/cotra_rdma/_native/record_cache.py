"""`RecordCache`: a reader's copies of the records that walks use most often."""

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
    """The size of a record cache.

    Attributes:
        nbytes: all memory of the cache, in bytes.
        places: how many records it may hold.
        records: how many records it holds now.
    """

    nbytes: int
    places: int
    records: int


class RecordCache(Handle):
    """Holds the records of one shard that walks use most often, as many as fit a budget.

    A walk takes a record from the cache in place of a READ.
    Engines of several threads may share a cache, and none of them waits for another.
    A record takes the place of another only if walks recently asked for it more often.
    The rule is TinyLFU (Einziger, Friedman, Manes, ACM Transactions on Storage 13(4), 2017).
    """

    @classmethod
    def create(cls, view: View, budget_bytes: int) -> Self:
        """Makes a cache for the shard of `view`.

        It never takes more memory than the budget, nor more than all records need.

        Raises:
            InvalidInputError: the budget does not hold a single record.
        """
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
        """Keeps a record that was read in another way, as if it were read often.

        Args:
            row: the record's row.
            record: all bytes of the record. A broken record is not kept.
        """
        lib.cotra_cache_put(self.ptr, row, ffi.from_buffer(record))

    def clear(self) -> None:
        """Forgets all records, and how often each was asked for."""
        lib.cotra_cache_clear(self.ptr)
