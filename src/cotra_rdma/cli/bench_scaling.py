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
from cotra_rdma._bench.scaling.scale import FABRIC, Scale
from cotra_rdma._bench.scaling.study import study
from cotra_rdma._bench.scaling.tables import scaling_tables
from cotra_rdma._bench.tables import title
from cotra_rdma._bench.transports import parse_transport
from cotra_rdma.cli import output
from cotra_rdma.cli.options import comma_list, numbers

SHARDS = (1, 2, 4, 8, 16)


def refuse_others(
    algorithm: list[str] | None,
    filters: list[str] | None,
    build: bool,
    report: Path | None,
    queries_zipf: str | None,
    cache_bytes: str,
    compare_with: str,
    threads: str,
    inflight: str,
) -> None:
    """Raises a usage error that names the options which were given and do not go with --scaling."""
    options = {
        "--algorithm": algorithm,
        "--filter": filters,
        "--build": build,
        "--report": report,
        "--queries-zipf": queries_zipf,
        "--cache-bytes": cache_bytes != "0",
        "--compare": compare_with != "hnswlib",
        "--threads": threads != "1",
        "--inflight": inflight != "0",
    }
    if given := [name for name, value in options.items() if value]:
        raise typer.BadParameter(f"leave out {', '.join(given)}", param_hint="--scaling")


def scale_of(
    transport: list[str] | None, shards: str | None, machine: str, halos: str, local_share: float | None
) -> Scale:
    """Makes the scale of a study of what the command line says. Raises a usage error for an option that is "
    "malformed."""
    counts = numbers(shards, "--shards") if shards else SHARDS
    names = comma_list(transport or []) or ["shm", FABRIC]
    fabrics = [name for name in names if parse_transport(name)[0] == "model"]
    paths = [name for name in names if name not in fabrics]
    if len(fabrics) > 1 or len(paths) > 1:
        raise typer.BadParameter(
            f"{','.join(names)}: --scaling takes one path and one modelled fabric, as in shm,{FABRIC}",
            param_hint="--transport",
        )
    found = re.fullmatch(r"(\d+):(\d+\.?\d*)", machine)
    if found is None or not int(found[1]) or not float(found[2]):
        raise typer.BadParameter(f"{machine!r} is not CORES:GB, as in 16:512", param_hint="--machine")
    return Scale(
        n_shards=sorted({1, *counts}),
        transport=paths[0] if paths else "shm",
        fabric=fabrics[0] if fabrics else FABRIC,
        machine=Machine(int(found[1]), 1e9 * float(found[2])),
        halos=_halos(halos),
        local_share=local_share,
    )


def _halos(value: str) -> list[float]:
    """Reads the halos, and returns them in ascending order with 0 among them."""
    try:
        halos = sorted({0.0, *(float(item) for item in comma_list([value]))})
    except ValueError:
        halos = [-1.0]
    if halos[0] < 0 or not math.isfinite(halos[-1]):
        raise typer.BadParameter(f"{value!r} is no list of shares such as 0.25,0.5", param_hint="--halo")
    return halos


def run_study(data: DataSet, scale: Scale, plan: Plan, cache: Path, *, plot: Path | None, as_json: bool) -> None:
    """Measures and predicts, then draws and prints what was found."""
    plan = replace(plan, efs=sorted({plan.k, *plan.efs}), beams=plan.beams[:1])
    environment = Environment.now(sys.argv)
    with output.phases(quiet=as_json) as progress:
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
    output.print_facts(environment.facts(), title(data, plan))
    for table in scaling_tables(found):
        output.print_table(table.columns, table.rows, title=table.title)
