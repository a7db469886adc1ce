#!/usr/bin/env python3
"""Measures filters and deleted rows beside hnswlib, by their share and their correlation with the query.

    bench/filters.py [--rows N] [--cache DIR]

hnswlib's filter is a Python function, which it calls for each node.
So hnswlib is timed with all other rows marked as deleted.
That gives the same answers, without calls.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import hnswlib
import numpy as np

from common import markdown_table, put_between, whole

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from cotra_rdma import Shard
from quality.families import Family
from quality.filtered import CORRELATIONS, DELETED, OTHERS, SHARES, Grouped, Rows, ask_among, grouped, only
from quality.measure import Ids, Truth, build_graph

EFS = (16, 32, 64, 128, 256, 512)
K = 10
REFERENCE = (64, 256)  # times are compared at hnswlib's recall for these ef


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of one system at one ef, as means over groups of queries."""

    ef: int
    recall: float
    empty: float
    """The share of places without an answer, among those for which there is one."""
    us: float
    """The time of one query."""
    reads: float


@dataclass(frozen=True, slots=True)
class Cell:
    """The figures of one kind of filter."""

    kind: str
    allowed: int
    """The rows that may be returned."""
    hnswlib: list[Figures]
    cotra: list[Figures]

    @property
    def worst(self) -> float:
        """How much less cotra finds, at the ef where that is most."""
        return max(theirs.recall - ours.recall for theirs, ours in zip(self.hnswlib, self.cotra, strict=True))

    @property
    def wrong(self) -> bool:
        """Whether cotra finds less than hnswlib, or leaves places empty for which there are rows."""
        return self.worst > 0.01 + 1e-9 or any(figures.empty for figures in self.cotra)

    def speed(self, ef: int) -> float:
        """Returns how many times as fast cotra reaches the recall that hnswlib has at `ef`; 0 if it does not."""
        least = next(figures.recall for figures in self.hnswlib if figures.ef == ef) - 1e-9
        theirs, ours = (
            min((figures.us for figures in side if figures.recall >= least), default=float("inf"))
            for side in (self.hnswlib, self.cotra)
        )
        return theirs / ours


