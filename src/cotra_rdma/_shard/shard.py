"""`Shard`: one HNSW graph packed into one contiguous image, in memory or mapped from a file."""

from __future__ import annotations

import errno
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from cotra_rdma._clustering.kmeans import ArraySource, VectorSource
from cotra_rdma._core.constants import METRICS, VECTOR_TYPES
from cotra_rdma._core.query_checks import as_array, check_finite, check_most, check_queries, check_search, pack_filter
from cotra_rdma._core.record_layout import heads_of, records_of
from cotra_rdma._core.stop import Stop
from cotra_rdma._native.arena import Arena, trim_memory
from cotra_rdma._native.channel import Channel
from cotra_rdma._native.graph_engine import Engine
from cotra_rdma._native.image import ImageInfo
from cotra_rdma._native.library import Handle, check, ffi, lib, new_error
from cotra_rdma._native.list_engine import MAX_BITS, IvfInfo
from cotra_rdma._native.view import View
from cotra_rdma._shard.list_packer import make_lists
from cotra_rdma.errors import DeadlineError, FormatError, InvalidInputError, LossyVectorError

if TYPE_CHECKING:
    import hnswlib

__all__ = ["Progress", "Shard"]

Progress = Callable[[str, int, int], None]
"""Called as progress("build" | "link" | "pack", nodes done, nodes in all), and with inverted lists as
progress("cluster" | "encode", steps or lists done, in all)."""

MIN_DIM, MAX_DIM, MAX_M = 1, 4096, 512
_STATE_TIMEOUT_S = 60.0
_ADD_ROWS = 4096
_ADD_BYTES = 4 << 20  # of rows as float32, at once
_PACK_ROWS = 2048


