"""What a cluster counts while it works. `Cluster.metrics` tells it.

The counters outlive connections and sessions, so that they only grow.
"""

from __future__ import annotations

import threading
import time
from collections import Counter

import numpy as np
import numpy.typing as npt

from cotra_rdma._core.image_identity import ImageIdentity
from cotra_rdma._core.request_counts import RequestCounts
from cotra_rdma._core.stats import STATS_DTYPE
from cotra_rdma.errors import CotraError

SEARCH = "search"
"""The kind of all that `Counters.searches` counts."""
OK, PARTIAL = "ok", "partial"
"""How a search or a call ended that raised nothing. One that raised ended with the name of the error's class."""
_FEW = 1024  # queries whose stats are kept until there are more, or somebody asks


class OwnerCounts:
    """What a reader counts of one owner of one shard. Any thread may use it.

    Attributes:
        calls: over RPC, by message type and how they ended.
        events: "connections" opened, calls "resent", leases "renewed" and "not renewed", and how often the owner was
            "replaced" by another one.
        failures: how often a search could not go on over this owner, by the error's class.
        since: the Unix time since when the owner is connected to, or away, in seconds.
        error: why it is away; "" if it is not.
        image: what it served last; None if it was never reached.
    """

    def __init__(self) -> None:
        self.calls = RequestCounts()
        self.events: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self.since, self.error = time.time(), ""
        self.image: ImageIdentity | None = None
        self._lock = threading.Lock()

    def note(self, event: str) -> None:
        """Counts an event."""
        with self._lock:
            self.events[event] += 1

    def note_failure(self, error: CotraError) -> None:
        """Counts an error that a search met."""
        with self._lock:
            self.failures[type(error).__name__] += 1

    def snapshot(self) -> tuple[Counter[str], dict[str, int]]:
        """Returns copies of `events` and `failures`."""
        with self._lock:
            return self.events.copy(), dict(self.failures)

    def note_reached(self, image: ImageIdentity) -> None:
        """Notes that the owner was connected to, and what it serves."""
        self.since, self.error, self.image = time.time(), "", image

    def note_away(self, error: BaseException) -> None:
        """Notes that the owner is not used until it is tried again. If it was away before, it is so since then."""
        if not self.error:
            self.since = time.time()
        self.error = str(error) or type(error).__name__


class Counters:
    """What a cluster counts. Any thread may use it.

    Attributes:
        since: the Unix time of `connect`, in seconds.
        searches: how many there were, and how they ended.
        n_followed: how often the cluster went on to other images.
    """

    def __init__(self) -> None:
        self.since = time.time()
        self.searches = RequestCounts()
        self._queries: Counter[str] = Counter()
        self.n_followed = 0
        self._owners: dict[tuple[int, str], OwnerCounts] = {}
        self._sums = dict.fromkeys(STATS_DTYPE.names or (), 0)
        self._kept: list[bytes] = []
        self._n_kept = 0
        self._lock = threading.Lock()

    def of(self, shard: int, address: str) -> OwnerCounts:
        """Returns what is counted of one owner."""
        with self._lock:
            return self._owners.setdefault((shard, address), OwnerCounts())

    def note_search(
        self, outcome: str, n_queries: int, seconds: float, stats: npt.NDArray[np.void] | None = None
    ) -> None:
        """Counts a search.

        Args:
            outcome: how it ended.
            n_queries: of its batch.
            seconds: how long it took.
            stats: `STATS_DTYPE`[n_queries], or None where nothing is known.
        """
        self.searches.note(SEARCH, outcome, seconds)
        with self._lock:
            self._queries[outcome] += n_queries
            if stats is None:
                return
            self._kept.append(stats.tobytes())  # a copy: its owner may write to it
            self._n_kept += len(stats)
            if self._n_kept > _FEW:  # one sum for many small searches: a sum costs as much as a short search
                self._sum_up()

    def queries(self) -> dict[str, int]:
        """Returns how many queries there were, by how their searches ended."""
        with self._lock:
            return dict(self._queries)

    def stats(self) -> dict[str, int]:
        """Returns the sum of each field of `STATS_DTYPE` over all queries."""
        with self._lock:
            self._sum_up()
            return dict(self._sums)

    def _sum_up(self) -> None:
        """Adds what was kept. The caller holds the lock."""
        if not self._kept:
            return
        stats = np.frombuffer(b"".join(self._kept), STATS_DTYPE)
        for name in self._sums:
            self._sums[name] += int(stats[name].sum())
        self._kept.clear()
        self._n_kept = 0
