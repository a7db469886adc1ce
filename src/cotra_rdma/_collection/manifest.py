"""The manifest of a collection: the files that hold its shards, and what they were built with."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from cotra_rdma._core.files import write_whole
from cotra_rdma._routing.calibration import Calibration
from cotra_rdma._routing.coarse_table import CoarseTable
from cotra_rdma._routing.router import Router
from cotra_rdma.errors import FormatError, InvalidInputError

MANIFEST = "collection.json"
FORMAT = "cotra-collection"
FORMAT_VERSION = 3
"""The version that is written. Versions 1 and 2 can still be read.

Version 1 has no partition, coarse tables and calibration.
Versions 1 and 2 have no `graph_id`, and their shards have no bases, generations, checksums and centroids.
"""

PARTITIONS = ("range", "kmeans")
GRAPHS = ("independent", "global")


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One shard of a collection: `count` rows of the data set, with their row numbers as ids.

    Attributes:
        name: the name of the shard's file.
        first_id: the smallest id. In a range partition, the other ids follow one by one.
        count: the number of vectors.
        image_bytes: the length of the file.
        coarse_name: the name of the file of the coarse table. None in a collection of version 1.
        base: the number of the shard's first node in one graph. 0 for an independent shard.
        generation: the generation of the image. None in collections of versions 1 and 2.
        image_checksum: the checksum of the image. None in collections of versions 1 and 2.
        centroid: the shard's centroid in the partition, dim numbers. For cosine, vectors are normalised first. None if
            the partition has no centroids.
    """

    name: str
    first_id: int
    count: int
    image_bytes: int
    coarse_name: str | None = None
    base: int = 0
    generation: int | None = None
    image_checksum: int | None = None
    centroid: tuple[float, ...] | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Collection:
    """The content of a manifest.

    Attributes:
        dim: the components of a vector.
        metric: "l2", "ip" or "cosine".
        count: the number of rows of the data set.
        M: a parameter of the build, as for `Shard.build`.
        ef_construction: a parameter of the build, as for `Shard.build`.
        seed: a parameter of the build, as for `Shard.build`.
        generation: a number that grows when the collection is built again in the same place.
        shards: the shards, in the order in which they are served.
        partition: how the rows were divided, "range" or "kmeans".
        graph: "independent" if each shard is searched by itself, or "global" if the shards make one graph
            (`cotra_rdma._build.cross_links`).
        calibration: the calibration of Compass. None if there is one shard, or there were too few vectors.
        graph_id: the number that names one graph, which is also in the images. 0 if there is none, or the version has
            no such field.
    """

    dim: int
    metric: str
    count: int
    M: int
    ef_construction: int
    seed: int
    generation: int
    shards: tuple[ShardFile, ...]
    partition: str = "range"
    graph: str = "independent"
    calibration: Calibration | None = field(default=None, repr=False)
    graph_id: int = 0

    @classmethod
    def load(cls, directory: str | os.PathLike[str], *, shard_files: bool = True) -> Self:
        """Reads the manifest in a directory.

        Args:
            directory: the directory of the collection.
            shard_files: whether the files that the manifest names must exist. A reader needs none of them, and an owner
                needs only those of its shards.

        Raises:
            FormatError: there is no manifest, it is malformed, or a file is missing.
        """
        path = Path(directory) / MANIFEST
        try:
            raw = json.loads(path.read_bytes())
            form = raw.pop("format"), raw.pop("format_version")
            shards = tuple(_shard_file(shard) for shard in raw.pop("shards"))
            calibration = raw.pop("calibration", None)
            loaded = cls(**raw, shards=shards)
        except FileNotFoundError:
            raise FormatError(
                f"{directory}: holds no {MANIFEST}, so it is not a directory that `cotra build` made"
            ) from None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise FormatError(f"{path}: malformed manifest: {error}") from error
        if form not in [(FORMAT, version) for version in range(1, FORMAT_VERSION + 1)]:
            raise FormatError(
                f"{path}: is {form[0]} version {form[1]}, and this release reads {FORMAT} up to {FORMAT_VERSION}"
            )
        for name in (name for shard in shards for name in (shard.name, shard.coarse_name) if name is not None):
            if not isinstance(name, str) or Path(name).name != name:
                raise FormatError(f"{path}: names {name!r}, which is not a file beside it")
            if shard_files and not (path.parent / name).is_file():
                raise FormatError(f"{path}: names {name!r}, which is not a file beside it")
        if loaded.partition not in PARTITIONS:
            raise FormatError(f"{path}: its partition {loaded.partition!r} is not one of {', '.join(PARTITIONS)}")
        if loaded.graph not in GRAPHS:
            raise FormatError(f"{path}: its graph {loaded.graph!r} is not one of {', '.join(GRAPHS)}")
        if why := _fault(loaded, form[1]):
            raise FormatError(f"{path}: {why}")
        if calibration is not None:
            try:
                loaded = replace(loaded, calibration=Calibration.from_json(calibration))
            except FormatError as error:
                raise FormatError(f"{path}: {error}") from None
        return loaded

    def save(self, directory: Path) -> None:
        """Writes the manifest: the new one is there as a whole, or the old one is."""
        raw = {"format": FORMAT, "format_version": FORMAT_VERSION, **self.summary()}
        shards = ",".join(f"\n    {json.dumps(shard)}" for shard in raw.pop("shards"))
        calibration = None if self.calibration is None else self.calibration.to_json()
        lines = [f'  "{name}": {json.dumps(value)}' for name, value in raw.items()]
        lines += [f'  "shards": [{shards}\n  ]', f'  "calibration": {json.dumps(calibration)}']
        write_whole(directory / MANIFEST, [("{\n" + ",\n".join(lines) + "\n}\n").encode()])

    def summary(self) -> dict[str, Any]:
        """Returns everything except the calibration, as values that JSON knows."""
        return {name: value for name, value in asdict(self).items() if name != "calibration"}

    def coarse_table(self, directory: str | os.PathLike[str], shard: int) -> CoarseTable | None:
        """Reads the coarse table of a shard.

        Args:
            directory: the directory of the collection.
            shard: the number of the shard.

        Returns:
            The coarse table, or None in a collection of version 1.

        Raises:
            FormatError: the table is malformed, or is of another shard.
            OSError: the file cannot be read.
        """
        entry = self.shards[shard]
        if entry.coarse_name is None:
            return None
        path = Path(directory) / entry.coarse_name
        try:
            table = CoarseTable.decode(path.read_bytes())
        except FormatError as error:
            raise FormatError(f"{path}: {error}") from None
        if (table.count, table.dim) != (entry.count, self.dim):
            raise FormatError(
                f"{path}: is of {table.count} vectors of dimension {table.dim}, "
                f"not of the shard's {entry.count} of {self.dim}"
            )
        return table

    def router(self, directory: str | os.PathLike[str]) -> Router | None:
        """Makes Compass for the collection. Returns None for a collection of version 1.

        Raises:
            FormatError: a coarse table is malformed, or does not fit.
            OSError: a file cannot be read.
        """
        tables = [self.coarse_table(directory, number) for number in range(len(self.shards))]
        known = [table for table in tables if table is not None]
        return Router(known, self.calibration, self.metric) if len(known) == len(tables) else None


