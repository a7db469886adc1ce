"""The verbs objects for Python: devices, memory registrations and queue pairs.

`register` registers memory with a pyverbs PD that the caller owns.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from cotra_rdma._core.memory_region import MemoryRegion
from cotra_rdma._native.arena import Arena
from cotra_rdma._native.library import Handle, check, ffi, lib, new_error
from cotra_rdma.errors import InvalidInputError, VerbsUnavailableError

_MAX_DEVICES, _MAX_GIDS = 64, 256
_GID_TYPES = ("InfiniBand", "RoCEv1", "RoCEv2")


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """The attributes of a verbs device (ibv_query_device(3)).

    `max_rd_atomic` is the most READs that a queue pair may be the target of at once.
    `max_init_rd_atomic` is the most READs that a queue pair may have in progress itself.
    """

    name: str
    firmware: str
    node_guid: int
    max_mr_bytes: int
    vendor_id: int
    vendor_part_id: int
    max_qp_wr: int
    max_cqe: int
    max_rd_atomic: int
    max_init_rd_atomic: int
    n_ports: int

    @classmethod
    def from_c(cls, raw: Any) -> Self:
        """Converts a `cotra_device_info`."""
        texts = {"name": ffi.string(raw.name).decode(), "firmware": ffi.string(raw.firmware).decode()}
        return cls(**texts, **{name: getattr(raw, name) for name in cls.__slots__ if name not in texts})


@dataclass(frozen=True, slots=True)
class PortInfo:
    """The attributes of a port (ibv_query_port(3)).

    A `state` of 4 means active.
    `link_layer` is "InfiniBand" or "Ethernet".
    """

    port: int
    state: int
    link_layer: str
    active_mtu_bytes: int
    lid: int
    gid_count: int


@dataclass(frozen=True, slots=True)
class GidInfo:
    """An entry of a port's GID table.

    `type` is "RoCEv2", "RoCEv1" or "InfiniBand".
    `score` ranks the entry, and `why` explains the rank in words.
    """

    gid: bytes
    index: int
    type: str
    score: int
    why: str

    @classmethod
    def from_c(cls, raw: Any) -> Self:
        """Converts a `cotra_gid_info`."""
        return cls(bytes(raw.gid), raw.index, _GID_TYPES[raw.type], raw.score, ffi.string(raw.why).decode())

    @property
    def address(self) -> str:
        """The GID as an IP address. It is an IPv4 address if the GID maps one."""
        address = ipaddress.IPv6Address(self.gid)
        return str(address.ipv4_mapped or address)


@dataclass(frozen=True, slots=True)
class QueuePairAttributes:
    """What the two sides of a connection tell each other; see `cotra_qp_attributes` in cotra.h."""

    gid: bytes
    qp_number: int
    packet_sequence: int
    lid: int
    mtu_bytes: int
    max_rd_atomic: int
    max_init_rd_atomic: int


@dataclass(frozen=True, slots=True)
class QueuePairOptions:
    """Options of a queue pair. 0, None or -1 means the default.

    Attributes:
        peer_address: the IP address of the other side. The GID is chosen for it.
        gid_index: an index into the GID table; -1 for the best by rank.
        port: 0 for the first active one.
        send_depth: READs in the send queue; 128 by default.
        max_rd_atomic: the most READs in progress; by default what both devices allow.
        timeout_exponent: n, for an ACK time-out of 4.096 us x 2^n; 14 by default, which is 67 ms.
        retry_count: retries, 6 by default; on Soft-RoCE, 7 means for ever.
            A dead target is noticed after about (retry_count + 1) time-outs, which is 0.5 s.
            NICs round this time up.
        traffic_class: of the packets.
        service_level: of the packets.
        hop_limit: of the packets; 64 by default.
    """

    peer_address: str | None = None
    gid_index: int = -1
    port: int = 0
    send_depth: int = 0
    max_rd_atomic: int = 0
    timeout_exponent: int = 0
    retry_count: int = 0
    traffic_class: int = 0
    service_level: int = 0
    hop_limit: int = 0


def address_bytes(address: str | None) -> bytes:
    """Returns an IP address as 16 bytes, with IPv4 mapped into IPv6. None gives zeros."""
    if address is None:
        return bytes(16)
    parsed = ipaddress.ip_address(address.partition("%")[0])
    return parsed.packed if parsed.version == 6 else bytes(10) + b"\xff\xff" + parsed.packed


def compiled() -> bool:
    """Whether the package was built with the verbs transport."""
    return bool(lib.cotra_verbs_compiled())


def library() -> str:
    """Returns the path of the libibverbs that was loaded.

    Raises:
        VerbsUnavailableError: there is none. The message gives the reason.
    """
    text, err = ffi.new("char[256]"), new_error()
    check(lib.cotra_verbs_probe(text, 256, err), err)
    return str(ffi.string(text).decode())


def devices() -> list[DeviceInfo]:
    """Lists the verbs devices of this machine.

    Raises:
        VerbsUnavailableError: the library or the kernel offers no verbs at all.
    """
    raw, count, err = ffi.new("cotra_device_info[]", _MAX_DEVICES), ffi.new("uint32_t *"), new_error()
    check(lib.cotra_verbs_devices(raw, _MAX_DEVICES, count, err), err)
    return [DeviceInfo.from_c(raw[i]) for i in range(min(count[0], _MAX_DEVICES))]


class Device(Handle):
    """An open device with its protection domain."""

    def __init__(self, name: str | None = None) -> None:
        """Opens a device. It never opens another device than the one that was asked for.

        Args:
            name: the device's name, for example rxe0 or mlx5_0; None for the first one with an active port.

        Raises:
            VerbsUnavailableError: the library or the kernel offers no verbs at all.
            DeviceNotFoundError: there is no such device.
        """
        out, err = ffi.new("cotra_device **"), new_error()
        check(lib.cotra_device_open(ffi.NULL if name is None else name.encode(), out, err), err)
        super().__init__(out[0])

    def _destroy(self, ptr: Any) -> None:
        lib.cotra_device_close(ptr)

    @property
    def info(self) -> DeviceInfo:
        """The device's attributes."""
        raw = ffi.new("cotra_device_info *")
        lib.cotra_device_get_info(self.ptr, raw)
        return DeviceInfo.from_c(raw)

    def port(self, number: int = 1) -> PortInfo:
        """Returns the attributes of a port. Ports count from 1."""
        raw, err = ffi.new("cotra_port_info *"), new_error()
        check(lib.cotra_device_port(self.ptr, number, raw, err), err)
        link = "Ethernet" if raw.link_layer == 2 else "InfiniBand"
        return PortInfo(raw.port, raw.state, link, raw.active_mtu_bytes, raw.lid, raw.gid_count)

    def gids(self, port: int = 1, peer: str | None = None) -> list[GidInfo]:
        """Returns a port's GID table, ranked for the IP address of the other side, best first."""
        raw, count, err = ffi.new("cotra_gid_info[]", _MAX_GIDS), ffi.new("uint32_t *"), new_error()
        address = ffi.new("uint8_t[16]", address_bytes(peer))
        check(lib.cotra_device_gids(self.ptr, port, address, raw, _MAX_GIDS, count, err), err)
        return [GidInfo.from_c(raw[i]) for i in range(count[0])]


