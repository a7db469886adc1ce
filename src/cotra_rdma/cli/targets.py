"""What the verbs that read are pointed at: addresses of owners, or collections whose `owners.json` has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import typer

from cotra_rdma._collection import owners_file as owners
from cotra_rdma._collection.manifest import Collection, collection_directory
from cotra_rdma._collection.owner_probe import OwnerStatus, ask_owners
from cotra_rdma.cli.options import comma_list
from cotra_rdma.errors import TransportError
from cotra_rdma.protocol.tls import Tls


class Reachable(NamedTuple):
    """What can be searched of the shards that were named.

    Attributes:
        owners: the addresses for each shard, in order.
        missing: the positions of those that have none, and why.
        allow_partial: whether shards may be left out.
    """

    owners: list[list[str]]
    missing: dict[int, str]
    allow_partial: bool


@dataclass(frozen=True, slots=True)
class Target:
    """A shard to be read: what to call it, its owners' addresses (several owners are replicas), and where they were found in a
    collection, that one and the shard's number in it."""

    name: str
    owners: list[str]
    place: tuple[Collection, int] | None = None


def targets(arguments: Sequence[str]) -> list[Target]:
    """The shards that a command line names, in order.

    Args:
        arguments: each is one shard's owners, `HOST:PORT[,HOST:PORT...]`, or a collection: all its shards, by its directory
            or `collection.json`.

    Raises: a usage error for what is neither; `FormatError` for a broken collection.
    """
    found: list[Target] = []
    for argument in arguments:
        addresses = comma_list([argument])
        if "/" not in argument and addresses and all(map(owners.is_address, addresses)):
            found.append(Target(f"shard {len(found)}", list(dict.fromkeys(addresses))))
        elif Path(argument).exists():
            collection = Collection.load(collection_directory(argument), shard_files=False)
            for number, addresses in enumerate(owners.addresses_of(argument)):
                found.append(Target(f"shard {len(found)}", addresses, (collection, number)))
        else:
            raise typer.BadParameter(f"{argument!r} is neither HOST:PORT[,HOST:PORT...] nor a collection that is there")
    return found


def reachable(
    wanted: Sequence[Target], timeout_s: float, *, allow_partial: bool | None, tls: Tls | None = None
) -> Reachable:
    """The owners of each shard that answer, and serve what the manifest names.

    Args:
        wanted: the shards.
        timeout_s: the longest wait for an owner, in seconds.
        allow_partial: leave out a shard without an owner that answers. None: where those that have one are of one graph.
        tls: this side's certificate, where the owners want one.

    Raises `TransportError` that names these, where they may not be left out or there is no other.
    """
    everyone = [address for shard in wanted for address in shard.owners]
    told = dict(zip(everyone, ask_owners(everyone, timeout_s, tls), strict=True))
    chosen: list[list[str]] = []
    missing: dict[int, str] = {}
    for position, shard in enumerate(wanted):
        problems = {address: _problem(told[address], shard.place) for address in shard.owners}
        alive = [address for address, problem in problems.items() if not problem]
        chosen.append(alive)
        if alive:
            continue
        if problems:
            missing[position] = "; ".join(f"{address}: {problem}" for address, problem in problems.items())
        else:
            missing[position] = f"no owner is noted in {owners.OWNERS}"
    if allow_partial is None:
        serve = [told[address].serves for alive in chosen for address in alive]
        graphs = {fields.graph_id for fields in serve if fields is not None}
        allow_partial = len(graphs) == 1 and graphs != {0}
    if missing and (not allow_partial or not any(chosen)):
        names = "; ".join(f"{wanted[position].name}: {why}" for position, why in missing.items())
        raise TransportError(
            f"{len(missing)} of {len(wanted)} shards have no owner that answers: {names}", shard=min(missing)
        )
    return Reachable(chosen, missing, allow_partial)


def _problem(status: OwnerStatus, place: tuple[Collection, int] | None) -> str:
    """Why an owner cannot be used for a shard; "" where it can."""
    if status.serves is None or place is None:
        return status.problem
    misfit = owners.misfit(*place, status.serves)
    return misfit and f"it serves {misfit}"
