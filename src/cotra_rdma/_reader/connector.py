"""`Connector`: connects to owners with the options of `connect`, and holds this side's device."""

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
"""Returns why what an owner serves is not the shard at a position, or "" if it is."""


@dataclass(slots=True)
class Connector:
    """Connects to owners, and chooses the path to each.

    The attributes are the options of `connect`.
    The device is opened when the first owner offers verbs.
    """

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
        """Makes the control connection to an owner.

        Args:
            shard: the position of the shard in the cluster.
            owner: an address, or a shard or server of this process.
            misfit: checks what the owner serves. None checks nothing.

        Returns:
            The connection. It is the caller's to close.

        Raises:
            TransportError: the owner cannot be reached, or serves something else than the shard.
            PeerError, FormatError: as for `Connection`.
        """
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
        """Opens this side's device, if one of the owners offers verbs or if verbs was asked for. It tries once.

        Raises:
            CotraError: the device cannot be opened, and was asked for by name or by `transport="verbs"`.
        """
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
        """Chooses the best path to an owner.

        If a shard of one graph cannot be read, its view is loaded over RPC, because the walk needs the upper layers.

        Raises:
            CotraError: as for `Connection.choose`.
        """
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
        """Closes the device. Connections that use it must be closed before."""
        if self._device is not None:
            self._device.close()


def _ip_of(address: str) -> str | None:
    """Returns the IP address of an owner, by which this side's GIDs are ranked.

    Raises:
        TransportError: the host's name cannot be resolved.
    """
    host, port = parse_address(address)
    try:
        return str(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0]).partition("%")[0]
    except OSError as error:
        raise TransportError(f"{address}: {error}") from error
