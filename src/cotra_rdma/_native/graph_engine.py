"""`Engine`: one thread's searcher of graphs, with the helper that it asks where it cannot READ records."""

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
"""How an engine gets the records of a shard; see `Engine.create`."""

MOST_SLOTS: int = lib.COTRA_MOST_SLOTS
"""The most slots of a channel that an engine can use."""


class Helper(Protocol):
    """What a suspended search asks for help.

    An engine asks it to expand nodes that only their owner can expand, and for another way to a shard that failed.
    """

    def expand(self, pushes: Mapping[int, npt.NDArray[np.void]]) -> Mapping[int, Expansions | CotraError]:
        """Has the owners expand nodes.

        Args:
            pushes: for a shard, by its position in the engine, the pushes `PUSH_DTYPE`[n].

        Returns:
            For each shard, its owner's replies, or the error that says why there are none.
        """

    def replace(self, shard: int, error: CotraError) -> tuple[View, Source] | None:
        """Returns another way to a shard that failed, or None to go on without the shard.

        This object keeps what it returns open until the search is over.
        It may raise an error, which ends the search.
        """


def simd_level() -> str:
    """Returns the SIMD level that searches use on this CPU, for example "portable" or "avx2"."""
    return str(ffi.string(lib.cotra_simd_name(lib.cotra_simd_best())).decode())


class Engine(Handle):
    """One thread's searcher of n shards.

    `views[i]` is walked through `sources[i]`.
    Threads must not share an engine.
    """

    @classmethod
    def create(
        cls,
        views: Sequence[View],
        sources: Sequence[Source],
        caches: Sequence[RecordCache | None] | None = None,
        *,
        simd: int | None = None,
    ) -> Self:
        """Makes an engine.

        Args:
            views: one for each shard. All must agree on dimension and metric.
            sources: for each shard a channel, an arena or None. An engine READs records through a channel.
                An arena holds the shard's image in this process, and the records are used in place.
                For None, the owner expands the nodes, and `search` needs a `Helper`.
            caches: for each shard a cache of its records, or None.
            simd: a COTRA_SIMD_* level; None for the best that the CPU has.

        Raises:
            InvalidInputError: the numbers of views, sources and caches differ, or there are no views.
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

    _replaced: list[object]  # views and sources that replaced others during a search
    _n_shards: int
    _dim: int
    _params: Any  # of the last search
    _asked: tuple[float | None, ...] | None  # the values that `_params` holds
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
        """Searches every shard for every query. The GIL is released.

        Shards of one graph (`cross_links`) are searched together, by one walk for each query.
        The engine cannot be used again after a failure, or after a search that was ended early.

        Args:
            queries: float32[n_queries, dim].
            k: the number of answers.
            ef: the length of the list of nearest nodes, at least k.
            beam: the most expansions in a round.
            inflight: queries in progress at once; 0 to choose it from the channels.
            timeout_s: the longest wait for one READ, in seconds.
            filters: for each shard None, or a bitmap as `pack_filter` makes it.
            mask: bool[n_queries, n_shards], the shards that each query asks.
            numbers: return node numbers in place of labels. They are numbers of the graph, over all its shards.
            max_expansions: the most records that a walk expands; None for no limit.
                `incomplete` in the stats counts the walks that this limit ended.
            helper: asked while the search is suspended. Without a helper, a shard that fails is an error.
            deadline: the end of the whole search, on `time.monotonic`'s clock. Its `DeadlineError` names no shard.
            stop: ends the search early, and receives its progress. Ctrl-C ends a search in Python's main thread too.

        Returns:
            Labels, distances and stats.
            Labels are int64[n_shards, n_queries, k], with -1 where there are fewer answers.
            Distances are float32 of the same shape, with inf there.
            Each row is sorted by distance, then label.
            Stats are `STATS_DTYPE`[n_queries], summed over the shards.
        """
        n = len(queries)
        queries = check_rows(queries, self._dim)
        params, err, asked = self._params, self._err, (k, ef, beam, inflight, timeout_s, numbers, max_expansions)
        if asked != self._asked:  # most searches have the parameters of the search before
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
        """The slots that a channel needs if it joins the last search. It is at most `MOST_SLOTS`."""
        return int(lib.cotra_engine_get_slots(self.ptr))

    def _push(self, helper: Helper) -> None:
        """Has the owners expand the nodes that wait for them."""
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
        """Goes on over another way to a shard, or without the shard."""
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
            except InvalidInputError:  # the helper is wrong, and no owner is
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
