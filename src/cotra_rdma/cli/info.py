"""`cotra info`: what a collection, shard files or owners hold, and who serves it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from cotra_rdma._collection.manifest import MANIFEST
from cotra_rdma._diagnose.inspection import Inspection, Progress, inspect_collection, inspect_files, inspect_owners
from cotra_rdma.cli import output
from cotra_rdma.cli.info_report import report, show
from cotra_rdma.cli.options import Json, Timeout, TlsCa, TlsCert, TlsKey, tls_of
from cotra_rdma.cli.targets import targets
from cotra_rdma.protocol.tls import Tls

EPILOG = """**Examples**

cotra info index

cotra info index --json | jq '.shards[] | [.number, .cross_share]'

cotra info index/shard-000.cotra index/shard-001.cotra

cotra info 10.0.0.1:7700 10.0.0.2:7700 --records

Exit status: 0 if everything fits together, and each shard has an owner that answers and serves what the manifest names,
if owners are noted at all. 1 if something does not; each problem is one line. 2 for a wrong command line.
"""

What = Annotated[
    list[str],
    typer.Argument(
        metavar="PATH|ADDRESS",
        help="A collection: a directory that `cotra build` made, or its collection.json. Or shard files. Or HOST:PORT "
        "of each shard's owner, with commas between several owners of one shard.",
    ),
]
Records = Annotated[
    bool,
    typer.Option(
        "--records",
        help="Also read the graph of shards whose files are not here, by READs of all of an owner's memory.",
    ),
]


@output.verb
def info(
    what: What,
    records: Records = False,
    timeout: Timeout = 1.0,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_ca: TlsCa = None,
    as_json: Json = False,
) -> None:
    """Show what is in a collection: sizes, generations, links across shards, degrees, and the owners that answer.

    It reads all records of files that are here, and asks all owners at once what they serve.
    """
    with _progress(quiet=as_json) as progress:
        found = _inspect(what, records, timeout, tls_of(tls_cert, tls_key, tls_ca), progress)
    if as_json:
        output.print_json(report(found))
    else:
        show(found)
    raise typer.Exit(1 if found.problems or found.unserved else 0)


def _inspect(what: list[str], records: bool, timeout_s: float, tls: Tls | None, progress: Progress) -> Inspection:
    paths = [Path(item) for item in what]
    whole = [path.is_dir() or (path.suffix == Path(MANIFEST).suffix and path.is_file()) for path in paths]
    files = [path.is_file() for path in paths]
    if whole == [True]:
        return inspect_collection(paths[0], records=records, timeout_s=timeout_s, tls=tls, progress=progress)
    if any(whole):
        raise typer.BadParameter("give one collection, and nothing else", param_hint="PATH|ADDRESS")
    if all(files):
        return inspect_files(paths, progress=progress)
    if any(files):
        raise typer.BadParameter("give shard files or addresses, not both", param_hint="PATH|ADDRESS")
    return inspect_owners(targets(what).owners, records=records, timeout_s=timeout_s, tls=tls, progress=progress)


@contextmanager
def _progress(*, quiet: bool) -> Iterator[Progress]:
    with output.progress_bar("records", disable=quiet) as bar:
        tasks: dict[str, Any] = {}

        def progress(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(escape(name), total=total)
            bar.update(tasks[name], completed=done)

        yield progress
