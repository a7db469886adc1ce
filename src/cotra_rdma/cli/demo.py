"""`cotra demo`: real word vectors, sharded over four owner processes and searched by a peer that reads their memory."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer

from cotra_rdma.benchmark_data import recall
from cotra_rdma.cli import output
from cotra_rdma.cli.options import TRANSPORTS, Json, transports
from cotra_rdma.cluster import Cluster, connect
from cotra_rdma.collection import build_collection, shard_paths
from cotra_rdma.datasets import open_vectors
from cotra_rdma.errors import InvalidInputError
from cotra_rdma.owner_process import OwnerProcess

EPILOG = """**Examples**

cotra demo

cotra demo lisbon piano monday
"""

WORDS = ("paris", "guitar", "physics", "monday", "coffee")
N_OWNERS = 4
N_QUERIES = 500
K, EF, BEAM = 10, 40, 8
MEASURED_S = 2.0


@output.verb
def demo(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="WORD", help="Words to look up, lower case.", show_default=False)
    ] = None,
    transport: Annotated[
        str, typer.Option(metavar="NAME", help="auto (verbs, else shm on the same host, else rpc), verbs, shm or rpc.")
    ] = "auto",
    as_json: Json = False,
) -> None:
    """See it work: the 20,000 most frequent words of GloVe, by meaning, in the memory of four other processes.

    Builds four shards, starts an owner process for each, and walks their graphs from this one. Takes half a minute, and
    leaves nothing behind.
    """
    transports([transport], ("auto", *TRANSPORTS))
    vectors, names = _load()
    numbers = {name: number for number, name in enumerate(names)}
    wanted = words or list(WORDS)
    unknown = [word for word in wanted if word not in numbers]
    if unknown:
        raise InvalidInputError(f"not among the {len(names):,} words: {', '.join(unknown)}")
    with tempfile.TemporaryDirectory(prefix="cotra-demo-") as directory:
        build_s = _build(Path(directory), quiet=as_json)
        with _owners(Path(directory)) as owners:
            addresses = [address for owner in owners for address in owner.addresses]
            with connect(addresses, transport=transport) as cluster:
                rows = [numbers[word] for word in wanted]
                near = _neighbours(cluster, vectors, rows)
                report = {
                    "words": {word: [names[i] for i in ids] for word, ids in zip(wanted, near, strict=True)},
                    **_measure(cluster, owners, vectors, addresses),
                    "build_s": build_s,
                }
    if as_json:
        output.print_json(report)
    else:
        _show(report)


def _load() -> tuple[npt.NDArray[np.float32], list[str]]:
    data = resources.files("cotra_rdma") / "demo_data"
    with (data / "vectors.npy").open("rb") as file:
        vectors = np.load(file).astype(np.float32)
    return vectors, (data / "words.txt").read_text(encoding="utf-8").split()


def _build(directory: Path, *, quiet: bool) -> float:
    begin = time.perf_counter()
    data = resources.files("cotra_rdma") / "demo_data" / "vectors.npy"
    with (
        resources.as_file(data) as path,
        open_vectors(path) as vectors,
        output.progress_bar("words", disable=quiet) as bar,
    ):
        task = bar.add_task("", total=vectors.count)

        def progress(shard: int, phase: str, done: int) -> None:
            description = phase if shard < 0 else f"shard {shard + 1}/{N_OWNERS} {phase}"
            bar.update(task, completed=done, description=description)

        build_collection(vectors, directory, N_OWNERS, metric="cosine", graph="global", progress=progress)
    return time.perf_counter() - begin


@contextlib.contextmanager
def _owners(directory: Path) -> Iterator[list[OwnerProcess]]:
    """One process a shard, all started before the first is waited for."""
    with contextlib.ExitStack() as stack:
        owners = [stack.enter_context(OwnerProcess([path])) for path in shard_paths([directory])]
        for owner in owners:
            owner.wait_ready()
        yield owners


def _neighbours(cluster: Cluster, vectors: npt.NDArray[np.float32], rows: list[int]) -> list[npt.NDArray[np.int64]]:
    """The nearest K of each row but itself."""
    found = cluster.search(vectors[rows], k=K + 1, ef=EF, beam=BEAM).ids
    return [ids[ids != row][:K] for ids, row in zip(found, rows, strict=True)]


def _measure(
    cluster: Cluster, owners: list[OwnerProcess], vectors: npt.NDArray[np.float32], addresses: list[str]
) -> dict[str, Any]:
    rows = list(range(0, len(vectors), len(vectors) // N_QUERIES))
    exact = _exact(vectors, rows)
    found = np.stack(_neighbours(cluster, vectors, rows))
    cpu_before = sum(owner.cpu_s() for owner in owners)
    begin, batches = time.perf_counter(), 0
    while time.perf_counter() - begin < MEASURED_S:
        result = cluster.search(vectors[rows], k=K, ef=EF, beam=BEAM)
        batches += 1
    seconds = time.perf_counter() - begin
    return {
        "recall": recall(found, exact),
        "k": K,
        "ef": EF,
        "beam": BEAM,
        "transports": dict(zip(addresses, result.transports, strict=True)),
        "reads_per_query": float(result.stats["reads"].mean()),
        "rounds_per_query": float(result.stats["rounds"].mean()),
        "bytes_per_query": float(result.stats["read_bytes"].mean()),
        "queries": batches * len(rows),
        "search_s": seconds,
        "qps": batches * len(rows) / seconds,
        "owners_cpu_s": sum(owner.cpu_s() for owner in owners) - cpu_before,
    }


def _exact(vectors: npt.NDArray[np.float32], rows: list[int]) -> npt.NDArray[np.int64]:
    """The true nearest K of each row but itself, by brute force."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    similar = unit[rows] @ unit.T
    similar[np.arange(len(rows)), rows] = -np.inf
    return np.argsort(-similar, axis=1)[:, :K].astype(np.int64)


def _show(report: dict[str, Any]) -> None:
    output.print_table(("word", "nearest words"), ((word, ", ".join(near)) for word, near in report["words"].items()))
    paths = sorted(set(report["transports"].values()))
    output.print_table(
        ("", ""),
        [
            ("owner processes", f"{N_OWNERS}, one shard each, built in {report['build_s']:.1f} s"),
            ("path to their memory", ", ".join(paths)),
            (f"recall@{K}", f"{report['recall']:.4f} against the exact answer"),
            ("READs per query", f"{report['reads_per_query']:.1f} in {report['rounds_per_query']:.1f} rounds"),
            ("read per query", output.human_bytes(report["bytes_per_query"])),
            ("queries a second", f"{report['qps']:,.0f}, one thread"),
            ("owners' CPU time", f"{report['owners_cpu_s'] * 1e3:.1f} ms during {report['queries']:,} queries"),
        ],
    )
