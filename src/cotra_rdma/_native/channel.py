"""Channels: one-sided READs of one region, from one thread. One contract, four implementations: shm, file, verbs, model."""

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
    """A channel's limits and counts: READs at once (`slots`), the longest single READ in bytes, and what it did so far."""

    transport: str
    region_bytes: int
    slots: int
    slot_bytes: int
    reads: int
    read_bytes: int
    doorbells: int


@dataclass(frozen=True, slots=True)
class FabricModel:
    """A fabric that we do not own: what `Channel.model` adds to every READ of the channel it wraps.

    Attributes:
        round_trip_s: seconds from post to completion, at least.
        bytes_per_s: of the link; 0 for no limit.
        reads_per_s: the NIC's message rate; 0 for no limit.
    """

    round_trip_s: float = 0.0
    bytes_per_s: float = 0.0
    reads_per_s: float = 0.0

    def params(self) -> dict[str, int]:
        """The fields of `cotra_model_params`."""
        return {
            "round_trip_ns": round(self.round_trip_s * 1e9),
            "bytes_per_second": round(self.bytes_per_s),
            "reads_per_second": round(self.reads_per_s),
        }


class Channel(Handle):
    """One-sided READs of one region, from one thread at a time. Make one with `shm`, `file`, `verbs` or `model`."""

    @classmethod
    def shm(cls, arena: Arena, *, slots: int = 0, slot_bytes: int = 0) -> Self:
        """Reads a region that is mapped in this process: an own arena, or a same-host peer's (`Arena.map_fd`)."""
        return cls._opened(lambda out, err: lib.cotra_channel_open_shm(arena.ptr, slots, slot_bytes, out, err), arena)

    @classmethod
    def file(cls, fd: int, length: int, *, slots: int = 0, slot_bytes: int = 0) -> Self:
        """Reads the first `length` bytes of a file, or of a memfd, with pread(2): nothing is mapped, so what is read never counts
        as this process's memory, as touched pages of `shm` do. `fd` stays the caller's."""
        return cls._opened(lambda out, err: lib.cotra_channel_open_file(fd, length, slots, slot_bytes, out, err))

    @classmethod
    def verbs(cls, qp: QueuePair, region: MemoryRegion, *, slots: int = 0, slot_bytes: int = 0) -> Self:
        """Reads a remote region over a connected queue pair."""
        raw = ffi.new("cotra_remote_region *", (region.addr, region.len, region.rkey, 0))
        return cls._opened(lambda out, err: lib.cotra_channel_open_verbs(qp.ptr, raw, slots, slot_bytes, out, err), qp)

    @classmethod
    def model(cls, inner: Channel, fabric: FabricModel) -> Self:
        """Wraps another channel and adds a fabric's round-trip time and rates to it."""
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
        """The region's bytes [offset, offset + length), by as many READs as it takes."""
        destination, err = ffi.new("char[]", max(length, 1)), new_error()
        check(lib.cotra_channel_read(self.ptr, offset, length, destination, round(timeout_s * 1e9), err), err)
        return bytes(ffi.buffer(destination, length))

    def gather(
        self, offsets: npt.NDArray[np.uint64], length: int, *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> npt.NDArray[np.uint8]:
        """The `length` bytes at each of `offsets` (uint64[n]), one READ each: uint8[n, length]."""
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
        """Times READs of `length` bytes at each of `offsets` (uint64[n]), `depth` in progress.

        Returns: (elapsed seconds, latency of each READ in ns: uint64[n]).
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
