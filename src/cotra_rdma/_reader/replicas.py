"""Who owns each shard: the owner that a cluster uses, those that would take its place, and those that are away."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

from cotra_rdma._reader.batch import Answer, Batch
from cotra_rdma._reader.connection import LOST, Connection
from cotra_rdma._reader.local_connection import LocalConnection, Owned
from cotra_rdma.errors import ClosedError, CotraError, InvalidInputError, TransportError
from cotra_rdma.protocol.regions import RegionResponse, ShardFields

log = logging.getLogger(__name__)

_AT_ONCE = 32
"""Owners that are connected to at the same time."""

Owner = str | Owned
"""An owner's address, or what this process holds itself."""
Tried = tuple[int, str]
"""An owner that failed: the position of its shard, and its address."""


class MissingConnection(Connection):
    """In the place of a shard that no owner can be reached of."""

    def __init__(self, index: int, address: str, like: ShardFields | None = None) -> None:
        """`like`: what is known of the shard, or of another one where it was never reached (`address` is "")."""
        self._begin(index, address, 1)
        self.transport = LOST
        known = like or ShardFields(0, "", 0, 0, 0, 0)
        self.shard = known if address else msgspec.structs.replace(known, count=0, image_checksum=0)
        self.capabilities = RegionResponse(shard=self.shard, transports={"rpc": "it has no owner"})

    def take_over(self, failed: Connection) -> None:
        """Keeps what is known of the shard, and its cache, for whoever comes back."""
        super().take_over(failed)
        self.coarse, self.calibration, self.number = failed.coarse, failed.calibration, failed.number

    def renew(self) -> None:
        """Nobody is there."""

    def search(self, batch: Batch) -> Answer:
        """Raises `TransportError`."""
        raise TransportError(f"{self} has no owner", shard=self.index)

    def search_all(self, batch: Batch, images: Sequence[int] = ()) -> Any:
        """Raises `TransportError`."""
        raise TransportError(f"{self} has no owner", shard=self.index)


