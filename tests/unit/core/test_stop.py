"""Searches that end before their time: by a flag, a deadline, a signal; and pauses, which change no answer."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from cotra_rdma import ClosedError, DeadlineError, SearchCancelledError, Shard, Stop
from cotra_rdma._core import stop as stops
from cotra_rdma._native import graph_engine as engines
from cotra_rdma._native import list_engine as lists
from cotra_rdma._native.channel import Channel
from cotra_rdma._native.graph_engine import Engine, Source
from cotra_rdma._native.list_engine import IvfTable, SpireEngine
from cotra_rdma._native.record_cache import RecordCache
from cotra_rdma._native.view import View
from helpers.begun import Signaller, waited
from helpers.faults import FaultyFabric

Floats = npt.NDArray[np.float32]
MANY = 500  # times the queries: minutes


@pytest.fixture(scope="module")
def shard(words: Floats) -> Iterator[Shard]:
    """3,000 words, in 32 lists beside the graph."""
    with Shard.build(words[:3000], M=8, ef_construction=40, n_threads=1, n_lists=32) as made:
        yield made


class World:
    """Engines over one shard, and over it twice."""

    def __init__(self, shard: Shard, stack: ExitStack) -> None:
        self.shard, self.stack = shard, stack
        self.view = stack.enter_context(View.open(self.channel()))

    def channel(self, **fabric: float) -> Channel:
        inner = self.stack.enter_context(Channel.shm(self.shard.arena, slot_bytes=1 << 16))
        return self.stack.enter_context(Channel.model(inner, FaultyFabric(**fabric))) if fabric else inner

    def engine(self, *sources: Source, cache: RecordCache | None = None) -> Engine:
        caches = [cache] * len(sources)
        return self.stack.enter_context(Engine.create([self.view] * len(sources), sources, caches))

    def spire(self, channel: Channel) -> SpireEngine:
        table = self.stack.enter_context(IvfTable.open(channel, self.view))
        return self.stack.enter_context(SpireEngine.create([self.view], [table], [channel]))


@pytest.fixture
def world(shard: Shard) -> Iterator[World]:
    with ExitStack() as stack:
        yield World(shard, stack)


Run = Callable[..., Any]


def runs(world: World, **fabric: float) -> dict[str, Run]:
    """Each engine's search; over READs, those of a fabric."""
    cache = world.stack.enter_context(RecordCache.create(world.view, 1 << 20))
    walk = {
        "read": world.engine(world.channel(**fabric)),
        "own": world.engine(world.shard.arena),
        "cached": world.engine(world.channel(**fabric), cache=cache),
        "both": world.engine(world.channel(**fabric), world.shard.arena),
    }
    spire = world.spire(world.channel(**fabric))
    found: dict[str, Run] = {
        name: lambda queries, engine=engine, **how: engine.search(queries, 10, 64, 8, **how)
        for name, engine in walk.items()
    }
    return found | {"spire": lambda queries, **how: spire.search(queries, 10, 16, **how)}


