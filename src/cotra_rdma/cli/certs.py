"""`cotra certs`: certificates for tests and small clusters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cotra_rdma.cli import output
from cotra_rdma.cli.options import Json, comma_list
from cotra_rdma.protocol.certificates import AUTHORITY, make_certificate

EPILOG = """**Examples**

cotra certs keys owner-0 --host 10.0.0.1

cotra certs keys reader

The first call makes an authority in DIR, ca.pem and ca.key. Each call makes NAME.pem and NAME.key, signed by it. Owners and
readers get ca.pem and their own two files. ca.key makes further certificates: keep it where nobody else reads it.
"""

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="Where the files are, and are written.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="Whom the certificate is for: an owner, or a reader.")]
Hosts = Annotated[
    list[str],
    typer.Option(
        "--host",
        metavar="HOST[,HOST...]",
        show_default=False,
        help="Of an owner: the host names and IP addresses that readers reach it at. May be repeated.",
    ),
]
Days = Annotated[int, typer.Option(min=1, max=3650, metavar="N", help="How long it is good for.")]


@output.verb
def certs(
    directory: Directory,
    name: Name,
    host: Hosts = [],  # noqa: B006 (typer copies it)
    days: Days = 365,
    as_json: Json = False,
) -> None:
    """Make a certificate for an owner or a reader, and the authority that signs it.

    With --json: {"certificate", "key", "ca"}, the paths.
    """
    made = make_certificate(directory, name, comma_list(host), days=days)
    files = {"certificate": str(made.certificate), "key": str(made.key), "ca": str(made.ca)}
    if as_json:
        output.print_json(files)
        return
    output.out.print(f"{files['certificate']} and {files['key']} are for {name}.", soft_wrap=True)
    output.out.print(f"{files['ca']} is for everybody, {AUTHORITY}.key for nobody else.", soft_wrap=True)
