"""The fake libibverbs (tests/fakeverbs/library) from a test: its settings, its faults, and what it saw."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import pytest

from cotra_rdma import Arena
from cotra_rdma._native.channel import Channel
from cotra_rdma._native.verbs import Device, MemoryRegistration, QueuePair, QueuePairOptions

FAULTS = ("FAIL", "READ", "LATE")
DEFAULTS = QueuePairOptions()


class Fake:
    """What the library takes from the environment, as methods; undone at the test's end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._environment = monkeypatch
        self._library = ctypes.CDLL("libibverbs.so.1")  # the one that is loaded
        self._library.fake_calls.restype = ctypes.c_long
        self._library.fake_qp_attribute.restype = ctypes.c_long

    def set(self, **settings: object) -> None:
        """Settings by name, MTU=3 or PORT_STATE_fake1=1: see fake.h."""
        for name, value in settings.items():
            self._environment.setenv(f"FAKE_VERBS_{name}", str(value))

    def reset(self) -> None:
        """Counts calls and READs anew."""
        self._library.fake_reset()

    def fail(self, call: str, error: int, *, nth: int | None = None) -> None:
        """From now on, every such call (or the nth) fails with that errno."""
        self.reset()
        self.set(FAIL=f"{call}{'' if nth is None else f'@{nth}'}={error}")

    def complete(self, nth: int, status: int | str) -> None:
        """The nth READ from now completes with that wc status, or "never"."""
        self.reset()
        self.set(READ=f"{nth}={status}")

    def heal(self) -> None:
        """No more faults."""
        for name in FAULTS:
            self._environment.delenv(f"FAKE_VERBS_{name}", raising=False)

    def calls(self, name: str) -> int:
        """How often a call was made since the last reset."""
        return int(self._library.fake_calls(name.encode()))

    def live_objects(self) -> str:
        """What is not destroyed, in words; "" when nothing is left."""
        text = ctypes.create_string_buffer(256)
        n = self._library.fake_live_objects(text, len(text))
        if n:
            gc.collect()  # it is slow: only where references could be in cycles
            n = self._library.fake_live_objects(text, len(text))
        return f"{n} objects: {text.value.decode()}" if n else ""

    def forget(self) -> None:
        """Frees what a failed call to destroy it has left."""
        self._library.fake_forget()

    def attribute(self, queue_pair: QueuePair, name: str) -> int:
        """An attribute that a queue pair was given."""
        return int(self._library.fake_qp_attribute(queue_pair.local.qp_number, name.encode()))

    def access(self, rkey: int) -> int:
        """The access flags of a registration."""
        return int(self._library.fake_mr_access(rkey))


@dataclass(slots=True)
class Ends:
    """Both ends of a connection over one device: the owner's registration and queue pair, the reader's queue pair."""

    registration: MemoryRegistration
    owner: QueuePair
    reader: QueuePair
    stack: ExitStack = field(default_factory=ExitStack)

    def channel(self, *, slots: int = 0, slot_bytes: int = 0) -> Channel:
        """A channel of the reader's; closed with the connection."""
        channel = Channel.verbs(self.reader, self.registration.region, slots=slots, slot_bytes=slot_bytes)
        return self.stack.enter_context(channel)


@contextmanager
def connected(
    arena: Arena, device: Device, options: QueuePairOptions = DEFAULTS, owner: QueuePairOptions | None = None
) -> Iterator[Ends]:
    """An arena registered with a device, and two queue pairs of the device that are connected to each other."""
    with ExitStack() as stack:
        ends = Ends(
            stack.enter_context(MemoryRegistration(device, arena)),
            stack.enter_context(QueuePair(device, owner or options)),
            stack.enter_context(QueuePair(device, options)),
            stack,
        )
        ends.owner.connect(ends.reader.local)
        ends.reader.connect(ends.owner.local)
        yield ends


def assert_reads_work(device: Device | None = None) -> None:
    """That everything can be opened, and a READ gives the region's bytes."""
    with ExitStack() as stack:
        device = device or stack.enter_context(Device())
        arena = stack.enter_context(Arena.create(4096))
        with arena.view() as view:
            view[:] = bytes(range(256)) * 16
        ends = stack.enter_context(connected(arena, device))
        assert ends.channel().read(100, 1000) == (bytes(range(256)) * 16)[100:1100]
