"""Options and arguments that several verbs have."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from cotra_rdma.protocol.tls import Tls


class MetricName(StrEnum):
    """A distance, as the command line names it."""

    L2 = "l2"
    IP = "ip"
    COSINE = "cosine"


class VectorTypeName(StrEnum):
    """How `build` holds own vectors."""

    AUTO = "auto"
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    UINT8 = "uint8"


class PartitionName(StrEnum):
    """How `build` splits rows."""

    RANGE = "range"
    KMEANS = "kmeans"


class GraphName(StrEnum):
    """How `build` links the shards."""

    INDEPENDENT = "independent"
    GLOBAL = "global"


Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs, in place of tables.")]
GraphM = Annotated[
    int, typer.Option("--M", "-M", min=2, help="Links of a node on an upper layer; twice as many on level 0.")
]
ConstructionEf = Annotated[int, typer.Option(min=1, help="Candidates considered for each vector while building.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads that search, each with its own connection.")]
Device = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="RDMA device. Default: the first with an active port.", show_default=False),
]
GidIndex = Annotated[
    int | None,
    typer.Option(
        min=0, metavar="N", help="Index in the port's GID table. Default: the ranked choice.", show_default=False
    ),
]
Timeout = Annotated[float, typer.Option(min=0.001, help="The longest wait for an owner's answer, in seconds.")]
Transport = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="The path to the shards: auto (verbs, else shm on the same host, else rpc), verbs, shm or rpc.",
    ),
]

TlsCert = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        envvar="COTRA_TLS_CERT",
        show_default=False,
        help="PEM file of this side's certificate, for mutual TLS; with --tls-key and --tls-ca (`cotra certs` makes them).",
    ),
]
TlsKey = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", envvar="COTRA_TLS_KEY", show_default=False, help="PEM file of the certificate's private key."
    ),
]
TlsCa = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        envvar="COTRA_TLS_CA",
        show_default=False,
        help="PEM file of the authority that signed the certificates of both sides.",
    ),
]


def tls_of(certificate: Path | None, key: Path | None, ca: Path | None) -> Tls | None:
    """The three options together, or None without any. Raises a usage error where one is missing."""
    if certificate is None and key is None and ca is None:
        return None
    for option, file in (("--tls-cert", certificate), ("--tls-key", key), ("--tls-ca", ca)):
        if file is None:
            raise typer.BadParameter(
                "is missing: TLS takes all of --tls-cert, --tls-key and --tls-ca", param_hint=option
            )
    assert certificate is not None
    assert key is not None
    assert ca is not None
    return Tls(certificate, key, ca)


def input_file(description: str) -> Any:
    """An option that names a file which must be there."""
    return typer.Option(metavar="FILE", exists=True, dir_okay=False, show_default=False, help=description)


GroundTruth = Annotated[
    Path | None,
    input_file("Ids of each query's nearest vectors, nearest first: .npy, .ivecs, or an HDF5 file's \"neighbors\"."),
]


def comma_list(values: Iterable[str]) -> list[str]:
    """The items of options that may be repeated or hold commas."""
    return [item.strip() for value in values for item in value.split(",") if item.strip()]


def numbers(text: str, option: str, low: int = 1) -> list[int]:
    """Whole numbers >= `low` between commas, in order. Raises a usage error that names the option."""
    items = comma_list([text])
    if not items or not all(item.isdecimal() and int(item) >= low for item in items):
        what = "positive whole numbers" if low == 1 else f"whole numbers from {low} on"
        raise typer.BadParameter(f"{text!r} is not a list of {what}, as in 16,32,64", param_hint=option)
    return sorted({int(item) for item in items})


def transports(values: Iterable[str], known: Iterable[str]) -> tuple[str, ...]:
    """Names of transports, without duplicates. Raises a usage error for one that is not known."""
    names = tuple(dict.fromkeys(comma_list(values)))
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(known)}", param_hint="--transport")
    return names
