"""`cotra search`: queries from a file, answers from shards that are served."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from cotra_rdma._native.channel import DEFAULT_TIMEOUT_S
from cotra_rdma._reader.connect import connect
from cotra_rdma._reader.cost_model import Prediction
from cotra_rdma._reader.result import SearchResult
from cotra_rdma._routing.router import DEFAULT_TARGET
from cotra_rdma.cli import output
from cotra_rdma.cli.options import (
    TRANSPORTS,
    GroundTruth,
    Json,
    Threads,
    TlsCa,
    TlsCert,
    TlsKey,
    input_file,
    tls_of,
    transports,
)
from cotra_rdma.cli.targets import reachable, targets
from cotra_rdma.datasets import read_ground_truth, read_queries, recall
from cotra_rdma.errors import InvalidInputError

EPILOG = """**Examples**

cotra search index --queries queries.fvecs

cotra search 10.0.0.1:7700 10.0.0.1:7701 --queries queries.fvecs --k 10 --ef 128 --out answers.npz

cotra search 10.0.0.1:7700,10.0.0.2:7700 10.0.0.3:7700 --queries queries.fvecs

cotra search index --queries queries.fvecs --algorithm home

cotra search 127.0.0.1:7700 --queries sift.hdf5 --ground-truth sift.hdf5 --transport shm --json

