"""What stands between this process and a working RDMA device: the checks behind `cotra doctor`. Nothing here prints.

Every check reads what it needs and never raises: a fact that cannot be had is a finding too. Those that read the file
system take a `Host`, so that they can be tried on any tree.
"""

from __future__ import annotations

import gzip
import importlib
import os
import platform
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

ENOUGH_MEMLOCK_BYTES = 64 << 20  # landing buffers and a small shard
CAP_IPC_LOCK = 14  # capabilities(7)
ROCE_MTU = 4200  # of a network interface that lets RoCE use its largest path MTU, 4096 bytes

INSTALL_LIBIBVERBS = (
    "sudo apt install libibverbs1 ibverbs-providers   (Debian, Ubuntu), or sudo dnf install libibverbs   (Fedora, RHEL)"
)
REBUILD = (
    "sudo apt install libibverbs-dev   (or: sudo dnf install rdma-core-devel), then "
    "install cotra-rdma from its source again: pip install --force-reinstall --no-deps --no-cache-dir ."
)


class Status(StrEnum):
    """How a check went. A warning does not keep verbs from working."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Check:
    """One finding: what was checked, how it went, what was seen, and what to do about it ("" when nothing)."""

    name: str
    status: Status
    seen: str
    remedy: str = ""


def usable(checks: list[Check]) -> bool:
    """Whether nothing failed."""
    return all(check.status is not Status.FAILED for check in checks)


@dataclass(frozen=True, slots=True)
class Host:
    """The parts of the file system that tell how this machine is set up, below `root`."""

    root: Path = Path("/")
    release: str = platform.release()

    def path(self, name: str) -> Path:
        """`name`, an absolute path, below the root."""
        return self.root / name.lstrip("/")

    def text(self, name: str) -> str:
        """A file's text; "" when it cannot be read."""
        try:
            raw = self.path(name).read_bytes()
            return (gzip.decompress(raw) if name.endswith(".gz") else raw).decode("utf-8", "replace")
        except OSError:
            return ""

    def names(self, directory: str) -> list[str]:
        """What a directory holds, sorted; [] when it cannot be read."""
        try:
            return sorted(os.listdir(self.path(directory)))
        except OSError:
            return []

    def may_open(self, name: str) -> bool:
        """Returns whether this process may read and write a file."""
        return os.access(self.path(name), os.R_OK | os.W_OK)

    @property
    def container(self) -> str:
        """The kind of container that this process runs in, or ""."""
        if self.path("/.dockerenv").exists():
            return "docker"
        if self.path("/run/.containerenv").exists():
            return "podman"
        if "kubepods" in self.text("/proc/1/cgroup"):
            return "kubernetes"
        return self.text("/run/systemd/container").strip()

    @property
    def may_lock_any(self) -> bool:
        """Whether CAP_IPC_LOCK lifts the memlock limit: held, in the first user namespace (where the kernel asks)."""
        status = dict(line.split(":\t", 1) for line in self.text("/proc/self/status").splitlines() if ":\t" in line)
        held = int(status.get("CapEff", "0"), 16) >> CAP_IPC_LOCK & 1
        return bool(held) and self.text("/proc/self/uid_map").split() in ([], ["0", "0", "4294967295"])

    @property
    def infiniband_config(self) -> bool | None:
        """Whether this kernel was built with InfiniBand; None when its configuration is not there to read."""
        config = self.text("/proc/config.gz") or self.text(f"/boot/config-{self.release}")
        lines = config.splitlines()
        return None if not lines else any(line in ("CONFIG_INFINIBAND=y", "CONFIG_INFINIBAND=m") for line in lines)

    @property
    def network_interface(self) -> str:
        """An interface for Soft-RoCE: the first that is up and not the loopback."""
        names = [name for name in self.names("/sys/class/net") if name != "lo"]
        up = [name for name in names if self.text(f"/sys/class/net/{name}/operstate").strip() == "up"]
        return (up or names or ["eth0"])[0]


def kernel(host: Host) -> Check:
    """Whether the kernel has the verbs interface, and which drivers are loaded."""
    drivers = [name for name in host.names("/sys/module") if name.startswith(("ib_", "rdma_")) or name in _DRIVERS]
    if host.path("/sys/class/infiniband_verbs").exists():
        return Check("kernel modules", Status.OK, f"{', '.join(drivers) or 'built in'} (Linux {host.release})")
    seen = f"ib_uverbs is not loaded (Linux {host.release})"
    where = "on the host (a container has its host's kernel): " if host.container else ""
    if host.infiniband_config is False:
        remedy = (
            f"{where}boot a kernel with CONFIG_INFINIBAND; this one was built without, and no module can be loaded "
            "into it. Debian: sudo apt install linux-image-amd64 (not the cloud flavour)"
        )
        return Check("kernel modules", Status.FAILED, f"{seen}; built without InfiniBand", remedy)
    if host.container or "ib_uverbs.ko" in host.text(f"/lib/modules/{host.release}/modules.dep"):
        return Check("kernel modules", Status.FAILED, seen, f"{where}sudo modprobe ib_uverbs")
    remedy = (
        f"sudo apt install linux-modules-extra-{host.release}   (Ubuntu; elsewhere the full kernel package), then "
        "sudo modprobe ib_uverbs"
    )
    return Check("kernel modules", Status.FAILED, f"{seen} nor installed", remedy)