class MemoryRegistration(Handle):
    """An arena that is registered with a device, for REMOTE_READ only."""

    def __init__(self, device: Device, arena: Arena) -> None:
        """Registers an arena.

        Raises:
            MemlockError: the memory cannot be pinned. The message says how much is needed.
        """
        out, err, info = ffi.new("cotra_mr **"), new_error(), arena.info
        check(lib.cotra_mr_create(device.ptr, ffi.cast("void *", info.addr), info.len, out, err), err)
        super().__init__(out[0], device, arena)

    def _destroy(self, ptr: Any) -> None:
        err = new_error()
        check(lib.cotra_mr_destroy(ptr, err), err)

    @property
    def region(self) -> MemoryRegion:
        """What a reader needs to READ it."""
        raw = ffi.new("cotra_mr_info *")
        lib.cotra_mr_get_info(self.ptr, raw)
        return MemoryRegion(raw.address, raw.rkey, raw.length_bytes)


class QueuePair(Handle):
    """A reliable-connected queue pair with its own completion queue."""

    def __init__(self, device: Device, options: QueuePairOptions = QueuePairOptions()) -> None:
        """Makes a queue pair, in the state INIT.

        Raises:
            DeviceNotFoundError: there is no active port, or no such GID.
        """
        raw = ffi.new("cotra_qp_options *")
        raw.peer_address = address_bytes(options.peer_address)
        for name in options.__slots__:
            if name != "peer_address":
                setattr(raw, name, getattr(options, name))
        out, err = ffi.new("cotra_qp **"), new_error()
        check(lib.cotra_qp_create(device.ptr, raw, out, err), err)
        super().__init__(out[0], device)

    def _destroy(self, ptr: Any) -> None:
        lib.cotra_qp_destroy(ptr)

    def _local(self) -> tuple[Any, Any]:
        attributes, gid = ffi.new("cotra_qp_attributes *"), ffi.new("cotra_gid_info *")
        lib.cotra_qp_get_local(self.ptr, attributes, gid)
        return attributes, gid

    @property
    def local(self) -> QueuePairAttributes:
        """This side's attributes, for `connect` on the other side."""
        raw, _ = self._local()
        numbers: dict[str, int] = {n: getattr(raw, n) for n in QueuePairAttributes.__slots__ if n != "gid"}
        return QueuePairAttributes(gid=bytes(raw.gid), **numbers)

    @property
    def gid(self) -> GidInfo:
        """The GID that was chosen, and why."""
        return GidInfo.from_c(self._local()[1])

    def connect(self, remote: QueuePairAttributes) -> None:
        """Connects to the other side's queue pair: INIT to RTR to RTS.

        Raises:
            InvalidInputError: an attribute of the other side is not valid.
            CotraError: the device refused a change of state.
        """
        if len(remote.gid) != 16:
            raise InvalidInputError(f"a GID has 16 bytes, not {len(remote.gid)}")
        raw, err = ffi.new("cotra_qp_attributes *"), new_error()
        for name in remote.__slots__:
            try:
                setattr(raw, name, getattr(remote, name))
            except OverflowError as error:
                raise InvalidInputError(f"the peer's queue pair attribute {name}: {error}") from None
        check(lib.cotra_qp_connect(self.ptr, raw, err), err)


