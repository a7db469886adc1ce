"""A scaling study as tables of text."""

from __future__ import annotations

from cotra_rdma._bench.scaling.prediction import (
    MACHINES,
    ONE_GRAPH,
    PUBLISHED,
    ROUTED,
    SCATTER_GATHER,
    VECTORS,
    Fit,
    Prediction,
    predict,
)
from cotra_rdma._bench.scaling.study import Study
from cotra_rdma._bench.tables import Table, kib, number
from cotra_rdma._bench.transports import parse_transport


def scaling_tables(study: Study) -> list[Table]:
    """Makes all tables, in the order in which they are shown."""
    return [
        shards_table(study),
        homes_table(study),
        losses_table(study),
        sizes_table(study),
        workload_table(study),
        checks_table(study),
        *predictions_tables(study),
        variations_table(study),
        published_table(study),
        targets_table(study),
    ]


def shards_table(study: Study) -> Table:
    """Makes the table of what was measured at each number of shards."""
    columns = [">shards", "graph", ">recall", ">READs", ">rounds", ">distances", ">KiB", ">CPU us", ">QPS"]
    columns += [">QPS, fabric", ">p50 us, fabric", ">home share", ">recall lost", ">at ef"]
    rows = [
        (
            str(row.shards),
            "one" if row.one_graph else "independent",
            number(row.cost.recall, 3),
            number(row.cost.reads),
            number(row.cost.rounds, 2),
            number(row.cost.distances, 0),
            kib(row.cost.bytes),
            number(row.cost.cpu_us),
            number(row.cost.qps, 0),
            number(None if row.fabric is None else row.fabric.qps, 0),
            number(None if row.fabric is None else row.fabric.p50_us),
            number(row.home_share, 3),
            f"{row.recall_lost:+.4f}",
            str(row.recall_lost_at_ef),
        )
        for row in study.rows
    ]
    return Table(f"Shards: {study.dataset} over {study.transport}, at recall {study.recall}", columns, rows)


def homes_table(study: Study) -> Table:
    """Makes the table of what stays at home if queries are routed there."""
    columns = [">halo", ">records, of own", ">KiB, own vector", ">recall", ">own", ">own and halo"]
    rows = [
        (
            f"{row.halo:g}",
            number(row.held, 3),
            kib(row.held_bytes),
            number(row.recall, 3),
            number(row.own, 3),
            number(row.local, 3),
        )
        for row in study.homes
    ]
    what = f"Shares of a query's expansions at its home, {len(study.losses)} shards"
    return Table(f"{what}; the busiest home has {study.busiest:.2f} times the mean load", columns, rows)


def losses_table(study: Study) -> Table:
    """Makes the table of lost shards, with a row for each."""
    columns = [">without shard", ">vectors", ">neighbours it has", ">recall falls", ">READs", ">CPU", ">wall clock"]
    rows = [
        (
            str(row.shard),
            f"{row.vectors:,}",
            number(row.share, 4),
            number(row.recall_fall, 4),
            number(row.reads_ratio, 3),
            number(row.cpu_ratio, 3),
            number(row.time_ratio, 3),
        )
        for row in study.losses
    ]
    return Table("One shard lost: READs and times over those with all, at equal ef", columns, rows)


def sizes_table(study: Study) -> Table:
    """Makes the table of cost by vectors in one shard, beside the fit."""
    columns = [">vectors", ">recall", ">READs", ">fit", ">rounds", ">fit", ">distances", ">CPU us"]
    reads, rounds = study.workload.expansions, study.workload.rounds
    measured = [
        (
            f"{row.vectors:,}",
            number(row.cost.recall, 3),
            number(row.cost.reads),
            number(reads.at(row.vectors)),
            number(row.cost.rounds, 2),
            number(rounds.at(row.vectors), 2),
            number(row.cost.distances, 0),
            number(row.cost.cpu_us),
        )
        for row in study.sizes
    ]
    far = [(f"{n:,}", "-", "-", _with_error(reads, n, 1), "-", _with_error(rounds, n, 2), "-", "-") for n in VECTORS]
    return Table(
        "Vectors: one shard of some of them; fits a + b log2 n; beyond what was measured +- 2 standard errors",
        columns,
        measured + far,
    )


def _with_error(fit: Fit, n: float, digits: int) -> str:
    return f"{fit.at(n):.{digits}f} +- {2 * fit.standard_error(n):.{digits}f}"


