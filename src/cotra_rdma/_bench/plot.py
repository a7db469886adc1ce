"""Draws the curves of a benchmark. matplotlib is optional: `pip install cotra-rdma[plot]`."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cotra_rdma._bench.runner import Point
from cotra_rdma._bench.summary import curves, label
from cotra_rdma.errors import InvalidInputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")


def check_plot(path: str | os.PathLike[str], suffixes: Sequence[str] = SUFFIXES) -> None:
    """Checks before a long measurement that a plot can be written.

    Raises:
        InvalidInputError: the file's suffix is none of `suffixes`, its directory is missing, or matplotlib is.
    """
    if Path(path).suffix.lower() not in suffixes:
        raise InvalidInputError(f"{os.fspath(path)}: its name must end in {', '.join(suffixes)}")
    if not Path(path).parent.is_dir():
        raise InvalidInputError(f"{os.fspath(path)}: there is no directory {os.fspath(Path(path).parent)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InvalidInputError(f"{os.fspath(path)} needs matplotlib: pip install matplotlib") from None


def draw(points: Sequence[Point], path: str | os.PathLike[str]) -> None:
    """Draws recall against QPS, with the range of the repeats, and beside it recall against bytes a query."""
    _figure(points, wide=True).savefig(path, dpi=120)


def png(points: Sequence[Point]) -> bytes:
    """Returns the two plots as a PNG, one below the other."""
    buffer = io.BytesIO()
    _figure(points, wide=False).savefig(buffer, dpi=120, format="png")
    return buffer.getvalue()


def _figure(points: Sequence[Point], *, wide: bool) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6) if wide else (8, 12), layout="constrained")
    FigureCanvasAgg(figure)
    speed, cost = figure.subplots(*((1, 2) if wide else (2, 1)))
    for at, curve in enumerate(curves(points).values()):
        style = {"label": _plain(label(curve[0])), "color": f"C{at % 10}", "marker": "os^vDPX*"[at // 10 % 8]}
        recalls = [point.recall for point in curve]
        ranges = ([p.qps - p.qps_min for p in curve], [p.qps_max - p.qps for p in curve])
        speed.errorbar(recalls, [p.qps for p in curve], yerr=ranges, capsize=2, **style)
        counted = [(p.recall, p.bytes_per_query / 1024) for p in curve if p.bytes_per_query]
        if counted:
            cost.plot(*zip(*counted, strict=True), **style)
    first = points[0]
    figure.suptitle(
        _plain(
            f"{first.dataset}: {first.n:,} x {first.dim}, {first.metric}; M={first.M}, "
            f"ef_construction={first.ef_construction}, {first.repeats} repeats"
        )
    )
    for axes, what in ((speed, "queries a second"), (cost, "KiB a query")):
        axes.set(xlabel=f"recall@{first.k}", ylabel=what, yscale="log")
        axes.grid(visible=True, which="both", alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small")
    return figure


def _plain(text: str) -> str:
    """Escapes text so that matplotlib sees no mathematics in it."""
    return text.replace("$", r"\$")
