"""`StopSignals`: how `cotra serve` waits for the signals that end it, and for SIGHUP."""

from __future__ import annotations

import select
import signal
import socket
import sys

import typer


class StopSignals:
    """Ends the block at SIGTERM or SIGINT by `typer.Exit(0)`, so that everything that the block opened is closed.

    A second signal raises `typer.Exit(0)` again, which ends the wait for requests in progress.
    Further signals are ignored.
    The wake-up socket notices a signal that arrives just before `wait` begins.
    """

    def __enter__(self) -> StopSignals:
        self._n_signals = 0
        self._hung_up = False
        self._wakes, self._wake = socket.socketpair()
        self._wake.setblocking(False)
        signal.set_wakeup_fd(self._wake.fileno())
        self._old = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        self._before = signal.signal(signal.SIGHUP, self._hang_up)
        return self

    def _hang_up(self, _number: int, _frame: object) -> None:
        self._hung_up = True

    def take_hangup(self) -> bool:
        """Returns whether SIGHUP came since the last call."""
        hung_up, self._hung_up = self._hung_up, False
        return hung_up

    def _stop(self, _number: int, _frame: object) -> None:
        self._n_signals += 1
        if self._n_signals == 2:
            for number in self._old:
                signal.signal(number, signal.SIG_IGN)
        raise typer.Exit(0)

    def wait(self, until_stdin_closes: bool, seconds: float) -> bool:
        """Waits for a signal, the end of stdin or a time-out, whichever comes first.

        Args:
            until_stdin_closes: whether to wait for the end of stdin too.
            seconds: the time-out.

        Returns:
            Whether stdin ended.
        """
        stdin = [sys.stdin] if until_stdin_closes else []
        ready = select.select([self._wakes, *stdin], [], [], seconds)[0]
        if self._wakes in ready:
            self._wakes.recv(4096)
        return bool(set(stdin) & set(ready))

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(-1)
        for number, old in self._old.items():
            signal.signal(number, old)
        signal.signal(signal.SIGHUP, self._before)
        self._wake.close()
        self._wakes.close()
