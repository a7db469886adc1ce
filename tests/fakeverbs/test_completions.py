"""Error completions: each status becomes a `CompletionError`, and READs that never complete a `DeadlineError`."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from cotra_rdma import Arena, CompletionError, DeadlineError, MemoryRegion, TransportError
from cotra_rdma._native.channel import Channel
from cotra_rdma._native.verbs import Device, MemoryRegistration, QueuePair, QueuePairOptions
from helpers.fakeverbs import Ends, Fake, assert_reads_work, connected

ERR = 6  # enum ibv_qp_state
PIECE = 512
N_PIECES = 64

# enum ibv_wc_status and ibv_wc_status_str(3)
STATUSES = {
    1: "local length error",
    2: "local QP operation error",
    3: "local EE context operation error",
    4: "local protection error",
    5: "Work Request Flushed Error",
    6: "memory management operation error",
    7: "bad response error",
    8: "local access error",
    9: "remote invalid request error",
    10: "remote access error",
    11: "remote operation error",
    12: "transport retry counter exceeded",
    13: "RNR retry counter exceeded",
    14: "local RDD violation error",
    15: "remote invalid RD request",
    16: "aborted error",
    17: "invalid EE context number",
    18: "invalid EE context state",
    19: "fatal error",
    20: "response timeout error",
    21: "general error",
    22: "TM error",
    23: "TM software rendezvous",
    99: "unknown",
}


@pytest.fixture
def arena() -> Arena:
    arena = Arena.create(PIECE * N_PIECES)
    with arena.view() as view:
        view[:] = np.random.default_rng(5).bytes(PIECE * N_PIECES)
    return arena


@pytest.fixture
def ends(fake: Fake, arena: Arena) -> Iterator[Ends]:
    with Device() as device, connected(arena, device) as both:
        yield both


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("nth", [1, 17, N_PIECES])
def test_each_status_is_told(fake: Fake, ends: Ends, arena: Arena, status: int, nth: int) -> None:
    channel = ends.channel(slot_bytes=PIECE)
    fake.complete(nth, status)
    with pytest.raises(CompletionError) as caught:
        channel.read(0, len(arena))
    assert caught.value.wc_status == status
    assert caught.value.vendor_error == 0x80 + status
    assert f"status {status} ({STATUSES[status]})" in str(caught.value)
    assert channel.info.reads == nth - 1
    assert fake.attribute(ends.reader, "state") == ERR
    with pytest.raises(CompletionError) as again:  # the queue pair is gone; it says so, with the first cause
        channel.read(0, 1)
    assert again.value.wc_status == status
    fake.heal()
    assert_reads_work()


def test_closing_after_an_error_does_not_wait(fake: Fake, ends: Ends) -> None:
    channel = ends.channel(slot_bytes=PIECE)
    fake.complete(3, 10)
    with pytest.raises(CompletionError):
        channel.read(0, PIECE * 16)
    fake.reset()
    channel.close()
    assert fake.calls("poll_cq") < 100


@pytest.mark.parametrize("nth", [1, 5, 16])
def test_closing_after_a_chain_taken_in_part_does_not_wait(fake: Fake, ends: Ends, nth: int) -> None:
    channel = ends.channel(slot_bytes=PIECE)
    fake.fail("post_send", 12, nth=nth)
    with pytest.raises(TransportError, match="ibv_post_send of 16 READs"):
        channel.read(0, PIECE * 16)
    channel.close()
    assert fake.calls("poll_cq") < 100


def test_a_wrong_rkey(fake: Fake, ends: Ends) -> None:
    region = ends.registration.region
    with Channel.verbs(ends.reader, MemoryRegion(region.addr, region.rkey + 1, region.len)) as channel:
        with pytest.raises(CompletionError, match=r"remote access error.*rkey is wrong") as caught:
            channel.read(0, 16)
        assert caught.value.wc_status == 10
    assert fake.attribute(ends.owner, "state") == ERR


@pytest.mark.parametrize("span", [(-1, 16), (PIECE * N_PIECES - 15, 16), (PIECE * N_PIECES, 1)])
def test_outside_the_registration(ends: Ends, span: tuple[int, int]) -> None:
    """A region that claims more than what was registered: the owner's NIC refuses it."""
    region = ends.registration.region
    wrong = MemoryRegion(region.addr - 16, region.rkey, region.len + 32)
    with Channel.verbs(ends.reader, wrong) as channel:
        assert len(channel.read(16, region.len)) == region.len
        with pytest.raises(CompletionError) as caught:
            channel.read(16 + span[0], span[1])
        assert caught.value.wc_status == 10


