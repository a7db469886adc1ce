"""Options and arguments that several verbs share."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from cotra_rdma.protocol.tls import Tls


class MetricName(StrEnum):
    """The metrics, as the command line names them."""

    L2 = "l2"
    IP = "ip"
    COSINE = "cosine"


class VectorTypeName(StrEnum):
    """The types in which `build` can store vectors."""

    AUTO = "auto"
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    UINT8 = "uint8"


class PartitionName(StrEnum):
    """The ways in which `build` can split rows."""

    RANGE = "range"
    KMEANS = "kmeans"


class GraphName(StrEnum):
    """The ways in which `build` can link shards."""

    INDEPENDENT = "independent"
    GLOBAL = "global"


Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs in place of tables.")]
GraphM = Annotated[
    int, typer.Option("--M", "-M", min=2, help="The most links of a node on an upper layer. Level 0 has twice as many.")
]
ConstructionEf = Annotated[int, typer.Option(min=1, help="The ef of the searches that the build makes.")]
Threads = Annotated[int, typer.Option(min=1, help="The threads that search. Each has channels of its own.")]
Device = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="The RDMA device. Default: the first with an active port.", show_default=False),
]
GidIndex = Annotated[
    int | None,
    typer.Option(
        min=0,
        metavar="N",
        help="The index in the port's GID table. Default: the GID that ranks best.",
        show_default=False,
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

Tracing = Annotated[
    bool,
    typer.Option(
        "--tracing",
        help="Make spans of OpenTelemetry; `opentelemetry-instrument cotra ...` sets where they go.",
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
    """Makes an option that names a file which must exist."""
    return typer.Option(metavar="FILE", exists=True, dir_okay=False, show_default=False, help=description)


GroundTruth = Annotated[
    Path | None,
    input_file(
        'The ids of each query\'s nearest vectors, nearest first: .npy, .ivecs, or "neighbors" of an HDF5 file.'
    ),
]


def comma_list(values: Iterable[str]) -> list[str]:
    """Splits options that may be repeated or hold commas into their items."""
    return [item.strip() for value in values for item in value.split(",") if item.strip()]


def numbers(text: str, option: str, low: int = 1) -> list[int]:
    """Reads whole numbers between commas, sorts them and removes duplicates.

    Args:
        text: the text of the option.
        option: the name of the option.
        low: the least number that is allowed.

    Raises:
        typer.BadParameter: the text is malformed, or a number is too small.
    """
    items = comma_list([text])
    if not items or not all(item.isdecimal() and int(item) >= low for item in items):
        what = "positive whole numbers" if low == 1 else f"whole numbers from {low} on"
        raise typer.BadParameter(f"{text!r} is not a list of {what}, as in 16,32,64", param_hint=option)
    return sorted({int(item) for item in items})


def transports(values: Iterable[str], known: Iterable[str]) -> tuple[str, ...]:
    """Reads names of transports, and removes duplicates.

    Raises:
        typer.BadParameter: a name is none of `known`.
    """
    names = tuple(dict.fromkeys(comma_list(values)))
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(known)}", param_hint="--transport")
    return names