class Replicas:
    """The shards of a cluster, each with its owners. Threads may share it; none waits for what another shard's owners take long
    to answer.

    Attributes:
        peers: for each shard the owner in use; an `MissingConnection` where there is none. Replaced in place.
        lost: why a shard has no owner, by its position.
        renewed: shards of which an owner came back with another image. It is not used: the shards of one build belong together.
    """

    def __init__(
        self,
        owners: Sequence[Sequence[Owner]],
        reach: Callable[[int, Owner], Connection],
        choose: Callable[[Connection], None],
        prepare: Callable[[Connection], None],
        changed: Callable[[Connection], None],
    ) -> None:
        """Connects to owners; `settle` chooses among them.

        Args:
            owners: for each shard its owners.
            reach: makes the control connection to one.
            choose: takes the best path to one that is about to be used.
            prepare: gives one, whose path is chosen, what is kept of its shard, where the owner before it had nothing to
                hand on.
            changed: told of a connection that is not used any more, in the thread that found out. It must not come back here
                for one.
        """
        self._reach, self._choose, self._prepare, self._changed = reach, choose, prepare, changed
        self._lock = threading.Lock()  # of what follows: never held over a call to an owner
        self._reviving = threading.Lock()
        self._turns = [threading.Lock() for _ in owners]  # who puts another owner in a shard's place
        self._closed = False
        self._given = {shard for shard, group in enumerate(owners) if group}
        self._standby: list[list[Connection]] = []
        self._away: list[tuple[int, Owner]] = []  # to be tried again
        self.connections: list[Connection] = []
        self.lost: dict[int, CotraError] = {}
        self.renewed: set[int] = set()
        try:
            for shard in range(len(owners)):
                self._standby.append([])
                self.connections.append(MissingConnection(shard, ""))
            self._reach_all(owners)
        except BaseException:
            self.close()
            raise

    def _reach_all(self, owners: Sequence[Sequence[Owner]]) -> None:
        """Connects to all owners at once: those that hang cost one deadline together."""
        everyone = [(shard, owner) for shard, group in enumerate(owners) for owner in group]
        with ThreadPoolExecutor(max(1, min(_AT_ONCE, len(everyone))), "cotra-connect") as pool:
            calls = [pool.submit(self._reach, shard, owner) for shard, owner in everyone]
        fault: BaseException | None = None
        for (shard, owner), call in zip(everyone, calls, strict=True):
            error = call.exception()
            if error is None:
                self._standby[shard].append(call.result())
            elif isinstance(error, CotraError) and not isinstance(error, InvalidInputError):  # it is that owner's
                self._away.append((shard, owner))
                self.lost.setdefault(shard, error)
                if len(owners[shard]) > 1:
                    log.warning("shard %d has an owner less: %s", shard, error)
            else:
                fault = fault or error
        if fault is not None:
            raise fault
        for shard, group in enumerate(owners):
            if not group:
                self.lost[shard] = TransportError(f"shard {shard} has no owner", shard=shard)
            if self._standby[shard]:
                self._standby[shard] = _alike(self._standby[shard])
                self.lost.pop(shard, None)

    @property
    def images(self) -> tuple[int, ...]:
        """The checksum of each shard's image, which names it; 0 where it was never reached, or its owner does not tell."""
        return tuple(connection.shard.image_checksum or 0 for connection in self.connections)

    @property
    def known(self) -> list[Connection]:
        """One owner of each shard that was reached, before `settle`."""
        return [standby[0] for standby in self._standby if standby]

    def settle(self, *, allow_partial: bool) -> None:
        """Takes the nearest owner of each shard.

        Raises why a shard has none, that it was not reached or that no path to it works; with `allow_partial` only where all
        have none.
        """
        known = self.known
        for shard, standby in enumerate(self._standby):
            if known:
                self.connections[shard] = MissingConnection(shard, "", known[0].shard)
            if not standby:
                continue
            connection, error = self._next(shard)
            if connection is not None:
                self.connections[shard] = connection
            elif error is not None:
                self.lost[shard] = error
        if self.lost and not (allow_partial and len(self.lost) < len(self.connections)):
            raise self.lost[min(self.lost)]
        for shard, error in sorted(self.lost.items()):
            level = logging.WARNING if shard in self._given else logging.INFO  # who gives none knows
            log.log(level, "shard %d has no owner, and searches go on without it: %s", shard, error)

    def _next(self, shard: int, instead_of: Connection | None = None) -> tuple[Connection | None, CotraError | None]:
        """The nearest standby with a path that works, ready to be used `instead_of` another; or why there is none, None where
        there was no standby. Those without one are away."""
        error = None
        while True:
            with self._lock:
                if not self._standby[shard]:
                    return None, error
                connection = self._standby[shard].pop(0)
            try:
                self._ready(connection, instead_of)
            except BaseException as failed:  # whatever it was: it is tried again
                with self._lock:
                    self._away.append((shard, connection.owner))
                connection.close()
                self._changed(connection)
                if not isinstance(failed, CotraError):
                    raise
                error = failed
                continue
            return connection, None

    def _ready(self, connection: Connection, instead_of: Connection | None) -> None:
        """Takes the best path to an owner that is to be used `instead_of` another; None: the first of its shard, at `settle`."""
        self._choose(connection)
        if instead_of is not None and instead_of.cache is None:
            self._prepare(connection)

    def _use(self, connection: Connection, instead_of: Connection) -> None:
        """Puts an owner in use; under the lock. Raises `ClosedError` once closed."""
        if self._closed:
            connection.close()
        self._check_open()
        connection.take_over(instead_of)
        self.connections[connection.index] = connection

    def replace(self, failed: Connection, error: CotraError, *, give_up: bool, tried: set[Tried]) -> Connection | None:
        """The owner to go on with where one failed in a search; None where none is left, or the one that is failed in that search
        already: it was slow, say, and found well meanwhile. `tried` is what the search keeps of those, empty at first.

        The owner that failed is not used again until `revive` found it well; without another one that is so only where searches
        are to give the shard up, else it stays in use, for whoever sees the error and tries again. Raises `ClosedError` once
        closed.
        """
        tried.add((failed.index, failed.address))
        other = self._replace(failed, error, give_up=give_up)
        return None if other is None or (other.index, other.address) in tried else other

    def _replace(self, failed: Connection, error: CotraError, *, give_up: bool) -> Connection | None:
        shard = failed.index
        with self._turns[shard]:
            with self._lock:
                self._check_open()
                connection = self.connections[shard]
            if connection is not failed or failed.transport == LOST:  # another thread saw it first
                return None if connection.transport == LOST else connection
            other, _ = self._next(shard, failed)
            if other is None and not give_up:
                return None
            with self._lock:
                self._use(other or MissingConnection(shard, failed.address, failed.shard), failed)
                self._away.append((shard, failed.owner))
                if other is None:
                    self.lost[shard] = error.with_traceback(None)  # kept, and should keep nothing else alive
        if other is None:
            log.warning("%s failed, and no owner is left: searches go on without it: %s", failed, error)
        else:
            log.warning("%s failed, and %s goes on over %s: %s", failed, other, other.transport, error)
        self._changed(failed)
        failed.retire()
        return other

    def owners(self, shard: int) -> list[Connection]:
        """The owners of a shard that are there, that in use first."""
        with self._lock:
            return [self.connections[shard], *self._standby[shard]]

    @property
    def has_spare(self) -> bool:
        """Whether some shard has another owner that could take over."""
        return any(self._standby)

    def revive(self, before_each: Callable[[], None]) -> list[str]:
        """Tries the owners that failed again; the addresses of those that are back. Others' searches go on meanwhile.

        `before_each` is called before each of them, and ends it by what it raises."""
        back = []
        with self._reviving:
            with self._lock:
                away = list(self._away)
            for shard, owner in away:
                before_each()
                try:
                    connection = self._reach(shard, owner)
                    if self._take_back(connection):
                        back.append(connection.address)
                        log.info("%s is back", connection)
                except CotraError as error:
                    if self._closed:
                        raise
                    log.debug("shard %d: %s", shard, error)
                except Exception:  # it is tried again, as all that are away
                    log.exception("shard %d: %s was tried again", shard, owner)
        return back

    def _take_back(self, connection: Connection) -> bool:
        """Whether an owner that was away is one again: in use where its shard has none. Raises `CotraError` where no path to it
        works; it stays away then."""
        shard, gone = connection.index, None
        with self._turns[shard]:
            try:
                now = self.connections[shard]
                is_same = _is_same(now, connection)
                if is_same and now.transport == LOST:
                    self._ready(connection, now)
                    gone = now
                with self._lock:
                    if gone is not None:
                        self._use(connection, gone)
                        self.lost.pop(shard, None)
                    elif is_same:
                        self._check_open()
                        self._standby[shard].append(connection)
                    self._away.remove((shard, connection.owner))
            except BaseException:
                connection.close()
                raise
        if not is_same:
            log.info("%s is back with another image, and is not used for this one", connection)
            self.renewed.add(shard)
            connection.close()
        if gone is not None:
            self._changed(gone)
        return is_same

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the cluster is closed")

    @property
    def are_all_here(self) -> bool:
        """Whether no owner is away."""
        return not self._away

    def close(self) -> None:
        """Closes every connection."""
        with self._lock:
            self._closed = True
            connections = [*self.connections, *(connection for standby in self._standby for connection in standby)]
        for connection in connections:
            connection.close()


def _is_same(known: Connection, connection: Connection) -> bool:
    """Whether both hold one image. What was never reached could be any."""
    a, b = known.shard, connection.shard
    if isinstance(known, MissingConnection) and not known.address:
        return (a.dim, a.metric, a.graph_id) == (b.dim, b.metric, b.graph_id)
    return (a.generation, a.count, a.image_checksum) == (b.generation, b.count, b.image_checksum)


def _alike(connections: list[Connection]) -> list[Connection]:
    """Those that hold one image, nearest first; older generations are passed over. Raises `InvalidInputError`."""
    newest = max(connection.shard.generation for connection in connections)
    current = []
    for connection in sorted(
        connections, key=lambda connection: (not isinstance(connection, LocalConnection), connection.link.rpc_s)
    ):
        if connection.shard.generation < newest:
            log.warning(
                "%s is passed over: generation %d, and %d is the newest",
                connection,
                connection.shard.generation,
                newest,
            )
            connection.close()
            continue
        current.append(connection)
    for connection in current[1:]:
        if not _is_same(current[0], connection):
            raise InvalidInputError(
                f"{current[0]} and {connection} are given as owners of one shard, and hold different ones",
                shard=connection.index,
            )
    return current
