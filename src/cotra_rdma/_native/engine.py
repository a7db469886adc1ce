"""The search engine's Python side: a shard's `View`, one thread's `Engine`, and the merge of several shards' answers."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from cotra_rdma._core.query_checks import check_most, check_rows, check_search
from cotra_rdma._core.remote_expansion import EXPANSION_DTYPE, PUSH_DTYPE, Expansions
from cotra_rdma._core.stop import LOOK_S, Stop
from cotra_rdma._native.arena import Arena
from cotra_rdma._native.channel import DEFAULT_TIMEOUT_S, Channel
from cotra_rdma._native.library import Handle, check, ffi, lib, new_error
from cotra_rdma.errors import CotraError, FormatError, InvalidInputError

Source = Channel | Arena | None
"""How the records of a shard are come by: see `Engine.create`."""

MOST_SLOTS: int = lib.COTRA_MOST_SLOTS
"""Of a channel: an engine has no use for more."""

METRICS = ("l2", "ip", "cosine")
VECTOR_TYPES = ("float32", "float16", "uint8")

STATS_DTYPE = np.dtype(
    [
        ("reads", "<u4"),
        ("rounds", "<u4"),
        ("expansions", "<u4"),
        ("cache_hits", "<u4"),
        ("read_bytes", "<u8"),
        ("latency_ns", "<u8"),
        ("cached_records", "<u4"),
        ("own", "<u4"),
        ("pushed", "<u4"),
        ("incomplete", "<u4"),
    ]
)
"""What a query took. expansions = reads + cached_records + own + pushed: records that were READ, that a cache had, in this
process's own memory, and nodes that their shards' owners expanded. (A READ repeated after a failure is counted twice.)"""
COUNTS = ("reads", "expansions", "cache_hits", "cached_records", "own", "pushed", "incomplete", "read_bytes")
"""Those of `STATS_DTYPE` that are summed over shards; of rounds and latency_ns a query has its slowest shard's."""
OWNER_STATS_DTYPE = np.dtype([(name, STATS_DTYPE[name]) for name in (STATS_DTYPE.names or ())[:6]])
"""What an owner that searches its shard tells of each query, without what a cache did: it has none."""
MORE_STATS_DTYPE = np.dtype([(name, STATS_DTYPE[name]) for name in (STATS_DTYPE.names or ())[6:]])
"""What it tells beside of a search of the whole collection."""


class Helper(Protocol):
    """What a search turns to half-way: for nodes that only their owner can expand, and where a shard fails."""

    def expand(self, pushes: Mapping[int, npt.NDArray[np.void]]) -> Mapping[int, Expansions | CotraError]:
        """For shards (positions in the engine) the answers of their owners to `PUSH_DTYPE`[n], or why there are none."""

    def replace(self, shard: int, error: CotraError) -> tuple[View, Source] | None:
        """Another way to a shard that failed, which this object keeps open until the search is over; None: go on without it.
        May raise, which ends the search."""


