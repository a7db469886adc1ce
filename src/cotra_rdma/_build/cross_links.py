"""One graph over all shards: each shard links its own nodes to near nodes of other shards.

Every shard first builds a graph of its own (`Shard.build`), with a mean vector and a seed that all shards share.
Then each shard searches the shards around it for the neighbours of its own vectors, by one-sided READs.
It READs the vectors of these neighbours, and chooses its links anew (`link_shard`).
No process ever holds more than the vectors of one shard, and what it READs for some hundred nodes at a time.
This follows CoTra (arXiv 2507.06653), whose graph is built as a whole and then cut.
"""

from __future__ import annotations

import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from cotra_rdma._clustering.kmeans import normalised
from cotra_rdma._core.exact import products
from cotra_rdma._core.record_layout import HEAD, records_of, vector_bytes, vectors_of
from cotra_rdma._native.arena import Arena
from cotra_rdma._native.channel import Channel
from cotra_rdma._native.graph_engine import Engine
from cotra_rdma._native.image import ImageInfo
from cotra_rdma._native.library import Handle, check, ffi, lib, new_error
from cotra_rdma._native.record_cache import RecordCache
from cotra_rdma._native.view import View
from cotra_rdma.errors import FormatError, InvalidInputError

MAX_NODES = 2**31 - 1
_NONE = np.uint32(0xFFFFFFFF)
_ROWS = 1024  # nodes whose neighbours are searched for in one call
_LINK_ROWS = 1024  # nodes that are linked in one call, or fewer if their candidates' vectors exceed ...
_LINK_BYTES = 4 << 20
_FAR_SIGHTED = 8  # every so many nodes, one looks in shards at any distance
_CACHE_BYTES = 16 << 20  # for the shard that is searched
_BULK_BYTES = 1 << 20

OpenChannel = Callable[[int], AbstractContextManager[Channel]]
"""Opens a channel to a shard's own image. The argument is the number of the shard in the collection."""

Progress = Callable[[str, int, int], None]
"""Called as progress("border" | "relink", nodes done, nodes in all)."""


@dataclass(frozen=True, slots=True)
class Border:
    """How a shard looks for neighbours in other shards.

    Attributes:
        shards: the most shards in which a node looks: those with the nearest centroids.
        reach: a node looks in a shard whose centroid is at most this many times as far from the node as its own shard's
            centroid. Every eighth node looks in shards at any distance, so that the graph does not fall apart between
            shards.
        k: the number of neighbours that each search returns.
        ef: the `ef` of each search.
    """

    shards: int = 4
    reach: float = 1.3
    k: int = 10
    ef: int = 12


@dataclass(frozen=True, slots=True, eq=False)
class GraphPlan:
    """What all shards of one graph know about each other before they link.

    Attributes:
        bases: the number of each shard's first node in the graph, int64[n_shards].
        counts: the number of nodes of each shard, int64[n_shards].
        graph_id: the number that names the graph. It is made from the checksums of all shards' own images.
        centroids: float32[n_shards, dim]. For cosine, they are means of normalised vectors.
    """

    bases: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    graph_id: int
    centroids: npt.NDArray[np.float32]

    @classmethod
    def of(cls, infos: Sequence[Any], centroids: npt.NDArray[np.float32]) -> GraphPlan:
        """Makes the plan for shards with these images.

        Args:
            infos: the headers of the own images, in the order of the shards. They are `ImageInfo`s, or have the same
                fields.
            centroids: float32[n_shards, dim].

        Raises:
            InvalidInputError: the shards have too many nodes, or cannot be one graph.
        """
        first = infos[0]
        for at, info in enumerate(infos):
            for what in ("dim", "metric", "vector_type", "M", "degree", "seed"):
                ours, theirs = getattr(first, what), getattr(info, what)
                if ours != theirs:
                    raise InvalidInputError(f"shards 0 and {at} cannot be one graph: {what} {ours} and {theirs}")
        if centroids.shape != (len(infos), first.dim):
            raise InvalidInputError(
                f"centroids must be float32[{len(infos)}, {first.dim}], not {list(centroids.shape)}"
            )
        counts = np.array([info.count for info in infos], np.int64)
        if counts.sum() > MAX_NODES:
            raise InvalidInputError(f"one graph holds at most {MAX_NODES} nodes, not {counts.sum()}")
        graph_id = 0
        for info in infos:  # FNV-1a over whole words
            graph_id = (graph_id ^ info.image_checksum) * 0x100000001B3 % 2**64
        return cls(np.cumsum(counts) - counts, counts, graph_id or 1, centroids)


