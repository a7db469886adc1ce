"""Memory regions: what a peer may name in a READ."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotra_rdma import BoundsError, InvalidInputError, MemoryRegion
from helpers.properties import fixed

U64 = st.integers(0, 2**64 - 1)


@fixed(200)
@given(addr=U64, rkey=st.integers(0, 2**32 - 1), length=U64, offset=U64, part=U64)
def test_a_slice_is_inside_or_refused(addr: int, rkey: int, length: int, offset: int, part: int) -> None:
    if addr + length > 2**64:
        with pytest.raises(InvalidInputError, match="end of the address space"):
            MemoryRegion(addr, rkey, length)
        return
    region = MemoryRegion(addr, rkey, length)
    if offset + part > length:
        with pytest.raises(BoundsError):
            region.slice(offset, part)
        offset, part = offset % (length + 1), part % (length - offset % (length + 1) + 1)
    inner = region.slice(offset, part)
    assert (inner.addr, inner.rkey, inner.len) == (addr + offset, rkey, part)
    assert inner.remote_addr == inner.addr
    assert addr <= inner.addr <= inner.addr + inner.len <= addr + length


def test_slices_at_the_edges() -> None:
    region = MemoryRegion(0x1000, 7, 100)
    assert region.slice(0, 100) == region
    assert region.slice(100, 0) == MemoryRegion(0x1064, 7, 0)
    assert region.slice(10, 50).slice(10, 5) == region.slice(20, 5)
    for offset, length in ((0, 101), (100, 1), (101, 0), (-1, 2), (0, -1), (50, -1), (2**64, 1)):
        with pytest.raises(BoundsError):
            region.slice(offset, length)


@pytest.mark.parametrize("bad", [-1, 2**64, 1.0, None, "0"])
@pytest.mark.parametrize("field", ["addr", "rkey", "len"])
def test_numbers_outside_their_type(field: str, bad: object) -> None:
    with pytest.raises(InvalidInputError, match=field):
        MemoryRegion(**{"addr": 0, "rkey": 0, "len": 0, field: bad})


def test_the_limits_themselves() -> None:
    assert MemoryRegion(2**64 - 1, 2**32 - 1, 1).remote_addr == 2**64 - 1
    assert MemoryRegion(1, 0, 2**64 - 1).len == 2**64 - 1
    with pytest.raises(InvalidInputError, match="rkey"):
        MemoryRegion(0, 2**32, 0)
    with pytest.raises(InvalidInputError, match="end of the address space"):
        MemoryRegion(2**64 - 1, 0, 2)


def test_a_region_is_a_value() -> None:
    region = MemoryRegion(1, 2, 3)
    assert len({region, MemoryRegion(1, 2, 3)}) == 1
    with pytest.raises(AttributeError):
        region.addr = 2  # type: ignore[misc]
