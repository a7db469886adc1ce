"""`cotra demo`: one graph of real word vectors over four owner processes.

This process walks the graph, then the owners walk it, then one owner is lost.
"""

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

from cotra_rdma._build.collection import build_collection
from cotra_rdma._owner.child_process import OwnerProcess
from cotra_rdma._reader.cluster import Cluster
from cotra_rdma._reader.connect import TRANSPORTS, connect
from cotra_rdma.cli import output
from cotra_rdma.cli.options import Json, Transport, transports
from cotra_rdma.datasets import open_vectors, recall
from cotra_rdma.errors import InvalidInputError

EPILOG = """**Examples**

cotra demo

cotra demo lisbon piano monday
"""

WORDS = ("paris", "guitar", "physics", "monday", "coffee")
N_OWNERS = 4
N_QUERIES = 500
LOST_OWNER = 1
K, EF, BEAM = 10, 40, 8
MEASURED_S = 2.0


Words = Annotated[
    list[str] | None, typer.Argument(metavar="WORD", help="Words to look up, in lower case.", show_default=False)
]


@output.verb
def demo(
    words: Words = None,
    transport: Transport = "auto",
    as_json: Json = False,
) -> None:
    """Show it at work: the 20,000 most frequent words of GloVe, searched by meaning in the memory of four other
    processes.

    It builds one graph over four shards and starts an owner process for each.
    This process walks the graph first.
    Then each query goes to the owner of most of its neighbourhood.
    Then one owner is killed and started again.
    It takes half a minute, and leaves nothing behind.
    """
    transports([transport], TRANSPORTS)
    vectors, names = _load()
    numbers = {name: number for number, name in enumerate(names)}
    wanted = words or list(WORDS)
    unknown = [word for word in wanted if word not in numbers]
    if unknown:
        raise InvalidInputError(f"not among the {len(names):,} words of the demo: {', '.join(unknown)}")
    with tempfile.TemporaryDirectory(prefix="cotra-demo-") as directory:
        build_s = _build(Path(directory), quiet=as_json)
        with _owners(Path(directory)) as owners:
            addresses = [address for owner in owners for address in owner.addresses]
            with connect(addresses, transport=transport) as cluster:
                rows = [numbers[word] for word in wanted]
                near = _neighbours(cluster, vectors, rows)
                sample = list(range(0, len(vectors), len(vectors) // N_QUERIES))
                exact = _exact(vectors, sample)
                report = {
                    "words": {word: [names[i] for i in ids] for word, ids in zip(wanted, near, strict=True)},
                    **_measure(cluster, owners, vectors, sample, exact),
                    "build_s": build_s,
                    "home": _at_home(cluster, vectors, sample),
                }
            report["loss"] = _lose_one(Path(directory), owners, vectors, sample, exact)
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
            bar.update(task, completed=done, description=output.phase_of(shard, N_OWNERS, phase))

        build_collection(vectors, directory, N_OWNERS, metric="cosine", graph="global", progress=progress)
    return time.perf_counter() - begin


@contextlib.contextmanager
def _owners(directory: Path) -> Iterator[list[OwnerProcess]]:
    """Starts one owner process for each shard, each a peer of the others, and waits until all walk the graph."""
    with contextlib.ExitStack() as stack:
        owners = [
            stack.enter_context(OwnerProcess([directory], shards=[shard], announce=True, walk=True))
            for shard in range(N_OWNERS)
        ]
        for owner in owners:
            owner.wait_walks(lambda paths: "lost" not in paths)
        yield owners


def _neighbours(cluster: Cluster, vectors: npt.NDArray[np.float32], rows: list[int]) -> list[npt.NDArray[np.int64]]:
    """Returns the K nearest rows of each row, without the row itself."""
    found = cluster.search(vectors[rows], k=K + 1, ef=EF, beam=BEAM).ids
    return [ids[ids != row][:K] for ids, row in zip(found, rows, strict=True)]


def _measure(
    cluster: Cluster,
    owners: list[OwnerProcess],
    vectors: npt.NDArray[np.float32],
    rows: list[int],
    exact: npt.NDArray[np.int64],
) -> dict[str, Any]:
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
        "transports": dict(zip(cluster.addresses, result.transports, strict=True)),
        "reads_per_query": float(result.stats["reads"].mean()),
        "rounds_per_query": float(result.stats["rounds"].mean()),
        "bytes_per_query": float(result.stats["read_bytes"].mean()),
        "queries": batches * len(rows),
        "search_s": seconds,
        "qps": batches * len(rows) / seconds,
        "owners_cpu_s": sum(owner.cpu_s() for owner in owners) - cpu_before,
    }


def _at_home(cluster: Cluster, vectors: npt.NDArray[np.float32], rows: list[int]) -> dict[str, Any]:
    """Has the owners walk the graph, each with its own records in place."""
    result = cluster.search(vectors[rows], k=K, ef=EF, beam=BEAM, algorithm="home")
    assert result.homes is not None
    return {
        "local_share": result.local_share,
        "queries": np.bincount(result.homes[result.homes >= 0], minlength=N_OWNERS).tolist(),
        "reads_per_query": float(result.stats["reads"].mean()),
    }


def _lose_one(
    directory: Path,
    owners: list[OwnerProcess],
    vectors: npt.NDArray[np.float32],
    rows: list[int],
    exact: npt.NDArray[np.int64],
) -> dict[str, Any]:
    """Kills an owner and starts it again.

    The reader has the owners expand nodes, because mapped memory on the same host would outlive its owner.
    """

    def found() -> float:
        return recall(np.stack(_neighbours(cluster, vectors, rows)), exact)

    victim = owners[LOST_OWNER]
    with output.without_warnings(), connect([owner.addresses[0] for owner in owners], transport="rpc") as cluster:
        before = found()
        victim.kill()
        without = found()
        coverage = 1 - len(cluster.lost) / N_OWNERS
        with OwnerProcess([directory], shards=[LOST_OWNER], listen=victim.addresses[0]) as back:
            back.wait_ready()
            cluster.revive()  # a thread of the cluster would do it within seconds
            return {"address": victim.addresses[0], "coverage": coverage, "recall": [before, without, found()]}


def _exact(vectors: npt.NDArray[np.float32], rows: list[int]) -> npt.NDArray[np.int64]:
    """Returns the true K nearest rows of each row, without the row itself, by brute force."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    similar = unit[rows] @ unit.T
    similar[np.arange(len(rows)), rows] = -np.inf
    return np.argsort(-similar, axis=1)[:, :K].astype(np.int64)


def _show(report: dict[str, Any]) -> None:
    output.print_table(("word", "nearest words"), ((word, ", ".join(near)) for word, near in report["words"].items()))
    paths = sorted(set(report["transports"].values()))
    home, loss = report["home"], report["loss"]
    before, without, after = loss["recall"]
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
            (
                "each query walked at home",
                f"{home['local_share']:.0%} of the records are its owner's own or in its cache",
            ),
            (
                "an owner killed",
                f"recall@{K} {before:.2f} -> {without:.2f}, {loss['coverage']:.0%} of the shards answer",
            ),
            ("started again", f"recall@{K} {after:.2f}, without a new connection of the reader"),
        ],
    )