class Shard:
    """One packed HNSW graph: position-independent bytes that a file, a memfd and a memory region hold alike.

    Make one with `build`, `from_hnswlib` or `open`; close it, or use it as a context manager.
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
        """Builds a graph with hnswlib and packs it.

        Args:
            vectors: [n, dim], 1 <= dim <= 4096, of any real dtype; or a `VectorSource`, a `VectorFile` say, which is read
                some rows at a time. uint8 vectors are held as uint8, and float16 ones as
                float16; all others as float32.
            ids: int64[n], unique and >= 0; None for 0 ... n - 1.
            metric: "l2" (squared), "ip" (1 - inner product) or "cosine" (1 - cosine), as in hnswlib.
            M: links of a node on an upper layer; level 0 has 2 M (HNSW, Malkov and Yashunin, section 4.1).
            ef_construction: the candidate list while building (the same paper, section 4.1).
            seed: of hnswlib's levels and of the codes' rotation.
            n_threads: 0 for all cores. With more than one, hnswlib's graph differs a little from run to run.
            progress: see `Progress`.
            generation: stored in the image; count it up when the same shard is rebuilt.
            n_lists: inverted lists to put beside the graph (`cotra_rdma._native.list_engine`), at most n; 0 for none.
            ivf_bits: bits of each dimension in the lists' codes, 1 to 8.
            mean: float32[dim]: what codes are relative to, the same for all shards of one graph
                (`cotra_rdma._build.cross_links`); None: the mean of these vectors (for cosine normalised).
            vector_type: how own vectors are held: "auto", as above; "float32"; "uint8", which must be exact; or "float16",
                to which they are rounded (half the bytes; a distance's relative error is about 1e-3).

        Raises:
            LossyVectorError: `vector_type` cannot hold a vector: not a whole number in [0, 255], or beyond 65504.
            InvalidInputError: no vectors, NaN or infinity among them, a wrong shape, duplicate or negative ids.
        """
        import hnswlib  # only who builds needs it: it is compiled for one CPU, and a reader's may be older

        rows = vectors if isinstance(vectors, VectorSource) else ArraySource(as_array(vectors, "vectors"))
        if len(rows.shape) != 2 or rows.shape[0] == 0 or not MIN_DIM <= rows.shape[1] <= MAX_DIM:
            raise InvalidInputError(f"vectors must be [n >= 1, {MIN_DIM} <= dim <= {MAX_DIM}], not {list(rows.shape)}")
        if metric not in METRICS:
            raise InvalidInputError(f"metric must be one of {', '.join(METRICS)}, not {metric!r}")
        if not 2 <= M <= MAX_M:
            raise InvalidInputError(f"M must be in [2, {MAX_M}], not {M}")
        if ef_construction < 1:
            raise InvalidInputError(f"ef_construction must be at least 1, not {ef_construction}")
        if vector_type not in ("auto", *VECTOR_TYPES):
            raise InvalidInputError(f"vector_type must be auto, {', '.join(VECTOR_TYPES)}, not {vector_type!r}")
        count, dim = rows.shape
        _check_lists(n_lists, ivf_bits, count)
        labels = _check_ids(ids, count)
        if mean is not None and (mean.shape != (dim,) or not np.isfinite(mean).all()):
            raise InvalidInputError(f"mean must be {dim} finite numbers, not {list(mean.shape)}")
        index = hnswlib.Index(space=metric, dim=dim)
        index.init_index(max_elements=count, M=M, ef_construction=ef_construction, random_seed=seed % 2**64)
        threads = _threads(n_threads)
        step = max(256, min(_ADD_ROWS, _ADD_BYTES // (4 * dim)))
        for begin in range(0, count, step):
            with np.errstate(over="ignore"):  # what overflows float32 is then infinite, and refused
                part = np.asarray(rows.read(begin, min(begin + step, count)), np.float32)
            check_finite(part, "vector", begin)
            # hnswlib knows vectors by their rows: its own numbers follow the order in which its threads came by.
            index.add_items(part, np.arange(begin, begin + len(part)), num_threads=threads)
            if progress:
                progress("build", min(begin + step, count), count)
        kind = rows.read(0, 1).dtype
        stored = {np.dtype(np.uint8): "uint8", np.dtype(np.float16): "float16"}.get(kind, "float32")
        if vector_type != "auto":
            stored = vector_type
        with _saved(index) as state:
            del index  # as large as the image, or nearly: the packer needs the file alone
            trim_memory()
            packing = _Packing(dim, metric, seed, threads, progress, generation, mean)
            return cls._packed(state, labels, stored, packing, n_lists, ivf_bits)

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
        """Packs an hnswlib index. It is read through hnswlib's own `save_index` (a temporary file in TMPDIR or
        /var/tmp, as large as the index) and not changed.

        Args:
            vector_type: how own vectors are held: "float32", "float16", "uint8", or "auto": the smallest type that holds
                all of them exactly. For cosine it is enough that it holds the vectors that the index normalised.
            n_lists, ivf_bits: as for `build`; deleted vectors are in no list.

        Raises:
            InvalidInputError: an empty index, a vector that is not finite, more lists than vectors.
            LossyVectorError: `vector_type` cannot hold a vector exactly.
        """
        import hnswlib

        if not isinstance(index, hnswlib.Index):
            raise InvalidInputError(f"from_hnswlib packs an hnswlib.Index, not a {type(index).__name__}")
        if index.element_count == 0:  # get_current_count() of an index without init_index ends the process
            raise InvalidInputError("an empty index makes no shard: add vectors first")
        _check_lists(n_lists, ivf_bits, index.get_current_count())
        if vector_type not in ("auto", *VECTOR_TYPES):
            raise InvalidInputError(f"vector_type must be auto, {', '.join(VECTOR_TYPES)}, not {vector_type!r}")
        candidates = [vector_type]
        if vector_type == "auto":
            small = ["uint8", "float16"]
            if index.space != "cosine":  # of normalised vectors only the packer can tell what they were
                some = _some_vectors(index)
                small = [name for name in small if _is_exact(some, name)]
            candidates = [*small, "float32"]
        packing = _Packing(index.dim, index.space, seed, _threads(n_threads), progress, generation, None)
        with _saved(index) as state:
            for name in candidates[:-1]:
                with suppress(LossyVectorError):
                    return cls._packed(state, None, name, packing, n_lists, ivf_bits)
            return cls._packed(state, None, candidates[-1], packing, n_lists, ivf_bits)

    @classmethod
    def _packed(
        cls,
        state: Path,
        ids: npt.NDArray[np.int64] | None,
        vector_type: str,
        packing: _Packing,
        n_lists: int,
        ivf_bits: int,
    ) -> Self:
        """`ids`: the index's labels are rows, and these their ids; nodes are then numbered by rows."""
        arena = _pack(state, ids, vector_type, packing)
        if n_lists:
            info = ImageInfo.of_arena(arena)
            make_lists(
                arena,
                info,
                n_lists,
                ivf_bits,
                seed=packing.seed,
                n_threads=packing.threads,
                progress=packing.progress,
            )
        return cls(arena, ImageInfo.of_arena(arena))

    @classmethod
    def of_arena(
        cls, arena: Arena, *, n_lists: int = 0, ivf_bits: int = 2, seed: int = 100, n_threads: int = 0
    ) -> Self:
        """The shard whose image `arena` holds, which is then the shard's.

        Args:
            n_lists, ivf_bits: as for `build`, of an image that has none.
            seed, n_threads: of the lists' clustering.

        Raises:
            FormatError: it holds no image.
        """
        info = ImageInfo.of_arena(arena)
        _check_lists(n_lists, ivf_bits, info.count)
        if n_lists:
            make_lists(arena, info, n_lists, ivf_bits, seed=seed, n_threads=_threads(n_threads))
        return cls(arena, ImageInfo.of_arena(arena))

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = True) -> Self:
        """Maps a shard's file read-only.

        Args:
            verify: check every record now (reads the whole file); without it only header and upper layers are checked now,
                and each record when it is used.

        Raises:
            FormatError: not a shard's file, a truncated or malformed one. ChecksumError: a corrupt one.
            OSError: it cannot be opened.
        """
        with Path(path).open("rb"):  # the ordinary OSError for a file that is not there or not readable
            pass
        arena = Arena.map_file(path)
        try:
            return cls(arena, ImageInfo.of_arena(arena, full=verify))
        except BaseException as error:
            arena.close()
            if isinstance(error, FormatError):
                raise type(error)(f"{os.fspath(path)}: {error}") from None
            raise

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the image to a file, whole or not at all (a temporary file beside it, then a rename)."""
        target = Path(path)
        if not target.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(target.parent))
        fd, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        try:
            with os.fdopen(fd, "wb") as file:
                with self.arena.view() as view:
                    file.write(view)
                file.flush()
                os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            Path(temporary).chmod(0o666 & ~umask)
            Path(temporary).replace(target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    # ---- what it is ----

    @property
    def info(self) -> ImageInfo:
        """The image's header."""
        return self._info

    @property
    def ivf_info(self) -> IvfInfo | None:
        """The inverted lists beside the graph; None where the shard was built without."""
        return IvfInfo.of_arena(self._arena) if self._info.ivf_bytes else None

    @property
    def dim(self) -> int:
        """Components of a vector."""
        return self._info.dim

    @property
    def metric(self) -> str:
        """`l2`, `ip` or `cosine`."""
        return self._info.metric

    def labels(self) -> npt.NDArray[np.int64]:
        """The id of each local row, int64[count]: what a filter's bits stand for. Rows are in the order in which `build` was
        given them; in an hnswlib index, in that of its own numbers."""
        info = self._info
        with self._arena.view() as view:
            return np.ascontiguousarray(heads_of(records_of(view, info))["label"])

    @property
    def arena(self) -> Arena:
        """The memory that holds the image: an own memfd, or a read-only mapping of the file after `open`."""
        return self._arena

    def __len__(self) -> int:
        return self._info.count - self._info.deleted_count

    def __repr__(self) -> str:
        info = self._info
        return (
            f"<Shard of {info.count} {info.vector_type}[{info.dim}] vectors, {info.metric}, {info.image_bytes} bytes>"
        )

    def pinned(self, *, lock: bool = True) -> Arena:
        """A sealed memfd arena that holds the image: the shard's own where it is one already, else a copy, made once.

        Args:
            lock: also mlock it, as a registered region must be. Raises `MemlockError` with the remedy.
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
        """Searches the shard in this process, with the same engine that a peer uses. In Python's main thread Ctrl-C ends it.

        Args:
            queries: float32[n_queries, dim] or float32[dim].
            k, ef, beam: answers, how far to look (k <= ef), expansions a round at most.
            n_threads: threads that share the queries.
            rows: which local rows may be returned: bool[count] or a bitmap (`cotra_rdma.pack_filter`); None: all.
            max_expansions: records that a walk expands at most, though it would find more; `incomplete` in the stats says which
                queries that ended. None: as many as it takes.
            timeout_s: how long the whole search may take; None: as long as it takes.
            stop: what another thread may end the search by.

        Returns:
            labels int64[n_queries, k] (-1 where there are fewer), distances float32[n_queries, k] (inf there), and one
            `cotra_rdma._core.stats.STATS_DTYPE` record for each query.

        Raises:
            InvalidInputError: a wrong dim, NaN or infinity, k > ef, a filter of another length.
            DeadlineError: it was not over within `timeout_s`. SearchCancelledError: `stop` was set.
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
        with self._lock:
            own = self._engines.pop() if self._engines else None
        own = own or _LocalEngine(self._arena, self._info.record_bytes)
        filters = None if bitmap is None else [bitmap]
        labels, distances, stats = own.engine.search(
            rows, k, ef, beam, filters=filters, max_expansions=most, deadline=deadline, stop=stop
        )
        with self._lock:  # one whose search failed is not used again
            self._engines.append(own)
        return labels[0], distances[0], stats

    # ---- letting go ----

    def close(self) -> None:
        """Unmaps the image. Servers and clusters that use it must be closed first."""
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


