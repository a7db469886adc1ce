"""How many bytes a second an owner's policy lets an identity move over RPC."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from cotra_rdma.errors import BusyError

BURST_S = 1.0
"""Seconds of its rate that an identity may be ahead."""


class Rates:
    """What each identity has moved lately. Any thread may use it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds."""
        self._clock = clock
        self._paid_at: dict[tuple[str, ...], float] = {}  # when it may be even with its rate
        self._lock = threading.Lock()

    def check(self, names: tuple[str, ...]) -> None:
        """Raises `BusyError` where an identity is more than a second ahead of its rate."""
        with self._lock:
            ahead_s = self._paid_at.get(names, 0.0) - self._clock()
        if ahead_s > BURST_S:
            raise BusyError(
                f"{', '.join(names)} has moved as many bytes as the owner's policy allows: "
                f"try again in {ahead_s - BURST_S:.1f} s"
            )

    def charge(self, names: tuple[str, ...], n_bytes: int, bytes_per_s: int) -> None:
        """Notes what an identity has moved."""
        with self._lock:
            now = self._clock()
            self._paid_at = {who: at for who, at in self._paid_at.items() if at > now}
            self._paid_at[names] = max(self._paid_at.get(names, now), now) + n_bytes / bytes_per_s
