"""Executes a search plan: asks owners, reads memory, and merges the answers."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from cotra_rdma._core.stats import COUNTS, STATS_DTYPE
from cotra_rdma._native.merge import merge
from cotra_rdma._reader.batch import Answer, Batch, OutOfTimeError
from cotra_rdma._reader.connection import LOST, Connection
from cotra_rdma._reader.engine_pool import EnginePool, OnlyAskedError, named
from cotra_rdma._reader.planner import Plan
from cotra_rdma._reader.replicas import Replicas, Tried
from cotra_rdma.errors import CotraError, FormatError, TransportError

Merged = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.int32], npt.NDArray[np.void]]
"""ids int64[n_queries, k], distances float32 likewise, the shard of each int32, and one `STATS_DTYPE` record for each query."""


class SearchExecutor:
    """Searches the shards of one cluster."""

    def __init__(self, replicas: Replicas, engines: EnginePool, executor: Callable[[], ThreadPoolExecutor]) -> None:
        """Opens nothing. `executor` gives the threads that wait for owners."""
        self._replicas, self._engines, self._executor = replicas, engines, executor

    def gather(
        self, connections: list[Connection], batch: Batch, plan: Plan, n_threads: int, lenient: bool
    ) -> tuple[list[tuple[list[int], Answer]], dict[int, CotraError], Plan]:
        """Searches every shard.

        Args:
            connections: to all shards, as they were when the search began.
            batch: the queries and how to search them.
            plan: which shards are asked, pushed to and read.
            n_threads: threads that share the queries.
            lenient: whether to go on without a shard that has no owner left.

        Returns:
            The answers, each with the positions of its shards; the failures by position; and the plan as it was executed. A shard
            that an owner took over that can only be asked is among its `asked`.
        """
        answers: list[tuple[list[int], Answer]] = []
        failures: dict[int, CotraError] = {}
        calls: dict[int, Future[Answer]] = {}
        stop = batch.stop

        def ask(connection: Connection) -> None:
            stop.expect(len(batch.queries))
            calls[connection.index] = self._executor().submit(
                self._ask, connection, batch.of_shards([connection.index]), lenient
            )

        near = []
        for connection in connections:
            if connection.transport == LOST:  # its owner may be back since, and is not asked in this search
                known = self._replicas.lost.get(connection.index)
                failures[connection.index] = known or TransportError(
                    f"{connection} had no owner", shard=connection.index
                )
            elif connection.index in plan.asked or (connection.lists if plan.lists else connection.view) is None:
                ask(connection)
            else:
                near.append(connection)
        if near:
            stop.expect(len(batch.queries))
        if lenient or self._replicas.has_spare:
            batch = batch.with_a_spare()
        try:
            while near:
                try:
                    if plan.lists:
                        answers += self._probe(near, batch, n_threads, failures, lenient)
                    else:
                        answers += self._walk(near, batch, plan.pushed, n_threads, failures, lenient)
                    break
                except OnlyAskedError as error:
                    ask(self._replicas.connections[error.shard or 0])
                    near = [connection for connection in near if connection.index != error.shard]
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
        near: list[Connection],
        batch: Batch,
        pushed: frozenset[int],
        n_threads: int,
        failures: dict[int, CotraError],
        lenient: bool,
    ) -> list[tuple[list[int], Answer]]:
        """Walks the graphs of shards. Shards that are lost in between are added to `failures`."""
        numbers = [connection.index for connection in near]
        owners = frozenset(connection for connection in near if connection.index in pushed)
        answer, lost = self._engines.search(near, batch.of_shards(numbers), n_threads, owners, lenient=lenient)
        failures |= lost
        return [(numbers, answer)]

    def _ask(self, connection: Connection, batch: Batch, lenient: bool) -> Answer:
        """Asks an owner to search its shard.

        If the owner fails, or its answer is malformed, another owner of the shard is asked.
        If `lenient` is set, the last owner is given up as well, so that the next search does not wait for it.
        """
        tried: set[Tried] = set()
        if len(self._replicas.owners(connection.index)) > 1:
            batch = batch.with_a_spare()
        while True:
            try:
                return connection.search(batch)
            except OutOfTimeError:
                raise
            except (TransportError, FormatError) as error:
                other = None
                if connection.transport != LOST:  # another search gave it up since this one was planned
                    other = self._replicas.replace(connection, named(error, connection), give_up=lenient, tried=tried)
                if other is None:
                    raise
                connection = other

    def _probe(
        self, near: list[Connection], batch: Batch, n_threads: int, failures: dict[int, CotraError], lenient: bool
    ) -> list[tuple[list[int], Answer]]:
        """Reads inverted lists. A shard that fails is read again through another owner, or is added to `failures`."""
        tried: set[Tried] = set()
        while near:
            numbers = [connection.index for connection in near]
            try:
                return [(numbers, self._engines.probe(near, batch.of_shards(numbers), n_threads))]
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

    def merge(self, answers: list[tuple[list[int], Answer]], batch: Batch) -> Merged:
        """Merges answers to the k nearest of each query, in the order of distance, then shard, then id."""
        if len(answers) == 1:
            shards, (labels, distances, stats) = answers[0]
            ids, distances, at = merge(labels, distances)
            if len(shards) < len(self._replicas.connections):
                at = np.where(at < 0, at, np.array(shards, np.int32)[at])
            return ids, distances, at, stats
        shape = (len(self._replicas.connections), len(batch.queries), batch.k)
        labels = np.full(shape, -1, np.int64)
        distances = np.full(shape, np.inf, np.float32)
        total = np.zeros(len(batch.queries), STATS_DTYPE)
        for shards, answer in answers:
            labels[shards], distances[shards], stats = answer
            for name in COUNTS:
                total[name] += stats[name]
            for name in ("rounds", "latency_ns"):
                total[name] = np.maximum(total[name], stats[name])
        return *merge(labels, distances), total


def used_of(connection: Connection, plan: Plan, failures: dict[int, CotraError]) -> str:
    """Names the way by which a search reached a shard, through the owner that it ended with."""
    if connection.index in failures:
        return LOST
    if connection.index in plan.asked:
        return "rpc"
    return "push" if connection.index in plan.pushed or connection.transport == "rpc" else connection.transport
