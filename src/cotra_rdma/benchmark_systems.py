"""The systems that `cotra bench` measures, each behind `benchmark.System`; and the cache of their built graphs."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cotra_rdma.benchmark import Cost, DataSet, Ids, Plan, Queries, Rows, System
from cotra_rdma.channel import Channel, FabricModel
from cotra_rdma.cluster import connect
from cotra_rdma.collection import build_collection, shard_paths
from cotra_rdma.engine import Engine, View
from cotra_rdma.errors import FormatError, InvalidInputError
from cotra_rdma.owner_process import OwnerProcess
from cotra_rdma.queries import pack_filter
from cotra_rdma.shard import Shard

if TYPE_CHECKING:
    import hnswlib

SEED = 100
REMOTE = ("verbs", "shm", "rpc")
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}

Progress = Callable[[str, int, int], None]
"""Called with (what is built, vectors done, vectors in all)."""


class Hnswlib:
    """hnswlib in this process's own memory."""

    name = "hnswlib"
    transport = None
    algorithm = None
    n_shards = 1
    beams = False

    def __init__(self, index: hnswlib.Index, n_threads: int) -> None:
        self._index = index
        index.set_num_threads(n_threads)

    def search(self, queries: Queries, k: int, ef: int, beam: int, rows: Rows | None = None) -> tuple[Ids, Cost | None]:
        """As `benchmark.System`; hnswlib has no beam and counts nothing."""
        self._index.set_ef(ef)
        through = None if rows is None else rows.__getitem__
        return self._index.knn_query(queries, k, filter=through)[0].astype(np.int64), None

    def owner_cpu_s(self) -> float | None:
        """None: there is no owner."""
        return None

    def close(self) -> None:
        """Nothing to end."""


class Remote:
    """A shard in an owner process of its own, reached over one transport."""

    name = "cotra"
    algorithm = None
    n_shards = 1
    beams = True

    def __init__(self, path: Path, transport: str, n_threads: int) -> None:
        self.transport = transport
        self._n_threads = n_threads
        with contextlib.ExitStack() as stack:
            self._owner = stack.enter_context(OwnerProcess([path], transports=tuple(dict.fromkeys((transport, "rpc")))))
            self._cluster = stack.enter_context(connect(self._owner.addresses, transport=transport))
            self._stack = stack.pop_all()

    def search(self, queries: Queries, k: int, ef: int, beam: int, rows: Rows | None = None) -> tuple[Ids, Cost | None]:
        """As `benchmark.System`."""
        filters = None if rows is None else [rows]
        result = self._cluster.search(queries, k=k, ef=ef, beam=beam, n_threads=self._n_threads, filters=filters)
        return result.ids, _cost(result.stats)

    def owner_cpu_s(self) -> float | None:
        """CPU of the owner process."""
        return self._owner.cpu_s()

    def close(self) -> None:
        """Disconnects and ends the owner."""
        self._stack.close()


class Local:
    """A shard mapped in this process, with or without a modelled fabric in between."""

    name = "cotra"
    algorithm = None
    n_shards = 1
    beams = True

    def __init__(self, path: Path, transport: str, fabric: FabricModel | None, n_threads: int) -> None:
        self.transport = transport
        with contextlib.ExitStack() as stack:
            arena = stack.enter_context(Shard.open(path, verify=False)).arena
            self._pool = stack.enter_context(ThreadPoolExecutor(n_threads))
            self._engines = []
            for _ in range(n_threads):
                channel = stack.enter_context(Channel.shm(arena))
                if fabric is not None:
                    channel = stack.enter_context(Channel.model(channel, fabric))
                view = stack.enter_context(View.open(channel))
                self._engines.append(stack.enter_context(Engine.create([view], [channel])))
            self._stack = stack.pop_all()

    def search(self, queries: Queries, k: int, ef: int, beam: int, rows: Rows | None = None) -> tuple[Ids, Cost | None]:
        """As `benchmark.System`."""
        filters = None if rows is None else [pack_filter(rows, len(rows))]

        def search(engine: Engine, part: Queries) -> tuple[Ids, npt.NDArray[np.float32], npt.NDArray[np.void]]:
            return engine.search(part, k, ef, beam, filters=filters)

        parts = np.array_split(queries, min(len(self._engines), len(queries)))
        run = map if len(parts) == 1 else self._pool.map  # no hand-over where there is one thread
        answers = list(run(search, self._engines, parts))
        return np.concatenate([ids[0] for ids, _, _ in answers]), _cost(
            np.concatenate([stats for _, _, stats in answers])
        )

    def owner_cpu_s(self) -> float | None:
        """None: there is no owner."""
        return None

    def close(self) -> None:
        """Unmaps the shard."""
        self._stack.close()


