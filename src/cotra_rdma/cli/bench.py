"""`cotra bench`: recall against speed, beside other libraries, in one interleaved run."""

from __future__ import annotations

import functools
import os
import sys
from dataclasses import asdict
from pathlib import Path

from cotra_rdma._bench.build import BuildPoint, measure_builds
from cotra_rdma._bench.data import DataSet
from cotra_rdma._bench.environment import Environment
from cotra_rdma._bench.opening import Split, open_systems
from cotra_rdma._bench.plot import check_plot, draw
from cotra_rdma._bench.report import write_report
from cotra_rdma._bench.runner import Point, run
from cotra_rdma._bench.summary import compare
from cotra_rdma._bench.tables import builds_table, cost_table, speed_table, summary_table, title
from cotra_rdma.cli import bench_options as options
from cotra_rdma.cli import output
from cotra_rdma.cli.bench_scaling import refuse_others, run_study, scale_of
from cotra_rdma.cli.options import ConstructionEf, GraphM, GraphName, GroundTruth, Json, PartitionName

EPILOG = """**Examples**

cotra bench --dataset data/sift128 --transport shm,model:rtt=5us --ef 32,48,64,96 --beam 1,4

cotra bench --dataset data/sift128 --compare hnswlib,faiss,usearch,rabitqlib --threads 1,2 --report report.html

cotra bench --dataset glove-100-angular.hdf5 --rows 20000 --build --json > rows.jsonl

cotra bench --scaling --dataset data/sift128 --shards 1,2,4,8,16 --ef 12,16,20,24,32,48 --plot scaling.svg

QPS is the median of the repeats, each of which searches all queries in one call. p50 and p99 are of calls with one
query. Each repeat measures every configuration once, in turn. --json prints {"environment": ...} first, then one row a
line, and {"summary": ...} or {"scaling": ...} last.

--scaling measures one graph and independent shards at each number of --shards, and one shard of every 16th vector up
to all of them. It reads all figures off at recall 0.95, beside one hnswlib index of all vectors. From them it
predicts what 1 to 64 machines would do with 10^8 to 10^10 vectors; the documentation names the model's assumptions.
"""


@output.verb
def bench(
    dataset: options.Dataset = None,
    base: options.Base = None,
    queries: options.Queries = None,
    ground_truth: GroundTruth = None,
    metric: options.Metric = None,
    k: options.K = 10,
    ef: options.Ef = "16,24,32,48,64,96,128,192,256",
    beam: options.Beam = "8",
    transport: options.Transport = None,
    compare_with: options.CompareWith = "hnswlib",
    threads: options.Threads = "1",
    inflight: options.Inflight = "0",
    repeats: options.Repeats = 5,
    rows: options.Rows = None,
    build: options.Build = False,
    M: GraphM = 16,
    ef_construction: ConstructionEf = 200,
    cache: options.Cache = None,
    filter: options.Filter = None,
    plot: options.Plot = None,
    report: options.Report = None,
    algorithm: options.Algorithm = None,
    shards: options.Shards = None,
    graph: options.Graph = GraphName.INDEPENDENT,
    partition: options.Partition = PartitionName.KMEANS,
    ivf: options.Ivf = None,
    cache_bytes: options.CacheBytes = "0",
    queries_zipf: options.QueriesZipf = None,
    scaling: options.Scaling = False,
    machine: options.MachineSize = "16:512",
    halo: options.Halo = "0.25,0.5",
    local_share: options.LocalShare = None,
    as_json: Json = False,
) -> None:
    """Measure recall, speed and cost over a sweep of ef and beam, beside other libraries.

    These get the same M, ef_construction and threads, in the same run.
    """
    plan = options.plan_of(k, ef, beam, threads, inflight, repeats, M, ef_construction)
    scale = scale_of(transport, shards, machine, halo, local_share) if scaling else None
    if scaling:
        refuse_others(algorithm, filter, build, report, queries_zipf, cache_bytes, compare_with, threads, inflight)
    sweep = options.sweep_of(plan, transport, compare_with, cache_bytes, filter)
    _check_files(plot, report)
    data = options.data_of(dataset, base, queries, ground_truth, metric, rows, queries_zipf, k)
    kept = cache or _cache()
    if scale is not None:
        run_study(data, scale, plan, kept, plot=plot, as_json=as_json)
        return
    split = options.split_of(data, algorithm, shards, graph, partition, ivf) if algorithm else None
    found = _measure(data, sweep, split, kept, build=build, quiet=as_json)
    if plot is not None:
        draw(found.points, plot)
    if report is not None:
        found.write(report)
    found.print_json() if as_json else found.print()


def _check_files(plot: Path | None, report: Path | None) -> None:
    """Raises `InvalidInputError` if a plot or a report could not be written."""
    if plot is not None:
        check_plot(plot)
    if report is not None:
        check_plot(report, (".html", ".htm"))


def _cache() -> Path:
    """Returns the directory where built graphs are kept by default."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cotra-rdma"


def _measure(
    data: DataSet, sweep: options.Sweep, split: Split | None, cache: Path, *, build: bool, quiet: bool
) -> _Found:
    """Measures all systems over the sweep, and the builds if `build` is set, under a progress bar."""
    environment = Environment.now(sys.argv)
    points: list[Point] = []
    with output.phases(quiet=quiet) as progress:
        with open_systems(
            data,
            sweep.transports,
            sweep.plan,
            cache,
            libraries=sweep.libraries,
            split=split,
            budgets=sweep.budgets,
            progress=progress,
        ) as systems:
            for share in sweep.filters:
                what = "measuring" if share is None else f"measuring, filter {share:g}"
                points += run(data, systems, sweep.plan, functools.partial(progress, what), share=share)
        builds = measure_builds(data, sweep.plan, functools.partial(progress, "building")) if build else []
    return _Found(title(data, sweep.plan), environment.finished(), points, builds)


class _Found:
    """What was measured, and how it is shown."""

    def __init__(self, heading: str, environment: Environment, points: list[Point], builds: list[BuildPoint]) -> None:
        self.points = points
        self._heading, self._environment, self._builds = heading, environment, builds
        self._summary = compare(points)
        self._tables = [speed_table(points), cost_table(points), *([builds_table(builds)] if builds else [])]
        self._shown = summary_table(self._summary, points)

    def write(self, path: Path) -> None:
        """Writes all of it to one page of HTML."""
        write_report(path, self._heading, self._environment, self._shown, self._tables, self.points)

    def print_json(self) -> None:
        """Prints one object a line: the environment, the rows, the builds and the summary."""
        output.print_json({"environment": asdict(self._environment)})
        for point in self.points:
            output.print_json(asdict(point))
        for row in self._builds:
            output.print_json({"build": asdict(row)})
        output.print_json({"summary": [asdict(line) for line in self._summary]})

    def print(self) -> None:
        """Prints the environment, the heading and the tables."""
        output.print_facts(self._environment.facts(), self._heading)
        for table in [*self._tables, self._shown]:
            output.print_table(table.columns, table.rows, title=table.title)
