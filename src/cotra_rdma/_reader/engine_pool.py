"""Engines over shards that are read. They are made when they are needed, and kept for the next search."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np
import numpy.typing as npt

from cotra_rdma._core.remote_expansion import Expansions
from cotra_rdma._core.stats import STATS_DTYPE
from cotra_rdma._core.stop import wait_for
from cotra_rdma._native.channel import Channel
from cotra_rdma._native.graph_engine import MOST_SLOTS, Engine, Source
from cotra_rdma._native.list_engine import MAX_PROBE, SpireEngine
from cotra_rdma._native.view import View
from cotra_rdma._reader.batch import Answer, Batch, OutOfTimeError
from cotra_rdma._reader.connection import Connection
from cotra_rdma.errors import CotraError, DeadlineError, InvalidInputError, SearchCancelledError

Executor = Callable[[], ThreadPoolExecutor]
_Key = tuple[tuple[Connection, ...], frozenset[Connection]]
Replace = Callable[[Connection, CotraError, bool, set[tuple[int, str]]], Connection | None]
"""Takes an owner that failed, and returns the one to go on with: `Replicas.replace`, with `give_up` and `tried`."""


class OnlyAskedError(CotraError):
    """An owner took a shard over that can be asked to search it, and whose memory cannot be read. `shard` is its position."""


class _ShardEngines:
    """Channels and engines for a fixed set of shards. Not thread-safe.

    An engine calls it as its `Helper`, if owners have to expand nodes or one fails.
    """

    def __init__(
        self, connections: Sequence[Connection], pushed: frozenset[Connection], replace: Replace, callers: Executor
    ) -> None:
        """Opens the channels.

        Args:
            connections: to the shards.
            pushed: those of them whose owners expand nodes.
            replace: gives another owner if one fails.
            callers: gives the threads that wait for owners.
        """
        self._connections = list(connections)
        self._replace, self._callers = replace, callers
        self._spire: SpireEngine | None = None
        self._unopened: dict[int, CotraError] = {}
        self._job: Batch | None = None
        self._lenient = False
        self._told_bytes = 0
        self._tried: set[tuple[int, str]] = set()  # owners that failed in the search at hand
        self.lost: dict[int, CotraError] = {}
        self.is_broken = False
        slots = MOST_SLOTS if pushed else 0  # so many walks then share a message
        with ExitStack() as stack:
            sources: list[Source] = []
            for at, connection in enumerate(connections):
                source: Source = None
                if connection not in pushed:
                    try:
                        source, parts = connection.open_source(slots)
                        stack.push(parts)
                    except CotraError as error:  # told when the first node of it is wanted
                        self._unopened[at] = error
                sources.append(source)
            self._sources = sources
            self._engine = Engine.create(self._views, sources, [connection.cache for connection in connections])
            self._stack = stack.pop_all()

    @property
    def _views(self) -> list[View]:
        views = [connection.view for connection in self._connections]
        assert all(view is not None for view in views)
        return [view for view in views if view is not None]

    def walk(self, batch: Batch, lenient: bool) -> Answer:
        """Walks the graphs.

        If a shard fails and has no other owner, the search fails at once.
        If `lenient` is set, the answer is without the shard instead, and `lost` says why.
        """
        self._job, self._told_bytes, self.lost, self._lenient = batch, 0, {}, lenient
        self._tried = set()
        answer = self._engine.search(
            batch.queries,
            batch.k,
            batch.ef,
            batch.beam,
            inflight=batch.inflight,
            timeout_s=batch.timeout_s,
            filters=batch.filters,
            mask=batch.mask,
            max_expansions=batch.most,
            helper=self,
            deadline=batch.deadline,
            stop=batch.stop,
        )
        if self._told_bytes:
            answer[2]["read_bytes"] += np.uint64(self._told_bytes // len(batch.queries))
        return answer

    def expand(self, pushes: Mapping[int, npt.NDArray[np.void]]) -> dict[int, Expansions | CotraError]:
        """Sends each owner one message, all at the same time. See `Helper`."""
        told: dict[int, Expansions | CotraError] = {at: e for at, e in self._unopened.items() if at in pushes}
        asked = [at for at in pushes if at not in told]
        spread = self._callers().map if len(asked) > 1 else map
        for at, answer in zip(
            asked, spread(lambda at: self._push(self._connections[at], pushes[at]), asked), strict=True
        ):
            told[at] = answer
            if isinstance(answer, Expansions):
                self._told_bytes += answer.nbytes + self._sent_bytes(pushes[at])
        return told

    def _push(self, connection: Connection, wanted: npt.NDArray[np.void]) -> Expansions | CotraError:
        assert self._job is not None
        wait_s = self._job.wait_s()
        try:
            return connection.expand(self._job.queries, wanted, wait_s, self._job.stop)
        except SearchCancelledError:
            raise
        except DeadlineError as error:
            if self._job.is_cut_short(wait_s):
                raise OutOfTimeError from None
            return error
        except CotraError as error:
            return error

    def _sent_bytes(self, wanted: npt.NDArray[np.void]) -> int:
        assert self._job is not None
        n_queries = 1 + np.count_nonzero(np.diff(wanted["query"]))
        return int(wanted.nbytes + n_queries * self._job.queries.itemsize * self._job.queries.shape[1])

    def replace(self, shard: int, error: CotraError) -> tuple[View, Source] | None:
        """Gives another owner's view and source for a shard that failed. See `Helper`."""
        failed = self._connections[shard]
        self.is_broken = True
        self._unopened.pop(shard, None)
        error = named(error, failed)
        while (connection := self._replace(failed, error, self._lenient, self._tried)) is not None:
            if connection.view is None:
                raise OnlyAskedError(f"{connection} can only be asked", shard=connection.index)
            self._connections[shard] = connection
            try:
                source, parts = connection.open_source(self._engine.slots)
            except CotraError as unopened:
                failed, error = connection, named(unopened, connection)
                continue
            self._stack.push(parts)
            return connection.view, source
        if not self._lenient:
            raise error
        self.lost[failed.index] = error.with_traceback(None)  # results keep it, and should keep nothing else alive
        return None

    def probe(self, batch: Batch) -> Answer:
        """Searches the inverted lists. The answer is by shard, as that of a walk."""
        if self._spire is None:
            tables = [connection.lists for connection in self._connections]
            assert all(table is not None for table in tables)
            self._spire = SpireEngine.create(self._views, [t for t in tables if t is not None], self._channels())
        n_probe = min(math.ceil(batch.ef / self._let_through(batch)), MAX_PROBE)
        labels, distances, shards, told = self._probe(batch, n_probe)
        infos = [connection.lists.info for connection in self._connections if connection.lists is not None]
        n_lists, wanted = sum(info.n_lists for info in infos), 0.0
        if batch.filters is not None:
            wanted = batch.ef * sum(info.entries for info in infos) / n_lists / 2
        while n_probe < n_lists:  # what a filter excludes may lie just where a query is
            starved = np.flatnonzero((told["allowed"] < wanted) | (labels[:, -1] < 0))
            if not len(starved):
                break
            n_probe = min(4 * n_probe, n_lists)
            mask = None if batch.mask is None else batch.mask[starved]
            *found, more = self._probe(batch._replace(queries=batch.queries[starved], mask=mask), n_probe)
            for to, of in zip((labels, distances, shards), found, strict=True):
                to[starved] = of
            for name in ("reads", "rounds", "reranked", "read_bytes", "latency_ns"):
                told[name][starved] += more[name]
            told["allowed"][starved] = more["allowed"]
        apart = np.arange(len(self._connections))[:, np.newaxis, np.newaxis] == shards
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

    def _probe(self, batch: Batch, n_probe: int) -> tuple[Any, Any, Any, Any]:
        assert self._spire is not None
        return self._spire.search(
            batch.queries,
            batch.k,
            n_probe,
            inflight=batch.inflight,
            timeout_s=batch.timeout_s,
            filters=batch.filters,
            mask=batch.mask,
            deadline=batch.deadline,
            stop=batch.stop,
        )

    def _channels(self) -> list[Channel]:
        """Returns the channels of the walks, and a channel over this process's own memory for a shard that has none."""
        channels = []
        for connection, source in zip(self._connections, self._sources, strict=True):
            if not isinstance(source, Channel):
                source, parts = connection.open_channel()
                self._stack.push(parts)
            channels.append(source)
        return channels

    def _let_through(self, batch: Batch) -> float:
        """Returns the share of the rows that the filters let through. The fewer they are, the more lists must be read."""
        if batch.filters is None:
            return 1.0
        counts = [connection.shard.count for connection in self._connections]
        through = 0
        for bitmap, count in zip(batch.filters, counts, strict=True):
            bits = None if bitmap is None else np.frombuffer(bitmap, np.uint8)
            through += count if bits is None else int(np.unpackbits(bits, count=count, bitorder="little").sum())
        return max(through, 1) / max(sum(counts), 1)

    def close(self) -> None:
        if self._spire is not None:
            self._spire.close()
        self._engine.close()
        self._stack.close()


