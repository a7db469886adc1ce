"""A real owner under attack: its memory stays bounded, and a reader that behaves is served all the while."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import cotra_rdma
from cotra_rdma import Shard, Stop
from cotra_rdma._owner.child_process import OwnerProcess
from cotra_rdma._reader.batch import Batch, make_batch
from helpers.begun import GENEROUS_S

Floats = npt.NDArray[np.float32]
MIB = 1 << 20
MORE_BYTES = 512 * MIB
"""What an owner may take beside what it serves."""
LASTS_S = 3.0
ATTACKERS = Path(__file__).with_name("attackers.py")


@pytest.fixture(scope="module")
def served(words: Floats, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("attack") / "shard.cotra"
    with Shard.build(words, metric="cosine", M=16, ef_construction=60) as shard:
        shard.save(path)
    return path


@pytest.fixture
def owner(served: Path) -> Iterator[OwnerProcess]:
    """An owner of one, which may have 1,024 files open, as is usual."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    try:
        process = OwnerProcess([served], transports=("shm", "rpc"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with process:
        process.wait_ready()
        yield process


def peak_bytes(process: OwnerProcess) -> int:
    """proc(5): the most that was resident."""
    text = Path(f"/proc/{process.pid}/status").read_text()
    found = re.search(r"^VmHWM:\s+(\d+) kB", text, re.M)
    assert found is not None
    return int(found[1]) * 1024


@contextmanager
def attack(name: str, owner: OwnerProcess) -> Iterator[subprocess.Popen[bytes]]:
    def more_files() -> None:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))

    command = [sys.executable, str(ATTACKERS), name, owner.addresses[0]]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        preexec_fn=more_files,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as attacker:
        try:
            assert attacker.stdout is not None
            assert attacker.stdout.readline() == b"begun\n"
            yield attacker
        finally:
            attacker.kill()


@pytest.mark.parametrize(
    "name", ["endless", "large", "too_large", "unread", "trickle", "long", "costly", "idle", "junk"]
)
def test_an_owner_under_attack(
    owner: OwnerProcess, words: Floats, name: str, record_property: Callable[[str, object], None]
) -> None:
    address = owner.addresses[0]
    with cotra_rdma.connect(address, transport="rpc", timeout_s=GENEROUS_S) as good:
        wanted = good.search(words[:3], k=5)
        before, took = peak_bytes(owner), []
        with attack(name, owner) as attacker:
            if name == "unread":
                attacker.send_signal(signal.SIGSTOP)
            over = time.monotonic() + LASTS_S
            while time.monotonic() < over or len(took) < 6:
                for work in (lambda: good.search(words[:3], k=5), good.renew_leases):
                    begin = time.perf_counter()
                    found = work()
                    took.append(time.perf_counter() - begin)
                    if found is not None:
                        np.testing.assert_array_equal(found.ids, wanted.ids)
            if name != "idle":  # then all connections may be taken; who has one keeps it
                with cotra_rdma.connect(address, transport="rpc", timeout_s=GENEROUS_S) as late:
                    np.testing.assert_array_equal(late.search(words[:3], k=5).ids, wanted.ids)
            more = peak_bytes(owner) - before
        assert more < MORE_BYTES
        record_property(
            "figure", f"attack {name}: {more / MIB:.0f} MiB, a good reader waited {max(took) * 1e3:.0f} ms at most"
        )
        np.testing.assert_array_equal(good.search(words[:3], k=5).ids, wanted.ids)
    with cotra_rdma.connect(address, timeout_s=GENEROUS_S) as after:
        np.testing.assert_array_equal(after.search(words[:3], k=5).ids, wanted.ids)


def test_what_is_refused_says_which_limit(owner: OwnerProcess, words: Floats) -> None:
    with (
        cotra_rdma.connect(owner.addresses[0], transport="rpc") as cluster,
        pytest.raises(cotra_rdma.PeerError, match="are too many at once: ask for 2097152 in all"),
    ):
        cluster._connections[0].calls._search_part(batch_of(words[:3], 2**20), words[:3])


def batch_of(queries: Floats, ef: int) -> Batch:
    return make_batch(queries, queries.shape[1], (20_000,), k=10, ef=ef, beam=8, stop=Stop())
