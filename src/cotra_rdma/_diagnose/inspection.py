"""Inspects a collection, shard files or owners: what they hold, whether they fit together, and who serves them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from cotra_rdma._collection import owners_file as owners
from cotra_rdma._collection.manifest import Collection, collection_directory
from cotra_rdma._collection.owner_probe import OwnerStatus, ask_owners
from cotra_rdma._diagnose.graph_stats import GraphStats, Read, graph_stats
from cotra_rdma._native.image import ImageInfo
from cotra_rdma._native.view import View
from cotra_rdma._reader.connect import connect
from cotra_rdma._shard.shard import Shard
from cotra_rdma.errors import CotraError, FormatError
from cotra_rdma.protocol.regions import ShardFields, as_fields
from cotra_rdma.protocol.tls import Tls

Progress = Callable[[str, int, int], None]
"""Called with the name of a shard, the records that were read, and the number of its records."""


@dataclass(slots=True, eq=False)
class ShardReport:
    """What was found out about one shard.

    Attributes:
        name: the path of its file, or else its owner's address.
        number: its number in the collection, or its position if there is no collection.
        count: the number of its vectors.
            The header says it, or else the manifest or an owner.
            None if none of them says it.
        image_bytes: the length of its image, from the same source.
        generation: its generation, from the same source.
        info: its header, or None if it could not be read.
        graph: the statistics of its graph, or None if its records were not read.
        here: whether its file is on this machine.
        owners: the answers of its owners.
        misfits: for the address of an owner that serves something else, what that is.
    """

    name: str
    number: int
    count: int | None = None
    image_bytes: int | None = None
    generation: int | None = None
    info: ImageInfo | None = None
    graph: GraphStats | None = None
    here: bool = False
    owners: list[OwnerStatus] = field(default_factory=list)
    misfits: dict[str, str] = field(default_factory=dict)

    @property
    def served(self) -> bool:
        """Whether an owner answers, and serves this shard."""
        return any(not owner.problem and owner.address not in self.misfits for owner in self.owners)


@dataclass(frozen=True, slots=True, eq=False)
class Inspection:
    """The result of an inspection.

    Attributes:
        collection: the manifest, or None if shards were given one by one.
        shards: one report for each shard, in order.
        problems: what does not fit together or cannot be read, one sentence each.
        unserved: the shards without a usable owner and the owners that do not answer, one sentence each.
    """

    collection: Collection | None
    shards: list[ShardReport]
    problems: list[str]
    unserved: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        """The vectors in all shards whose size is known."""
        return sum(shard.count or 0 for shard in self.shards)

    @property
    def balance(self) -> float | None:
        """The size of the largest shard over the mean size; None if a size is not known."""
        counts = [shard.count for shard in self.shards if shard.count is not None]
        if len(counts) < len(self.shards) or not any(counts):
            return None
        return max(counts) * len(counts) / sum(counts)

    @property
    def cross_share(self) -> float | None:
        """The share of all links that lead into other shards; None if no records were read."""
        graphs = [shard.graph for shard in self.shards if shard.graph is not None]
        links = sum(graph.links for graph in graphs)
        inside = sum(graph.links_inside for graph in graphs)
        return 1 - inside / links if links else None

    @property
    def graph_ids(self) -> list[int]:
        """The ids of the graphs that the shards are parts of. The id 0 stands for a graph of the shard's own."""
        return sorted({shard.info.graph_id for shard in self.shards if shard.info is not None})