def simd_level() -> str:
    """The SIMD level that searches use on this CPU: portable, avx2..."""
    return str(ffi.string(lib.cotra_simd_name(lib.cotra_simd_best())).decode())


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """A graph image's header. `code_dim`: bits of a neighbour's code; `degree`: links of a node on level 0; `ivf_bytes`: of the
    section of inverted lists, 0 where there is none; `graph_id`: of the graph over all shards that the shard is a part of, 0
    for its own, `graph_count` its nodes, and `graph_base` the number of the shard's first node in it."""

    image_bytes: int
    count: int
    deleted_count: int
    upper_count: int
    generation: int
    seed: int
    nav_offset: int
    nav_bytes: int
    records_offset: int
    image_checksum: int
    ivf_offset: int
    ivf_bytes: int
    record_bytes: int
    dim: int
    code_dim: int
    metric: str
    vector_type: str
    M: int
    degree: int
    ef_construction: int
    max_level: int
    entry_node: int
    format_version: int
    graph_id: int
    graph_count: int
    graph_base: int

    @classmethod
    def of_arena(cls, arena: Arena, *, full: bool = False) -> Self:
        """Of the image in an arena, which is validated: `full`: every record too. Raises `FormatError`, `ChecksumError`."""
        raw, err, info = ffi.new("cotra_image_info *"), new_error(), arena.info
        check(lib.cotra_image_validate(ffi.cast("void *", info.addr), info.len, full, raw, err), err)
        return cls.from_c(raw)

    @classmethod
    def from_c(cls, raw: Any) -> Self:
        """From a `cotra_image_info *`."""
        return cls(
            image_bytes=raw.image_bytes,
            count=raw.count,
            deleted_count=raw.deleted_count,
            upper_count=raw.upper_count,
            generation=raw.generation,
            seed=raw.seed,
            nav_offset=raw.nav_offset,
            nav_bytes=raw.nav_bytes,
            records_offset=raw.records_offset,
            image_checksum=raw.image_checksum,
            ivf_offset=raw.ivf_offset,
            ivf_bytes=raw.ivf_bytes,
            record_bytes=raw.record_bytes,
            dim=raw.dim,
            code_dim=raw.code_dim,
            metric=METRICS[raw.metric],
            vector_type=VECTOR_TYPES[raw.vector_type],
            M=raw.M,
            degree=raw.degree,
            ef_construction=raw.ef_construction,
            max_level=raw.max_level,
            entry_node=raw.entry_node,
            format_version=raw.format_version,
            graph_id=raw.graph_id,
            graph_count=raw.graph_count,
            graph_base=raw.graph_base,
        )


