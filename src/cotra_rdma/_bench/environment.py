"""What a benchmark ran on: the machine, settings that change its speed, versions, and the command to repeat the run."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cotra_rdma._bench.libraries import PACKAGES, library_version, usable_cores
from cotra_rdma._diagnose.host import Host, Status, hugetlb
from cotra_rdma._diagnose.verbs import devices_check, library_check, port_check
from cotra_rdma._native.graph_engine import simd_level
from cotra_rdma._native.verbs import Device, DeviceInfo, devices
from cotra_rdma.errors import CotraError

_SIMD = re.compile(r"sse4_2|avx.*|fma|f16c|amx_.*|asimd.*|sve.*|i8mm|bf16")  # the flags of /proc/cpuinfo to show


@dataclass(frozen=True, slots=True)
class Adapter:
    """A verbs device.

    Attributes:
        name: its name.
        firmware: the version of its firmware.
        ports: for each port its number, state, link layer, MTU and rate, as text.
    """

    name: str
    firmware: str
    ports: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Environment:
    """What a benchmark ran on. A text says so if a fact is not known.

    Attributes:
        command: the command line.
        date: the time of the start, in UTC.
        cpu: the model of the CPU.
        cores: the cores that this process may use.
        cores_online: the cores of the machine.
        simd_used: the SIMD level of the searches.
        simd_available: the SIMD extensions of the CPU.
        kernel: the release of Linux.
        scaling_governor: the policy for the CPU's frequency.
        transparent_hugepage: the setting for private memory.
        shmem_hugepage: the setting for shared memory.
        hugetlb: the reserved huge pages.
        verbs: what the doctor says of the devices.
        adapters: the devices.
        load_at_start: the load of 1, 5 and 15 minutes (getloadavg(3)).
        load_at_end: the same after the run; None before its end.
        versions: the versions of this package, of Python and of libraries; None for one that is not installed.
    """

    command: str
    date: str
    cpu: str
    cores: int
    cores_online: int
    simd_used: str
    simd_available: tuple[str, ...]
    kernel: str
    scaling_governor: str
    transparent_hugepage: str
    shmem_hugepage: str
    hugetlb: str
    verbs: str
    adapters: tuple[Adapter, ...]
    load_at_start: tuple[float, float, float]
    load_at_end: tuple[float, float, float] | None
    versions: dict[str, str | None]

    @classmethod
    def now(cls, arguments: Sequence[str], host: Host | None = None) -> Environment:
        """Reads the environment before a run.

        Args:
            arguments: the command line, as `sys.argv`.
            host: the machine; None for this one.
        """
        host = host or Host()
        program = Path(arguments[0]).name
        verbs, adapters = _adapters(host)
        cpu = host.text("/proc/cpuinfo")
        return cls(
            command=shlex.join(["cotra" if program == "__main__.py" else program, *arguments[1:]]),
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            cpu=_field(cpu, "model name") or platform.processor() or platform.machine(),
            cores=usable_cores(),
            cores_online=os.cpu_count() or 1,
            simd_used=simd_level(),
            simd_available=tuple(
                flag for flag in (_field(cpu, "flags") or _field(cpu, "Features")).split() if _SIMD.fullmatch(flag)
            ),
            kernel=host.release,
            scaling_governor=host.text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip() or "none",
            transparent_hugepage=_choice(host, "enabled"),
            shmem_hugepage=_choice(host, "shmem_enabled"),
            hugetlb=hugetlb(host)[1],
            verbs=verbs,
            adapters=adapters,
            load_at_start=os.getloadavg(),
            load_at_end=None,
            versions={"cotra-rdma": library_version("cotra-rdma"), "python": platform.python_version()}
            | {"numpy": library_version("numpy")}
            | {name: library_version(name) for name in PACKAGES},
        )

    def finished(self) -> Environment:
        """Returns the same environment with the load after the run."""
        return replace(self, load_at_end=os.getloadavg())

    def facts(self) -> dict[str, str]:
        """Returns the facts for people: for each name a text."""
        loads = (self.load_at_start, self.load_at_end)
        adapters = (f"{a.name} (firmware {a.firmware}), {'; '.join(a.ports)}" for a in self.adapters)
        return {
            "command": self.command,
            "date": self.date,
            "CPU": f"{self.cpu}, {self.cores} of {self.cores_online} cores",
            "SIMD": f"{self.simd_used} used; the CPU has {' '.join(self.simd_available) or 'none that is known'}",
            "kernel": f"Linux {self.kernel}, scaling governor {self.scaling_governor}",
            "huge pages": (
                f"transparent: {self.transparent_hugepage}, of shared memory: {self.shmem_hugepage}; "
                f"hugetlb: {self.hugetlb}"
            ),
            "verbs": " | ".join(adapters) or self.verbs,
            "load": " to ".join(" ".join(f"{value:.2f}" for value in load) for load in loads if load is not None),
            "versions": ", ".join(f"{name} {version or '-'}" for name, version in self.versions.items()),
        }


def _field(text: str, name: str) -> str:
    """Returns the first value of a field in /proc/cpuinfo, or "" if there is none."""
    found = re.search(rf"^{name}\s*:\s*(.*)$", text, re.M)
    return found[1].strip() if found else ""


def _choice(host: Host, setting: str) -> str:
    """Returns the choice in a text such as "always [madvise] never"."""
    found = re.search(r"\[(\w+)\]", host.text(f"/sys/kernel/mm/transparent_hugepage/{setting}"))
    return found[1] if found else "unknown"


def _adapters(host: Host) -> tuple[str, tuple[Adapter, ...]]:
    """Returns what `cotra doctor` says of the verbs devices, and the devices."""
    for check in (library_check(), devices_check(host, None)):
        if check.status is Status.FAILED:
            return check.seen, ()
    return check.seen, tuple(Adapter(info.name, info.firmware, _ports(host, info)) for info in devices())


def _ports(host: Host, info: DeviceInfo) -> tuple[str, ...]:
    try:
        with Device(info.name) as device:
            seen = [port_check(host, info.name, device.port(n + 1), needed=False).seen for n in range(info.n_ports)]
    except CotraError as error:
        return (str(error),)
    rates = [host.text(f"/sys/class/infiniband/{info.name}/ports/{n + 1}/rate").strip() for n in range(info.n_ports)]
    return tuple(f"port {n + 1}: {text}, {rates[n] or 'rate unknown'}" for n, text in enumerate(seen))
