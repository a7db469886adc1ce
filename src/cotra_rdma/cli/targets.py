"""What the verbs that read are pointed at: addresses of owners, or a collection whose `owners.json` names them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import typer

from cotra_rdma._collection.manifest import Collection, collection_directory
from cotra_rdma._collection.owners_file import is_address, load
from cotra_rdma.cli.options import comma_list


class Targets(NamedTuple):
    """The shards that a command line names.

    Attributes:
        owners: for each shard the addresses of its owners; several owners of one shard are replicas.
        collection: the collection that the shards are of, or None if addresses were given.
    """

    owners: list[list[str]]
    collection: Collection | None


def targets(arguments: Sequence[str]) -> Targets:
    """Finds the shards that a command line names.

    Args:
        arguments: for each shard its owners, `HOST:PORT[,HOST:PORT...]`; or one collection, as its directory or its
            `collection.json`.

    Raises:
        typer.BadParameter: an argument is neither, or a collection is not the only argument.
        FormatError: the collection is malformed.
    """
    owners = []
    for argument in arguments:
        addresses = comma_list([argument])
        if "/" in argument or not addresses or not all(map(is_address, addresses)):
            return _of_collection(argument, alone=len(arguments) == 1)
        owners.append(list(dict.fromkeys(addresses)))
    return Targets(owners, None)


def _of_collection(argument: str, *, alone: bool) -> Targets:
    if not Path(argument).exists():
        raise typer.BadParameter(f"{argument!r} is neither HOST:PORT[,HOST:PORT...] nor a collection that is there")
    if not alone:
        raise typer.BadParameter(f"give one collection and nothing else, or addresses only: {argument!r} is a path")
    directory = collection_directory(argument)
    collection, noted = Collection.load(directory, shard_files=False), load(directory)
    return Targets([noted.get(number, []) for number in range(len(collection.shards))], collection)
