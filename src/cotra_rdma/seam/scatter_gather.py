"""`ScatterGather`: every selected shard is asked at once over a dispatch, and the result says what became of each.

A shard that answers with an error, late, malformed or not at all has failed, and is named: nothing is passed over in silence.
"""

from __future__ import annotations

import asyncio
import enum
import math
import secrets
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from cotra_rdma._core.image_identity import ImageIdentity
from cotra_rdma._core.query_checks import as_array, check_queries, check_search
from cotra_rdma._core.stats import COUNTS, STATS_DTYPE, unpack_stats
from cotra_rdma._native.merge import merge
from cotra_rdma.errors import FormatError, InvalidInputError, PartialResultError, PeerError, StaleShardError
from cotra_rdma.protocol.envelope import STALE, WIRE_VERSION, VShardEnvelope, VShardMessageType
from cotra_rdma.protocol.regions import (
    WANT_CAPABILITIES,
    RegionRequest,
    ShardFields,
    decode_region_response,
    encode_region,
)
from cotra_rdma.protocol.search import DEFAULT_BEAM, SearchRequest, SearchResponse, queries_per_message
from cotra_rdma.protocol.tls import Tls
from cotra_rdma.seam.grpc_dispatch import GrpcDispatch
from cotra_rdma.seam.interface import ShardRef, ShardRpcDispatch, VectorShardSeam
from cotra_rdma.seam.loop_thread import LoopThread

DEFAULT_TIMEOUT_S = 5.0
_MAX_OVERFETCH = 16  # times k

_Labels = npt.NDArray[np.int64]
_Distances = npt.NDArray[np.float32]
_Rows = npt.NDArray[np.intp]


class ShardStatus(enum.StrEnum):
    """What became of a shard in one search."""

    ANSWERED = "answered"
    TIMED_OUT = "timed out"
    FAILED = "failed"
    NOT_SELECTED = "not selected"


@dataclass(frozen=True, slots=True)
class ShardOutcome:
    """One shard's part in a search.

    Attributes:
        shard: which.
        status: what became of it; NOT_SELECTED when no query was for it.
        n_queries: queries that it was asked.
        reason: why it failed; "" where it did not.
        error: the exception behind the reason, or None.
        elapsed_s: until its answer, or its failure, in seconds.
    """

    shard: ShardRef
    status: ShardStatus
    n_queries: int
    reason: str = ""
    error: Exception | None = None
    elapsed_s: float = 0.0

    def __str__(self) -> str:
        return f"{self.shard} {self.status}{': ' + self.reason if self.reason else ''}"


@dataclass(frozen=True, slots=True)
class SeamResult:
    """The answers to a batch of queries, and what became of each shard; all of `SearchResult` by the same names.

    Attributes:
        ids: int64[n_queries, k], nearest first; -1 where there are fewer.
        distances: float32[n_queries, k], inf there.
        shards: int32[n_queries, k]: the position of the shard of each, in the order that the shards were given in; -1 there.
        stats: `cotra_rdma._core.stats.STATS_DTYPE`[n_queries]. Over RPC: no reads, `rounds` of messages, expansions and
            cache_hits of the owners where they tell, read_bytes of the messages both ways, the slowest owner's latency_ns.
        transports: for each shard what was used: "rpc", and with `CoTraRdma` "verbs" or "shm".
        elapsed_s: of the whole search, in seconds.
        coverage: answered (query, shard) pairs over those that were asked; a query for which no shard was selected counts as
            one that was not answered. 1.0: the answer is whole.
        outcomes: one for each shard, in the order that the shards were given in.
    """

    ids: _Labels
    distances: _Distances
    shards: npt.NDArray[np.int32]
    stats: npt.NDArray[np.void]
    transports: tuple[str, ...]
    elapsed_s: float
    coverage: float
    outcomes: tuple[ShardOutcome, ...]

    def _with(self, status: ShardStatus) -> tuple[ShardRef, ...]:
        return tuple(outcome.shard for outcome in self.outcomes if outcome.status is status)

    @property
    def answered(self) -> tuple[ShardRef, ...]:
        """The shards whose answers are in it."""
        return self._with(ShardStatus.ANSWERED)

    @property
    def timed_out(self) -> tuple[ShardRef, ...]:
        """The shards that did not answer in time."""
        return self._with(ShardStatus.TIMED_OUT)

    @property
    def failed(self) -> tuple[ShardRef, ...]:
        """The shards that failed in another way; `outcomes` has the reasons."""
        return self._with(ShardStatus.FAILED)

    def require_whole(self) -> None:
        """Raises `PartialResultError` with this result attached, unless everything that was asked was answered."""
        if self.coverage == 1.0:
            return
        bad = [
            (at, outcome)
            for at, outcome in enumerate(self.outcomes)
            if outcome.status in (ShardStatus.TIMED_OUT, ShardStatus.FAILED)
        ]
        what = "; ".join(str(outcome) for _, outcome in bad) or "no shard was selected for some query"
        raise PartialResultError(
            f"a partial answer (coverage {self.coverage:.3f}): {what}", self, shard=bad[0][0] if bad else None
        ) from (bad[0][1].error if bad else None)


