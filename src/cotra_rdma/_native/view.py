"""`View`: a reader's validated copy of a shard's header and navigation section."""

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
    """A reader's private copy of a shard's header and navigation section.

    It is read once over a channel, and validated.
    It is read-only afterwards, so engines of several threads may share it.
    """

    @classmethod
    def open(cls, channel: Channel, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> Self:
        """Reads and validates the header and the navigation section.

        Args:
            channel: READs the shard's region.
            timeout_s: the longest wait for one READ, in seconds.

        Raises:
            FormatError: the image is malformed.
            ChecksumError: a checksum is wrong.
            TransportError: a READ failed.
        """
        out, err = ffi.new("cotra_view **"), new_error()
        check(lib.cotra_view_open(channel.ptr, round(timeout_s * 1e9), out, err), err)
        return cls(out[0])

    @classmethod
    def load(cls, data: bytes | bytearray | memoryview) -> Self:
        """Makes a view of a header and a navigation section that came in another way.

        Args:
            data: the header, followed by the navigation section. The bytes are copied and validated.

        Raises:
            FormatError: the image is malformed.
            ChecksumError: a checksum is wrong.
        """
        out, err = ffi.new("cotra_view **"), new_error()
        check(lib.cotra_view_load(ffi.from_buffer(data), len(data), out, err), err)
        return cls(out[0])

    def expand(self, arena: Arena, queries: npt.NDArray[np.float32], pushes: npt.NDArray[np.void]) -> Expansions:
        """Expands nodes of this view's image, for the walks of a reader.

        An owner calls it to answer `Helper.expand`.
        Any thread may call it.
        The GIL is released.

        Args:
            arena: holds the image.
            queries: float32[n_queries, dim].
            pushes: `PUSH_DTYPE`[n]. The pushes of one query follow each other.

        Returns:
            The replies, in the order of the pushes.

        Raises:
            InvalidInputError: a push names a query or a row that does not exist.
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
        """The bytes of memory that the view holds."""
        raw, nbytes = ffi.new("cotra_image_info *"), ffi.new("uint64_t *")
        lib.cotra_view_get_info(self.ptr, raw, nbytes)
        return int(nbytes[0])
