"""`Peering`: makes owners of some shards peers, which answer searches of the whole collection."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Self

from cotra_rdma._collection import owners_file as owners
from cotra_rdma._collection.manifest import Collection, collection_directory
from cotra_rdma._collection.owner_probe import OwnerStatus, ask_owners
from cotra_rdma._owner.server import Server
from cotra_rdma._reader.cluster import Cluster
from cotra_rdma._reader.connect import connect
from cotra_rdma.errors import ClosedError, CotraError, FormatError, InvalidInputError
from cotra_rdma.protocol.regions import ShardFields, as_fields
from cotra_rdma.protocol.tls import Tls

log = logging.getLogger(__name__)

DEFAULT_HALO = 0.5  # what keeps 70 % of the expansions at home (docs/scaling.md)
_LOOK_S = 1.0  # between looks for owners
_FIRST_LOOKS_S = 0.2  # before the first connection
_PATIENCE_S = 5.0  # in which all shards should have found an owner
_TIMEOUT_S = 2.0

Walks = tuple[str, ...]
"""For each shard of the collection how it is walked, as in `Cluster.transports`. "lost" means that no owner is known."""


class Peering:
    """Connects the owners of some shards of one graph to the owners of the other shards. A context manager.

    The own servers then answer searches of the whole collection.
    The other owners may start later: a thread looks for them once a second, and more often at first.
    It connects when every shard has an owner, or after some seconds to the owners that are there.
    It connects again when a shard without an owner gets one.
    Searches in progress end on the connections that they began with.
    An owner of another generation is no peer.

    The servers stay the caller's, but `close` closes them first, so that readers go elsewhere.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        peers: Sequence[Sequence[str]] | None = None,
        *,
        halo: float = DEFAULT_HALO,
        device: str | None = None,
        gid_index: int | None = None,
        tls: Tls | None = None,
        changed: Callable[[Walks], None] | None = None,
        tracing: bool = False,
    ) -> None:
        """Reads the manifest. `start` begins to look for owners.

        Args:
            path: the collection's directory, or its `collection.json`; of its files only that is read.
            peers: the addresses of each shard's owners, in the order of the shards; those of own shards are not used. None:
                those in `owners.json`, read anew at each look.
            halo, device, gid_index, tls, tracing: as `connect`.
            changed: told from the thread how each shard is walked, first and when that changed.

        Raises `FormatError` for a broken manifest; `InvalidInputError` for shards that are not one graph, a halo that is no
        share, or `peers` of another number of shards.
        """
        self._directory = collection_directory(path)
        self._collection = Collection.load(self._directory, shard_files=False)
        n_shards = len(self._collection.shards)
        if self._collection.graph != "global":
            raise InvalidInputError(
                f"{path}: its shards are no graph that owners could walk: cotra build --graph global makes one"
            )
        if peers is not None and len(peers) != n_shards:
            raise InvalidInputError(f"owners of {len(peers)} shards, and the collection has {n_shards}")
        if not 0 <= halo < float("inf"):
            raise InvalidInputError(f"halo must be a share, 0 or more, not {halo}")
        self._peers = peers
        self._halo, self._device, self._gid_index, self._tls = halo, device, gid_index, tls
        self._changed, self._tracing = changed, tracing
        self._servers: dict[int, Server] = {}
        self._given: list[list[str]] = [[] for _ in range(n_shards)]
        self._cluster: Cluster | None = None
        self._told: Walks = ()
        self._complaint = ""
        self._patient_until = 0.0
        self._looking = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, servers: Mapping[int, Server], *, patience_s: float = _PATIENCE_S) -> None:
        """Begins to look for the others.

        Args:
            servers: of the own shards, by their numbers in the collection.
            patience_s: how long to wait for all shards to have an owner, before some are gone without.

        Raises `FormatError` where a server's shard is not what the manifest names; `ClosedError` after `close`.
        """
        if self._stop.is_set() or self._thread is not None:
            raise ClosedError("a peering starts once")
        for number, server in servers.items():
            if not 0 <= number < len(self._given):
                raise InvalidInputError(f"there is no shard {number} in {self._directory}")
            if misfit := owners.misfit(self._collection, number, _told_of(server)):
                raise FormatError(f"shard {number} of {self._directory} is served as {misfit}", shard=number)
        self._servers = dict(servers)
        self._patient_until = time.monotonic() + patience_s
        self._thread = threading.Thread(target=self._look_regularly, name="cotra-peering", daemon=True)
        self._thread.start()

    @property
    def walks(self) -> Walks:
        """How each shard is walked now. It is empty before the first connection."""
        cluster = self._cluster
        return () if cluster is None else cluster.transports

    # ---- looking for owners ----

    def _look_regularly(self) -> None:
        while True:
            try:
                self.look()
                self._complaint = ""
            except Exception as error:  # of `changed` too: nobody else looks
                if str(error) != self._complaint:  # the same once a second would say no more
                    told = isinstance(error, (CotraError, OSError))
                    log.warning("%s: not connected to all peers: %s", self._directory, error, exc_info=not told)
                self._complaint = str(error)
            if self._stop.wait(_LOOK_S if self._cluster is not None else _FIRST_LOOKS_S):
                return

    def look(self) -> None:
        """Looks for owners now.

        Raises:
            CotraError: the owners could not be connected to. OSError: `owners.json` could not be read.
        """
        with self._looking:
            if self._stop.is_set() or not self._servers:
                return
            cluster = self._cluster
            if cluster is None or cluster.lost:
                found = self._addresses()
                if cluster is None or self._are_new(found, cluster):
                    self._connect(found)
            self._tell()

    def _addresses(self) -> list[list[str]]:
        """Returns the addresses of each shard's known owners, and none for an own shard."""
        told: Sequence[Sequence[str]] | None = self._peers
        if told is None:
            noted = owners.load(self._directory)
            told = [noted.get(number, []) for number in range(len(self._given))]
        return [[] if number in self._servers else list(addresses) for number, addresses in enumerate(told)]

    def _are_new(self, found: Sequence[Sequence[str]], cluster: Cluster) -> bool:
        """Whether a shard without an owner has one now that the cluster was not given."""
        return any(set(found[number]) - set(self._given[number]) for number in cluster.lost)

    def _connect(self, found: Sequence[Sequence[str]]) -> None:
        alive = self._alive(found)
        every = all(number in self._servers or addresses for number, addresses in enumerate(alive))
        if self._cluster is not None:
            if not self._are_new(alive, self._cluster):
                return
        elif not every and time.monotonic() < self._patient_until:
            return
        own = self._servers
        cluster = connect(
            [own.get(number, addresses) for number, addresses in enumerate(alive)],
            device=self._device,
            gid_index=self._gid_index,
            tls=self._tls,
            timeout_s=_TIMEOUT_S,
            halo=self._halo,
            allow_partial=True,
            collection=self._collection,
            tracing=self._tracing,
        )
        before, self._cluster, self._given = self._cluster, cluster, alive
        for server in own.values():
            server.search_with(cluster)
        if before is not None:
            before.close()

    def _alive(self, found: Sequence[Sequence[str]]) -> list[list[str]]:
        """Returns the addresses of owners that answer, and that serve the shard for which they are noted."""
        everyone = [address for addresses in found for address in addresses]
        told = dict(zip(everyone, ask_owners(everyone, _TIMEOUT_S, self._tls), strict=True))
        return [[at for at in addresses if self._fits(number, told[at])] for number, addresses in enumerate(found)]

    def _fits(self, number: int, status: OwnerStatus) -> bool:
        problem = status.problem
        if status.serves is not None and not problem:
            problem = owners.misfit(self._collection, number, status.serves)
        if problem:
            log.debug("shard %d: %s is no peer: %s", number, status.address, problem)
        return not problem

    def _tell(self) -> None:
        walks = self.walks
        if walks == self._told:
            return
        self._told = walks
        log.info("%s: walks %s", self._directory, ", ".join(f"shard {at}: {how}" for at, how in enumerate(walks)))
        if self._changed is not None:
            self._changed(walks)

    @property
    def cluster(self) -> Cluster | None:
        """The connection to all shards, by which searches of the collection are answered; None before the first one."""
        return self._cluster

    # ---- the end ----

    def close(self) -> None:
        """Stops looking for owners, closes the servers, and then closes the cluster. Idempotent."""
        self._stop.set()
        for server in self._servers.values():
            server.close()
        if self._thread is not None:
            self._thread.join()
        if self._cluster is not None:
            self._cluster.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _told_of(server: Server) -> ShardFields:
    told: ShardFields = as_fields(ShardFields, server.shard.info)
    return told
