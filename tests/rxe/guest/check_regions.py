"""Regions and queue pairs: an independent peer both ways, every wrong READ, and perftest beside our own loop."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from independent import PyverbsQueuePair
from owners import PyverbsOwner, ask, connected, figure
from pyverbs.device import Context
from pyverbs.pd import PD

from cotra_rdma import Arena, CompletionError, MemoryRegion
from cotra_rdma._native.channel import Channel
from cotra_rdma._native.verbs import Device, MemoryRegistration, QueuePair, QueuePairOptions
from cotra_rdma._owner.child_process import OwnerProcess
from helpers.contract import ChannelContract, OpenChannel, pattern  # noqa: F401 (a fixture)

REMOTE_ACCESS_ERROR = 10  # IBV_WC_REM_ACCESS_ERR
READ_BYTES = 1024
N_READS, DEPTH, TURNS = 2000, 16, 5


def check_the_exposed_region_is_what_a_read_accepts(
    device: Device, owners: list[OwnerProcess], addresses: list[str], host: str, shards: list[Path]
) -> None:
    image = shards[0].read_bytes()
    told = owners[0].wait_ready()["region"]
    queue_pair, region = connected(device, addresses[0], host)
    assert region == MemoryRegion(**told)
    assert region.len == len(image)
    with queue_pair, Channel.verbs(queue_pair, MemoryRegion(told["addr"], told["rkey"], told["len"])) as channel:
        assert channel.read(0, len(image)) == image
    figure(f"exposed region: addr {region.addr:#x}, rkey {region.rkey:#x}, {region.len:,} bytes")


def check_a_pyverbs_queue_pair_reads_our_region(
    device: Device, addresses: list[str], host: str, device_name: str, shards: list[Path]
) -> None:
    image = shards[0].read_bytes()
    gid_index = device.gids(peer=host)[0].index
    with Context(name=device_name) as context, PD(context) as pd:
        queue_pair = PyverbsQueuePair(context, pd, gid_index)
        remote, region = ask(addresses[0], queue_pair.local)
        queue_pair.connect(remote)
        for offset, length in ((0, 4096), (12345, 1000), (len(image) - 77, 77)):
            status, data = queue_pair.read(region.addr + offset, region.rkey, length)
            assert status == 0
            assert data == image[offset : offset + length]
        assert queue_pair.read(region.addr + region.len, region.rkey, 8)[0] == REMOTE_ACCESS_ERROR
        queue_pair.close()


def check_our_transport_reads_a_region_that_pyverbs_registered(
    device: Device, pyverbs_owner: PyverbsOwner, host: str, shards: list[Path]
) -> None:
    image = shards[0].read_bytes()
    with QueuePair(device, QueuePairOptions(peer_address=host)) as queue_pair:
        region = pyverbs_owner.connect(queue_pair)
        assert region.len == len(image)
        with Channel.verbs(queue_pair, region) as channel:
            assert channel.read(0, len(image)) == image


def refused(channel: Channel, offset: int) -> CompletionError:
    with pytest.raises(CompletionError) as caught:
        channel.read(offset, READ_BYTES)
    error = caught.value
    assert error.wc_status == REMOTE_ACCESS_ERROR
    assert "remote access error" in str(error).lower()
    return error


def check_every_wrong_read_is_a_typed_error_and_life_goes_on(
    device: Device, addresses: list[str], host: str, pyverbs_owner: PyverbsOwner
) -> None:
    queue_pair, region = connected(device, addresses[0], host)
    longer = MemoryRegion(region.addr, region.rkey, region.len + READ_BYTES)
    with queue_pair, Channel.verbs(queue_pair, longer) as channel:
        figure(f"past the end: {refused(channel, region.len - 1)}")
    queue_pair, region = connected(device, addresses[0], host)
    with (
        queue_pair,
        Channel.verbs(queue_pair, MemoryRegion(region.addr, region.rkey ^ 0x5A5A00, region.len)) as channel,
    ):
        figure(f"wrong rkey: {refused(channel, 0)}")
    with QueuePair(device, QueuePairOptions(peer_address=host)) as queue_pair:
        region = pyverbs_owner.connect(queue_pair)
        with Channel.verbs(queue_pair, region) as channel:
            assert len(channel.read(0, READ_BYTES)) == READ_BYTES
            pyverbs_owner.tell({"do": "deregister"})
            figure(f"deregistered: {refused(channel, 0)}")
    queue_pair, region = connected(device, addresses[0], host)
    with queue_pair, Channel.verbs(queue_pair, region) as channel:
        assert len(channel.read(0, READ_BYTES)) == READ_BYTES


def perftest(program: str, host: str, device_name: str, gid_index: int, *options: str) -> str:
    """Server and client of one perftest program on the device; what the client printed. Always under a time limit.

    It measures the CPU's clock first, and gives up where a busy host makes that impossible; so it is tried again.
    """
    command = ["timeout", "60", program, "-d", device_name, "-x", str(gid_index), "-s", str(READ_BYTES), *options]
    said = ""
    for _ in range(5):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
            try:
                for _ in range(50):
                    client = subprocess.run([*command, host], capture_output=True, text=True, check=False)
                    said = client.stdout + client.stderr
                    if client.returncode == 0:
                        server.wait(20)  # what is measured next has the machine to itself
                        return client.stdout
                    if "Couldn't connect" not in said or server.poll() is not None:
                        break
            finally:
                server.kill()
        if "Can't produce a report" not in said:
            break
    pytest.fail(f"{program}: {said}")


def row(text: str) -> list[float]:
    """The line of figures of perftest's output."""
    (line,) = re.findall(rf"^\s*{READ_BYTES}\s+\d+\s+[\d.\s]+$", text, re.MULTILINE)
    return [float(word) for word in line.split()]