The third has two owners of the first shard: the first that answers is read. A collection is searched at the addresses that
`cotra serve` noted in its owners.json; of the collection itself only collection.json is needed.
"""

SHOWN_QUERIES, SHOWN_ANSWERS = 3, 10


Shards = Annotated[
    list[str],
    typer.Argument(
        metavar="ADDRESS|COLLECTION",
        help="HOST:PORT of each shard's owner, with commas between several owners of one shard; or a directory that "
        "`cotra build` made, or its collection.json, for all its shards.",
    ),
]
Queries = Annotated[Path, input_file('Vectors to search for; of an HDF5 file its "test" set.')]
K = Annotated[int, typer.Option("--k", "-k", min=1, help="Answers to each query.")]
Ef = Annotated[
    int, typer.Option(min=1, help="Candidates kept during a search, at least k: more is slower and finds more.")
]
Beam = Annotated[int, typer.Option(min=1, help="Nodes expanded a round at most: more is fewer round trips.")]
Transport = Annotated[
    str, typer.Option(metavar="NAME", help="auto (verbs, else shm on the same host, else rpc), verbs, shm or rpc.")
]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        dir_okay=False,
        show_default=False,
        help="Write the answers: .npz of ids, distances (both [n, k]) and incomplete [n], or .npy of both as fields.",
    ),
]
Timeout = Annotated[
    float | None,
    typer.Option(
        min=0.001,
        metavar="S",
        show_default=False,
        help="How long the search may take, and the longest wait for an owner when connecting, in seconds. Default: a search "
        "takes as long as it goes on, and any one answer is waited for 5 s.",
    ),
]
Algorithm = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="auto: what the cost model says is quickest. cotra: read the graphs. home: the owner of most of a query's "
        "neighbourhood walks the graph (`cotra serve --walk`). scatter-gather: the owners search. "
        "spire: read inverted lists, --ef of them (`cotra build --ivf`). compass, compass+scatter-gather, "
        "compass+spire: ask only shards that hold a query's neighbours (`cotra build --partition kmeans`).",
    ),
]
TargetRecall = Annotated[
    float,
    typer.Option(min=0.01, max=1.0, help="Of Compass: the recall to keep, of that which asking every shard has."),
]
OwnerCpu = Annotated[bool, typer.Option("--owner-cpu", help="Let auto have owners search whose memory could be read.")]
Explain = Annotated[
    bool,
    typer.Option(
        "--explain",
        help="Tell what the cost model expected of each way, beside what was measured; auto always does.",
    ),
]
AllowPartial = Annotated[
    bool | None,
    typer.Option(
        "--allow-partial/--no-allow-partial",
        show_default=False,
        help="Answer without the shards that fail or have no owner, and name them; or fail. Default: answer where the "
        "shards are one graph.",
    ),
]
CacheBytes = Annotated[
    int,
    typer.Option(min=0, metavar="N", help="Keep records that are read often, in N bytes at most; 0: none."),
]
MaxExpansions = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        show_default=False,
        help="End each walk after N records, and say which queries that cut short.",
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
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_ca: TlsCa = None,
    as_json: Json = False,
) -> None:
    """Search shards that are served, and say what it took.

    QPS is for the whole batch; latency percentiles are of one query from its start to its last shard's answer.
    """
    if out is not None and out.suffix not in (".npy", ".npz"):
        raise typer.BadParameter(f"{out} must end in .npy or .npz", param_hint="--out")
    if out is not None and not out.parent.is_dir():
        raise typer.BadParameter(f"{out.parent} is no directory", param_hint="--out")
    transports([transport], ("auto", *TRANSPORTS))
    wanted = targets(shards)
    vectors = read_queries(queries)
    truth = None if ground_truth is None else read_ground_truth(ground_truth)
    if truth is not None and (len(truth) != len(vectors) or truth.shape[1] < k):
        raise InvalidInputError(
            f"{ground_truth}: ground truth is {list(truth.shape)}, and must be [{len(vectors)}, {k} or more] here"
        )
    patience = timeout or DEFAULT_TIMEOUT_S
    tls = tls_of(tls_cert, tls_key, tls_ca)
    owners, missing, lenient = reachable(wanted, patience, allow_partial=allow_partial, tls=tls)
    with (
        connect(
            owners, transport=transport, tls=tls, timeout_s=patience, cache_bytes=cache_bytes, allow_partial=lenient
        ) as cluster,
        output.progress_bar("queries", disable=as_json) as bar,
    ):
        task = bar.add_task("searching", total=len(vectors))
        begin = time.perf_counter()
        result = cluster.search(
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
            progress=None if bar.disable else lambda done, _total: bar.update(task, completed=done),
            max_expansions=max_expansions,
        )
        seconds = time.perf_counter() - begin
        names = [address or shard.name for address, shard in zip(cluster.addresses, wanted, strict=True)]
    if out is not None:
        _write(out, result)
    failures = {names[at]: missing.get(at) or str(error) for at, error in sorted(result.failures.items())}
    summary = _summary(result, seconds, names, failures)
    summary["unreached"] = {names[at]: why for at, why in missing.items() if at not in result.failures}
    summary = {"recall": None if truth is None else recall(result.ids, truth), **summary}
    if as_json:
        output.print_json({**summary, "queries": len(vectors), "k": k, "ef": ef, "beam": beam, "n_threads": threads})
    else:
        _show(summary, result, len(vectors), k)
        if failures and allow_partial is None:
            output.print_warning(f"the answer is without {', '.join(failures)}; --no-allow-partial makes that an error")


def _write(path: Path, result: SearchResult) -> None:
    if path.suffix == ".npz":
        np.savez(path, ids=result.ids, distances=result.distances, incomplete=result.incomplete)
        return
    answers = np.empty(result.ids.shape, [("id", "<i8"), ("distance", "<f4")])
    answers["id"], answers["distance"] = result.ids, result.distances
    np.save(path, answers)


def _summary(result: SearchResult, seconds: float, names: list[str], failures: dict[str, str]) -> dict[str, Any]:
    """`names`: of all shards, their owners' addresses mostly; `failures`: why some are missing."""
    p50, p99 = np.percentile(result.stats["latency_ns"] / 1e3, (50, 99))
    return {
        "qps": len(result.ids) / seconds,
        "p50_us": float(p50),
        "p99_us": float(p99),
        "reads_per_query": float(result.stats["reads"].mean()),
        "cached_records_per_query": float(result.stats["cached_records"].mean()),
        "rounds_per_query": float(result.stats["rounds"].mean()),
        "bytes_per_query": float(result.stats["read_bytes"].mean()),
        "pushed_per_query": float(result.stats["pushed"].mean()),
        "own_per_query": float(result.stats["own"].mean()),
        "local_share": None if math.isnan(result.local_share) else result.local_share,
        "walked_at_home": None if result.homes is None else int((result.homes >= 0).sum()),
        "transports": dict(zip(names, result.transports, strict=True)),
        "coverage": result.coverage,
        "incomplete": int(result.incomplete.sum()),
        "failures": failures,
        "algorithm": result.algorithm,
        "shards_per_query": float(result.asked.mean()),
        "predictions": [
            {**asdict(expected), "seconds": expected.seconds if math.isfinite(expected.seconds) else None}
            for expected in result.predictions
        ],
    }