class View(Handle):
    """What a reader keeps of one shard: its header and upper layers, read once over a channel and validated.

    Read-only afterwards: engines of several threads may share it.
    """

    @classmethod
    def open(cls, channel: Channel, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> Self:
        """Reads and validates header and navigation section. Raises `FormatError`, `ChecksumError`, `TransportError`."""
        out, err = ffi.new("cotra_view **"), new_error()
        check(lib.cotra_view_open(channel.ptr, round(timeout_s * 1e9), out, err), err)
        return cls(out[0])

    @classmethod
    def load(cls, data: bytes | bytearray | memoryview) -> Self:
        """Of header and navigation section, one after the other, that came another way: they are copied and validated.

        Raises `FormatError`, `ChecksumError`.
        """
        out, err = ffi.new("cotra_view **"), new_error()
        check(lib.cotra_view_load(ffi.from_buffer(data), len(data), out, err), err)
        return cls(out[0])

    def expand(self, arena: Arena, queries: npt.NDArray[np.float32], pushes: npt.NDArray[np.void]) -> Expansions:
        """Expands nodes of the image in `arena`, this view's, for somebody else's walks: an owner's side of `Helper.expand`.

        Args:
            queries: float32[n_queries, dim].
            pushes: `PUSH_DTYPE`[n]; those of one query follow each other.

        Raises `InvalidInputError` for a query or row that is not there. Any thread may call it; the GIL is released.
        """
        info = self.info
        queries = check_rows(queries, info.dim)
        pushes = np.ascontiguousarray(pushes, PUSH_DTYPE)
        found = np.empty(len(pushes), EXPANSION_DTYPE)
        numbers = np.empty(len(pushes) * info.degree, np.uint32)
        estimates, weights = np.empty(len(numbers), np.float32), np.empty(len(numbers), np.float32)
        n, err = ffi.new("uint64_t *"), new_error()
        status = lib.cotra_view_expand(
            self.ptr,
            arena.ptr,
            _buffer(_FLOATS, queries),
            len(queries),
            _buffer(_PUSHES, pushes),
            len(pushes),
            _buffer(_EXPANSIONS, found),
            _buffer(_NUMBERS, numbers),
            _buffer(_FLOATS, estimates),
            _buffer(_FLOATS, weights),
            n,
            err,
        )
        check(status, err)
        return Expansions(found, numbers[: n[0]], estimates[: n[0]], weights[: n[0]])

    def _destroy(self, ptr: Any) -> None:
        lib.cotra_view_close(ptr)

    @property
    def info(self) -> ImageInfo:
        """The image's header."""
        raw, nbytes = ffi.new("cotra_image_info *"), ffi.new("uint64_t *")
        lib.cotra_view_get_info(self.ptr, raw, nbytes)
        return ImageInfo.from_c(raw)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the view holds."""
        raw, nbytes = ffi.new("cotra_image_info *"), ffi.new("uint64_t *")
        lib.cotra_view_get_info(self.ptr, raw, nbytes)
        return int(nbytes[0])


@dataclass(frozen=True, slots=True)
class CacheInfo:
    """A cache's memory in bytes, all in all; how many records it may hold, and how many it holds now."""

    nbytes: int
    places: int
    records: int


class RecordCache(Handle):
    """The records of one shard that walks read most often, as many as fit a budget: each is taken from here in place of a READ.

    Engines of several threads may share it; none of them waits for another. A record takes the place of another only when
    it was asked for more often of late: TinyLFU (Einziger, Friedman, Manes, ACM Transactions on Storage 13(4), 2017).
    """

    @classmethod
    def create(cls, view: View, budget_bytes: int) -> Self:
        """For the shard of `view`; never takes more than the budget, nor than all records need. Raises `InvalidInputError`
        where the budget holds no record."""
        if not 0 <= budget_bytes < 2**63:
            raise InvalidInputError(f"a cache cannot have {budget_bytes} bytes")
        out, err = ffi.new("cotra_cache **"), new_error()
        check(lib.cotra_cache_create(view.ptr, budget_bytes, out, err), err)
        return cls(out[0])

    def _destroy(self, ptr: Any) -> None:
        lib.cotra_cache_destroy(ptr)

    @property
    def info(self) -> CacheInfo:
        """Memory and records."""
        raw = ffi.new("cotra_cache_info *")
        lib.cotra_cache_get_info(self.ptr, raw)
        return CacheInfo(raw.bytes, raw.places, raw.records)

    def put(self, row: int, record: bytes | memoryview | npt.NDArray[np.uint8]) -> None:
        """Keeps a record (all its bytes) that was read another way, as if it were read often; a broken one is not kept."""
        lib.cotra_cache_put(self.ptr, row, ffi.from_buffer(record))

    def clear(self) -> None:
        """Forgets all records, and how often each was asked for."""
        lib.cotra_cache_clear(self.ptr)


class Engine(Handle):
    """One thread's searcher over n shards: `views[i]` is walked through `sources[i]`. Not shared between threads."""

    @classmethod
    def create(
        cls,
        views: Sequence[View],
        sources: Sequence[Source],
        caches: Sequence[RecordCache | None] | None = None,
        *,
        simd: int | None = None,
    ) -> Self:
        """All views must agree on dim and metric.

        sources: for each shard the channel that it is READ through; or the arena that holds its image in this process, where its
        records are used in place; or None: its owner expands its nodes (`Helper`). caches: for each shard one of its records,
        or None. simd: a COTRA_SIMD_* level; None: the CPU's best.
        """
        if len(views) != len(sources) or not views:
            raise InvalidInputError("an engine needs one source for each view, and at least one")
        if caches is not None and len(caches) != len(views):
            raise InvalidInputError(f"{len(caches)} caches for {len(views)} shards")
        given = caches or [None] * len(views)
        shards = ffi.new("cotra_engine_shard[]", len(views))
        for raw, view, source, cache in zip(shards, views, sources, given, strict=True):
            _fill_shard(raw, view, source, cache)
        out, err = ffi.new("cotra_engine **"), new_error()
        level = lib.cotra_simd_best() if simd is None else simd
        check(lib.cotra_engine_create(shards, len(views), level, out, err), err)
        engine = cls(out[0], *views, *sources, *given)
        engine._n_shards = len(views)
        engine._dim = views[0].info.dim
        engine._params, engine._err = ffi.new("cotra_search_params *", {"pause_ns": PAUSE_NS}), err
        engine._asked = None
        engine._replaced = []
        return engine

    _replaced: list[object]  # views and sources that came in the middle of a search
    _n_shards: int
    _dim: int
    _params: Any  # of the last search
    _asked: tuple[float | None, ...] | None  # what is in them
    _err: Any

    def _destroy(self, ptr: Any) -> None:
        lib.cotra_engine_destroy(ptr)

    def search(
        self,
        queries: npt.NDArray[np.float32],
        k: int,
        ef: int,
        beam: int,
        *,
        inflight: int = 0,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        filters: Sequence[bytes | None] | None = None,
        mask: npt.NDArray[np.bool_] | None = None,
        numbers: bool = False,
        max_expansions: int | None = None,
        helper: Helper | None = None,
        deadline: float = math.inf,
        stop: Stop | None = None,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.void]]:
        """Searches every shard for every query; the GIL is released. Shards of one graph (`global_graph`) are searched together,
        by one walk a query.

        Args:
            queries: float32[n_queries, dim], C-contiguous.
            k, ef, beam: answers, how far to look (k <= ef) and expansions a round at most.
            inflight: queries in progress at once; 0: chosen from the channels.
            timeout_s: the longest wait for one READ, in seconds.
            filters: for each shard None, or a bitmap: bit i (of byte i // 8, lowest first) = row i may be returned.
            mask: bool[n_queries, n_shards]: which shards each query is for.
            numbers: have node numbers (of the graph, over all its shards) in place of labels.
            max_expansions: records that a walk expands at most; `incomplete` in the stats says how many walks that ended. None:
                as many as it takes.
            helper: asked half-way, without which a shard that fails is an error.
            deadline: of the whole search, on `time.monotonic`'s clock: `DeadlineError`, which names no shard.
            stop: ends it, and hears of its progress. In Python's main thread Ctrl-C ends it as well.

        After a failure, and a search that was ended before its time, the engine is of no use for another one.

        Returns:
            labels int64[n_shards, n_queries, k] (-1 where there are fewer), distances float32 likewise (inf there), each
            row by distance, then label; and one `STATS_DTYPE` record for each query, summed over the shards.
        """
        n = len(queries)
        queries = check_rows(queries, self._dim)
        params, err, asked = self._params, self._err, (k, ef, beam, inflight, timeout_s, numbers, max_expansions)
        if asked != self._asked:  # most searches ask for what the one before did
            check_search(k, ef, beam, inflight, timeout_s)
            params.k, params.ef, params.beam, params.inflight = k, ef, beam, inflight
            params.timeout_ns = round(timeout_s * 1e9)
            params.numbers = numbers
            params.most = check_most(max_expansions)
            self._asked = asked
        _held = end_by(params, deadline, stop)
        scope, _held_too = search_scope(filters, mask, n, self._n_shards)
        labels = np.empty((self._n_shards, n, k), np.int64)
        distances = np.empty((self._n_shards, n, k), np.float32)
        stats = np.empty(n, STATS_DTYPE)
        status = lib.cotra_engine_search(
            self.ptr,
            _buffer(_FLOATS, queries),
            n,
            params,
            scope,
            _buffer(_LABELS, labels),
            _buffer(_FLOATS, distances),
            _buffer(_STATS, stats),
            err,
        )
        while status:
            if status == lib.COTRA_PAUSED:
                status = lib.cotra_engine_resume(self.ptr, pause_ns(stop), err)
                continue
            if helper is None or (status < 0 and (err.shard < 0 or status == lib.COTRA_ERR_NO_MEMORY)):
                check(status, err)
                raise InvalidInputError("some of the shards are expanded by their owners: that takes a helper")
            if status < 0:
                self._replace(helper, _error_of(status, err))
            else:
                self._push(helper)
                if stop is not None:
                    stop.tell()
            err.shard = -1
            status = lib.cotra_engine_resume(self.ptr, PAUSE_NS, err)
        return labels, distances, stats

    @property
    def slots(self) -> int:
        """Those that a channel needs which comes in the middle of the last search: at most `MOST_SLOTS`."""
        return int(lib.cotra_engine_get_slots(self.ptr))

    def _push(self, helper: Helper) -> None:
        """Has owners expand what waits for them."""
        out, n = ffi.new("cotra_push **"), ffi.new("uint64_t *")
        pushes = {}
        for shard in range(self._n_shards):
            lib.cotra_engine_get_pushes(self.ptr, shard, out, n)
            if n[0]:
                raw = ffi.buffer(out[0], n[0] * PUSH_DTYPE.itemsize)
                pushes[shard] = np.frombuffer(raw, PUSH_DTYPE).copy()
        if not pushes:
            raise RuntimeError("a search waits for nothing")
        for shard, told in helper.expand(pushes).items():
            if isinstance(told, CotraError):
                self._replace(helper, told, shard)
                continue
            try:
                self._take(shard, told)
            except FormatError as error:
                self._replace(helper, error, shard)

    def _take(self, shard: int, told: Expansions) -> None:
        err = new_error()
        found = np.ascontiguousarray(told.found, EXPANSION_DTYPE)
        numbers = np.ascontiguousarray(told.numbers, np.uint32)
        estimates = np.ascontiguousarray(told.estimates, np.float32)
        weights = np.ascontiguousarray(told.weights, np.float32)
        if not len(numbers) == len(estimates) == len(weights):
            raise FormatError(
                f"{len(numbers)} neighbours with {len(estimates)} estimates and {len(weights)} weights", shard=shard
            )
        status = lib.cotra_engine_take_expansions(
            self.ptr,
            shard,
            _buffer(_EXPANSIONS, found),
            len(found),
            _buffer(_NUMBERS, numbers),
            _buffer(_FLOATS, estimates),
            _buffer(_FLOATS, weights),
            len(numbers),
            err,
        )
        check(status, err)

    def _replace(self, helper: Helper, error: CotraError, shard: int | None = None) -> None:
        """Goes on over another way to a shard, or without it."""
        shard = error.shard if shard is None else shard
        assert shard is not None
        while True:
            other, raw, err = helper.replace(shard, error), ffi.NULL, new_error()
            if other is not None:
                raw = ffi.new("cotra_engine_shard *")
                _fill_shard(raw, *other, None)
                self._replaced += other
            try:
                check(lib.cotra_engine_replace(self.ptr, shard, raw, err), err)
                return
            except InvalidInputError:  # the helper's fault, and no owner's
                raise
            except CotraError as failed:
                if other is None:
                    raise
                error = failed


