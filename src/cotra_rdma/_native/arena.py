"""Arenas: memory that a NIC can pin, another process on the host can map, and a file can hold byte for byte."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Self

from cotra_rdma._native.library import Handle, check, ffi, lib, new_error
from cotra_rdma.errors import InvalidInputError


@dataclass(frozen=True, slots=True)
class ArenaInfo:
    """The properties of an arena.

    Attributes:
        addr: the virtual address of the first byte in this process.
        len: the length in bytes.
        page_bytes: the size of the pages behind it: 4 KiB, or 2 MiB if huge pages were available.
        fd: the memfd, or None if the memory is wrapped or is a mapped file.
        locked: whether the memory is pinned by mlock.
        sealed: whether the memfd is sealed.
        writable: whether this mapping is writable.
        borrowed: whether the memory belongs to the caller.
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
    """One page-aligned piece of memory.

    Make one with `create`, `wrap`, `map_fd` or `map_file`.
    """

    @classmethod
    def create(cls, length: int, *, huge: bool = False, lock: bool = False) -> Self:
        """Makes a memfd arena of zeros.

        Args:
            length: bytes, at least 1.
            huge: try huge pages first. `info.page_bytes` says which pages were used.
            lock: pin the memory with mlock.

        Raises:
            MemlockError: the limit for locked memory is too small. The message names the remedy.
        """
        flags = (lib.COTRA_ARENA_HUGE if huge else 0) | (lib.COTRA_ARENA_LOCK if lock else 0)
        return cls._made(lambda out, err: lib.cotra_arena_create(length, flags, out, err))

    @classmethod
    def wrap(cls, buffer: Any, *, lock: bool = False) -> Self:
        """Makes an arena over memory that the caller owns.

        The memory is never copied.
        Python keeps the buffer pinned until the arena is closed, so the buffer cannot be resized.

        Args:
            buffer: any C-contiguous buffer, for example a numpy array.
            lock: pin the memory with mlock.

        Raises:
            InvalidInputError: the buffer is not C-contiguous.
        """
        view = memoryview(buffer)
        if not view.c_contiguous:
            raise InvalidInputError("an arena wraps C-contiguous memory; use numpy.ascontiguousarray first")
        data = ffi.from_buffer(view)
        flags = lib.COTRA_ARENA_LOCK if lock else 0
        return cls._made(lambda out, err: lib.cotra_arena_wrap(data, len(data), flags, out, err), data)

    @classmethod
    def map_fd(cls, fd: int, length: int, *, sealed: bool = True) -> Self:
        """Maps another process's memfd read-only.

        Args:
            fd: the memfd.
            length: bytes to map.
            sealed: refuse a memfd whose owner could still shrink it while it is read.
        """
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
        """The properties of the arena."""
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
        """Seals the memfd.

        From now on nobody can resize the memfd or map it writable.
        The mapping of this arena stays as it is.
        """
        err = new_error()
        check(lib.cotra_arena_seal(self.ptr, err), err)

    def lock(self) -> None:
        """Pins the memory with mlock.

        Raises:
            MemlockError: the limit for locked memory is too small. The message names the remedy.
        """
        err = new_error()
        check(lib.cotra_arena_lock(self.ptr, err), err)

    def view(self) -> memoryview:
        """Returns the bytes of the arena, writable if the arena is.

        The view is valid until `close`. Do not keep it longer.
        """
        info = self.info
        view = memoryview(ffi.buffer(ffi.cast("char *", info.addr), info.len))
        return view if info.writable else view.toreadonly()


def trim_memory() -> None:
    """Returns freed memory to the system if the C library kept it (malloc_trim(3)).

    Call it between one large allocation and the next.
    """
    lib.cotra_memory_trim()
