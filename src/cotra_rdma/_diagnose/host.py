"""The checks of `cotra doctor` that need no libibverbs: what stands between this process and a working RDMA device.

Nothing here prints.
A check reads what it needs and never raises: a fact that cannot be read is a finding too.
Checks that read the file system take a `Host`, so that a test can give them any tree.
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

ENOUGH_MEMLOCK_BYTES = 64 << 20  # enough for the buffers of READs and a small shard
CAP_IPC_LOCK = 14  # capabilities(7)
ROCE_MTU = 4200  # the MTU of a network interface with which RoCE has its largest path MTU, 4096 bytes

INSTALL_LIBIBVERBS = (
    "sudo apt install libibverbs1 ibverbs-providers   (Debian, Ubuntu), or sudo dnf install libibverbs   (Fedora, RHEL)"
)
REBUILD = (
    "sudo apt install libibverbs-dev   (or: sudo dnf install rdma-core-devel), then "
    "install cotra-rdma from its source again: pip install --force-reinstall --no-deps --no-cache-dir ."
)


class Status(StrEnum):
    """The result of a check. After a warning, verbs still works."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Check:
    """A finding of the doctor.

    Attributes:
        name: what was checked.
        status: the result.
        seen: what was found.
        remedy: what to do about it; "" for nothing.
    """

    name: str
    status: Status
    seen: str
    remedy: str = ""


def usable(checks: list[Check]) -> bool:
    """Returns whether no check failed."""
    return all(check.status is not Status.FAILED for check in checks)


@dataclass(frozen=True, slots=True)
class Host:
    """The files that tell how a machine is set up.

    Attributes:
        root: the directory that takes the place of /.
        release: the release of the kernel.
    """

    root: Path = Path("/")
    release: str = platform.release()

    def path(self, name: str) -> Path:
        """Returns the path below the root for `name`, an absolute path."""
        return self.root / name.lstrip("/")

    def text(self, name: str) -> str:
        """Returns the text of a file, or "" if it cannot be read."""
        try:
            raw = self.path(name).read_bytes()
            return (gzip.decompress(raw) if name.endswith(".gz") else raw).decode("utf-8", "replace")
        except OSError:
            return ""

    def names(self, directory: str) -> list[str]:
        """Returns the sorted names in a directory, or [] if it cannot be read."""
        try:
            return sorted(os.listdir(self.path(directory)))
        except OSError:
            return []

    def may_open(self, name: str) -> bool:
        """Returns whether this process may read and write a file."""
        return os.access(self.path(name), os.R_OK | os.W_OK)

    @property
    def container(self) -> str:
        """The kind of container that this process runs in, or "" outside of one."""
        if self.path("/.dockerenv").exists():
            return "docker"
        if self.path("/run/.containerenv").exists():
            return "podman"
        if "kubepods" in self.text("/proc/1/cgroup"):
            return "kubernetes"
        return self.text("/run/systemd/container").strip()

    @property
    def may_lock_any(self) -> bool:
        """Whether CAP_IPC_LOCK lifts the memlock limit.

        The process must hold it in the first user namespace, which is where the kernel looks.
        """
        status = dict(line.split(":\t", 1) for line in self.text("/proc/self/status").splitlines() if ":\t" in line)
        held = int(status.get("CapEff", "0"), 16) >> CAP_IPC_LOCK & 1
        return bool(held) and self.text("/proc/self/uid_map").split() in ([], ["0", "0", "4294967295"])

    @property
    def infiniband_config(self) -> bool | None:
        """Whether this kernel was built with InfiniBand; None if its configuration cannot be read."""
        config = self.text("/proc/config.gz") or self.text(f"/boot/config-{self.release}")
        lines = config.splitlines()
        return None if not lines else any(line in ("CONFIG_INFINIBAND=y", "CONFIG_INFINIBAND=m") for line in lines)

    @property
    def network_interface(self) -> str:
        """The network interface to use for Soft-RoCE: the first one that is up and is not the loopback."""
        names = [name for name in self.names("/sys/class/net") if name != "lo"]
        up = [name for name in names if self.text(f"/sys/class/net/{name}/operstate").strip() == "up"]
        return (up or names or ["eth0"])[0]


def kernel(host: Host) -> Check:
    """Checks whether the kernel has the verbs interface, and lists the drivers that are loaded."""
    drivers = [name for name in host.names("/sys/module") if name.startswith(("ib_", "rdma_")) or name in _DRIVERS]
    if host.path("/sys/class/infiniband_verbs").exists():
        return Check("kernel modules", Status.OK, f"{', '.join(drivers) or 'built in'} (Linux {host.release})")
    seen = f"ib_uverbs is not loaded (Linux {host.release})"
    where = "on the host (a container has its host's kernel): " if host.container else ""
    if host.infiniband_config is False:
        remedy = (
            f"{where}boot a kernel with CONFIG_INFINIBAND. This one was built without it, and no module can be loaded. "
            "Debian: sudo apt install linux-image-amd64 (not the cloud flavour)"
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
    """Checks whether /dev/infiniband/uverbs* exist, and whether this process may open them."""
    name = "device files"
    nodes = [node for node in host.names("/dev/infiniband") if node.startswith("uverbs")]
    if not nodes:
        remedy = (
            f"start the container with {container_flags(host)}"
            if host.container
            else "sudo modprobe ib_uverbs; udev then makes them"
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
    """Checks whether this process can pin enough memory.

    Args:
        host: this machine.
        limit: the limit in bytes, -1 for none. None stands for this process's RLIMIT_MEMLOCK.
    """
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
        return Check("memlock limit", Status.FAILED, f"{seen}, which is too little to pin a shard", remedy)
    return Check("memlock limit", Status.WARNING, f"{seen}, so shards must be smaller than that", remedy)


def hugetlb(host: Host) -> tuple[int, str]:
    """Returns the number of free huge pages, and a text that describes all of them."""
    lines = (line.split() for line in host.text("/proc/meminfo").splitlines() if line.startswith("Huge"))
    values = {words[0].rstrip(":"): int(words[1]) for words in lines}
    free, total, size = (values.get(name, 0) for name in ("HugePages_Free", "HugePages_Total", "Hugepagesize"))
    return free, f"{free:,} of {total:,} free, {size:,} KiB each"


def huge_pages(host: Host) -> Check:
    """Checks whether huge pages are free. They cause fewer TLB misses on both sides."""
    free, seen = hugetlb(host)
    if free:
        return Check("huge pages", Status.OK, seen)
    return Check(
        "huge pages",
        Status.WARNING,
        f"{seen}; searches are faster with them",
        "sudo sysctl -w vm.nr_hugepages=512   (1 GiB)",
    )


def container(host: Host) -> Check:
    """Checks whether a container has what RDMA needs."""
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
    """Returns the options that start a container in which RDMA works."""
    if host.container == "kubernetes":
        return 'an RDMA device plugin\'s resource and securityContext: {capabilities: {add: ["IPC_LOCK"]}}'
    return "--device /dev/infiniband --cap-add IPC_LOCK --ulimit memlock=-1 --network host"


def pyverbs(host: Host) -> Check:
    """Checks whether pyverbs can be imported. It is optional."""
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
    """Checks whether the kernel copies pinned pages at fork (Linux 5.12), so that a child's writes cannot move ours."""
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
    """Runs the checks that need no libibverbs."""
    yield kernel(host)
    yield device_files(host)
    yield memlock(host)
    yield huge_pages(host)
    yield container(host)
    yield pyverbs(host)
    yield fork_safety(host)