def _fill_shard(raw: Any, view: View, source: Source, cache: RecordCache | None) -> None:
    raw.view = view.ptr
    raw.channel = source.ptr if isinstance(source, Channel) else ffi.NULL
    raw.own = source.ptr if isinstance(source, Arena) else ffi.NULL
    raw.cache = ffi.NULL if cache is None else cache.ptr


def _error_of(status: int, err: Any) -> CotraError:
    try:
        check(status, err)
    except CotraError as error:
        return error
    raise AssertionError(f"status {status} is no error")


_buffer = ffi.from_buffer
_FLOATS, _LABELS, _PLACES = ffi.typeof("float[]"), ffi.typeof("int64_t[]"), ffi.typeof("int32_t[]")
_STATS = ffi.typeof("cotra_query_stats[]")
_PUSHES, _EXPANSIONS = ffi.typeof("cotra_push[]"), ffi.typeof("cotra_expansion[]")
_NUMBERS = ffi.typeof("uint32_t[]")
_WATCH = ffi.typeof("cotra_watch[]")
PAUSE_NS = round(LOOK_S * 1e9)
"""A search pauses first after so long; then as `pause_ns` says."""


def end_by(params: Any, deadline: float, stop: Stop | None) -> Any:
    """Says in the parameters of a search what ends it before its time; what it returns must live as long as the search."""
    params.deadline_ns = 0 if deadline == math.inf else max(1, round(deadline * 1e9))
    params.watch = watch = ffi.NULL if stop is None else _buffer(_WATCH, stop.memory)
    return watch


