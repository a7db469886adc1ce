"""The record caches of one session. Each shard that is read gets its part of the bytes, or its part of a halo."""

from __future__ import annotations

import logging

from cotra_rdma._native.record_cache import CacheInfo
from cotra_rdma._reader.connection import LOST, READ, Connection
from cotra_rdma._reader.halo import Halo
from cotra_rdma._reader.replicas import Replicas
from cotra_rdma.errors import (
    InvalidInputError,
)

log = logging.getLogger(__name__)


class RecordCaches:
    """Gives connections their caches, as `connect` was told."""

    def __init__(self, replicas: Replicas, cache_bytes: int, halo: float) -> None:
        """Chooses the records of a halo, if there is to be one.

        Args:
            replicas: the shards.
            cache_bytes: for all caches together; 0 for none.
            halo: see `connect`; 0 for none.

        Raises:
            InvalidInputError: the shards cannot have a halo.
        """
        self._replicas, self._bytes = replicas, cache_bytes
        self._halo = Halo(replicas.connections, halo) if halo else None

    def equip(self, connection: Connection) -> None:
        """Gives a shard its cache, if the shard is read.

        Raises:
            InvalidInputError: the part of the shard does not hold a single record.
        """
        if self._halo is not None:
            self._halo.fill(connection)
        elif self._bytes and connection.transport in READ:
            connection.make_cache(self._part(connection))

    def equip_late(self, connection: Connection) -> None:
        """Gives a shard its cache that is there only now. It gets none if the others have all the bytes."""
        try:
            self.equip(connection)
        except InvalidInputError as error:
            log.info("no cache: %s", error)

    @property
    def infos(self) -> tuple[CacheInfo | None, ...]:
        """The cache of each shard, or None for a shard without one."""
        connections = self._replicas.connections
        return tuple(None if connection.cache is None else connection.cache.info for connection in connections)

    def _part(self, connection: Connection) -> int:
        """Returns a shard's part of the bytes, by its size. A shard without an owner counts as the mean of the others."""
        every = self._replicas.connections
        here = {other.index: other for other in every if other.transport in READ} | {connection.index: connection}
        sizes = {at: (other.info or other.shard).image_bytes for at, other in here.items()}
        n_lost = sum(other.transport == LOST and other.index not in here for other in every)
        total = sum(sizes.values()) * (1 + n_lost / len(sizes))
        left = self._bytes - sum(cache.nbytes for cache in self.infos if cache is not None)
        return max(0, min(int(self._bytes * sizes[connection.index] / total), left))
