"""`Reload`: how `cotra serve` changes to a collection that was built again; and the checks of a shard's file."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path

from cotra_rdma._collection.manifest import MANIFEST, Collection, coarse_of, place_of
from cotra_rdma._collection.owners_file import misfit
from cotra_rdma._owner.server import Server
from cotra_rdma._shard.shard import Shard
from cotra_rdma.errors import CotraError, FormatError, InvalidInputError
from cotra_rdma.protocol.regions import ShardFields, as_fields
from cotra_rdma.protocol.tables import CentroidTable, CoarseRouteResponse

log = logging.getLogger(__name__)


class Reload:
    """Changes servers to a collection that was built again. Each shard keeps its address, and gets its new image."""

    def __init__(self, stack: contextlib.ExitStack, paths: Sequence[Path], servers: Sequence[Server]) -> None:
        """Remembers the manifests as they are now.

        Args:
            stack: closes the shards that this object opens.
            paths: the files of the shards. Those that are of no collection are ignored.
            servers: the server of each shard.
        """
        self._stack = stack
        places = [place_of(path) for path in paths]
        self._served = [
            (path.parent, place[1], server)
            for path, place, server in zip(paths, places, servers, strict=True)
            if place is not None
        ]
        self._seen = self._manifests()

    def _manifests(self) -> list[tuple[int, int] | None]:
        found: list[tuple[int, int] | None] = []
        for directory in dict.fromkeys(directory for directory, _, _ in self._served):
            try:
                status = (directory / MANIFEST).stat()
            except OSError:
                found.append(None)
                continue
            found.append((status.st_ino, status.st_mtime_ns))
        return found

    def is_due(self) -> bool:
        """Returns whether a manifest was replaced since the last look."""
        return None not in (now := self._manifests()) and now != self._seen

    def now(self) -> None:
        """Reads the manifests, and replaces the image of each server whose shard has another one.

        If that fails for a shard, the reason is logged, and the shard is served as before.
        """
        self._seen = self._manifests()
        for directory, number, server in self._served:
            try:
                self._replace(directory, number, server)
            except (CotraError, OSError) as error:
                log.warning("%s goes on with the image that it has: %s", server.address, error)

    def _replace(self, directory: Path, number: int, server: Server) -> None:
        collection = Collection.load(directory, shard_files=False)
        if number >= len(collection.shards):
            raise InvalidInputError(
                f"the collection has {len(collection.shards)} shards now, and this is shard {number}"
            )
        path = directory / collection.shards[number].name
        if server.shard.info.image_checksum == collection.shards[number].image_checksum:
            return
        opened = Shard.open(path)
        try:
            check_fits(path, opened)
            server.replace(opened, coarse_payload(path), released=server.shard.close)
        except BaseException:
            opened.close()
            raise
        self._stack.callback(opened.close)
        log.warning("%s serves generation %d of %s from now on", server.address, collection.generation, path)


def check_fits(path: Path, shard: Shard) -> None:
    """Checks that a file holds the shard that the manifest beside it names.

    Raises:
        FormatError: it holds another one.
    """
    place = place_of(path)
    if place is not None and (why := misfit(*place, as_fields(ShardFields, shard.info))):
        raise FormatError(f"{path}: holds {why}")


def coarse_payload(path: Path) -> bytes | None:
    """Returns the coarse table of a shard of a collection, as a payload of type 53. None if the shard is of no collection."""
    found = coarse_of(path)
    if found is None:
        return None
    table, collection = found
    return CoarseRouteResponse(0, "", CentroidTable.of(table, "float16"), collection).encode()
