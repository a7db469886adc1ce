"""Who owns each shard: the owner that a cluster uses, those that would take its place, and those that are away."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from cotra_rdma import messages
from cotra_rdma.errors import ClosedError, CotraError, InvalidInputError, TransportError
from cotra_rdma.job import Answer, SearchJob
from cotra_rdma.own import Owned, OwnPeer
from cotra_rdma.peer import LOST, Peer

log = logging.getLogger(__name__)

Owner = str | Owned
"""An owner's address, or what this process holds itself."""


class AbsentPeer(Peer):
    """In the place of a shard that no owner can be reached of."""

    def __init__(self, index: int, address: str, like: messages.ShardFields | None = None) -> None:
        """`like`: what is known of the shard, or of another one where it was never reached (`address` is "")."""
        self._begin(index, address, 1)
        self.transport = LOST
        known = like or messages.ShardFields(0, "", 0, 0, 0, 0)
        self.shard = known if address else msgspec.structs.replace(known, count=0, image_checksum=0)
        self.capabilities = messages.RegionResponse(shard=self.shard, transports={"rpc": "it has no owner"})

    def renew(self) -> None:
        """Nobody is there."""

    def search(self, job: SearchJob) -> Answer:
        """Raises `TransportError`."""
        raise TransportError(f"{self} has no owner", shard=self.index)

    def search_all(self, job: SearchJob) -> Any:
        """Raises `TransportError`."""
        raise TransportError(f"{self} has no owner", shard=self.index)


