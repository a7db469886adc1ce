"""`cotra doctor`: finds out why RDMA does not work here, and what to type."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, NoReturn

import typer
from rich.markup import escape

from cotra_rdma._diagnose.host import Check, Host, Status, host_checks, usable
from cotra_rdma._diagnose.verbs import peer_checks, verbs_checks
from cotra_rdma.cli import output
from cotra_rdma.cli.options import (
    Device,
    GidIndex,
    Json,
    Timeout,
    TlsCa,
    TlsCert,
    TlsKey,
    tls_of,
)

EPILOG = """**Examples**

cotra doctor

cotra doctor --peer 10.0.0.2:7700 --device mlx5_0

Exit status: 0 if verbs is usable, 1 if it is not.
"""

MARKS = {Status.OK: "[green]ok[/]", Status.WARNING: "[yellow]warning[/]", Status.FAILED: "[bold red]failed[/]"}


Peer = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        show_default=False,
        help="HOST:PORT of an owner: also ask whether it answers, and make real READs of 1 KiB of its memory.",
    ),
]


@output.verb
def doctor(
    peer: Peer = None,
    device: Device = None,
    gid_index: GidIndex = None,
    timeout: Timeout = 5.0,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_ca: TlsCa = None,
    as_json: Json = False,
) -> None:
    """Check everything that RDMA needs: library, kernel, devices, GIDs, limits and container; and say how to mend what
    fails.
    """
    host = Host()
    checks = [*verbs_checks(host, device, gid_index, peer), *host_checks(host)]
    if peer is not None:
        checks += peer_checks(peer, device, gid_index, timeout, tls_of(tls_cert, tls_key, tls_ca))
    report(checks, as_json=as_json)


def report(checks: list[Check], *, as_json: bool) -> NoReturn:
    """Prints the checks, and exits with 0 if verbs is usable and with 1 if it is not."""
    good = usable(checks)
    if as_json:
        output.print_json({"usable": good, "checks": [asdict(check) for check in checks]})
    else:
        _show(checks, good)
    raise typer.Exit(0 if good else 1)


def _show(checks: list[Check], good: bool) -> None:
    output.print_table(
        ("check", "", "seen"), ((check.name, MARKS[check.status], escape(check.seen)) for check in checks)
    )
    for check in checks:
        if check.remedy:
            output.out.print(f"{MARKS[check.status]} {check.name}:", soft_wrap=True)
            output.out.print(f"  {escape(check.remedy)}", soft_wrap=True)
    verdict = "[green]verbs is usable[/]" if good else "[bold red]verbs is not usable[/]; shm and rpc are"
    output.out.print(verdict)
