"""`FairShares`: chooses the request that an owner works on next, so that nobody can keep the others waiting.

Each sender has a *virtual time*: the seconds that the owner has spent on it.
A sender is an identity (the names in a certificate), or a host if there are no certificates.
The sender with the least virtual time is served first, as a fair scheduler does with processes.
Of one sender's connections, the one with the least virtual time of its own is served first.
So more connections do not get more of the owner.
A sender or connection that is new, or that comes back, begins at the least virtual time of the others.
So it has neither an advantage nor a disadvantage.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cotra_rdma.errors import BusyError

_MARGIN_S = 0.1
"""A request is given up for another sender's, or connection's, only if its own has had this many seconds more."""


class _Account:
    """What one sender, or one connection, has had."""

    __slots__ = ("n_requests", "spent_s")

    def __init__(self, spent_s: float) -> None:
        self.spent_s = spent_s
        self.n_requests = 0


class _Accounts:
    """The accounts of senders, or of connections, by name. Those that the newcomers' start is above are forgotten."""

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}
        self._floor_s = 0.0

    def begin(self, name: str) -> _Account:
        """Returns the account of a name that sends one request more."""
        account = self._accounts.get(name)
        if account is None:
            self._raise_floor()
            account = self._accounts[name] = _Account(self._floor_s)
        account.n_requests += 1
        return account

    def end(self, account: _Account) -> None:
        """Notes that one of an account's requests is over."""
        account.n_requests -= 1
        if not account.n_requests:
            self._raise_floor()

    def _raise_floor(self) -> None:
        accounts = self._accounts.values()
        busy = [account.spent_s for account in accounts if account.n_requests]
        start = min(busy) if busy else max((account.spent_s for account in accounts), default=0.0)
        self._floor_s = max(self._floor_s, start)
        self._accounts = {
            name: account
            for name, account in self._accounts.items()
            if account.n_requests or account.spent_s > self._floor_s
        }


class Request:
    """A request, from its arrival until it is answered."""

    __slots__ = ("_shares", "connection", "give_up", "granted", "is_given_up", "is_running", "sender", "since")

    def __init__(
        self, shares: FairShares, sender: _Account, connection: _Account, give_up: Callable[[], object]
    ) -> None:
        self._shares, self.sender, self.connection, self.give_up = shares, sender, connection, give_up
        self.granted = threading.Event()
        self.is_given_up = self.is_running = False
        self.since: float | None = None  # when its reading began; None before and after the reading

    def begin_work(self) -> None:
        """Says that the request was read. From now on, only its turns are charged to its sender."""
        self._shares._charge_reading(self)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Waits for a worker, and holds it until the block ends. Those who have had less go first.

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
        self._senders, self._connections = _Accounts(), _Accounts()
        self._inside: list[Request] = []  # admitted
        self._outside: list[Request] = []  # not admitted, and so not read yet
        self._waiting: list[Request] = []  # admitted, and waiting for a worker
        self._n_running = 0

    def __len__(self) -> int:
        """The number of requests that are not answered yet, including those that are not read yet."""
        return len(self._inside) + len(self._outside)

    @contextmanager
    def admit(self, sender: str, connection: str, give_up: Callable[[], object]) -> Iterator[Request]:
        """Waits until there is room for a request, and admits it until the block ends.

        Args:
            sender: the name of the request's sender.
            connection: the name of its connection, which no other sender's connection has.
            give_up: ends the request. It is called if somebody who has had much less needs the room.

        Raises:
            BusyError: the request was given up.
        """
        with self._lock:
            request = Request(self, self._senders.begin(sender), self._connections.begin(connection), give_up)
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
                self._senders.end(request.sender)
                self._connections.end(request.connection)
            self.look()

    def look(self) -> None:
        """Admits the requests that there is room for.

        It should be called some times a second while requests wait outside.
        Reading counts as time that its sender has had, so a request that is read slowly is given up in the end.
        """
        given_up = []
        with self._lock:
            now = self._clock()
            for request in sorted(self._outside, key=lambda request: _order(request, now)):
                if len(self._inside) >= self._n_requests:
                    worst = max(
                        (other for other in self._inside if not other.is_running and _had_more(other, request, now)),
                        key=lambda other: _order(other, now),
                        default=None,
                    )
                    if worst is None:
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
            _charge(request, seconds)
            self._n_running -= 1
            self._hand_out()

    def _hand_out(self) -> None:
        while self._waiting and self._n_running < self._n_workers:
            first = min(self._waiting, key=lambda request: (request.sender.spent_s, request.connection.spent_s))
            self._waiting.remove(first)
            self._n_running += 1
            first.is_running = True
            first.granted.set()

    # ---- accounts ----

    def _charge(self, request: Request) -> None:
        if request.since is not None:
            _charge(request, self._clock() - request.since)
            request.since = None

    def _charge_reading(self, request: Request) -> None:
        with self._lock:
            self._charge(request)

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


def _charge(request: Request, seconds: float) -> None:
    request.sender.spent_s += seconds
    request.connection.spent_s += seconds


def _reading_s(request: Request, now: float) -> float:
    return 0.0 if request.since is None else now - request.since


def _order(request: Request, now: float) -> tuple[float, float]:
    """Returns what senders are ordered by, and what the connections of one sender are ordered by, in seconds."""
    return request.sender.spent_s, request.connection.spent_s + _reading_s(request, now)


def _had_more(other: Request, request: Request, now: float) -> bool:
    """Returns whether a request may be given up for another one, which is not read yet."""
    if other.connection is request.connection:
        return False
    if other.sender is request.sender:
        more_s = other.connection.spent_s - request.connection.spent_s
    else:
        more_s = other.sender.spent_s - request.sender.spent_s
    return more_s + _reading_s(other, now) >= _MARGIN_S
