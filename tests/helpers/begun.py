"""What happens while a process does something, and what an owner answers."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from cotra_rdma import Server
from cotra_rdma.protocol.envelope import VShardEnvelope

GENEROUS_S = 60.0


def answer_of(server: Server, request: VShardEnvelope) -> VShardEnvelope:
    """What a server answers, however it makes that."""
    made = server._answers.handle(request)
    if callable(made):
        made = made()
    return made if isinstance(made, VShardEnvelope) else next(step for step in made if step is not None)


def waited(happened: Callable[[], bool]) -> None:
    """Waits until something happened that nobody tells of. Fails when it does not."""
    deadline = time.monotonic() + GENEROUS_S
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.001)


def stop_process(pid: int) -> None:
    """Stops a process, all threads of it: what comes after finds none of them running. The signal alone only asks for that."""
    os.kill(pid, signal.SIGSTOP)
    tasks = Path(f"/proc/{pid}/task")
    waited(lambda: all((task / "stat").read_text().rpartition(")")[2].split()[0] in "Tt" for task in tasks.iterdir()))


@contextmanager
def heeding_ctrl_c() -> Iterator[None]:
    """Has this process, and those that it starts, heed SIGINT: a shell's background jobs are started with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Signaller:
    """Sends this process a signal, once, as soon as something has begun; not at all where the block ends before."""

    def __init__(self, begun: Callable[[], bool], number: int = signal.SIGINT) -> None:
        self._begun, self._number = begun, number
        self._over = threading.Event()
        self._heeding = heeding_ctrl_c()
        self._thread = threading.Thread(target=self._send)

    def _send(self) -> None:
        while not self._over.is_set():
            if self._begun():
                os.kill(os.getpid(), self._number)
                return
            self._over.wait(0.001)

    def __enter__(self) -> Self:
        self._heeding.__enter__()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()
        self._heeding.__exit__(None, None, None)