class _LocalEngine:
    """What one thread needs to search an image in this process."""

    def __init__(self, arena: Arena, record_bytes: int) -> None:
        self.channel = Channel.shm(arena, slot_bytes=max(record_bytes, 4096))
        self.view = View.open(self.channel)
        self.engine = Engine.create([self.view], [self.channel])

    def close(self) -> None:
        for part in (self.engine, self.view, self.channel):
            part.close()


class _Packer(Handle):
    def _destroy(self, ptr: Any) -> None:
        lib.cotra_packer_destroy(ptr)


def _threads(n_threads: int) -> int:
    if n_threads < 0:
        raise InvalidInputError(f"n_threads must be >= 0, not {n_threads}")
    return n_threads or len(os.sched_getaffinity(0))


def _check_lists(n_lists: int, bits: int, count: int) -> None:
    if not 0 <= n_lists <= count:
        raise InvalidInputError(f"{count} vectors cannot make {n_lists} lists")
    if not 1 <= bits <= MAX_BITS:
        raise InvalidInputError(f"ivf_bits must be in [1, {MAX_BITS}], not {bits}")


def _check_ids(ids: npt.ArrayLike | None, count: int) -> npt.NDArray[np.int64]:
    if ids is None:
        return np.arange(count, dtype=np.int64)
    given = np.asarray(ids)
    if given.shape != (count,) or not np.issubdtype(given.dtype, np.integer):
        raise InvalidInputError(f"ids must be int64[{count}], not {given.dtype}{list(given.shape)}")
    labels = given.astype(np.int64)
    if (labels < 0).any() or (labels.astype(given.dtype) != given).any():
        raise InvalidInputError("ids must be in [0, 2^63)")
    unique, counts = np.unique(labels, return_counts=True)
    if len(unique) != count:
        raise InvalidInputError(f"duplicate ids: {unique[counts > 1][:5].tolist()} and {count - len(unique)} in all")
    return labels


