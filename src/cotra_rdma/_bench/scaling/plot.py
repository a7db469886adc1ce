"""A scaling study as a picture of four plots: two of measurements and two of predictions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cotra_rdma._bench.scaling.prediction import (
    FASTER,
    MACHINES,
    ONE_GRAPH,
    PUBLISHED,
    ROUTED,
    SCATTER_GATHER,
    SYSTEMS,
    VECTORS,
    Published,
    faster,
    predict,
)
from cotra_rdma._bench.scaling.study import Study
from cotra_rdma._bench.transports import parse_transport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = {ROUTED: "C0", ONE_GRAPH: "C1", SCATTER_GATHER: "C3"}


def draw_study(study: Study, path: str | os.PathLike[str]) -> None:
    """Draws the study to a .svg, in which text stays text, or to a .png or .pdf."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8.5), layout="constrained")
    FigureCanvasAgg(figure)
    shards, vectors, machines, others = figure.subplots(2, 2).flat
    _draw_shards(study, shards)
    _draw_vectors(study, vectors)
    _draw_machines(study, machines)
    _draw_others(study, others)
    for axes in (shards, vectors, machines, others):
        axes.grid(visible=True, which="major", alpha=0.3)
        axes.legend(fontsize="x-small")
    figure.suptitle(f"{study.dataset}, recall@{study.workload.k} {study.recall}".replace("$", r"\$"))
    with matplotlib.rc_context(  # text stays text, and the same study gives the same bytes
        {"svg.fonttype": "none", "svg.hashsalt": "cotra", "font.sans-serif": ["DejaVu Sans"]}
    ):
        figure.savefig(path, metadata={"Date": None} if os.fspath(path).lower().endswith(".svg") else None)


def _draw_shards(study: Study, axes: Axes) -> None:
    """Draws READs and distances over those of one shard, by shards."""
    one = study.rows[0]
    for one_graph, color in ((True, "C0"), (False, "C3")):
        rows = [row for row in study.rows if row.one_graph == one_graph or row is one]
        name = "one graph" if one_graph else "independent shards"
        n = [row.shards for row in rows]
        axes.plot(n, [row.cost.reads / one.cost.reads for row in rows], "o-", color=color, label=f"{name}: READs")
        ratios = [row.cost.distances / one.cost.distances for row in rows]
        axes.plot(n, ratios, "x--", color=color, label=f"{name}: distances")
    axes.set(title="Measured: cost of a query", xlabel="shards", ylabel="over that in one shard")
    _doublings(axes, [row.shards for row in study.rows if row.one_graph])
    _ratios(axes)


def _draw_vectors(study: Study, axes: Axes) -> None:
    """Draws READs and rounds by vectors: the measurements, the fit, and two standard errors on each side."""
    n = np.geomspace(study.sizes[0].vectors, VECTORS[-1], 16)
    fits = (("READs", study.workload.expansions, "reads", "C0"), ("rounds", study.workload.rounds, "rounds", "C2"))
    for name, fit, field, color in fits:
        measured = [getattr(row.cost, field) for row in study.sizes]
        axes.plot([row.vectors for row in study.sizes], measured, "o", color=color, label=f"{name}, measured")
        axes.plot(n, [fit.at(x) for x in n], "-", color=color, label=f"{name}, fit")
        low, high = ([fit.at(x, errors) for x in n] for errors in (-2, 2))
        axes.fill_between(n, low, high, color=color, alpha=0.15, linewidth=0)
    axes.set(title="Measured, then extrapolated: cost by vectors", xlabel="vectors", ylabel="a query", xscale="log")
    axes.set_ylim(bottom=0)
    axes.minorticks_off()


def _draw_machines(study: Study, axes: Axes) -> None:
    """Draws throughput over that of one machine, by machines, beside what was published."""
    n, one = VECTORS[1], _qps(study, ONE_GRAPH, 1)
    axes.plot(MACHINES, MACHINES, ":", color="grey", label="linear")
    fabric = parse_transport(study.fabric)[1]
    assert fabric is not None
    quick = [predict(ROUTED, study.workload, study.machine, faster(fabric), m, n).qps / one for m in MACHINES]
    axes.plot(MACHINES, quick, "--", color=_COLORS[ROUTED], label=f"{ROUTED}, {FASTER}")
    for system in SYSTEMS:
        ratios = [_qps(study, system, m) / one for m in MACHINES]
        axes.plot(MACHINES, ratios, ".-", color=_COLORS[system], label=system)
    _draw_published(axes, [line for line in PUBLISHED if line.than == "one machine"])
    axes.set(title=f"Predicted: throughput, {n:,} vectors", xlabel="machines", ylabel="over one machine")
    _doublings(axes, MACHINES)
    _ratios(axes)


def _draw_others(study: Study, axes: Axes) -> None:
    """Draws throughput over that of scatter-gather on as many machines."""
    for system in (ROUTED, ONE_GRAPH):
        ratios = [_qps(study, system, m) / _qps(study, SCATTER_GATHER, m) for m in MACHINES]
        axes.plot(MACHINES, ratios, ".-", color=_COLORS[system], label=system)
    _draw_published(axes, [line for line in PUBLISHED if line.than != "one machine"])
    what = f"Predicted: throughput, {VECTORS[1]:,} vectors"
    axes.set(title=what, xlabel="machines", ylabel="over scatter-gather on as many")
    _doublings(axes, MACHINES)
    _ratios(axes)


def _qps(study: Study, system: str, machines: int) -> float:
    """Returns the predicted QPS with the number of vectors that is drawn."""
    wanted = (system, machines, VECTORS[1])
    return next(row.qps for row in study.predictions if (row.system, row.machines, row.vectors) == wanted)


def _draw_published(axes: Axes, lines: Sequence[Published]) -> None:
    for at, line in enumerate(lines):
        middle = (line.low + line.high) / 2
        vectors = f", {line.vectors:.0e}".replace("+", "") if line.vectors else ""
        axes.errorbar(
            [line.machines * 1.04**at],
            [middle],
            yerr=[[middle - line.low], [line.high - middle]],
            capsize=4,
            color=f"C{5 + at}",
            label=f"{line.system} / {line.than}{vectors}, published",
        )


def _doublings(axes: Axes, numbers: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(numbers), [str(n) for n in numbers])


def _ratios(axes: Axes) -> None:
    """Shows ratios as plain numbers on a logarithmic axis."""
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
