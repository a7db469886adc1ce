"""Searches of inverted lists: `IvfTable` describes the lists of a shard, and `SpireEngine` searches those of several.

A query takes two rounds of READs, whatever the size of the collection (SPIRE).
The first round reads the residual codes of the nearest lists over all shards.
The second reads the exact vectors of the best candidates.
The codes are RaBitQ codes (Gao and Long, SIGMOD 2024).
They have several bits a dimension, as in Gao, Gou, Xu, Yang, Long and Wong, SIGMOD 2025.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from cotra_rdma._core.constants import VECTOR_TYPES
from cotra_rdma._core.query_checks import MAX_EF, MAX_INFLIGHT, check_rows, check_timeout, check_whole
from cotra_rdma._core.stop import Stop
from cotra_rdma._native.channel import DEFAULT_TIMEOUT_S, Channel
from cotra_rdma._native.library import Handle, check, ffi, lib, new_error
from cotra_rdma._native.search_call import PAUSE_NS, end_by, pause_ns, search_scope
from cotra_rdma._native.view import View
from cotra_rdma.errors import InvalidInputError

if TYPE_CHECKING:
    from cotra_rdma._native.arena import Arena

SPIRE_STATS_DTYPE = np.dtype(
    [
        ("reads", "<u4"),
        ("rounds", "<u4"),
        ("lists", "<u4"),
        ("reranked", "<u4"),
        ("estimated", "<u8"),
        ("allowed", "<u8"),
        ("list_bytes", "<u8"),
        ("read_bytes", "<u8"),
        ("latency_ns", "<u8"),
    ]
)
MAX_BITS, MAX_LISTS, MAX_PROBE = 8, 2**20, 2**32 - 1


@dataclass(frozen=True, slots=True)
class IvfInfo:
    """The description of a section of inverted lists.

    Attributes:
        entries: the rows in all lists. Deleted rows are in no list.
        table_bytes: the bytes that a reader copies once and keeps: header, centroids and sizes.
        list_bytes: the bytes of all lists.
        n_lists: the number of lists.
        bits: the bits a dimension of a code.
        code_dim: the dimensions of a code.
        block_bytes: the bytes of 32 entries. A channel's slots must hold a block.
        centroid_type: "float16", or "float32" if float16 is too coarse.
        longest: the entries of the longest list.
    """

    entries: int
    table_bytes: int
    list_bytes: int
    n_lists: int
    bits: int
    code_dim: int
    block_bytes: int
    centroid_type: str
    longest: int

    @classmethod
    def from_c(cls, raw: Any) -> Self:
        """Converts a `cotra_ivf_info *`."""
        return cls(
            entries=raw.entries,
            table_bytes=raw.table_bytes,
            list_bytes=raw.list_bytes,
            n_lists=raw.n_lists,
            bits=raw.bits,
            code_dim=raw.code_dim,
            block_bytes=raw.block_bytes,
            centroid_type=VECTOR_TYPES[raw.centroid_type],
            longest=raw.longest,
        )

    @classmethod
    def of_arena(cls, arena: Arena) -> Self | None:
        """Describes the inverted lists of the image in an arena.

        Returns:
            The description, or None if the image has no lists.

        Raises:
            FormatError: the image is malformed.
        """
        raw, err, memory = ffi.new("cotra_ivf_info *"), new_error(), arena.info
        check(lib.cotra_ivf_get_info(ffi.cast("void *", memory.addr), memory.len, raw, err), err)
        return cls.from_c(raw) if raw.n_lists else None


class IvfTable(Handle):
    """The list table of one shard: centroids, sizes, radii, errors, and where each list is.

    A reader reads it once and validates it.
    It is read-only afterwards, so engines of several threads may share it.
    """

    @classmethod
    def open(cls, channel: Channel, view: View, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> Self:
        """Reads and validates the table of the shard that `view` was opened on.

        Args:
            channel: READs the shard's region.
            view: the shard's view.
            timeout_s: the longest wait for one READ, in seconds.

        Raises:
            InvalidInputError: the shard has no inverted lists.
            FormatError: the table is malformed.
            ChecksumError: the checksum of the table is wrong.
            TransportError: a READ failed.
        """
        timeout_ns = round(timeout_s * 1e9)
        return cls._made(lambda out, err: lib.cotra_ivf_table_open(channel.ptr, view.ptr, timeout_ns, out, err))

    @classmethod
    def _made(cls, call: Any) -> Self:
        out, err = ffi.new("cotra_ivf_table **"), new_error()
        check(call(out, err), err)
        return cls(out[0])

    def _destroy(self, ptr: Any) -> None:
        lib.cotra_ivf_table_close(ptr)

    @property
    def info(self) -> IvfInfo:
        """Counts and sizes."""
        raw = ffi.new("cotra_ivf_info *")
        lib.cotra_ivf_table_get_info(self.ptr, raw)
        return IvfInfo.from_c(raw)

    @property
    def centroids(self) -> npt.NDArray[np.float32]:
        """The centroids as stored, float32[n_lists, dim]. Codes are relative to these."""
        dim: int = lib.cotra_ivf_table_get_dim(self.ptr)
        return self._column(0, np.float32, "float[]", dim)

    @property
    def sizes(self) -> npt.NDArray[np.uint32]:
        """The number of entries of each list, uint32[n_lists]."""
        return self._column(1, np.uint32, "uint32_t[]")

    @property
    def radii(self) -> npt.NDArray[np.float32]:
        """The root mean square l2 distance (not squared) of each list's rows to its centroid, float32[n_lists]."""
        return self._column(2, np.float32, "float[]")

    @property
    def errors(self) -> npt.NDArray[np.float32]:
        """The standard deviation of an estimate of <x - c, u> in each list, float32[n_lists].

        x is a row of the list, c is its centroid and u is a unit vector.
        """
        return self._column(3, np.float32, "float[]")

    @property
    def offsets(self) -> npt.NDArray[np.uint64]:
        """Where each list begins in the region, in bytes: uint64[n_lists]."""
        return self._column(4, np.uint64, "uint64_t[]")

    def _column(self, place: int, dtype: type[Any], kind: str, *width: int) -> npt.NDArray[Any]:
        out = np.empty((self.info.n_lists, *width), dtype)
        columns = [ffi.NULL] * 5
        columns[place] = ffi.from_buffer(kind, out)
        lib.cotra_ivf_table_get_lists(self.ptr, *columns)
        return out


