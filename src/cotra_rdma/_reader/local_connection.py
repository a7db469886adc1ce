"""`LocalConnection`: a connection to a shard of this process, whose records are used in place, without READs."""

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
    """What a `LocalConnection` needs of a server of this process. `Server` has it."""

    @property
    def address(self) -> str:
        """HOST:PORT."""

    @property
    def shard(self) -> Shard:
        """The shard that is served now."""

    @property
    def coarse(self) -> bytes | None:
        """The coarse table, as a payload of type 53, or None."""


Owned = Shard | Serving


def address_of(owner: str | Owned) -> str:
    """The address of an owner; "own" for a shard that this process holds and does not serve."""
    if isinstance(owner, str):
        return owner
    return "own" if isinstance(owner, Shard) else owner.address


class LocalConnection(Connection):
    """A connection to a shard of this process."""

    is_local = True

    def __init__(self, index: int, owner: Owned, *, timeout_ms: int, counts: OwnerCounts | None = None) -> None:
        """Makes the connection. It calls nobody.

        Args:
            index: the position of the shard in the cluster.
            owner: the shard, or a server of it. It stays the caller's, and must outlive the connection.
            timeout_ms: the time-out of reading the view.
            counts: counts what the connection does. None counts for nobody.
        """
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
        """The shard, or the server of it, as given."""
        return self._owner

    def choose(self, wanted: str, device: Device | None, no_device: str) -> None:
        """Reads the view in place, and sets the path "own", which is the only one. The arguments are ignored."""
        channel, parts = self.open_channel()
        with parts:
            self._read_view(channel)
        self.transport = "own"

    def open_channel(self, slots: int = 0) -> tuple[Channel, ExitStack]:
        """Opens a channel over the shard's memory, for calls that READ. A walk uses `open_source` instead."""
        with ExitStack() as stack:
            slot_bytes = max(self._slot_bytes, self.shard.record_bytes)
            return stack.enter_context(
                Channel.shm(self._held.arena, slots=slots, slot_bytes=slot_bytes)
            ), stack.pop_all()

    def open_source(self, slots: int = 0) -> tuple[Source, ExitStack]:
        """Returns the shard's memory, which an engine uses in place."""
        return self._held.arena, ExitStack()

    def renew(self) -> None:
        """Renews nothing, because nothing is leased.

        Raises:
            StaleShardError: the server serves another image by now.
        """
        if not isinstance(self._owner, Shard) and self._owner.shard.info.identity != self.image:
            raise self._stale(self._owner.shard.info.identity)
