"""Home search: a query is sent to the owner of most of its neighbourhood, and that owner walks the whole graph."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from cotra_rdma._core.stats import STATS_DTYPE
from cotra_rdma._reader.batch import Batch, CollectionAnswer, OutOfTimeError
from cotra_rdma._reader.connection import LOST, Connection
from cotra_rdma._reader.executor import Merged, SearchExecutor, used_of
from cotra_rdma._reader.planner import Plan
from cotra_rdma._reader.replicas import Replicas
from cotra_rdma.errors import CotraError, FormatError, PeerError, SearchCancelledError, TransportError

log = logging.getLogger(__name__)

_DEAF_S = 10.0  # how long an owner that gave no useful answer is sent no queries

_Told = tuple[CollectionAnswer, npt.NDArray[np.int32]]
"""An owner's answer, and for each shard in its own order the position of the shard here."""


class HomeSearch:
    """Sends the queries of one session home."""

    def __init__(
        self, replicas: Replicas, gatherer: SearchExecutor, executor: Callable[[], ThreadPoolExecutor]
    ) -> None:
        """Opens nothing. `executor` gives the threads that wait for owners."""
        self._replicas, self._search_executor, self._executor = replicas, gatherer, executor
        self._deaf: weakref.WeakKeyDictionary[Connection, float] = weakref.WeakKeyDictionary()

    def search(
        self,
        connections: list[Connection],
        batch: Batch,
        plan: Plan,
        n_threads: int,
        lenient: bool,
    ) -> tuple[Merged, list[str], dict[int, CotraError], npt.NDArray[np.int32]]:
        """Sends each query to the owner of its home, which searches all shards for it.

        A query is walked here if its home is this process, or was lost, or has no connection to the other shards,
        or gives no useful answer.
        An owner of an earlier version refuses filters and bounds, and its queries are walked here as well.

        Args:
            connections: to all shards, as they were when the search began.
            batch: the queries and how to search them.
            plan: with `homes`, and with `here` for the queries that are walked here.
            n_threads: threads that share the queries that are walked here.
            lenient: whether to go on without a shard that has no owner left.

        Returns:
            The answers, what was used for each shard, the failures, and `SearchResult.homes`.

        Raises:
            PeerError: no owner that was asked has a connection to the others.
        """
        assert plan.homes is not None
        assert plan.here is not None
        homes, here_plan = plan.homes, plan.here
        ids = np.full((len(homes), batch.k), -1, np.int64)
        found = (
            ids,
            np.full(ids.shape, np.inf, np.float32),
            np.full(ids.shape, -1, np.int32),
            np.zeros(len(ids), STATS_DTYPE),
        )
        here = np.array([connection.transport in ("own", LOST) for connection in connections])[homes]
        named = set(self._replicas.images) - {0}
        if batch.filters is not None and len(named) < len(connections):  # filters could not be told apart
            here[:] = True
        used = ["" for _ in connections]
        calls = {}
        asking = batch.with_a_spare()  # what a home does not answer is walked here
        batch.stop.expect(int((~here).sum()))
        for home in np.unique(homes[~here]).tolist():
            rows = np.flatnonzero(homes == home)
            calls[home] = (
                rows,
                self._executor().submit(
                    self._ask_home, connections[home], asking._replace(queries=batch.queries[rows])
                ),
            )
        batch.stop.wait(call for _, call in calls.values())
        failures: dict[int, CotraError] = {}
        refusals = []
        for home, (rows, call) in calls.items():
            try:
                told, places = call.result()
            except SearchCancelledError:
                raise
            except CotraError as error:
                here[rows] = True
                refusals += [error] if isinstance(error, PeerError) else []
                continue
            used[home] = "home"
            shards = np.where(told.shards < 0, -1, places[told.shards])
            _put(found, rows, (told.labels, told.distances, shards, told.stats))
            for at, why in told.failures.items():
                failures.setdefault(int(places[at]), PeerError(f"{connections[home]}: {why}", shard=int(places[at])))
        if calls and len(refusals) == len(calls) and batch.filters is None and batch.most is None:
            raise refusals[0]
        for refusal in refusals:
            log.warning("its queries are walked here: %s", refusal)
        rows = np.flatnonzero(here)
        if len(rows):
            mine, connections = batch._replace(queries=batch.queries[rows]), list(self._replicas.connections)
            answers, lost, here_plan = self._search_executor.gather(connections, mine, here_plan, n_threads, lenient)
            failures |= lost
            _put(found, rows, self._search_executor.merge(answers, mine))
            used = [
                before or used_of(connection, here_plan, failures)
                for before, connection in zip(used, connections, strict=True)
            ]
        else:
            used = [name or (LOST if at in failures else "peers") for at, name in enumerate(used)]
        return found, used, failures, np.where(here, -1, homes).astype(np.int32)

    def _places(self, connection: Connection, images: tuple[int, ...]) -> npt.NDArray[np.int32]:
        """Finds the positions here of the shards of another owner, which has an order of its own.

        Shards are matched by the checksums of their images.
        A shard that one side never reached (0) is one of those that are left: the one of the same number, if it is left.

        Raises:
            FormatError: the owner searches a shard that is none of these.
        """
        known = {image: at for at, image in enumerate(self._replicas.images) if image}
        places = np.array([known.get(image, -1) for image in images], np.int32)
        for at in sorted(np.flatnonzero(places < 0).tolist(), key=lambda at: not images[at]):
            left = [
                here
                for here, image in enumerate(self._replicas.images)
                if here not in places and not (image and images[at])
            ]
            if not left:
                raise FormatError(f"{connection}: it searches other shards than these", shard=connection.index)
            places[at] = at if at in left else left[0]
        return places

    def _ask_home(self, connection: Connection, batch: Batch) -> _Told:
        """Asks an owner to search all shards.

        If it gives no useful answer, another owner of its shard is asked, and it is sent no queries for a while.
        Its memory may be as good as ever, so it stays in use for READs.

        Raises:
            PeerError: an owner refuses, and no other one searches.
        """
        failed: CotraError | None = None
        for owner in self._replicas.owners(connection.index):
            if self._deaf.get(owner, 0.0) > time.monotonic():
                continue
            try:
                told = owner.search_all(batch, self._replicas.images)
                return told, self._places(owner, told.images)
            except OutOfTimeError:
                raise
            except (TransportError, FormatError) as error:
                log.warning("%s: its queries are walked elsewhere: %s", owner, error)
                self._deaf[owner] = time.monotonic() + _DEAF_S
                failed = failed if isinstance(failed, PeerError) else error
            except PeerError as error:
                failed = error
        raise failed or TransportError(f"{connection} did not answer a moment ago", shard=connection.index)


def _put(found: Merged, rows: npt.NDArray[np.intp], part: Merged) -> None:
    """Writes the answers to some queries to their rows."""
    found[0][rows], found[1][rows], found[2][rows], found[3][rows] = part
