"""How a cluster reaches owners: what `connect` was told, and this side's device."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from cotra_rdma._core.tracing import Tracing
from cotra_rdma._native.channel import FabricModel
from cotra_rdma._native.verbs import Device, QueuePairOptions
from cotra_rdma._reader.connection import Connection
from cotra_rdma._reader.counters import Counters, OwnerCounts
from cotra_rdma._reader.local_connection import LocalConnection, address_of
from cotra_rdma._reader.replicas import Owner
from cotra_rdma.errors import CotraError, TransportError
from cotra_rdma.protocol.address import parse_address
from cotra_rdma.protocol.regions import ShardFields
from cotra_rdma.protocol.tls import Tls

log = logging.getLogger(__name__)

Misfit = Callable[[int, ShardFields], str]
"""Why what an owner serves is not the shard at a position; "" where it is."""


@dataclass(slots=True)
class Connector:
    """Options as `connect` takes them; the device is opened when the first owner offers one."""

    transport: str
    device: str | None
    gid_index: int | None
    tls: Tls | None
    timeout_s: float
    fabric: FabricModel | None
    queue_pair: QueuePairOptions
    tracing: Tracing | None = None
    counters: Counters = field(default_factory=Counters)
    _device: Device | None = None
    _no_device: str = "not asked for"
    _tried: bool = field(default=False)

    def connect(self, shard: int, owner: Owner, misfit: Misfit | None = None) -> Connection:
        """The control connection to an owner of the shard at a position. Raises `TransportError`, also for a misfit."""
        counts = self.counters.of(shard, address_of(owner))
        try:
            return self._connect(shard, owner, misfit, counts)
        except CotraError as error:
            counts.note_away(error)
            raise

    def _connect(self, shard: int, owner: Owner, misfit: Misfit | None, counts: OwnerCounts) -> Connection:
        timeout_ms = max(1, round(self.timeout_s * 1000))
        if not isinstance(owner, str):
            return LocalConnection(shard, owner, timeout_ms=timeout_ms, counts=counts)
        options = replace(self.queue_pair, peer_address=self.queue_pair.peer_address or _ip_of(owner))
        if self.gid_index is not None:
            options = replace(options, gid_index=self.gid_index)
        connection = Connection(
            shard,
            owner,
            tls=self.tls,
            timeout_ms=timeout_ms,
            options=options,
            fabric=self.fabric,
            counts=counts,
            tracing=self.tracing,
        )
        if misfit is not None and (why := misfit(shard, connection.shard)):
            connection.close()
            raise TransportError(f"{connection} serves {why}", shard=shard)
        return connection

    def open_device(self, connections: Sequence[Connection]) -> None:
        """Opens this side's device where any of the owners offers verbs. Raises where it was asked for and cannot be had."""
        offered = any(connection.capabilities.transports.get("verbs") == "" for connection in connections)
        if self._tried or self.transport not in ("auto", "verbs") or (not offered and self.transport == "auto"):
            return
        self._tried = True
        try:
            self._device = Device(self.device)
        except CotraError as error:
            if self.transport == "verbs" or self.device is not None:
                raise
            self._no_device = str(error)

    def choose(self, connection: Connection) -> None:
        """Takes the best path to an owner, and what a walk needs of a shard of a graph over many that cannot be read."""
        self.open_device([connection])
        connection.choose(self.transport, self._device, self._no_device)
        if connection.transport == "rpc" and connection.shard.graph_id:
            try:
                connection.view = connection.load_view()
            except TransportError:
                raise
            except CotraError as error:  # an owner of an older release
                log.info("%s: its owner searches the shard by itself: %s", connection, error)

    def close(self) -> None:
        """Closes the device, after all that hangs on it."""
        if self._device is not None:
            self._device.close()


def _ip_of(address: str) -> str | None:
    """The IP address that a shard is reached at, for the choice of the GID."""
    host, port = parse_address(address)
    try:
        return str(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0]).partition("%")[0]
    except OSError as error:
        raise TransportError(f"{address}: {error}") from error
