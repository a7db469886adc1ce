"""Measures how long a search takes to answer Ctrl-C on every path, and how much longer its owners work.

    python bench/interrupt.py
    python bench/interrupt.py --repeats 10 --path rpc

A search that would take half a minute or more runs in the main thread.
It is sent SIGINT at a random moment.
A row shows the milliseconds from the signal to KeyboardInterrupt, the median and the most.
For `cotra search`, they are those to the end of the process.
The last column is the CPU time in ms that the owners' processes used from the signal until they were idle.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

import cotra_rdma
from cotra_rdma._build.collection import build_collection
from cotra_rdma._collection.manifest import shard_paths
from cotra_rdma._native.channel import FabricModel
from cotra_rdma._owner.child_process import OwnerProcess
from cotra_rdma.datasets import open_vectors

N, DIM, N_SHARDS, N_QUERIES, EF = 20_000, 32, 4, 400_000, 256
N_ROUTED, ROUTED_EF, ROUTING_S = 40_000, 2048, 2.5  # for Compass, which first routes all queries in numpy
Search = Callable[[], object]


def made(directory: Path) -> tuple[Path, Path]:
    """Builds one graph, and a collection of independent shards with inverted lists."""
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((40, DIM))
    rows = centres[generator.integers(0, 40, N)] + 0.5 * generator.standard_normal((N, DIM))
    np.save(directory / "base.npy", rows.astype(np.float32))
    np.save(directory / "queries.npy", np.tile(rows[:1000].astype(np.float32), (N_QUERIES // 1000, 1)))
    for name, graph, n_lists in (("one", "global", 0), ("own", "independent", 200)):
        with open_vectors(directory / "base.npy") as file:
            build_collection(file, directory / name, N_SHARDS, graph=graph, partition="kmeans", n_lists=n_lists)
    return directory / "one", directory / "own"


def settle(owners: Sequence[OwnerProcess]) -> float:
    """Waits until the owners are idle, and returns their CPU seconds."""
    before = -1.0
    while (now := sum(owner.cpu_s() for owner in owners)) > before + 0.002:
        before = now
        time.sleep(0.1)
    return now


def interrupted(search: Search, owners: Sequence[OwnerProcess], after_s: float) -> tuple[float, float]:
    """Returns the milliseconds until KeyboardInterrupt, and those of the owners' CPU time from the signal on."""
    sent = [0.0, 0.0]

    def send() -> None:
        sent[:] = time.perf_counter(), sum(owner.cpu_s() for owner in owners)
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(after_s + random.uniform(0.3, 1.0), send)
    timer.start()
    try:
        search()
    except KeyboardInterrupt:
        took = time.perf_counter() - sent[0]
        return 1e3 * took, 1e3 * (settle(owners) - sent[1])
    timer.cancel()
    raise SystemExit("the search was over before the signal came")


def interrupted_command(command: list[str], owners: Sequence[OwnerProcess]) -> tuple[float, float]:
    """Returns the same for a process."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        before = sum(owner.cpu_s() for owner in owners)
        while process.poll() is None and sum(owner.cpu_s() for owner in owners) < before + 0.3:
            time.sleep(0.01)  # until the owners are asked: nothing before takes them so long
        begin, before = time.perf_counter(), sum(owner.cpu_s() for owner in owners)
        process.send_signal(signal.SIGINT)
        process.wait()
        took = time.perf_counter() - begin
        if process.returncode != 130:
            raise SystemExit(f"cotra search ended with {process.returncode}")
        return 1e3 * took, 1e3 * (settle(owners) - before)


@contextmanager
def paths(directory: Path) -> Iterator[dict[str, tuple[Search | list[str], list[OwnerProcess], float]]]:
    """Yields for each path its search, the owners that may work for it, and the seconds until it begins to search."""
    one, own = made(directory)
    queries = np.load(directory / "queries.npy")
    found: dict[str, tuple[Search | list[str], list[OwnerProcess], float]] = {}
    with ExitStack() as stack:
        shard = stack.enter_context(cotra_rdma.Shard.open(shard_paths([own])[0]))
        own_owner = stack.enter_context(OwnerProcess(shard_paths([own]), transports=("shm", "rpc")))
        walkers = [
            stack.enter_context(OwnerProcess(shard_paths([one]), transports=("shm", "rpc"), walk=True, announce=True))
        ]
        walkers[0].wait_walks(lambda walks: "lost" not in walks)

        def connected(owner: OwnerProcess, **options: object) -> cotra_rdma.Cluster:
            return stack.enter_context(cotra_rdma.connect(owner.addresses, **options))

        def add(name: str, cluster: cotra_rdma.Cluster, owner: OwnerProcess, **options: object) -> None:
            found[name] = (lambda: cluster.search(queries, ef=EF, **options), [owner], 0.0)

        def add_routed(name: str, cluster: cotra_rdma.Cluster, owner: OwnerProcess, algorithm: str) -> None:
            some = queries[:N_ROUTED]
            found[name] = (lambda: cluster.search(some, ef=ROUTED_EF, algorithm=algorithm), [owner], ROUTING_S)

        found["in-process"] = (lambda: shard.search(queries, ef=EF), [], 0.0)
        found["in-process, 2 threads"] = (lambda: shard.search(queries, ef=EF, n_threads=2), [], 0.0)
        near, far = connected(own_owner), connected(own_owner, transport="rpc")
        slow = connected(own_owner, fabric=FabricModel(round_trip_s=0.05))
        add("shm", near, own_owner)
        add("shm, 2 threads", near, own_owner, n_threads=2)
        add("a round trip of 50 ms", slow, own_owner)
        add("SPIRE over shm", near, own_owner, algorithm="spire")
        add("SPIRE, a round trip of 50 ms", slow, own_owner, algorithm="spire")
        add_routed("Compass over shm", near, own_owner, "compass")
        add("RPC", far, own_owner)
        add("scatter-gather", near, own_owner, algorithm="scatter-gather")
        graph, pushed = connected(walkers[0]), connected(walkers[0], transport="rpc")
        add("one graph over shm", graph, walkers[0])
        add("one graph, pushed", pushed, walkers[0])
        add_routed("one graph, home", graph, walkers[0], "home")
        gatherer = stack.enter_context(cotra_rdma.ScatterGather.connect(own_owner.addresses))
        found["ScatterGather"] = (lambda: gatherer.search_sync(queries, 10, EF, timeout_s=600), [own_owner], 0.0)
        command = [sys.executable, "-m", "cotra_rdma.cli", "search", *own_owner.addresses]
        command += ["--queries", str(directory / "queries.npy"), "--ef", str(EF), "--transport", "rpc"]
        found["cotra search over RPC"] = (command, [own_owner], 0.0)
        yield found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--path", action="append", default=[], help="only paths whose names contain this")
    options = parser.parse_args()
    random.seed(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with SIGINT ignored
    with tempfile.TemporaryDirectory() as scratch, paths(Path(scratch)) as found:
        print("| path | ms, median | ms, most | owners' CPU after, ms |")
        print("|---|---|---|---|")
        for name, (search, owners, after_s) in found.items():
            if options.path and not any(wanted in name for wanted in options.path):
                continue
            rows = [
                interrupted_command(search, owners)
                if isinstance(search, list)
                else interrupted(search, owners, after_s)
                for _ in range(options.repeats)
            ]
            took, worked = zip(*rows, strict=True)
            print(f"| {name} | {statistics.median(took):.0f} | {max(took):.0f} | {max(worked):.0f} |", flush=True)


if __name__ == "__main__":
    main()
