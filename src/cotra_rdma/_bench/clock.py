"""How long a call of the package spends in its C engine, and how long around it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from cotra_rdma._native import graph_engine as engine
from cotra_rdma._native import list_engine as ivf

_CALLS = ("cotra_engine_search", "cotra_spire_search")


class EngineClock:
    """Nanoseconds that each thread spent in the engine's C search calls."""

    def __init__(self) -> None:
        self._spent: dict[int, int] = defaultdict(int)

    def add(self, ns: int) -> None:
        """Counts one call of the calling thread."""
        self._spent[threading.get_ident()] += ns

    @property
    def seconds(self) -> float | None:
        """Of the thread that spent most; None where the engine was not called in this process."""
        return max(self._spent.values()) / 1e9 if self._spent else None


class _Timed:
    """The C library, with the time of its search calls told to a clock."""

    def __init__(self, lib: Any, clock: EngineClock) -> None:
        self._lib, self._clock = lib, clock

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._lib, name)
        if name not in _CALLS:
            return function

        def timed(*arguments: Any) -> Any:
            begin = time.perf_counter_ns()
            try:
                return function(*arguments)
            finally:
                self._clock.add(time.perf_counter_ns() - begin)

        return timed


@contextlib.contextmanager
def engine_clock() -> Iterator[EngineClock]:
    """Times the engine's C search calls of all threads while it is open."""
    clock, modules = EngineClock(), (engine, ivf)
    libs = [module.lib for module in modules]
    for module, lib in zip(modules, libs, strict=True):
        setattr(module, "lib", _Timed(lib, clock))  # noqa: B010
    try:
        yield clock
    finally:
        for module, lib in zip(modules, libs, strict=True):
            setattr(module, "lib", lib)  # noqa: B010
