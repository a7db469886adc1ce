"""`Publication`: makes a collection aside, and moves it into place when it is complete."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Self

from cotra_rdma._collection.manifest import MANIFEST, Collection
from cotra_rdma._core.files import sync_directory, sync_file
from cotra_rdma.errors import FormatError, InvalidInputError

_SCRATCH = ".building-"


class Publication:
    """Makes a collection in a temporary directory, and moves it into place when it is complete. A context manager.

    Args:
        directory: the directory of the collection.
        force: whether to replace a collection that is already there.

    Attributes:
        aside: the temporary directory, inside that of the collection. It is removed at the end.
        generation: the generation of the new collection.

    Raises:
        InvalidInputError: there is a collection and `force` is not set, or a file is in the way.
    """

    def __init__(self, directory: str | os.PathLike[str], *, force: bool) -> None:
        self._out = out = Path(directory)
        if out.exists() and not out.is_dir():
            raise InvalidInputError(f"{out}: exists and is not a directory")
        old = sorted([*out.glob("shard-*.cotra"), *out.glob("shard-*.coarse"), *out.glob(MANIFEST)])
        if old and not force:
            raise InvalidInputError(
                f"{out}: holds a collection already ({old[0].name}); it is replaced only with force (--force)"
            )
        self._old = old
        self.generation = 1 + max((_generation_of(path) for path in old), default=0)
        self._made = not out.exists()

    def __enter__(self) -> Self:
        self._out.mkdir(parents=True, exist_ok=True)
        self._remove_scratch()
        self.aside = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=self._out))
        self._hold = os.open(self.aside, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(self._hold, fcntl.LOCK_EX)  # as long as this process lives
        return self

    def _remove_scratch(self) -> None:
        """Removes what builds that were killed have left."""
        for left in self._out.glob(f"{_SCRATCH}*"):
            with contextlib.suppress(OSError):
                fd = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # its builder is gone
                    shutil.rmtree(left, ignore_errors=True)
                finally:
                    os.close(fd)

    def publish(self, collection: Collection, numbers: Iterable[int] | None = None) -> Collection:
        """Renames the files of the shards into place, then the manifest, and removes those of an earlier build.

        Files of another generation have other names, so the old collection is whole until its manifest is replaced, and the
        new one from then on. Whoever kills this process, or the machine, gets the one or the other.

        Args:
            collection: the new collection, with the names that the files have in `aside`.
            numbers: the shards that were made here. None stands for all. Other builders may make the rest in the same
                directory at the same time.

        Returns:
            The collection with the names that its files have in the directory.
        """
        published = replace(
            collection,
            shards=tuple(
                replace(
                    shard,
                    name=_name_of(shard.name, collection.generation),
                    coarse_name=shard.coarse_name and _name_of(shard.coarse_name, collection.generation),
                )
                for shard in collection.shards
            ),
        )
        for number in range(len(collection.shards)) if numbers is None else numbers:
            made, named = collection.shards[number], published.shards[number]
            for name, to in ((made.name, named.name), (made.coarse_name, named.coarse_name)):
                if name is not None and to is not None:
                    sync_file(self.aside / name)
                    (self.aside / name).replace(self._out / to)
        published.save(self.aside)
        sync_directory(self._out)
        (self.aside / MANIFEST).replace(self._out / MANIFEST)
        sync_directory(self._out)
        kept = {name for shard in published.shards for name in (shard.name, shard.coarse_name)} | {MANIFEST}
        for path in self._old:
            if path.name not in kept:
                path.unlink(missing_ok=True)
        return published

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.aside, ignore_errors=True)
        os.close(self._hold)
        if self._made:
            with contextlib.suppress(OSError):  # the directory is not empty if the build went well
                self._out.rmdir()


def _generation_of(path: Path) -> int:
    """The generation of a file of a collection; 1 where that cannot be told."""
    if path.name == MANIFEST:
        try:
            return Collection.load(path.parent, shard_files=False).generation
        except FormatError:
            return 1
    found = re.search(r"-g([0-9]{1,18})\.", path.name)
    return int(found[1]) if found else 1


def _name_of(name: str, generation: int) -> str:
    """The name of a shard's file in the collection: the first generation has the plain ones."""
    stem, dot, suffix = name.partition(".")
    return name if generation == 1 else f"{stem}-g{generation}{dot}{suffix}"