class EnginePool:
    """The engines of a cluster, by the shards that they reach."""

    def __init__(self, executor: Executor, callers: Executor, replace: Replace) -> None:
        """Makes no engine yet.

        Args:
            executor: gives the threads that share a search.
            callers: gives the threads that wait for owners. They are others, since the first wait for them.
            replace: gives another owner if one fails.
        """
        self._executor, self._callers = executor, callers
        self._replace = replace
        self._lock = threading.Lock()
        self._closed = False
        self._idle: dict[_Key, list[_ShardEngines]] = {}

    def search(
        self,
        connections: Sequence[Connection],
        batch: Batch,
        n_threads: int,
        pushed: frozenset[Connection] = frozenset(),
        *,
        lenient: bool = False,
    ) -> tuple[Answer, dict[int, CotraError]]:
        """Walks the shards of `connections`, to which the batch's filters and mask belong. `pushed`: those whose owners expand
        nodes.

        Returns the answer, and why it is without which shards, by their positions in the cluster: only `lenient`ly; else it
        raises the first such error. Raises `OnlyAskedError` where another owner took a shard over that it cannot walk.
        """
        lost: dict[int, CotraError] = {}

        def walk(part: Batch) -> Answer:
            engines = self._take(connections, pushed)
            try:
                answer = engines.walk(part, lenient)
            except InvalidInputError:
                self._give_back(connections, pushed, engines)
                raise
            except BaseException:
                engines.close()  # READs of the failed search may still be on their way into its buffers
                raise
            if engines.is_broken:
                lost.update(engines.lost)
                engines.close()
            else:
                self._give_back(connections, pushed, engines)
            return answer

        return self._share(walk, batch, n_threads), lost

    def probe(self, connections: Sequence[Connection], batch: Batch, n_threads: int) -> Answer:
        """Searches the inverted lists of `connections`. Raises an error whose `shard` is the position in the cluster."""

        def probe(part: Batch) -> Answer:
            engines = self._take(connections, frozenset())
            try:
                answer = engines.probe(part)
            except InvalidInputError:
                self._give_back(connections, frozenset(), engines)
                raise
            except CotraError as error:
                engines.close()
                raise error if error.shard is None else named(error, connections[error.shard]) from None
            except BaseException:
                engines.close()
                raise
            self._give_back(connections, frozenset(), engines)
            return answer

        return self._share(probe, batch, n_threads)

    def _share(self, search: Callable[[Batch], Answer], batch: Batch, n_threads: int) -> Answer:
        n_parts = min(n_threads, len(batch.queries))
        if n_parts <= 1:
            return search(batch)
        running: list[Future[Answer]] = []
        try:
            for part in batch.split(n_parts):
                running.append(self._executor().submit(search, part))
        except BaseException:  # Ctrl-C for one; those that have begun let their engines go
            batch.stop.set()
            wait_for(running)
            raise
        batch.stop.wait(running)
        for error in [part.exception() for part in running]:
            if error is not None:
                raise error
        labels, distances, stats = zip(*(part.result() for part in running), strict=True)
        return np.concatenate(labels, axis=1), np.concatenate(distances, axis=1), np.concatenate(stats)

    def _take(self, connections: Sequence[Connection], pushed: frozenset[Connection]) -> _ShardEngines:
        with self._lock:
            idle = self._idle.get((tuple(connections), pushed))
            engines = idle.pop() if idle else None
        return engines or _ShardEngines(connections, pushed, self._replace, self._callers)

    def _give_back(
        self, connections: Sequence[Connection], pushed: frozenset[Connection], engines: _ShardEngines
    ) -> None:
        with self._lock:
            if not (self._closed or any(connection.is_dropped for connection in connections)):
                self._idle.setdefault((tuple(connections), pushed), []).append(engines)
                return
        engines.close()

    def drop(self, connection: Connection) -> None:
        """Closes the idle engines to an owner that is not used any more, and those in use when they come back."""
        with self._lock:
            connection.is_dropped = True
            keys = [key for key in self._idle if connection in key[0]]
            pooled = [engines for key in keys for engines in self._idle.pop(key)]
        for engines in pooled:
            engines.close()

    def close(self) -> None:
        """Closes the idle engines, and those in use when they come back."""
        with self._lock:
            self._closed = True
            pooled = [engines for idle in self._idle.values() for engines in idle]
            self._idle.clear()
        for engines in pooled:
            engines.close()


def named(error: CotraError, connection: Connection) -> CotraError:
    """Has an error say which connection it is of, and returns it."""
    if error.shard != connection.index or str(connection) not in str(error):
        error.args = (f"{connection}: {error}",)
        error.shard = connection.index
    return error