def link_shard(
    image: Arena,
    shard: int,
    plan: GraphPlan,
    open_channel: OpenChannel,
    path: str | os.PathLike[str],
    *,
    border: Border | None = None,
    n_threads: int = 0,
    progress: Progress | None = None,
) -> ImageInfo:
    """Writes a shard as a part of the graph, and returns the header of the new image.

    Besides the image, it holds some bytes for each node, and what some hundred nodes found.
    The new image goes straight to its file, and what nodes find goes to a temporary file beside it.

    Args:
        image: the image that the shard built by itself, without inverted lists. It is only read, so others may READ it
            meanwhile.
        shard: the number of the shard in the plan.
        plan: the plan of the graph.
        open_channel: opens channels to the other shards' own images.
        path: the file to write. After an error there may be a file, which is no valid image.
        border: how to look for neighbours. None stands for the defaults.
        n_threads: the number of threads. 0 stands for all cores. The result does not depend on it.
        progress: see `Progress`.

    Raises:
        InvalidInputError: the image has inverted lists, or is not the one in the plan.
        FormatError: another shard's image is malformed, or does not fit.
        TransportError: another shard's image cannot be READ.
        OSError: the file cannot be written.
    """
    border = border or Border()
    threads = n_threads or len(os.sched_getaffinity(0))
    with _Own(image) as own:
        info = own.info
        if info.count != plan.counts[shard]:
            raise InvalidInputError(
                f"shard {shard} has {info.count} nodes, and {plan.counts[shard]} in the plan of the graph"
            )
        params = ffi.new("cotra_relink_params *", (plan.graph_id, int(plan.counts.sum()), int(plan.bases[shard])))
        out, err = ffi.new("cotra_relinker **"), new_error()
        data = ffi.cast("void *", image.info.addr)
        check(lib.cotra_relinker_create(data, image.info.len, params, out, err), err)
        with (
            _Relinker(out[0], image) as relinker,
            tempfile.TemporaryFile(dir=Path(path).parent) as scratch,
            Path(path).open("wb") as file,
        ):
            found = _Found(scratch, _near_shards(own, shard, plan, border), border.k)
            _search_border(found, own, plan, open_channel, border, threads, progress)
            file.seek(info.records_offset)
            _relink(file, relinker, own, plan, found, open_channel, threads, progress)
            with image.view() as view:
                file.write(view[info.nav_offset : info.nav_offset + info.nav_bytes])
            header, err = bytearray(info.records_offset), new_error()
            check(lib.cotra_relinker_finish(relinker.ptr, ffi.from_buffer("char[]", header), err), err)
            file.seek(0)
            file.write(header)
            file.flush()
            os.fsync(file.fileno())
    with Arena.map_file(path) as made:
        return ImageInfo.of_arena(made)


_SLOTS = 128  # of a channel to another shard; each slot takes memory


@contextmanager
def channel_of_file(path: str | os.PathLike[str], record_bytes: int) -> Iterator[Channel]:
    """Opens a channel to an image in a file, which is not mapped."""
    with Path(path).open("rb") as file, channel_of_fd(file.fileno(), record_bytes) as channel:
        yield channel