class Collective:
    """A collection in an owner process of its own, reached over one transport, searched by any algorithm."""

    def __init__(self, directory: Path, transport: str, n_threads: int) -> None:
        kind, fabric = parse_transport(transport)
        if kind == "local":
            raise InvalidInputError(
                "algorithms over several shards are measured over shm, verbs, rpc or a model of a fabric"
            )
        path = "shm" if kind == "model" else kind
        self.transport = transport
        self.n_threads = n_threads
        paths = shard_paths([directory])
        self.labels = []
        for file in paths:
            with Shard.open(file, verify=False) as shard:
                self.labels.append(shard.labels())
        with contextlib.ExitStack() as stack:
            self.owner = stack.enter_context(OwnerProcess(paths, transports=tuple(dict.fromkeys((path, "rpc")))))
            self.cluster = stack.enter_context(connect(self.owner.addresses, transport=path, fabric=fabric))
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Disconnects and ends the owner."""
        self._stack.close()


class Algorithm:
    """One algorithm over a collection."""

    name = "cotra"

    def __init__(self, collective: Collective, algorithm: str) -> None:
        self._collective = collective
        self.algorithm = algorithm
        self.transport = "rpc" if algorithm.endswith("scatter-gather") else collective.transport
        self.n_shards = len(collective.labels)
        self.beams = not algorithm.endswith("spire")

    def search(self, queries: Queries, k: int, ef: int, beam: int, rows: Rows | None = None) -> tuple[Ids, Cost | None]:
        """As `benchmark.System`."""
        both = self._collective
        filters = None if rows is None else [rows[labels] for labels in both.labels]
        result = both.cluster.search(
            queries,
            k=k,
            ef=ef,
            beam=beam,
            n_threads=both.n_threads,
            filters=filters,
            algorithm=self.algorithm,
            timeout_s=60.0,
        )
        return result.ids, _cost(result.stats, float(result.asked.mean()) if len(result.asked) else 0.0)

    def owner_cpu_s(self) -> float | None:
        """CPU of the owner process."""
        return self._collective.owner.cpu_s()

    def close(self) -> None:
        """The collective is closed by who made it."""


def _cost(stats: npt.NDArray[np.void], shards: float = 1.0) -> Cost:
    reads, rounds, read = (float(stats[name].mean()) for name in ("reads", "rounds", "read_bytes"))
    return Cost(reads, rounds, read, shards)


@dataclass(frozen=True, slots=True)
class Split:
    """How a data set is split for algorithms over several shards, and which of those are measured."""

    algorithms: Sequence[str]
    n_shards: int = 16
    partition: str = "kmeans"
    n_lists: int = 0


def parse_transport(text: str) -> tuple[str, FabricModel | None]:
    """`verbs`, `shm`, `rpc`, `local` (this process), or a modelled fabric: `model:rtt=5us:gbit=100:mreads=10`.

    rtt: the round trip of a READ, in us, ms or s. gbit: the link's 10^9 bits a second. mreads: 10^6 READs a second.
    """
    kind, *settings = text.split(":")
    if kind in (*REMOTE, "local") and not settings:
        return kind, None
    values = {"rtt": 0.0, "gbit": 0.0, "mreads": 0.0}
    for setting in settings:
        found = re.fullmatch(r"(rtt)=([0-9.]+)(us|ms|s)|(gbit|mreads)=([0-9.]+)", setting)
        if found is None:
            break
        name, value = found[1] or found[4], found[2] or found[5]
        values[name] = float(value) * _UNITS.get(found[3], 1.0)
    else:
        if kind == "model" and settings:
            return kind, FabricModel(values["rtt"], values["gbit"] * 1e9 / 8, values["mreads"] * 1e6)
    raise InvalidInputError(f"{text!r} is not verbs, shm, rpc, local, or model:rtt=5us[:gbit=100][:mreads=10]")


@contextlib.contextmanager
def open_systems(
    data: DataSet,
    transports: Sequence[str],
    plan: Plan,
    cache: Path,
    *,
    with_hnswlib: bool = True,
    split: Split | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Iterator[list[System]]:
    """hnswlib and this package over each of `transports`, ready to be measured; closed on the way out.

    With a `split` this package searches a collection by each of its algorithms, without one a single shard.

    Both graphs are built with the plan's M and ef_construction, and kept in the directory `cache`, under names
    that tell data set, shape and parameters, for the next run.
    """
    fabrics = [parse_transport(transport) for transport in transports]
    cache.mkdir(parents=True, exist_ok=True)
    stem = f"{data.name}-{data.vectors.count}x{data.vectors.dim}-{data.metric}-M{plan.M}-efc{plan.ef_construction}"
    with contextlib.ExitStack() as stack:
        systems: list[System] = []
        if with_hnswlib:
            systems.append(Hnswlib(_hnswlib_index(data, plan, cache / f"{stem}.hnswlib", progress), plan.n_threads))
        if split is not None:
            directory = _collection(data, plan, split, cache, stem, progress)
            for transport in transports:
                collective = Collective(directory, transport, plan.n_threads)
                stack.callback(collective.close)
                systems += [Algorithm(collective, algorithm) for algorithm in split.algorithms]
            yield systems
            return
        shard = _shard(data, plan, cache / f"{stem}.cotra", progress)
        for transport, (kind, fabric) in zip(transports, fabrics, strict=True):
            threads = plan.n_threads
            systems.append(Remote(shard, kind, threads) if kind in REMOTE else Local(shard, transport, fabric, threads))
            stack.callback(systems[-1].close)
        yield systems


def _hnswlib_index(data: DataSet, plan: Plan, path: Path, progress: Progress) -> hnswlib.Index:
    import hnswlib

    index = hnswlib.Index(space=data.metric, dim=data.vectors.dim)
    if path.exists():
        index.load_index(str(path))
        return index
    index.init_index(data.vectors.count, ef_construction=plan.ef_construction, M=plan.M, random_seed=SEED)
    done = 0
    for chunk in data.vectors.chunks(rows=4096):
        index.add_items(np.asarray(chunk, np.float32), np.arange(done, done + len(chunk)))
        done += len(chunk)
        progress("hnswlib", done, data.vectors.count)
    index.save_index(str(path.with_suffix(".part")))
    path.with_suffix(".part").replace(path)
    return index


def _collection(data: DataSet, plan: Plan, split: Split, cache: Path, stem: str, progress: Progress) -> Path:
    path = cache / f"{stem}-{split.n_shards}x{split.partition}-ivf{split.n_lists}"
    if not path.is_dir() or not all(map(_is_current, shard_paths([path]))):

        def report(shard: int, phase: str, done: int) -> None:
            progress(phase if shard < 0 else f"shard {shard + 1}/{split.n_shards} {phase}", done, data.vectors.count)

        build_collection(
            data.vectors,
            path,
            split.n_shards,
            metric=data.metric,
            M=plan.M,
            ef_construction=plan.ef_construction,
            seed=SEED,
            partition=split.partition,
            n_lists=split.n_lists,
            force=True,
            progress=report,
        )
    return path


def _is_current(path: Path) -> bool:
    """Whether a shard's file is there, and of this version's format."""
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
