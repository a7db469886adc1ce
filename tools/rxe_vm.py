"""Runs a command as root in a small virtual machine that has a Soft-RoCE device: for kernels without rdma_rxe.

The machine boots Debian's stock kernel (unpacked, never installed) under qemu. It sees this machine's whole file system
read-only under the same paths, with a layer of its own above it that is thrown away; what it writes under /out comes back.
Kernel and initial RAM disk are made once and kept in ${XDG_CACHE_HOME:-~/.cache}/cotra-rdma/rxe-vm.

    python tools/rxe_vm.py --out results -- ibv_devinfo

The exit status is the command's, 77 when the machine cannot be made here (what is missing is said), 124 when time ran out.
"""

from __future__ import annotations

import argparse
import gzip
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

MODULES = ("virtio_pci", "9pnet_virtio", "9p", "overlay", "virtio_rng")
PROGRAMS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "busybox": "busybox-static",
    "depmod": "kmod",
    "modprobe": "kmod",
    "cpio": "cpio",
    "apt-get": "apt",
    "dpkg": "dpkg",
    "ip": "iproute2",
    "rdma": "iproute2",
}
SETUP = Path(__file__).with_name("rxe_setup.sh")
SKIPPED, TIMED_OUT = 77, 124
FIRMWARE_NOISE = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]|\x1bc")

INIT = """#!/bin/busybox sh
b=/bin/busybox
$b mkdir -p /proc /sys /dev /low /run
$b mount -t proc p /proc; $b mount -t sysfs s /sys; $b mount -t devtmpfs d /dev
for m in /mods/*.ko; do $b insmod $m; done
o=trans=virtio,version=9p2000.L,msize=512000
$b mount -t 9p -o $o,cache=loose,ro root /low
$b mount -t tmpfs t /run; $b mkdir -p /run/upper /run/work /run/merged
$b mount -t overlay o -o lowerdir=/low,upperdir=/run/upper,workdir=/run/work /run/merged
$b mkdir -p /run/merged/out; $b mount -t 9p -o $o out /run/merged/out
for x in proc sys dev; do $b mount --move /$x /run/merged/$x; done
# Process 1 itself goes into the new root: kernel threads share it, and look for modprobe there.
exec $b chroot /run/merged /bin/sh /out/guest.sh
"""

GUEST = """export HOME=/root LANG=C.UTF-8 {environment}
mkdir -p /dev/shm /dev/pts /lib/modules
mount -t tmpfs t /dev/shm; mount -t devpts t /dev/pts
mount --bind {modules} /lib/modules
{{ sh {setup}; }} > /out/setup.log 2>&1 || echo 'Soft-RoCE could not be set up: see setup.log' >> /out/command.log
ulimit -l unlimited
cd {directory}
timeout {timeout} {command} >> /out/command.log 2>&1
echo $? > /out/status
sync
/bin/busybox poweroff -f
"""


class CannotRunError(Exception):
    """The machine cannot be made here; the message says what is missing."""


