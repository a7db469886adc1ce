"""Arenas: memory that can be pinned, registered with a NIC, handed to a same-host peer and written to a file byte for byte."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Self

from cotra_rdma._native.library import Handle, check, ffi, lib, new_error
from cotra_rdma.errors import InvalidInputError


@dataclass(frozen=True, slots=True)
class ArenaInfo:
    """What an arena is made of.

    Attributes:
        addr: its first byte's virtual address in this process.
        len: its length in bytes.
        page_bytes: the page size that backs it (4 KiB, or 2 MiB where huge pages were had).
        fd: its memfd, or None when the memory is wrapped or a mapped file.
        locked, sealed, writable, borrowed: as their names say; `borrowed` memory belongs to the caller.
    """

    addr: int
    len: int
    page_bytes: int
    fd: int | None
    locked: bool
    sealed: bool
    writable: bool
    borrowed: bool


class Arena(Handle):
    """One page-aligned piece of memory. Make one with `create`, `wrap`, `map_fd` or `map_file`."""

    @classmethod
    def create(cls, length: int, *, huge: bool = False, lock: bool = False) -> Self:
        """A new zeroed memfd arena of `length` bytes.

        Args:
            length: bytes, at least 1.
            huge: try huge pages first; `info.page_bytes` tells what was had.
            lock: mlock it. Raises `MemlockError` with the remedy when the limit is too small.
        """
        flags = (lib.COTRA_ARENA_HUGE if huge else 0) | (lib.COTRA_ARENA_LOCK if lock else 0)
        return cls._made(lambda out, err: lib.cotra_arena_create(length, flags, out, err))

    @classmethod
    def wrap(cls, buffer: Any, *, lock: bool = False) -> Self:
        """An arena over memory that the caller owns: any C-contiguous buffer, a numpy array say. It stays pinned in Python
        (cannot be resized) until the arena is closed, and is never copied."""
        view = memoryview(buffer)
        if not view.c_contiguous:
            raise InvalidInputError("an arena wraps C-contiguous memory; use numpy.ascontiguousarray first")
        data = ffi.from_buffer(view)
        flags = lib.COTRA_ARENA_LOCK if lock else 0
        return cls._made(lambda out, err: lib.cotra_arena_wrap(data, len(data), flags, out, err), data)

    @classmethod
    def map_fd(cls, fd: int, length: int, *, sealed: bool = True) -> Self:
        """Maps a peer's memfd read-only. `sealed`: refuse one whose owner could still shrink it under the reader."""
        flags = lib.COTRA_ARENA_SEALED if sealed else 0
        return cls._made(lambda out, err: lib.cotra_arena_map_fd(fd, length, flags, out, err))

    @classmethod
    def map_file(cls, path: str | os.PathLike[str]) -> Self:
        """Maps a whole file read-only."""
        return cls._made(lambda out, err: lib.cotra_arena_map_file(os.fsencode(path), out, err))

    @classmethod
    def _made(cls, call: Any, *keep_alive: object) -> Self:
        out, err = ffi.new("cotra_arena **"), new_error()
        check(call(out, err), err)
        return cls(out[0], *keep_alive)

    def _destroy(self, ptr: Any) -> None:
        lib.cotra_arena_destroy(ptr)

    @property
    def info(self) -> ArenaInfo:
        """What the arena is made of."""
        raw = ffi.new("cotra_arena_info *")
        lib.cotra_arena_get_info(self.ptr, raw)
        return ArenaInfo(
            addr=raw.address,
            len=raw.length_bytes,
            page_bytes=raw.page_bytes,
            fd=raw.fd if raw.fd >= 0 else None,
            locked=bool(raw.locked),
            sealed=bool(raw.sealed),
            writable=bool(raw.writable),
            borrowed=bool(raw.borrowed),
        )

    def __len__(self) -> int:
        return self.info.len

    def seal(self) -> None:
        """Seals the memfd: from now on nobody can resize it or map it writable; the owner's own mapping stays."""
        err = new_error()
        check(lib.cotra_arena_seal(self.ptr, err), err)

    def lock(self) -> None:
        """Pins the memory (mlock). Raises `MemlockError` with the remedy when the limit is too small."""
        err = new_error()
        check(lib.cotra_arena_lock(self.ptr, err), err)

    def view(self) -> memoryview:
        """The arena's bytes (writable when the arena is). Valid until `close`: do not keep it longer."""
        info = self.info
        view = memoryview(ffi.buffer(ffi.cast("char *", info.addr), info.len))
        return view if info.writable else view.toreadonly()


def trim_memory() -> None:
    """Gives memory that was freed back to the system, where the C library kept it (malloc_trim(3)): between something large and
    the next."""
    lib.cotra_memory_trim()
