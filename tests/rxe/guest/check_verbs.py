"""Search over verbs: the answers, who works for them, and what happens when an owner dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from owners import figure, start, stopped

import cotra_rdma
from cotra_rdma import Shard, TransportError
from cotra_rdma._native.merge import merge
from cotra_rdma._owner.child_process import OwnerProcess

Floats = npt.NDArray[np.float32]
K, EF, BEAM = 10, 64, 4


def bits(distances: Floats) -> npt.NDArray[np.uint32]:
    return distances.view(np.uint32)


def check_answers_are_bit_identical_to_shm_rpc_and_in_process(
    shards: list[Path], addresses: list[str], queries: Floats
) -> None:
    labels, distances = [], []
    for path in shards:
        with Shard.open(path, verify=False) as shard:
            found = shard.search(queries, K, EF, BEAM)
            labels.append(found[0])
            distances.append(found[1])
    ids, expected, _ = merge(np.stack(labels), np.stack(distances))
    for transport in ("verbs", "shm", "rpc"):
        with cotra_rdma.connect(addresses, transport=transport) as cluster:
            result = cluster.search(queries, k=K, ef=EF, beam=BEAM)
        assert result.transports == (transport, transport)
        np.testing.assert_array_equal(result.ids, ids)
        np.testing.assert_array_equal(bits(result.distances), bits(expected))


def check_threads_have_queue_pairs_of_their_own(addresses: list[str], queries: Floats) -> None:
    with cotra_rdma.connect(addresses, transport="auto") as cluster:
        assert cluster.transports == ("verbs", "verbs")
        one = cluster.search(queries, k=K, ef=EF)
        two = cluster.search(queries, k=K, ef=EF, n_threads=2, inflight=3)
    np.testing.assert_array_equal(one.ids, two.ids)
    np.testing.assert_array_equal(bits(one.distances), bits(two.distances))
    np.testing.assert_array_equal(one.stats["reads"], two.stats["reads"])


def check_a_stopped_owner_is_searched_and_uses_no_cpu(
    owners: list[OwnerProcess], addresses: list[str], queries: Floats
) -> None:
    with cotra_rdma.connect(addresses, transport="verbs") as cluster:
        expected = cluster.search(queries, k=K, ef=EF)
        with stopped(owners):
            before = [owner.cpu_s() for owner in owners]
            result = cluster.search(queries, k=K, ef=EF)
            used = [owner.cpu_s() - b for owner, b in zip(owners, before, strict=True)]
    assert len(queries) >= 200
    assert used == [0.0, 0.0]
    np.testing.assert_array_equal(result.ids, expected.ids)
    figure(
        f"{len(queries)} queries of two stopped owners over verbs: {len(queries) / result.elapsed_s:.0f} queries/s, "
        f"{result.stats['reads'].mean():.1f} READs and {result.stats['rounds'].mean():.1f} rounds a query, owners' CPU 0 s"
    )


def packets_sent(device_name: str) -> int:
    return int(Path(f"/sys/class/infiniband/{device_name}/ports/1/hw_counters/sent_pkts").read_text())


def objects_of_this_process() -> dict[str, int]:
    """What the kernel holds for us: queue pairs, registrations, completion queues, PDs; and open files."""
    shown = json.loads(subprocess.run(["rdma", "-j", "resource", "show"], capture_output=True, check=True).stdout)
    return {**{k: v for k, v in shown[0].items() if isinstance(v, int)}, "files": len(os.listdir("/proc/self/fd"))}


def check_a_killed_owner_is_a_typed_error_within_3_s(
    shards: list[Path], host: str, device_name: str, queries: Floats
) -> None:
    first = start(shards[:1], host, device_name)
    with cotra_rdma.connect(
        first[0].addresses, transport="verbs"
    ) as cluster:  # what the RPC opens once for all, is open
        cluster.search(queries[:1], k=K, ef=EF)
    before = objects_of_this_process()
    second = start(shards[1:], host, device_name)
    caught: list[tuple[BaseException, float]] = []
    try:
        with cotra_rdma.connect([first[0].addresses[0], second[0].addresses[0]], transport="verbs") as cluster:

            def search() -> None:
                try:
                    cluster.search(np.tile(queries, (1000, 1)), k=K, ef=EF)
                except BaseException as error:
                    caught.append((error, time.monotonic()))

            packets = packets_sent(device_name)
            thread = threading.Thread(target=search)
            thread.start()
            while packets_sent(device_name) < packets + 2000:  # in mid-batch
                assert thread.is_alive(), caught
            os.kill(second[0].pid, signal.SIGKILL)
            killed = time.monotonic()
            thread.join(30)
            assert not thread.is_alive()
            ((error, at),) = caught
            assert isinstance(error, TransportError)
            assert error.shard == 1
            assert second[0].addresses[0] in str(error)
            figure(f"an owner killed in mid-batch: {type(error).__name__} after {at - killed:.2f} s: {error}")
            assert at - killed < 3.0
            with pytest.raises(TransportError) as again:  # and the next search: not a hang either
                cluster.search(queries[:1], k=K, ef=EF)
            assert again.value.shard == 1
    finally:
        for owner in second:
            owner.close()
    deadline = time.monotonic() + 60.0
    more = {"all"}
    while more and time.monotonic() < deadline:  # gRPC closes a connection's socket a little later
        after = (
            objects_of_this_process()
        )  # of others' queue pairs, that were being taken back before, there may be fewer
        more = {name for name, n in after.items() if n > before[name]}
        time.sleep(0.05)
    assert more == set()
    with cotra_rdma.connect(first[0].addresses, transport="verbs") as cluster:
        assert (cluster.search(queries, k=K, ef=EF).ids >= 0).all()
    first[0].close()


def check_doctor_is_content(addresses: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-B", "-m", "cotra_rdma.cli", "doctor", "--peer", addresses[0], "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    report = json.loads(done.stdout)
    assert done.returncode == 0, report
    assert report["usable"]
    seen = {check["name"]: check for check in report["checks"]}
    assert seen[f"peer {addresses[0]}"]["status"] == "ok"
    figure(f"cotra doctor --peer: {seen[f'peer {addresses[0]}']['seen']}")
