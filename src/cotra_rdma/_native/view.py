"""What a reader keeps of one shard."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import numpy.typing as npt

from cotra_rdma._core.query_checks import check_rows
from cotra_rdma._core.remote_expansion import EXPANSION_DTYPE, PUSH_DTYPE, Expansions
from cotra_rdma._native.arena import Arena
from cotra_rdma._native.channel import DEFAULT_TIMEOUT_S, Channel
from cotra_rdma._native.image import ImageInfo
from cotra_rdma._native.library import Handle, check, ffi, lib, new_error
from cotra_rdma._native.search_call import EXPANSIONS, FLOATS, NUMBERS, PUSHES, buffer_of


class View(Handle):
    """What a reader keeps of one shard: its header and upper layers, read once over a channel and validated.

    Read-only afterwards: engines of several threads may share it.
    """

    @classmethod
    def open(cls, channel: Channel, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> Self:
        """Reads and validates header and navigation section. Raises `FormatError`, `ChecksumError`, `TransportError`."""
        out, err = ffi.new("cotra_view **"), new_error()
        check(lib.cotra_view_open(channel.ptr, round(timeout_s * 1e9), out, err), err)
        return cls(out[0])

    @classmethod
    def load(cls, data: bytes | bytearray | memoryview) -> Self:
        """Of header and navigation section, one after the other, that came another way: they are copied and validated.

        Raises `FormatError`, `ChecksumError`.
        """
        out, err = ffi.new("cotra_view **"), new_error()
        check(lib.cotra_view_load(ffi.from_buffer(data), len(data), out, err), err)
        return cls(out[0])

    def expand(self, arena: Arena, queries: npt.NDArray[np.float32], pushes: npt.NDArray[np.void]) -> Expansions:
        """Expands nodes of the image in `arena`, this view's, for somebody else's walks: an owner's side of `Helper.expand`.

        Args:
            queries: float32[n_queries, dim].
            pushes: `PUSH_DTYPE`[n]; those of one query follow each other.

        Raises `InvalidInputError` for a query or row that is not there. Any thread may call it; the GIL is released.
        """
        info = self.info
        queries = check_rows(queries, info.dim)
        pushes = np.ascontiguousarray(pushes, PUSH_DTYPE)
        found = np.empty(len(pushes), EXPANSION_DTYPE)
        numbers = np.empty(len(pushes) * info.degree, np.uint32)
        estimates, weights = np.empty(len(numbers), np.float32), np.empty(len(numbers), np.float32)
        n, err = ffi.new("uint64_t *"), new_error()
        status = lib.cotra_view_expand(
            self.ptr,
            arena.ptr,
            buffer_of(FLOATS, queries),
            len(queries),
            buffer_of(PUSHES, pushes),
            len(pushes),
            buffer_of(EXPANSIONS, found),
            buffer_of(NUMBERS, numbers),
            buffer_of(FLOATS, estimates),
            buffer_of(FLOATS, weights),
            n,
            err,
        )
        check(status, err)
        return Expansions(found, numbers[: n[0]], estimates[: n[0]], weights[: n[0]])

    def _destroy(self, ptr: Any) -> None:
        lib.cotra_view_close(ptr)

    @property
    def info(self) -> ImageInfo:
        """The image's header."""
        raw, nbytes = ffi.new("cotra_image_info *"), ffi.new("uint64_t *")
        lib.cotra_view_get_info(self.ptr, raw, nbytes)
        return ImageInfo.from_c(raw)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the view holds."""
        raw, nbytes = ffi.new("cotra_image_info *"), ffi.new("uint64_t *")
        lib.cotra_view_get_info(self.ptr, raw, nbytes)
        return int(nbytes[0])
