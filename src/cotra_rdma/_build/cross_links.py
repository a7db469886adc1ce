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
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from cotra_rdma._build.border import (
    NONE,
    Border,
    Found,
    OpenChannel,
    OwnImage,
    Progress,
    near_shards,
    ranges,
    search_border,
)
from cotra_rdma._build.graph_plan import GraphPlan
from cotra_rdma._clustering.kmeans import thread_count
from cotra_rdma._core.record_layout import HEAD, round_up, vector_bytes
from cotra_rdma._native.arena import Arena
from cotra_rdma._native.channel import Channel
from cotra_rdma._native.image import ImageInfo
from cotra_rdma._native.library import Handle, check, ffi, lib, new_error
from cotra_rdma.errors import InvalidInputError

_LINK_ROWS = 1024  # nodes that are linked in one call, or fewer if their candidates' vectors exceed ...
_LINK_BYTES = 4 << 20
_VECTOR_ALIGNMENT = 32
_SLOTS = 128  # of a channel to another shard; each slot takes memory


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
    threads = thread_count(n_threads)
    with OwnImage(image) as own:
        info = own.info
        if info.count != plan.counts[shard]:
            raise InvalidInputError(
                f"shard {shard} has {info.count} nodes, and {plan.counts[shard]} in the plan of the graph"
            )
        with (
            _Relinker.create(image, plan, shard) as relinker,
            tempfile.TemporaryFile(dir=Path(path).parent) as scratch,
            Path(path).open("wb") as file,
        ):
            found = Found(scratch, near_shards(own, shard, plan, border), border.k)
            search_border(found, own, plan, open_channel, border, threads, progress)
            file.seek(info.records_offset)
            with _VectorReader(info, plan, open_channel) as reader:
                _write_records(file, relinker, info, found, reader, threads, progress)
            with image.view() as view:
                file.write(view[info.nav_offset : info.nav_offset + info.nav_bytes])
            file.seek(0)
            file.write(relinker.finish(info.records_offset))
            file.flush()
            os.fsync(file.fileno())
    with Arena.map_file(path) as made:
        return ImageInfo.of_arena(made)


@contextmanager
def channel_of_file(path: str | os.PathLike[str], record_bytes: int) -> Iterator[Channel]:
    """Opens a channel to an image in a file, which is not mapped."""
    with Path(path).open("rb") as file, channel_of_fd(file.fileno(), record_bytes) as channel:
        yield channel


def channel_of_fd(fd: int, record_bytes: int) -> Channel:
    """Opens a channel to an image in an open file or memfd."""
    return Channel.file(fd, os.fstat(fd).st_size, slots=_SLOTS, slot_bytes=max(record_bytes, 1 << 14))


class _Relinker(Handle):
    """Links the nodes of a shard anew.

    `link` may be called from several threads. `append` must be called for one range after the other.
    """

    def _destroy(self, ptr: Any) -> None:
        lib.cotra_relinker_destroy(ptr)

    @classmethod
    def create(cls, image: Arena, plan: GraphPlan, shard: int) -> Self:
        """Makes a relinker for the own image of a shard.

        Raises:
            InvalidInputError: the image has inverted lists, or is a part of a graph already.
        """
        params = ffi.new("cotra_relink_params *", (plan.graph_id, int(plan.counts.sum()), int(plan.bases[shard])))
        out, err = ffi.new("cotra_relinker **"), new_error()
        data = ffi.cast("void *", image.info.addr)
        check(lib.cotra_relinker_create(data, image.info.len, params, out, err), err)
        return cls(out[0], image)

    def link(self, begin: int, end: int, record_bytes: int, far: _FarCandidates) -> npt.NDArray[np.uint8]:
        """Makes the new records of nodes [begin, end), uint8[end - begin, record_bytes]."""
        records = np.empty((end - begin, record_bytes), np.uint8)
        raw, err = ffi.new("cotra_relink_far *"), new_error()
        raw.numbers = ffi.from_buffer("uint32_t[]", far.numbers)
        raw.vectors = ffi.from_buffer("uint8_t[]", far.vectors)
        raw.candidates = ffi.from_buffer("uint32_t[]", far.candidates)
        raw.count, raw.stride_bytes, raw.width = len(far.numbers), far.vectors.shape[1], far.candidates.shape[1]
        check(lib.cotra_relinker_link(self.ptr, begin, end, raw, ffi.from_buffer(records), err), err)
        return records

    def append(self, begin: int, end: int, records: npt.NDArray[np.uint8]) -> None:
        """Adds the records of nodes [begin, end) to the checksum of the image."""
        err = new_error()
        check(lib.cotra_relinker_append(self.ptr, begin, end, ffi.from_buffer(records), err), err)

    def finish(self, header_bytes: int) -> bytearray:
        """Returns the header of the new image."""
        header, err = bytearray(header_bytes), new_error()
        check(lib.cotra_relinker_finish(self.ptr, ffi.from_buffer("char[]", header), err), err)
        return header


