"""The contract of a channel, which every transport keeps: one suite, run over shm, model, fake verbs and Soft-RoCE.

A tier subclasses `ChannelContract` and gives the fixture `open_channel`: a callable that takes an `Arena` (sealed memory of
this process, or of another one) and returns a `Channel` over it that lives as long as the test.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from cotra_rdma import Arena, BoundsError, ClosedError, InvalidInputError, Shard
from cotra_rdma._native.channel import Channel
from cotra_rdma._native.graph_engine import Engine
from cotra_rdma._native.view import View
from helpers.lists import spire_of

OpenChannel = Callable[[Arena], Channel]
PATTERN_BYTES = 300_000


@pytest.fixture
def pattern() -> Arena:
    """An arena of bytes that tell their own position."""
    arena = Arena.create(PATTERN_BYTES)
    with arena.view() as view:
        view[:] = np.random.default_rng(3).integers(0, 256, PATTERN_BYTES, np.uint8).tobytes()
    return arena


def bytes_of(arena: Arena) -> bytes:
    with arena.view() as view:
        return bytes(view)


class ChannelContract:
    def test_reads_are_the_regions_bytes(self, open_channel: OpenChannel, pattern: Arena) -> None:
        expected, channel = bytes_of(pattern), open_channel(pattern)
        assert channel.info.region_bytes == PATTERN_BYTES
        for offset, length in ((0, 1), (0, 1024), (4095, 2), (PATTERN_BYTES - 1, 1), (PATTERN_BYTES - 1500, 1500)):
            assert channel.read(offset, length) == expected[offset : offset + length]

    def test_a_long_read_is_split(self, open_channel: OpenChannel, pattern: Arena) -> None:
        channel = open_channel(pattern)
        before = channel.info.reads
        assert channel.read(0, PATTERN_BYTES) == bytes_of(pattern)
        slot_bytes = channel.info.slot_bytes
        assert channel.info.reads - before == -(-PATTERN_BYTES // slot_bytes)
        assert channel.info.read_bytes >= PATTERN_BYTES

    @pytest.mark.parametrize("span", [(PATTERN_BYTES, 1), (PATTERN_BYTES - 1, 2), (2**63, 1), (2**64 - 1, 2)])
    def test_outside_the_region_is_refused_before_it_is_posted(
        self, open_channel: OpenChannel, pattern: Arena, span: tuple[int, int]
    ) -> None:
        channel = open_channel(pattern)
        with pytest.raises(BoundsError):
            channel.read(*span)
        assert channel.info.reads == 0
        assert channel.read(0, 16) == bytes_of(pattern)[:16]

    def test_many_reads_in_progress(self, open_channel: OpenChannel, pattern: Arena) -> None:
        channel = open_channel(pattern)
        offsets = np.random.default_rng(1).integers(0, PATTERN_BYTES - 512, 2000).astype(np.uint64)
        elapsed_s, latencies = channel.read_loop(offsets, 512, depth=16)
        assert latencies.shape == (2000,)
        assert (latencies > 0).all()
        assert elapsed_s > 0
        assert channel.info.reads == 2000

    def test_impossible_loops_are_refused(self, open_channel: OpenChannel, pattern: Arena) -> None:
        channel = open_channel(pattern)
        with pytest.raises(InvalidInputError):
            channel.read_loop(np.zeros(4, np.uint64), channel.info.slot_bytes + 1)
        with pytest.raises(BoundsError):
            channel.read_loop(np.array([0, PATTERN_BYTES], np.uint64), 1)

    def test_closed_means_closed(self, open_channel: OpenChannel, pattern: Arena) -> None:
        channel = open_channel(pattern)
        channel.close()
        channel.close()
        with pytest.raises(ClosedError):
            channel.read(0, 1)

    def test_a_search_is_bit_identical_to_one_in_process(
        self, open_channel: OpenChannel, shards: list[Path], queries: npt.NDArray[np.float32]
    ) -> None:
        with Shard.open(shards[0]) as shard:
            expected = shard.search(queries, k=10, ef=40, beam=4)
            channel = open_channel(shard.pinned(lock=False))
            with View.open(channel) as view, Engine.create([view], [channel]) as engine:
                for inflight in (1, 7, 0):
                    labels, distances, stats = engine.search(queries, 10, 40, 4, inflight=inflight)
                    np.testing.assert_array_equal(labels[0], expected[0])
                    np.testing.assert_array_equal(distances[0].view(np.uint32), expected[1].view(np.uint32))
                    for name in ("reads", "rounds", "expansions", "cache_hits", "read_bytes"):
                        np.testing.assert_array_equal(stats[name], expected[2][name])
            channel.close()

    def test_two_rounds_are_bit_identical_to_those_in_process(
        self, open_channel: OpenChannel, queries: npt.NDArray[np.float32], shard_with_lists: Path
    ) -> None:
        with Shard.open(shard_with_lists) as shard, spire_of(shard.arena) as engine:
            expected = engine.search(queries, 10, 4)
            channel = open_channel(shard.pinned(lock=False))
            with spire_of(shard.arena, open_channel=lambda _: channel) as engine:
                for inflight in (1, 3, 0):
                    labels, distances, shards, stats = engine.search(queries, 10, 4, inflight=inflight)
                    np.testing.assert_array_equal(labels, expected[0])
                    np.testing.assert_array_equal(distances.view(np.uint32), expected[1].view(np.uint32))
                    np.testing.assert_array_equal(shards, expected[2])
                    assert (stats["rounds"] == 2).all()
                    for name in ("lists", "reranked", "estimated", "list_bytes", "read_bytes"):
                        np.testing.assert_array_equal(stats[name], expected[3][name])
            channel.close()
