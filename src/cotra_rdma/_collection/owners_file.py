"""`owners.json`: the owners of the shards of a collection, in a file beside its manifest
(docs/reference/collection.md).

Owners that share a directory write the file one after the other.
Each holds an exclusive lock on a second file (flock(2)) while it reads, changes and renames the new file into place.
Readers need no lock, because they always read a complete file.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cotra_rdma._collection.manifest import Collection, collection_directory
from cotra_rdma.errors import FormatError, InvalidInputError
from cotra_rdma.protocol.address import parse_address
from cotra_rdma.protocol.regions import ShardFields

OWNERS = "owners.json"
FORMAT = "cotra-owners"
FORMAT_VERSION = 1

_LOCK = ".owners.lock"
_ASIDE = ".owners.new"
_LOCK_TIMEOUT_S = 5.0
_LOCK_RETRY_S = 0.02
_MAX_BYTES = 16 << 20
_LOOK_S = 1.0  # more than a port of this host needs to answer or refuse
_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}", re.ASCII)
_ADDRESS = re.compile(r"(?:\[[0-9A-Fa-f:.]+(?:%[\w.-]+)?\]|[\w.-]+):[0-9]{1,5}", re.ASCII)
_MAX_ADDRESS = 300  # characters; a host name has 253 at most (RFC 1035, section 2.3.4)

Owners = dict[int, list[str]]
"""The number of a shard -> the addresses of its owners. Several owners of one shard are replicas."""


def is_address(text: object) -> bool:
    """Returns whether a text is HOST:PORT or [V6]:PORT, with a port from 1 to 65535 that others can connect to."""
    if not isinstance(text, str) or len(text) > _MAX_ADDRESS:
        return False
    if _ADDRESS.fullmatch(text) is None:
        return False
    try:
        return parse_address(text)[1] >= 1
    except InvalidInputError:
        return False


def load(directory: str | os.PathLike[str]) -> Owners:
    """Reads `owners.json` in a directory. Returns {} if the file does not exist.

    Raises:
        FormatError: the file is malformed.
    """
    path = Path(directory) / OWNERS
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        return {}
    if len(content) > _MAX_BYTES:
        raise FormatError(f"{path}: holds more than {_MAX_BYTES} bytes")
    try:
        raw = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: malformed: {error}") from None
    return _checked(raw, path)


def _checked(raw: Any, path: Path) -> Owners:
    if not isinstance(raw, dict) or raw.get("format") != FORMAT or not isinstance(raw.get("shards"), dict):
        raise FormatError(f"{path}: malformed: no {FORMAT} with shards")
    if raw.get("format_version") != FORMAT_VERSION:
        raise FormatError(
            f"{path}: is {FORMAT} version {raw.get('format_version')!r}, and this release reads {FORMAT_VERSION}"
        )
    owners: Owners = {}
    for number, addresses in raw["shards"].items():
        if not _NUMBER.fullmatch(number):
            raise FormatError(f"{path}: {number[:40]!r} is not a shard's number")
        if not isinstance(addresses, list):
            raise FormatError(f"{path}: shard {number} needs a list of addresses")
        for address in addresses:
            if not is_address(address):
                raise FormatError(f"{path}: shard {number}: {str(address)[:80]!r} is not HOST:PORT")
        owners[int(number)] = list(dict.fromkeys(addresses))
    return owners


def add(
    directory: str | os.PathLike[str], served: Iterable[tuple[int, str]], *, lock_timeout_s: float = _LOCK_TIMEOUT_S
) -> None:
    """Adds owners to the file.

    An address serves one shard.
    If it is in the file for another shard, it is moved; an owner that was killed may have left it there.

    Args:
        directory: the directory of the collection.
        served: (the number of a shard, the address of its owner), one or more.
        lock_timeout_s: the longest wait for the lock, in seconds.

    Raises:
        InvalidInputError: a number is negative, or an address is not HOST:PORT.
        FormatError: the file is malformed. It stays as it is.
        TimeoutError: another process keeps the file locked.
        OSError: the file cannot be written.
    """
    new = list(served)
    for number, address in new:
        if number < 0 or not is_address(address):
            raise InvalidInputError(f"shard {number} cannot have its owner at {address!r}: an address is HOST:PORT")

    def change(owners: Owners) -> None:
        _drop(owners, [address for _, address in new])
        for number, address in new:
            owners.setdefault(number, []).append(address)

    _change(Path(directory), change, lock_timeout_s)


def remove(directory: str | os.PathLike[str], served: Iterable[tuple[int, str]]) -> None:
    """Removes owners from the file. Owners that are not in the file are ignored.

    The arguments and errors are those of `add`.
    """
    gone = list(served)

    def change(owners: Owners) -> None:
        for number, address in gone:
            _drop(owners, [address], only=number)

    _change(Path(directory), change)


def prune(directory: str | os.PathLike[str]) -> list[str]:
    """Removes the owners of this host that were killed.

    These are owners at an IP address of this host where nothing listens.
    Nothing is known about owners on other hosts.
    An owner that is stopped or busy still listens, and stays.

    Returns:
        The addresses of the removed owners.

    Raises:
        FormatError: as for `add`.
        OSError: as for `add`.
    """
    gone: list[str] = []

    def change(owners: Owners) -> None:  # an owner listens before it is added, and the lock is held
        gone.extend(address for address in {at for of in owners.values() for at in of} if _is_gone(address))
        _drop(owners, gone)

    _change(Path(directory), change)
    return sorted(gone)


def _is_gone(address: str) -> bool:
    """Returns whether an address is one of this host, and nothing listens there."""
    host, _, port = address.rpartition(":")
    try:
        to = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)[0]
        with socket.socket(*to[:3]) as probe:
            probe.settimeout(_LOOK_S)
            probe.bind((to[4][0], 0, *to[4][2:]))  # fails for an address of another host
            probe.connect(to[4])
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def addresses_of(path: str | os.PathLike[str]) -> list[list[str]]:
    """Returns the owners of each shard of a collection, in the order of its shards. A shard without owners has [].

    Shard numbers beyond those of the collection come from an earlier build, and are ignored.

    Args:
        path: the directory of the collection, or its `collection.json`. The shard files need not be there.

    Raises:
        FormatError: there is no collection, or its manifest or `owners.json` is malformed.
    """
    directory = collection_directory(path)
    collection, owners = Collection.load(directory, shard_files=False), load(directory)
    return [list(owners.get(number, ())) for number in range(len(collection.shards))]


def misfit(collection: Collection, number: int, found: ShardFields) -> str:
    """Compares a shard that an owner serves with the manifest.

    Args:
        collection: the collection.
        number: the number of the shard in the manifest.
        found: what the owner says about its shard.

    Returns:
        How the two differ, or "" if they do not.
    """
    entry = collection.shards[number]
    generation = collection.generation if entry.generation is None else entry.generation
    if found.generation != generation:
        return f"generation {found.generation}, and the manifest has {generation}"
    theirs = (found.dim, found.metric, found.count, found.image_bytes)
    if theirs != (collection.dim, collection.metric, entry.count, entry.image_bytes):
        return (
            f"{found.count} x {found.dim} vectors, {found.metric}, in {found.image_bytes} bytes, and the manifest has "
            f"{entry.count} x {collection.dim}, {collection.metric}, in {entry.image_bytes}"
        )
    if (
        entry.image_checksum is None or found.image_checksum is None
    ):  # the collection or the owner is of an earlier version
        return ""
    if (found.graph_id, found.graph_base) != (collection.graph_id, entry.base):
        return (
            f"nodes from {found.graph_base} of graph {found.graph_id:016x}, and the manifest has those from "
            f"{entry.base} of {collection.graph_id:016x}"
        )
    if found.image_checksum != entry.image_checksum:
        return f"an image with checksum {found.image_checksum:016x}, and the manifest has {entry.image_checksum:016x}"
    return ""


def _drop(owners: Owners, addresses: Sequence[str], only: int | None = None) -> None:
    """Removes addresses from all shards, or only from one."""
    for number in list(owners) if only is None else [only]:
        left = [address for address in owners.get(number, ()) if address not in addresses]
        if left:
            owners[number] = left
        else:
            owners.pop(number, None)


def _change(directory: Path, change: Callable[[Owners], None], lock_timeout_s: float = _LOCK_TIMEOUT_S) -> None:
    """Changes the file under the lock. A file that stays the same is not written."""
    with _locked(directory, lock_timeout_s):
        owners = load(directory)
        before = {number: list(addresses) for number, addresses in owners.items()}
        change(owners)
        if owners == before:
            return
        shards = {str(number): owners[number] for number in sorted(owners)}
        text = json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, "shards": shards}, indent=2)
        aside = directory / _ASIDE  # only the holder of the lock writes to this name
        with aside.open("w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        aside.replace(directory / OWNERS)


@contextmanager
def _locked(directory: Path, timeout_s: float) -> Iterator[None]:
    """Holds the lock. The lock file is never removed: else two processes could lock two files of the same name."""
    with (directory / _LOCK).open("a") as file:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"{directory / _LOCK}: another process has kept it locked for {timeout_s:g} s"
                    ) from None
                time.sleep(_LOCK_RETRY_S)
        yield