class Replicas:
    """The shards of a cluster, each with its owners. Threads may share it.

    Attributes:
        peers: for each shard the owner in use; an `AbsentPeer` where there is none. Replaced in place.
        lost: why a shard has no owner, by its position.
    """

    def __init__(
        self,
        owners: Sequence[Sequence[Owner]],
        reach: Callable[[int, Owner], Peer],
        choose: Callable[[Peer], None],
        changed: Callable[[Peer], None],
    ) -> None:
        """Args:
        owners: for each shard its owners.
        reach: makes the control connection to one.
        choose: takes the best path to one that is about to be used.
        changed: told of a peer that is not used any more.
        """
        self._reach, self._choose, self._changed = reach, choose, changed
        self._lock = threading.Lock()
        self._reviving = threading.Lock()
        self._closed = False
        self._given = {shard for shard, group in enumerate(owners) if group}
        self._standby: list[list[Peer]] = []
        self._away: list[tuple[int, Owner]] = []  # to be tried again
        self.peers: list[Peer] = []
        self.lost: dict[int, CotraError] = {}
        try:
            for shard, group in enumerate(owners):
                self._standby.append([])
                self.peers.append(AbsentPeer(shard, ""))
                self._reach_all(shard, group)
        except BaseException:
            self.close()
            raise

    def _reach_all(self, shard: int, group: Sequence[Owner]) -> None:
        if not group:
            self.lost[shard] = TransportError(f"shard {shard} has no owner", shard=shard)
        for owner in group:
            try:
                self._standby[shard].append(self._reach(shard, owner))
            except TransportError as error:
                self._away.append((shard, owner))
                self.lost.setdefault(shard, error)
                if len(group) > 1:
                    log.warning("shard %d has an owner less: %s", shard, error)
        if self._standby[shard]:
            self._standby[shard] = _alike(self._standby[shard])
            self.lost.pop(shard, None)

    @property
    def images(self) -> tuple[int, ...]:
        """The checksum of each shard's image, which names it; 0 where it was never reached, or its owner does not tell."""
        return tuple(peer.shard.image_checksum or 0 for peer in self.peers)

    @property
    def known(self) -> list[Peer]:
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
                self.peers[shard] = AbsentPeer(shard, "", known[0].shard)
            error = self._promote(shard) if standby else None
            if error is not None:
                self.lost[shard] = error
        if self.lost and not (allow_partial and len(self.lost) < len(self.peers)):
            raise self.lost[min(self.lost)]
        for shard, error in sorted(self.lost.items()):
            level = logging.WARNING if shard in self._given else logging.INFO  # who gives none knows
            log.log(level, "shard %d has no owner, and searches go on without it: %s", shard, error)

    def _promote(self, shard: int) -> CotraError | None:
        """Puts the nearest standby with a path that works in use; why there is none."""
        standby, error = self._standby[shard], None
        while standby:
            peer = standby.pop(0)
            try:
                self._choose(peer)
            except CotraError as failed:
                error = failed
                self._away.append((shard, peer.owner))
                peer.close()
                continue
            except BaseException:
                peer.close()
                raise
            self.peers[shard] = peer
            self.lost.pop(shard, None)
            return None
        return error

    def replace(self, failed: Peer, error: CotraError, *, give_up: bool) -> Peer | None:
        """The owner to go on with where one failed in a search; None where none is left.

        The owner that failed is not used again until `revive` found it well; without another one that is so only where searches
        are to give the shard up, else it stays in use, for whoever sees the error and tries again. Raises `ClosedError` once
        closed.
        """
        with self._lock:
            shard = failed.index
            if self._closed:
                raise ClosedError("the cluster is closed")
            if self.peers[shard] is failed:
                self._promote(shard)
                if self.peers[shard] is failed and not give_up:
                    return None
                self._away.append((shard, failed.owner))
                if self.peers[shard] is failed:
                    self.peers[shard] = AbsentPeer(shard, failed.address, failed.shard)
                peer = self.peers[shard]
                if peer.transport == LOST:
                    self.lost[shard] = error
                    log.warning("%s failed, and no owner is left: searches go on without it: %s", failed, error)
                else:
                    peer.take_over(failed)
                    log.warning("%s failed, and %s goes on over %s: %s", failed, peer, peer.transport, error)
                self._changed(failed)
                failed.retire()
            peer = self.peers[shard]
            return None if peer.transport == LOST else peer

    def owners(self, shard: int) -> list[Peer]:
        """The owners of a shard that are there, that in use first."""
        with self._lock:
            return [self.peers[shard], *self._standby[shard]]

    def revive(self) -> list[str]:
        """Tries the owners that failed again; the addresses of those that are back. Others' searches go on meanwhile."""
        with self._reviving:
            return self._revive()

    def _revive(self) -> list[str]:
        with self._lock:
            away, self._away = self._away, []
        back = []
        for shard, owner in away:
            try:
                peer = self._reach(shard, owner)
            except CotraError as error:
                log.debug("shard %d: %s", shard, error)
                self._away.append((shard, owner))
                continue
            with self._lock:
                if self._closed or not _is_same(self.peers[shard], peer):
                    log.info("%s is back with another image, and stays out: connect again", peer)
                    peer.close()
                    continue
                self._standby[shard].append(peer)
                gone = self.peers[shard]
                if gone.transport == LOST:
                    if self._promote(shard) is not None:
                        continue
                    self._changed(gone)
                back.append(peer.address)
                log.info("%s is back", peer)
        return back

    @property
    def are_all_here(self) -> bool:
        """Whether no owner is away."""
        return not self._away

    def close(self) -> None:
        """Closes every connection."""
        with self._lock:
            self._closed = True
            peers = [*self.peers, *(peer for standby in self._standby for peer in standby)]
        for peer in peers:
            peer.close()


def _is_same(known: Peer, peer: Peer) -> bool:
    """Whether both hold one image. What was never reached could be any."""
    a, b = known.shard, peer.shard
    if isinstance(known, AbsentPeer) and not known.address:
        return (a.dim, a.metric, a.graph_id) == (b.dim, b.metric, b.graph_id)
    return (a.generation, a.count, a.image_checksum) == (b.generation, b.count, b.image_checksum)


def _alike(peers: list[Peer]) -> list[Peer]:
    """Those that hold one image, nearest first; older generations are passed over. Raises `InvalidInputError`."""
    newest = max(peer.shard.generation for peer in peers)
    current = []
    for peer in sorted(peers, key=lambda peer: (not isinstance(peer, OwnPeer), peer.link.rpc_s)):
        if peer.shard.generation < newest:
            log.warning("%s is passed over: generation %d, and %d is the newest", peer, peer.shard.generation, newest)
            peer.close()
            continue
        current.append(peer)
    for peer in current[1:]:
        if not _is_same(current[0], peer):
            raise InvalidInputError(
                f"{current[0]} and {peer} are given as owners of one shard, and hold different ones", shard=peer.index
            )
    return current
