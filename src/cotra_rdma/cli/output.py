"""What the verbs share: JSON and tables, errors and warnings of one line, and progress bars."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from cotra_rdma.errors import CotraError

P = ParamSpec("P")
R = TypeVar("R")

INTERRUPTED = 130
"""The exit status after Ctrl-C, as shells have it for SIGINT."""

_WIDTH = shutil.get_terminal_size((160, 24)).columns  # a pipe has no width, so there is room for every column
out = Console(highlight=False, width=_WIDTH)
err = Console(stderr=True, highlight=False, width=_WIDTH)


def verb(function: Callable[P, R]) -> Callable[P, R]:
    """Wraps a verb, so that an error is one line on stderr and an exit status.

    The line is JSON with `--json`.
    The status is 1 for an error that a user can act upon, and 130 for Ctrl-C.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except (CotraError, OSError, MemoryError) as error:
            print_error(error, as_json=bool(kwargs.get("as_json")))
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            print_error(KeyboardInterrupt("interrupted"), as_json=bool(kwargs.get("as_json")))
            raise typer.Exit(INTERRUPTED) from None

    return run


def print_error(error: BaseException, *, as_json: bool) -> None:
    """Prints an error as one line on stderr."""
    message = " ".join((str(error) or type(error).__name__).split())
    if as_json:
        detail = {"type": type(error).__name__, "message": message, "shard": getattr(error, "shard", None)}
        print(json.dumps({"error": detail}), file=sys.stderr)
    else:
        err.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)


def print_warning(message: str) -> None:
    """Prints a warning as one line on stderr."""
    err.print(f"[yellow]warning:[/] {escape(' '.join(message.split()))}", soft_wrap=True)


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Keeps the package's log off stderr, for what the verb reports by itself, such as a lost owner."""
    log = logging.getLogger("cotra_rdma")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def print_json(value: Any) -> None:
    """Prints one line of JSON on stdout, at once."""
    print(json.dumps(value, allow_nan=False), flush=True)


def print_table(columns: Iterable[str], rows: Iterable[Iterable[str]], *, title: str | None = None) -> None:
    """Prints a table on stdout. A column whose name begins with ">" is aligned right."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for name in columns:
        table.add_column(name.removeprefix(">"), justify="right" if name.startswith(">") else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    out.print(table)


def print_facts(facts: Mapping[str, str], heading: str) -> None:
    """Prints one line for each fact on stdout, then a heading."""
    for line in (*(f"{name}: {fact}" for name, fact in facts.items()), heading):
        out.print(line, markup=False, soft_wrap=True)


class RateColumn(ProgressColumn):
    """A column of a bar that shows steps a second."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        """Returns the rate so far."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} {self._unit}/s" if speed else f"- {self._unit}/s")


def progress_bar(unit: str, *, disable: bool) -> Progress:
    """Makes a bar on stderr with count, rate and remaining time. It disappears at the end."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        RateColumn(unit),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=err,
        disable=disable or not err.is_terminal,
        transient=True,
    )


@contextlib.contextmanager
def phases(*, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Shows a bar on stderr for work in several phases.

    Yields:
        What to call with the name of a phase, how much of it is done, and how much there is.
    """
    with progress_bar("", disable=quiet) as bar:
        task = bar.add_task("", total=1)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def phase_of(shard: int, n_shards: int, phase: str) -> str:
    """Returns the text of a bar for a phase of a shard's build, or of all shards' if `shard` is below 0."""
    return phase if shard < 0 else f"shard {shard + 1}/{n_shards} {phase}"


def human_bytes(n: float) -> str:
    """Formats a length in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" or n >= 100 else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"
