"""What a channel does after a call that stopped waiting for its READs. (The contract itself: tests/transport.)"""

from __future__ import annotations

import numpy as np
import pytest

from cotra_rdma import Arena, ClosedError, DeadlineError, FabricModel, FormatError, InvalidInputError, Shard
from cotra_rdma._native.channel import Channel
from cotra_rdma._native.graph_engine import Engine
from cotra_rdma._native.library import lib
from cotra_rdma._native.view import View
from helpers.faults import FaultyFabric


def test_reads_that_nobody_waits_for_never_answer_a_later_call() -> None:
    slow = FabricModel(round_trip_s=3600.0)
    arena = Arena.create(1 << 20)
    with arena, Channel.shm(arena, slot_bytes=4096) as inner, Channel.model(inner, slow) as channel:
        with pytest.raises(DeadlineError):
            channel.read(0, 1 << 18, timeout_s=1e-6)
        for length in (1, 4096, 1 << 20):
            with pytest.raises(ClosedError, match="64 READs of an earlier call"):
                channel.read(0, length)


def test_dropped_reads_leave_their_slots_taken() -> None:
    with Arena.create(4096) as arena, Channel.shm(arena) as inner:
        with Channel.model(inner, FaultyFabric(drop_after_reads=1)) as channel:
            assert channel.read(0, 8) == bytes(8)
            with pytest.raises(DeadlineError):
                channel.read(0, 8, timeout_s=1e-6)
            with pytest.raises(ClosedError):
                channel.read_loop(np.zeros(4, np.uint64), 8)
        assert inner.read(0, 8) == bytes(8)  # the inner channel did complete it


def test_a_second_engine_on_the_channel_of_a_failed_search(words: np.ndarray) -> None:
    """The first search leaves completions for slots that the second engine does not have."""
    with Shard.build(words[:500], n_threads=1) as shard, Channel.shm(shard.arena) as inner, View.open(inner) as view:
        fabric = FaultyFabric(fail_after_reads=100, fail_status=lib.COTRA_ERR_FORMAT)
        with Channel.model(inner, fabric) as channel:
            with Engine.create([view], [channel]) as engine:
                with pytest.raises(FormatError, match="READ 101"):
                    engine.search(words[:64], 10, 64, 4, inflight=64)
                with pytest.raises(ClosedError):
                    engine.search(words[:64], 10, 64, 4)
            with Engine.create([view], [channel]) as engine, pytest.raises(FormatError, match="READ 101"):
                engine.search(words[:1], 1, 1, 1, inflight=1)
        with Engine.create([view], [inner]) as engine:
            labels, _, _ = engine.search(words[:64], 1, 64, 4)
            assert labels[0, :, 0].tolist() == list(range(64))


def test_memory_that_is_not_aligned_is_refused() -> None:
    memory = np.zeros(64, np.uint64).view(np.uint8)
    for shift in range(1, 8):
        with Arena.wrap(memory[shift:]) as arena, pytest.raises(InvalidInputError, match="8-byte aligned"):
            Channel.shm(arena)
    with Arena.wrap(memory[8:]) as arena, Channel.shm(arena) as channel:
        assert channel.read(1, 3) == bytes(3)


def test_more_queries_join_while_the_wire_is_waited_for(words: np.ndarray) -> None:
    """All 64 queries are in progress at once where the wire is far, and no more than were asked for."""
    far = FabricModel(round_trip_s=5e-3)
    few, slots = {}, {}
    with (
        Shard.build(words[:500], n_threads=1) as shard,
        Channel.shm(shard.arena) as inner,
        View.open(inner) as view,
        Channel.model(inner, far) as channel,
        Engine.create([view], [channel]) as engine,
    ):
        for inflight in (8, 0):
            few[inflight] = engine.search(words[:64], 10, 10, 1, inflight=inflight)
            slots[inflight] = engine.slots
    assert (few[0][0] == few[8][0]).all()
    assert (few[0][2]["reads"] == few[8][2]["reads"]).all()
    assert slots == {8: 8, 0: 64}