def _explain(summary: dict[str, Any], result: SearchResult, n_queries: int) -> None:
    columns = ("way", ">batch, ms", ">READs", ">rounds", ">KiB", ">owners' CPU, us", ">shards", "")

    def row(name: str, ms: float, p: Prediction, remark: str) -> tuple[str, ...]:
        counts = (f"{p.reads:.1f}", f"{p.rounds:.1f}", f"{p.bytes / 1024:.1f}", f"{p.owner_cpu_s * 1e6:.1f}")
        return (name, f"{ms:,.2f}", *counts, f"{p.shards:.2f}", remark)

    rows = []
    for at, expected in enumerate(result.predictions):
        remark = "taken" if at == 0 else expected.why
        rows.append(row(f"{expected.algorithm}, expected", expected.seconds * 1e3, expected, remark))
    measured = Prediction(
        result.algorithm,
        n_queries / summary["qps"],
        summary["reads_per_query"],
        summary["rounds_per_query"],
        summary["bytes_per_query"],
        0.0,
        summary["shards_per_query"],
    )
    rows.append(
        (
            *row(f"{result.algorithm}, measured", measured.seconds * 1e3, measured, "")[:5],
            "-",
            *row("", 0, measured, "")[6:],
        )
    )
    output.print_table(columns, rows)


def _homes(summary: dict[str, Any], n_queries: int) -> list[tuple[str, str]]:
    at_home = summary["walked_at_home"]
    if at_home is None:
        return []
    here = n_queries - at_home
    return [
        ("walked at home", f"{at_home:,}" + (f", and {here:,} from here: their homes did not answer" if here else ""))
    ]


def _show(summary: dict[str, Any], result: SearchResult, n_queries: int, k: int) -> None:
    without = ", ".join(summary["failures"])
    share_of = "shards and queries" if summary["incomplete"] else "the shards"
    output.print_table(
        ("", ""),
        [
            ("queries", f"{n_queries:,}"),
            (f"recall@{k}", "no ground truth given" if summary["recall"] is None else f"{summary['recall']:.4f}"),
            ("queries a second", f"{summary['qps']:,.0f}"),
            ("latency", f"p50 {summary['p50_us']:,.0f} us, p99 {summary['p99_us']:,.0f} us"),
            ("READs per query", f"{summary['reads_per_query']:.1f}"),
            ("records from the cache", f"{summary['cached_records_per_query']:.1f} per query"),
            ("from own memory", f"{summary['own_per_query']:.1f} per query"),
            (
                "own memory or cache",
                "-" if (share := summary["local_share"]) is None else f"{share:.0%} of all records",
            ),
            *_homes(summary, n_queries),
            ("expanded by owners", f"{summary['pushed_per_query']:.1f} per query"),
            ("rounds per query", f"{summary['rounds_per_query']:.1f}"),
            ("read per query", output.human_bytes(summary["bytes_per_query"])),
            *((f"path to {address}", path) for address, path in summary["transports"].items()),
            ("coverage", f"{summary['coverage']:.0%} of {share_of}{without and f', without {without}'}"),
            *(
                [("cut short by --max-expansions", f"{summary['incomplete']:,} queries, which coverage leaves out")]
                if summary["incomplete"]
                else []
            ),
            *((f"no answer from {address}", why) for address, why in summary["failures"].items()),
            *((f"not reached: {shard}", f"{why}; the peers did") for shard, why in summary["unreached"].items()),
            ("algorithm", summary["algorithm"]),
            ("shards per query", f"{summary['shards_per_query']:.2f}"),
        ],
    )
    if result.predictions:
        _explain(summary, result, n_queries)
    for number, (ids, distances) in enumerate(zip(result.ids[:SHOWN_QUERIES], result.distances, strict=False)):
        there = [f"{i} ({distance:.4g})" for i, distance in zip(ids, distances, strict=True) if i >= 0]
        more = f"  and {len(there) - SHOWN_ANSWERS} more" if len(there) > SHOWN_ANSWERS else ""
        output.out.print(f"query {number}: {'  '.join(there[:SHOWN_ANSWERS]) or 'no answer'}{more}", soft_wrap=True)