def channel_of_fd(fd: int, record_bytes: int) -> Channel:
    """Opens a channel to an image in an open file or memfd."""
    return Channel.file(fd, os.fstat(fd).st_size, slots=_SLOTS, slot_bytes=max(record_bytes, 1 << 14))


class _Relinker(Handle):
    def _destroy(self, ptr: Any) -> None:
        lib.cotra_relinker_destroy(ptr)


class _Own:
    """The shard's own image."""

    def __init__(self, image: Arena) -> None:
        self.info = ImageInfo.of_arena(image)
        self._view = image.view()
        self._records = records_of(self._view, self.info)

    def vectors(self, rows: slice | npt.NDArray[np.intp]) -> npt.NDArray[np.float32]:
        """Copies the vectors of some nodes as float32[n, dim]. For cosine, they are normalised."""
        found: npt.NDArray[np.float32] = vectors_of(self._records, self.info, rows).astype(np.float32)
        return normalised(found) if self.info.metric == "cosine" else found

    def __enter__(self) -> _Own:
        return self

    def __exit__(self, *_: object) -> None:
        del self._records
        self._view.release()


def _ranges(count: int, rows: int = _ROWS) -> list[tuple[int, int]]:
    """Splits `count` rows into ranges [begin, end)."""
    return [(begin, min(begin + rows, count)) for begin in range(0, count, rows)]


def _near_shards(own: _Own, shard: int, plan: GraphPlan, border: Border) -> npt.NDArray[np.signedinteger[Any]]:
    """Chooses the other shards in which each node looks.

    Returns:
        int[count, border.shards], nearest first, with -1 in places that are left.
    """
    width = min(border.shards, len(plan.counts) - 1)
    near = np.empty((own.info.count, width), np.min_scalar_type(-len(plan.counts)))
    centre = plan.centroids.mean(axis=0)
    centroids = plan.centroids - centre
    for begin, end in _ranges(own.info.count):
        rows = own.vectors(slice(begin, end)) - centre
        gaps = (
            np.square(rows).sum(axis=1)[:, np.newaxis]
            - 2 * products(rows, centroids)
            + np.square(centroids).sum(axis=1)
        )
        bound = border.reach**2 * gaps[:, shard]
        bound[-begin % _FAR_SIGHTED :: _FAR_SIGHTED] = np.inf
        gaps[:, shard] = np.inf
        order = np.argsort(gaps, axis=1, kind="stable")[:, :width]
        close = np.take_along_axis(gaps, order, 1) <= bound[:, np.newaxis]
        near[begin:end] = np.where(close, order, -1)
    return near


class _Found:
    """The neighbours that nodes found in other shards, in a temporary file.

    The file has a section for each other shard.
    A section holds k numbers for each node that looked in the shard, in the order of the nodes.
    Any thread may write to the file. Afterwards it is read from front to back.

    Args:
        file: the temporary file.
        near: the other shards in which each node looks, int[count, width], as from `_near_shards`.
        k: the numbers for each node and shard.

    Attributes:
        total: the number of searches: all pairs of a node and a shard in which it looks.
    """

    def __init__(self, file: BinaryIO, near: npt.NDArray[np.signedinteger[Any]], k: int) -> None:
        self.near, self.k = near, k
        self._file = file
        n_shards = int(near.max(initial=-1)) + 1
        searches = np.bincount(near[near >= 0], minlength=n_shards)
        self._next = np.cumsum(searches) - searches  # in each shard's section, the first node that was not read yet
        self.total = int(searches.sum())

    def write(self, shard: int, first: int, numbers: npt.NDArray[np.uint32]) -> None:
        """Writes what some nodes found in a shard.

        Args:
            shard: the shard.
            first: the place of the first of these nodes among those that look in the shard.
            numbers: the numbers of the neighbours in the graph, uint32[n, k].
        """
        os.pwrite(self._file.fileno(), numbers.tobytes(), (int(self._next[shard]) + first) * 4 * self.k)

    def read(self, begin: int, end: int) -> npt.NDArray[np.uint32]:
        """Reads what nodes [begin, end) found. `begin` is where the last call ended.

        Returns:
            uint32[end - begin, width * k], with 0xFFFFFFFF in places that are left.
        """
        near = self.near[begin:end]
        found = np.full((*near.shape, self.k), _NONE, np.uint32)
        for shard in np.unique(near[near >= 0]):
            rows, places = np.nonzero(near == shard)
            length = len(rows) * 4 * self.k
            raw = os.pread(self._file.fileno(), length, int(self._next[shard]) * 4 * self.k)
            found[rows, places] = np.frombuffer(raw, np.uint32).reshape(-1, self.k)
            self._next[shard] += len(rows)
        return found.reshape(end - begin, -1)


