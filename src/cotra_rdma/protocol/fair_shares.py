"""`FairShares`: whose request an owner works on next, so that nobody's requests keep everybody else waiting.

Each connection has a *virtual time*: the seconds that the owner has spent on it.
Who has the least is served first, as processes are by a fair scheduler.
A connection that is new, or comes back, begins at the least virtual time of the others: it is neither in debt nor in credit.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cotra_rdma.errors import BusyError

_MARGIN_S = 0.1
"""How much more a connection must have had than another one, before its request is given up for the other's."""


class _Connection:
    """What is known of a connection that has requests."""

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
        self.since: float | None = None  # when it began to be read

    def begin_work(self) -> None:
        """It was read whole: from now on only turns cost its connection anything."""
        self._shares._charge_reading(self)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Has one of the workers, once nobody is waiting who has had less. Raises `BusyError` where it was given up."""
        self._shares._take(self)
        begin = self._shares._clock()
        try:
            yield
        finally:
            self._shares._give_back(self, self._shares._clock() - begin)

    def cancel(self) -> None:
        """Ends its waiting: who asked is gone."""
        self._shares._cancel(self)


class FairShares:
    """Requests that are being read and worked on: a bounded number at once, and fewer that run. Any thread may use it."""

    def __init__(self, n_workers: int, n_requests: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`n_workers` requests run at once, and `n_requests` are in memory. `clock` gives seconds."""
        self._n_workers, self._n_requests, self._clock = n_workers, n_requests, clock
        self._lock = threading.Lock()
        self._connections: dict[str, _Connection] = {}
        self._floor_s = 0.0
        self._inside: list[Request] = []
        self._outside: list[Request] = []  # not read yet
        self._waiting: list[Request] = []  # for a worker
        self._n_running = 0

    def __len__(self) -> int:
        """Requests that are not answered yet, those included that are not read yet."""
        return len(self._inside) + len(self._outside)

    @contextmanager
    def admit(self, name: str, give_up: Callable[[], object]) -> Iterator[Request]:
        """Lets a request of a connection in, to be read: at once, or when there is room for it.

        Args:
            name: of the connection.
            give_up: ends the request. It is called where another connection has had much less.

        Raises `BusyError` where it was given up.
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
        """Lets in whoever there is room for. While others wait it should be called some times a second: whose request takes long
        to be read has had more with each call."""
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
                    if worst.since is not None:  # what waits for a worker hears of it by itself
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
        """Requests that wait to be read."""
        return len(self._outside)

    @property
    def is_crowded(self) -> bool:
        """Whether any request waits to be read."""
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
