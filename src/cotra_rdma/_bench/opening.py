"""Opens the systems of a benchmark. Graphs are built once, and kept for the next run."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cotra_rdma._bench.data import DataSet
from cotra_rdma._bench.libraries import LIBRARIES, SEED, Progress, library_version
from cotra_rdma._bench.runner import Plan, System
from cotra_rdma._bench.systems import Algorithm, Collective, Local, Remote, owners_search
from cotra_rdma._bench.transports import MIXED, parse_transport
from cotra_rdma._build.collection import build_collection
from cotra_rdma._collection.manifest import shard_paths
from cotra_rdma._owner.answers import TRANSPORTS
from cotra_rdma._shard.shard import Shard
from cotra_rdma.errors import FormatError, InvalidInputError


@dataclass(frozen=True, slots=True)
class Budget:
    """The size of a cache: in bytes, or as a share of the shards."""

    nbytes: int = 0
    share: float = 0.0

    def of(self, paths: Sequence[Path]) -> int:
        """Returns the size in bytes for these shards."""
        return self.nbytes or round(self.share * sum(path.stat().st_size for path in paths))


@dataclass(frozen=True, slots=True)
class Split:
    """How a data set is split over shards, and the algorithms that are measured over them."""

    algorithms: Sequence[str]
    n_shards: Sequence[int] = (16,)
    partition: str = "kmeans"
    n_lists: int = 0
    graph: str = "independent"


@contextlib.contextmanager
def open_systems(
    data: DataSet,
    transports: Sequence[str],
    plan: Plan,
    cache: Path,
    *,
    libraries: Sequence[str] = ("hnswlib",),
    split: Split | None = None,
    budgets: Sequence[Budget] = (Budget(),),
    progress: Progress = lambda what, done, total: None,
) -> Iterator[list[System]]:
    """Opens other libraries and this package over each transport, ready to be measured, and closes them at the end.

    With a `split`, this package searches a collection by each algorithm; without one, it searches a single shard.
    A system that reads has a cache of records of each of the `budgets`.

    All cores build the graphs, with the plan's M and ef_construction.
    The directory `cache` keeps them for the next run.
    Their names hold a hash of the vectors, the parameters, and a library's version.

    Args:
        data: the data set.
        transports: the names of transports, as `parse_transport` takes them.
        plan: the parameters of the graphs, and the most threads.
        cache: the directory for built graphs.
        libraries: the names of other libraries.
        split: how to split the data set; None for a single shard.
        budgets: the sizes of the cache of records.
        progress: called with what is built, the vectors that are done, and the number of vectors.
    """
    fabrics = [parse_transport(transport) for transport in transports]
    if split is None and MIXED in transports:
        raise InvalidInputError(f"{MIXED} needs several shards: give --algorithm")
    cache.mkdir(parents=True, exist_ok=True)
    shape = f"{data.vectors.count}x{data.vectors.dim}"
    stem = f"{data.name}-{shape}-{data.digest()}-{data.metric}-M{plan.M}-efc{plan.ef_construction}"
    with contextlib.ExitStack() as stack:
        systems: list[System] = []
        for name in libraries:
            path = cache / f"{stem}.{name}-{library_version(name)}"
            systems.append(LIBRARIES[name](data, plan, path, progress))
        if split is not None:
            asked: set[tuple[int, str]] = set()
            for n_shards in split.n_shards:
                directory = _collection(data, plan, split, n_shards, cache, stem, progress)
                sizes = [budget.of(shard_paths([directory])) for budget in budgets]
                for transport, cache_bytes in itertools.product(transports, sizes):
                    collective = Collective(directory, transport, cache_bytes)
                    stack.callback(collective.close)
                    for algorithm in split.algorithms:
                        # what owners search is the same over any transport
                        if not (owners_search(algorithm) and (n_shards, algorithm) in asked):
                            systems.append(Algorithm(collective, algorithm))
                            asked.add((n_shards, algorithm))
            yield systems
            return
        shard = _shard(data, plan, cache / f"{stem}.cotra", progress)
        for transport, (kind, fabric) in zip(transports, fabrics, strict=True):
            for cache_bytes in (0,) if kind == "rpc" else [budget.of([shard]) for budget in budgets]:
                ours: System
                if kind in TRANSPORTS:
                    ours = Remote(shard, kind, cache_bytes)
                else:
                    ours = Local(shard, transport, fabric, max(plan.threads), cache_bytes)
                systems.append(ours)
                stack.callback(ours.close)
        yield systems


def _collection(
    data: DataSet, plan: Plan, split: Split, n_shards: int, cache: Path, stem: str, progress: Progress
) -> Path:
    linked = "-linked" if split.graph == "global" else ""
    n_lists = max(n_shards, split.n_lists) if split.n_lists else 0
    path = cache / f"{stem}-{n_shards}x{split.partition}{linked}-ivf{n_lists}"
    if not path.is_dir() or not all(map(_is_current, shard_paths([path]))):

        def report(shard: int, phase: str, done: int) -> None:
            progress(phase if shard < 0 else f"shard {shard + 1}/{n_shards} {phase}", done, data.vectors.count)

        build_collection(
            data.vectors,
            path,
            n_shards,
            metric=data.metric,
            M=plan.M,
            ef_construction=plan.ef_construction,
            seed=SEED,
            partition=split.partition,
            n_lists=n_lists,
            graph=split.graph,
            force=True,
            progress=report,
        )
    return path


def _is_current(path: Path) -> bool:
    """Returns whether a shard's file exists and is of this version's format."""
    try:
        Shard.open(path, verify=False).close()
    except (FileNotFoundError, FormatError):
        return False
    return True


def _shard(data: DataSet, plan: Plan, path: Path, progress: Progress) -> Path:
    if not _is_current(path):

        def report(phase: str, done: int, total: int) -> None:
            progress(f"cotra {phase}", done, total)

        with Shard.build(
            data.vectors.read(),
            metric=data.metric,
            M=plan.M,
            ef_construction=plan.ef_construction,
            seed=SEED,
            progress=report,
        ) as shard:
            shard.save(path)
    return path