def workload_table(study: Study) -> Table:
    """Makes the table of what goes into the predictions."""
    needs = study.workload
    rows = [
        ("READs", f"{needs.expansions.at_one:.2f} + {needs.expansions.per_doubling:.3f} log2 n"),
        ("rounds", f"{needs.rounds.at_one:.2f} + {needs.rounds.per_doubling:.3f} log2 n"),
        ("CPU us: a query in one shard, in several", f"{1e6 * needs.cpu_single_s:.1f}, {1e6 * needs.cpu_fixed_s:.1f}"),
        ("CPU us: an expansion", f"{1e6 * needs.cpu_expansion_s:.3f}"),
        ("CPU us: posting and completing a READ", f"{1e6 * needs.cpu_read_s:.3f}"),
        ("bytes: a READ", f"{needs.record_bytes:,.0f}"),
        ("bytes: a vector of an image", f"{needs.vector_bytes:,.1f}"),
        ("bytes: kept by every reader, a vector of the collection", f"{needs.kept_bytes:,.1f}"),
        ("bytes: of the halo, a vector of the own shard", f"{needs.halo_bytes:,.1f}"),
        ("expansions in an independent shard / in one as large by itself", f"{needs.independent:.2f}"),
        ("share of expansions that leave the home, a doubling of machines", f"{needs.remote_per_doubling:.3f}"),
    ]
    return Table("What goes into the prediction, measured", ["", ">"], rows)


def checks_table(study: Study) -> Table:
    """Makes the table of the model beside measurements."""
    columns = [">shards", ">QPS, model", ">QPS, measured", ">model/measured"]
    columns += [">latency us, model", ">p50 us, measured", ">model/measured"]
    rows = [
        (
            str(row.shards),
            number(row.qps_predicted, 0),
            number(row.qps, 0),
            number(row.qps_predicted / row.qps, 2),
            number(row.latency_us_predicted),
            number(row.latency_us),
            number(row.latency_us_predicted / row.latency_us, 2),
        )
        for row in study.checks
    ]
    return Table(f"The model and one thread over {study.fabric}", columns, rows)


def predictions_tables(study: Study) -> list[Table]:
    """Makes a table for each number of vectors.

    A speed-up is over one machine, whether it could hold the vectors or not.
    """
    known = {(row.system, row.machines, row.vectors): row for row in study.predictions}
    columns = [">machines", ">GB each", "fits", ">routed: million QPS", ">x 1", "bound by", ">READs", ">latency us"]
    columns += [">any peer: x 1", "bound by", ">scatter-gather: x 1", "bound by", ">latency us"]
    tables = []
    for n in VECTORS:
        one = known[ONE_GRAPH, 1, n].qps
        rows = []
        for m in MACHINES:
            routed, anywhere, scattered = (known[system, m, n] for system in (ROUTED, ONE_GRAPH, SCATTER_GATHER))
            rows.append(
                (
                    str(m),
                    number(routed.memory_bytes / 1e9, 0),
                    "yes" if routed.fits else "no",
                    number(routed.qps / 1e6, 2),
                    number(routed.qps / one),
                    routed.limit,
                    number(routed.reads),
                    number(1e6 * routed.latency_s, 0),
                    *_speedup(anywhere, one),
                    *_speedup(scattered, one),
                    number(1e6 * scattered.latency_s, 0),
                )
            )
        kind = study.machine
        what = f"Predicted: {n:,} vectors, machines of {kind.cores} cores and {kind.memory_bytes / 1e9:,.0f} GB"
        tables.append(Table(f"{what}, {study.fabric}", columns, rows))
    return tables


def _speedup(row: Prediction, one: float) -> tuple[str, str]:
    return number(row.qps / one), row.limit


def variations_table(study: Study) -> Table:
    """Makes the table of predictions with one assumption changed."""
    columns = ["16 machines, 1,000,000,000 vectors", ">million QPS", ">x 1", "bound by", ">latency us"]
    rows = [
        (
            row.what,
            number(row.prediction.qps / 1e6, 2),
            number(row.speedup),
            row.prediction.limit,
            number(1e6 * row.prediction.latency_s, 0),
        )
        for row in study.variations
    ]
    return Table("Predicted, with one assumption changed", columns, rows)


def published_table(study: Study) -> Table:
    """Makes the table of what others measured.

    Beside it is the prediction for as many machines and, if that is known, as many vectors.
    """
    fabric = parse_transport(study.fabric)[1]
    assert fabric is not None
    rows = []
    for line in PUBLISHED:
        vectors = line.vectors or 1e9
        other = {"one machine": (ONE_GRAPH, 1), "scatter-gather": (SCATTER_GATHER, line.machines)}.get(line.than)
        ours = "-"
        if other is not None:
            qps = predict(ROUTED, study.workload, study.machine, fabric, line.machines, vectors).qps
            than = predict(other[0], study.workload, study.machine, fabric, other[1], vectors).qps
            ours = f"{qps / than:.1f}, {vectors:.0e} vectors".replace("e+0", "e").replace("e+", "e")
        rows.append((line.system, str(line.machines), line.than, f"{line.low:g}-{line.high:g}", ours, line.source))
    columns = ["system", ">machines", "throughput over", ">published", ">one graph, routed: predicted", "source"]
    return Table("Published by others, on their machines and data", columns, rows)


def targets_table(study: Study) -> Table:
    """Makes the table of targets."""
    rows = [
        (row.what, f"{row.bound} {row.limit:g}", f"{row.measured:.3f}", "yes" if row.met else "no")
        for row in study.targets
    ]
    return Table("Targets", ["what", ">target", ">measured", "met"], rows)
