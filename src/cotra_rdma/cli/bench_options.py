"""The options of `cotra bench`: their help, and how their texts are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from cotra_rdma._bench.data import DataSet
from cotra_rdma._bench.libraries import LIBRARIES, check_libraries
from cotra_rdma._bench.opening import Budget, Split
from cotra_rdma._bench.runner import Plan
from cotra_rdma._bench.transports import parse_transport
from cotra_rdma._reader.planner import ALGORITHMS
from cotra_rdma.cli.options import GraphName, MetricName, PartitionName, comma_list, input_file, numbers

FOUR = ("scatter-gather", "compass", "spire", "cotra")
"""The algorithms that `--algorithm all` stands for."""
N_SHARDS = 16

Dataset = Annotated[
    str | None,
    typer.Option(
        metavar="STEM_OR_FILE",
        show_default=False,
        help="The data set: DIR/NAME for NAME_base.npy, NAME_queries.npy and NAME_gt.npy, or an ann-benchmarks .hdf5.",
    ),
]
Base = Annotated[Path | None, input_file("The vectors, in place of those of the data set.")]
Queries = Annotated[Path | None, input_file("The queries, in place of those of the data set.")]
Metric = Annotated[
    MetricName | None,
    typer.Option(help="The metric. Default: the file's own, or else the one that the ground truth is sorted by."),
]
K = Annotated[int, typer.Option("--k", "-k", min=1, help="The number of answers to a query. Recall is recall@k.")]
Ef = Annotated[str, typer.Option(metavar="N[,N...]", help="The candidates that a search keeps, each at least k.")]
Beam = Annotated[
    str,
    typer.Option(metavar="N[,N...]", help="The most nodes that a round expands. Other libraries have no such option."),
]
Transport = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME[,NAME...]",
        show_default="shm",
        help="shm, verbs, rpc: an owner process on this host. "
        "shm+rpc: with --algorithm, the shards alternate between the two. "
        "local: this process. "
        "model:rtt=5us:gbit=100:mreads=10: this process, behind a modelled fabric with that round trip, bandwidth and "
        "READ rate. May be repeated.",
    ),
]
CompareWith = Annotated[
    str,
    typer.Option(
        "--compare",
        metavar="NAME[,NAME...]",
        help="The libraries to measure in the same run: hnswlib, faiss, usearch, rabitqlib; or none.",
    ),
]
Threads = Annotated[str, typer.Option(metavar="N[,N...]", help="The threads that search, for every system.")]
Inflight = Annotated[
    str,
    typer.Option(metavar="N[,N...]", help="The queries in progress at once in a thread. 0: the engine chooses."),
]
Repeats = Annotated[int, typer.Option(min=1, help="How often each configuration is measured.")]
Rows = Annotated[
    int | None,
    typer.Option(
        min=1,
        show_default=False,
        help="Use only the first vectors. The ground truth among them is computed.",
    ),
]
Build = Annotated[bool, typer.Option("--build", help="Also measure building and packing, beside hnswlib's building.")]
Cache = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        file_okay=False,
        show_default="~/.cache/cotra-rdma",
        help="The directory that keeps built graphs for the next run.",
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
        help="Draw recall against QPS and against bytes a query, or what --scaling found, to a .png, .svg or .pdf. "
        "Needs matplotlib.",
    ),
]
Report = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        dir_okay=False,
        show_default=False,
        help="Write everything to one .html page that needs no other file. Needs matplotlib.",
    ),
]
Algorithm = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME[,NAME...]",
        show_default=False,
        help="Search a collection of several shards by these algorithms: scatter-gather, compass, spire, cotra, "
        "compass+spire, compass+scatter-gather, auto. all: the first four.",
    ),
]
Shards = Annotated[
    str | None,
    typer.Option(
        metavar="N[,N...]",
        show_default="16; with --scaling 1,2,4,8,16",
        help="With --algorithm or --scaling: the numbers of shards.",
    ),
]
Graph = Annotated[GraphName, typer.Option(help="With --algorithm: how the shards are linked, as for `cotra build`.")]
Partition = Annotated[
    PartitionName, typer.Option(help="With --algorithm: how the rows are split, as for `cotra build`.")
]
Ivf = Annotated[
    int | None,
    typer.Option(
        min=0,
        show_default="one for 100 vectors",
        help="With --algorithm: the number of inverted lists over all shards, for spire.",
    ),
]
CacheBytes = Annotated[
    str,
    typer.Option(
        metavar="N[,N...]",
        help="The size of the reader's cache of records, in bytes or as a share of the shards: 0,1000000,1%.",
    ),
]
QueriesZipf = Annotated[
    str | None,
    typer.Option(
        metavar="EXPONENT:N",
        show_default=False,
        help="Search for N queries that are drawn from the set by Zipf's law: 1.0:20000. "
        "With the exponent 0 all are drawn alike.",
    ),
]
Scaling = Annotated[
    bool,
    typer.Option(
        "--scaling",
        help="Study how cost grows with shards and with vectors, and predict what many machines would do. "
        "--transport then gives one path, and the fabric of the predictions.",
    ),
]
MachineSize = Annotated[
    str,
    typer.Option(
        metavar="CORES:GB", help="With --scaling: the cores of a machine that search, and its memory in 10^9 bytes."
    ),
]
Halo = Annotated[
    str,
    typer.Option(
        metavar="SHARE[,SHARE...]",
        help="With --scaling: the records of other shards that a home peer keeps, as shares of its own. "
        "The prediction takes the largest.",
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


class Sweep(NamedTuple):
    """What is measured: the plan, for each transport, library, cache budget and filter.

    Attributes:
        filters: for each filter the share of the vectors that it lets through; None for no filter.
    """

    plan: Plan
    transports: list[str]
    libraries: list[str]
    budgets: list[Budget]
    filters: list[float | None]


def plan_of(
    k: int, ef: str, beam: str, threads: str, inflight: str, repeats: int, M: int, ef_construction: int
) -> Plan:
    """Makes the plan of a run. Raises a usage error for a list that is malformed, or an ef that is below k."""
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
    return plan


def sweep_of(
    plan: Plan, transport: list[str] | None, compare_with: str, cache_bytes: str, filters: list[str] | None
) -> Sweep:
    """Makes the sweep of a run.

    Raises:
        typer.BadParameter: an option is malformed.
        InvalidInputError: a transport is unknown, or a library cannot be measured in this way.
    """
    shares, libraries = _shares(filters or []), _libraries(compare_with)
    transports = comma_list(transport or ["shm"])
    for name in transports:
        parse_transport(name)
    check_libraries(libraries, M=plan.M, filtered=bool(shares))
    return Sweep(plan, transports, libraries, _budgets(cache_bytes), [None, *shares])


def data_of(
    dataset: str | None,
    base: Path | None,
    queries: Path | None,
    ground_truth: Path | None,
    metric: MetricName | None,
    rows: int | None,
    queries_zipf: str | None,
    k: int,
) -> DataSet:
    """Opens the data set: the first rows of it, queried by a stream, if that was asked for.

    Raises:
        typer.BadParameter: an option is malformed or missing, or the ground truth has fewer than k rows for a query.
        InvalidInputError, FormatError: as `DataSet.open`.
    """
    stream = None if queries_zipf is None else _stream(queries_zipf)
    if dataset is None and None in (base, queries, ground_truth):
        raise typer.BadParameter("give --dataset, or --base, --queries and --ground-truth", param_hint="--dataset")
    data = DataSet.open(
        dataset, base=base, queries=queries, ground_truth=ground_truth, metric=metric.value if metric else None
    )
    if rows is not None:
        data = data.first(rows)
    if stream is not None:
        data = data.drawn(*stream)
    if data.ground_truth.shape[1] < k:
        raise typer.BadParameter(
            f"the ground truth has only {data.ground_truth.shape[1]} rows for each query", param_hint="--k"
        )
    return data


def split_of(
    data: DataSet, algorithm: list[str], shards: str | None, graph: GraphName, partition: PartitionName, ivf: int | None
) -> Split:
    """Says how the data set is split over shards. Raises a usage error for an algorithm that is unknown."""
    lists = data.vectors.count // 100 if ivf is None else ivf
    counts = numbers(shards, "--shards") if shards else [N_SHARDS]
    return Split(_algorithms(algorithm), counts, partition.value, lists, graph.value)


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
            raise typer.BadParameter(
                f"{item!r} is no number of bytes, and no share such as 1%", param_hint="--cache-bytes"
            )
    return budgets or [Budget()]


def _stream(value: str) -> tuple[float, int]:
    exponent, _, n = value.partition(":")
    if not exponent.replace(".", "", 1).isdecimal() or not n.isdecimal() or int(n) < 1:
        raise typer.BadParameter(f"{value!r} is not EXPONENT:N, as in 1.0:20000", param_hint="--queries-zipf")
    return float(exponent), int(n)
