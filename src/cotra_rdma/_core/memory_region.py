"""`MemoryRegion`: a registered memory region, as an owner publishes it and a reader READs it."""

from __future__ import annotations

from dataclasses import dataclass

from cotra_rdma.errors import BoundsError, InvalidInputError

_U32, _U64 = 2**32, 2**64


@dataclass(frozen=True, slots=True)
class MemoryRegion:
    """A registered memory region, as a reader names it in an RDMA READ.

    Attributes:
        addr: the virtual address of the first byte in the owner's process (u64).
        rkey: the remote key, which the owner's NIC checks (u32).
        len: the length in bytes (u64).
    """

    addr: int
    rkey: int
    len: int

    def __post_init__(self) -> None:
        for name, value, limit in (("addr", self.addr, _U64), ("rkey", self.rkey, _U32), ("len", self.len, _U64)):
            if not isinstance(value, int) or not 0 <= value < limit:
                raise InvalidInputError(f"MemoryRegion.{name} must be in [0, {limit}), not {value!r}")
        if self.addr + self.len > _U64:
            raise InvalidInputError("MemoryRegion: addr + len passes the end of the address space")

    @property
    def remote_addr(self) -> int:
        """`addr`, under the name that NodeDB's seam gives it."""
        return self.addr

    def slice(self, offset: int, length: int) -> MemoryRegion:
        """Returns the part [offset, offset + length), with the same rkey.

        Raises:
            BoundsError: the part is not inside the region.
        """
        if offset < 0 or length < 0 or offset + length > self.len:
            raise BoundsError(f"[{offset}, {offset + length}) is outside a region of {self.len} bytes")
        return MemoryRegion(self.addr + offset, self.rkey, length)
