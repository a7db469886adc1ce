"""`cotra bench --scaling`: one graph over more and more shards, and what that says about many machines."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path

import typer

from cotra_rdma._bench.data import DataSet
from cotra_rdma._bench.environment import Environment
from cotra_rdma._bench.runner import Plan
from cotra_rdma._bench.scaling.plot import draw_study
from cotra_rdma._bench.scaling.prediction import Machine
from cotra_rdma._bench.scaling.study import FABRIC, Scale, study
from cotra_rdma._bench.scaling.tables import scaling_tables
from cotra_rdma._bench.tables import title
from cotra_rdma._bench.transports import parse_transport
from cotra_rdma.cli import output
from cotra_rdma.cli.options import comma_list

SHARDS = (1, 2, 4, 8, 16)


def refuse_others(*options: tuple[str, object]) -> None:
    """Raises a usage error that names the options, of these (name, whether it was given), that do not go with --scaling."""
    given = [name for name, value in options if value]
    if given:
        raise typer.BadParameter(f"leave out {', '.join(given)}", param_hint="--scaling")


def scale_of(
    transports: list[str] | None, shards: list[int], machine: str, halos: str, local_share: float | None
) -> Scale:
    """The command line's wishes. Raises a usage error where they are no such study."""
    names = transports or ["shm", FABRIC]
    fabrics = [name for name in names if parse_transport(name)[0] == "model"]
    paths = [name for name in names if name not in fabrics]
    if len(fabrics) > 1 or len(paths) > 1:
        raise typer.BadParameter(
            f"{','.join(names)}: with --scaling it is one path and one modelled fabric, as in shm,{FABRIC}",
            param_hint="--transport",
        )
    found = re.fullmatch(r"(\d+):(\d+\.?\d*)", machine)
    if found is None or not int(found[1]) or not float(found[2]):
        raise typer.BadParameter(f"{machine!r} is not CORES:GB, as in 16:512", param_hint="--machine")
    return Scale(
        n_shards=sorted({1, *shards}),
        transport=paths[0] if paths else "shm",
        fabric=fabrics[0] if fabrics else FABRIC,
        machine=Machine(int(found[1]), 1e9 * float(found[2])),
        halos=_halos(halos),
        local_share=local_share,
    )


def _halos(value: str) -> list[float]:
    """Ascending, 0 among them."""
    try:
        halos = sorted({0.0, *(float(item) for item in comma_list([value]))})
    except ValueError:
        halos = [-1.0]
    if halos[0] < 0 or not math.isfinite(halos[-1]):
        raise typer.BadParameter(f"{value!r} is no list of shares, as in 0.25,0.5", param_hint="--halo")
    return halos


def run_study(data: DataSet, scale: Scale, plan: Plan, cache: Path, *, plot: Path | None, as_json: bool) -> None:
    """Measures, predicts, draws and prints."""
    plan = replace(plan, efs=sorted({plan.k, *plan.efs}), beams=plan.beams[:1])
    environment = Environment.now(sys.argv)
    with output.progress_bar("", disable=as_json) as bar:
        task = bar.add_task("", total=1)

        def progress(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        found, points = study(data, scale, plan, cache, progress)
    environment = environment.finished()
    if plot is not None:
        draw_study(found, plot)
    if as_json:
        output.print_json({"environment": asdict(environment)})
        for point in points:
            output.print_json(asdict(point))
        output.print_json({"scaling": asdict(found)})
        return
    for name, fact in environment.facts().items():
        output.out.print(f"{name}: {fact}", markup=False, soft_wrap=True)
    output.out.print(title(data, plan), markup=False, soft_wrap=True)
    for table in scaling_tables(found):
        output.print_table(table.columns, table.rows, title=table.title)
