"""Notes the owners that `cotra serve` starts in `owners.json`, and removes them at the end."""

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
    """Splits HOST or HOST:PORT of `--announce` into host and port, which is None if there is none.

    Raises:
        typer.BadParameter: the text is malformed, or others cannot connect to that host.
    """
    host, port = text, None
    if not owners.is_address(f"{text}:1"):  # it is not a host alone
        if not owners.is_address(text):
            raise typer.BadParameter(f"{text!r} is not HOST or HOST:PORT", param_hint="--announce")
        host, port = text.rpartition(":")[0], int(text.rpartition(":")[2])
    if _is_everywhere(host):
        raise typer.BadParameter(
            f"nobody else reaches this host at {host}: give its name or its address", param_hint="--announce"
        )
    return host, port


def announce_owners(
    stack: contextlib.ExitStack,
    paths: Sequence[Path],
    addresses: Sequence[str],
    reached: tuple[str, int | None] | None,
) -> list[str | None]:
    """Notes the owners of the shards that lie in a collection's directory.

    It also removes owners of this host that were killed.
    A failure to note an owner is a warning, since the shards are served all the same.

    Args:
        stack: removes the owners again when it is closed.
        paths: the files of the shards.
        addresses: the address that serves each shard.
        reached: the host, and perhaps the port, at which others reach the first shard.
            None stands for `addresses`.

    Returns:
        For each shard the address that was noted, or None.
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
            f"{', '.join(nowhere)}: not noted in {owners.OWNERS}, because nobody can connect to that address. "
            "Say with --announce HOST where others reach this host, or silence this with --no-announce"
        )
    for directory, served in by_directory.items():
        stack.callback(_withdraw, directory, served)
        try:
            if gone := owners.prune(directory):
                output.print_warning(
                    f"{', '.join(gone)}: removed from {directory / owners.OWNERS}, because nobody listens there any "
                    f"more"
                )
            owners.add(directory, served)
        except (CotraError, OSError) as error:
            served.clear()
            noted = [None if path.parent == directory else at for path, at in zip(paths, noted, strict=True)]
            output.print_warning(
                f"not noted in {directory / owners.OWNERS}: {error}. Tell readers the address yourself, "
                "or silence this with --no-announce"
            )
    return noted


def _withdraw(directory: Path, served: list[tuple[int, str]]) -> None:
    try:
        if served:
            owners.remove(directory, served)
    except (CotraError, OSError) as error:
        output.print_warning(f"not removed from {directory / owners.OWNERS}: {error}")


def _is_everywhere(host: str) -> bool:
    """Returns whether a host stands for all addresses of this machine, so that others cannot connect to it."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_unspecified
    except ValueError:
        return host == "*"
