"""`Searcher`: makes the plan of a search, has it executed, and makes the result."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cotra_rdma._core.stats import COUNTS
from cotra_rdma._reader.batch import Answer, Batch
from cotra_rdma._reader.connection import LOST, ONE_SIDED
from cotra_rdma._reader.cost_model import needs_of_asking, needs_of_reading
from cotra_rdma._reader.executor import SearchExecutor, used_of
from cotra_rdma._reader.home_search import HomeSearch
from cotra_rdma._reader.planner import Plan, Planner
from cotra_rdma._reader.replicas import Replicas
from cotra_rdma._reader.result import SearchResult
from cotra_rdma.errors import CotraError, PartialResultError

_FEW = 1024  # the cost model keeps the stats of so few queries, and evaluates them when it is asked


class Options(NamedTuple):
    """How to search a batch. The attributes are arguments of `Cluster.search`."""

    n_threads: int
    allow_partial: bool | None
    algorithm: str
    target_recall: float
    owner_cpu: bool
    explain: bool


class Searcher:
    """Searches the shards of one cluster."""

    def __init__(
        self, replicas: Replicas, planner: Planner, executor: SearchExecutor, homes: HomeSearch, *, one_graph: bool
    ) -> None:
        """Searches with these parts of a session.

        Args:
            replicas: the connections to the shards.
            planner: makes the plans.
            executor: executes plans.
            homes: executes plans of "home".
            one_graph: whether the shards are one graph. An answer without one of them is then no error by default.
        """
        self._replicas, self._planner = replicas, planner
        self._executor, self._homes, self._one_graph = executor, homes, one_graph

    def search(self, batch: Batch, options: Options) -> SearchResult:
        """Searches a batch.

        If the shards that Compass chose have fewer than k answers to a query, the other shards are asked too.

        Raises:
            CotraError: as for `Cluster.search`.
        """
        result = self._search(batch, options)
        if not result.algorithm.startswith("compass"):
            return result
        base = result.algorithm.removeprefix("compass").removeprefix("+") or "cotra"
        return self._fill(result, batch, options._replace(algorithm=base))

    def _search(self, batch: Batch, options: Options) -> SearchResult:
        begin = time.perf_counter()
        plan = self._planner.plan(
            options.algorithm,
            batch,
            options.n_threads,
            target_recall=options.target_recall,
            owner_cpu=options.owner_cpu,
            explain=options.explain,
        )
        if plan.mask is not batch.mask:
            batch = batch._replace(mask=plan.mask)
        lenient = self._one_graph if options.allow_partial is None else options.allow_partial
        before = list(self._replicas.connections)
        homes = None
        if plan.homes is None:
            answers, failures, plan = self._executor.gather(before, batch, plan, options.n_threads, lenient)
            if before == self._replicas.connections and not failures:
                self._note(plan, batch, answers, options.n_threads, time.perf_counter() - begin)
            found = self._executor.merge(answers, batch)
            after = zip(before, self._replicas.connections, strict=True)
            used = [used_of(old if new.transport == LOST else new, plan, failures) for old, new in after]
        else:
            found, used, failures, homes = self._homes.search(before, batch, plan, options.n_threads, lenient)
        n_shards = len(before)
        asked = np.empty(len(batch.queries), np.int32)
        asked[:] = n_shards if batch.mask is None else batch.mask.sum(axis=1)
        seconds, coverage = time.perf_counter() - begin, _coverage(n_shards, failures, found[3])
        result = SearchResult(
            *found,
            tuple(used),
            seconds,
            coverage,
            failures,
            asked,
            plan.algorithm,
            plan.predictions,
            self._replicas.images,
            homes,
        )
        if failures and (not lenient or (options.allow_partial is None and len(failures) == n_shards)):
            raise _error_of(result, n_shards)
        return result

    def _fill(self, result: SearchResult, batch: Batch, options: Options) -> SearchResult:
        """Asks all shards for the queries to which the shards that Compass chose have fewer than k answers."""
        most = len(result.transports) if batch.mask is None else batch.mask.sum(axis=1)
        short = np.flatnonzero((result.ids[:, -1] < 0) & (result.asked < most))
        if not len(short):
            return result
        mask = None if batch.mask is None else batch.mask[short]
        more = self._search(batch._replace(queries=batch.queries[short], mask=mask), options)
        for name in ("ids", "distances", "shards", "asked"):
            getattr(result, name)[short] = getattr(more, name)
        result.stats["incomplete"][short] = 0
        for name in (*COUNTS, "rounds", "latency_ns"):
            result.stats[name][short] += more.stats[name]
        failures = result.failures | more.failures
        return replace(
            result,
            elapsed_s=result.elapsed_s + more.elapsed_s,
            failures=failures,
            coverage=_coverage(len(result.transports), failures, result.stats),
        )

    def _note(
        self, plan: Plan, batch: Batch, answers: list[tuple[list[int], Answer]], n_threads: int, seconds: float
    ) -> None:
        """Tells the cost model what a search needed of a shard.

        It tells nothing if the search had several paths, pushes, filters or a bound: such needs do not predict other searches.
        """
        n, connections = len(batch.queries), self._replicas.connections
        if plan.pushed or batch.filters is not None or batch.most is not None or not answers or not n:
            return
        if (
            len(plan.asked) != len(connections)
            if plan.asked
            else any(connection.transport not in ONE_SIDED for connection in connections)
        ):
            return
        searches = n * len(connections) if batch.mask is None else int(batch.mask.sum())
        if plan.lists:  # the number of lists that a query reads does not depend on the number of its shards
            searches = n
        if not searches:
            return
        links = [connection.link for connection in connections]
        if plan.asked:
            method, beam = "asked", batch.beam
            needs = partial(needs_of_asking, links, answers[0][1][2], searches, seconds)
        else:
            method, beam = ("lists", 0) if plan.lists else ("walk", batch.beam)
            needs = partial(needs_of_reading, links, answers[0][1][2], searches, seconds, min(n_threads, n))
        self._planner.experience.note(method, batch.k, batch.ef, beam, needs if n <= _FEW else needs())


def _error_of(result: SearchResult, n_shards: int) -> CotraError:
    """Returns the error of a search that may not leave out shards."""
    failures = result.failures
    first = failures[min(failures)]
    if len(failures) == n_shards:
        return first.with_traceback(None)  # all searches raise this object, and each would add to its traceback
    why = "; ".join(str(failures[shard]) for shard in sorted(failures))
    error = PartialResultError(f"{len(failures)} of {n_shards} shards failed: {why}", result, shard=first.shard)
    error.__cause__ = first
    return error


def _coverage(n_shards: int, failures: Mapping[int, CotraError], stats: npt.NDArray[np.void]) -> float:
    """Returns the share of the shards that answered, times the share of the queries whose walks no bound ended."""
    cut_short = float((stats["incomplete"] > 0).mean()) if len(stats) else 0.0
    return (n_shards - len(failures)) / n_shards * (1 - cut_short)
