"""Each call into libibverbs fails once: the error is typed and names the call, nothing is left behind, and the next try works."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from cotra_rdma import (
    Arena,
    CotraError,
    DeviceNotFoundError,
    InvalidInputError,
    MemlockError,
    MemoryRegion,
    TransportError,
    VerbsUnavailableError,
)
from cotra_rdma._native.channel import Channel
from cotra_rdma._native.verbs import Device, MemoryRegistration, QueuePair, QueuePairOptions, devices
from helpers.fakeverbs import Ends, Fake, assert_reads_work, connected


@pytest.fixture
def arena() -> Arena:
    return Arena.create(8192)


@dataclass(frozen=True, slots=True)
class Case:
    """A call that fails with `error`, and the exception that comes of it; `says` is in the message beside the call."""

    call: str
    error: int
    kind: type[CotraError]
    says: str = "fake0"
    nth: int | None = None


def list_devices(_arena: Arena) -> None:
    devices()


def open_first(_arena: Arena) -> None:
    Device().close()


def open_by_name(_arena: Arena) -> None:
    Device("fake0").close()


def query_port(_arena: Arena) -> None:
    with Device("fake0") as device:
        device.port()


def query_gids(_arena: Arena) -> None:
    with Device("fake0") as device:
        device.gids()


def register(arena: Arena) -> None:
    with Device() as device, MemoryRegistration(device, arena):
        pass


def open_queue_pair(_arena: Arena) -> None:
    with Device() as device, QueuePair(device):
        pass


def use(work: Callable[[Ends], object]) -> Callable[[Arena], None]:
    def run(arena: Arena) -> None:
        with Device() as device, connected(arena, device) as ends:
            work(ends)

    return run


connect = use(lambda ends: None)
open_channel = use(lambda ends: ends.channel())
read = use(lambda ends: ends.channel(slot_bytes=1024).read(0, 8192))

Run = Callable[[Arena], None]
CASES: list[tuple[Run, Case]] = [
    *(
        (run, Case("get_device_list", errno.ENOSYS, VerbsUnavailableError, "modprobe"))
        for run in (list_devices, open_first)
    ),
    *(
        (run, Case("open_device", errno.EACCES, DeviceNotFoundError))
        for run in (list_devices, open_first, open_by_name)
    ),
    *((run, Case("query_device", errno.EIO, DeviceNotFoundError)) for run in (list_devices, open_first, open_by_name)),
    (query_port, Case("query_port", errno.EIO, DeviceNotFoundError)),
    (query_gids, Case("query_port", errno.EIO, DeviceNotFoundError)),
    (query_gids, Case("query_gid", errno.EIO, DeviceNotFoundError)),
    (open_queue_pair, Case("query_gid", errno.EIO, DeviceNotFoundError)),
    (open_first, Case("alloc_pd", errno.ENOMEM, CotraError)),
    *(
        (register, Case("reg_mr", error, MemlockError, "ulimit -l 8"))
        for error in (errno.ENOMEM, errno.EPERM, errno.EAGAIN)
    ),
    (register, Case("reg_mr", errno.EFAULT, CotraError, "8192 bytes")),
    (open_queue_pair, Case("create_cq", errno.ENOMEM, CotraError)),
    (open_queue_pair, Case("create_qp", errno.ENOMEM, CotraError)),
    (open_queue_pair, Case("modify_qp.INIT", errno.EINVAL, CotraError)),
    (connect, Case("modify_qp.RTR", errno.ENETUNREACH, CotraError, "RoCEv2, IPv4")),
    (connect, Case("modify_qp.RTR", errno.ETIMEDOUT, CotraError, "peer's GID", nth=2)),
    (connect, Case("modify_qp.RTS", errno.EINVAL, CotraError)),
    (connect, Case("modify_qp.RTS", errno.EINVAL, CotraError, nth=2)),
    (open_channel, Case("reg_mr", errno.ENOMEM, MemlockError, "RLIMIT_MEMLOCK", nth=2)),
    *((read, Case("post_send", errno.ENOMEM, TransportError, "8 READs on fake0", nth=nth)) for nth in (None, 1, 5, 8)),
    (read, Case("poll_cq", errno.EIO, TransportError, f"returned {-errno.EIO}")),
]


@pytest.mark.parametrize(
    ("run", "case"), CASES, ids=[f"{case.call}-{case.error}-{i}" for i, (_, case) in enumerate(CASES)]
)
def test_a_call_that_fails(fake: Fake, arena: Arena, run: Run, case: Case) -> None:
    fake.fail(case.call, case.error, nth=case.nth)
    with pytest.raises(case.kind) as caught:
        run(arena)
    call, _, state = case.call.partition(".")
    assert type(caught.value) is case.kind
    assert f"ibv_{call}" in str(caught.value)
    assert state in str(caught.value)
    assert case.says in str(caught.value)
    assert caught.value.sys_errno == (0 if case.call == "poll_cq" else case.error)
    fake.heal()
    assert fake.live_objects() == ""
    assert_reads_work()


def test_a_list_that_fails_without_an_errno(fake: Fake) -> None:
    fake.fail("get_device_list", 0)
    with pytest.raises(VerbsUnavailableError) as caught:
        devices()
    assert caught.value.sys_errno == errno.ENOSYS


def test_ports_that_are_not_there(fake: Fake) -> None:
    with Device() as device:
        for number in (0, 2, 2**32 - 1):
            with pytest.raises(DeviceNotFoundError, match=f"fake0 has no port {number}: it has 1"):
                device.port(number)


def test_a_registration_that_cannot_be_undone(fake: Fake, arena: Arena) -> None:
    fake.fail("dereg_mr", errno.EINVAL)
    with Device() as device:
        registration = MemoryRegistration(device, arena)
        with pytest.raises(CotraError, match="ibv_dereg_mr on fake0"):
            registration.close()
        registration.close()
    assert fake.live_objects() != ""
    fake.heal()
    fake.forget()
    assert_reads_work()


@pytest.mark.parametrize("call", ["destroy_qp", "destroy_cq", "dealloc_pd", "close_device"])
def test_what_cannot_be_destroyed_is_left_alone(fake: Fake, arena: Arena, call: str) -> None:
    fake.fail(call, errno.EBUSY)
    with Device() as device, connected(arena, device) as ends:
        assert ends.channel().read(0, 100) == bytes(100)
    assert fake.calls(call) > 0
    fake.heal()
    fake.forget()
    assert_reads_work()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"DEVICES": ""}, "devices: none"),
        ({"PORT_STATE": 1}, "devices: fake0"),
        ({"DEVICES": "fake0,fake1", "PORT_STATE": 2}, "devices: fake0, fake1"),
    ],
)
def test_no_device_or_no_active_port(fake: Fake, settings: dict[str, object], says: str) -> None:
    fake.set(**settings)
    with pytest.raises(DeviceNotFoundError, match="no verbs device has an active port") as caught:
        Device()
    assert says in str(caught.value)
    assert "rdma link add" in str(caught.value)


def test_a_device_by_name_is_never_another(fake: Fake) -> None:
    fake.set(DEVICES="fake0,fake1")
    with pytest.raises(DeviceNotFoundError, match="named mlx5_0; there are: fake0, fake1"):
        Device("mlx5_0")
    fake.set(DEVICES="")
    with pytest.raises(DeviceNotFoundError, match="named mlx5_0; there are: none"):
        Device("mlx5_0")


def test_a_port_that_goes_down_after_the_device_was_opened(fake: Fake) -> None:
    with Device() as device:
        fake.set(PORT_STATE=1)
        with pytest.raises(DeviceNotFoundError, match="fake0 has no active port"):
            QueuePair(device)
        fake.set(PORT_STATE=4)
        assert_reads_work(device)


@pytest.mark.parametrize("gids", ["", "::", "::,::"])
def test_an_empty_gid_table(fake: Fake, gids: str) -> None:
    fake.set(GIDS=gids)
    with Device() as device:
        assert device.gids() == []
        with pytest.raises(
            DeviceNotFoundError, match="port 1 of fake0 has no GID: give its network interface an address"
        ):
            QueuePair(device)


def test_a_gid_index_that_is_not_there(fake: Fake) -> None:
    with Device() as device, pytest.raises(DeviceNotFoundError, match="no GID index 7"):
        QueuePair(device, QueuePairOptions(gid_index=7))


@pytest.mark.parametrize(
    "options",
    [
        {"send_depth": 16385},
        {"timeout_exponent": 32},
        {"retry_count": 8},
        {"traffic_class": 256},
        {"service_level": 16},
        {"hop_limit": 256},
    ],
)
def test_options_out_of_range(fake: Fake, options: dict[str, int]) -> None:
    with Device() as device, pytest.raises(InvalidInputError, match=next(iter(options))):
        QueuePair(device, QueuePairOptions(**options))


def test_more_memory_than_the_device_registers(fake: Fake, arena: Arena) -> None:
    fake.set(MAX_MR_BYTES=4096)
    with (
        Device() as device,
        pytest.raises(InvalidInputError, match="fake0 registers 1 to 4096 bytes at once, not 8192"),
    ):
        MemoryRegistration(device, arena)


def test_the_peers_attributes_are_checked(fake: Fake) -> None:
    with Device() as device:
        good = QueuePair(device)
        for change in ({"mtu_bytes": 0}, {"qp_number": 1 << 24}, {"packet_sequence": 1 << 24}, {"max_rd_atomic": 0}):
            with QueuePair(device) as queue_pair:
                with pytest.raises(InvalidInputError, match="make no sense"):
                    queue_pair.connect(replace(good.local, **change))
                with pytest.raises(InvalidInputError, match="not connected"):
                    Channel.verbs(queue_pair, MemoryRegion(0, 0, 0))
                queue_pair.connect(good.local)
                with pytest.raises(InvalidInputError, match="connected already"):
                    queue_pair.connect(good.local)
        for change in ({"gid": bytes(4)}, {"qp_number": 1 << 32}, {"mtu_bytes": -1}):
            with QueuePair(device) as queue_pair, pytest.raises(InvalidInputError):
                queue_pair.connect(replace(good.local, **change))
        good.close()
