"""`Stop`: ends a search before its time, and knows how far the search has come."""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from typing import Any

from cotra_rdma.errors import DeadlineError, SearchCancelledError

Progress = Callable[[int, int], None]
"""Called as progress(queries answered, queries in all) every now and then, by the thread that called `search`."""

LOOK_S = 0.05
"""So often a search in Python's main thread looks for Ctrl-C, and one that somebody watches tells of its progress."""

_counting = threading.Lock()
_NOTHING = array("Q", (0, 0))


def wait_for(calls: Iterable[Future[Any]], meanwhile: Callable[[], object] = lambda: None) -> None:
    """Waits until all are done. Ctrl-C ends the wait, also where the signal comes just before it: Python would not notice until
    the end of a wait that has none."""
    calls = list(calls)
    while wait(calls, LOOK_S).not_done:
        meanwhile()


class Stop:
    """Of one search, and not of another after it. Any thread may `set` it: the search then ends with `SearchCancelledError`,
    within milliseconds.

    Attributes:
        memory: uint64[2], which C looks at while it searches: whether the search was stopped, and queries answered.
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
        """Whether the search is to end."""
        return self.memory[0] != 0

    def check(self) -> None:
        """Raises `SearchCancelledError` where the search is to end."""
        if self.memory[0]:
            raise SearchCancelledError("the search was given up")

    # ---- how far it has come ----

    def begin(self, n_queries: int, progress: Progress | None = None) -> None:
        """Before the search: how many queries it has, and who wants to hear of them. Raises `SearchCancelledError` where it is
        to end."""
        self._n_queries, self._progress = n_queries, progress
        if progress is not None:
            self._listener, self._next = threading.get_ident(), time.monotonic() + LOOK_S
        if self.memory[0]:
            self.check()

    def expect(self, n: int) -> None:
        """So many queries more are going to be answered by somebody. A query that several owners are asked counts for each."""
        self._total += n

    def note(self, n: int) -> None:
        """So many were answered by an owner. (C counts its own.)"""
        with _counting:
            self._told += n

    @property
    def n_answered(self) -> int:
        """Queries answered so far, about: where several owners are asked, their mean."""
        done = self.memory[1] + self._told
        return min(self._n_queries, done * self._n_queries // max(self._total, 1))

    def late(self, error: DeadlineError, timeout_s: float | None) -> DeadlineError:
        """The error of a search that ran out of time, which says how far it had come; one that names a shard stays as it is."""
        if error.shard is not None or timeout_s is None:
            return error
        answered = f"{self.n_answered} of {self._n_queries} queries were answered"
        return DeadlineError(f"the search was not over within {timeout_s:g} s: {answered}")

    @property
    def is_heard(self) -> bool:
        """Whether somebody wants to hear of the progress, from this thread."""
        return self._progress is not None and threading.get_ident() == self._listener

    def tell(self) -> None:
        """Tells of the progress, where somebody wants to hear of it, and it is time."""
        if self._progress is not None and self.is_heard and (now := time.monotonic()) >= self._next:
            self._next = now + LOOK_S
            self._progress(self.n_answered, self._n_queries)

    def wait(self, calls: Iterable[Future[Any]]) -> None:
        """Waits until all are done, and tells of the progress meanwhile. An interrupt, Ctrl-C, stops the search, and is raised
        when they are done."""
        calls = list(calls)
        try:
            wait_for(calls, self.tell)
        except BaseException:
            self.set()
            wait_for(calls)
            raise
