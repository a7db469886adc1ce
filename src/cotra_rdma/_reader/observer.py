"""`Observer`: counts what a cluster searches, and makes spans of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from cotra_rdma._core.stop import Stop
from cotra_rdma._core.tracing import Tracing
from cotra_rdma._reader.batch import Answer
from cotra_rdma._reader.counters import OK, PARTIAL, Counters
from cotra_rdma._reader.result import SearchResult
from cotra_rdma.errors import PartialResultError

R = TypeVar("R")


class Observer:
    """Looks at the searches of one cluster. Any thread may use it."""

    def __init__(self, counters: Counters, tracing: Tracing | None) -> None:
        """`tracing`: None makes no spans."""
        self._counters, self._tracing = counters, tracing

    def search(self, search: Callable[[], SearchResult], stop: Stop, asked: Mapping[str, Any]) -> SearchResult:
        """Has a batch searched.

        Args:
            search: does it.
            stop: of the search; it knows how many queries there are.
            asked: the arguments that a span tells.

        Returns what `search` does, and raises what it raises.
        """
        if self._tracing is None:
            return self._counted(search, stop, _outcome_of)
        with self._tracing.search({f"cotra.{name}": value for name, value in asked.items()}) as span:
            found: Any = None
            try:
                found = self._counted(search, stop, _outcome_of)
            except PartialResultError as error:
                found = error.result
                raise
            finally:
                if span.is_recording():
                    span.set_attributes({"cotra.queries": stop.n_queries, **({} if found is None else _told_of(found))})
        return found  # type: ignore[no-any-return]

    def walk(self, walk: Callable[[], Answer], stop: Stop) -> Answer:
        """The same for `Cluster.walk`, which makes no span."""
        return self._counted(walk, stop, lambda answer: (OK, answer[2]))

    def _counted(
        self, run: Callable[[], R], stop: Stop, outcome_of: Callable[[R], tuple[str, npt.NDArray[np.void]]]
    ) -> R:
        begin, stats = time.perf_counter(), None
        try:
            found = run()
            outcome, stats = outcome_of(found)
        except BaseException as error:
            outcome = type(error).__name__
            if isinstance(error, PartialResultError) and isinstance(error.result, SearchResult):
                stats = error.result.stats
            raise
        finally:
            self._counters.note_search(outcome, stop.n_queries, time.perf_counter() - begin, stats)
        return found


def _outcome_of(result: SearchResult) -> tuple[str, npt.NDArray[np.void]]:
    return PARTIAL if result.failures else OK, result.stats


def _told_of(result: SearchResult) -> dict[str, Any]:
    """The attributes of a search's span that come from its result."""
    sums = {f"cotra.{name}": int(result.stats[name].sum()) for name in result.stats.dtype.names or ()}
    return {
        "cotra.algorithm": result.algorithm,
        "cotra.transports": result.transports,
        "cotra.coverage": result.coverage,
        "cotra.missing": result.missing,
        **sums,
    }
