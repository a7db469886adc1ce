"""`Shard`: one graph, packed into one contiguous image, in memory or mapped from a file."""

from __future__ import annotations

import math
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

from cotra_rdma._clustering.kmeans import VectorSource, thread_count
from cotra_rdma._core.files import write_whole
from cotra_rdma._core.query_checks import check_most, check_queries, check_search, pack_filter
from cotra_rdma._core.record_layout import heads_of, records_of
from cotra_rdma._core.stop import Stop
from cotra_rdma._native.arena import Arena
from cotra_rdma._native.channel import Channel
from cotra_rdma._native.graph_engine import Engine
from cotra_rdma._native.image import ImageInfo
from cotra_rdma._native.list_engine import IvfInfo
from cotra_rdma._native.view import View
from cotra_rdma._shard.hnsw_packer import Progress, build_image, pack_index
from cotra_rdma._shard.list_packer import make_lists
from cotra_rdma._shard.params import BuildParams, check_lists
from cotra_rdma.errors import DeadlineError, FormatError, InvalidInputError

if TYPE_CHECKING:
    import hnswlib

__all__ = ["Progress", "Shard"]


class Shard:
    """One HNSW graph, packed into an image. A file, a memfd and a memory region hold the same bytes.

    Make a shard with `build`, `from_hnswlib`, `of_arena` or `open`.
    Close it, or use it as a context manager.
    """

    def __init__(self, arena: Arena, info: ImageInfo) -> None:
        self._arena = arena
        self._info = info
        self._pinned: Arena | None = None
        self._lock = threading.Lock()
        self._engines: list[_LocalEngine] = []

    # ---- making one ----

    @classmethod
    def build(
        cls,
        vectors: npt.ArrayLike | VectorSource,
        ids: npt.ArrayLike | None = None,
        metric: str = "l2",
        M: int = 16,
        ef_construction: int = 200,
        seed: int = 100,
        n_threads: int = 0,
        progress: Progress | None = None,
        *,
        generation: int = 1,
        n_lists: int = 0,
        ivf_bits: int = 2,
        mean: npt.NDArray[np.float32] | None = None,
        vector_type: str = "auto",
    ) -> Self:
        """Builds a graph with hnswlib, and packs it.

        Args:
            vectors: [n, dim], 1 <= dim <= 4096, of any real dtype. It may also be a `VectorSource`, such as a
                `VectorFile`, which is read some rows at a time.
            ids: int64[n], unique and >= 0. None stands for 0 to n - 1.
            metric: "l2" (squared), "ip" (1 - inner product) or "cosine" (1 - cosine), as in hnswlib.
            M: the most links of a node on an upper layer. Level 0 has up to 2 M (HNSW, Malkov and Yashunin, section
                4.1).
            ef_construction: the length of the list of candidates while the graph is built (the same section).
            seed: the seed of hnswlib's levels, of the codes' rotation and of the lists' clustering.
            n_threads: the number of threads. 0 stands for all cores. With more than one, hnswlib's graph differs a
                little from run to run.
            progress: called as progress("build" | "link" | "pack", nodes done, nodes in all), and with inverted lists
                also as progress("cluster" | "encode", steps or lists done, steps or lists in all).
            generation: the generation that is stored in the image. Increase it when the same shard is built again.
            n_lists: the number of inverted lists beside the graph (`cotra_rdma._native.list_engine`), at most n. 0
                stands for none.
            ivf_bits: the bits of each dimension in the lists' codes, 1 to 8.
            mean: the vector that codes are relative to, float32[dim]. All shards of one graph must have the same
                (`cotra_rdma._build.cross_links`). None stands for the mean of these vectors, which are normalised for
                cosine.
            vector_type: the type in which vectors are stored. "auto" stores uint8 vectors as uint8, float16 vectors as
                float16, and all others as float32. "float32" stores them as float32. "uint8" stores whole numbers in
                [0, 255]. "float16" rounds them: it takes half the bytes, and a distance has a relative error of about
                1e-3.

        Returns:
            The shard.

        Raises:
            LossyVectorError: `vector_type` cannot store a vector: a component is no whole number in [0, 255], or is
                beyond 65504.
            InvalidInputError: there are no vectors, their shape is wrong, they hold NaN or infinity, ids are duplicate
                or negative, or a parameter is out of its range.
        """
        params = BuildParams(metric, M, ef_construction, seed, n_threads, n_lists, ivf_bits, vector_type)
        arena = build_image(vectors, params, ids, generation=generation, mean=mean, progress=progress)
        return cls(arena, ImageInfo.of_arena(arena))

    @classmethod
    def from_hnswlib(
        cls,
        index: hnswlib.Index,
        *,
        seed: int = 100,
        n_threads: int = 0,
        vector_type: str = "auto",
        progress: Progress | None = None,
        generation: int = 1,
        n_lists: int = 0,
        ivf_bits: int = 2,
    ) -> Self:
        """Packs an hnswlib index, which is not changed.

        The index is read through hnswlib's own `save_index`, into a temporary file as large as the index in TMPDIR or
        /var/tmp.

        Args:
            index: the index.
            seed: the seed of the codes' rotation and of the lists' clustering.
            n_threads: the number of threads. 0 stands for all cores.
            vector_type: the type in which vectors are stored: "float32", "float16", "uint8", or "auto" for the smallest
                type that stores all of them exactly. For cosine, it need only store the vectors as they were before the
                index normalised them.
            progress: as for `build`.
            generation: as for `build`.
            n_lists: as for `build`. Deleted vectors are in no list.
            ivf_bits: as for `build`.

        Returns:
            The shard.

        Raises:
            InvalidInputError: the index is empty, a vector is not finite, or there are more lists than vectors.
            LossyVectorError: `vector_type` cannot store a vector exactly.
        """
        import hnswlib

        if not isinstance(index, hnswlib.Index):
            raise InvalidInputError(f"from_hnswlib packs an hnswlib.Index, not a {type(index).__name__}")
        if index.element_count == 0:  # get_current_count() of an index without init_index ends the process
            raise InvalidInputError("an empty index makes no shard: add vectors first")
        params = BuildParams(
            metric=index.space,
            seed=seed,
            n_threads=n_threads,
            n_lists=n_lists,
            ivf_bits=ivf_bits,
            vector_type=vector_type,
        )
        arena = pack_index(index, params, generation=generation, progress=progress)
        return cls(arena, ImageInfo.of_arena(arena))

    @classmethod
    def of_arena(
        cls, arena: Arena, *, n_lists: int = 0, ivf_bits: int = 2, seed: int = 100, n_threads: int = 0
    ) -> Self:
        """Makes a shard of an image in an arena. The arena then belongs to the shard.

        Args:
            arena: the arena.
            n_lists: the number of inverted lists to add, as for `build`. The image must not have any yet.
            ivf_bits: as for `build`.
            seed: the seed of the lists' clustering.
            n_threads: the number of threads that make the lists. 0 stands for all cores.

        Raises:
            FormatError: the arena holds no image.
            InvalidInputError: the lists are out of range.
        """
        info = ImageInfo.of_arena(arena)
        check_lists(n_lists, ivf_bits, info.count)
        if n_lists:
            make_lists(arena, info, n_lists, ivf_bits, seed=seed, n_threads=thread_count(n_threads))
        return cls(arena, ImageInfo.of_arena(arena))

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = True, copy: bool = False) -> Self:
        """Maps a shard's file, read-only.

        The file must stay as it is while it is mapped: a process that reads a mapping of a file that somebody truncates dies
        by SIGBUS (mmap(2)). Replace a file by a rename, as `save` does, or take a copy.
        An owner (`serve`) answers from a copy in memory, whatever is mapped here.

        Args:
            path: the file.
            verify: whether to check every record now, which reads the whole file. Otherwise the header and the upper
                layers are checked now, and each record when it is used.
            copy: whether to read the file into memory, and let it go.

        Raises:
            FormatError: the file is not a shard's file, or is truncated or malformed.
            ChecksumError: the file is corrupt.
            OSError: the file cannot be opened.
        """
        with Path(path).open("rb"):  # raises the usual OSError if the file is missing or not readable
            pass
        arena = _read(path) if copy else Arena.map_file(path)
        try:
            return cls(arena, ImageInfo.of_arena(arena, full=verify))
        except BaseException as error:
            arena.close()
            if isinstance(error, FormatError):
                raise type(error)(f"{os.fspath(path)}: {error}") from None
            raise

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the image to a file: the new content is there as a whole, after a crash too, or the old one is.

        Raises:
            InvalidInputError: the path names a device, a FIFO, a socket or a directory.
            OSError: it cannot be written.
        """
        with self.arena.view() as view:
            write_whole(path, [view])

    # ---- what it is ----

    @property
    def info(self) -> ImageInfo:
        """The header of the image."""
        return self._info

    @property
    def ivf_info(self) -> IvfInfo | None:
        """The inverted lists beside the graph. None if the shard was built without them."""
        return IvfInfo.of_arena(self._arena) if self._info.ivf_bytes else None

    @property
    def dim(self) -> int:
        """The components of a vector."""
        return self._info.dim

    @property
    def metric(self) -> str:
        """ "l2", "ip" or "cosine"."""
        return self._info.metric

    def labels(self) -> npt.NDArray[np.int64]:
        """Returns the id of each row, int64[count]. A filter has one bit for each of these rows.

        Rows are in the order in which `build` got them.
        The rows of an hnswlib index are in the order of hnswlib's own numbers.
        """
        info = self._info
        with self._arena.view() as view:
            return np.ascontiguousarray(heads_of(records_of(view, info))["label"])

    @property
    def arena(self) -> Arena:
        """The memory that holds the image: a memfd, or after `open` a read-only mapping of the file."""
        return self._arena

    def __len__(self) -> int:
        return self._info.count - self._info.deleted_count

    def __repr__(self) -> str:
        info = self._info
        return (
            f"<Shard of {info.count} {info.vector_type}[{info.dim}] vectors, {info.metric}, {info.image_bytes} bytes>"
        )

    def pinned(self, *, lock: bool = True) -> Arena:
        """Returns a sealed memfd arena that holds the image.

        It is the shard's own arena if that is a memfd, else a copy that is made once.

        Args:
            lock: whether to lock it in memory (mlock), which a registered region needs.

        Raises:
            MemlockError: the memory cannot be locked. The message says what to do.
        """
        with self._lock:
            if self._pinned is None:
                if self._arena.info.fd is not None:
                    self._pinned = self._arena
                else:
                    copy = Arena.create(len(self._arena), huge=True)
                    with copy.view() as to, self._arena.view() as source:
                        to[:] = source
                    self._pinned = copy
                    for own in self._engines:  # those that search the file
                        own.close()
                    self._engines = []
                self._pinned.seal()
            if lock:
                self._pinned.lock()
            return self._pinned

    # ---- searching it in this process ----

    def search(
        self,
        queries: npt.ArrayLike,
        k: int = 10,
        ef: int = 64,
        beam: int = 8,
        n_threads: int = 1,
        *,
        rows: npt.ArrayLike | bytes | None = None,
        max_expansions: int | None = None,
        timeout_s: float | None = None,
        stop: Stop | None = None,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.void]]:
        """Searches the shard in this process, with the engine that a reader uses. In Python's main thread, Ctrl-C ends
        the search.

        Args:
            queries: float32[n_queries, dim] or float32[dim].
            k: the number of answers for each query.
            ef: how far to look, k <= ef.
            beam: the most nodes to expand in one round.
            n_threads: the number of threads that share the queries.
            rows: the rows that may be returned, as bool[count] or as a bitmap (`cotra_rdma.pack_filter`). None stands
                for all.
            max_expansions: the most nodes that a walk expands. `incomplete` in the stats marks the queries that this
                ended. None stands for no limit.
            timeout_s: the longest time of the whole search, in seconds. None stands for no limit.
            stop: ends the search when another thread sets it.

        Returns:
            Labels, int64[n_queries, k], with -1 in places that are left. Distances, float32[n_queries, k], infinite in
            those
            places. Stats, `cotra_rdma._core.stats.STATS_DTYPE`[n_queries].

        Raises:
            InvalidInputError: a query has a wrong dimension, or holds NaN or infinity, k > ef, or the filter has
                another length.
            DeadlineError: the search did not end within `timeout_s`.
            SearchCancelledError: `stop` was set.
        """
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        vectors = check_queries(queries, self.dim)
        check_search(k, ef, beam, 0, timeout_s)
        check_most(max_expansions)
        bitmap = pack_filter(rows, self._info.count)
        threads = max(1, min(n_threads, len(vectors)))
        stop = stop or Stop()
        stop.begin(len(vectors))
        stop.expect(len(vectors))
        knobs = (k, ef, beam, bitmap, max_expansions, deadline, stop)
        try:
            if threads == 1:
                return self._search_part(vectors, *knobs)
            with ThreadPoolExecutor(threads) as pool:
                try:
                    running = [
                        pool.submit(self._search_part, part, *knobs) for part in np.array_split(vectors, threads)
                    ]
                    stop.wait(running)
                except BaseException:
                    stop.set()  # the pool waits for its threads
                    raise
            parts = [part.result() for part in running]
        except DeadlineError as error:
            raise stop.late(error, timeout_s) from None
        labels, distances, stats = (np.concatenate(column) for column in zip(*parts, strict=True))
        return labels, distances, stats

    def _search_part(
        self,
        rows: npt.NDArray[np.float32],
        k: int,
        ef: int,
        beam: int,
        bitmap: bytes | None,
        most: int | None,
        deadline: float,
        stop: Stop,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.void]]:
        """Searches for some of the queries, in one thread."""
        with self._lock:
            own = self._engines.pop() if self._engines else None
        own = own or _LocalEngine(self._pinned or self._arena, self._info.record_bytes)
        filters = None if bitmap is None else [bitmap]
        labels, distances, stats = own.engine.search(
            rows, k, ef, beam, filters=filters, max_expansions=most, deadline=deadline, stop=stop
        )
        with self._lock:  # an engine whose search failed is not used again
            self._engines.append(own)
        return labels[0], distances[0], stats

    # ---- letting go ----

    def close(self) -> None:
        """Unmaps the image. Close the servers and clusters that use it first."""
        with self._lock:
            engines, self._engines = self._engines, []
        for own in engines:
            own.close()
        if self._pinned is not None and self._pinned is not self._arena:
            self._pinned.close()
        self._arena.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _read(path: str | os.PathLike[str]) -> Arena:
    """A file's content in memory of this process."""
    with Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            raise FormatError(f"{os.fspath(path)}: is empty")
        arena = Arena.create(size, huge=True)
        try:
            with arena.view() as view:
                if file.readinto(view) != size:
                    raise FormatError(f"{os.fspath(path)}: it shrank while it was read")
        except BaseException:
            arena.close()
            raise
    return arena


class _LocalEngine:
    """An engine for one thread that searches an image in this process."""

    def __init__(self, arena: Arena, record_bytes: int) -> None:
        self.channel = Channel.shm(arena, slot_bytes=max(record_bytes, 4096))
        self.view = View.open(self.channel)
        self.engine = Engine.create([self.view], [self.channel])

    def close(self) -> None:
        for part in (self.engine, self.view, self.channel):
            part.close()
