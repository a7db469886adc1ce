"""The rows of a benchmark as tables of text, for the terminal and the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cotra_rdma._bench.build import BuildPoint
from cotra_rdma._bench.data import DataSet
from cotra_rdma._bench.runner import Plan, Point
from cotra_rdma._bench.summary import Comparison, Ratio, label, why_not


@dataclass(frozen=True, slots=True)
class Table:
    """A table of text. A column whose name begins with ">" is aligned right."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def trimmed(self) -> Table:
        """Returns the table without the columns that hold no figure."""
        kept = [at for at in range(len(self.columns)) if any(row[at] != "-" for row in self.rows)]
        return Table(self.title, [self.columns[at] for at in kept], [[row[at] for at in kept] for row in self.rows])


def number(value: float | None, digits: int = 1) -> str:
    """Formats a figure, or "-" for None."""
    return "-" if value is None else f"{value:,.{digits}f}"


def kib(value: float | None) -> str:
    """Formats bytes as KiB."""
    return number(None if value is None else value / 1024)


def spread(ratio: Ratio | None) -> str:
    """Formats the median of a ratio, and its range."""
    return "-" if ratio is None else f"{ratio.median:.2f} ({ratio.min:.2f}-{ratio.max:.2f})"


def title(data: DataSet, plan: Plan) -> str:
    """Returns a line that says what was measured."""
    return (
        f"{data.name}: {data.vectors.count:,} x {data.vectors.dim}, {data.metric}, {len(data.queries):,} queries; "
        f"M={plan.M}, ef_construction={plan.ef_construction}, {plan.repeats} repeats"
    )


def speed_table(points: Sequence[Point]) -> Table:
    """Makes the table of recall and speed, with a row for each point."""
    columns = ["system", ">ef", f">recall@{points[0].k}", ">QPS", ">(min-max)", ">batch overhead", ">p50 us", ">p99 us"]
    columns += [">call us", ">overhead us", ">p50/model"]
    rows = [
        (
            label(point),
            str(point.ef),
            f"{point.recall:.4f}",
            number(point.qps, 0),
            f"{point.qps_min:,.0f}-{point.qps_max:,.0f}",
            "-" if point.batch_overhead is None else f"{100 * point.batch_overhead:.2f} %",
            number(point.p50_us, 0),
            number(point.p99_us, 0),
            number(point.call_us, 0),
            number(point.overhead_us),
            number(point.latency_model_ratio, 2),
        )
        for point in _in_order(points)
    ]
    return Table("Recall and speed", columns, rows).trimmed()


def cost_table(points: Sequence[Point]) -> Table:
    """Makes the table of what a query cost on average, for systems that count it."""
    columns = ["system", ">ef", f">recall@{points[0].k}", ">READs", ">cached", ">rounds", ">KiB", ">distances"]
    columns += [">shards", ">CPU us", ">owner CPU us"]
    rows = [
        (
            label(point),
            str(point.ef),
            f"{point.recall:.4f}",
            number(point.reads_per_query),
            number(point.cached_records_per_query if point.cache_bytes else None),
            number(point.rounds_per_query),
            kib(point.bytes_per_query),
            number(point.distances_per_query, 0),
            number(point.shards_per_query, 2),
            number(point.cpu_us_per_query),
            number(point.owner_cpu_us_per_query),
        )
        for point in _in_order(points)
        if point.reads_per_query is not None
    ]
    return Table("What a query cost", columns, rows).trimmed()


def _in_order(points: Sequence[Point]) -> list[Point]:
    return sorted(points, key=lambda point: (label(point), point.ef))


def summary_table(summary: Sequence[Comparison], points: Sequence[Point]) -> Table:
    """Makes the table of curves at equal recall."""
    libraries = list(dict.fromkeys(line.system for line in summary if line.transport is None))
    columns = [">recall", "system", ">QPS", *(f">x {name}" for name in libraries)]
    columns += [">x 1 thread", ">x zero RTT", ">READs", ">rounds", ">KiB"]
    rows = [
        (
            f"{line.recall}",
            label(line),
            number(line.qps, 0) if line.qps is not None else why_not(points, line),
            *(spread(line.qps_ratios.get(name)) for name in libraries),
            spread(line.threads_ratio),
            spread(line.zero_rtt_ratio),
            number(line.reads_per_query),
            number(line.rounds_per_query),
            kib(line.bytes_per_query),
        )
        for line in summary
    ]
    return Table(
        "At equal recall, interpolated: ratios of QPS, with their range over the repeats", columns, rows
    ).trimmed()


def builds_table(builds: Sequence[BuildPoint]) -> Table:
    """Makes the table of builds."""
    columns = [">threads", ">seconds", ">(min-max)", ">hnswlib", ">(min-max)", ">ratio", ">image bytes", ">image/raw"]
    columns += [">bytes a record", ">of them padding"]
    rows = [
        (
            str(row.n_threads),
            number(row.seconds, 2),
            f"{row.seconds_min:.2f}-{row.seconds_max:.2f}",
            number(row.hnswlib_seconds, 2),
            f"{row.hnswlib_seconds_min:.2f}-{row.hnswlib_seconds_max:.2f}",
            spread(row.seconds_ratio),
            f"{row.image_bytes:,}",
            number(row.image_ratio, 2),
            f"{row.record_bytes:,}",
            f"{row.record_padding_bytes:,}",
        )
        for row in builds
    ]
    return Table("Building and packing, beside hnswlib's building", columns, rows)
