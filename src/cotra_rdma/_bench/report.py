"""Writes a benchmark as one page of HTML, with the plots inside and without scripts or references."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

from cotra_rdma._bench.environment import Environment
from cotra_rdma._bench.plot import png
from cotra_rdma._bench.runner import Point
from cotra_rdma._bench.tables import Table

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --line: #d0d7de; --quiet: #57606a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #0d1117; --line: #30363d; --quiet: #9198a1; } }
body { margin: 0 auto; padding: 1rem; max-width: 80rem; font: 1rem/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; }
.number { text-align: right; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; font-size: .9rem; }
dt { color: var(--quiet); } dd { margin: 0; overflow-wrap: anywhere; }
pre { padding: .6rem; border: 1px solid var(--line); white-space: pre-wrap; overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; background: #fff; }
"""


def write_report(
    path: str | os.PathLike[str],
    heading: str,
    environment: Environment,
    summary: Table,
    others: Sequence[Table],
    points: Sequence[Point],
) -> None:
    """Writes the page: summary, plots, other tables, environment, and the command to repeat the run."""
    picture = base64.b64encode(png(points)).decode()
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(fact)}</dd>" for name, fact in environment.facts().items())
    parts = [
        f"<h1>{escape(heading)}</h1>",
        _table(summary),
        f'<h2>Curves</h2>\n<img alt="recall against QPS and against bytes" src="data:image/png;base64,{picture}">',
        *map(_table, others),
        f"<h2>Environment</h2>\n<dl>{facts}</dl>",
        f"<h2>To repeat it</h2>\n<pre>{escape(environment.command)}</pre>",
    ]
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(heading)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
    )
    Path(path).write_text(page + "\n".join(parts) + "\n</body>\n</html>\n", encoding="utf-8")


def _table(table: Table) -> str:
    styles = [' class="number"' if name.startswith(">") else "" for name in table.columns]
    head = "".join(
        f'<th scope="col"{style}>{escape(name.removeprefix(">"))}</th>'
        for name, style in zip(table.columns, styles, strict=True)
    )
    rows = "\n".join(
        "<tr>" + "".join(f"<td{style}>{escape(cell)}</td>" for cell, style in zip(row, styles, strict=True)) + "</tr>"
        for row in table.rows
    )
    return (
        f'<h2>{escape(table.title)}</h2>\n<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody>\n</table></div>"
    )
