"""Arenas: memory that is wrapped, sealed, locked, handed over and mapped; and what they refuse."""

from __future__ import annotations

import ctypes
import fcntl
import gc
import mmap
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cotra_rdma import Arena, ClosedError, CotraError, FormatError, InvalidInputError, MemlockError
from cotra_rdma._native.channel import Channel

PAGE = mmap.PAGESIZE
CAP_IPC_LOCK = 14


@pytest.fixture
def arena() -> Iterator[Arena]:
    with Arena.create(10_000) as made:
        yield made


def capabilities(effective: int | None = None) -> int:
    """This thread's effective capabilities (capget(2)), after setting them where asked to."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    if effective is not None:
        sets[0] = effective
        assert libc.capset(header, sets) == 0
    return sets[0]


@pytest.fixture
def no_memlock() -> Iterator[None]:
    """A limit of 0 on locked memory, and no privilege to pass it."""
    limits, before = resource.getrlimit(resource.RLIMIT_MEMLOCK), capabilities()
    capabilities(before & ~(1 << CAP_IPC_LOCK))
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_MEMLOCK, limits)
    capabilities(before)


def test_a_new_arena(arena: Arena) -> None:
    info = arena.info
    assert len(arena) == info.len == 10_000
    assert info.addr % PAGE == 0
    assert info.page_bytes == PAGE
    assert info.fd is not None
    assert (info.locked, info.sealed, info.writable, info.borrowed) == (False, False, True, False)
    assert fcntl.fcntl(info.fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    assert os.fstat(info.fd).st_size == 3 * PAGE
    with arena.view() as view:
        assert bytes(view) == bytes(10_000)
        view[9_999] = 7
    assert os.pread(info.fd, 1, 9_999) == b"\x07"


@pytest.mark.parametrize("length", [0, 2**46 + 1, 2**63])
def test_impossible_lengths(length: int) -> None:
    with pytest.raises(InvalidInputError, match="length"):
        Arena.create(length)


def test_huge_pages_are_reported_as_they_were_had() -> None:
    with Arena.create(100, huge=True) as arena:
        info = arena.info
        assert info.page_bytes in (PAGE, 2 << 20)
        assert info.addr % info.page_bytes == 0
        assert info.len == 100
        assert info.fd is not None
        assert os.fstat(info.fd).st_size == info.page_bytes


def test_wrapped_memory_is_the_callers() -> None:
    rows = np.arange(12, dtype=np.float32).reshape(3, 4)
    with Arena.wrap(rows) as arena:
        info = arena.info
        assert (info.addr, info.len, info.fd, info.borrowed) == (rows.ctypes.data, 48, None, True)
        rows[2, 3] = -1
        with arena.view() as view:
            assert view.readonly
            assert bytes(view) == rows.tobytes()
        with pytest.raises(InvalidInputError, match="memfd"):
            arena.seal()
    assert rows[2, 3] == -1


def test_wrapped_memory_is_pinned_until_the_arena_closes() -> None:
    buffer = bytearray(100)
    arena = Arena.wrap(buffer)
    with pytest.raises(BufferError):
        buffer.append(0)
    arena.close()
    gc.collect()
    buffer.append(0)
    with Arena.wrap(bytearray(b"kept alive by the arena")) as alone:
        gc.collect()
        with alone.view() as view:
            assert bytes(view) == b"kept alive by the arena"


def test_wrapped_memory_is_pinned_until_the_channels_on_it_close() -> None:
    buffer = bytearray(b"x" * 100)
    arena = Arena.wrap(buffer)
    channel = Channel.shm(arena)
    arena.close()
    with pytest.raises(BufferError):
        buffer.append(0)
    assert channel.read(0, 100) == b"x" * 100
    channel.close()
    gc.collect()
    buffer.append(0)


@pytest.mark.parametrize(
    "buffer", [np.zeros((4, 4))[:, 1], np.zeros((4, 4)).T, np.zeros(8)[::-1], memoryview(bytes(8))[::2]]
)
def test_memory_in_pieces_is_refused(buffer: object) -> None:
    with pytest.raises(InvalidInputError, match="C-contiguous"):
        Arena.wrap(buffer)


def test_nothing_to_wrap() -> None:
    with pytest.raises(InvalidInputError, match="nothing to wrap"):
        Arena.wrap(b"")
    with pytest.raises(TypeError):
        Arena.wrap("text")


def test_sealing(arena: Arena) -> None:
    arena.seal()
    arena.seal()
    info = arena.info
    assert info.sealed
    assert info.fd is not None
    for size in (0, 1 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(info.fd, size)
    with pytest.raises(PermissionError):
        mmap.mmap(info.fd, PAGE)
    with pytest.raises(PermissionError):
        os.pwrite(info.fd, b"x", 0)
    with arena.view() as view:  # the owner's own mapping stays writable
        view[0] = 1


def test_a_peers_mapping(arena: Arena) -> None:
    fd = arena.info.fd
    assert fd is not None
    with pytest.raises(FormatError, match="sealed against shrinking"):
        Arena.map_fd(fd, 10_000)
    with Arena.map_fd(fd, 10_000, sealed=False) as trusting:
        assert not trusting.info.sealed
    arena.seal()
    with Arena.map_fd(fd, 10_000) as mapped:
        info = mapped.info
        assert (info.writable, info.sealed, info.len) == (False, True, 10_000)
        assert info.fd != fd
        with arena.view() as mine, mapped.view() as theirs:
            mine[5] = 42
            assert theirs[5] == 42
            with pytest.raises(TypeError):
                theirs[5] = 1
        arena.close()
        with mapped.view() as theirs:  # the memory outlives its owner's mapping
            assert theirs[5] == 42


def test_descriptors_that_are_no_such_memory(arena: Arena, tmp_path: Path) -> None:
    fd = arena.info.fd
    assert fd is not None
    arena.seal()
    for length in (0, 3 * PAGE + 1, 2**63):
        with pytest.raises(FormatError, match="announced"):
            Arena.map_fd(fd, length)
    with (tmp_path / "file").open("w+b") as file:
        file.truncate(PAGE)
        with pytest.raises(FormatError, match="not a memfd"):
            Arena.map_fd(file.fileno(), PAGE)
    with pytest.raises(CotraError, match="fstat") as caught:
        Arena.map_fd(-1, 10)
    assert caught.value.sys_errno


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "filé"
    path.write_bytes(b"0123456789")
    with Arena.map_file(path) as arena:
        info = arena.info
        assert (info.len, info.fd, info.writable, info.borrowed) == (10, None, False, False)
        with arena.view() as view:
            assert bytes(view) == b"0123456789"
            with pytest.raises(TypeError):
                view[0] = 0
        with pytest.raises(InvalidInputError, match="memfd"):
            arena.seal()
    path.write_bytes(b"")
    with pytest.raises(FormatError, match="empty"):
        Arena.map_file(path)
    with pytest.raises(FormatError, match="not a file"):
        Arena.map_file(tmp_path)
    with pytest.raises(CotraError, match="No such file"):
        Arena.map_file(tmp_path / "gone")


def test_locking(arena: Arena) -> None:
    arena.lock()
    arena.lock()
    assert arena.info.locked
    with Arena.create(100, lock=True) as other:
        assert other.info.locked
    with Arena.wrap(bytearray(100), lock=True) as wrapped:
        assert wrapped.info.locked


@pytest.mark.skipif("COTRA_SANITIZED" in os.environ, reason="AddressSanitizer makes mlock do nothing")
def test_a_limit_on_locked_memory_is_told_with_its_remedy(no_memlock: None, arena: Arena) -> None:
    for lock in (arena.lock, lambda: Arena.create(10_000, lock=True), lambda: Arena.wrap(bytes(10_000), lock=True)):
        with pytest.raises(MemlockError, match=r"RLIMIT_MEMLOCK is 0; raise it with 'ulimit -l") as caught:
            lock()
        assert isinstance(caught.value, PermissionError)
    assert not arena.info.locked


def test_close(arena: Arena) -> None:
    fd = arena.info.fd
    assert fd is not None
    arena.close()
    arena.close()
    assert arena.closed
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    for use in (lambda: arena.info, lambda: len(arena), arena.seal, arena.lock, arena.view):
        with pytest.raises(ClosedError, match="Arena is closed"):
            use()


def test_arenas_leave_no_descriptors_behind() -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        Arena.create(100)
        with pytest.raises(FormatError), Arena.create(100) as arena:
            Arena.map_fd(arena.info.fd or 0, 100)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
