"""What a plan says, done: owners asked, memory read, the answers put together."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from cotra_rdma._core.stats import COUNTS, STATS_DTYPE
from cotra_rdma._native.merge import merge
from cotra_rdma._reader.batch import Answer, OutOfTimeError, SearchJob
from cotra_rdma._reader.connection import LOST, Peer
from cotra_rdma._reader.engine_pool import LanePool, OnlyAskedError, named
from cotra_rdma._reader.planner import Plan
from cotra_rdma._reader.replicas import Replicas, Tried
from cotra_rdma.errors import CotraError, FormatError, TransportError

Merged = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.int32], npt.NDArray[np.void]]
"""ids int64[n_queries, k], distances float32 likewise, the shard of each int32, and one `STATS_DTYPE` record for each query."""


class Gatherer:
    """Searches the shards of one cluster."""

    def __init__(self, replicas: Replicas, lanes: LanePool, executor: Callable[[], ThreadPoolExecutor]) -> None:
        """`executor` gives the threads that wait for owners."""
        self._replicas, self._lanes, self._executor = replicas, lanes, executor

    def gather(
        self, peers: list[Peer], job: SearchJob, plan: Plan, n_threads: int, lenient: bool
    ) -> tuple[list[tuple[list[int], Answer]], dict[int, CotraError], Plan]:
        """Asks every shard: the answers with the shards that they are of, the failures, and the plan as it was carried out: with
        more shards `asked` where owners took them over that can only be asked."""
        answers: list[tuple[list[int], Answer]] = []
        failures: dict[int, CotraError] = {}
        calls: dict[int, Future[Answer]] = {}
        stop = job.stop

        def ask(peer: Peer) -> None:
            stop.expect(len(job.queries))
            calls[peer.index] = self._executor().submit(self._ask, peer, job.of_shards([peer.index]), lenient)

        near = []
        for peer in peers:
            if peer.transport == LOST:  # its owner may be back since, and is not asked in this search
                known = self._replicas.lost.get(peer.index)
                failures[peer.index] = known or TransportError(f"{peer} had no owner", shard=peer.index)
            elif peer.index in plan.asked or (peer.lists if plan.lists else peer.view) is None:
                ask(peer)
            else:
                near.append(peer)
        if near:
            stop.expect(len(job.queries))
        if lenient or self._replicas.has_spare:
            job = job.with_a_spare()
        try:
            while near:
                try:
                    if plan.lists:
                        answers += self._probe(near, job, n_threads, failures, lenient)
                    else:
                        answers += self._walk(near, job, plan.pushed, n_threads, failures, lenient)
                    break
                except OnlyAskedError as error:
                    ask(self._replicas.peers[error.shard or 0])
                    near = [peer for peer in near if peer.index != error.shard]
        except BaseException:
            stop.set()
            raise
        finally:
            if calls:
                stop.wait(calls.values())
            for shard, call in calls.items():
                try:
                    labels, distances, stats = call.result()
                    answers.append(([shard], (labels[np.newaxis], distances[np.newaxis], stats)))
                except CotraError as error:
                    failures[shard] = error
        if calls:
            stop.check()
        return answers, failures, plan if len(calls) == len(plan.asked) else plan._replace(asked=frozenset(calls))

    def _walk(
        self,
        near: list[Peer],
        job: SearchJob,
        pushed: frozenset[int],
        n_threads: int,
        failures: dict[int, CotraError],
        lenient: bool,
    ) -> list[tuple[list[int], Answer]]:
        """Walks graphs; shards that are lost meanwhile are noted in `failures`."""
        numbers = [peer.index for peer in near]
        owners = frozenset(peer for peer in near if peer.index in pushed)
        answer, lost = self._lanes.search(near, job.of_shards(numbers), n_threads, owners, lenient=lenient)
        failures |= lost
        return [(numbers, answer)]

    def _ask(self, peer: Peer, job: SearchJob, lenient: bool) -> Answer:
        """Has an owner search its shard, or another of the same shard where it fails, or answers what is none. `lenient`ly the
        last of them is given up too, so that the next search does not wait for it."""
        tried: set[Tried] = set()
        if len(self._replicas.owners(peer.index)) > 1:
            job = job.with_a_spare()
        while True:
            try:
                return peer.search(job)
            except OutOfTimeError:
                raise
            except (TransportError, FormatError) as error:
                other = None
                if peer.transport != LOST:  # another search gave it up since this one was planned
                    other = self._replicas.replace(peer, named(error, peer), give_up=lenient, tried=tried)
                if other is None:
                    raise
                peer = other

    def _probe(
        self, near: list[Peer], job: SearchJob, n_threads: int, failures: dict[int, CotraError], lenient: bool
    ) -> list[tuple[list[int], Answer]]:
        """Reads inverted lists; a shard that fails is read anew over another owner, or noted in `failures`."""
        tried: set[Tried] = set()
        while near:
            numbers = [peer.index for peer in near]
            try:
                return [(numbers, self._lanes.probe(near, job.of_shards(numbers), n_threads))]
            except CotraError as error:
                if error.shard not in numbers:
                    raise
                at = numbers.index(error.shard)
                other = self._replicas.replace(near[at], error, give_up=lenient, tried=tried)
                if other is None and not lenient:
                    raise
                if other is None:
                    failures[error.shard] = error
                elif other.lists is None:
                    raise OnlyAskedError(f"{other} has no inverted lists to read", shard=other.index) from error
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
    """What a search used to reach a shard, over the owner that it ended with."""
    if peer.index in failures:
        return LOST
    if peer.index in plan.asked:
        return "rpc"
    return "push" if peer.index in plan.pushed or peer.transport == "rpc" else peer.transport