KINDS = ("read", "own", "cached", "both", "spire")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fabric", [{}, {"round_trip_s": 1e-5, "reads_per_s": 1e6}])
def test_pauses_change_no_answer(
    world: World, queries: Floats, kind: str, fabric: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = runs(world, **fabric)[kind](queries)
    pauses = 0

    def at_once(_stop: Stop | None) -> int:
        nonlocal pauses
        pauses += 1
        return 1

    for module in (engines, lists):
        monkeypatch.setattr(module, "PAUSE_NS", 1)
        monkeypatch.setattr(module, "pause_ns", at_once)
    found = runs(world, **fabric)[kind](queries)
    assert pauses > 10
    for one, other in zip(found[:-1], wanted[:-1], strict=True):
        np.testing.assert_array_equal(one, other)
    if kind != "cached":  # whose records depend on which query was first
        np.testing.assert_array_equal(found[-1]["reads"], wanted[-1]["reads"])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_stopped_or_late_does_not_begin(world: World, queries: Floats, kind: str) -> None:
    stop = Stop()
    stop.set()
    with pytest.raises(SearchCancelledError):
        runs(world)[kind](queries, stop=stop)
    with pytest.raises(DeadlineError) as caught:
        runs(world)[kind](queries, deadline=time.monotonic())
    assert caught.value.shard is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rtt_s", [0.0, 0.02])
def test_another_thread_ends_it(world: World, queries: Floats, kind: str, rtt_s: float) -> None:
    """While it works, and while it waits for the wire. The engine is then of no use, for READs may still land in its slots."""
    fabric = {"round_trip_s": rtt_s} if rtt_s and kind != "own" else {}
    run, stop, many = runs(world, **fabric)[kind], Stop(), np.tile(queries, (MANY, 1))
    ends: list[BaseException] = []

    def search() -> None:
        try:
            run(many, stop=stop)
        except SearchCancelledError as error:
            ends.append(error)

    thread = threading.Thread(target=search)
    thread.start()
    waited(lambda: stop.memory[1] > 0)
    stop.set()
    thread.join()
    assert len(ends) == 1
    assert 0 < stop.memory[1] < len(many) / 2
    with pytest.raises(ClosedError):
        run(queries)


@pytest.mark.parametrize("kind", KINDS)
def test_a_deadline_bounds_the_whole(world: World, queries: Floats, kind: str) -> None:
    """Not each READ: these all come."""
    run, many, stop = runs(world, round_trip_s=1e-4)[kind], np.tile(queries, (MANY, 1)), Stop()
    with pytest.raises(DeadlineError, match="deadline") as caught:
        run(many, deadline=time.monotonic() + 0.2, stop=stop)
    assert caught.value.shard is None
    assert stop.memory[1] < len(many) / 2


@pytest.mark.parametrize("kind", ["read", "spire"])
def test_the_silent_shard_is_named(world: World, queries: Floats, kind: str) -> None:
    """Where the time went to one READ, its shard is to blame."""
    with pytest.raises(DeadlineError, match=r"a READ did not complete within \d+ ms") as caught:
        runs(world, drop_after_reads=20)[kind](queries, deadline=time.monotonic() + 0.5, timeout_s=0.5)
    assert caught.value.shard == 0


@pytest.mark.parametrize("n_threads", [1, 2])
def test_ctrl_c_ends_a_search_in_this_process(shard: Shard, queries: Floats, n_threads: int) -> None:
    wanted, stop = shard.search(queries), Stop()
    many = np.tile(queries, (MANY, 1))
    with Signaller(lambda: stop.memory[1] > 0), pytest.raises(KeyboardInterrupt):
        shard.search(many, ef=256, n_threads=n_threads, stop=stop)
    assert 0 < stop.n_answered < len(many) / 2
    for found, expected in zip(shard.search(queries)[:2], wanted[:2], strict=True):
        np.testing.assert_array_equal(found, expected)


def test_other_signals_are_handled_and_change_nothing(shard: Shard, queries: Floats) -> None:
    """A handler that returns lets the search go on, and runs while it does."""
    handled: list[int] = []
    stop = Stop()
    many = np.tile(queries, (40, 1))

    def handle(_number: int, _frame: object) -> None:
        handled.append(stop.n_answered)

    before = signal.signal(signal.SIGUSR1, handle)
    try:
        with Signaller(lambda: stop.memory[1] > 0, signal.SIGUSR1):
            found = shard.search(many, ef=400, stop=stop)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(handled) == 1
    assert 0 < handled[0] < len(many)
    np.testing.assert_array_equal(found[0][: len(queries)], found[0][-len(queries) :])


@pytest.mark.parametrize("n_threads", [1, 2])
def test_a_search_says_how_far_it_came(shard: Shard, queries: Floats, n_threads: int) -> None:
    many = np.tile(queries, (MANY, 1))
    with pytest.raises(DeadlineError, match=rf"not over within 0.2 s: \d+ of {len(many)} queries were answered"):
        shard.search(many, ef=256, n_threads=n_threads, timeout_s=0.2)
    assert len(shard.search(queries, timeout_s=100.0)[0]) == len(queries)


def test_a_stop_counts_and_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    stop = Stop()
    monkeypatch.setattr(stops, "LOOK_S", 0.0)
    stop.begin(10, lambda done, total: told.append((done, total)))
    stop.expect(10)
    stop.expect(10)  # two owners are asked
    stop.tell()
    stop.note(10)
    stop.memory[1] += 4
    stop.tell()
    stop.note(10)
    stop.tell()
    assert told == [(0, 10), (7, 10), (10, 10)]
    stop.set()
    with pytest.raises(SearchCancelledError):
        stop.begin(1)


def test_only_the_main_thread_pauses_again() -> None:
    assert engines.pause_ns(None) == engines.PAUSE_NS
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(engines.pause_ns(Stop())))
    thread.start()
    thread.join()
    assert found == [0]
