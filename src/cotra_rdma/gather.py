"""What a plan says, done: owners asked, memory read, the answers put together."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from cotra_rdma.engine import COUNTS, STATS_DTYPE, merge
from cotra_rdma.errors import CotraError, FormatError, TransportError
from cotra_rdma.job import Answer, SearchJob
from cotra_rdma.lanes import LanePool, named
from cotra_rdma.peer import LOST, Peer
from cotra_rdma.plan import Plan
from cotra_rdma.replicas import Replicas

Merged = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.int32], npt.NDArray[np.void]]
"""ids int64[n_queries, k], distances float32 likewise, the shard of each int32, and one `STATS_DTYPE` record for each query."""


class Gatherer:
    """Searches the shards of one cluster."""

    def __init__(self, replicas: Replicas, lanes: LanePool, executor: Callable[[], ThreadPoolExecutor]) -> None:
        """`executor` gives the threads that wait for owners."""
        self._replicas, self._lanes, self._executor = replicas, lanes, executor

    def gather(
        self, peers: list[Peer], job: SearchJob, plan: Plan, n_threads: int, lenient: bool
    ) -> tuple[list[tuple[list[int], Answer]], dict[int, CotraError]]:
        """Asks every shard: the answers with the shards that they are of, and the failures."""
        answers: list[tuple[list[int], Answer]] = []
        failures = dict(self._replicas.lost)
        calls = []
        for at in sorted(plan.asked):
            calls.append((at, self._executor().submit(self._ask, peers[at], job.of_shards([at]), lenient)))
        try:
            near = [peer for peer in peers if peer.index not in plan.asked and peer.transport != LOST]
            if near and plan.lists:
                answers += self._probe(near, job, n_threads, failures, lenient)
            elif near:
                numbers = [peer.index for peer in near]
                pushed = frozenset(peers[at] for at in plan.pushed)
                answer, lost = self._lanes.search(near, job.of_shards(numbers), n_threads, pushed, lenient=lenient)
                answers.append((numbers, answer))
                failures |= lost
        finally:
            for shard, call in calls:
                try:
                    labels, distances, stats = call.result()
                    answers.append(([shard], (labels[np.newaxis], distances[np.newaxis], stats)))
                except CotraError as error:
                    failures[shard] = error
        return answers, failures

    def _ask(self, peer: Peer, job: SearchJob, lenient: bool) -> Answer:
        """Has an owner search its shard, or another of the same shard where it fails, or answers what is none. `lenient`ly the
        last of them is given up too, so that the next search does not wait for it."""
        while True:
            try:
                return peer.search(job)
            except (TransportError, FormatError) as error:
                other = None
                if peer.transport != LOST:  # another search gave it up since this one was planned
                    other = self._replicas.replace(peer, named(error, peer), give_up=lenient)
                if other is None:
                    raise
                peer = other

    def _probe(
        self, near: list[Peer], job: SearchJob, n_threads: int, failures: dict[int, CotraError], lenient: bool
    ) -> list[tuple[list[int], Answer]]:
        """Reads inverted lists; a shard that fails is read anew over another owner, or noted in `failures`."""
        while near:
            numbers = [peer.index for peer in near]
            try:
                return [(numbers, self._lanes.probe(near, job.of_shards(numbers), n_threads))]
            except CotraError as error:
                if error.shard not in numbers:
                    raise
                at = numbers.index(error.shard)
                other = self._replicas.replace(near[at], error, give_up=lenient)
                if other is None and not lenient:
                    raise
                if other is None:
                    failures[error.shard] = error
                near[at : at + 1] = [] if other is None else [other]
        return []

    def merge(self, answers: list[tuple[list[int], Answer]], job: SearchJob) -> Merged:
        """The k nearest of all answers to each query: by distance, then shard, then id."""
        if len(answers) == 1:
            shards, (labels, distances, stats) = answers[0]
            ids, distances, at = merge(labels, distances)
            if len(shards) < len(self._replicas.peers):
                at = np.where(at < 0, at, np.array(shards, np.int32)[at])
            return ids, distances, at, stats
        shape = (len(self._replicas.peers), len(job.queries), job.k)
        labels = np.full(shape, -1, np.int64)
        distances = np.full(shape, np.inf, np.float32)
        total = np.zeros(len(job.queries), STATS_DTYPE)
        for shards, answer in answers:
            labels[shards], distances[shards], stats = answer
            for name in COUNTS:
                total[name] += stats[name]
            for name in ("rounds", "latency_ns"):
                total[name] = np.maximum(total[name], stats[name])
        return *merge(labels, distances), total


def used_of(peer: Peer, plan: Plan, failures: dict[int, CotraError]) -> str:
    """What a search used to reach a shard."""
    if peer.index in failures:
        return LOST
    return "rpc" if peer.index in plan.asked else "push" if peer.index in plan.pushed else peer.transport