@dataclass(slots=True)
class Gathered:
    """What the shards answered, before the merge.

    Attributes:
        shards: in the order that they were given in.
        labels: int64[n_shards, n_queries, k]: each row by distance; -1 where there are fewer, or no answer.
        distances: float32, likewise; inf there.
        stats: `STATS_DTYPE`[n_queries], summed over the shards.
        asked: bool[n_shards, n_queries]: which query went to which shard.
        outcomes: for each shard.
    """

    shards: tuple[ShardRef, ...]
    labels: _Labels
    distances: _Distances
    stats: npt.NDArray[np.void]
    asked: npt.NDArray[np.bool_]
    outcomes: list[ShardOutcome] = field(default_factory=list)

    def coverage(self) -> float:
        """As `SeamResult.coverage`."""
        good = [outcome.status is ShardStatus.ANSWERED for outcome in self.outcomes]
        unasked = int((~self.asked.any(axis=0)).sum())
        total = int(self.asked.sum()) + unasked
        return 1.0 if total == 0 else int(self.asked[good].sum()) / total


class ScatterGather(VectorShardSeam):
    """Flat scatter-gather: the seam's defaults, and the search that goes with them.

    `search` is for asyncio, `search_sync` for everybody else: it runs the same on an event loop in a thread of its own.
    A context manager of both kinds.
    """

    def __init__(
        self,
        shards: Sequence[ShardRef],
        dispatch: ShardRpcDispatch,
        *,
        selector: VectorShardSeam | None = None,
        collection: str = "",
        verify: bool = True,
    ) -> None:
        """Asks nothing yet.

        Args:
            shards: all shards; no two with the same vshard_id.
            dispatch: what carries the requests. It stays the caller's to close.
            selector: the algorithm whose `select_shards` chooses for each query; None: this one's, which takes all.
            collection: goes into every request; "" where owners serve one shard each.
            verify: ask each owner once what it serves (type 56), and have all its answers be of that image. A shard of another
                dim or metric than the others, and one whose owner serves another image by then, has failed. False: for owners
                that know type 50 only; nobody then notices one that comes back with other rows.
        """
        self._shards = tuple(shards)
        self._numbers = [shard.vshard_id for shard in self._shards]
        if not self._shards:
            raise InvalidInputError("scatter-gather needs at least one shard")
        if len(set(self._numbers)) < len(self._numbers):
            raise InvalidInputError("two shards have the same vshard_id")
        self._at = {number: at for at, number in enumerate(self._numbers)}
        self._by_number = np.argsort(self._numbers, kind="stable")
        self._dispatch = dispatch
        self._selector = selector or self
        self._collection = collection
        self._verify = verify
        self._known: dict[int, ShardFields] = {}  # by position
        self._own: GrpcDispatch | None = None
        self._loop = LoopThread("cotra-scatter-gather")

    @classmethod
    def connect(
        cls,
        addresses: Mapping[ShardRef, str] | Sequence[str],
        *,
        tls: Tls | None = None,
        selector: VectorShardSeam | None = None,
    ) -> Self:
        """Over a `GrpcDispatch` of its own, which it closes.

        Args:
            addresses: HOST:PORT of each shard; without `ShardRef`s, they are numbered by position, on node 0.
            tls: this side's certificate, where the owners want one.
            selector: as in the constructor.
        """
        if not isinstance(addresses, Mapping):
            addresses = {ShardRef(0, at): address for at, address in enumerate(addresses)}
        dispatch = GrpcDispatch(
            {(shard.node_id, shard.vshard_id): address for shard, address in addresses.items()}, tls=tls
        )
        made = cls(tuple(addresses), dispatch, selector=selector)
        made._own = dispatch
        return made

    @property
    def shards(self) -> tuple[ShardRef, ...]:
        """All shards, in the order given."""
        return self._shards

    # ---- searching ----

    async def search(
        self,
        queries: npt.ArrayLike,
        k: int = 10,
        ef: int = 64,
        beam: int = DEFAULT_BEAM,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        allow_partial: bool = False,
        filters: Mapping[int, bytes] | None = None,
    ) -> SeamResult:
        """The k nearest vectors of each query over the selected shards, merged by distance, then vshard_id, then id.

        Each shard is asked for k. As long as its ids are distinct, that is enough whatever other shards hold: of the k
        nearest distinct ids, those of one shard are among its own k nearest. An owner that keeps several vectors under one
        id may leave fewer than k distinct ones; then the shards that may have more are asked again for twice as many, up
        to 16 k.

        Args:
            queries: float32[n_queries, dim] or float32[dim].
            k, ef, beam: as `Cluster.search`; k <= ef.
            timeout_s: for the whole search: a shard that has not answered by then has timed out, whatever the dispatch does.
            allow_partial: return what there is, with a `coverage` below 1, when shards fail.
            filters: vshard_id -> bitmap of that shard's rows: bit i (of byte i // 8, lowest first) = row i may be returned.

        Raises:
            PartialResultError: shards failed, and `allow_partial` is False; the partial result is its `result`.
            InvalidInputError: NaN or infinity, k > ef, a filter for a shard that is not there.
        """
        begin = time.perf_counter()
        deadline = begin + timeout_s
        rows = _check(queries, k, ef, beam, timeout_s)
        for number, bitmap in (filters or {}).items():
            if not isinstance(bitmap, bytes | bytearray | memoryview):
                raise InvalidInputError(
                    f"the filter of shard {number} must be a bitmap as bytes (cotra_rdma.pack_filter), "
                    f"not a {type(bitmap).__name__}"
                )
        unknown = set(filters or ()) - set(self._numbers)
        if unknown:
            raise InvalidInputError(f"filters for shards that are not there: {sorted(unknown)}")
        asked = self._select(rows)
        knobs = _Knobs(k, ef, beam, deadline, filters or {}, self._collection)
        gathered = await self._gather(rows, asked, knobs)
        ids, distances, shards = self._merge(gathered, k)
        while (more := _that_may_have_more(gathered, ids)).any() and knobs.k < _MAX_OVERFETCH * k:
            knobs = knobs.doubled()
            gathered = self._widen(gathered, await self._gather(rows, more, knobs), more)
            ids, distances, shards = self._merge(gathered, k)
        result = SeamResult(
            ids,
            distances,
            shards,
            gathered.stats,
            ("rpc",) * len(self._shards),
            time.perf_counter() - begin,
            gathered.coverage(),
            tuple(gathered.outcomes),
        )
        if not allow_partial:
            result.require_whole()
        return result

    def search_sync(
        self,
        queries: npt.ArrayLike,
        k: int = 10,
        ef: int = 64,
        beam: int = DEFAULT_BEAM,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        allow_partial: bool = False,
        filters: Mapping[int, bytes] | None = None,
    ) -> SeamResult:
        """`search`, for callers without an event loop; from many threads at once if they like.

        The dispatch is awaited on this object's own loop, so one that belongs to another loop cannot be used here.
        """
        return self._loop.run(
            self.search(queries, k, ef, beam, timeout_s=timeout_s, allow_partial=allow_partial, filters=filters)
        )

    async def gather(
        self,
        queries: npt.ArrayLike,
        k: int,
        ef: int,
        beam: int = DEFAULT_BEAM,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        filters: Mapping[int, bytes] | None = None,
    ) -> Gathered:
        """The shards' answers as they are, one round and not merged, for algorithms that merge them with others.

        It raises for bad input only: failures are in `outcomes`.
        """
        rows = _check(queries, k, ef, beam, timeout_s)
        knobs = _Knobs(k, ef, beam, time.perf_counter() + timeout_s, filters or {}, self._collection)
        return await self._gather(rows, self._select(rows), knobs)

    def start_gather(
        self,
        queries: npt.ArrayLike,
        k: int,
        ef: int,
        beam: int = DEFAULT_BEAM,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        filters: Mapping[int, bytes] | None = None,
    ) -> Future[Gathered]:
        """`gather` on this object's own loop, for callers without an event loop that do other work meanwhile."""
        return self._loop.submit(self.gather(queries, k, ef, beam, timeout_s=timeout_s, filters=filters))

    def _select(self, rows: _Distances) -> npt.NDArray[np.bool_]:
        """bool[n_shards, n_queries]: which query goes to which shard."""
        asked = np.zeros((len(self._shards), len(rows)), np.bool_)
        for at, row in enumerate(rows):
            for number in self._selector.select_shards(row, self._numbers).resolve(self._numbers):
                asked[self._at[number], at] = True
        return asked

    async def _gather(self, rows: _Distances, asked: npt.NDArray[np.bool_], knobs: _Knobs) -> Gathered:
        shape = (len(self._shards), len(rows), knobs.k)
        gathered = Gathered(
            self._shards,
            np.full(shape, -1, np.int64),
            np.full(shape, np.inf, np.float32),
            np.zeros(len(rows), STATS_DTYPE),
            asked,
        )
        calls = [self._ask(at, rows, np.flatnonzero(asked[at]), knobs, gathered) for at in range(len(self._shards))]
        gathered.outcomes = list(await asyncio.gather(*calls))
        self._refuse_unlike(gathered)
        return gathered

    def _refuse_unlike(self, gathered: Gathered) -> None:
        """Shards of another metric than the first have failed: their distances mean nothing beside its own."""
        if len({known.metric for known in self._known.values()}) < 2:
            return
        first = min(self._known)
        for at, outcome in enumerate(gathered.outcomes):
            if outcome.status is not ShardStatus.ANSWERED or self._known[at].metric == self._known[first].metric:
                continue
            why = InvalidInputError(
                f"{self._shards[at]} has metric {self._known[at].metric}, and {self._shards[first]} has "
                f"{self._known[first].metric}"
            )
            gathered.labels[at], gathered.distances[at] = -1, np.inf
            gathered.outcomes[at] = replace(outcome, status=ShardStatus.FAILED, reason=str(why), error=why)

    def follow(self) -> None:
        """Takes the images that owners serve from the next search on, whatever they served before.

        Filters that were made before are for other rows.
        """
        self._known = {}

    async def _identify(self, at: int, dim: int, knobs: _Knobs) -> ImageIdentity:
        """Which image an owner serves: it is asked once."""
        shard = self._shards[at]
        if at not in self._known:
            request = encode_region(RegionRequest(WANT_CAPABILITIES, secrets.token_hex(8)))
            reply = await self._call(shard, VShardMessageType.VECTOR_MEM_REGION_REQUEST, request, knobs)
            answer = decode_region_response(reply.payload)
            if answer.code:
                raise PeerError(f"{shard}: {answer.message}")
            if answer.shard is None:
                raise FormatError(f"{shard}: its owner does not tell what it serves")
            self._known[at] = answer.shard
        known = self._known[at]
        if known.dim != dim:
            raise InvalidInputError(f"{shard} has dim {known.dim}, and the queries have {dim}")
        if known.identity is None:
            raise FormatError(f"{shard}: its owner is of an earlier version, which does not tell its image from others")
        return known.identity

    async def _call(self, shard: ShardRef, kind: VShardMessageType, payload: bytes, knobs: _Knobs) -> VShardEnvelope:
        envelope = VShardEnvelope(WIRE_VERSION, kind, 0, shard.node_id, shard.vshard_id, payload)
        left_ms = max(1, math.ceil((knobs.deadline - time.perf_counter()) * 1000))
        reply = await self._dispatch.call(envelope, left_ms)
        if reply.msg_type != kind.response:
            raise FormatError(f"{shard} answered type {kind.value} with type {reply.msg_type}")
        return reply

    async def _ask(self, at: int, rows: _Distances, which: _Rows, knobs: _Knobs, into: Gathered) -> ShardOutcome:
        """Asks one shard its queries, and puts the answer where it belongs once all of it is there."""
        shard, n = self._shards[at], len(which)
        if n == 0:
            return ShardOutcome(shard, ShardStatus.NOT_SELECTED, 0)
        begin = time.perf_counter()
        filtered = shard.vshard_id in knobs.filters
        step = queries_per_message(rows.shape[1], knobs.k, knobs.ef, filtered=filtered)
        try:
            async with asyncio.timeout(max(0.0, knobs.deadline - begin)):
                image = await self._identify(at, rows.shape[1], knobs) if self._verify else None
                parts = [
                    await self._ask_part(shard, rows[which[first : first + step]], image, knobs)
                    for first in range(0, n, step)
                ]
        except (Exception, asyncio.CancelledError) as error:  # whatever it was, it is in the outcome
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise  # the search is given up, and not by a dispatch
            late = isinstance(error, TimeoutError)
            told = f"no answer within {max(0.0, knobs.deadline - begin):.3f} s" if late else type(error).__name__
            reason = str(error) or told
            status = ShardStatus.TIMED_OUT if late else ShardStatus.FAILED
            cause = error if isinstance(error, Exception) else None
            return ShardOutcome(shard, status, n, reason, cause, time.perf_counter() - begin)
        into.labels[at, which] = np.concatenate([part[0] for part in parts])
        into.distances[at, which] = np.concatenate([part[1] for part in parts])
        stats = into.stats[which]
        add_stats(stats, np.concatenate([part[2] for part in parts]))
        into.stats[which] = stats
        return ShardOutcome(shard, ShardStatus.ANSWERED, n, elapsed_s=time.perf_counter() - begin)

    async def _ask_part(
        self, shard: ShardRef, rows: _Distances, image: ImageIdentity | None, knobs: _Knobs
    ) -> tuple[_Labels, _Distances, npt.NDArray[np.void]]:
        bitmap = knobs.filters.get(shard.vshard_id)
        request = SearchRequest(knobs.collection, rows, knobs.k, knobs.ef, bitmap, knobs.beam, image=image).encode()
        kind = VShardMessageType.VECTOR_SCATTER_REQUEST
        reply = await self._call(shard, kind, request, knobs)
        answer = SearchResponse.decode(reply.payload)
        if answer.code:
            raise (StaleShardError if answer.code == STALE else PeerError)(f"{shard}: {answer.message}")
        if answer.image != image:
            raise StaleShardError(f"{shard} serves {answer.image}, and was asked about {image}")
        labels, distances, stats = _checked(answer, len(rows), knobs.k, shard)
        # What the owner read in its own memory crossed no wire: this side made one round of one message.
        stats["reads"], stats["rounds"] = 0, 1
        stats["read_bytes"] = (len(request) + reply.payload_len) // len(rows)
        return labels, distances, stats

    def _merge(self, gathered: Gathered, k: int) -> tuple[_Labels, _Distances, npt.NDArray[np.int32]]:
        """By distance, then vshard_id, then label; each label once."""
        labels, distances = gathered.labels[self._by_number], gathered.distances[self._by_number]
        if len(labels) == 1:  # merge trusts one shard alone to have no label twice; an owner elsewhere may
            labels = np.concatenate([labels, np.full_like(labels, -1)])
            distances = np.concatenate([distances, np.full_like(distances, np.inf)])
        ids, near, places = merge(labels, distances)
        shards = np.append(self._by_number, (-1,) * (len(labels) - len(self._by_number) + 1)).astype(np.int32)[places]
        return np.ascontiguousarray(ids[:, :k]), np.ascontiguousarray(near[:, :k]), np.ascontiguousarray(shards[:, :k])

    def _widen(self, old: Gathered, new: Gathered, again: npt.NDArray[np.bool_]) -> Gathered:
        """The old answers, with those of the shards that were asked again in their places."""
        k = old.labels.shape[2]
        labels, distances = np.full_like(new.labels, -1), np.full_like(new.distances, np.inf)
        labels[:, :, :k], distances[:, :, :k] = old.labels, old.distances
        labels[again], distances[again] = new.labels[again], new.distances[again]
        outcomes = list(old.outcomes)
        for at, outcome in enumerate(new.outcomes):
            if outcome.status is ShardStatus.NOT_SELECTED:
                continue
            outcomes[at] = replace(outcome, n_queries=outcomes[at].n_queries)
            if outcome.status is not ShardStatus.ANSWERED:  # a shard that failed has failed for every query
                labels[at], distances[at] = -1, np.inf
        rounds = old.stats["rounds"] + new.stats["rounds"]
        stats = old.stats.copy()
        add_stats(stats, new.stats)
        stats["rounds"] = rounds
        return Gathered(old.shards, labels, distances, stats, old.asked, outcomes)

    # ---- the end ----

    async def aclose(self) -> None:
        """Closes what `connect` opened. For an object that was used through `search_sync`, take `close`."""
        if self._own is not None:
            await self._own.close()

    def close(self) -> None:
        """Closes what `connect` opened, and ends the thread of `search_sync`. Idempotent."""
        self._loop.close(self.aclose())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.aclose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class _Knobs:
    """What a round asks for; `deadline` on `time.perf_counter`'s clock."""

    k: int
    ef: int
    beam: int
    deadline: float
    filters: Mapping[int, bytes]
    collection: str

    def doubled(self) -> _Knobs:
        return _Knobs(2 * self.k, max(self.ef, 2 * self.k), self.beam, self.deadline, self.filters, self.collection)


