"""Searches the shards around a shard for the neighbours of its nodes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from cotra_rdma._build.graph_plan import GraphPlan
from cotra_rdma._clustering.kmeans import normalised
from cotra_rdma._core.exact import products
from cotra_rdma._core.record_layout import records_of, vectors_of
from cotra_rdma._native.arena import Arena
from cotra_rdma._native.channel import Channel
from cotra_rdma._native.graph_engine import Engine
from cotra_rdma._native.image import ImageInfo
from cotra_rdma._native.record_cache import RecordCache
from cotra_rdma._native.view import View
from cotra_rdma.errors import FormatError

NONE = np.uint32(0xFFFFFFFF)
"""In places for a neighbour that are left."""
_ROWS = 1024  # nodes whose neighbours are searched for in one call
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


class OwnImage:
    """The shard's own image."""

    def __init__(self, image: Arena) -> None:
        self.info = ImageInfo.of_arena(image)
        self._view = image.view()
        self._records = records_of(self._view, self.info)

    def vectors(self, rows: slice | npt.NDArray[np.intp]) -> npt.NDArray[np.float32]:
        """Copies the vectors of some nodes as float32[n, dim]. For cosine, they are normalised."""
        found: npt.NDArray[np.float32] = vectors_of(self._records, self.info, rows).astype(np.float32)
        return normalised(found) if self.info.metric == "cosine" else found

    def __enter__(self) -> OwnImage:
        return self

    def __exit__(self, *_: object) -> None:
        del self._records
        self._view.release()


def ranges(count: int, rows: int) -> list[tuple[int, int]]:
    """Splits `count` rows into ranges [begin, end)."""
    return [(begin, min(begin + rows, count)) for begin in range(0, count, rows)]


def near_shards(own: OwnImage, shard: int, plan: GraphPlan, border: Border) -> npt.NDArray[np.signedinteger[Any]]:
    """Chooses the other shards in which each node looks.

    Returns:
        int[count, border.shards], nearest first, with -1 in places that are left.
    """
    width = min(border.shards, len(plan.counts) - 1)
    near = np.empty((own.info.count, width), np.min_scalar_type(-len(plan.counts)))
    centre = plan.centroids.mean(axis=0)
    centroids = plan.centroids - centre
    for begin, end in ranges(own.info.count, _ROWS):
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


class Found:
    """The neighbours that nodes found in other shards, in a temporary file.

    The file has a section for each other shard.
    A section holds k numbers for each node that looked in the shard, in the order of the nodes.
    Any thread may write to the file. Afterwards it is read from front to back.

    Args:
        file: the temporary file.
        near: the other shards in which each node looks, int[count, width], as from `near_shards`.
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
        found = np.full((*near.shape, self.k), NONE, np.uint32)
        for shard in np.unique(near[near >= 0]):
            rows, places = np.nonzero(near == shard)
            length = len(rows) * 4 * self.k
            raw = os.pread(self._file.fileno(), length, int(self._next[shard]) * 4 * self.k)
            found[rows, places] = np.frombuffer(raw, np.uint32).reshape(-1, self.k)
            self._next[shard] += len(rows)
        return found.reshape(end - begin, -1)


class _OtherImage:
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
                for begin, end in ranges(size, _BULK_BYTES):
                    to[begin:end] = channel.read(begin, end - begin)

    def open_channel(self) -> AbstractContextManager[Channel]:
        """Opens a channel to search the image through, for one thread."""
        return self._open() if self._copy is None else Channel.shm(self._copy, slot_bytes=1 << 16)

    def __enter__(self) -> _OtherImage:
        return self

    def __exit__(self, *_: object) -> None:
        for part in (self.cache, self.view, self._copy):
            if part is not None:
                part.close()


def search_border(
    found: Found,
    own: OwnImage,
    plan: GraphPlan,
    open_channel: OpenChannel,
    border: Border,
    threads: int,
    progress: Progress | None,
) -> None:
    """Searches other shards for the neighbours of each node.

    Args:
        found: gets the numbers of the neighbours in the graph.
        own: the shard's own image.
        plan: the plan of the graph.
        open_channel: opens channels to the other shards' own images.
        border: how to look for neighbours.
        threads: the number of threads.
        progress: see `Progress`.

    Raises:
        FormatError: another shard's image is malformed, or does not fit.
        TransportError: another shard's image cannot be READ.
    """
    done = 0
    with ThreadPoolExecutor(threads) as pool:
        for number in range(len(plan.counts)):
            rows = np.flatnonzero((found.near == number).any(axis=1))
            if not len(rows):
                continue
            parts = np.array_split(rows, min(threads, len(rows)))
            firsts = np.cumsum([0, *map(len, parts[:-1])]).tolist()
            with _OtherImage(partial(open_channel, number)) as other:
                _check_other(other.view.info, own.info, number, plan)

                def search(
                    first: int, part: npt.NDArray[np.intp], number: int = number, other: _OtherImage = other
                ) -> None:
                    for begin, numbers in _neighbours(other, own, part, int(plan.bases[number]), border):
                        found.write(number, first + begin, numbers)

                list(pool.map(search, firsts, parts))
            done += len(rows)
            if progress:
                progress("border", done * own.info.count // found.total, own.info.count)


def _neighbours(
    other: _OtherImage, own: OwnImage, nodes: npt.NDArray[np.intp], base: int, border: Border
) -> Iterator[tuple[int, npt.NDArray[np.uint32]]]:
    """Searches another shard for the neighbours of some nodes, in one thread.

    Yields:
        (the place of the first node among `nodes`, the numbers of the neighbours in the graph as uint32[n, border.k]).
    """
    view = other.view
    with other.open_channel() as channel, Engine.create([view], [channel], [other.cache]) as engine:
        k = min(border.k, view.info.count)
        for begin, end in ranges(len(nodes), _ROWS):
            numbers = np.full((end - begin, border.k), NONE, np.uint32)
            rows = engine.search(own.vectors(nodes[begin:end]), k, max(border.ef, k), 4, numbers=True)[0][0]
            known = rows >= 0
            numbers[:, :k][known] = (rows[known] + base).astype(np.uint32)
            yield begin, numbers


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
