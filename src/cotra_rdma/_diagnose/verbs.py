"""The checks of `cotra doctor` that use libibverbs: library, devices, ports, GIDs and READs. Nothing here prints."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cotra_rdma._collection.owner_probe import ask_owners
from cotra_rdma._diagnose.host import INSTALL_LIBIBVERBS, REBUILD, ROCE_MTU, Check, Host, Status
from cotra_rdma._native.arena import Arena
from cotra_rdma._native.channel import Channel
from cotra_rdma._native.verbs import (
    Device,
    GidInfo,
    MemoryRegistration,
    PortInfo,
    QueuePair,
    QueuePairOptions,
    compiled,
    devices,
    library,
)
from cotra_rdma._reader.connect import connect
from cotra_rdma.errors import CotraError, VerbsUnavailableError
from cotra_rdma.protocol.tls import Tls

READ_BYTES = 1024
READS = 100
PORT_STATES = {1: "down", 2: "initialising", 3: "armed", 4: "active", 5: "active, deferred"}
ACTIVE = 4
BEST_MTU = 4096


def verbs_checks(host: Host, device: str | None, gid_index: int | None, peer: str | None) -> Iterator[Check]:
    """Checks library, devices, ports and GIDs, and READs over the device to itself.

    It stops at the first failure that prevents the next check.

    Args:
        host: this machine.
        device: the name of the device; None for any.
        gid_index: the index of the GID to use; None for the best.
        peer: HOST:PORT of an owner, which the ranking of GIDs takes into account; None for no owner.
    """
    check = library_check()
    yield check
    if check.status is Status.FAILED:
        return
    check = devices_check(host, device)
    yield check
    if check.status is Status.FAILED:
        return
    try:
        with Device(device) as opened:
            yield from _device_checks(host, opened, gid_index, None if peer is None else peer.rpartition(":")[0])
    except VerbsUnavailableError as error:
        yield Check("device", Status.FAILED, str(error), _no_active_port(host))


def library_check() -> Check:
    """Checks whether libibverbs can be loaded, and says which file it is."""
    if not compiled():
        return Check("libibverbs", Status.FAILED, "this build of cotra-rdma has no verbs transport", REBUILD)
    try:
        path = library()
        return Check("libibverbs", Status.OK, f"{path}, version {Path(path).resolve().name.partition('.so.')[2]}")
    except VerbsUnavailableError as error:
        return Check("libibverbs", Status.FAILED, str(error), INSTALL_LIBIBVERBS)


def devices_check(host: Host, wanted: str | None) -> Check:
    """Checks whether there are devices, and among them the one that is wanted."""
    try:
        names = [device.name for device in devices()]
    except CotraError as error:
        return Check("devices", Status.FAILED, str(error), soft_roce(host))
    known = host.names("/sys/class/infiniband")
    if not names and known:
        remedy = (
            "sudo apt install ibverbs-providers   (or: sudo dnf install libibverbs); then see the device files, below"
        )
        return Check("devices", Status.FAILED, f"libibverbs cannot use {', '.join(known)}", remedy)
    if not names:
        return Check("devices", Status.FAILED, "none", soft_roce(host))
    if wanted is not None and wanted not in names:
        return Check("devices", Status.FAILED, f"no {wanted}; there is {', '.join(names)}", f"--device {names[0]}")
    return Check("devices", Status.OK, ", ".join(names))


def soft_roce(host: Host) -> str:
    """Returns how to get a device: by the driver of an adapter that is plugged in, or else by Soft-RoCE."""
    where = "on the host, then restart the container: " if host.container else ""
    pci = host.names("/sys/bus/pci/devices")
    if any(host.text(f"/sys/bus/pci/devices/{device}/vendor").strip() == "0x15b3" for device in pci):
        return f"{where}sudo modprobe mlx5_ib   (there is an NVIDIA/Mellanox adapter)"
    netdev = host.network_interface
    if host.infiniband_config is False:
        return f"{where}boot a kernel with InfiniBand first: see kernel modules"
    return (
        f"{where}load your adapter's driver (mlx5_ib, irdma, bnxt_re...); without an adapter, Soft-RoCE: "
        f"sudo modprobe rdma_rxe && sudo rdma link add rxe0 type rxe netdev {netdev}"
    )


def _device_checks(host: Host, device: Device, gid_index: int | None, peer_host: str | None) -> Iterator[Check]:
    name = device.info.name
    ports = [device.port(number) for number in range(1, device.info.n_ports + 1)]
    for port in ports:
        yield port_check(host, name, port, needed=not any(other.state == ACTIVE for other in ports))
    active = next((port for port in ports if port.state == ACTIVE), None)
    if active is None:
        return
    gids = device.gids(active.port, _ip(peer_host))
    yield gid_check(host, name, active, gids, gid_index)
    if gids:
        yield loopback_check(device, gid_index)


def port_check(host: Host, device: str, port: PortInfo, *, needed: bool) -> Check:
    """Checks whether a port is active, and its MTU.

    Args:
        host: this machine.
        device: the name of the device.
        port: the port.
        needed: whether no other port is active, so that this one has to be.
    """
    name = f"port {device}/{port.port}"
    layer = port.link_layer
    seen = f"{PORT_STATES.get(port.state, port.state)}, {layer}, MTU {port.active_mtu_bytes}"
    netdev = _netdev(host, device, port.port)
    if port.state != ACTIVE:
        remedy = (
            f"sudo ip link set dev {netdev} up"
            if layer == "Ethernet"
            else "start a subnet manager: sudo systemctl start opensm"
        )
        return Check(name, Status.FAILED if needed else Status.WARNING, seen, remedy)
    if port.active_mtu_bytes < BEST_MTU and layer == "Ethernet":
        remedy = f"on both ends, where the switches allow it: sudo ip link set dev {netdev} mtu {ROCE_MTU}"
        return Check(name, Status.WARNING, f"{seen}: {BEST_MTU} is faster", remedy)
    return Check(name, Status.OK, seen)


def gid_check(host: Host, device: str, port: PortInfo, gids: list[GidInfo], wanted: int | None) -> Check:
    """Checks the GID table. It lists the best GID first, and marks the one that will be used."""
    name = f"GIDs {device}/{port.port}"
    netdev = _netdev(host, device, port.port)
    add_address = f"sudo ip addr add ADDRESS/24 dev {netdev}"
    if not gids:
        return Check(name, Status.FAILED, "the table is empty", add_address)
    chosen = gids[0].index if wanted is None else wanted
    seen = "\n".join(f"{'*' if gid.index == chosen else ' '} {gid.index}: {gid.address} ({gid.why})" for gid in gids)
    if all(gid.index != chosen for gid in gids):
        return Check(name, Status.FAILED, f"{seen}\nno index {chosen}", f"--gid-index {gids[0].index}")
    used = next(gid for gid in gids if gid.index == chosen)
    if used.gid[:2] == b"\xfe\x80" and port.link_layer == "Ethernet":
        return Check(
            name,
            Status.WARNING,
            f"{seen}\nthis one is link-local: it is not routed, and peers rarely use it",
            add_address,
        )
    if chosen != gids[0].index:
        return Check(name, Status.WARNING, f"{seen}\nindex {chosen} is not the best", f"--gid-index {gids[0].index}")
    return Check(name, Status.OK, seen)


def loopback_check(device: Device, gid_index: int | None) -> Check:
    """Makes real READs of 1 KiB from a device to its own memory.

    They need a queue pair, a registration and completions.
    """
    name = f"READ {device.info.name} to itself"
    try:
        with Arena.create(READ_BYTES) as arena, MemoryRegistration(device, arena) as registered:
            with arena.view() as view:
                view[:] = bytes(range(256)) * (READ_BYTES // 256)
            options = QueuePairOptions(gid_index=-1 if gid_index is None else gid_index)
            with QueuePair(device, options) as owner, QueuePair(device, options) as reader:
                owner.connect(reader.local)
                reader.connect(owner.local)
                with Channel.verbs(reader, registered.region) as channel:
                    return read_check(name, channel, bytes(range(256)) * (READ_BYTES // 256))
    except CotraError as error:
        return Check(name, Status.FAILED, str(error), "see the other lines; the message names the call that failed")


def read_check(name: str, channel: Channel, expected: bytes | None = None) -> Check:
    """Makes READs of 1 KiB over a channel, and reports how long one takes.

    Args:
        name: the name of the check.
        channel: reads the memory.
        expected: the bytes that must come back; None for any.
    """
    data = channel.read(0, READ_BYTES)
    if expected is not None and data != expected:
        return Check(
            name,
            Status.FAILED,
            "the READs returned other bytes than the region holds",
            "replace the driver or firmware",
        )
    _, latencies = channel.read_loop(np.zeros(READS, np.uint64), READ_BYTES)
    return Check(name, Status.OK, f"{READ_BYTES} bytes, {np.median(latencies) / 1e3:.1f} us typical")


def _no_active_port(host: Host) -> str:
    return f"sudo ip link set dev {host.network_interface} up   (rdma link show tells each port's network interface)"


def _netdev(host: Host, device: str, port: int) -> str:
    return host.text(f"/sys/class/infiniband/{device}/ports/{port}/gid_attrs/ndevs/0").strip() or host.network_interface


def _ip(peer_host: str | None) -> str | None:
    """Returns the numeric address of a peer, or None if it is not known."""
    try:
        return None if peer_host is None else str(socket.getaddrinfo(peer_host.strip("[]"), None)[0][4][0])
    except OSError:
        return None


def peer_checks(
    address: str, device: str | None, gid_index: int | None, timeout_s: float, tls: Tls | None = None
) -> Iterator[Check]:
    """Checks whether an owner answers, and then whether its region can be read over verbs."""
    (owner,) = ask_owners([address], timeout_s, tls)
    name = f"owner {address}"
    if owner.serves is None:
        remedy = "run cotra serve there, open its port, and show it a certificate if it wants one (--tls-cert)"
        yield Check(name, Status.FAILED, owner.problem, remedy)
        return
    yield Check(
        name,
        Status.OK,
        f"answers in {owner.latency_s * 1e6:.0f} us, and offers {', '.join(owner.transports) or 'nothing to you'}",
    )
    yield _read_of_peer_check(address, device, gid_index, timeout_s, tls)


def _read_of_peer_check(
    address: str, device: str | None, gid_index: int | None, timeout_s: float, tls: Tls | None
) -> Check:
    """Makes real READs of 1 KiB of an owner's region over verbs. If they fail, it names the path that works."""
    name = f"peer {address}"
    try:
        with connect(address, "verbs", device=device, gid_index=gid_index, timeout_s=timeout_s, tls=tls) as cluster:
            (latencies,) = cluster.ping(READS, READ_BYTES)
        return Check(name, Status.OK, f"{READ_BYTES} bytes, {np.median(latencies) / 1e3:.1f} us typical")
    except CotraError as error:
        why = str(error)
    here = "no verbs on this side" in why or isinstance(_own_fault(device), CotraError)
    remedy = "see the lines above, which are about this side" if here else "run cotra doctor on the owner's machine"
    try:
        with connect(address, timeout_s=timeout_s, tls=tls) as cluster:
            return Check(name, Status.FAILED, f"{why}; {cluster.transports[0]} works", remedy)
    except CotraError:
        return Check(name, Status.FAILED, f"{why}; no other path works", remedy)


def _own_fault(device: str | None) -> CotraError | None:
    """Returns what keeps this side from using verbs, or None."""
    try:
        Device(device).close()
    except CotraError as error:
        return error
    return None
