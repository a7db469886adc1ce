"""`Publication`: makes a collection aside, and moves it into place when it is complete."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from cotra_rdma._collection.manifest import MANIFEST, Collection
from cotra_rdma.errors import FormatError, InvalidInputError


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
        self._old = {path: path.stat().st_ino for path in old}
        try:
            self.generation = Collection.load(out).generation + 1
        except FormatError:
            self.generation = 1
        self._made = not out.exists()

    def __enter__(self) -> Self:
        self._out.mkdir(parents=True, exist_ok=True)
        self.aside = Path(tempfile.mkdtemp(prefix=".building-", dir=self._out))
        return self

    def publish(self, collection: Collection, numbers: Iterable[int] | None = None) -> None:
        """Renames the files of the shards into place, and the manifest last. Files of an earlier build are removed.

        Args:
            collection: the new collection.
            numbers: the shards that were made here. None stands for all. Other builders may make the rest in the same
                directory at the same time.
        """
        collection.save(self.aside)
        here = range(len(collection.shards)) if numbers is None else numbers
        shards = [collection.shards[number] for number in here]
        made = [name for shard in shards for name in (shard.name, shard.coarse_name) if name is not None]
        for name in [*made, MANIFEST]:
            (self.aside / name).replace(self._out / name)
        for path in set(self._old) - {self._out / name for name in [MANIFEST, *made]}:
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_ino == self._old[path]:  # a new file is another builder's
                    path.unlink()

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.aside, ignore_errors=True)
        if self._made:
            with contextlib.suppress(OSError):  # the directory is not empty if the build went well
                self._out.rmdir()
