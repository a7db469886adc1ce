"""Whose request is worked on next: of who has had least, however many connections the others have."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import pytest

from cotra_rdma.errors import BusyError
from cotra_rdma.protocol.fair_shares import FairShares
from helpers.begun import GENEROUS_S, waited


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as threads:
        yield threads


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Reading:
    """A request that is let in, and stays until it is told to go."""

    def __init__(self, shares: FairShares, sender: str, pool: ThreadPoolExecutor, connection: str = "") -> None:
        self.is_in, self.go = threading.Event(), threading.Event()
        self.n_given_up = 0
        self.over: Future[None] = pool.submit(self._run, shares, sender, connection or sender)

    def _run(self, shares: FairShares, sender: str, connection: str) -> None:
        with shares.admit(sender, connection, self._give_up):
            self.is_in.set()
            assert self.go.wait(GENEROUS_S)

    def _give_up(self) -> None:
        self.n_given_up += 1
        self.go.set()


def test_one_that_had_more_makes_room_for_one_that_had_less(pool: ThreadPoolExecutor) -> None:
    clock = Clock()
    shares = FairShares(1, 2, clock)
    greedy = [Reading(shares, "greedy", pool) for _ in range(2)]
    for one in greedy:
        assert one.is_in.wait(GENEROUS_S)
    clock.now = 1.0
    good = Reading(shares, "good", pool)
    assert good.is_in.wait(GENEROUS_S)
    assert sorted(one.n_given_up for one in greedy) == [0, 1]
    for one in (*greedy, good):
        one.go.set()
        one.over.result(GENEROUS_S)


def test_no_request_is_given_up_for_another_of_its_connection(pool: ThreadPoolExecutor) -> None:
    clock = Clock()
    shares = FairShares(1, 2, clock)
    first = [Reading(shares, "one", pool) for _ in range(2)]
    for each in first:
        assert each.is_in.wait(GENEROUS_S)
    clock.now = 100.0  # they take long to be read
    late = Reading(shares, "one", pool)
    waited(lambda: shares.n_outside == 1)
    shares.look()
    assert [each.n_given_up for each in first] == [0, 0]
    assert not late.is_in.is_set()
    first[0].go.set()
    assert late.is_in.wait(GENEROUS_S)
    for each in (first[1], late):
        each.go.set()
        each.over.result(GENEROUS_S)
    assert len(shares) == 0


def test_more_connections_do_not_get_more(pool: ThreadPoolExecutor) -> None:
    clock = Clock()
    shares = FairShares(1, 4, clock)
    greedy = [Reading(shares, "greedy", pool, f"greedy {number}") for number in range(4)]
    for one in greedy:
        assert one.is_in.wait(GENEROUS_S)
    clock.now = 1.0
    newer = Reading(shares, "greedy", pool, "greedy, once more")  # has had as little as the next one, by its connection
    waited(lambda: newer.is_in.is_set())
    waiting = [Reading(shares, "greedy", pool, f"greedy {number}") for number in range(4, 8)]
    waited(lambda: shares.n_outside + sum(one.is_in.is_set() for one in waiting) == 4)
    good = [Reading(shares, "good", pool, f"good {number}") for number in range(2)]
    waited(lambda: shares.n_outside + sum(one.is_in.is_set() for one in waiting + good) == 6)
    clock.now = 2.0
    shares.look()
    for one in good:
        assert one.is_in.wait(GENEROUS_S)
    assert [one.n_given_up for one in good] == [0, 0]
    for one in (*greedy, newer, *waiting, *good):
        one.go.set()
        with suppress(BusyError):
            one.over.result(GENEROUS_S)
    assert len(shares) == 0


def test_of_one_sender_the_connections_are_equal(pool: ThreadPoolExecutor) -> None:
    clock = Clock()
    shares = FairShares(1, 2, clock)
    greedy = [Reading(shares, "one", pool, "first") for _ in range(2)]
    for one in greedy:
        assert one.is_in.wait(GENEROUS_S)
    clock.now = 1.0
    other = Reading(shares, "one", pool, "second")
    assert other.is_in.wait(GENEROUS_S)
    assert sorted(one.n_given_up for one in greedy) == [0, 1]
    for one in (*greedy, other):
        one.go.set()
        one.over.result(GENEROUS_S)


def test_workers_go_to_who_has_had_least(pool: ThreadPoolExecutor) -> None:
    clock = Clock()
    shares, order, go = FairShares(1, 10, clock), [], threading.Event()

    def work(name: str, then: Callable[[], object]) -> None:
        with shares.admit(name, name, lambda: None) as request:
            request.begin_work()
            with request.turn():
                order.append(name)
                then()

    def spend() -> None:
        assert go.wait(GENEROUS_S)
        clock.now += 5.0

    first = pool.submit(work, "greedy", spend)
    waited(lambda: order == ["greedy"])
    more = [pool.submit(work, name, lambda: None) for name in ("greedy", "good")]
    waited(lambda: len(shares._waiting) == 2)
    go.set()
    for one in (first, *more):
        one.result(GENEROUS_S)
    assert order == ["greedy", "good", "greedy"]


def test_who_waits_for_a_worker_and_is_gone_waits_no_more(pool: ThreadPoolExecutor) -> None:
    shares, go, begun = FairShares(1, 10), threading.Event(), threading.Event()
    requests = []

    def work(then: Callable[[], object]) -> None:
        with shares.admit("a", "a", lambda: None) as request:
            requests.append(request)
            request.begin_work()
            with request.turn():
                then()

    first = pool.submit(work, lambda: (begun.set(), go.wait(GENEROUS_S)))
    assert begun.wait(GENEROUS_S)
    second = pool.submit(work, lambda: None)
    waited(lambda: len(shares._waiting) == 1)
    requests[1].cancel()
    with pytest.raises(BusyError):
        second.result(GENEROUS_S)
    go.set()
    first.result(GENEROUS_S)
    assert len(shares) == 0
