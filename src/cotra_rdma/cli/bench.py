"""`cotra bench`: recall against speed, beside other libraries, in one interleaved run."""

from __future__ import annotations

import functools
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cotra_rdma._bench.build import measure_builds
from cotra_rdma._bench.data import DataSet
from cotra_rdma._bench.environment import Environment
from cotra_rdma._bench.libraries import LIBRARIES, check_libraries
from cotra_rdma._bench.plot import check_plot, draw
from cotra_rdma._bench.report import write_report
from cotra_rdma._bench.runner import Plan, run
from cotra_rdma._bench.summary import compare
from cotra_rdma._bench.systems import Budget, Split, open_systems
from cotra_rdma._bench.tables import builds_table, cost_table, speed_table, summary_table, title
from cotra_rdma._bench.transports import parse_transport
from cotra_rdma._reader.planner import ALGORITHMS
from cotra_rdma.cli import output
from cotra_rdma.cli.bench_scaling import SHARDS, refuse_others, run_study, scale_of
from cotra_rdma.cli.options import (
    ConstructionEf,
    GraphM,
    GraphName,
    GroundTruth,
    Json,
    MetricName,
    PartitionName,
    comma_list,
    input_file,
    numbers,
)

EPILOG = """**Examples**

cotra bench --dataset data/sift128 --transport shm,model:rtt=5us --ef 32,48,64,96 --beam 1,4

cotra bench --dataset data/sift128 --compare hnswlib,faiss,usearch,rabitqlib --threads 1,2 --report report.html

cotra bench --dataset glove-100-angular.hdf5 --rows 20000 --build --json > rows.jsonl

cotra bench --scaling --dataset data/sift128 --shards 1,2,4,8,16 --ef 12,16,20,24,32,48 --plot scaling.svg

QPS is the median of the repeats for the whole batch of queries; p50 and p99 are of calls with one query. Every
configuration is measured once a repeat, in turn. With --json: first {"environment": ...}, then one row a line, and last
{"summary": ...}, or {"scaling": ...}.

--scaling measures one graph and independent shards at each number of --shards, and one shard of every 16th vector up to
all of them; reads all off at recall 0.95, beside one hnswlib index of everything; and predicts from that, by a model whose
assumptions the documentation names, what 1 to 64 machines would do with 10^8 to 10^10 vectors.
"""

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
        str, typer.Option(metavar="N[,N...]", help="Nodes expanded a round at most; others have no such thing.")
    ] = "8",
    transport: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[,NAME...]",
            show_default="shm",
            help="shm, verbs, rpc: an owner process on this host. shm+rpc: with --algorithm, the shards in turn. local: this "
            "process. "
            "model:rtt=5us:gbit=100:mreads=10: the same, and a fabric with that round trip, "
            "bandwidth and READ rate. May be repeated.",
        ),
    ] = None,
    compare_with: Annotated[
        str,
        typer.Option(
            "--compare",
            metavar="NAME[,NAME...]",
            help="Measure these beside it: hnswlib, faiss, usearch, rabitqlib; or none.",
        ),
    ] = "hnswlib",
    threads: Annotated[str, typer.Option(metavar="N[,N...]", help="Threads that search, for every system.")] = "1",
    inflight: Annotated[
        str, typer.Option(metavar="N[,N...]", help="Queries in progress at once in a thread; 0: chosen by the engine.")
    ] = "0",
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each configuration.")] = 5,
    rows: Annotated[
        int | None,
        typer.Option(
            min=1,
            show_default=False,
            help="Use only the first vectors; the ground truth among them is computed.",
        ),
    ] = None,
    build: Annotated[
        bool, typer.Option("--build", help="Measure building and packing too, beside hnswlib's building.")
    ] = False,
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
            help="Draw recall against QPS, and against bytes a query; with --scaling, what it found: .png, .svg or .pdf "
            "(needs matplotlib).",
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            dir_okay=False,
            show_default=False,
            help="Write everything as one page that needs nothing else: .html (needs matplotlib).",
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
    shards: Annotated[
        str | None,
        typer.Option(
            metavar="N[,N...]",
            show_default="16; with --scaling 1,2,4,8,16",
            help="With --algorithm or --scaling: shards to split the vectors over.",
        ),
    ] = None,
    graph: Annotated[
        GraphName, typer.Option(help="With --algorithm: how the shards are linked, as for `cotra build`.")
    ] = GraphName.INDEPENDENT,
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
    cache_bytes: Annotated[
        str,
        typer.Option(
            metavar="N[,N...]",
            help="With a reader's cache of so many bytes of records, or of such a share of the shards: 0,1000000,1%.",
        ),
    ] = "0",
    queries_zipf: Annotated[
        str | None,
        typer.Option(
            metavar="EXPONENT:N",
            show_default=False,
            help="Search for N queries that are drawn from the set by Zipf's law, some often: 1.0:20000. 0: all alike.",
        ),
    ] = None,
    scaling: Annotated[
        bool,
        typer.Option(
            "--scaling",
            help="Study how cost grows with shards and with vectors, and predict what many machines would do. --transport is "
            "then one path, and the fabric of the predictions.",
        ),
    ] = False,
    machine: Annotated[
        str,
        typer.Option(
            metavar="CORES:GB", help="With --scaling: a machine's cores that search, and its 10^9 bytes of memory."
        ),
    ] = "16:512",
    halo: Annotated[
        str,
        typer.Option(
            metavar="SHARE[,SHARE...]",
            help="With --scaling: records of other shards that a home peer keeps, as shares of its own; the prediction takes "
            "the most.",
        ),
    ] = "0.25,0.5",
    local_share: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            show_default="measured",
            help="With --scaling: the part of a query's expansions that stays at its home peer, at the most --shards.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure recall, speed and cost over a sweep of ef and beam, beside other libraries.

    These get the same M, ef_construction and threads, in the same run.
    """
    plan = Plan(
        k=k,
        efs=numbers(ef, "--ef"),
        beams=numbers(beam, "--beam"),
        threads=numbers(threads, "--threads"),
        inflights=numbers(inflight, "--inflight", low=0),
        repeats=repeats,
        M=M,
        ef_construction=ef_construction,
    )
    if plan.efs[0] < k:
        raise typer.BadParameter(f"{plan.efs[0]} is less than k = {k}", param_hint="--ef")
    counts = numbers(shards, "--shards") if shards else list(SHARDS if scaling else (16,))
    scale = scale_of(comma_list(transport or []), counts, machine, halo, local_share) if scaling else None
    if scaling:
        refuse_others(
            ("--algorithm", algorithm),
            ("--filter", filter),
            ("--build", build),
            ("--report", report),
            ("--queries-zipf", queries_zipf),
            ("--cache-bytes", cache_bytes != "0"),
            ("--compare", compare_with != "hnswlib"),
            ("--threads", threads != "1"),
            ("--inflight", inflight != "0"),
        )
    shares = _shares(filter or [])
    budgets = _budgets(cache_bytes)
    stream = None if queries_zipf is None else _stream(queries_zipf)
    libraries = _libraries(compare_with)
    transports = comma_list(transport or ["shm"])
    if dataset is None and None in (base, queries, ground_truth):
        raise typer.BadParameter("give --dataset, or --base, --queries and --ground-truth", param_hint="--dataset")
    for name in transports:
        parse_transport(name)
    check_libraries(libraries, M=M, filtered=bool(shares))
    if plot is not None:
        check_plot(plot)
    if report is not None:
        check_plot(report, (".html", ".htm"))
    data = DataSet.open(
        dataset, base=base, queries=queries, ground_truth=ground_truth, metric=metric.value if metric else None
    )
    if rows is not None:
        data = data.first(rows)
    if stream is not None:
        data = data.drawn(*stream)
    if data.ground_truth.shape[1] < k:
        raise typer.BadParameter(f"the ground truth has {data.ground_truth.shape[1]} for each query", param_hint="--k")
    if scale is not None:
        run_study(data, scale, plan, cache or _cache(), plot=plot, as_json=as_json)
        return
    split = None
    if algorithm:
        names = _algorithms(algorithm)
        lists = data.vectors.count // 100 if ivf is None else ivf
        split = Split(names, counts, partition.value, lists, graph.value)
    environment = Environment.now(sys.argv)
    with output.progress_bar("", disable=as_json) as bar:
        task = bar.add_task("", total=1)

        def progress(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        with open_systems(
            data,
            transports,
            plan,
            cache or _cache(),
            libraries=libraries,
            split=split,
            budgets=budgets,
            progress=progress,
        ) as systems:
            points = []
            for share in [None, *shares]:
                what = "measuring" if share is None else f"measuring, filter {share:g}"
                points += run(data, systems, plan, functools.partial(progress, what), share=share)
        builds = measure_builds(data, plan, functools.partial(progress, "building")) if build else []
    environment = environment.finished()
    summary = compare(points)
    heading = title(data, plan)
    tables = [speed_table(points), cost_table(points), *([builds_table(builds)] if builds else [])]
    shown = summary_table(summary, points)
    if plot is not None:
        draw(points, plot)
    if report is not None:
        write_report(report, heading, environment, shown, tables, points)
    if as_json:
        output.print_json({"environment": asdict(environment)})
        for point in points:
            output.print_json(asdict(point))
        for row in builds:
            output.print_json({"build": asdict(row)})
        output.print_json({"summary": [asdict(line) for line in summary]})
        return
    for name, fact in environment.facts().items():
        output.out.print(f"{name}: {fact}", markup=False, soft_wrap=True)
    output.out.print(heading, markup=False, soft_wrap=True)
    for table in [*tables, shown]:
        output.print_table(table.columns, table.rows, title=table.title)


def _libraries(value: str) -> list[str]:
    names = list(dict.fromkeys(comma_list([value])))
    if names == ["none"]:
        return []
    for name in names:
        if name not in LIBRARIES:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(LIBRARIES)}, none", param_hint="--compare")
    return names


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


def _budgets(value: str) -> list[Budget]:
    budgets = []
    for item in comma_list([value]):
        number = item.removesuffix("%")
        if item.isdecimal():
            budgets.append(Budget(nbytes=int(item)))
        elif number != item and number.replace(".", "", 1).isdecimal() and 0 < float(number) <= 100:
            budgets.append(Budget(share=float(number) / 100))
        else:
            raise typer.BadParameter(f"{item!r} is no number of bytes, and no share as 1%", param_hint="--cache-bytes")
    return budgets or [Budget()]


def _stream(value: str) -> tuple[float, int]:
    exponent, _, n = value.partition(":")
    if not exponent.replace(".", "", 1).isdecimal() or not n.isdecimal() or int(n) < 1:
        raise typer.BadParameter(f"{value!r} is not EXPONENT:N, as in 1.0:20000", param_hint="--queries-zipf")
    return float(exponent), int(n)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cotra-rdma"