def _some_vectors(index: hnswlib.Index) -> npt.NDArray[np.float32]:
    """A few of an index's vectors; hnswlib gives no deleted ones out."""
    vectors = []
    for label in index.get_ids_list()[:64]:
        with suppress(RuntimeError):
            vectors.append(index.get_items([label])[0])
    return np.asarray(vectors, np.float32)


def _is_exact(vectors: npt.NDArray[np.float32], name: str) -> bool:
    with np.errstate(over="ignore", invalid="ignore"):
        return bool((vectors.astype(name).astype(np.float32) == vectors).all())


@dataclass(frozen=True, slots=True)
class _Packing:
    """How an index is packed, but for the type of its vectors."""

    dim: int
    metric: str
    seed: int
    threads: int
    progress: Progress | None
    generation: int
    mean: npt.NDArray[np.float32] | None


def _pack(state: Path, ids: npt.NDArray[np.int64] | None, vector_type: str, packing: _Packing) -> Arena:
    centre = None if packing.mean is None else np.ascontiguousarray(packing.mean, np.float32)
    params = ffi.new(
        "cotra_packer_params *",
        {
            "dim": packing.dim,
            "metric": METRICS.index(packing.metric),
            "vector_type": VECTOR_TYPES.index(vector_type),
            "arena_flags": lib.COTRA_ARENA_HUGE,
            "seed": packing.seed % 2**64,
            "generation": packing.generation,
            "ids": ffi.NULL if ids is None else ffi.from_buffer("int64_t[]", ids),
            "n_ids": 0 if ids is None else len(ids),
            "mean": ffi.NULL if centre is None else ffi.from_buffer("float[]", centre),
            "round_vectors": ids is not None,
        },
    )
    out, err = ffi.new("cotra_packer **"), new_error()
    check(lib.cotra_packer_create(params, out, err), err)
    with _Packer(out[0]) as packer:
        with state.open("rb", buffering=0) as file:
            err = new_error()
            check(lib.cotra_packer_read(packer.ptr, file.fileno(), round(_STATE_TIMEOUT_S * 1e9), err), err)
        for phase, step in (("link", lib.cotra_packer_link), ("pack", lib.cotra_packer_encode)):
            _for_all_nodes(packer, phase, step, packing.threads, packing.progress)
        arena_out, err = ffi.new("cotra_arena **"), new_error()
        check(lib.cotra_packer_finish(packer.ptr, arena_out, err), err)
        return Arena(arena_out[0])


