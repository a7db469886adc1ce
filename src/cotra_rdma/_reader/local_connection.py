"""A shard that this process owns, as a reader in the same process sees it: its records are used in place, without READs."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Protocol

from cotra_rdma._native.channel import Channel
from cotra_rdma._native.graph_engine import Source
from cotra_rdma._native.verbs import Device
from cotra_rdma._reader.connection import Connection
from cotra_rdma._reader.counters import OwnerCounts
from cotra_rdma._shard.shard import Shard
from cotra_rdma.protocol.regions import RegionResponse, ShardFields, as_fields


class Serving(Protocol):
    """A server of this process (`server.Server`)."""

    @property
    def address(self) -> str:
        """HOST:PORT."""

    @property
    def shard(self) -> Shard:
        """What it serves."""

    @property
    def coarse(self) -> bytes | None:
        """What it tells of the shard from afar: a payload of type 53."""


Owned = Shard | Serving


def address_of(owner: str | Owned) -> str:
    """The address of an owner; "own" for a shard that this process holds and does not serve."""
    if isinstance(owner, str):
        return owner
    return "own" if isinstance(owner, Shard) else owner.address


class LocalConnection(Connection):
    """A shard that this process owns itself: its records are used in place."""

    is_local = True

    def __init__(self, index: int, owner: Owned, *, timeout_ms: int, counts: OwnerCounts | None = None) -> None:
        """`owner` stays the caller's, and must outlive it."""
        self._owner = owner
        self._held = owner if isinstance(owner, Shard) else owner.shard
        self._begin(index, address_of(owner), timeout_ms, counts=counts)
        self.shard, self.image = as_fields(ShardFields, self._held.info), self._held.info.identity
        self.counts.note_reached(self.image)
        self.capabilities = RegionResponse(shard=self.shard, transports={"own": "", "rpc": "it is this process"})
        self.link = replace(self.link, rpc_s=0.0)
        coarse = None if isinstance(owner, Shard) else owner.coarse
        if coarse is not None:
            self._take_coarse(coarse)

    @property
    def owner(self) -> Owned:
        """The shard, or the server of it."""
        return self._owner

    def choose(self, wanted: str, device: Device | None, no_device: str) -> None:
        """Takes the only path there is, whatever is wanted."""
        channel, parts = self.open_channel()
        with parts:
            self._read_view(channel)
        self.transport = "own"

    def open_channel(self, slots: int = 0) -> tuple[Channel, ExitStack]:
        """A channel over the own memory, for what reads and does not walk."""
        with ExitStack() as stack:
            slot_bytes = max(self._slot_bytes, self.shard.record_bytes)
            return stack.enter_context(
                Channel.shm(self._held.arena, slots=slots, slot_bytes=slot_bytes)
            ), stack.pop_all()

    def open_source(self, slots: int = 0) -> tuple[Source, ExitStack]:
        """The memory itself."""
        return self._held.arena, ExitStack()

    def renew(self) -> None:
        """Nothing is leased. Raises `StaleShardError` where the server has another image by now."""
        if not isinstance(self._owner, Shard) and self._owner.shard.info.identity != self.image:
            raise self._stale(self._owner.shard.info.identity)
