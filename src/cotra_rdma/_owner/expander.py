"""The owner's side of remote expansion: it expands nodes of its shard for readers' walks, and gives away its upper layers."""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt

from cotra_rdma._core.query_checks import check_queries
from cotra_rdma._core.remote_expansion import Expansions
from cotra_rdma._native.arena import Arena
from cotra_rdma._native.image import ImageInfo
from cotra_rdma._native.view import View
from cotra_rdma.errors import InvalidInputError


class Expander:
    """Expands the nodes of one image. Any thread may use it."""

    def __init__(self, arena: Arena, info: ImageInfo) -> None:
        """Copies nothing yet. The upper layers are copied at the first expansion.

        Args:
            arena: holds the image. It stays the caller's; close it after the expander.
            info: the header of the image.
        """
        self._arena = arena
        self._info = info
        self._view: View | None = None
        self._lock = threading.Lock()

    @property
    def view_bytes(self) -> int:
        """The bytes of the header and the navigation section together."""
        return self._info.records_offset + self._info.nav_bytes

    def read_view(self, offset: int, n_bytes: int) -> bytes:
        """Reads a piece of the header and the navigation section, one after the other, as `View.load` takes them.

        Args:
            offset: where the piece begins.
            n_bytes: how long it is. It is shorter at the end.

        Raises:
            InvalidInputError: the offset is beyond the end.
        """
        if not 0 <= offset < self.view_bytes:
            raise InvalidInputError(f"the upper layers are {self.view_bytes} bytes: there are none at {offset}")
        end, header = min(offset + n_bytes, self.view_bytes), self._info.records_offset
        behind = self._info.nav_offset - header
        with self._arena.view() as memory:
            return bytes(memory[offset : min(end, header)]) + bytes(memory[max(offset, header) + behind : end + behind])

    def expand(self, queries: npt.NDArray[np.float32], pushes: npt.NDArray[np.void]) -> Expansions:
        """Expands nodes.

        Args:
            queries: float32[n_queries, dim].
            pushes: `PUSH_DTYPE`[n].

        Raises `InvalidInputError` for queries of another dim, or with NaN or infinity, and for a query or row that is not there;
        `ChecksumError` for a corrupt record.
        """
        rows = check_queries(queries, self._info.dim)
        with self._lock:
            view = self._view = self._view or View.load(self.read_view(0, self.view_bytes))
        return view.expand(self._arena, rows, pushes)

    def close(self) -> None:
        """Frees the copy of the upper layers. Idempotent."""
        if self._view is not None:
            self._view.close()
