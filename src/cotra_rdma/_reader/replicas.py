"""Who owns each shard: the owner that a cluster uses, those that would take its place, and those that are away."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from cotra_rdma._reader.batch import Answer, Batch
from cotra_rdma._reader.connection import LOST, Connection
from cotra_rdma._reader.local_connection import LocalConnection, Owned, address_of
from cotra_rdma._reader.threads import ContextPool
from cotra_rdma.errors import ClosedError, CotraError, InvalidInputError, StaleShardError, TransportError
from cotra_rdma.protocol.regions import RegionResponse, ShardFields

log = logging.getLogger(__name__)

_AT_ONCE = 32
"""Owners that are connected to at the same time."""

Owner = str | Owned
"""An owner's address, or what this process holds itself."""
Tried = tuple[int, str]
"""An owner that failed: the position of its shard, and its address."""


class MissingConnection(Connection):
    """Stands for a shard of which no owner can be reached."""

    def __init__(self, index: int, address: str, like: ShardFields | None = None) -> None:
        """Opens nothing.

        Args:
            index: the position of the shard.
            address: the owner that was lost; "" if none was ever reached.
            like: what is known of the shard. If it was never reached, what is known of another one.
        """
        self._begin(index, address, 1)
        self.transport = LOST
        known = like or ShardFields(0, "", 0, 0, 0, 0)
        self.shard = known if address else msgspec.structs.replace(known, count=0, image_checksum=0)
        self.capabilities = RegionResponse(shard=self.shard, transports={"rpc": "it has no owner"})

    def take_over(self, failed: Connection) -> None:
        """Keeps the cache and what is known of the shard, for an owner that comes back."""
        super().take_over(failed)
        self.coarse, self.calibration, self.number = failed.coarse, failed.calibration, failed.number

    def renew(self) -> None:
        """Does nothing: nobody is there."""

    def search(self, batch: Batch) -> Answer:
        """Raises `TransportError`."""
        raise TransportError(f"{self} has no owner", shard=self.index)

    def search_all(self, batch: Batch, images: Sequence[int] = ()) -> Any:
        """Raises `TransportError`."""
        raise TransportError(f"{self} has no owner", shard=self.index)


