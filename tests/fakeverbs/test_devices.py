"""What is negotiated and chosen: devices and ports, the GID, the path MTU, READs at once; and what registrations allow."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from cotra_rdma import Arena
from cotra_rdma._bench.environment import Environment
from cotra_rdma._native.channel import Channel
from cotra_rdma._native.library import Handle
from cotra_rdma._native.verbs import (
    Device,
    DeviceInfo,
    MemoryRegistration,
    PortInfo,
    QueuePair,
    QueuePairOptions,
    devices,
    library,
)
from helpers.fakeverbs import Fake, assert_reads_work, connected

REMOTE_READ, LOCAL_WRITE = 1 << 2, 1 << 0  # enum ibv_access_flags
MTUS = {1: 256, 2: 512, 3: 1024, 4: 2048, 5: 4096}  # enum ibv_mtu


def make_types(fake: Fake, root: Path, types: list[str]) -> None:
    """GID types as sysfs has them, for fake0."""
    directory = root / "fake0/ports/1/gid_attrs/types"
    directory.mkdir(parents=True)
    for index, text in enumerate(types):
        (directory / str(index)).write_text(text + "\n")
    fake.set(SYSFS=root)


def test_the_library_that_was_loaded(fake: Fake) -> None:
    assert library().endswith("/libibverbs.so.1")
    assert "cotra-fakeverbs" in library()


def test_a_benchmark_tells_of_every_device(fake: Fake) -> None:
    fake.set(DEVICES="fake0,fake1", PORT_STATE_fake1=1)
    told = Environment.now(["cotra", "bench"])
    assert told.verbs == "fake0, fake1"
    assert [(adapter.name, adapter.firmware) for adapter in told.adapters] == [("fake0", "1.2.3"), ("fake1", "1.2.3")]
    first, second = (adapter.ports[0] for adapter in told.adapters)
    assert first.startswith("port 1: active, ")
    assert second.startswith("port 1: down, ")
    assert first.endswith(", rate unknown")
    assert "fake0 (firmware 1.2.3), port 1: active" in told.facts()["verbs"]


def test_device_attributes(fake: Fake) -> None:
    fake.set(DEVICES="fake0,fake1", MAX_RD_ATOMIC=8, MAX_INIT_RD_ATOMIC_fake1=4)
    first, second = devices()
    assert first == DeviceInfo(
        name="fake0",
        firmware="1.2.3",
        node_guid=0x0102030405060708,
        max_mr_bytes=2**63 - 1,
        vendor_id=0xFACE,
        vendor_part_id=1,
        max_qp_wr=16384,
        max_cqe=65535,
        max_rd_atomic=8,
        max_init_rd_atomic=16,
        n_ports=1,
    )
    assert (second.name, second.max_rd_atomic, second.max_init_rd_atomic) == ("fake1", 8, 4)
    fake.set(DEVICES="")
    assert devices() == []


@pytest.mark.parametrize("compat", [0, 1])
def test_port_attributes(fake: Fake, compat: int) -> None:
    fake.set(COMPAT=compat, MTU=3, PORT_STATE=2)
    with Device("fake0") as device:
        assert device.port() == PortInfo(1, 2, "Ethernet", 1024, 0, 2)
        fake.set(LINK_LAYER=1, LID=0xBEEF, PORT_STATE=4)
        assert device.port(1) == PortInfo(1, 4, "InfiniBand", 1024, 0xBEEF, 2)


def test_the_first_device_with_an_active_port(fake: Fake) -> None:
    fake.set(DEVICES="fake0,fake1,fake2", PORT_STATE_fake0=1)
    with Device() as device:
        assert device.info.name == "fake1"
        assert_reads_work(device)
    with Device("fake2") as device:
        assert device.info.name == "fake2"


def test_both_ends_on_devices_of_their_own(fake: Fake) -> None:
    fake.set(DEVICES="fake0,fake1", GIDS_fake0="::ffff:10.0.0.1", GIDS_fake1="::,::ffff:10.0.0.2")
    with (
        Device("fake0") as one,
        Device("fake1") as two,
        Arena.create(4096) as arena,
        MemoryRegistration(one, arena) as registration,
        QueuePair(one) as owner,
        QueuePair(two) as reader,
    ):
        owner.connect(reader.local)
        reader.connect(owner.local)
        assert [fake.attribute(side, "sgid_index") for side in (owner, reader)] == [0, 1]
        with Channel.verbs(reader, registration.region) as channel:
            assert channel.read(0, 4096) == bytes(4096)


# ---- GIDs ----

TABLE = [
    "fe80::1",
    "fe80::1",
    "::ffff:169.254.3.4",
    "::ffff:10.1.0.5",
    "::ffff:10.1.0.5",
    "::",
    "::ffff:192.168.7.2",
    "2001:db8:1::5",
    "2001:db8:2::5",
]
TYPES = ["IB/RoCE v1", "RoCE v2", "RoCE v2", "IB/RoCE v1", "RoCE v2", "", "RoCE v2", "RoCE v2", "RoCE v2"]


@pytest.fixture
def table(fake: Fake, tmp_path: Path) -> Fake:
    fake.set(GIDS=",".join(TABLE))
    make_types(fake, tmp_path, TYPES)
    return fake


@pytest.mark.parametrize(
    ("peer", "ranking"),
    [
        # no peer known: routable IPv4 first, RoCEv1 after all of v2
        (None, [4, 6, 7, 8, 2, 1, 3, 0]),
        # same subnet, then the peer's family, then what is not link-local
        ("10.1.0.9", [4, 6, 2, 7, 8, 1, 3, 0]),
        ("192.168.7.9", [6, 4, 2, 7, 8, 1, 3, 0]),
        ("2001:db8:2::9", [8, 7, 1, 4, 6, 2, 0, 3]),
        ("2001:db8:1::9", [7, 8, 1, 4, 6, 2, 0, 3]),
        # a link-local peer is reached from link-local addresses only
        ("169.254.9.9", [2, 6, 4, 1, 7, 8, 3, 0]),
        ("fe80::9", [1, 7, 8, 2, 4, 6, 0, 3]),
        ("fe80::9%eth0", [1, 7, 8, 2, 4, 6, 0, 3]),
    ],
)
def test_the_ranking(table: Fake, peer: str | None, ranking: list[int]) -> None:
    with Device() as device:
        gids = device.gids(peer=peer)
        assert [gid.index for gid in gids] == ranking
        assert [gid.score for gid in gids] == sorted((gid.score for gid in gids), reverse=True)
        with QueuePair(device, QueuePairOptions(peer_address=peer)) as queue_pair:
            assert queue_pair.gid == gids[0]
            assert queue_pair.local.gid == gids[0].gid


def test_gids_in_words(table: Fake) -> None:
    with Device() as device:
        gids = {gid.index: gid for gid in device.gids(peer="10.1.0.9")}
    assert {index: gid.type for index, gid in gids.items()} == {
        index: {"RoCE v2": "RoCEv2", "IB/RoCE v1": "RoCEv1"}[text] for index, text in enumerate(TYPES) if text
    }
    assert gids[4].address == "10.1.0.5"
    assert gids[4].why == "RoCEv2, IPv4, same subnet as the peer"
    assert gids[3].why == "RoCEv1, IPv4, same subnet as the peer"
    assert gids[6].why == "RoCEv2, IPv4"
    assert gids[2].why == "RoCEv2, IPv4, link-local"
    assert gids[7].address == "2001:db8:1::5"
    assert gids[7].why == "RoCEv2, IPv6"
    assert 5 not in gids


def test_a_gid_by_index(table: Fake) -> None:
    with Device() as device, Arena.create(4096) as arena:
        options = QueuePairOptions(gid_index=0, peer_address="10.1.0.9")
        with connected(arena, device, options) as ends:
            assert ends.reader.gid.type == "RoCEv1"
            assert table.attribute(ends.reader, "sgid_index") == 0
            assert ends.channel().read(0, 16) == bytes(16)


def test_without_types_in_sysfs_all_are_rocev2(fake: Fake, tmp_path: Path) -> None:
    fake.set(SYSFS=tmp_path)
    with Device() as device:
        assert [(gid.address, gid.type) for gid in device.gids()] == [("127.0.0.1", "RoCEv2"), ("fe80::1", "RoCEv2")]


def test_infiniband_gids_and_paths(fake: Fake) -> None:
    fake.set(LINK_LAYER=1, GIDS="fe80::2:c903:1")
    with Device() as device, Arena.create(4096) as arena, connected(arena, device) as ends:
        assert [gid.type for gid in device.gids()] == ["InfiniBand"]
        assert fake.attribute(ends.reader, "is_global") == 0
        assert fake.attribute(ends.reader, "dlid") == ends.owner.local.lid == 7
        assert ends.channel().read(0, 16) == bytes(16)


# ---- what both sides agree on ----


@pytest.mark.parametrize(("owner_mtu", "reader_mtu"), list(itertools.product(MTUS, MTUS)))
def test_the_smaller_mtu(fake: Fake, owner_mtu: int, reader_mtu: int) -> None:
    fake.set(DEVICES="fake0,fake1", MTU_fake0=owner_mtu, MTU_fake1=reader_mtu)
    with Device("fake0") as one, Device("fake1") as two, QueuePair(one) as owner, QueuePair(two) as reader:
        assert (owner.local.mtu_bytes, reader.local.mtu_bytes) == (MTUS[owner_mtu], MTUS[reader_mtu])
        owner.connect(reader.local)
        reader.connect(owner.local)
        for side in (owner, reader):
            assert fake.attribute(side, "path_mtu") == min(owner_mtu, reader_mtu)


@pytest.mark.parametrize(
    ("serves", "starts", "cap", "agreed"),
    [
        (16, 16, 0, 16),
        (1, 16, 0, 1),
        (16, 4, 0, 4),
        (16, 16, 3, 3),
        (2, 16, 8, 2),
        (255, 255, 0, 255),
        (300, 999, 0, 255),
    ],
)
def test_reads_at_once(fake: Fake, serves: int, starts: int, cap: int, agreed: int) -> None:
    """No more than the owner's device serves, the reader's device starts, and the reader asked for; a byte at most."""
    fake.set(DEVICES="fake0,fake1", MAX_RD_ATOMIC_fake0=serves, MAX_INIT_RD_ATOMIC_fake1=starts)
    with (
        Device("fake0") as one,
        Device("fake1") as two,
        Arena.create(1 << 16) as arena,
        MemoryRegistration(one, arena) as registration,
        QueuePair(one) as owner,
        QueuePair(two, QueuePairOptions(max_rd_atomic=cap)) as reader,
    ):
        owner.connect(reader.local)
        reader.connect(owner.local)
        assert fake.attribute(reader, "max_rd_atomic") == agreed
        assert fake.attribute(owner, "max_dest_rd_atomic") >= agreed
        with Channel.verbs(reader, registration.region, slot_bytes=256) as channel:
            assert channel.read(0, 1 << 16) == bytes(1 << 16)


def test_options_reach_the_queue_pair(fake: Fake) -> None:
    options = QueuePairOptions(
        timeout_exponent=9, retry_count=3, traffic_class=106, service_level=5, hop_limit=2, gid_index=0
    )
    names = {
        "timeout_exponent": "timeout",
        "retry_count": "retry_cnt",
        "service_level": "sl",
        "gid_index": "sgid_index",
    }
    with Device() as device, Arena.create(4096) as arena, connected(arena, device, options) as ends:
        for name in ("timeout_exponent", "retry_count", "traffic_class", "service_level", "hop_limit", "gid_index"):
            assert fake.attribute(ends.reader, names.get(name, name)) == getattr(options, name)


def test_defaults_of_a_queue_pair(fake: Fake) -> None:
    with Device() as device, Arena.create(4096) as arena, connected(arena, device) as ends:
        defaults = {"timeout": 14, "retry_cnt": 6, "hop_limit": 64, "traffic_class": 0, "sl": 0}
        for name, value in defaults.items():
            assert fake.attribute(ends.reader, name) == value
        assert ends.channel().info.slots == 128


# ---- registrations ----


def test_registrations_allow_remote_reads_and_nothing_else(fake: Fake) -> None:
    with Device() as device, Arena.create(10_000) as arena, connected(arena, device) as ends:
        region = ends.registration.region
        assert (region.addr, region.len) == (arena.info.addr, 10_000)
        assert fake.access(region.rkey) == REMOTE_READ
        assert fake.attribute(ends.owner, "access") == fake.attribute(ends.reader, "access") == REMOTE_READ


def test_landing_memory_is_not_open_to_peers(fake: Fake) -> None:
    with Device() as device, Arena.create(4096) as arena, connected(arena, device) as ends:
        ends.channel()
        seen = {fake.access(0x800000 + (key << 8)) for key in range(1, 5000)} - {-1}
        assert seen == {REMOTE_READ, LOCAL_WRITE}


# ---- the order of closing ----


@pytest.mark.parametrize("drop", [False, True], ids=["closed", "dropped"])
def test_any_order_of_closing(fake: Fake, drop: bool) -> None:
    """Device, registration, two queue pairs, channel: closed, or only let go of, in each of the 120 orders."""
    arena = Arena.create(4096)
    for order in itertools.permutations(range(5)):
        device = Device()
        registration = MemoryRegistration(device, arena)
        owner, reader = QueuePair(device), QueuePair(device)
        owner.connect(reader.local)
        reader.connect(owner.local)
        channel = Channel.verbs(reader, registration.region)
        assert channel.read(0, 16) == bytes(16)
        parts: list[Handle | None] = [device, registration, owner, reader, channel]
        del device, registration, owner, reader, channel
        for i in order:
            part, parts[i] = parts[i], None
            assert part is not None
            if not drop:
                part.close()
            del part
        assert fake.live_objects() == "", order


def test_dropped_in_a_cycle(fake: Fake) -> None:
    """The collector may finalize a cycle's parts in any order."""
    arena = Arena.create(4096)
    for turn in range(5):
        device = Device()
        registration, owner, reader = MemoryRegistration(device, arena), QueuePair(device), QueuePair(device)
        owner.connect(reader.local)
        reader.connect(owner.local)
        cycle: list[object] = [device, registration, owner, reader, Channel.verbs(reader, registration.region)]
        cycle = cycle[turn:] + cycle[:turn]
        for part in cycle:
            vars(part)["me"] = cycle
        del device, registration, owner, reader, cycle, part
        assert fake.live_objects() == ""