class _Near:
    """Another shard's image while it is searched, in at most `_CACHE_BYTES` of memory.

    A small image is READ once, as a whole.
    Of a large image, the records that are used most are cached.
    """

    def __init__(self, open_channel: Callable[[], AbstractContextManager[Channel]]) -> None:
        self._open = open_channel
        self._copy: Arena | None = None
        self.cache: RecordCache | None = None
        with open_channel() as channel:
            self.view = View.open(channel)
            size = self.view.info.image_bytes
            if size > _CACHE_BYTES:
                self.cache = RecordCache.create(self.view, _CACHE_BYTES)
                return
            self._copy = Arena.create(size)
            with self._copy.view() as to:
                for begin, end in _ranges(size, _BULK_BYTES):
                    to[begin:end] = channel.read(begin, end - begin)

    def open_channel(self) -> AbstractContextManager[Channel]:
        """Opens a channel to search the image through, for one thread."""
        return self._open() if self._copy is None else Channel.shm(self._copy, slot_bytes=1 << 16)

    def __enter__(self) -> _Near:
        return self

    def __exit__(self, *_: object) -> None:
        for part in (self.cache, self.view, self._copy):
            if part is not None:
                part.close()


def _search_border(
    found: _Found,
    own: _Own,
    plan: GraphPlan,
    open_channel: OpenChannel,
    border: Border,
    threads: int,
    progress: Progress | None,
) -> None:
    """Searches other shards for the neighbours of each node, and writes their numbers in the graph to `found`."""
    done = 0
    with ThreadPoolExecutor(threads) as pool:
        for other in range(len(plan.counts)):
            rows = np.flatnonzero((found.near == other).any(axis=1))
            if not len(rows):
                continue

            def search(first: int, part: npt.NDArray[np.intp], near: _Near, other: int = other) -> None:
                view = near.view
                with near.open_channel() as channel, Engine.create([view], [channel], [near.cache]) as engine:
                    k = min(border.k, view.info.count)
                    for begin, end in _ranges(len(part)):
                        numbers = np.full((end - begin, border.k), _NONE, np.uint32)
                        nodes = engine.search(own.vectors(part[begin:end]), k, max(border.ef, k), 4, numbers=True)[0][0]
                        known = nodes >= 0
                        numbers[:, :k][known] = (nodes[known] + plan.bases[other]).astype(np.uint32)
                        found.write(other, first + begin, numbers)

            parts = np.array_split(rows, min(threads, len(rows)))
            firsts = np.cumsum([0, *map(len, parts[:-1])]).tolist()
            with _Near(partial(open_channel, other)) as near:
                _check_other(near.view.info, own.info, other, plan)
                list(pool.map(search, firsts, parts, repeat(near)))
            done += len(rows)
            if progress:
                progress("border", done * own.info.count // found.total, own.info.count)


def _check_other(info: ImageInfo, own: ImageInfo, other: int, plan: GraphPlan) -> None:
    """Checks that another shard's image is the one in the plan, and fits this shard's."""
    if info.graph_id or info.count != plan.counts[other]:
        raise FormatError(
            f"shard {other}: its image is not the image that it built by itself, with {plan.counts[other]} nodes"
        )
    for what in ("dim", "metric", "vector_type", "record_bytes", "seed"):
        if getattr(info, what) != getattr(own, what):
            raise FormatError(
                f"shard {other}: its {what} is {getattr(info, what)}, and this shard's is {getattr(own, what)}"
            )


def _relink(
    file: BinaryIO,
    relinker: _Relinker,
    own: _Own,
    plan: GraphPlan,
    found: _Found,
    open_channel: OpenChannel,
    threads: int,
    progress: Progress | None,
) -> None:
    """Appends all records to the file, with their new links."""
    stride = -(-vector_bytes(own.info) // 32) * 32
    with ExitStack() as stack, ThreadPoolExecutor(threads) as pool:
        channels: dict[int, Channel] = {}
        running: deque[tuple[int, int, Future[npt.NDArray[np.uint8]]]] = deque()

        def append() -> None:
            begin, end, future = running.popleft()
            records, err = future.result(), new_error()
            check(lib.cotra_relinker_append(relinker.ptr, begin, end, ffi.from_buffer(records), err), err)
            file.write(records.data)
            if progress:
                progress("relink", end, own.info.count)

        rows = max(16, min(_LINK_ROWS, _LINK_BYTES // (found.near.shape[1] * found.k * stride)))
        for begin, end in _ranges(own.info.count, rows):
            numbers, candidates = np.unique(found.read(begin, end), return_inverse=True)
            far = candidates.reshape(end - begin, -1).astype(np.uint32)
            if len(numbers) and numbers[-1] == _NONE:
                numbers = numbers[:-1]
                far[far == len(numbers)] = _NONE
            vectors = np.empty((len(numbers), stride), np.uint8)
            shards = np.searchsorted(plan.bases, numbers, side="right") - 1
            for other in np.unique(shards):
                if other not in channels:
                    channels[other] = stack.enter_context(open_channel(int(other)))
                mine = shards == other
                offsets = own.info.records_offset + HEAD.itemsize
                offsets = offsets + (numbers[mine].astype(np.int64) - plan.bases[other]) * own.info.record_bytes
                vectors[mine] = channels[other].gather(offsets.astype(np.uint64), stride)
            if len(running) > threads:  # so that at most one range waits for a thread
                append()
            job = pool.submit(_relink_range, relinker, own, begin, end, numbers, vectors, far)
            running.append((begin, end, job))
        while running:
            append()


def _relink_range(
    relinker: _Relinker,
    own: _Own,
    begin: int,
    end: int,
    numbers: npt.NDArray[np.uint32],
    vectors: npt.NDArray[np.uint8],
    candidates: npt.NDArray[np.uint32],
) -> npt.NDArray[np.uint8]:
    """Makes the new records of nodes [begin, end).

    Args:
        relinker: the object that links.
        own: the shard's own image.
        begin: the first node.
        end: the node after the last one.
        numbers: the numbers of all far candidates of these nodes in the graph, uint32[m].
        vectors: their vectors as stored and padded, uint8[m, stride].
        candidates: the far candidates of each node, as places in `numbers`, uint32[end - begin, width].

    Returns:
        uint8[end - begin, record_bytes].
    """
    records = np.empty((end - begin, own.info.record_bytes), np.uint8)
    far, err = ffi.new("cotra_relink_far *"), new_error()
    candidates = np.ascontiguousarray(candidates)
    far.numbers = ffi.from_buffer("uint32_t[]", numbers)
    far.vectors = ffi.from_buffer("uint8_t[]", vectors)
    far.candidates = ffi.from_buffer("uint32_t[]", candidates)
    far.count, far.stride_bytes, far.width = len(numbers), vectors.shape[1], candidates.shape[1]
    check(lib.cotra_relinker_link(relinker.ptr, begin, end, far, ffi.from_buffer(records), err), err)
    return records
