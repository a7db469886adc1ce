"""`RequestCounts`: how many requests there were, how they ended, and how long they took."""

from __future__ import annotations

import bisect
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

LATENCY_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Bounds of the buckets in which latencies are counted, in seconds."""


class Latencies(NamedTuple):
    """How long requests of one kind took.

    Attributes:
        counts: how many took up to each bound of `LATENCY_S` and longer than the bound before, and how many took longer
            than all.
        total_s: the sum of their times, in seconds.
    """

    counts: tuple[int, ...] = (0,) * (len(LATENCY_S) + 1)
    total_s: float = 0.0


@dataclass(slots=True)
class RequestCounts:
    """Counts requests, on either side. Any thread may use it.

    Attributes:
        requests: how many there were, by kind and how they ended.
        received_bytes, sent_bytes: of their messages.
    """

    requests: Counter[tuple[str, str]] = field(default_factory=Counter)
    received_bytes: int = 0
    sent_bytes: int = 0
    _latencies: dict[str, list[int]] = field(default_factory=dict)
    _seconds: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, kind: str, status: str, seconds: float, received: int = 0, sent: int = 0) -> None:
        """Counts a request."""
        with self._lock:
            self.requests[kind, status] += 1
            counts = self._latencies.setdefault(kind, [0] * (len(LATENCY_S) + 1))
            counts[bisect.bisect_left(LATENCY_S, seconds)] += 1
            self._seconds[kind] += seconds  # type: ignore[assignment]
            self.received_bytes += received
            self.sent_bytes += sent

    def by_kind(self) -> dict[str, dict[str, int]]:
        """Returns how many requests there were: kind -> how they ended -> number."""
        with self._lock:
            noted = sorted(self.requests.items())
        found: dict[str, dict[str, int]] = {}
        for (kind, status), count in noted:
            found.setdefault(kind, {})[status] = count
        return found

    def latencies(self) -> dict[str, Latencies]:
        """Returns how long they took, by kind."""
        with self._lock:
            return {
                kind: Latencies(tuple(counts), float(self._seconds[kind]))
                for kind, counts in sorted(self._latencies.items())
            }
