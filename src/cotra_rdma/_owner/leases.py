"""`Leases`: the queue pairs that readers hold at an owner, and how long each reader keeps them."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from cotra_rdma._native.verbs import QueuePair
from cotra_rdma.errors import InvalidInputError

log = logging.getLogger(__name__)

LEASE_S = 60.0
"""The length of a lease, in seconds. A reader that is silent for longer loses its queue pairs."""
MAX_QUEUE_PAIRS = 1024
"""The most queue pairs that all readers together hold."""
MAX_A_READER = 320
"""The most queue pairs that one reader holds. Each of its threads has one."""
MAX_NAME = 64
"""The most characters of a reader's name."""


class _Reader(NamedTuple):
    name: str
    names: tuple[str, ...]  # in its certificate


class _Held(NamedTuple):
    reader: _Reader
    queue_pair: QueuePair


class Leases:
    """Queue pairs by number, each held by a reader.

    A reader is told by its name and by the names in its certificate, so nobody else can renew or release what it holds.
    A thread takes back what silent readers hold.
    Any thread may call the methods.
    """

    def __init__(
        self,
        lease_s: float = LEASE_S,
        clock: Callable[[], float] = time.monotonic,
        then: Callable[[], object] | None = None,
    ) -> None:
        """Prepares the thread. `start` starts it.

        Args:
            lease_s: the length of a lease, in seconds.
            clock: returns the time in seconds.
            then: called by the thread each time after it looked for silent readers.
        """
        self._then = then
        self.n_reaped = 0
        self._lease_s, self._clock = lease_s, clock
        self._held: dict[int, _Held] = {}
        self._numbers = itertools.count(1)
        self._heard: dict[_Reader, float] = {}  # of readers that hold any
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._take_back_regularly, name="cotra-leases", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def __len__(self) -> int:
        """The number of queue pairs that are held."""
        with self._lock:
            return len(self._held)

    @property
    def n_readers(self) -> int:
        """The number of readers that hold a queue pair."""
        with self._lock:
            return len(self._heard)

    def lease(
        self,
        reader: str,
        connect: Callable[[], QueuePair],
        names: tuple[str, ...] = (),
        most: int = MAX_QUEUE_PAIRS,
    ) -> tuple[int, QueuePair]:
        """Makes a queue pair for a reader, and holds it.

        Args:
            reader: the name of the reader.
            connect: makes and connects the queue pair.
            names: the names in the reader's certificate.
            most: the most queue pairs that an identity with these names may hold.

        Returns:
            The number of the queue pair, and the queue pair, which stays this object's.

        Raises:
            InvalidInputError: there are too many queue pairs, or `close` was called.
        """
        with self._lock:
            if self._stop.is_set() or len(self._held) >= MAX_QUEUE_PAIRS:
                raise InvalidInputError(f"no more than {MAX_QUEUE_PAIRS} queue pairs at once")
            if sum(held.reader == (reader, names) for held in self._held.values()) >= MAX_A_READER:
                raise InvalidInputError(f"no more than {MAX_A_READER} queue pairs of one reader at once")
            if names and sum(held.reader.names == names for held in self._held.values()) >= most:
                raise InvalidInputError(f"no more than {most} queue pairs of {', '.join(names)} at once")
            queue_pair = connect()
            number = next(self._numbers)
            who = _Reader(reader, names)
            self._held[number] = _Held(who, queue_pair)
            self._heard[who] = self._clock()
        return number, queue_pair

    def renew(self, reader: str, names: tuple[str, ...] = ()) -> None:
        """Renews the lease of a reader, if it holds queue pairs. `names` are those in its certificate."""
        who = _Reader(reader, names)
        with self._lock:
            if who in self._heard:
                self._heard[who] = self._clock()

    def release(self, reader: str, number: int, names: tuple[str, ...] = ()) -> None:
        """Closes the queue pair of a reader with this number. Number 0 closes all of the reader's.

        `names` are those in its certificate.
        """
        self._close_those(lambda at, held: held.reader == (reader, names) and number in (0, at))

    def revoke(self, may_stay: Callable[[tuple[str, ...]], bool]) -> None:
        """Closes the queue pairs of identities that may not have any. Their next READ fails.

        Args:
            may_stay: takes the names in a certificate, and returns whether that identity may have queue pairs.
        """
        closed = self._close_those(lambda _at, held: not may_stay(held.reader.names))
        if closed:
            log.info("%d queue pairs were taken from readers that may not have them any more", closed)

    def close(self) -> None:
        """Closes all queue pairs, and ends the thread. Idempotent."""
        with self._lock:
            self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._close_those(lambda _at, _held: True)

    def take_back(self) -> None:
        """Closes the queue pairs of silent readers. The thread calls it four times a lease."""
        with self._lock:
            silent = {reader for reader, heard in self._heard.items() if self._clock() - heard > self._lease_s}
        if silent:
            log.info("queue pairs of %d silent readers are taken back", len(silent))
            self.n_reaped += self._close_those(lambda _at, held: held.reader in silent)

    def _take_back_regularly(self) -> None:
        while not self._stop.wait(self._lease_s / 4):
            self.take_back()
            if self._then is not None:
                self._then()

    def _close_those(self, chosen: Callable[[int, _Held], bool]) -> int:
        with self._lock:
            numbers = [at for at, held in self._held.items() if chosen(at, held)]
            for number in numbers:
                self._held.pop(number).queue_pair.close()
            holding = {held.reader for held in self._held.values()}
            self._heard = {reader: heard for reader, heard in self._heard.items() if reader in holding}
            return len(numbers)
