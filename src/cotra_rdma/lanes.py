"""Lanes: what a thread searches one-sided shards with. They are made when they are needed, and kept for the next search."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np

from cotra_rdma.channel import Channel
from cotra_rdma.engine import STATS_DTYPE, Engine, View
from cotra_rdma.errors import CotraError, InvalidInputError
from cotra_rdma.ivf import MAX_PROBE, SpireEngine
from cotra_rdma.job import Answer, SearchJob
from cotra_rdma.peer import Peer


@dataclass(slots=True)
class _Lane:
    """A channel to each of some shards, and engines over them: one thread's at a time."""

    peers: Sequence[Peer]
    channels: Sequence[Channel]
    views: Sequence[View]
    engine: Engine
    stack: ExitStack = field(default_factory=ExitStack)
    spire: SpireEngine | None = None

    def walk(self, job: SearchJob) -> Answer:
        """Walks the graphs."""
        return self.engine.search(
            job.queries,
            job.k,
            job.ef,
            job.beam,
            inflight=job.inflight,
            timeout_s=job.timeout_s,
            filters=job.filters,
            mask=job.mask,
        )

    def probe(self, job: SearchJob) -> Answer:
        """Searches the inverted lists. What each shard found is told apart, as a walk's answer is."""
        if self.spire is None:
            tables = [peer.lists for peer in self.peers]
            assert all(table is not None for table in tables)
            self.spire = SpireEngine.create(self.views, [t for t in tables if t is not None], self.channels)
        labels, distances, shards, told = self.spire.search(
            job.queries,
            job.k,
            min(math.ceil(job.ef / self._let_through(job)), MAX_PROBE),
            inflight=job.inflight,
            timeout_s=job.timeout_s,
            filters=job.filters,
            mask=job.mask,
        )
        apart = np.arange(len(self.peers))[:, np.newaxis, np.newaxis] == shards
        stats = np.zeros(len(labels), STATS_DTYPE)
        for name in ("reads", "rounds", "read_bytes", "latency_ns"):
            stats[name] = told[name]
        stats["expansions"] = told["reranked"]
        order = np.argsort(~apart, axis=2, kind="stable")  # a shard's answers first, in their order; then empty places
        return (
            np.take_along_axis(np.where(apart, labels, -1), order, 2),
            np.take_along_axis(np.where(apart, distances, np.float32(np.inf)), order, 2),
            stats,
        )

    def _let_through(self, job: SearchJob) -> float:
        """The share of the rows that the job's filters let through: so many more lists hold as many of them."""
        if job.filters is None:
            return 1.0
        counts = [peer.shard.count for peer in self.peers]
        through = 0
        for bitmap, count in zip(job.filters, counts, strict=True):
            bits = None if bitmap is None else np.frombuffer(bitmap, np.uint8)
            through += count if bits is None else int(np.unpackbits(bits, count=count, bitorder="little").sum())
        return max(through, 1) / max(sum(counts), 1)

    def close(self) -> None:
        if self.spire is not None:
            self.spire.close()
        self.engine.close()
        self.stack.close()


class LanePool:
    """The lanes of a cluster, by the shards that they reach."""

    def __init__(self, executor: Callable[[], ThreadPoolExecutor]) -> None:
        self._executor = executor
        self._lock = threading.Lock()
        self._closed = False
        self._idle: dict[tuple[Peer, ...], list[_Lane]] = {}

    def search(self, peers: Sequence[Peer], job: SearchJob, n_threads: int, *, lists: bool = False) -> Answer:
        """Walks the shards of `peers`, to which the job's filters and mask belong; or probes their inverted lists.

        Raises an error whose `shard` is the position in the cluster.
        """
        n_parts = min(n_threads, len(job.queries))
        if n_parts <= 1:
            return self._search_part(peers, job, lists)
        parts = job.split(n_parts)
        running = [self._executor().submit(self._search_part, peers, part, lists) for part in parts]
        for error in [part.exception() for part in running]:
            if error is not None:
                raise error
        labels, distances, stats = zip(*(part.result() for part in running), strict=True)
        return np.concatenate(labels, axis=1), np.concatenate(distances, axis=1), np.concatenate(stats)

    def _search_part(self, peers: Sequence[Peer], job: SearchJob, lists: bool) -> Answer:
        key = tuple(peers)
        with self._lock:
            idle = self._idle.get(key)
            lane = idle.pop() if idle else None
        lane = lane or _open(peers)
        try:
            answer = lane.probe(job) if lists else lane.walk(job)
        except InvalidInputError:
            self._give_back(key, lane)
            raise
        except CotraError as error:
            lane.close()  # READs of the failed search may still be on their way into its buffers
            if error.shard is not None:  # the engine counts its own shards
                peer = peers[error.shard]
                error.shard = peer.index
                error.args = (f"{peer}: {error}",)
            raise
        except BaseException:
            lane.close()
            raise
        self._give_back(key, lane)
        return answer

    def _give_back(self, key: tuple[Peer, ...], lane: _Lane) -> None:
        with self._lock:
            if not self._closed:
                self._idle.setdefault(key, []).append(lane)
                return
        lane.close()

    def close(self) -> None:
        """Closes the idle lanes, and those in use when they come back."""
        with self._lock:
            self._closed = True
            lanes = [lane for idle in self._idle.values() for lane in idle]
            self._idle.clear()
        for lane in lanes:
            lane.close()


def _open(peers: Sequence[Peer]) -> _Lane:
    with ExitStack() as stack:
        channels, views = [], []
        for peer in peers:
            channel, parts = peer.open_channel()
            stack.push(parts)
            channels.append(channel)
            assert peer.view is not None
            views.append(peer.view)
        return _Lane(
            peers, channels, views, Engine.create(views, channels, [peer.cache for peer in peers]), stack.pop_all()
        )
