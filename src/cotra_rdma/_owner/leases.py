"""The queue pairs that readers hold at an owner, and how long they keep them."""

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
"""A reader that is silent for so long loses its queue pairs."""
MAX_QUEUE_PAIRS = 1024
"""At once, of all readers together."""
MAX_A_READER = 320
"""The same of one reader: its threads have one each at most."""
MAX_NAME = 64
"""Characters of a reader's name."""


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
        """`clock` gives seconds. `then` is called by the thread each time that it has looked for silent readers."""
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
        """Queue pairs that are held."""
        with self._lock:
            return len(self._held)

    @property
    def n_readers(self) -> int:
        """Readers that hold any."""
        with self._lock:
            return len(self._heard)

    def lease(
        self,
        reader: str,
        connect: Callable[[], QueuePair],
        names: tuple[str, ...] = (),
        most: int = MAX_QUEUE_PAIRS,
    ) -> tuple[int, QueuePair]:
        """Has a queue pair made and connected for a reader.

        Args:
            reader: its name.
            connect: makes the queue pair.
            names: in its certificate.
            most: that an identity with these names may hold.

        Returns:
            Its number, and the queue pair, which stays this object's.

        Raises `InvalidInputError` where there are too many, or after `close`.
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
        """Notes that a reader lives. `names` are those in its certificate."""
        who = _Reader(reader, names)
        with self._lock:
            if who in self._heard:
                self._heard[who] = self._clock()

    def release(self, reader: str, number: int, names: tuple[str, ...] = ()) -> None:
        """Closes one of a reader's queue pairs; number 0: all of them. `names` are those in its certificate."""
        self._close_those(lambda at, held: held.reader == (reader, names) and number in (0, at))

    def revoke(self, may_stay: Callable[[tuple[str, ...]], bool]) -> None:
        """Closes the queue pairs of identities that may not have any: their next READ fails."""
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
        """Closes what silent readers hold. The thread does it four times a lease."""
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