class Registration(MemoryRegion):
    """A `MemoryRegion` that is registered with a pyverbs PD.

    Close it, or leave its `with` block, before the PD.
    """

    __slots__ = ("_kept", "_mr")
    _mr: Any
    _kept: object

    def __init__(self, mr: Any, region: MemoryRegion, keep_alive: object) -> None:
        super().__init__(region.addr, region.rkey, region.len)
        object.__setattr__(self, "_mr", mr)  # a MemoryRegion is frozen
        object.__setattr__(self, "_kept", keep_alive)

    def close(self) -> None:
        """Deregisters the memory, and then releases the buffer.

        A READ of the memory fails from then on.
        This method is idempotent.
        """
        mr = self._mr
        object.__setattr__(self, "_mr", None)
        if mr is not None:
            mr.close()
        object.__setattr__(self, "_kept", None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def register(buffer: Any, pd: Any) -> Registration:
    """Registers memory for REMOTE_READ with a pyverbs PD that the caller owns.

    Args:
        buffer: an `Arena`, or an object with a C-contiguous buffer such as a numpy array.
            It is kept alive, never copied.
        pd: a `pyverbs.pd.PD`.

    Returns:
        The registration. The caller closes it before the PD.

    Raises:
        VerbsUnavailableError: pyverbs cannot be imported.
    """
    try:
        from pyverbs.enums import IBV_ACCESS_REMOTE_READ
        from pyverbs.mr import MR
    except ImportError as error:
        raise VerbsUnavailableError(
            f"pyverbs cannot be imported ({error}): install python3-pyverbs (Debian, Fedora) or pip install pyverbs"
        ) from error
    arena = buffer if isinstance(buffer, Arena) else Arena.wrap(buffer)
    info = arena.info
    mr = MR(pd, info.len, IBV_ACCESS_REMOTE_READ, address=info.addr)
    return Registration(mr, MemoryRegion(info.addr, mr.rkey, info.len), (arena, buffer))