class Replicas:
    """The shards of a session, each with its owners.

    Any thread may use it.
    No thread waits for the owners of another shard.

    Attributes:
        connections: for each shard the connection to the owner in use, or a `MissingConnection`. It changes in place.
        lost: why a shard has no owner, by the position of the shard.
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
        """Connects to all owners. `settle` then chooses among them.

        Args:
            owners: for each shard its owners.
            reach: makes the control connection to an owner.
            choose: chooses the best path to an owner that is about to be used.
            prepare: fills the cache of a connection whose path is chosen, if the owner before it had no cache to hand on.
            changed: called with a connection that is no longer used, in the thread that noticed. It must not call back for
                a connection.
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
        """Connects to all owners at the same time, so that all that hang together cost one deadline."""
        everyone = [(shard, owner) for shard, group in enumerate(owners) for owner in group]
        with ContextPool(max(1, min(_AT_ONCE, len(everyone))), "cotra-connect") as pool:
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
        """The checksum of each shard's image, or 0 for a shard that was never reached."""
        return tuple(connection.shard.image_checksum or 0 for connection in self.connections)

    @property
    def known(self) -> list[Connection]:
        """A connection to each shard that was reached. It is for the time before `settle`."""
        return [standby[0] for standby in self._standby if standby]

    def settle(self, *, allow_partial: bool) -> None:
        """Chooses the nearest owner of each shard.

        Args:
            allow_partial: whether shards without an owner may be left out, as long as one shard has an owner.

        Raises:
            CotraError: a shard has no owner that can be used. The error says why: it was not reached, or no path to it works.
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
        """Takes the nearest standby with a path that works, and makes it ready.

        A standby without such a path counts as away from then on.

        Returns:
            The connection and None; or None and the last error, which is None if there was no standby.
        """
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
                connection.counts.note_away(failed)
                connection.close()
                self._changed(connection)
                if not isinstance(failed, CotraError):
                    raise
                error = failed
                continue
            return connection, None

    def _ready(self, connection: Connection, instead_of: Connection | None) -> None:
        """Chooses the path to an owner that will be used `instead_of` another one. None stands for the first owner of a shard."""
        self._choose(connection)
        if instead_of is not None and instead_of.cache is None:
            self._prepare(connection)

    def _use(self, connection: Connection, instead_of: Connection) -> None:
        """Puts an owner in use. The caller holds the lock. Raises `ClosedError` after `close`."""
        if self._closed:
            connection.close()
        self._check_open()
        connection.take_over(instead_of)
        self.connections[connection.index] = connection

    def replace(self, failed: Connection, error: CotraError, *, give_up: bool, tried: set[Tried]) -> Connection | None:
        """Returns the owner with which a search goes on after one has failed.

        The owner that failed is not used again until `revive` finds it well.
        If no other owner is left and `give_up` is not set, it stays in use: whoever gets the error may try again.

        Args:
            failed: the connection that failed.
            error: how it failed.
            give_up: whether later searches are to go on without the shard if no other owner is left.
            tried: the owners that failed in this search. It begins empty, and this call adds to it.

        Returns:
            The connection to go on with; None if no owner is left that did not fail in this search already.

        Raises:
            ClosedError: the cluster was closed.
        """
        tried.add((failed.index, failed.address))
        failed.counts.note_failure(error)
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
        failed.counts.note_away(error)
        if other is not None:
            failed.counts.note("replaced")
        if other is None:
            log.warning("%s failed, and no owner is left: searches go on without it: %s", failed, error)
        else:
            log.warning("%s failed, and %s goes on over %s: %s", failed, other, other.transport, error)
        self._changed(failed)
        failed.retire()
        return other

    def owners(self, shard: int) -> list[Connection]:
        """Returns the connections to the owners of a shard: the one in use first, then those on standby."""
        with self._lock:
            return [self.connections[shard], *self._standby[shard]]

    def all_owners(self) -> list[tuple[int, str, str, str]]:
        """Returns all owners in the order of the shards: shard, address, state and path.

        The state is "in use", "standby" or "away". The path is "" if none was chosen.
        """
        found: dict[tuple[int, str], tuple[str, str]] = {}
        with self._lock:
            for now, standby in zip(self.connections, self._standby, strict=True):
                if now.transport != LOST:
                    found[now.index, now.address] = "in use", now.transport
                for other in standby:
                    found.setdefault((other.index, other.address), ("standby", other.transport))
            for shard, owner in self._away:
                found.setdefault((shard, address_of(owner)), ("away", ""))
        return [(shard, address, *told) for (shard, address), told in sorted(found.items())]

    @property
    def has_spare(self) -> bool:
        """Whether a shard has another owner that could take over."""
        return any(self._standby)

    def revive(self, before_each: Callable[[], None]) -> list[str]:
        """Tries the owners that failed again. Searches of other threads go on meanwhile.

        Args:
            before_each: called before each owner. What it raises ends this call.

        Returns:
            The addresses of the owners that are back.
        """
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
        """Takes an owner that was away back: in use if its shard has no owner, else on standby.

        Returns:
            False if it holds another image now. It is closed then.

        Raises:
            CotraError: no path to it works. It stays away.
        """
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
            except BaseException as error:
                connection.counts.note_away(error)
                connection.close()
                raise
        if not is_same:
            log.info("%s is back with another image, and is not used for this one", connection)
            self.renewed.add(shard)
            connection.counts.note_away(
                StaleShardError("it serves another image than this reader searches", shard=shard)
            )
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
    """Whether two connections are to the same image. A shard that was never reached could have any."""
    a, b = known.shard, connection.shard
    if isinstance(known, MissingConnection) and not known.address:
        return (a.dim, a.metric, a.graph_id) == (b.dim, b.metric, b.graph_id)
    return (a.generation, a.count, a.image_checksum) == (b.generation, b.count, b.image_checksum)


def _alike(connections: list[Connection]) -> list[Connection]:
    """Returns the connections to the newest generation of a shard, the nearest first, and closes the others.

    Raises:
        InvalidInputError: owners of that generation hold different images.
    """
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
            connection.counts.note_away(
                StaleShardError(f"it serves generation {connection.shard.generation}, and {newest} is the newest")
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
