"""Memory that a stranger hands over: what could kill who reads it is refused."""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterator

import pytest

from cotra_rdma._native.arena import Arena
from cotra_rdma._native.memfd_handover import HandOver, _check_whole, receive
from cotra_rdma.errors import FormatError

HUGE = 2 << 20
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
FUTURE_WRITE = 0x10  # linux/fcntl.h


@pytest.fixture
def huge() -> Iterator[int]:
    """A memfd of one huge page, which is not there: none need be free for that."""
    try:
        fd = os.memfd_create("stranger", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | os.MFD_HUGETLB | os.MFD_HUGE_2MB)
    except OSError as error:
        pytest.skip(f"this kernel has no huge pages: {error}")
    os.ftruncate(fd, HUGE)
    yield fd
    os.close(fd)


def test_huge_pages_that_could_be_taken_away(huge: int) -> None:
    fcntl.fcntl(huge, fcntl.F_ADD_SEALS, SEALS)
    with pytest.raises(FormatError, match="not sealed against that"):
        _check_whole(huge, HUGE)


def test_huge_pages_that_are_missing(huge: int) -> None:
    fcntl.fcntl(huge, fcntl.F_ADD_SEALS, SEALS | FUTURE_WRITE)
    with pytest.raises(FormatError, match="some of them are missing"):
        _check_whole(huge, HUGE)


def test_a_region_of_this_packages_own_is_taken() -> None:
    with Arena.create(3 * mmap.PAGESIZE, huge=True) as arena:
        with arena.view() as view:
            view[:4] = b"here"
        arena.seal()
        handover = HandOver(arena)
        try:
            with receive(handover.name, handover.length) as taken, taken.view() as view:
                assert bytes(view[:4]) == b"here"
        finally:
            handover.close()