def collection_directory(path: str | os.PathLike[str]) -> Path:
    """Returns the directory of the collection that `path` names: the directory itself, or its manifest.

    Raises:
        FormatError: the path names no collection.
    """
    given = Path(path)
    if given.is_dir():
        return given
    if given.name == MANIFEST and given.is_file():
        return given.parent
    if given.suffix == ".json" and given.is_file():
        try:
            json.loads(given.read_bytes())
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{given}: malformed manifest: {error}") from None
    raise FormatError(f"{given}: is neither a directory that `cotra build` made nor the {MANIFEST} in it")


def place_of(path: str | os.PathLike[str]) -> tuple[Collection, int] | None:
    """Finds the collection in whose directory a shard's file is.

    Args:
        path: the shard's file.

    Returns:
        The collection, and the number of the shard in it. None if the file belongs to no collection.

    Raises:
        FormatError: the manifest is malformed.
    """
    file = Path(path)
    if not (file.parent / MANIFEST).is_file():
        return None
    collection = Collection.load(file.parent, shard_files=False)
    numbers = [number for number, shard in enumerate(collection.shards) if shard.name == file.name]
    return (collection, numbers[0]) if numbers else None


def coarse_of(path: str | os.PathLike[str]) -> tuple[CoarseTable, dict[str, Any]] | None:
    """Reads the coarse table of a shard, and the fields that go with it in a message of type 53.

    Args:
        path: the shard's file.

    Returns:
        The table, and a map of the number of the shard in its collection and the collection's calibration. None if the
        file belongs to no collection.

    Raises:
        FormatError: the collection is malformed.
        OSError: the table's file cannot be read.
    """
    place = place_of(path)
    if place is None:
        return None
    collection, number = place
    table = collection.coarse_table(Path(path).parent, number)
    if table is None:
        return None
    calibration = collection.calibration
    return table, {"shard": number, "calibration": None if calibration is None else calibration.to_json()}


