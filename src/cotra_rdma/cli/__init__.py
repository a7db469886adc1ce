"""The `cotra` command: one module a verb."""

from __future__ import annotations

import contextlib
import os
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from cotra_rdma.cli import bench, build, demo, doctor, info, output, search, serve

__all__ = ["app", "main"]

app = typer.Typer(
    name="cotra",
    help="Vector search in a peer's memory: HNSW graphs walked by one-sided RDMA READs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit status: 0 all went well; 1 an error, told in one line on stderr; 2 the command line was wrong; "
    "130 it was interrupted.",
)
app.command("build", epilog=build.EPILOG)(build.build)
app.command("serve", epilog=serve.EPILOG)(serve.serve)
app.command("search", epilog=search.EPILOG)(search.search)
app.command("info", epilog=info.EPILOG)(info.info)
app.command("doctor", epilog=doctor.EPILOG)(doctor.doctor)
app.command("demo", epilog=demo.EPILOG)(demo.demo)
app.command("bench", epilog=bench.EPILOG)(bench.bench)


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
    """Runs the command line, and exits. After Ctrl-C everything is closed, and Python need not take 0.1 s to let go of memory."""
    try:
        app(prog_name="cotra")
    except SystemExit as end:
        if end.code == output.INTERRUPTED:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            os._exit(output.INTERRUPTED)
        raise
