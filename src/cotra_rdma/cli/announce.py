"""What `cotra serve` notes in `owners.json` while it serves shards of a collection."""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import Sequence
from pathlib import Path

import typer

from cotra_rdma._collection import owners_file as owners
from cotra_rdma._collection.manifest import place_of
from cotra_rdma.cli import output
from cotra_rdma.errors import CotraError
from cotra_rdma.protocol.address import parse_address


def announced_at(text: str) -> tuple[str, int | None]:
    """HOST or HOST:PORT of `--announce`, apart. Raises a usage error."""
    host, port = text, None
    if not owners.is_address(f"{text}:1"):  # it is no host alone
        if not owners.is_address(text):
            raise typer.BadParameter(f"{text!r} is not HOST or HOST:PORT", param_hint="--announce")
        host, port = text.rpartition(":")[0], int(text.rpartition(":")[2])
    if _is_everywhere(host):
        raise typer.BadParameter(
            f"nobody else reaches this host at {host}: give its name or address", param_hint="--announce"
        )
    return host, port


def announce_owners(
    stack: contextlib.ExitStack,
    paths: Sequence[Path],
    addresses: Sequence[str],
    reached: tuple[str, int | None] | None,
) -> list[str | None]:
    """Notes the owners of those shards that lie in a collection's directory, and has `stack` take them out again. Those of this
    host that were killed are taken out now.

    What cannot be noted is a warning: the shards are served all the same.

    Args:
        stack: closed when the shards are served no more.
        paths: the shards' files.
        addresses: where each is served.
        reached: where others reach the first of them: a host, and its port where that is another; None: at `addresses`.

    Returns: under which address each was noted, or None.
    """
    by_directory: dict[Path, list[tuple[int, str]]] = {}
    noted: list[str | None] = [None] * len(paths)
    nowhere: list[str] = []
    for position, (path, address) in enumerate(zip(paths, addresses, strict=True)):
        place = place_of(path)
        if place is None:
            continue
        at = address
        if reached is not None:
            host, port = reached
            at = f"{host}:{parse_address(address)[1] if port is None else port + position}"
        elif _is_everywhere(address.rpartition(":")[0]):
            nowhere.append(address)
            continue
        by_directory.setdefault(path.parent, []).append((place[1], at))
        noted[position] = at
    if nowhere:
        output.print_warning(
            f"{', '.join(nowhere)}: not noted in {owners.OWNERS}, for nobody can connect to that address. "
            "--announce HOST says where others reach this host; --no-announce silences this"
        )
    for directory, served in by_directory.items():
        stack.callback(_withdraw, directory, served)
        try:
            if gone := owners.prune(directory):
                output.print_warning(
                    f"{', '.join(gone)}: taken out of {directory / owners.OWNERS}, for nobody listens there any more"
                )
            owners.add(directory, served)
        except (CotraError, OSError) as error:
            served.clear()
            noted = [None if path.parent == directory else at for path, at in zip(paths, noted, strict=True)]
            output.print_warning(
                f"not noted in {directory / owners.OWNERS}: {error}. Readers have to be told the address; "
                "--no-announce silences this"
            )
    return noted


def _withdraw(directory: Path, served: list[tuple[int, str]]) -> None:
    try:
        if served:
            owners.remove(directory, served)
    except (CotraError, OSError) as error:
        output.print_warning(f"not taken out of {directory / owners.OWNERS}: {error}")


def _is_everywhere(host: str) -> bool:
    """Whether it is the address that means all of a host's own, which others cannot connect to."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_unspecified
    except ValueError:
        return host == "*"
