"""`cotra bench`: recall against speed, beside other libraries, in one interleaved run."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Self

import typer

from cotra_rdma._bench.build import BuildPoint, measure_builds
from cotra_rdma._bench.data import DataSet
from cotra_rdma._bench.environment import Environment
from cotra_rdma._bench.libraries import LIBRARIES, check_libraries
from cotra_rdma._bench.plot import check_plot, draw
from cotra_rdma._bench.report import write_report
from cotra_rdma._bench.runner import Plan, Point, run
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


Dataset = Annotated[
    str | None,
    typer.Option(
        metavar="STEM_OR_FILE",
        show_default=False,
        help="DIR/NAME of NAME_base.npy, NAME_queries.npy and NAME_gt.npy, or an ann-benchmarks .hdf5.",
    ),
]
Base = Annotated[Path | None, input_file("Vectors, in place of those of the data set.")]
Queries = Annotated[Path | None, input_file("Queries, in place of those of the data set.")]
Metric = Annotated[
    MetricName | None, typer.Option(help="Default: the file's own, else the one the ground truth is sorted by.")
]
K = Annotated[int, typer.Option("--k", "-k", min=1, help="Answers to each query; recall is recall@k.")]
Ef = Annotated[str, typer.Option(metavar="N[,N...]", help="Candidates kept during a search, each at least k.")]
Beam = Annotated[
    str, typer.Option(metavar="N[,N...]", help="Nodes expanded a round at most; others have no such thing.")
]
Transport = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME[,NAME...]",
        show_default="shm",
        help="shm, verbs, rpc: an owner process on this host. shm+rpc: with --algorithm, the shards in turn. local: this "
        "process. "
        "model:rtt=5us:gbit=100:mreads=10: the same, and a fabric with that round trip, "
        "bandwidth and READ rate. May be repeated.",
    ),
]
CompareWith = Annotated[
    str,
    typer.Option(
        "--compare",
        metavar="NAME[,NAME...]",
        help="Measure these beside it: hnswlib, faiss, usearch, rabitqlib; or none.",
    ),
]
Threads = Annotated[str, typer.Option(metavar="N[,N...]", help="Threads that search, for every system.")]
Inflight = Annotated[
    str, typer.Option(metavar="N[,N...]", help="Queries in progress at once in a thread; 0: chosen by the engine.")
]
Repeats = Annotated[int, typer.Option(min=1, help="Measurements of each configuration.")]
Rows = Annotated[
    int | None,
    typer.Option(
        min=1,
        show_default=False,
        help="Use only the first vectors; the ground truth among them is computed.",
    ),
]
Build = Annotated[bool, typer.Option("--build", help="Measure building and packing too, beside hnswlib's building.")]
Cache = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        file_okay=False,
        show_default="~/.cache/cotra-rdma",
        help="Where built graphs are kept for the next run.",
    ),
]
Filter = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SHARE[,SHARE...]",
        show_default=False,
        help="Also search under random filters that let these shares of the vectors through: 0.5,0.1,0.01.",
    ),
]
Plot = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        dir_okay=False,
        show_default=False,
        help="Draw recall against QPS, and against bytes a query; with --scaling, what it found: .png, .svg or .pdf "
        "(needs matplotlib).",
    ),
]
Report = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        dir_okay=False,
        show_default=False,
        help="Write everything as one page that needs nothing else: .html (needs matplotlib).",
    ),
]
Algorithm = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME[,NAME...]",
        show_default=False,
        help="Search a collection of several shards by these algorithms: scatter-gather, compass, spire, cotra, "
        "compass+spire, compass+scatter-gather, auto; all: the first four.",
    ),
]
Shards = Annotated[
    str | None,
    typer.Option(
        metavar="N[,N...]",
        show_default="16; with --scaling 1,2,4,8,16",
        help="With --algorithm or --scaling: shards to split the vectors over.",
    ),
]
Graph = Annotated[GraphName, typer.Option(help="With --algorithm: how the shards are linked, as for `cotra build`.")]
Partition = Annotated[PartitionName, typer.Option(help="With --algorithm: how they are split, as for `cotra build`.")]
Ivf = Annotated[
    int | None,
    typer.Option(
        min=0,
        show_default="one for 100 vectors",
        help="With --algorithm: inverted lists over all shards, for spire.",
    ),
]
CacheBytes = Annotated[
    str,
    typer.Option(
        metavar="N[,N...]",
        help="With a reader's cache of so many bytes of records, or of such a share of the shards: 0,1000000,1%.",
    ),
]
QueriesZipf = Annotated[
    str | None,
    typer.Option(
        metavar="EXPONENT:N",
        show_default=False,
        help="Search for N queries that are drawn from the set by Zipf's law, some often: 1.0:20000. 0: all alike.",
    ),
]
Scaling = Annotated[
    bool,
    typer.Option(
        "--scaling",
        help="Study how cost grows with shards and with vectors, and predict what many machines would do. --transport is "
        "then one path, and the fabric of the predictions.",
    ),
]
Machine = Annotated[
    str,
    typer.Option(
        metavar="CORES:GB", help="With --scaling: a machine's cores that search, and its 10^9 bytes of memory."
    ),
]
Halo = Annotated[
    str,
    typer.Option(
        metavar="SHARE[,SHARE...]",
        help="With --scaling: records of other shards that a home peer keeps, as shares of its own; the prediction takes "
        "the most.",
    ),
]
LocalShare = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=1.0,
        show_default="measured",
        help="With --scaling: the part of a query's expansions that stays at its home peer, at the most --shards.",
    ),
]


@output.verb
def bench(
    dataset: Dataset = None,
    base: Base = None,
    queries: Queries = None,
    ground_truth: GroundTruth = None,
    metric: Metric = None,
    k: K = 10,
    ef: Ef = ("16,24,32,48,64,96,128,192,256"),
    beam: Beam = "8",
    transport: Transport = None,
    compare_with: CompareWith = "hnswlib",
    threads: Threads = "1",
    inflight: Inflight = "0",
    repeats: Repeats = 5,
    rows: Rows = None,
    build: Build = False,
    M: GraphM = 16,
    ef_construction: ConstructionEf = 200,
    cache: Cache = None,
    filter: Filter = None,
    plot: Plot = None,
    report: Report = None,
    algorithm: Algorithm = None,
    shards: Shards = None,
    graph: Graph = GraphName.INDEPENDENT,
    partition: Partition = PartitionName.KMEANS,
    ivf: Ivf = None,
    cache_bytes: CacheBytes = "0",
    queries_zipf: QueriesZipf = None,
    scaling: Scaling = False,
    machine: Machine = "16:512",
    halo: Halo = "0.25,0.5",
    local_share: LocalShare = None,
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
    libraries = _libraries(compare_with)
    transports = comma_list(transport or ["shm"])
    for name in transports:
        parse_transport(name)
    check_libraries(libraries, M=M, filtered=bool(shares))
    if plot is not None:
        check_plot(plot)
    if report is not None:
        check_plot(report, (".html", ".htm"))
    budgets, stream = _budgets(cache_bytes), None if queries_zipf is None else _stream(queries_zipf)
    if dataset is None and None in (base, queries, ground_truth):
        raise typer.BadParameter("give --dataset, or --base, --queries and --ground-truth", param_hint="--dataset")
    data = DataSet.open(
        dataset, base=base, queries=queries, ground_truth=ground_truth, metric=metric.value if metric else None
    )
    data = _part_of(data, rows, stream, k)
    kept = cache or _cache()
    if scale is not None:
        run_study(data, scale, plan, kept, plot=plot, as_json=as_json)
        return
    split = None
    if algorithm:
        lists = data.vectors.count // 100 if ivf is None else ivf
        split = Split(_algorithms(algorithm), counts, partition.value, lists, graph.value)
    environment = Environment.now(sys.argv)
    with _Progress(quiet=as_json) as progress:
        points = _measure(data, plan, kept, progress, transports, libraries, split, budgets, shares)
        builds = measure_builds(data, plan, functools.partial(progress, "building")) if build else []
    found = _Found(title(data, plan), environment.finished(), points, builds)
    if plot is not None:
        draw(points, plot)
    if report is not None:
        found.write(report)
    found.print_json() if as_json else found.print()


class _Progress:
    """A bar on stderr; called with what is done, how much, and of how much."""

    def __init__(self, *, quiet: bool) -> None:
        self._bar = output.progress_bar("", disable=quiet)

    def __enter__(self) -> Self:
        self._bar.__enter__()
        self._task = self._bar.add_task("", total=1)
        return self

    def __exit__(self, *why: Any) -> None:
        self._bar.__exit__(*why)

    def __call__(self, what: str, done: int, total: int) -> None:
        self._bar.update(self._task, description=what, completed=done, total=total)


def _part_of(data: DataSet, rows: int | None, stream: tuple[float, int] | None, k: int) -> DataSet:
    """The first rows, queried by a stream, where these were asked for."""
    if rows is not None:
        data = data.first(rows)
    if stream is not None:
        data = data.drawn(*stream)
    if data.ground_truth.shape[1] < k:
        raise typer.BadParameter(f"the ground truth has {data.ground_truth.shape[1]} for each query", param_hint="--k")
    return data


def _measure(
    data: DataSet,
    plan: Plan,
    cache: Path,
    progress: Callable[[str, int, int], None],
    transports: list[str],
    libraries: list[str],
    split: Split | None,
    budgets: list[Budget],
    shares: list[float],
) -> list[Point]:
    """All systems over the sweep, without a filter and then under each."""
    with open_systems(
        data, transports, plan, cache, libraries=libraries, split=split, budgets=budgets, progress=progress
    ) as systems:
        points = []
        for share in [None, *shares]:
            what = "measuring" if share is None else f"measuring, filter {share:g}"
            points += run(data, systems, plan, functools.partial(progress, what), share=share)
    return points


class _Found:
    """What was measured, and how it is told."""

    def __init__(self, heading: str, environment: Environment, points: list[Point], builds: list[BuildPoint]) -> None:
        self._heading, self._environment, self._points, self._builds = heading, environment, points, builds
        self._summary = compare(points)
        self._tables = [speed_table(points), cost_table(points), *([builds_table(builds)] if builds else [])]
        self._shown = summary_table(self._summary, points)

    def write(self, path: Path) -> None:
        """One page of everything."""
        write_report(path, self._heading, self._environment, self._shown, self._tables, self._points)

    def print_json(self) -> None:
        """One object a line."""
        output.print_json({"environment": asdict(self._environment)})
        for point in self._points:
            output.print_json(asdict(point))
        for row in self._builds:
            output.print_json({"build": asdict(row)})
        output.print_json({"summary": [asdict(line) for line in self._summary]})

    def print(self) -> None:
        """Tables."""
        for name, fact in self._environment.facts().items():
            output.out.print(f"{name}: {fact}", markup=False, soft_wrap=True)
        output.out.print(self._heading, markup=False, soft_wrap=True)
        for table in [*self._tables, self._shown]:
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