def _check(queries: npt.ArrayLike, k: int, ef: int, beam: int, timeout_s: float) -> _Distances:
    check_search(k, ef, beam, 0, timeout_s)
    shape = as_array(queries, "queries").shape
    return check_queries(queries, shape[-1] if shape else 0)


def _that_may_have_more(gathered: Gathered, ids: _Labels) -> npt.NDArray[np.bool_]:
    """bool[n_shards, n_queries]: full answers to queries that have fewer than k distinct ids."""
    short: npt.NDArray[np.bool_] = (ids < 0).any(axis=1) & (gathered.labels[:, :, -1] >= 0)
    return short


def _checked(
    answer: SearchResponse, n: int, k: int, shard: ShardRef
) -> tuple[_Labels, _Distances, npt.NDArray[np.void]]:
    """An answer that can be merged: of the right shape, each row sorted, with its empty places at the end."""
    try:
        answer.check(n, k)
        stats = unpack_stats(answer.stats, n) if len(answer.stats) else np.zeros(n, STATS_DTYPE)  # others need not tell
        return answer.labels, np.where(answer.labels < 0, np.float32(np.inf), answer.distances), stats
    except FormatError as error:
        raise FormatError(f"{shard}: {error}") from None


def add_stats(total: npt.NDArray[np.void], stats: npt.NDArray[np.void]) -> None:
    """Adds one shard's figures to those of others that worked at the same time: rounds and latency_ns are the largest."""
    for name in COUNTS:
        total[name] += stats[name]
    for name in ("rounds", "latency_ns"):
        total[name] = np.maximum(total[name], stats[name])