def pause_ns(stop: Stop | None) -> int:
    """In a search's pause: how long until the next one.

    Python handles signals, Ctrl-C for one, in its main thread only, and only between two calls of C. A search in another thread
    is ended by who waits for it; it pauses no more, for each pause takes the GIL, unless somebody wants to hear of its progress.
    """
    if stop is not None and stop.is_heard:
        stop.tell()
    elif threading.get_ident() != threading.main_thread().ident:
        return 0
    return PAUSE_NS


def search_scope(
    filters: Sequence[bytes | None] | None, mask: npt.NDArray[np.bool_] | None, n_queries: int, n_shards: int
) -> tuple[Any, list[Any]]:
    """A `cotra_search_scope *` of filters and mask (as `Engine.search` takes them), and what it points into.

    Raises `InvalidInputError` where they are for another number of shards or queries.
    """
    if filters is None and mask is None:
        return ffi.NULL, []
    scope, held = ffi.new("cotra_search_scope *"), []
    if filters is not None:
        if len(filters) != n_shards:
            raise InvalidInputError(f"{len(filters)} filters for {n_shards} shards")
        buffers = [ffi.NULL if bitmap is None else ffi.from_buffer("uint8_t[]", bitmap) for bitmap in filters]
        pointers = ffi.new("uint8_t *[]", buffers)
        lengths = ffi.new("uint64_t[]", [0 if bitmap is None else len(bitmap) for bitmap in filters])
        scope.filters, scope.filter_bytes = pointers, lengths
        held += [buffers, pointers, lengths]
    if mask is not None:
        bits = np.ascontiguousarray(mask, np.uint8)
        if bits.shape != (n_queries, n_shards):
            raise InvalidInputError(f"a mask must be bool[{n_queries}, {n_shards}], not {list(bits.shape)}")
        scope.mask = ffi.from_buffer("uint8_t[]", bits)
        held.append(bits)
    return scope, held


