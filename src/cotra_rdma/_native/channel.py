"""Channels: one-sided READs of one region by one thread.

All four implementations keep one contract: shm, file, verbs and model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from cotra_rdma._core.memory_region import MemoryRegion
from cotra_rdma._native.library import Handle, check, ffi, lib, new_error

if TYPE_CHECKING:
    from cotra_rdma._native.arena import Arena
    from cotra_rdma._native.verbs import QueuePair

DEFAULT_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class ChannelInfo:
    """A channel's limits and counts.

    Attributes:
        transport: "shm", "file", "verbs" or "model".
        region_bytes: the length of the region.
        slots: the most READs in progress at once.
        slot_bytes: the length of the longest single READ.
        reads: READs so far.
        read_bytes: bytes that were READ so far.
        doorbells: doorbells so far.
    """

    transport: str
    region_bytes: int
    slots: int
    slot_bytes: int
    reads: int
    read_bytes: int
    doorbells: int


@dataclass(frozen=True, slots=True)
class FabricModel:
    """A modelled fabric. `Channel.model` adds its delays to every READ of the channel that it wraps.

    Attributes:
        round_trip_s: the least time from post to completion, in seconds.
        bytes_per_s: the rate of the link; 0 for no limit.
        reads_per_s: the message rate of the NIC; 0 for no limit.
    """

    round_trip_s: float = 0.0
    bytes_per_s: float = 0.0
    reads_per_s: float = 0.0

    def params(self) -> dict[str, int]:
        """Returns the fields of `cotra_model_params`."""
        return {
            "round_trip_ns": round(self.round_trip_s * 1e9),
            "bytes_per_second": round(self.bytes_per_s),
            "reads_per_second": round(self.reads_per_s),
        }


class Channel(Handle):
    """One-sided READs of one region, by one thread at a time.

    Make one with `shm`, `file`, `verbs` or `model`.
    """

    @classmethod
    def shm(cls, arena: Arena, *, slots: int = 0, slot_bytes: int = 0) -> Self:
        """Opens a channel to a region that is mapped in this process.

        The region is an arena of this process, or one of an owner on the same host (`Arena.map_fd`).
        """
        return cls._opened(lambda out, err: lib.cotra_channel_open_shm(arena.ptr, slots, slot_bytes, out, err), arena)

    @classmethod
    def file(cls, fd: int, length: int, *, slots: int = 0, slot_bytes: int = 0) -> Self:
        """Opens a channel to the first `length` bytes of a file or a memfd, which it reads with pread(2).

        Nothing is mapped.
        So the bytes never count as this process's memory, as the touched pages of `shm` do.
        The caller keeps `fd` and closes it.
        """
        return cls._opened(lambda out, err: lib.cotra_channel_open_file(fd, length, slots, slot_bytes, out, err))

    @classmethod
    def verbs(cls, qp: QueuePair, region: MemoryRegion, *, slots: int = 0, slot_bytes: int = 0) -> Self:
        """Opens a channel to a remote region over a connected queue pair."""
        raw = ffi.new("cotra_remote_region *", (region.addr, region.len, region.rkey, 0))
        return cls._opened(lambda out, err: lib.cotra_channel_open_verbs(qp.ptr, raw, slots, slot_bytes, out, err), qp)

    @classmethod
    def model(cls, inner: Channel, fabric: FabricModel) -> Self:
        """Wraps another channel, and adds the round-trip time and the rates of a fabric to it."""
        raw = ffi.new("cotra_model_params *", fabric.params())
        return cls._opened(lambda out, err: lib.cotra_channel_open_model(inner.ptr, raw, out, err), inner)

    @classmethod
    def _opened(cls, call: Any, *keep_alive: object) -> Self:
        out, err = ffi.new("cotra_channel **"), new_error()
        check(call(out, err), err)
        return cls(out[0], *keep_alive)

    def _destroy(self, ptr: Any) -> None:
        lib.cotra_channel_close(ptr)

    @property
    def info(self) -> ChannelInfo:
        """Limits and counts."""
        raw = ffi.new("cotra_channel_info *")
        lib.cotra_channel_get_info(self.ptr, raw)
        return ChannelInfo(
            transport=ffi.string(raw.transport).decode(),
            region_bytes=raw.region_bytes,
            slots=raw.slots,
            slot_bytes=raw.slot_bytes,
            reads=raw.reads,
            read_bytes=raw.read_bytes,
            doorbells=raw.doorbells,
        )

    def read(self, offset: int, length: int, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> bytes:
        """READs the region's bytes [offset, offset + length), by as many READs as that takes."""
        destination, err = ffi.new("char[]", max(length, 1)), new_error()
        check(lib.cotra_channel_read(self.ptr, offset, length, destination, round(timeout_s * 1e9), err), err)
        return bytes(ffi.buffer(destination, length))

    def gather(
        self, offsets: npt.NDArray[np.uint64], length: int, *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> npt.NDArray[np.uint8]:
        """READs `length` bytes at each offset, with one READ each.

        Args:
            offsets: uint64[n].
            length: bytes of each READ.
            timeout_s: the longest wait for one READ, in seconds.

        Returns:
            uint8[n, length].
        """
        offsets = np.ascontiguousarray(offsets, np.uint64)
        found, err = np.empty((len(offsets), length), np.uint8), new_error()
        status = lib.cotra_channel_gather(
            self.ptr,
            ffi.from_buffer("uint64_t[]", offsets),
            len(offsets),
            length,
            ffi.from_buffer("char[]", found),
            round(timeout_s * 1e9),
            err,
        )
        check(status, err)
        return found

    def read_loop(
        self, offsets: npt.NDArray[np.uint64], length: int, *, depth: int = 1, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> tuple[float, npt.NDArray[np.uint64]]:
        """Times READs of `length` bytes at each offset.

        Args:
            offsets: uint64[n].
            length: bytes of each READ.
            depth: READs in progress at once.
            timeout_s: the longest wait for one READ, in seconds.

        Returns:
            The elapsed seconds, and the latency of each READ in nanoseconds: uint64[n].
        """
        offsets = np.ascontiguousarray(offsets, np.uint64)
        latencies = np.empty(len(offsets), np.uint64)
        elapsed, err = ffi.new("uint64_t *"), new_error()
        status = lib.cotra_channel_read_loop(
            self.ptr,
            ffi.from_buffer("uint64_t[]", offsets),
            len(offsets),
            length,
            depth,
            round(timeout_s * 1e9),
            ffi.from_buffer("uint64_t[]", latencies),
            elapsed,
            err,
        )
        check(status, err)
        return elapsed[0] / 1e9, latencies