def inspect_collection(
    path: str | os.PathLike[str],
    *,
    records: bool = False,
    timeout_s: float = 1.0,
    tls: Tls | None = None,
    progress: Progress | None = None,
) -> Inspection:
    """Inspects a collection: its manifest, the shard files on this machine, and the owners in `owners.json`.

    Args:
        path: its directory or `collection.json`.
        records: also read the graph of a shard without a file from its owner's memory, if that can be read.
        timeout_s: the longest wait for an owner, in seconds.
        tls: this side's certificate, where the owners want one.
        progress: see `Progress`.

    Raises:
        FormatError: there is no collection, or its manifest is malformed.
    """
    directory = collection_directory(path)
    collection = Collection.load(directory, shard_files=False)
    problems: list[str] = []
    try:
        addresses = owners.addresses_of(directory)
    except FormatError as error:
        problems.append(str(error))
        addresses = [[] for _ in collection.shards]
    shards = [
        ShardReport(
            str(directory / entry.name),
            number,
            entry.count,
            entry.image_bytes,
            collection.generation,
            here=(directory / entry.name).is_file(),
        )
        for number, entry in enumerate(collection.shards)
    ]
    _ask(shards, addresses, timeout_s, tls)
    for shard in shards:
        for owner in shard.owners:
            if owner.serves is not None and (misfit := owners.misfit(collection, shard.number, owner.serves)):
                shard.misfits[owner.address] = f"serves {misfit}"
                problems.append(f"shard {shard.number}: {owner.address} serves {misfit}")
    unserved = [f"shard {shard.number}: {_no_owner(shard)}" for shard in shards if not shard.served]
    problems += _read(shards, records, timeout_s, tls, progress)
    for shard in shards:
        if shard.info is None:
            continue
        if misfit := owners.misfit(collection, shard.number, _told(shard.info)):
            problems.append(f"{shard.name} holds {misfit}")
        if collection.graph == "global" and len(shards) > 1 and shard.info.graph_id == 0:
            problems.append(f"{shard.name} has a graph of its own, but the collection is one graph")
    infos = [shard.info for shard in shards if shard.info is not None]
    total = sum(info.count for info in infos)
    if len(infos) == len(shards) and infos[0].graph_id and total != infos[0].graph_count:
        problems.append(f"the shards hold {total} nodes, but their graph has {infos[0].graph_count}")
    return Inspection(collection, shards, problems + _one_graph(shards), unserved if any(addresses) else [])


def inspect_files(paths: Iterable[str | os.PathLike[str]], *, progress: Progress | None = None) -> Inspection:
    """Inspects shard files that were given one by one.

    A malformed file is one of the `problems`.

    Args:
        paths: the files.
        progress: see `Progress`.
    """
    shards = [ShardReport(os.fspath(path), number, here=True) for number, path in enumerate(paths)]
    problems = _read(shards, records=False, timeout_s=0, tls=None, progress=progress)
    return Inspection(None, shards, problems + _alike(shards) + _one_graph(shards))


def inspect_owners(
    addresses: Sequence[Sequence[str]],
    *,
    records: bool = False,
    timeout_s: float = 1.0,
    tls: Tls | None = None,
    progress: Progress | None = None,
) -> Inspection:
    """Inspects shards by what their owners say.

    Args:
        addresses: for each shard the addresses of its owners; several owners are replicas.
        records: also read the graph, from an owner's memory.
        timeout_s: the longest wait for an owner, in seconds.
        tls: this side's certificate, if the owners want one.
        progress: see `Progress`.
    """
    shards = [ShardReport(of_one[0], number) for number, of_one in enumerate(addresses)]
    _ask(shards, addresses, timeout_s, tls)
    problems: list[str] = []
    unserved: list[str] = []
    for shard in shards:
        answers = [(owner.address, owner.serves) for owner in shard.owners if owner.serves is not None]
        for address, serves in answers[1:]:
            if serves != answers[0][1]:
                shard.misfits[address] = f"serves another shard than {answers[0][0]}"
                problems.append(f"shard {shard.number}: {address} {shard.misfits[address]}")
        unserved += [
            f"shard {shard.number} at {owner.address}: {owner.problem}" for owner in shard.owners if owner.problem
        ]
    problems += _read(shards, records, timeout_s, tls, progress)
    return Inspection(None, shards, problems + _alike(shards) + _one_graph(shards), unserved)


def _ask(shards: Sequence[ShardReport], addresses: Sequence[Sequence[str]], timeout_s: float, tls: Tls | None) -> None:
    everyone = [(shard, address) for shard, of_one in zip(shards, addresses, strict=True) for address in of_one]
    for (shard, _), status in zip(everyone, ask_owners([at for _, at in everyone], timeout_s, tls), strict=True):
        shard.owners.append(status)
        if status.serves is not None and shard.generation is None:
            shard.count, shard.image_bytes = status.serves.count, status.serves.image_bytes
            shard.generation = status.serves.generation


def _no_owner(shard: ShardReport) -> str:
    if not shard.owners:
        return f"no owner is noted in {owners.OWNERS}"
    silent = "; ".join(f"{owner.address}: {owner.problem}" for owner in shard.owners if owner.problem)
    return f"no owner that can be used{f': {silent}' if silent else ''}"