def test_memory_that_the_owner_deregistered(ends: Ends, arena: Arena) -> None:
    channel = ends.channel()
    assert channel.read(0, 16) == bytes(arena.view()[:16])
    ends.registration.close()
    with pytest.raises(CompletionError, match="owner deregistered") as caught:
        channel.read(0, 16)
    assert caught.value.wc_status == 10


def test_memory_of_another_protection_domain(fake: Fake, ends: Ends) -> None:
    with Device() as other, Arena.create(4096) as memory, MemoryRegistration(other, memory) as registration:
        channel = Channel.verbs(ends.reader, registration.region)
        with channel, pytest.raises(CompletionError) as caught:
            channel.read(0, 16)
        assert caught.value.wc_status == 10


def test_an_owner_that_is_gone(ends: Ends) -> None:
    channel = ends.channel()
    ends.owner.close()
    with pytest.raises(CompletionError, match="the owner does not answer") as caught:
        channel.read(0, 16)
    assert caught.value.wc_status == 12


def test_an_owner_that_never_connected(fake: Fake, arena: Arena) -> None:
    with (
        Device() as device,
        MemoryRegistration(device, arena) as registration,
        QueuePair(device) as owner,
        QueuePair(device) as reader,
    ):
        reader.connect(owner.local)
        with Channel.verbs(reader, registration.region) as channel, pytest.raises(CompletionError) as caught:
            channel.read(0, 16)
        assert caught.value.wc_status == 12


@pytest.mark.parametrize("nth", [1, 5, 64])
def test_reads_that_never_complete(fake: Fake, ends: Ends, arena: Arena, nth: int) -> None:
    channel = ends.channel(slot_bytes=PIECE)
    fake.complete(nth, "never")
    with pytest.raises(DeadlineError, match="verbs channel: a READ did not complete within 5 ms"):
        channel.read(0, len(arena), timeout_s=0.005)
    fake.reset()
    channel.close()  # stops them before their landing memory goes
    assert fake.calls("modify_qp.ERR") == 1
    assert fake.calls("poll_cq") <= 2 * N_PIECES
    fake.heal()
    assert_reads_work()


def test_late_reads_overtake_those_of_other_queue_pairs(fake: Fake, arena: Arena) -> None:
    """Three queue pairs in turns, each with another delay: everyone gets its own bytes."""
    expected = bytes(arena.view())
    offsets = np.random.default_rng(2).integers(0, len(arena) - 64, 50).astype(np.uint64)
    fake.set(LATE=7)
    with (
        Device() as device,
        connected(arena, device) as a,
        connected(arena, device) as b,
        connected(arena, device) as c,
    ):
        channels = [both.channel(slot_bytes=64) for both in (a, b, c)]
        for _ in range(5):
            for i, channel in enumerate(channels):
                assert channel.read(64 * i, 640) == expected[64 * i : 64 * i + 640]
        for channel in channels:
            channel.read_loop(offsets, 64, depth=32)
        assert {channel.info.reads for channel in channels} == {5 * 10 + 50}


@pytest.mark.parametrize("depth", [1, 2, 63, 64, 65, 128])
def test_a_queue_pair_is_used_for_long(fake: Fake, arena: Arena, depth: int) -> None:
    """Round and round the send queue: it never overflows, nor does the completion queue, and one chain is one doorbell."""
    expected = bytes(arena.view())
    with Device() as device, connected(arena, device, QueuePairOptions(send_depth=depth)) as ends:
        channel = ends.channel(slots=128, slot_bytes=PIECE)
        for _ in range(20):
            assert channel.read(0, len(arena)) == expected
        at_once = min(depth, N_PIECES)
        assert channel.info.doorbells <= 20 * 2 * -(-N_PIECES // at_once)
        assert fake.calls("post_send") == 20 * N_PIECES
