"""`cotra search`: queries from a file, answers from shards that are served."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import typer

from cotra_rdma._collection.owners_file import OWNERS
from cotra_rdma._native.channel import DEFAULT_TIMEOUT_S
from cotra_rdma._reader.cluster import Cluster
from cotra_rdma._reader.connect import TRANSPORTS, connect
from cotra_rdma._reader.result import SearchResult
from cotra_rdma._routing.router import DEFAULT_TARGET
from cotra_rdma.cli import output
from cotra_rdma.cli.options import (
    GroundTruth,
    Json,
    Threads,
    TlsCa,
    TlsCert,
    TlsKey,
    Tracing,
    Transport,
    input_file,
    tls_of,
    transports,
)
from cotra_rdma.cli.search_report import show, summarize, write_answers
from cotra_rdma.cli.targets import Targets, targets
from cotra_rdma.datasets import read_ground_truth, read_queries, recall
from cotra_rdma.errors import InvalidInputError, TransportError
from cotra_rdma.protocol.tls import Tls

EPILOG = """**Examples**

cotra search index --queries queries.fvecs

cotra search 10.0.0.1:7700 10.0.0.1:7701 --queries queries.fvecs --k 10 --ef 128 --out answers.npz

cotra search 10.0.0.1:7700,10.0.0.2:7700 10.0.0.3:7700 --queries queries.fvecs

cotra search index --queries queries.fvecs --algorithm home

cotra search 127.0.0.1:7700 --queries sift.hdf5 --ground-truth sift.hdf5 --transport shm --json

