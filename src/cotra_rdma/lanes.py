"""Lanes: what a thread searches one-sided shards with. They are made when they are needed, and kept for the next search."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np

from cotra_rdma.engine import Engine
from cotra_rdma.errors import CotraError, InvalidInputError
from cotra_rdma.job import Answer, SearchJob
from cotra_rdma.peer import Peer


@dataclass(slots=True)
class _Lane:
    """A channel to each of some shards, and an engine over them: one thread's at a time."""

    engine: Engine
    stack: ExitStack = field(default_factory=ExitStack)

    def close(self) -> None:
        self.engine.close()
        self.stack.close()


class LanePool:
    """The lanes of a cluster, by the shards that they reach."""

    def __init__(self, executor: Callable[[], ThreadPoolExecutor]) -> None:
        self._executor = executor
        self._lock = threading.Lock()
        self._closed = False
        self._idle: dict[tuple[int, ...], list[_Lane]] = {}

    def search(self, peers: Sequence[Peer], job: SearchJob, n_threads: int) -> Answer:
        """Walks the shards of `peers`, to which the job's filters and mask belong.

        Raises an error whose `shard` is the position in the cluster.
        """
        parts = job.split(min(n_threads, len(job.queries)))
        if len(parts) == 1:
            return self._search_part(peers, job)
        running = [self._executor().submit(self._search_part, peers, part) for part in parts]
        for error in [part.exception() for part in running]:
            if error is not None:
                raise error
        labels, distances, stats = zip(*(part.result() for part in running), strict=True)
        return np.concatenate(labels, axis=1), np.concatenate(distances, axis=1), np.concatenate(stats)

    def _search_part(self, peers: Sequence[Peer], job: SearchJob) -> Answer:
        key = tuple(peer.index for peer in peers)
        with self._lock:
            idle = self._idle.get(key)
            lane = idle.pop() if idle else None
        lane = lane or _open(peers)
        try:
            answer = lane.engine.search(
                job.queries,
                job.k,
                job.ef,
                job.beam,
                inflight=job.inflight,
                timeout_s=job.timeout_s,
                filters=job.filters,
                mask=job.mask,
            )
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

    def _give_back(self, key: tuple[int, ...], lane: _Lane) -> None:
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
        return _Lane(Engine.create(views, channels), stack.pop_all())