@dataclass(frozen=True, slots=True, eq=False)
class _FarCandidates:
    """The candidates of some nodes in other shards.

    Attributes:
        numbers: the numbers of all candidates in the graph, uint32[m], ascending.
        vectors: their vectors as stored and padded, uint8[m, stride].
        candidates: the candidates of each node as places in `numbers`, uint32[n, width].
    """

    numbers: npt.NDArray[np.uint32]
    vectors: npt.NDArray[np.uint8]
    candidates: npt.NDArray[np.uint32]


class _VectorReader:
    """READs vectors of other shards by the numbers of their nodes. A context manager, and for one thread.

    Args:
        info: the header of the shard's own image. The others have records of the same layout.
        plan: the plan of the graph.
        open_channel: opens channels to the other shards' own images.
    """

    def __init__(self, info: ImageInfo, plan: GraphPlan, open_channel: OpenChannel) -> None:
        self._info, self._plan, self._open_channel = info, plan, open_channel
        self.stride = round_up(vector_bytes(info), _VECTOR_ALIGNMENT)
        self._stack = ExitStack()
        self._channels: dict[int, Channel] = {}

    def candidates(self, found: npt.NDArray[np.uint32]) -> _FarCandidates:
        """READs the vectors of what some nodes found, uint32[n, width]."""
        numbers, places = np.unique(found, return_inverse=True)
        candidates = places.reshape(found.shape).astype(np.uint32)
        if len(numbers) and numbers[-1] == NONE:
            numbers = numbers[:-1]
            candidates[candidates == len(numbers)] = NONE
        vectors = np.empty((len(numbers), self.stride), np.uint8)
        shards = np.searchsorted(self._plan.bases, numbers, side="right") - 1
        for other in np.unique(shards):
            if other not in self._channels:
                self._channels[other] = self._stack.enter_context(self._open_channel(int(other)))
            mine = shards == other
            rows = numbers[mine].astype(np.int64) - self._plan.bases[other]
            offsets = self._info.records_offset + HEAD.itemsize + rows * self._info.record_bytes
            vectors[mine] = self._channels[other].gather(offsets.astype(np.uint64), self.stride)
        return _FarCandidates(numbers, vectors, candidates)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def _write_records(
    file: BinaryIO,
    relinker: _Relinker,
    info: ImageInfo,
    found: Found,
    reader: _VectorReader,
    threads: int,
    progress: Progress | None,
) -> None:
    """Writes all records with their new links to the file.

    Vectors are READ in this thread, and nodes are linked in others.
    """
    rows = max(16, min(_LINK_ROWS, _LINK_BYTES // (found.near.shape[1] * found.k * reader.stride)))
    running: deque[tuple[int, int, Future[npt.NDArray[np.uint8]]]] = deque()

    def append() -> None:
        begin, end, future = running.popleft()
        records = future.result()
        relinker.append(begin, end, records)
        file.write(records.data)
        if progress:
            progress("relink", end, info.count)

    with ThreadPoolExecutor(threads) as pool:
        for begin, end in ranges(info.count, rows):
            far = reader.candidates(found.read(begin, end))
            if len(running) > threads:  # so that at most one range waits for a thread
                append()
            running.append((begin, end, pool.submit(relinker.link, begin, end, info.record_bytes, far)))
            del far  # some MiB, which the thread frees when it is done
        while running:
            append()
