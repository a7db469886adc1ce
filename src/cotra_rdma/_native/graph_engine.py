"""One thread's searcher over graphs: `Engine`, and what helps it where memory cannot be read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from cotra_rdma._core.query_checks import check_most, check_rows, check_search
from cotra_rdma._core.remote_expansion import EXPANSION_DTYPE, PUSH_DTYPE, Expansions
from cotra_rdma._core.stats import STATS_DTYPE
from cotra_rdma._core.stop import Stop
from cotra_rdma._native.arena import Arena
from cotra_rdma._native.channel import DEFAULT_TIMEOUT_S, Channel
from cotra_rdma._native.library import Handle, check, ffi, lib, new_error
from cotra_rdma._native.record_cache import RecordCache
from cotra_rdma._native.search_call import (
    EXPANSIONS,
    FLOATS,
    LABELS,
    NUMBERS,
    PAUSE_NS,
    STATS,
    buffer_of,
    end_by,
    pause_ns,
    search_scope,
)
from cotra_rdma._native.view import View
from cotra_rdma.errors import CotraError, FormatError, InvalidInputError

Source = Channel | Arena | None
"""How the records of a shard are come by: see `Engine.create`."""

MOST_SLOTS: int = lib.COTRA_MOST_SLOTS
"""Of a channel: an engine has no use for more."""


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
        """Searches every shard for every query; the GIL is released. Shards of one graph (`cross_links`) are searched together,
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
            buffer_of(FLOATS, queries),
            n,
            params,
            scope,
            buffer_of(LABELS, labels),
            buffer_of(FLOATS, distances),
            buffer_of(STATS, stats),
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
            buffer_of(EXPANSIONS, found),
            len(found),
            buffer_of(NUMBERS, numbers),
            buffer_of(FLOATS, estimates),
            buffer_of(FLOATS, weights),
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