def cache_directory() -> Path:
    """Where kernel and initial RAM disk are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cotra-rdma" / "rxe-vm"


def _find(program: str) -> str:
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin") or ""


def _check_programs() -> None:
    missing = sorted({package for program, package in PROGRAMS.items() if not _find(program)})
    if missing:
        raise CannotRunError(f"missing programs; on Debian: apt-get install {' '.join(missing)}")


def _output(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotRunError(f"{shlex.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _kernel_version() -> str:
    depends = _output("apt-cache", "depends", "linux-image-amd64")
    found = re.search(r"Depends: linux-image-(\S+-amd64)$", depends, re.MULTILINE)
    if not found:
        raise CannotRunError("apt knows no linux-image-amd64 (run apt-get update; only x86-64 Debian is supported)")
    return found[1]


def prepare() -> tuple[Path, Path, Path]:
    """Kernel, initial RAM disk and module directory; made and cached when they are not there yet."""
    _check_programs()
    cache = cache_directory()
    complete = sorted(cache.glob("*/initrd.gz"), key=lambda path: path.stat().st_mtime)
    directory = complete[-1].parent if complete else _make(cache)
    version = directory.name
    return directory / "boot" / f"vmlinuz-{version}", directory / "initrd.gz", directory / "lib" / "modules"


def _make(cache: Path) -> Path:
    version = _kernel_version()
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        work = Path(scratch) / version
        work.mkdir()
        work.chmod(0o755)
        _output("apt-get", "-o", "APT::Sandbox::User=root", "download", f"linux-image-{version}", cwd=Path(scratch))
        (package,) = Path(scratch).glob("linux-image-*.deb")
        _output("dpkg", "-x", os.fspath(package), os.fspath(work))
        _output(_find("depmod"), "-b", os.fspath(work), version)
        _make_initrd(work, version)
        target = cache / version
        if not target.exists():
            work.rename(target)
    return target


def _make_initrd(work: Path, version: str) -> None:
    root = work / "initrd"
    (root / "bin").mkdir(parents=True)
    (root / "mods").mkdir()
    shutil.copy(_find("busybox"), root / "bin" / "busybox")
    files: dict[str, None] = {}
    for module in MODULES:
        shown = _output(_find("modprobe"), "-d", os.fspath(work), "-S", version, "--show-depends", module)
        for line in shown.splitlines():
            if line.startswith("insmod "):
                files[line.split()[1]] = None
    for number, file in enumerate(files):
        shutil.copy(file, root / "mods" / f"{number:02d}-{Path(file).name}")
    (root / "init").write_text(INIT, encoding="ascii")
    (root / "init").chmod(0o755)
    names = "\n".join(os.fspath(path.relative_to(root)) for path in sorted(root.rglob("*")))
    archive = subprocess.run(
        ["cpio", "-o", "-H", "newc", "--quiet"], cwd=root, input=names.encode(), capture_output=True, check=True
    )
    (work / "initrd.gz").write_bytes(gzip.compress(archive.stdout, 1))
    shutil.rmtree(root)


def run(
    command: Sequence[str],
    out: Path,
    *,
    timeout_s: int = 600,
    memory_mib: int = 3072,
    environment: Mapping[str, str] | None = None,
) -> int:
    """Boots the machine, runs the command in the present directory, and returns its exit status.

    `out` gets the command's output (command.log), the console (console.log) and whatever the command writes under /out.
    """
    kernel, initrd, modules = prepare()
    out.mkdir(parents=True, exist_ok=True)
    (out / "status").unlink(missing_ok=True)
    (out / "command.log").write_bytes(b"")
    variables = {"PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin", **(environment or {})}
    script = GUEST.format(
        environment=" ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items()),
        modules=shlex.quote(os.fspath(modules)),
        setup=shlex.quote(os.fspath(SETUP.resolve())),
        directory=shlex.quote(os.getcwd()),
        timeout=timeout_s,
        command=shlex.join(command),
    )
    (out / "guest.sh").write_text(script, encoding="utf-8")
    share = "local,security_model=none"
    whole = f"{share},id=r,path=/,multidevs=remap,readonly=on"
    machine = [
        *("qemu-system-x86_64", "-M", "q35", "-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max,-la57"),
        *("-smp", "2", "-m", str(memory_mib), "-nodefaults", "-nographic", "-no-reboot", "-serial", "stdio"),
        *("-kernel", os.fspath(kernel), "-initrd", os.fspath(initrd)),
        *("-append", "console=ttyS0 quiet panic=-1 mitigations=off"),
        *("-fsdev", whole, "-device", "virtio-9p-pci,fsdev=r,mount_tag=root"),
        *("-fsdev", f"{share},id=o,path={out.resolve()}", "-device", "virtio-9p-pci,fsdev=o,mount_tag=out"),
        *("-device", "virtio-rng-pci"),
    ]
    with (out / "console.log").open("wb") as console:
        process = subprocess.Popen(machine, stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT)
        try:
            process.wait(timeout_s + 120)
        except subprocess.TimeoutExpired:
            return TIMED_OUT
        finally:
            process.kill()
            process.wait()
    status = out / "status"
    return int(status.read_text()) if status.exists() else 125


def console(out: Path) -> str:
    """What the machine's console said, without the firmware's escape codes."""
    return FIRMWARE_NOISE.sub(b"", (out / "console.log").read_bytes()).decode("utf-8", "replace")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, help="directory for results and logs (default: a temporary one)")
    parser.add_argument("--timeout", type=int, default=600, help="seconds for the command (default 600)")
    parser.add_argument("--memory", type=int, default=3072, help="MiB for the machine (default 3072)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- COMMAND [ARGUMENT ...]")
    arguments = parser.parse_args()
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command:
        parser.error("give a command after --")
    with tempfile.TemporaryDirectory(prefix="cotra-rxe-") as scratch:
        out = arguments.out or Path(scratch)
        try:
            status = run(command, out, timeout_s=arguments.timeout, memory_mib=arguments.memory)
        except CannotRunError as error:
            print(f"the virtual machine cannot run here: {error}", file=sys.stderr)
            return SKIPPED
        print((out / "command.log").read_text("utf-8", "replace"), end="")
        if not (out / "status").exists():
            print(console(out), file=sys.stderr)
        return status


if __name__ == "__main__":
    sys.exit(main())