def _read(
    shards: Sequence[ShardReport], records: bool, timeout_s: float, tls: Tls | None, progress: Progress | None
) -> list[str]:
    """Reads the headers and graphs that can be read into the reports, and returns what could not be read."""
    problems: list[str] = []
    opened: list[tuple[ShardReport, ImageInfo, Read]] = []
    with ExitStack() as stack:
        for shard in shards:
            alive = [
                owner.address for owner in shard.owners if not owner.problem and owner.address not in shard.misfits
            ]
            try:
                if shard.here:
                    info, read = _open_file(shard.name, stack)
                elif records and alive:
                    info, read = _open_owner(alive[0], timeout_s, tls, stack)
                else:
                    continue
            except (CotraError, OSError) as error:
                problems.append(str(error) if shard.name in str(error) else f"{shard.name}: {error}")
                continue
            shard.info, shard.count = info, info.count
            shard.image_bytes, shard.generation = info.image_bytes, info.generation
            opened.append((shard, info, read))
        for shard, info, read in opened:
            known = [
                (other.info.graph_base, other.info.count)
                if other.info is not None and (other is shard or other.info.graph_id == info.graph_id != 0)
                else (0, 0)
                for other in shards
            ]
            try:
                shard.graph = graph_stats(info, read, known, _told_of(progress, shard.name, info.count))
            except CotraError as error:
                problems.append(f"{shard.name}: {error}")
    return problems


def _told_of(progress: Progress | None, name: str, total: int) -> Callable[[int], None] | None:
    return progress and (lambda done: progress(name, done, total))


def _open_file(path: str, stack: ExitStack) -> tuple[ImageInfo, Read]:
    with Shard.open(path, verify=False) as shard:
        info = shard.info
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    stack.callback(os.close, fd)

    def read(offset: int, length: int) -> bytes:  # a mapping would keep the whole file in memory
        found = os.pread(fd, length, offset)
        if len(found) < length:
            raise FormatError(f"the file ends at byte {offset + len(found)}, before the end that its header gives")
        return found

    return info, read


def _open_owner(address: str, timeout_s: float, tls: Tls | None, stack: ExitStack) -> tuple[ImageInfo, Read]:
    cluster = stack.enter_context(connect([address], timeout_s=timeout_s, tls=tls))
    channel = stack.enter_context(cluster.channel(0))
    with View.open(channel, timeout_s=timeout_s) as view:
        return view.info, lambda offset, length: channel.read(offset, length)


def _told(info: ImageInfo) -> ShardFields:
    """Converts a header to the fields that an owner would send."""
    fields: ShardFields = as_fields(ShardFields, info)
    return fields


def _alike(shards: Sequence[ShardReport]) -> list[str]:
    """Returns why shards that were given one by one cannot be searched together."""
    told: list[tuple[ShardReport, ShardFields]] = []
    for shard in shards:
        answers = [owner.serves for owner in shard.owners if owner.serves is not None]
        if shard.info is not None:
            told.append((shard, _told(shard.info)))
        elif answers:
            told.append((shard, answers[0]))
    return [
        f"{told[0][0].name} has {what} {getattr(told[0][1], what)}, but {shard.name} has {getattr(fields, what)}"
        for shard, fields in told[1:]
        for what in ("dim", "metric", "generation")
        if getattr(fields, what) != getattr(told[0][1], what)
    ]


def _one_graph(shards: Sequence[ShardReport]) -> list[str]:
    """Returns why the shards cannot be walked as one graph, if at least one of them is a part of one."""
    problems: list[str] = []
    graphs: dict[int, list[tuple[str, ImageInfo]]] = {}
    for shard in shards:
        if shard.info is not None:
            graphs.setdefault(shard.info.graph_id, []).append((shard.name, shard.info))
    if len(graphs) > 1:
        which = "; ".join(
            f"{', '.join(name for name, _ in parts)}: {f'graph {graph:#018x}' if graph else 'graphs of their own'}"
            for graph, parts in graphs.items()
        )
        problems.append(f"the shards are of different graphs, so they are not walked as one: {which}")
    for parts in (parts for graph, parts in graphs.items() if graph):
        first, one = parts[0]
        problems += [
            f"of one graph, {first} has {what} {getattr(one, what)}, but {name} has {getattr(info, what)}"
            for name, info in parts[1:]
            for what in ("graph_count", "seed", "vector_type", "degree")
            if getattr(info, what) != getattr(one, what)
        ]
        by_base = sorted(parts, key=lambda part: part[1].graph_base)
        problems += [
            f"{left} and {right} hold the same nodes of one graph"
            for (left, a), (right, b) in itertools.pairwise(by_base)
            if a.graph_base + a.count > b.graph_base
        ]
    return problems
