"""What the scripts of this directory share."""

from __future__ import annotations

import sys
from pathlib import Path


def whole(words: str) -> list[int]:
    """Reads whole numbers between commas."""
    return [int(word) for word in words.split(",") if word]


def put_between(file: Path, name: str, table: str) -> None:
    """Replaces what a page has between the two comments `<!-- NAME: begin -->` and `<!-- NAME: end -->`."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    before, found, rest = file.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        sys.exit(f"{file} has no lines {begin.strip()} and {end}")
    file.write_text(f"{before}{begin}\n{table}\n\n{end}{after}", encoding="utf-8")


def markdown_table(heads: list[str], rows: list[list[str]]) -> str:
    """Makes a table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
