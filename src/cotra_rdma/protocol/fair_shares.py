"""`FairShares`: chooses the request that an owner works on next, so that one connection cannot keep the others waiting.

Each connection has a *virtual time*: the seconds that the owner has spent on it.
The connection with the least virtual time is served first, as a fair scheduler does with processes.
A connection that is new, or that comes back, begins at the least virtual time of the others.
So it has neither an advantage nor a disadvantage.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cotra_rdma.errors import BusyError

_MARGIN_S = 0.1
"""A request is given up for another connection's only if its own connection has had this many seconds more."""


class _Connection:
    """The account of one connection."""

    __slots__ = ("n_requests", "spent_s")

    def __init__(self, spent_s: float) -> None:
        self.spent_s = spent_s
        self.n_requests = 0


class Request:
    """A request, from its arrival until it is answered."""

    __slots__ = ("_shares", "connection", "give_up", "granted", "is_given_up", "is_running", "since")

    def __init__(self, shares: FairShares, connection: _Connection, give_up: Callable[[], object]) -> None:
        self._shares, self.connection, self.give_up = shares, connection, give_up
        self.granted = threading.Event()
        self.is_given_up = self.is_running = False
        self.since: float | None = None  # when its reading began; None before and after the reading

    def begin_work(self) -> None:
        """Says that the request was read. From now on, only its turns are charged to its connection."""
        self._shares._charge_reading(self)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Waits for a worker, and holds it until the block ends. Connections that have had less go first.

        Raises:
            BusyError: the request was given up.
        """
        self._shares._take(self)
        begin = self._shares._clock()
        try:
            yield
        finally:
            self._shares._give_back(self, self._shares._clock() - begin)

    def cancel(self) -> None:
        """Ends the request's wait, because nobody waits for its answer. A request that runs goes on."""
        self._shares._cancel(self)


class FairShares:
    """Admits requests, and gives them workers. The number of admitted requests is bounded, and so is that of workers.

    Any thread may use it.
    """

    def __init__(self, n_workers: int, n_requests: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Begins without requests.

        Args:
            n_workers: the most requests that run at once.
            n_requests: the most requests that are admitted at once, and so are in memory.
            clock: returns the time in seconds.
        """
        self._n_workers, self._n_requests, self._clock = n_workers, n_requests, clock
        self._lock = threading.Lock()
        self._connections: dict[str, _Connection] = {}
        self._floor_s = 0.0
        self._inside: list[Request] = []  # admitted
        self._outside: list[Request] = []  # not admitted, and so not read yet
        self._waiting: list[Request] = []  # admitted, and waiting for a worker
        self._n_running = 0

    def __len__(self) -> int:
        """The number of requests that are not answered yet, including those that are not read yet."""
        return len(self._inside) + len(self._outside)

    @contextmanager
    def admit(self, name: str, give_up: Callable[[], object]) -> Iterator[Request]:
        """Waits until there is room for a request, and admits it until the block ends.

        Args:
            name: the name of the request's connection.
            give_up: ends the request. It is called if a connection that has had much less needs the room.

        Raises:
            BusyError: the request was given up.
        """
        with self._lock:
            connection = self._connections.get(name)
            if connection is None:
                self._raise_floor()
                connection = self._connections[name] = _Connection(self._floor_s)
            connection.n_requests += 1
            request = Request(self, connection, give_up)
            self._outside.append(request)
        try:
            self.look()
            request.granted.wait()
            self._check(request)
            yield request
        finally:
            with self._lock:
                self._charge(request)
                for requests in (self._inside, self._outside, self._waiting):
                    if request in requests:
                        requests.remove(request)
                connection.n_requests -= 1
                if not connection.n_requests:
                    self._raise_floor()
                    if connection.spent_s <= self._floor_s:
                        self._connections.pop(name, None)
            self.look()

    def look(self) -> None:
        """Admits the requests that there is room for.

        It should be called some times a second while requests wait outside.
        Reading counts as time that a connection has had, so a request that is read slowly is given up in the end.
        """
        given_up = []
        with self._lock:
            now = self._clock()
            for request in sorted(self._outside, key=lambda request: self._spent(request, now)):
                if len(self._inside) >= self._n_requests:
                    worst = max(
                        (
                            other
                            for other in self._inside
                            if not other.is_running and other.connection is not request.connection
                        ),
                        key=lambda other: self._spent(other, now),
                        default=None,
                    )
                    if worst is None or self._spent(worst, now) < self._spent(request, now) + _MARGIN_S:
                        continue
                    self._inside.remove(worst)
                    if worst.since is not None:  # it is being read; one that waits for a worker is woken by `_end`
                        given_up.append(worst)
                    self._end(worst)
                self._outside.remove(request)
                self._inside.append(request)
                request.since = now
                request.granted.set()
        for request in given_up:
            request.give_up()

    @property
    def n_outside(self) -> int:
        """The number of requests that wait to be admitted."""
        return len(self._outside)

    @property
    def is_crowded(self) -> bool:
        """Whether a request waits to be admitted."""
        return bool(self._outside)

    # ---- workers ----

    def _take(self, request: Request) -> None:
        with self._lock:
            request.granted.clear()
            if not request.is_given_up:
                self._waiting.append(request)
                self._hand_out()
        request.granted.wait()
        self._check(request)

    def _give_back(self, request: Request, seconds: float) -> None:
        with self._lock:
            request.is_running = False
            request.connection.spent_s += seconds
            self._n_running -= 1
            self._hand_out()

    def _hand_out(self) -> None:
        while self._waiting and self._n_running < self._n_workers:
            first = min(self._waiting, key=lambda request: request.connection.spent_s)
            self._waiting.remove(first)
            self._n_running += 1
            first.is_running = True
            first.granted.set()

    # ---- accounts ----

    def _spent(self, request: Request, now: float) -> float:
        return request.connection.spent_s + (now - request.since if request.since is not None else 0.0)

    def _charge(self, request: Request) -> None:
        if request.since is not None:
            request.connection.spent_s += self._clock() - request.since
            request.since = None

    def _charge_reading(self, request: Request) -> None:
        with self._lock:
            self._charge(request)

    def _raise_floor(self) -> None:
        busy = [connection.spent_s for connection in self._connections.values() if connection.n_requests]
        if busy:
            self._floor_s = max(self._floor_s, min(busy))
        elif self._connections:
            self._floor_s = max(self._floor_s, max(connection.spent_s for connection in self._connections.values()))
        for name in [
            name for name, one in self._connections.items() if not one.n_requests and one.spent_s <= self._floor_s
        ]:
            del self._connections[name]

    def _end(self, request: Request) -> None:
        request.is_given_up = True
        if request in self._waiting:
            self._waiting.remove(request)
        request.granted.set()

    def _cancel(self, request: Request) -> None:
        with self._lock:
            if not request.is_running:
                self._end(request)

    def _check(self, request: Request) -> None:
        if request.is_given_up:
            raise BusyError("this owner is busy, and others have had less of it: try again")
