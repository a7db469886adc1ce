"""The `cotra` command. Each verb has a module of its name."""

from __future__ import annotations

import contextlib
import os
import sys
from importlib import import_module
from importlib.metadata import version
from typing import Annotated, Any

import typer
import typer.core
import typer.main

from cotra_rdma.cli import output

__all__ = ["app", "main"]

VERBS = ("build", "serve", "search", "info", "doctor", "certs", "demo", "bench")


class _Verbs(typer.core.TyperGroup):
    """The verbs. The module of a verb is imported when the verb is needed."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in VERBS:
            return None
        module = import_module(f"{__name__}.{cmd_name}")
        alone = typer.Typer(rich_markup_mode="markdown", pretty_exceptions_enable=False, add_completion=False)
        alone.command(cmd_name, epilog=module.EPILOG)(getattr(module, cmd_name))
        return typer.main.get_command(alone)


app = typer.Typer(
    name="cotra",
    cls=_Verbs,
    help="Vector search in a peer's memory: HNSW graphs are walked by one-sided RDMA READs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit status: 0 if all went well, 1 for an error, which is one line on stderr, 2 for a wrong command line, "
    "130 after Ctrl-C.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cotra {version('cotra-rdma')}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Runs the command line, and exits.

    After Ctrl-C everything is closed already, so it skips Python's own clean-up, which takes 0.1 s.
    """
    try:
        app(prog_name="cotra")
    except SystemExit as end:
        if end.code == output.INTERRUPTED:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            os._exit(output.INTERRUPTED)
        raise