def check_perftest_and_our_loop_side_by_side(device: Device, addresses: list[str], host: str, device_name: str) -> None:
    """perftest READs one place again and again, so ours does too; what places all over the region cost is shown beside it.

    The systems take turns, so that a busy host slows all of them; a ratio is the median of the turns' own.
    """
    gid = device.gids(peer=host)[0].index
    queue_pair, region = connected(device, addresses[0], host)
    one = np.zeros(N_READS, np.uint64)
    spread = np.random.default_rng(5).integers(0, region.len - READ_BYTES, N_READS).astype(np.uint64)
    turns: dict[str, list[float]] = {}

    def took(name: str, value: float) -> None:
        turns.setdefault(name, []).append(value)

    with queue_pair, Channel.verbs(queue_pair, region) as channel:
        for _ in range(TURNS):
            for name, offsets in (("one", one), ("spread", spread)):
                took(f"{name} us", float(np.median(channel.read_loop(offsets, READ_BYTES)[1])) / 1e3)
            # columns of ib_read_lat: bytes, iterations, t_min, t_max, t_typical (the median), ...
            took("perftest us", row(perftest("ib_read_lat", host, device_name, gid, "-n", str(N_READS)))[4])
            for name, offsets in (("one", one), ("spread", spread)):
                took(f"{name} a second", N_READS / channel.read_loop(offsets, READ_BYTES, depth=DEPTH)[0])
            bandwidth = perftest("ib_read_bw", host, device_name, gid, "-n", str(N_READS), "-t", str(DEPTH))
            took("perftest a second", row(bandwidth)[-1] * 1e6)

    def beside(unit: str, digits: int, what: str, program: str) -> str:
        ours, theirs, spread = (np.array(turns[f"{name} {unit}"]) for name in ("one", "perftest", "spread"))
        middle = [f"{np.median(values):,.{digits}f}" for values in (theirs, ours, spread)]
        ratios = " ".join(f"{ratio:.2f}" for ratio in np.sort(ours / theirs))
        return (
            f"{what}, medians of {TURNS} turns: {program} {middle[0]} {unit}, ours {middle[1]} {unit} "
            f"(ratio {np.median(ours / theirs):.2f} of {ratios}); at places all over the region {middle[2]} {unit}"
        )

    figure(beside("us", 1, "1 KiB READ, one at a time", "ib_read_lat"))
    figure(beside("a second", 0, f"1 KiB READs, {DEPTH} deep", "ib_read_bw"))
    assert all(min(values) > 0 for values in turns.values())


class TestContract(ChannelContract):
    """The channel contract over verbs, with the region registered by this process."""

    @pytest.fixture
    def open_channel(self, device: Device, host: str) -> Iterator[OpenChannel]:
        with ExitStack() as stack:

            def opened(arena: Arena) -> Channel:
                registered = stack.enter_context(MemoryRegistration(device, arena))
                options = QueuePairOptions(peer_address=host)
                owner, reader = (stack.enter_context(QueuePair(device, options)) for _ in range(2))
                owner.connect(reader.local)
                reader.connect(owner.local)
                return stack.enter_context(Channel.verbs(reader, registered.region))

            yield opened
