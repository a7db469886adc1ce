"""`cotra bench`: recall against speed, beside hnswlib, in one interleaved run."""

from __future__ import annotations

import functools
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cotra_rdma.benchmark import Comparison, DataSet, Plan, Point, compare, label, run
from cotra_rdma.benchmark_plot import check_plot, draw
from cotra_rdma.benchmark_systems import Split, open_systems
from cotra_rdma.cli import output
from cotra_rdma.cli.options import (
    ConstructionEf,
    GraphM,
    GroundTruth,
    Json,
    MetricName,
    PartitionName,
    Threads,
    comma_list,
    input_file,
    numbers,
)
from cotra_rdma.plan import ALGORITHMS

EPILOG = """**Examples**

cotra bench --dataset data/sift128 --transport shm,model:rtt=5us --ef 32,48,64,96 --beam 1,4

cotra bench --dataset glove-100-angular.hdf5 --threads 2 --json > rows.jsonl

QPS is the median of the repeats for the whole batch of queries; p50 and p99 are of calls with one query. Every
configuration is measured once a repeat, in turn. With --json: one row a line, and last {"summary": ...}.
"""

TARGETS = (0.95, 0.99)
FOUR = ("scatter-gather", "compass", "spire", "cotra")


@output.verb
def bench(
    dataset: Annotated[
        str | None,
        typer.Option(
            metavar="STEM_OR_FILE",
            show_default=False,
            help="DIR/NAME of NAME_base.npy, NAME_queries.npy and NAME_gt.npy, or an ann-benchmarks .hdf5.",
        ),
    ] = None,
    base: Annotated[Path | None, input_file("Vectors, in place of those of the data set.")] = None,
    queries: Annotated[Path | None, input_file("Queries, in place of those of the data set.")] = None,
    ground_truth: GroundTruth = None,
    metric: Annotated[
        MetricName | None, typer.Option(help="Default: the file's own, else the one the ground truth is sorted by.")
    ] = None,
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Answers to each query; recall is recall@k.")] = 10,
    ef: Annotated[str, typer.Option(metavar="N[,N...]", help="Candidates kept during a search, each at least k.")] = (
        "16,24,32,48,64,96,128,192,256"
    ),
    beam: Annotated[
        str, typer.Option(metavar="N[,N...]", help="Nodes expanded a round; hnswlib has no such thing.")
    ] = "4",
    transport: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[,NAME...]",
            show_default="shm",
            help="shm, verbs, rpc: an owner process on this host. local: this process. "
            "model:rtt=5us:gbit=100:mreads=10: the same, and a fabric with that round trip, "
            "bandwidth and READ rate. May be repeated.",
        ),
    ] = None,
    threads: Threads = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each configuration.")] = 5,
    M: GraphM = 16,
    ef_construction: ConstructionEf = 200,
    cache: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            file_okay=False,
            show_default="~/.cache/cotra-rdma",
            help="Where built graphs are kept for the next run.",
        ),
    ] = None,
    filter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SHARE[,SHARE...]",
            show_default=False,
            help="Also search under random filters that let these shares of the vectors through: 0.5,0.1,0.01.",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            dir_okay=False,
            show_default=False,
            help="Draw recall against QPS, and against bytes a query: .png, .svg or .pdf (needs matplotlib).",
        ),
    ] = None,
    algorithm: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[,NAME...]",
            show_default=False,
            help="Search a collection of several shards by these algorithms: scatter-gather, compass, spire, cotra, "
            "compass+spire, compass+scatter-gather, auto; all: the first four.",
        ),
    ] = None,
    shards: Annotated[int, typer.Option(min=1, help="With --algorithm: shards to split the vectors over.")] = 16,
    partition: Annotated[
        PartitionName, typer.Option(help="With --algorithm: how they are split, as for `cotra build`.")
    ] = PartitionName.KMEANS,
    ivf: Annotated[
        int | None,
        typer.Option(
            min=0,
            show_default="one for 100 vectors",
            help="With --algorithm: inverted lists over all shards, for spire.",
        ),
    ] = None,
    hnswlib: Annotated[bool, typer.Option("--hnswlib/--no-hnswlib", help="Measure hnswlib beside it.")] = True,
    as_json: Json = False,
) -> None:
    """Measure recall, speed and cost over a sweep of ef and beam, beside hnswlib.

    hnswlib gets the same M, ef_construction and threads, in the same run.
    """
    plan = Plan(
        k=k,
        efs=numbers(ef, "--ef"),
        beams=numbers(beam, "--beam"),
        n_threads=threads,
        repeats=repeats,
        M=M,
        ef_construction=ef_construction,
    )
    if plan.efs[0] < k:
        raise typer.BadParameter(f"{plan.efs[0]} is less than k = {k}", param_hint="--ef")
    shares = _shares(filter or [])
    if plot is not None:
        check_plot(plot)
    if dataset is None and None in (base, queries, ground_truth):
        raise typer.BadParameter("give --dataset, or --base, --queries and --ground-truth", param_hint="--dataset")
    data = DataSet.open(
        dataset, base=base, queries=queries, ground_truth=ground_truth, metric=metric.value if metric else None
    )
    split = None
    if algorithm:
        lists = max(shards, data.vectors.count // 100) if ivf is None else ivf
        split = Split(_algorithms(algorithm), shards, partition.value, lists)
    with output.progress_bar("", disable=as_json) as bar:
        task = bar.add_task("", total=1)

        def progress(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        with open_systems(
            data,
            comma_list(transport or ["shm"]),
            plan,
            cache or _cache(),
            with_hnswlib=hnswlib,
            split=split,
            progress=progress,
        ) as systems:
            points = []
            for share in [None, *shares]:
                what = "measuring" if share is None else f"measuring, filter {share:g}"
                report = functools.partial(progress, what)
                points += run(data, systems, plan, report, share=share)
    summary = compare(points, TARGETS)
    if plot is not None:
        draw(points, plot)
    if as_json:
        for point in points:
            output.print_json(asdict(point))
        output.print_json({"summary": [asdict(line) for line in summary]})
    else:
        _show(data, plan, points, summary)


def _algorithms(values: list[str]) -> list[str]:
    names = list(dict.fromkeys(n for v in comma_list(values) for n in (FOUR if v == "all" else (v,))))
    for name in names:
        if name not in ALGORITHMS:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(ALGORITHMS)}, all", param_hint="--algorithm")
    return names


def _shares(values: list[str]) -> list[float]:
    try:
        shares = [float(item) for item in comma_list(values)]
    except ValueError:
        shares = [0.0]
    if not all(0 < share < 1 for share in shares):
        raise typer.BadParameter(f"{','.join(values)} is not a list of shares between 0 and 1", param_hint="--filter")
    return shares


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cotra-rdma"


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _show(data: DataSet, plan: Plan, points: list[Point], summary: list[Comparison]) -> None:
    title = (
        f"{data.name}: {data.vectors.count:,} x {data.vectors.dim}, {data.metric}, {len(data.queries):,} queries; "
        f"M={plan.M}, ef_construction={plan.ef_construction}, threads={plan.n_threads}, repeats={plan.repeats}"
    )
    output.print_table(
        (
            "system",
            ">ef",
            f">recall@{plan.k}",
            ">QPS",
            ">(min-max)",
            ">p50 us",
            ">p99 us",
            ">READs",
            ">rounds",
            ">KiB",
            ">shards",
            ">owner CPU us",
        ),
        (
            (
                label(point),
                str(point.ef),
                f"{point.recall:.4f}",
                _number(point.qps, 0),
                f"{point.qps_min:,.0f}-{point.qps_max:,.0f}",
                _number(point.p50_us, 0),
                _number(point.p99_us, 0),
                _number(point.reads_per_query),
                _number(point.rounds_per_query),
                _number(None if point.bytes_per_query is None else point.bytes_per_query / 1024),
                _number(point.shards_per_query, 2),
                _number(point.owner_cpu_us_per_query),
            )
            for point in sorted(points, key=lambda point: (label(point), point.ef))
        ),
        title=title,
    )
    for line in summary:
        if line.qps is None:
            curve = [point.recall for point in points if label(point) == label(line)]
            why = "above it in the whole sweep" if min(curve) > line.recall else "not reached in this sweep"
            output.out.print(f"recall {line.recall}: {label(line)}: {why}")
            continue
        ratio = "" if line.qps_ratio is None or line.system == "hnswlib" else f", {line.qps_ratio:.2f} x hnswlib"
        cost = (
            ""
            if line.reads_per_query is None
            else (
                f", {line.reads_per_query:.1f} READs, {_number(line.rounds_per_query)} rounds, "
                f"{_number((line.bytes_per_query or 0) / 1024)} KiB a query"
            )
        )
        output.out.print(f"recall {line.recall}: {label(line)}: {line.qps:,.0f} QPS{ratio}{cost}", soft_wrap=True)