class SpireEngine(Handle):
    """One thread's searcher of the inverted lists of n shards.

    `tables[i]` and `views[i]` are read through `channels[i]`.
    Threads must not share an engine.
    """

    @classmethod
    def create(
        cls,
        views: Sequence[View],
        tables: Sequence[IvfTable],
        channels: Sequence[Channel],
        *,
        simd: int | None = None,
    ) -> Self:
        """Makes an engine.

        Args:
            views: one for each shard. All must agree on dimension and metric.
            tables: one for each shard.
            channels: one for each shard.
            simd: a COTRA_SIMD_* level; None for the best that the CPU has.

        Raises:
            InvalidInputError: the parts do not fit each other, or a channel's slots cannot hold a block of codes.
        """
        if not len(views) == len(tables) == len(channels) or not views:
            raise InvalidInputError("an engine needs one table and one channel for each view, and at least one")
        out, err = ffi.new("cotra_spire **"), new_error()
        level = lib.cotra_simd_best() if simd is None else simd
        raw_views = ffi.new("cotra_view *[]", [view.ptr for view in views])
        raw_tables = ffi.new("cotra_ivf_table *[]", [table.ptr for table in tables])
        raw_channels = ffi.new("cotra_channel *[]", [channel.ptr for channel in channels])
        check(lib.cotra_spire_create(raw_views, raw_tables, raw_channels, len(views), level, out, err), err)
        engine = cls(out[0], *views, *tables, *channels)
        engine._n_shards = len(views)
        engine._dim = views[0].info.dim
        return engine

    _n_shards: int
    _dim: int

    def _destroy(self, ptr: Any) -> None:
        lib.cotra_spire_destroy(ptr)

    def search(
        self,
        queries: npt.NDArray[np.float32],
        k: int,
        n_probe: int,
        n_rerank: int = 0,
        *,
        inflight: int = 0,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        filters: Sequence[bytes | None] | None = None,
        mask: npt.NDArray[np.bool_] | None = None,
        deadline: float = math.inf,
        stop: Stop | None = None,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.int32], npt.NDArray[np.void]]:
        """Searches all shards for every query, in two rounds of READs. The GIL is released.

        After an error, the engine and its channels must not be used again.

        Args:
            queries: float32[n_queries, dim].
            k: the number of answers.
            n_probe: how many lists a query reads. They are the nearest over all shards. A larger number than there are
                lists means all of them.
            n_rerank: how many vectors a query then reads, at least k. 0 takes as many as the estimates' error asks for.
            inflight: queries in progress at once; 0 to choose it from the channels.
            timeout_s: the longest wait for one READ, in seconds.
            filters: for each shard None, or a bitmap as `pack_filter` makes it.
            mask: bool[n_queries, n_shards], the shards that each query asks.
            deadline: as for `Engine.search`.
            stop: as for `Engine.search`.

        Returns:
            Labels, exact distances, positions of shards, and stats.
            Labels are int64[n_queries, k], with -1 where there are fewer answers.
            Distances are float32[n_queries, k], with inf there.
            The position of each answer's shard is int32[n_queries, k], with -1 there.
            Each row is sorted by distance, then shard, then label, and holds a label once.
            Stats are `SPIRE_STATS_DTYPE`[n_queries].

        Raises:
            InvalidInputError: a shape is wrong, k or n_rerank is out of range, or a filter is too short.
            ChecksumError: the bytes that were READ are torn or corrupt. `shard` says whose they are.
            StaleShardError: the shard was built again. `shard` says which.
            TransportError: a READ failed. `shard` says whose.
            DeadlineError: a READ, or the whole search, took too long.
        """
        n = len(queries)
        queries = check_rows(queries, self._dim)
        _check_search(k, n_probe, n_rerank, inflight, timeout_s)
        params = ffi.new("cotra_spire_params *", (k, n_probe, n_rerank, inflight, round(timeout_s * 1e9), 0, PAUSE_NS))
        _held = end_by(params, deadline, stop)
        scope, _held_too = search_scope(filters, mask, n, self._n_shards)
        labels, shards = np.empty((n, k), np.int64), np.empty((n, k), np.int32)
        distances = np.empty((n, k), np.float32)
        stats = np.zeros(n, SPIRE_STATS_DTYPE)
        err = new_error()
        status = lib.cotra_spire_search(
            self.ptr,
            ffi.from_buffer("float[]", queries),
            n,
            params,
            scope,
            ffi.from_buffer("int64_t[]", labels),
            ffi.from_buffer("float[]", distances),
            ffi.from_buffer("int32_t[]", shards),
            ffi.cast("cotra_spire_stats *", ffi.from_buffer(stats)),
            err,
        )
        while status == lib.COTRA_PAUSED:
            status = lib.cotra_spire_resume(self.ptr, pause_ns(stop), err)
        check(status, err)
        return labels, distances, shards, stats


def _check_search(k: int, n_probe: int, n_rerank: int, inflight: int, timeout_s: float) -> None:
    for name, value, low, high in (
        ("k", k, 1, MAX_EF),
        ("n_probe", n_probe, 1, MAX_PROBE),
        ("n_rerank", n_rerank, k if n_rerank else 0, MAX_EF),
        ("inflight", inflight, 0, MAX_INFLIGHT),
    ):
        check_whole(name, value, low, high)
    check_timeout(timeout_s)