def shard_paths(paths: Iterable[str | os.PathLike[str]], shards: Sequence[int] | None = None) -> list[Path]:
    """Returns the shard files that some paths name.

    Args:
        paths: shard files, and collections by their directory or manifest.
        shards: the numbers of the shards to return, for collections. None stands for all. The files of other shards
            need not exist.

    Raises:
        FormatError: a path names no collection, or the collection is malformed or lacks files.
        InvalidInputError: a collection has no such shard, or there are numbers for a path that is not a collection.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir() and path.name != MANIFEST:
            if shards is not None:
                raise InvalidInputError(f"{path}: is no collection, so shards cannot be chosen from it")
            if (path.parent / MANIFEST).is_file() and place_of(path) is None:
                raise InvalidInputError(
                    f"{path}: the collection in its directory does not name it: it is of another build"
                )
            found.append(path)
            continue
        directory = collection_directory(path)
        entries = Collection.load(directory, shard_files=shards is None).shards
        for number in range(len(entries)) if shards is None else shards:
            if not 0 <= number < len(entries):
                raise InvalidInputError(f"{path}: has no shard {number}: its shards are 0 to {len(entries) - 1}")
            found.append(directory / entries[number].name)
    return found


def _shard_file(raw: dict[str, Any]) -> ShardFile:
    centroid = raw.get("centroid")
    return ShardFile(**raw | ({} if centroid is None else {"centroid": tuple(centroid)}))


def _fault(collection: Collection, version: int) -> str:
    """Returns what is wrong with the numbers of a manifest, or "" if nothing is."""
    shards = collection.shards

    def whole(value: object, low: int, bits: int) -> bool:
        return type(value) is int and low <= value < 1 << bits

    if not whole(collection.dim, 1, 31) or not whole(collection.count, 1, 63) or not whole(collection.graph_id, 0, 64):
        return "its dim, count or graph_id is out of range"
    base = 0
    for number, shard in enumerate(shards):
        sizes = (shard.count, 1, 31), (shard.first_id, 0, 63), (shard.image_bytes, 1, 63), (shard.base, 0, 31)
        if not all(whole(*size) for size in sizes):
            return f"shard {number}: its count, first_id, image_bytes or base is out of range"
        if version >= 3 and not (whole(shard.generation, 0, 64) and whole(shard.image_checksum, 0, 64)):
            return f"shard {number}: its generation or image_checksum is out of range"
        if shard.base != (base if collection.graph_id else 0):
            return f"shard {number}: its base is {shard.base}, and the shards before it hold {base} nodes"
        base += shard.count
        place = shard.centroid
        if place is not None and not (
            len(place) == collection.dim
            and all(type(value) in (int, float) and math.isfinite(value) for value in place)
        ):
            return f"shard {number}: its centroid is not {collection.dim} finite numbers"
    return ""