@contextmanager
def _saved(index: hnswlib.Index) -> Iterator[Path]:
    """hnswlib's state in a temporary file, which the packer reads front to back: no second copy in memory.

    A pipe would spare the file, but `save_index` holds the GIL while it writes, so nobody could be sure to be reading.
    """
    directory = os.environ.get("TMPDIR") or (
        "/var/tmp" if Path("/var/tmp").is_dir() else None
    )  # a disk; /tmp may be memory
    with tempfile.TemporaryDirectory(prefix="cotra-", dir=directory) as scratch:
        state = Path(scratch) / "state"
        index.save_index(os.fspath(state))
        del index  # a context manager's arguments live until it ends
        yield state


def _for_all_nodes(
    packer: _Packer, phase: str, step: Callable[..., int], threads: int, progress: Progress | None
) -> None:
    """Takes a step of the packer's over all nodes, a range at a time."""
    count: int = lib.cotra_packer_count(packer.ptr)
    done = 0

    def run(begin: int) -> int:
        end, err = min(begin + _PACK_ROWS, count), new_error()
        check(step(packer.ptr, begin, end, err), err)
        return end - begin

    with ThreadPoolExecutor(threads) as pool:
        for future in as_completed([pool.submit(run, begin) for begin in range(0, count, _PACK_ROWS)]):
            done += future.result()
            if progress:
                progress(phase, done, count)
