"""Readers' queue pairs: given back, taken back, and never more than there may be."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from cotra_rdma import InvalidInputError
from cotra_rdma._owner import leases
from cotra_rdma._owner.leases import Leases


class Pair:
    """A queue pair, as far as leases know it."""

    def __init__(self) -> None:
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True


def made(into: list[Pair]) -> Callable[[], Any]:
    def make() -> Pair:
        into.append(Pair())
        return into[-1]

    return make


def test_a_reader_gives_back_one_or_all() -> None:
    held, pairs = Leases(), []
    numbers = [held.lease(reader, made(pairs))[0] for reader in ("a", "a", "b")]
    assert len(set(numbers)) == 3
    assert 0 not in numbers
    held.release("b", numbers[0])  # not its own
    assert len(held) == 3
    held.release("a", numbers[0])
    assert [pair.is_closed for pair in pairs] == [True, False, False]
    held.release("a", 0)
    assert [pair.is_closed for pair in pairs] == [True, True, False]
    held.close()
    assert len(held) == 0
    assert pairs[2].is_closed
    with pytest.raises(InvalidInputError, match="no more than"):
        held.lease("c", made(pairs))


def test_a_certificate_is_part_of_a_readers_name() -> None:
    now = 0.0
    held, pairs = Leases(lease_s=60.0, clock=lambda: now), []
    mine, theirs = ("mine",), ("theirs",)
    number, _ = held.lease("a", made(pairs), mine)
    held.release("a", number, theirs)
    held.release("a", 0)
    assert len(held) == 1
    now = 40.0
    held.renew("a", theirs)
    now = 61.0
    held.take_back()
    assert len(held) == 0  # nobody else could renew it


def test_silent_readers_lose_theirs() -> None:
    now = 0.0
    held, pairs = Leases(lease_s=60.0, clock=lambda: now), []
    for reader in ("silent", "lively"):
        held.lease(reader, made(pairs))
    now = 40.0
    held.renew("lively")
    held.renew("unknown")
    now = 60.0
    held.take_back()
    assert len(held) == 2
    now = 61.0
    held.take_back()
    assert [pair.is_closed for pair in pairs] == [True, False]
    now = 101.0
    held.take_back()
    assert [pair.is_closed for pair in pairs] == [True, True]


def test_there_is_a_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "MAX_QUEUE_PAIRS", 2)
    held, pairs = Leases(), []
    for _ in range(2):
        held.lease("a", made(pairs))
    with pytest.raises(InvalidInputError, match="no more than 2"):
        held.lease("b", made(pairs))
    held.release("a", 0)
    held.lease("b", made(pairs))


def test_what_cannot_be_connected_is_not_held() -> None:
    def fails() -> Any:
        raise InvalidInputError("no route")

    held = Leases()
    with pytest.raises(InvalidInputError, match="no route"):
        held.lease("a", fails)
    assert len(held) == 0


def test_the_thread_ends_with_it() -> None:
    before = threading.active_count()
    held = Leases()
    held.start()
    assert threading.active_count() == before + 1
    held.close()
    held.close()
    assert threading.active_count() == before


def test_each_reader_and_each_identity_has_a_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "MAX_A_READER", 2)
    held, pairs = Leases(), []
    for _ in range(2):
        held.lease("a", made(pairs), ("host",), 3)
    with pytest.raises(InvalidInputError, match="no more than 2 queue pairs of one reader"):
        held.lease("a", made(pairs), ("host",), 3)
    held.lease("b", made(pairs), ("host",), 3)  # another reader of the same identity
    with pytest.raises(InvalidInputError, match="no more than 3 queue pairs of host"):
        held.lease("b", made(pairs), ("host",), 3)
    held.lease("b", made(pairs), ("other",), 3)


def test_who_may_not_stay_loses_all_and_nobody_else() -> None:
    held, pairs = Leases(), []
    for names in (("good",), ("bad",), ("bad", "too"), ("good", "bad")):
        held.lease("reader of " + names[0], made(pairs), names)
    held.revoke(lambda names: names[0] == "good")
    assert [pair.is_closed for pair in pairs] == [False, True, True, False]
    assert len(held) == 2
    held.close()
