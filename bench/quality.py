#!/usr/bin/env python3
"""Measures recall at equal ef beside hnswlib, on the same graphs.

bench/quality.py [--families GLOB] [--data DIR] [--cache DIR]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from common import markdown_table, put_between, whole

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from cotra_rdma import Shard
from quality import families
from quality.families import Family
from quality.measure import Truth, ask_hnswlib, build_graph

EFS = (16, 32, 64, 128, 256, 512, 1024)
KS = (10, 32, 100, 500)
K = 10
DATA = {"sift128": "l2", "glove100": "cosine", "embed384": "cosine"}


@dataclass(frozen=True, slots=True)
class Point:
    """One setting: the recall@k of both, and the READs of a query of cotra."""

    k: int
    ef: int
    hnswlib: float
    cotra: float
    reads: float

    @property
    def lost(self) -> float:
        """How much less cotra finds."""
        return self.hnswlib - self.cotra

    @property
    def wrong(self) -> bool:
        """Whether the recall is less than ef promises."""
        return self.lost > 0.01 + 1e-9 or (self.k == K and self.ef >= 1024 and self.cotra < 0.999 * self.hnswlib)


@dataclass(frozen=True, slots=True)
class Row:
    """The figures of one family."""

    family: str
    metric: str
    rows: int
    dim: int
    points: list[Point]
    """The recall@10 of each ef."""
    full: list[Point]
    """The points with k = ef."""

    @property
    def worst(self) -> Point:
        """The point where cotra is furthest behind."""
        return max(self.points + self.full, key=lambda point: point.lost)


def measure(family: Family, efs: list[int], ks: list[int], beam: int, cache: Path | None) -> Row:
    """Searches one graph with both."""
    index = build_graph(family, cache)
    truth = Truth.of(family, max([K, *ks]))

    def point(shard: Shard, k: int, ef: int) -> Point:
        theirs = ask_hnswlib(index, family.queries, k, ef)
        ours, _, stats = shard.search(family.queries, k, ef, beam)
        return Point(k, ef, truth.recall(theirs, k), truth.recall(ours, k), float(stats["expansions"].mean()))

    with Shard.from_hnswlib(index, n_threads=1) as shard:
        points = [point(shard, K, ef) for ef in efs]
        full = [point(shard, k, k) for k in ks if k <= len(family.base)]
    return Row(family.name, family.metric, len(family.base), family.dim, points, full)


def read_data(directory: Path, rows: int | None, queries: int | None) -> Iterator[Family]:
    """Yields the data sets that are in a directory."""
    for stem, metric in DATA.items():
        if (directory / f"{stem}_base.npy").exists():
            base, asked = (np.load(directory / f"{stem}_{part}.npy", mmap_mode="r") for part in ("base", "queries"))
            yield Family(stem, metric, base[:rows].astype(np.float32), asked[:queries].astype(np.float32))


def text(row: Row) -> str:
    """Formats one family as a block of lines."""
    points = row.points + row.full
    heads = [f"ef {point.ef}" for point in row.points] + [f"k=ef={point.k}" for point in row.full]
    lines = [
        ("", [f"{head:>8} " for head in heads]),
        ("hnswlib", [f"{point.hnswlib:8.4f} " for point in points]),
        ("cotra", [f"{point.cotra:8.4f}{'!' if point.wrong else ' '}" for point in points]),
        ("READs", [f"{point.reads:8.1f} " for point in points]),
    ]
    wrong = sum(point.wrong for point in points)
    title = f"{row.family}  {row.metric}, {row.rows} x {row.dim}; worst {0 - row.worst.lost:+.4f}"
    title += f"; {wrong} of {len(points)} too low" if wrong else ""
    return "\n".join([title, *(f"  {name:8}{''.join(cells)}" for name, cells in lines)])


def markdown(rows: list[Row]) -> str:
    """Formats all families as one table, with the recall of both by ef."""
    efs = [point.ef for point in rows[0].points]
    ks = sorted({point.k for row in rows for point in row.full})
    counted = [ef for ef in efs if ef in (64, 1024)]
    heads = ["data", "rows x dim, metric", *(f"ef {ef}" for ef in efs), *(f"READs, ef {ef}" for ef in counted)]
    heads += [*(f"k = ef = {k}" for k in ks), "worst"]
    lines = []
    for row in rows:
        full = {point.k: point for point in row.full}
        cells = [row.family, f"{row.rows:,} x {row.dim}, {row.metric}"]
        cells += [f"{point.cotra:.3f} / {point.hnswlib:.3f}" for point in row.points]
        cells += [f"{point.reads:.0f}" for point in row.points if point.ef in counted]
        cells += [f"{full[k].cotra:.3f} / {full[k].hnswlib:.3f}" if k in full else "" for k in ks]
        lines.append([*cells, f"{0 - row.worst.lost:+.3f}"])
    return markdown_table(heads, lines)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--families", default="*", help="names, * and ? as in a shell, separated by commas; '' for none"
    )
    parser.add_argument(
        "--data", type=Path, help="directory of sift128, glove100 and embed384: NAME_base.npy, NAME_queries.npy"
    )
    parser.add_argument("--rows", type=int, help="only the first rows of --data")
    parser.add_argument("--queries", type=int, help="only the first queries of --data")
    parser.add_argument("--ef", type=whole, default=list(EFS), help="separated by commas")
    parser.add_argument("--k", type=whole, default=list(KS), help="each k that is measured with ef = k; '' for none")
    parser.add_argument("--beam", type=int, default=8)
    parser.add_argument("--cache", type=Path, help="directory to keep hnswlib's graphs in")
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    parser.add_argument("--markdown", type=Path, help="page to write the table into")
    options = parser.parse_args()
    rows = []

    def all_data() -> Iterator[Family]:
        yield from families.make_all(options.families)
        if options.data:
            yield from read_data(options.data, options.rows, options.queries)

    for family in all_data():
        rows.append(measure(family, options.ef, options.k, options.beam, options.cache))
        print(text(rows[-1]), flush=True)
    if not rows:
        sys.exit("no such family: " + ", ".join(families.names()))
    low = [row for row in rows if any(point.wrong for point in row.points + row.full)]
    print(f"{len(low)} of {len(rows)} too low{': ' if low else ''}{', '.join(row.family for row in low)}")
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
    if options.markdown:
        put_between(options.markdown, "quality", markdown(rows))


if __name__ == "__main__":
    main()