def device_files(host: Host) -> Check:
    """Whether /dev/infiniband/uverbs* are there and open for us."""
    name = "device files"
    nodes = [node for node in host.names("/dev/infiniband") if node.startswith("uverbs")]
    if not nodes:
        remedy = (
            f"start the container with {container_flags(host)}"
            if host.container
            else "sudo modprobe ib_uverbs; udev makes them"
        )
        return Check(name, Status.FAILED, "no /dev/infiniband/uverbs*", remedy)
    closed = [node for node in nodes if not host.may_open(f"/dev/infiniband/{node}")]
    if closed:
        remedy = (
            f"sudo chmod 0666 /dev/infiniband/{closed[0]}; for good: sudo usermod -aG rdma $USER, "
            "where udev gives them to that group"
        )
        return Check(name, Status.FAILED, f"no permission for {', '.join(closed)}", remedy)
    return Check(name, Status.OK, ", ".join(f"/dev/infiniband/{node}" for node in nodes))


def memlock(host: Host, limit: int | None = None) -> Check:
    """Whether enough memory can be pinned. `limit`: bytes, -1 without limit; None: this process's RLIMIT_MEMLOCK."""
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] if limit is None else limit
    if soft == resource.RLIM_INFINITY:
        return Check("memlock limit", Status.OK, "unlimited")
    seen = f"{soft >> 10:,} KiB"
    if host.may_lock_any:
        return Check("memlock limit", Status.OK, f"{seen}, lifted by CAP_IPC_LOCK")
    remedy = (
        f"start the container with {container_flags(host)}"
        if host.container
        else 'echo "$USER - memlock unlimited" | sudo tee /etc/security/limits.d/rdma.conf, then log in again '
        "(a systemd service: LimitMEMLOCK=infinity)"
    )
    if soft < ENOUGH_MEMLOCK_BYTES:
        return Check("memlock limit", Status.FAILED, f"{seen}: too little to pin a shard", remedy)
    return Check("memlock limit", Status.WARNING, f"{seen}: shards must be smaller than that", remedy)


def hugetlb(host: Host) -> tuple[int, str]:
    """How many huge pages are free, and that in words."""
    lines = (line.split() for line in host.text("/proc/meminfo").splitlines() if line.startswith("Huge"))
    values = {words[0].rstrip(":"): int(words[1]) for words in lines}
    free, total, size = (values.get(name, 0) for name in ("HugePages_Free", "HugePages_Total", "Hugepagesize"))
    return free, f"{free:,} of {total:,} free, {size:,} KiB each"


def huge_pages(host: Host) -> Check:
    """Whether there are free huge pages: fewer TLB misses on both sides."""
    free, seen = hugetlb(host)
    if free:
        return Check("huge pages", Status.OK, seen)
    return Check(
        "huge pages", Status.WARNING, f"{seen}: faster with them", "sudo sysctl -w vm.nr_hugepages=512   (1 GiB)"
    )


def container(host: Host) -> Check:
    """Whether a container has what RDMA needs."""
    kind = host.container
    if not kind:
        return Check("container", Status.OK, "not in a container")
    missing = []
    if not host.names("/dev/infiniband"):
        missing.append("no /dev/infiniband")
    if not host.may_lock_any and resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] != resource.RLIM_INFINITY:
        missing.append("neither CAP_IPC_LOCK nor an unlimited memlock")
    if missing:
        return Check(
            "container", Status.WARNING, f"{kind}: {', '.join(missing)}", f"start it with {container_flags(host)}"
        )
    return Check("container", Status.OK, f"{kind}, with /dev/infiniband and pinning allowed")


def container_flags(host: Host) -> str:
    """How to start a container so that RDMA works in it."""
    if host.container == "kubernetes":
        return 'an RDMA device plugin\'s resource and securityContext: {capabilities: {add: ["IPC_LOCK"]}}'
    return "--device /dev/infiniband --cap-add IPC_LOCK --ulimit memlock=-1 --network host"


def pyverbs(host: Host) -> Check:
    """Whether pyverbs imports; it is optional."""
    try:
        importlib.import_module("pyverbs.device")
        return Check("pyverbs", Status.OK, str(importlib.import_module("pyverbs").__path__[0]))
    except ImportError as error:
        reason = f"not importable ({error}); optional"
    packages = "/usr/lib/python3/dist-packages"
    ours = f".cpython-{sys.version_info.major}{sys.version_info.minor}-"
    if any(ours in name for name in host.names(f"{packages}/pyverbs")):
        return Check("pyverbs", Status.WARNING, reason, f"export PYTHONPATH={packages}   (the system's is there)")
    return Check("pyverbs", Status.WARNING, reason, "sudo apt install python3-pyverbs, with the system's own python3")


def fork_safety(host: Host) -> Check:
    """Whether the kernel copies pinned pages at fork (since Linux 5.12), so that a child's writes cannot move ours."""
    numbers = host.release.split("-")[0].split(".")
    version = tuple(int(number) if number.isdecimal() else 0 for number in numbers[:2])
    if version >= (5, 12):
        return Check("fork safety", Status.OK, f"Linux {host.release} copies pinned pages at fork")
    remedy = "export RDMAV_FORK_SAFE=1 before the start, or use multiprocessing's spawn method"
    if os.environ.get("RDMAV_FORK_SAFE") or os.environ.get("IBV_FORK_SAFE"):
        return Check("fork safety", Status.OK, f"Linux {host.release} with RDMAV_FORK_SAFE set")
    return Check("fork safety", Status.WARNING, f"Linux {host.release} may move pinned pages at fork", remedy)


_DRIVERS = ("bnxt_re", "efa", "erdma", "hns_roce_hw_v2", "irdma", "mana_ib", "mlx4_ib", "mlx5_ib", "qedr", "siw")


def host_checks(host: Host) -> Iterator[Check]:
    """The checks that need no libibverbs."""
    yield kernel(host)
    yield device_files(host)
    yield memlock(host)
    yield huge_pages(host)
    yield container(host)
    yield pyverbs(host)
    yield fork_safety(host)
