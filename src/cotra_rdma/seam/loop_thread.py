"""`LoopThread`: asyncio for synchronous callers."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

from cotra_rdma._core.stop import wait_for
from cotra_rdma.errors import ClosedError

T = TypeVar("T")


class LoopThread:
    """An event loop in a thread of its own, so that connections live from one synchronous call to the next.

    The thread starts with the first coroutine. Calls may come from many threads at once.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._closed = False
        self._pid = os.getpid()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Starts a coroutine on the loop. Raises `ClosedError`, also in a child of `fork`."""
        if os.getpid() != self._pid:
            coroutine.close()
            raise ClosedError(f"{self._name} is of the process that this one was forked from")
        with self._lock:
            if self._closed:
                coroutine.close()
                raise ClosedError(f"{self._name} is closed")
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._loop.run_forever, name=self._name, daemon=True)
                self._thread.start()
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine and waits for it. An interrupted wait (Ctrl-C) cancels it.

        Raises `ClosedError`, also when it is closed meanwhile.
        """
        future = self.submit(coroutine)
        try:
            wait_for([future])
            return future.result()
        except CancelledError:
            raise ClosedError(f"{self._name} was closed meanwhile") from None
        except BaseException:
            future.cancel()
            raise

    def close(self, last: Coroutine[Any, Any, None] | None = None) -> None:
        """Runs `last`, then stops the loop; coroutines in progress are cancelled. Idempotent. Nothing in a child of `fork`."""
        if os.getpid() != self._pid:
            if last is not None:
                last.close()
            return
        with self._lock:
            closed, self._closed = self._closed, True
        if closed or self._loop is None:
            if last is not None:
                last.close()
            return
        assert self._thread is not None
        asyncio.run_coroutine_threadsafe(self._finish(last), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @staticmethod
    async def _finish(last: Coroutine[Any, Any, None] | None) -> None:
        try:
            if last is not None:
                await last
        finally:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