def pack_stats(stats: npt.NDArray[np.void], dtype: np.dtype[np.void] = OWNER_STATS_DTYPE) -> memoryview:
    """An owner's stats (`STATS_DTYPE`[n]) as they travel: `OWNER_STATS_DTYPE`[n], or the rest of them, as raw bytes."""
    told = np.empty(len(stats), dtype)
    for name in dtype.names or ():
        told[name] = stats[name]
    return told.view(np.uint8).data


def unpack_stats(
    data: bytes | memoryview, n_queries: int, more: bytes | memoryview | None = None
) -> npt.NDArray[np.void]:
    """The other way round: `STATS_DTYPE`[n_queries]. Raises `FormatError` where they are of another number of queries."""
    stats = np.zeros(n_queries, STATS_DTYPE)
    for raw, dtype in ((data, OWNER_STATS_DTYPE), (more, MORE_STATS_DTYPE)):
        if raw is None:
            continue
        if len(raw) != n_queries * dtype.itemsize:
            raise FormatError(f"{len(raw)} bytes of stats to {n_queries} queries")
        told = np.frombuffer(raw, dtype)
        for name in dtype.names or ():
            stats[name] = told[name]
    return stats


def merge(
    labels: npt.NDArray[np.int64], distances: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.int32]]:
    """Merges sorted answers of several shards by distance, then shard, then label; a label is kept once.

    Args:
        labels: int64[n_shards, n_queries, k], -1 where a row has fewer. distances: float32, likewise.

    Returns:
        labels int64[n_queries, k], distances float32[n_queries, k], and the position of the shard of each: int32 (-1: none).
    """
    labels = np.ascontiguousarray(labels, np.int64)
    distances = np.ascontiguousarray(distances, np.float32)
    n_shards, n, k = labels.shape
    out_labels = np.empty((n, k), np.int64)
    out_distances = np.empty((n, k), np.float32)
    out_shards = np.empty((n, k), np.int32)
    status = lib.cotra_merge(
        _buffer(_LABELS, labels),
        _buffer(_FLOATS, distances),
        n_shards,
        n,
        k,
        _buffer(_LABELS, out_labels),
        _buffer(_FLOATS, out_distances),
        _buffer(_PLACES, out_shards),
        ffi.NULL,
    )
    if status:
        raise MemoryError(f"merging {n_shards} shards")
    return out_labels, out_distances, out_shards
