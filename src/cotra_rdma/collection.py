"""Collections: one data set split over several shard files, with a manifest beside them."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import numpy as np

from cotra_rdma.datasets import VectorFile
from cotra_rdma.errors import FormatError, InvalidInputError
from cotra_rdma.shard import Shard

MANIFEST = "collection.json"
FORMAT = "cotra-collection"
FORMAT_VERSION = 1

PACK_SHARE = 0.1  # of the time that a shard takes, about

Progress = Callable[[int, str, int], None]
"""Called with (shard, its phase: "build" or "pack", rows done of the whole data set)."""


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One shard of a collection: rows [first_id, first_id + count) of the data set, under their row numbers as ids."""

    name: str
    first_id: int
    count: int
    image_bytes: int


@dataclass(frozen=True, slots=True)
class Collection:
    """What the manifest says. `generation` counts up when a collection is built again in the same place."""

    dim: int
    metric: str
    count: int
    M: int
    ef_construction: int
    seed: int
    generation: int
    shards: tuple[ShardFile, ...]

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Self:
        """Reads the manifest in `directory`. Raises `FormatError` when it is not one, or a shard file is missing."""
        path = Path(directory) / MANIFEST
        try:
            raw = json.loads(path.read_bytes())
            form = raw.pop("format"), raw.pop("format_version")
            shards = tuple(ShardFile(**shard) for shard in raw.pop("shards"))
            loaded = cls(**raw, shards=shards)
        except FileNotFoundError:
            raise FormatError(f"{directory}: holds no {MANIFEST}: not a directory that `cotra build` made") from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise FormatError(f"{path}: malformed manifest: {error}") from error
        if form != (FORMAT, FORMAT_VERSION):
            raise FormatError(
                f"{path}: is {form[0]} version {form[1]}, and this release reads {FORMAT} {FORMAT_VERSION}"
            )
        for shard in shards:
            if Path(shard.name).name != shard.name or not (path.parent / shard.name).is_file():
                raise FormatError(f"{path}: names {shard.name!r}, which is not a file beside it")
        return loaded

    def save(self, directory: Path) -> None:
        """Writes the manifest."""
        raw = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        (directory / MANIFEST).write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def build_collection(
    vectors: VectorFile,
    directory: str | os.PathLike[str],
    n_shards: int = 1,
    *,
    metric: str = "l2",
    M: int = 16,
    ef_construction: int = 200,
    seed: int = 100,
    n_threads: int = 0,
    force: bool = False,
    progress: Progress | None = None,
) -> Collection:
    """Splits a file's rows into `n_shards` equal ranges, builds each and writes them to `directory`.

    One shard is in memory at a time. Files are written aside and renamed when all are whole: a failed run leaves the
    directory as it was.

    Args:
        vectors: the data set; row numbers become ids.
        directory: made when it is missing.
        n_shards: at most one a row.
        metric, M, ef_construction, seed, n_threads: as `Shard.build`.
        force: replace a collection that is there already.
        progress: told how far each shard is.

    Raises:
        InvalidInputError: there is a collection already, or a value is out of its range.
    """
    out = Path(directory)
    if not 1 <= n_shards <= vectors.count:
        raise InvalidInputError(f"{vectors.count} rows cannot be split into {n_shards} shards")
    if out.exists() and not out.is_dir():
        raise InvalidInputError(f"{out}: exists and is not a directory")
    old = sorted([*out.glob("shard-*.cotra"), *out.glob(MANIFEST)])
    if old and not force:
        raise InvalidInputError(
            f"{out}: holds a collection already ({old[0].name}); it is replaced only with force (--force)"
        )
    generation = _generation(out) + 1
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".building-", dir=out))
    try:
        bounds = np.linspace(0, vectors.count, n_shards + 1).astype(int).tolist()
        shards = []
        for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
            name = f"shard-{number:03d}.cotra"
            with Shard.build(
                vectors.read(start, stop),
                ids=np.arange(start, stop, dtype=np.int64),
                metric=metric,
                M=M,
                ef_construction=ef_construction,
                seed=seed,
                n_threads=n_threads,
                progress=progress and _rows_done(progress, number, start, stop - start),
                generation=generation,
            ) as shard:
                shard.save(aside / name)
                shards.append(ShardFile(name, start, stop - start, shard.info.image_bytes))
        collection = Collection(vectors.dim, metric, vectors.count, M, ef_construction, seed, generation, tuple(shards))
        collection.save(aside)
        for path in [*(aside / shard.name for shard in shards), aside / MANIFEST]:
            path.replace(out / path.name)
        for path in set(old) - {out / name for name in [MANIFEST, *(shard.name for shard in shards)]}:
            path.unlink()
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if made:
            with contextlib.suppress(OSError):  # it is not empty: the run went well
                out.rmdir()
    return collection


def shard_paths(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The shard files that `paths` name: files as they are, directories by their manifest. Raises `FormatError`."""
    found: list[Path] = []
    for path in map(Path, paths):
        found += [path / shard.name for shard in Collection.load(path).shards] if path.is_dir() else [path]
    return found


def _generation(directory: Path) -> int:
    try:
        return Collection.load(directory).generation
    except FormatError:
        return 0


def _rows_done(progress: Progress, number: int, start: int, count: int) -> Callable[[str, int, int], None]:
    def report(phase: str, done: int, total: int) -> None:
        share = done / max(total, 1)
        share = share * (1 - PACK_SHARE) if phase == "build" else 1 - PACK_SHARE + share * PACK_SHARE
        progress(number, phase, start + round(share * count))

    return report
