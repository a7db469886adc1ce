"""The threads of one cluster: those that share a search, and those that wait for owners."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

from cotra_rdma.errors import (
    ClosedError,
)

MAX_THREADS = 256


class Threads:
    """Two pools, each made when it is first needed. Any thread may use them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pools: dict[str, ThreadPoolExecutor] = {}
        self._closed = False

    def searchers(self) -> ThreadPoolExecutor:
        """Those that share a search. Raises `ClosedError` once closed."""
        return self._pool("cotra-search")

    def callers(self) -> ThreadPoolExecutor:
        """Those that wait for owners: others, because those that share a search wait for them."""
        return self._pool("cotra-call")

    def _pool(self, name: str) -> ThreadPoolExecutor:
        with self._lock:
            if self._closed:
                raise ClosedError("the cluster is closed")
            if name not in self._pools:
                self._pools[name] = ThreadPoolExecutor(MAX_THREADS, name)
            return self._pools[name]

    def close(self) -> None:
        """Waits for what is running. Idempotent."""
        with self._lock:
            self._closed = True
            pools = list(self._pools.values())
        for pool in pools:
            pool.shutdown()
