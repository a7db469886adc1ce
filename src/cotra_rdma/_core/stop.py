"""`Stop`: ends a search early, and counts the queries that are answered."""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from typing import Any

from cotra_rdma.errors import DeadlineError, SearchCancelledError

Progress = Callable[[int, int], None]
"""Called every now and then as progress(queries answered, queries in all), by the thread that called `search`."""

LOOK_S = 0.05
"""The interval, in seconds, at which a search checks for Ctrl-C and reports its progress.

A search checks for Ctrl-C only in Python's main thread.
It reports progress only if somebody asked for it.
"""

_counting = threading.Lock()
_NOTHING = array("Q", (0, 0))


def wait_for(calls: Iterable[Future[Any]], meanwhile: Callable[[], object] = lambda: None) -> None:
    """Waits until all calls are done.

    Ctrl-C ends the wait, even if the signal comes just before the wait begins.
    A wait without a time-out would notice such a signal only at its end.

    Args:
        calls: the calls to wait for.
        meanwhile: called every `LOOK_S` seconds while calls are in progress.
    """
    calls = list(calls)
    while wait(calls, LOOK_S).not_done:
        meanwhile()


class Stop:
    """Ends one search early.

    Any thread may call `set`.
    The search then ends with `SearchCancelledError`, within milliseconds.
    A `Stop` serves one search and cannot be used for another.

    Attributes:
        memory: uint64[2], which C looks at while it searches. The first says whether the search was stopped. The second
            counts the queries that were answered.
    """

    __slots__ = ("_listener", "_n_queries", "_next", "_progress", "_told", "_total", "memory")

    def __init__(self) -> None:
        self.memory = _NOTHING[:]
        self._told = self._total = self._n_queries = 0
        self._progress: Progress | None = None

    def set(self) -> None:
        """Ends the search."""
        self.memory[0] = 1

    @property
    def is_set(self) -> bool:
        """Whether the search has to end."""
        return self.memory[0] != 0

    def check(self) -> None:
        """Raises `SearchCancelledError` if the search has to end."""
        if self.memory[0]:
            raise SearchCancelledError("the search was given up")

    # ---- progress ----

    def begin(self, n_queries: int, progress: Progress | None = None) -> None:
        """Begins a search.

        Args:
            n_queries: the number of queries of the search.
            progress: called with the progress from this thread, or None.

        Raises:
            SearchCancelledError: the search has to end.
        """
        self._n_queries, self._progress = n_queries, progress
        if progress is not None:
            self._listener, self._next = threading.get_ident(), time.monotonic() + LOOK_S
        if self.memory[0]:
            self.check()

    def expect(self, n: int) -> None:
        """Says that n more queries are going to be answered.

        A query that goes to several owners counts once for each.
        """
        self._total += n

    def note(self, n: int) -> None:
        """Says that an owner answered n queries. C counts those that it answers itself."""
        with _counting:
            self._told += n

    @property
    def n_queries(self) -> int:
        """The number of queries of the search; 0 before it begins."""
        return self._n_queries

    @property
    def n_answered(self) -> int:
        """About how many queries are answered so far. If a query goes to several owners, their mean counts."""
        done = self.memory[1] + self._told
        return min(self._n_queries, done * self._n_queries // max(self._total, 1))

    def late(self, error: DeadlineError, timeout_s: float | None) -> DeadlineError:
        """Returns the error of a search that ran out of time, which says how many queries were answered.

        An error that names a shard is returned as it is.
        """
        if error.shard is not None or timeout_s is None:
            return error
        answered = f"{self.n_answered} of {self._n_queries} queries were answered"
        return DeadlineError(f"the search was not over within {timeout_s:g} s: {answered}")

    @property
    def is_heard(self) -> bool:
        """Whether somebody wants the progress from this thread."""
        return self._progress is not None and threading.get_ident() == self._listener

    def tell(self) -> None:
        """Reports the progress, if somebody wants it and `LOOK_S` seconds have passed since the last report."""
        if self._progress is not None and self.is_heard and (now := time.monotonic()) >= self._next:
            self._next = now + LOOK_S
            self._progress(self.n_answered, self._n_queries)

    def wait(self, calls: Iterable[Future[Any]]) -> None:
        """Waits until all calls are done, and reports the progress meanwhile.

        An interrupt such as Ctrl-C stops the search.
        It is raised again when all calls are done.
        """
        calls = list(calls)
        try:
            wait_for(calls, self.tell)
        except BaseException:
            self.set()
            wait_for(calls)
            raise
