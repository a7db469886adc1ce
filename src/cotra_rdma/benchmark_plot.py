"""The curves of a benchmark as a picture. matplotlib is optional: `pip install cotra-rdma[plot]`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from cotra_rdma.benchmark import Point, label
from cotra_rdma.errors import InvalidInputError

SUFFIXES = (".png", ".svg", ".pdf")


def check_plot(path: str | os.PathLike[str]) -> None:
    """Raises `InvalidInputError` where no plot could be written: before a long measurement, not after it."""
    if Path(path).suffix.lower() not in SUFFIXES:
        raise InvalidInputError(f"{os.fspath(path)}: a plot ends in {', '.join(SUFFIXES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InvalidInputError("a plot needs matplotlib: pip install matplotlib") from None


def draw(points: Sequence[Point], path: str | os.PathLike[str]) -> None:
    """Writes recall against QPS (with the range of the repeats), and recall against bytes a query."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6), layout="constrained")
    FigureCanvasAgg(figure)
    speed, cost = figure.subplots(1, 2)
    curves: dict[str, list[Point]] = {}
    for point in points:
        curves.setdefault(label(point), []).append(point)
    for number, (name, unsorted) in enumerate(curves.items()):
        colour = f"C{number % 10}"
        curve = sorted(unsorted, key=lambda point: point.ef)
        recalls = [point.recall for point in curve]
        spread = ([p.qps - p.qps_min for p in curve], [p.qps_max - p.qps for p in curve])
        speed.errorbar(recalls, [p.qps for p in curve], yerr=spread, marker="o", capsize=2, label=name, color=colour)
        counted = [point for point in curve if point.bytes_per_query is not None]
        if counted:
            kib = [(point.bytes_per_query or 0) / 1024 for point in counted]
            cost.plot([point.recall for point in counted], kib, marker="o", label=name, color=colour)
    first = points[0]
    figure.suptitle(
        f"{first.dataset}: {first.n:,} x {first.dim}, {first.metric}; M={first.M}, "
        f"ef_construction={first.ef_construction}, {first.n_threads} thread(s), {first.repeats} repeats"
    )
    for axes, what in ((speed, "queries a second"), (cost, "KiB a query")):
        axes.set(xlabel=f"recall@{first.k}", ylabel=what, yscale="log")
        axes.grid(visible=True, which="both", alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
