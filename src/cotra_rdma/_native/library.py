"""The only importer of the compiled module.

It offers `ffi` and `lib`, and the one function that turns a status into an exception.
"""

from __future__ import annotations

import os
import threading
from types import TracebackType
from typing import Any, Self

from cotra_rdma import errors
from cotra_rdma._cotra import ffi, lib

__all__ = ["Handle", "check", "ffi", "lib", "new_error"]


def new_error() -> Any:
    """Makes a new `cotra_error *`, the last argument of a call."""
    err = ffi.new(_ERROR)
    err.shard = -1
    return err


_ERROR = ffi.typeof("cotra_error *")


_SIMPLE: dict[int, type[errors.CotraError]] = {
    lib.COTRA_ERR_ARGUMENT: errors.InvalidInputError,
    lib.COTRA_ERR_UNAVAILABLE: errors.VerbsUnavailableError,
    lib.COTRA_ERR_NO_DEVICE: errors.DeviceNotFoundError,
    lib.COTRA_ERR_MEMLOCK: errors.MemlockError,
    lib.COTRA_ERR_FORMAT: errors.FormatError,
    lib.COTRA_ERR_CHECKSUM: errors.ChecksumError,
    lib.COTRA_ERR_BOUNDS: errors.BoundsError,
    lib.COTRA_ERR_DEADLINE: errors.DeadlineError,
    lib.COTRA_ERR_CLOSED: errors.ClosedError,
    lib.COTRA_ERR_LOSSY: errors.LossyVectorError,
    lib.COTRA_ERR_TRANSPORT: errors.TransportError,
    lib.COTRA_ERR_STALE: errors.StaleShardError,
    lib.COTRA_ERR_CANCELLED: errors.SearchCancelledError,
    lib.COTRA_ERR_SYSTEM: errors.CotraError,
}


def check(status: int, err: Any) -> int:
    """Raises the exception that `err` describes if `status` is an error, and returns `status` otherwise."""
    if status >= 0:
        return status
    message = ffi.string(err.message).decode("utf-8", "replace") or ffi.string(lib.cotra_status_name(status)).decode()
    shard = err.shard if err.shard >= 0 else None
    if status == lib.COTRA_ERR_NO_MEMORY:
        raise MemoryError(message)
    if status == lib.COTRA_ERR_COMPLETION:
        raise errors.CompletionError(
            message, shard=shard, sys_errno=err.sys_errno, wc_status=err.wc_status, vendor_error=err.vendor_error
        )
    raise _SIMPLE.get(status, errors.CotraError)(message, shard=shard, sys_errno=err.sys_errno)


class Handle:
    """Owns one C object, and the Python objects that must outlive it: parent handles and pinned buffers.

    `close()` is idempotent.
    A use after close raises `ClosedError`.
    A C object is destroyed when its handle and all handles that were made on it are closed.
    So a queue pair never loses its device, in whatever order a program or the garbage collector closes things.
    A child of `fork` destroys nothing that its parent made.
    A subclass defines `_destroy`.
    """

    _ptr: Any = None
    _doomed: Any = None  # the C object of a closed handle, while handles made on it are open
    _users: int = 0
    _counting = threading.RLock()  # re-entrant, since a finalizer may run at any allocation

    def __init__(self, ptr: Any, *keep_alive: object) -> None:
        self._ptr = ptr
        self._pid = os.getpid()
        self._keep_alive = keep_alive
        with self._counting:
            for parent in keep_alive:
                if isinstance(parent, Handle):
                    parent._users += 1

    def _destroy(self, ptr: Any) -> None:
        raise NotImplementedError

    @property
    def ptr(self) -> Any:
        """The C pointer."""
        if self._ptr is None:
            raise errors.ClosedError(f"{type(self).__name__} is closed")
        return self._ptr

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._ptr is None

    def close(self) -> None:
        """Destroys the C object, and releases what it kept alive.

        If handles made on it are still open, this happens when the last of them closes.
        """
        with self._counting:
            if self._ptr is None:
                return
            self._ptr, self._doomed = None, self._ptr
        self._destroy_unused()

    def _destroy_unused(self) -> None:
        with self._counting:
            if self._users or self._doomed is None:
                return
            ptr, self._doomed = self._doomed, None
        try:
            if self._pid == os.getpid():  # a queue pair that a forked child destroyed would be gone for the parent
                self._destroy(ptr)
        finally:
            parents, self._keep_alive = [p for p in self._keep_alive if isinstance(p, Handle)], ()
            for parent in parents:
                with self._counting:
                    parent._users -= 1
                parent._destroy_unused()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
