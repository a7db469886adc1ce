"""The host checks of `cotra doctor`, each tried on a made-up file system."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from cotra_rdma._diagnose import host as diagnosis
from cotra_rdma._diagnose.host import Check, Host, Status

UNLIMITED = -1


class Tree:
    """A file system to put files into."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.host = Host(root, "6.1.0-18-amd64")

    def put(self, name: str, content: str | bytes = "") -> Tree:
        path = self.root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return self


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_a_check_on_nothing_at_all_still_has_an_answer(tree: Tree) -> None:
    checks = list(diagnosis.host_checks(tree.host))
    assert len({check.name for check in checks}) == len(checks) == 7
    assert all(check.seen for check in checks)
    assert all(check.remedy for check in checks if check.status is not Status.OK)
    assert not diagnosis.usable(checks)


def test_this_machine_is_told_about_without_an_exception() -> None:
    assert all(check.remedy for check in diagnosis.host_checks(Host()) if check.status is not Status.OK)


def test_warnings_do_not_make_verbs_unusable() -> None:
    good, odd, bad = (Check("a", status, "b") for status in Status)
    assert diagnosis.usable([good, odd])
    assert not diagnosis.usable([good, odd, bad])


class TestKernel:
    def test_loaded(self, tree: Tree) -> None:
        tree.put("/sys/class/infiniband_verbs/abi_version").put("/sys/module/rdma_rxe/refcnt").put("/sys/module/loop/x")
        check = diagnosis.kernel(tree.host)
        assert check.status is Status.OK
        assert check.seen == "rdma_rxe (Linux 6.1.0-18-amd64)"

    def test_installed_and_not_loaded(self, tree: Tree) -> None:
        tree.put("/lib/modules/6.1.0-18-amd64/modules.dep", "kernel/drivers/infiniband/core/ib_uverbs.ko: x\n")
        assert diagnosis.kernel(tree.host).remedy == "sudo modprobe ib_uverbs"

    def test_not_installed(self, tree: Tree) -> None:
        tree.put("/boot/config-6.1.0-18-amd64", "CONFIG_INFINIBAND=m\n")
        check = diagnosis.kernel(tree.host)
        assert check.status is Status.FAILED
        assert "linux-modules-extra-6.1.0-18-amd64" in check.remedy

    def test_built_without(self, tree: Tree) -> None:
        tree.put("/proc/config.gz", gzip.compress(b"# CONFIG_INFINIBAND is not set\nCONFIG_NET=y\n"))
        check = diagnosis.kernel(tree.host)
        assert "built without InfiniBand" in check.seen
        assert "modprobe" not in check.remedy

    def test_in_a_container_the_host_has_to_act(self, tree: Tree) -> None:
        assert diagnosis.kernel(tree.put("/.dockerenv").host).remedy.startswith("on the host")


class TestDeviceFiles:
    def test_there(self, tree: Tree) -> None:
        check = diagnosis.device_files(tree.put("/dev/infiniband/uverbs0").put("/dev/infiniband/rdma_cm").host)
        assert (check.status, check.seen) == (Status.OK, "/dev/infiniband/uverbs0")

    def test_closed(self, tree: Tree) -> None:
        class Closed(Host):  # root may open every file
            def may_open(self, name: str) -> bool:
                return False

        tree.put("/dev/infiniband/uverbs0")
        check = diagnosis.device_files(Closed(tree.root))
        assert check.status is Status.FAILED
        assert "chmod 0666 /dev/infiniband/uverbs0" in check.remedy

    def test_missing_in_a_container(self, tree: Tree) -> None:
        check = diagnosis.device_files(tree.put("/run/.containerenv").host)
        assert check.status is Status.FAILED
        assert "--device /dev/infiniband --cap-add IPC_LOCK" in check.remedy


class TestMemlock:
    @pytest.mark.parametrize(
        ("limit", "status"),
        [(UNLIMITED, Status.OK), (8 << 20, Status.FAILED), (64 << 20, Status.WARNING), (1 << 40, Status.WARNING)],
    )
    def test_limits(self, tree: Tree, limit: int, status: Status) -> None:
        check = diagnosis.memlock(tree.host, limit)
        assert check.status is status
        assert ("limits.d" in check.remedy) == (status is not Status.OK)

    @pytest.mark.parametrize(
        ("capabilities", "uid_map", "status"),
        [
            ("000001ffffffffff", "         0          0 4294967295\n", Status.OK),
            ("0000000000004000", "         0          0 4294967295\n", Status.OK),
            ("00000000a80425fb", "         0          0 4294967295\n", Status.FAILED),
            ("000001ffffffffff", "         0       1000          1\n", Status.FAILED),
        ],
        ids=["root", "ipc_lock", "docker's default", "rootless container"],
    )
    def test_capability(self, tree: Tree, capabilities: str, uid_map: str, status: Status) -> None:
        tree.put("/proc/self/status", f"Name:\tx\nCapEff:\t{capabilities}\n").put("/proc/self/uid_map", uid_map)
        assert diagnosis.memlock(tree.host, 8 << 20).status is status

    def test_in_a_container_flags_help(self, tree: Tree) -> None:
        assert "--ulimit memlock=-1" in diagnosis.memlock(tree.put("/.dockerenv").host, 8 << 20).remedy


@pytest.mark.parametrize(("free", "status"), [(0, Status.WARNING), (3, Status.OK)])
def test_huge_pages(tree: Tree, free: int, status: Status) -> None:
    tree.put("/proc/meminfo", f"MemTotal: 1 kB\nHugePages_Total:  4\nHugePages_Free:  {free}\nHugepagesize:  2048 kB\n")
    check = diagnosis.huge_pages(tree.host)
    assert check.status is status
    assert check.seen.startswith(f"{free} of 4 free, 2,048 KiB each")


@pytest.mark.parametrize(
    ("name", "content", "kind", "flags"),
    [
        ("/.dockerenv", "", "docker", "--device /dev/infiniband"),
        ("/run/.containerenv", "", "podman", "--device /dev/infiniband"),
        ("/proc/1/cgroup", "0::/kubepods/besteffort/x\n", "kubernetes", "IPC_LOCK"),
    ],
)
def test_container(tree: Tree, name: str, content: str, kind: str, flags: str) -> None:
    check = diagnosis.container(tree.put(name, content).host)
    assert check.status is Status.WARNING
    assert check.seen.startswith(f"{kind}: no /dev/infiniband")
    assert flags in check.remedy


@pytest.mark.parametrize(
    ("release", "status"), [("5.11.9-generic", Status.WARNING), ("5.12.0", Status.OK), ("6.1", Status.OK)]
)
def test_fork_safety(tmp_path: Path, release: str, status: Status, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RDMAV_FORK_SAFE", raising=False)
    monkeypatch.delenv("IBV_FORK_SAFE", raising=False)
    assert diagnosis.fork_safety(Host(tmp_path, release)).status is status
    monkeypatch.setenv("RDMAV_FORK_SAFE", "1")
    assert diagnosis.fork_safety(Host(tmp_path, release)).status is Status.OK


def test_network_interface_for_soft_roce(tree: Tree) -> None:
    assert tree.host.network_interface == "eth0"
    for name, state in (("lo", "unknown"), ("docker0", "down"), ("ens3", "up")):
        tree.put(f"/sys/class/net/{name}/operstate", f"{state}\n")
    assert tree.host.network_interface == "ens3"
