"""`Upkeep`: a session's thread, which renews leases and tries owners that are away."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Executor

from cotra_rdma._reader.connection import Connection
from cotra_rdma._reader.replicas import Replicas
from cotra_rdma.errors import ClosedError, CotraError, StaleShardError

log = logging.getLogger(__name__)

LEASE_RENEWAL_S = 15.0
"""The interval between renewals, in seconds. It is a quarter of an owner's lease."""
LOOK_S = 5.0
"""The interval at which owners that are away are tried, in seconds."""


class Upkeep:
    """Renews leases every `LEASE_RENEWAL_S`, and tries owners that are away every `LOOK_S`, in a thread of its own.

    The thread holds this object weakly, and ends when the object is collected.
    So the leases of a cluster that was never closed run out once nobody holds the cluster.
    """

    def __init__(
        self,
        replicas: Replicas,
        revive: Callable[[], object],
        follow: Callable[[], object],
        callers: Callable[[], Executor],
    ) -> None:
        """Prepares the thread. `start` starts it.

        Args:
            replicas: the owners.
            revive: tries owners that are away. It raises `ClosedError` once the cluster is closed. It is a bound method of
                the cluster, and held weakly.
            follow: called if an owner serves another image than before. It is a bound method of the cluster, and held weakly.
            callers: returns the threads that wait for owners.
        """
        self._replicas, self._callers = replicas, callers
        self._revive, self._follow = weakref.WeakMethod(revive), weakref.WeakMethod(follow)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._renewed = time.monotonic()
        self.thread: threading.Thread | None = None

    def start(self) -> None:
        """Starts the thread, unless it runs or was stopped."""
        with self._lock:
            if self.thread is not None or self._stop.is_set():
                return
            weakref.finalize(self, self._stop.set)
            self.thread = threading.Thread(
                target=_attend, args=(weakref.ref(self), self._stop), name="cotra-attendant", daemon=True
            )
            self.thread.start()

    def stop(self) -> None:
        """Ends the thread, and waits for its end. Idempotent."""
        self._stop.set()
        if self.thread is not None and self.thread is not threading.current_thread():
            self.thread.join()

    def renew_if_due(self) -> None:
        """Renews the leases if the last renewal was `LEASE_RENEWAL_S` ago."""
        with self._lock:
            if time.monotonic() - self._renewed < LEASE_RENEWAL_S:
                return
            self._renewed = time.monotonic()
        self.renew_leases()

    def renew_leases(self) -> None:
        """Renews the lease at all owners at once. Follows them if one serves another image than before."""
        if any(list(self._callers().map(_renew, self._replicas.connections))):
            follow = self._follow()
            if follow is not None:
                follow()

    def look(self) -> None:
        """Renews leases and tries owners that are away. Errors are logged, because the thread must go on."""
        revive = self._revive()
        for task in (self.renew_if_due, revive or (lambda: None)):
            try:
                task()
            except ClosedError:
                log.debug("owners are looked after no more: the cluster is closed")
            except Exception:
                log.exception("owners that are away, and leases, are looked after again in %s s", LOOK_S)


def _renew(connection: Connection) -> bool:
    """Renews the lease at one owner. Returns whether that owner serves another image than before."""
    try:
        connection.renew()
    except StaleShardError as error:
        log.info("%s", error)
        return True
    except CotraError as error:  # the next search meets the same error, and reports it
        log.debug("%s: its lease was not renewed: %s", connection, error)
    return False


def _attend(upkeep: weakref.ref[Upkeep], stop: threading.Event) -> None:
    while not stop.wait(LOOK_S):
        alive = upkeep()
        if alive is not None:
            alive.look()
        del alive