def ask(search: Callable[[], tuple[Ids, float]], ef: int, truth: Truth, repeats: int) -> Figures:
    """Searches for one group. `search` returns answers, and the READs of a query."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        ids, reads = search()
        best = min(best, time.perf_counter() - start)
    there = np.isfinite(truth.nearest[:, :K])
    return Figures(ef, truth.recall(ids, K), float((ids < 0)[there].mean()), 1e6 * best / len(ids), reads)


def mean(parts: list[list[Figures]]) -> list[Figures]:
    """Returns the mean over groups, at each ef."""
    return [
        Figures(
            same[0].ef,
            *(float(np.mean([getattr(one, name) for one in same])) for name in ("recall", "empty", "us", "reads")),
        )
        for same in zip(*parts, strict=True)
    ]


def measure(
    kind: str,
    groups: list[tuple[Family, Rows]],
    index: hnswlib.Index,
    shard: Shard,
    efs: list[int],
    repeats: int,
    deleted: bool,
) -> Cell:
    """Searches with both, group by group.

    Args:
        kind: the name of the filter.
        groups: groups of queries, each with the rows that it may return.
        index: hnswlib's graph.
        shard: the same graph, packed.
        efs: the values of ef.
        repeats: how often each search is timed.
        deleted: whether the shard is already without the other rows, so that it needs no filter.
    """
    theirs: list[list[Figures]] = []
    ours: list[list[Figures]] = []
    for family, allowed in groups:
        truth = Truth.of(family, K, allowed)
        left = int(allowed.sum())

        def search(
            ef: int, family: Family = family, rows: Rows | None = None if deleted else allowed
        ) -> tuple[Ids, float]:
            ids, _, stats = shard.search(family.queries, K, ef, rows=rows)
            return ids, float(stats["expansions"].mean())

        def reference(ef: int, family: Family = family, left: int = left) -> tuple[Ids, float]:
            return ask_among(index, family.queries, left, K, ef), 0.0

        with only(index, allowed):
            theirs.append([])
            ours.append([])
            for ef in efs:
                theirs[-1].append(ask(functools.partial(reference, ef), ef, truth, repeats))
                ours[-1].append(ask(functools.partial(search, ef), ef, truth, repeats))
    return Cell(kind, round(float(np.mean([rows.sum() for _, rows in groups]))), mean(theirs), mean(ours))


def all_cells(data: Grouped, index: hnswlib.Index, efs: list[int], repeats: int) -> Iterator[Cell]:
    """Measures the grid of shares and correlations, the other filters, and the deleted rows."""
    with Shard.from_hnswlib(index, n_threads=1) as shard:
        for share in SHARES:
            for correlation in CORRELATIONS:
                groups = [(group, data.allowed(i, share, correlation)) for i, group in enumerate(data.groups)]
                yield measure(f"{share * 100:g} %, {correlation:+g}", groups, index, shard, efs, repeats, False)
        for kind, rows_of in OTHERS.items():
            groups = [(group, rows_of(data, i)) for i, group in enumerate(data.groups)]
            yield measure(kind, groups, index, shard, efs, repeats, False)
    for kind, rows_of in DELETED.items():
        left = rows_of(data)
        with only(index, left):
            shard = Shard.from_hnswlib(index, n_threads=1)
        with shard:
            groups = [(data.groups[0] if "group" in kind else data.family, left)]
            yield measure(kind, groups, index, shard, efs, repeats, True)


def text(cell: Cell) -> str:
    """Formats one kind of filter as a block of lines."""
    lines = [
        ("", [f"{f'ef {figures.ef}':>8} " for figures in cell.hnswlib]),
        ("hnswlib", [f"{figures.recall:8.4f} " for figures in cell.hnswlib]),
        (
            "cotra",
            [
                f"{ours.recall:8.4f}{'!' if theirs.recall - ours.recall > 0.01 + 1e-9 or ours.empty else ' '}"
                for theirs, ours in zip(cell.hnswlib, cell.cotra, strict=True)
            ],
        ),
        ("READs", [f"{figures.reads:8.1f} " for figures in cell.cotra]),
    ]
    if any(figures.empty for figures in (*cell.hnswlib, *cell.cotra)):
        lines.append(("h empty", [f"{figures.empty:8.4f} " for figures in cell.hnswlib]))
        lines.append(("c empty", [f"{figures.empty:8.4f} " for figures in cell.cotra]))
    lines.append(("h us", [f"{figures.us:8.1f} " for figures in cell.hnswlib]))
    lines.append(("c us", [f"{figures.us:8.1f} " for figures in cell.cotra]))
    times = ", ".join(f"{cell.speed(ef):.2f} at its recall at ef {ef}" for ef in references(cell))
    title = f"{cell.kind}  {cell.allowed} rows; worst {0 - cell.worst:+.4f}; times as fast: {times}"
    return "\n".join([title, *(f"  {name:8}{''.join(cells)}" for name, cells in lines)])


def references(cell: Cell) -> list[int]:
    """Returns the values of `REFERENCE` that were measured."""
    return [figures.ef for figures in cell.hnswlib if figures.ef in REFERENCE]


def markdown(cells: list[Cell]) -> str:
    """Formats all kinds of filters as one table."""
    efs = [figures.ef for figures in cells[0].cotra]
    shown = [ef for ef in efs if ef in (16, *REFERENCE)]
    heads = [
        "filter",
        "rows",
        *(f"ef {ef}" for ef in shown),
        "worst",
        "empty places",
        *(f"READs, ef {ef}" for ef in shown),
    ]
    heads += [f"times as fast, ef {ef}" for ef in references(cells[0])]
    lines = []
    for cell in cells:
        pairs = [(theirs, ours) for theirs, ours in zip(cell.hnswlib, cell.cotra, strict=True) if ours.ef in shown]
        empty = [max(figures.empty for figures in side) for side in (cell.cotra, cell.hnswlib)]
        row = [cell.kind, f"{cell.allowed:,}", *(f"{ours.recall:.3f} / {theirs.recall:.3f}" for theirs, ours in pairs)]
        row += [
            f"{0 - cell.worst:+.3f}",
            f"{empty[0]:.3f} / {empty[1]:.3f}",
            *(f"{ours.reads:.0f}" for _, ours in pairs),
        ]
        lines.append([*row, *(f"{cell.speed(ef):.2f}" for ef in references(cell))])
    return markdown_table(heads, lines)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--groups", type=int, default=5, help="groups of queries, each with a filter of its own")
    parser.add_argument("--per-group", type=int, default=20, help="queries in each group")
    parser.add_argument("--ef", type=whole, default=list(EFS), help="separated by commas")
    parser.add_argument("--repeats", type=int, default=3, help="the quickest run counts")
    parser.add_argument("--cache", type=Path, help="directory to keep hnswlib's graph in")
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    parser.add_argument("--markdown", type=Path, help="page to write the table into")
    options = parser.parse_args()
    data = grouped(options.rows, options.groups, options.per_group)
    cells = []
    for cell in all_cells(data, build_graph(data.family, options.cache), options.ef, options.repeats):
        cells.append(cell)
        print(text(cell), flush=True)
    low = [cell.kind for cell in cells if cell.wrong]
    print(f"{len(low)} of {len(cells)} too low or with empty places{': ' if low else ''}{'; '.join(low)}")
    if options.json:
        options.json.write_text(json.dumps([asdict(cell) for cell in cells], indent=1), encoding="utf-8")
    if options.markdown:
        put_between(options.markdown, "filters", markdown(cells))


if __name__ == "__main__":
    main()