The third names two owners of the first shard; the nearest of them is used. A collection is searched at the addresses
that `cotra serve` noted in its owners.json. No other file of it is needed but collection.json.
"""

Shards = Annotated[
    list[str],
    typer.Argument(
        metavar="ADDRESS|COLLECTION",
        help="HOST:PORT of each shard's owner, with commas between several owners of one shard. Or one collection: a "
        "directory that `cotra build` made, or its collection.json.",
    ),
]
Queries = Annotated[Path, input_file('The vectors to search for. Of an HDF5 file, its "test" set.')]
K = Annotated[int, typer.Option("--k", "-k", min=1, help="The number of answers to a query.")]
Ef = Annotated[
    int, typer.Option(min=1, help="The candidates that a search keeps, at least k. More are slower and find more.")
]
Beam = Annotated[int, typer.Option(min=1, help="The most nodes that a round expands. More need fewer round trips.")]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        dir_okay=False,
        show_default=False,
        help="Write the answers: .npz with ids and distances [n, k] and incomplete [n], or .npy with the fields id and "
        "distance.",
    ),
]
Timeout = Annotated[
    float | None,
    typer.Option(
        min=0.001,
        metavar="S",
        show_default=False,
        help="The longest time for the search, and the longest wait for an owner when connecting, in seconds. "
        "Default: no limit for the search, and 5 s for any one answer.",
    ),
]
Algorithm = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="auto: the quickest by the cost model. cotra: read the graphs. home: the owner of most of a query's "
        "neighbourhood walks the graph (`cotra serve --walk`). scatter-gather: the owners search. "
        "spire: read inverted lists, --ef of them (`cotra build --ivf`). compass, compass+scatter-gather, "
        "compass+spire: ask only shards that are likely to hold a query's neighbours (`cotra build --partition "
        "kmeans`).",
    ),
]
TargetRecall = Annotated[
    float,
    typer.Option(min=0.01, max=1.0, help="For Compass: the share to keep of the recall that asking every shard has."),
]
OwnerCpu = Annotated[
    bool, typer.Option("--owner-cpu", help="Let auto have owners search although their memory could be read.")
]
Explain = Annotated[
    bool,
    typer.Option(
        "--explain",
        help="Show what the cost model expected of each algorithm, beside what was measured. auto always does.",
    ),
]
AllowPartial = Annotated[
    bool | None,
    typer.Option(
        "--allow-partial/--no-allow-partial",
        show_default=False,
        help="Answer without the shards that fail or have no owner, and name them; or fail. Default: answer if the "
        "shards are one graph.",
    ),
]
CacheBytes = Annotated[
    int,
    typer.Option(min=0, metavar="N", help="Keep records that are read often, in at most N bytes. 0: none."),
]
MaxExpansions = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        show_default=False,
        help="End each walk after N records, and count the queries that this cut short.",
    ),
]


@output.verb
def search(
    shards: Shards,
    queries: Queries,
    k: K = 10,
    ef: Ef = 64,
    beam: Beam = 8,
    transport: Transport = "auto",
    threads: Threads = 1,
    ground_truth: GroundTruth = None,
    out: Out = None,
    timeout: Timeout = None,
    algorithm: Algorithm = "cotra",
    target_recall: TargetRecall = DEFAULT_TARGET,
    owner_cpu: OwnerCpu = False,
    explain: Explain = False,
    allow_partial: AllowPartial = None,
    cache_bytes: CacheBytes = 0,
    max_expansions: MaxExpansions = None,
    tracing: Tracing = False,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_ca: TlsCa = None,
    as_json: Json = False,
) -> None:
    """Search shards that are served, and show what it took.

    QPS is of the whole batch. The latency of a query lasts from its start to its last shard's answer.
    """
    _check_output_file(out)
    transports([transport], TRANSPORTS)
    wanted = targets(shards)
    vectors, truth = _read(queries, ground_truth, k)
    tls = tls_of(tls_cert, tls_key, tls_ca)
    with _connect(wanted, transport, tls, timeout or DEFAULT_TIMEOUT_S, cache_bytes, allow_partial, tracing) as cluster:
        unreached = cluster.lost
        run = partial(
            cluster.search,
            vectors,
            k=k,
            ef=ef,
            beam=beam,
            n_threads=threads,
            timeout_s=timeout,
            allow_partial=allow_partial,
            algorithm=algorithm,
            target_recall=target_recall,
            owner_cpu=owner_cpu,
            explain=explain,
            max_expansions=max_expansions,
        )
        result, seconds = _timed(run, len(vectors), quiet=as_json)
        names = [address or f"shard {at}" for at, address in enumerate(cluster.addresses)]
    if out is not None:
        write_answers(out, result)
    summary = summarize(result, None if truth is None else recall(result.ids, truth), seconds, names, unreached)
    if as_json:
        output.print_json({**summary, "queries": len(vectors), "k": k, "ef": ef, "beam": beam, "n_threads": threads})
        return
    show(summary, result, k)
    if result.failures and allow_partial is None:
        missing = ", ".join(summary["failures"])
        output.print_warning(f"the answer is without {missing}; --no-allow-partial makes that an error")


def _check_output_file(out: Path | None) -> None:
    """Raises a usage error if answers cannot be written to a path."""
    if out is not None and out.suffix not in (".npy", ".npz"):
        raise typer.BadParameter(f"{out} must end in .npy or .npz", param_hint="--out")
    if out is not None and not out.parent.is_dir():
        raise typer.BadParameter(f"there is no directory {out.parent}", param_hint="--out")


def _read(
    queries: Path, ground_truth: Path | None, k: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64] | None]:
    """Reads the queries, and the ground truth if a file of it is given.

    Raises:
        InvalidInputError: the ground truth is of another number of queries, or has fewer than k rows for each.
    """
    vectors = read_queries(queries)
    truth = None if ground_truth is None else read_ground_truth(ground_truth)
    if truth is not None and (len(truth) != len(vectors) or truth.shape[1] < k):
        raise InvalidInputError(
            f"the ground truth in {ground_truth} is {list(truth.shape)}, and must be [{len(vectors)}, {k} or more]"
        )
    return vectors, truth


def _connect(
    wanted: Targets,
    transport: str,
    tls: Tls | None,
    timeout_s: float,
    cache_bytes: int,
    allow_partial: bool | None,
    tracing: bool,
) -> Cluster:
    """Connects to the shards that have an owner.

    Raises:
        TransportError: a shard has none, and may not be left out.
            `allow_partial` None leaves it out if the shards are one graph.
    """
    n = len(wanted.owners)
    if not any(wanted.owners):
        raise _no_owner({at: f"shard {at}: no owner is noted in {OWNERS}" for at in range(n)}, n)
    with output.without_warnings():
        cluster = connect(
            wanted.owners,
            transport,
            tls=tls,
            timeout_s=timeout_s,
            cache_bytes=cache_bytes,
            allow_partial=True,
            collection=wanted.collection,
            tracing=tracing,
        )
    if cluster.lost and not (cluster.one_graph if allow_partial is None else allow_partial):
        cluster.close()
        raise _no_owner(cluster.lost, n)
    return cluster


def _no_owner(lost: Mapping[int, object], n_shards: int) -> TransportError:
    why = "; ".join(map(str, lost.values()))
    return TransportError(f"{len(lost)} of {n_shards} shards have no owner that answers: {why}", shard=min(lost))


def _timed(run: Callable[..., SearchResult], n_queries: int, *, quiet: bool) -> tuple[SearchResult, float]:
    """Runs a search under a progress bar, and returns its result and its seconds."""
    with output.progress_bar("queries", disable=quiet) as bar:
        task = bar.add_task("searching", total=n_queries)
        begin = time.perf_counter()
        result = run(progress=None if bar.disable else lambda done, _total: bar.update(task, completed=done))
        return result, time.perf_counter() - begin
