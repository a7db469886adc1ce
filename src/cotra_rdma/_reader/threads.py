"""The threads of one cluster: some share searches, and others wait for owners."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import ParamSpec, TypeVar

from cotra_rdma.errors import (
    ClosedError,
)

MAX_THREADS = 256

P = ParamSpec("P")
R = TypeVar("R")


class ContextPool(ThreadPoolExecutor):
    """Threads that work in the `contextvars` context of who gave them the work, so that spans know what they are a part of."""

    def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """As of its base class."""
        context = copy_context()
        return super().submit(lambda: context.run(fn, *args, **kwargs))


class Threads:
    """Two pools of threads. Each is made when it is first needed. Any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pools: dict[str, ThreadPoolExecutor] = {}
        self._closed = False

    def searchers(self) -> ThreadPoolExecutor:
        """Returns the threads that share a search. Raises `ClosedError` after `close`."""
        return self._pool("cotra-search")

    def callers(self) -> ThreadPoolExecutor:
        """Returns the threads that wait for owners. They are others, since threads that share a search wait for them."""
        return self._pool("cotra-call")

    def _pool(self, name: str) -> ThreadPoolExecutor:
        with self._lock:
            if self._closed:
                raise ClosedError("the cluster is closed")
            if name not in self._pools:
                self._pools[name] = ContextPool(MAX_THREADS, name)
            return self._pools[name]

    def close(self) -> None:
        """Waits for what is running. Idempotent."""
        with self._lock:
            self._closed = True
            pools = list(self._pools.values())
        for pool in pools:
            pool.shutdown()
