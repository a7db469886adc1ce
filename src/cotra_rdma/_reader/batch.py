"""`Batch`: queries and how to answer them, as a cluster hands them to its engines and connections."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cotra_rdma._core.query_checks import check_most, check_queries, check_search, pack_filter
from cotra_rdma._core.stop import Progress, Stop
from cotra_rdma._native.channel import DEFAULT_TIMEOUT_S
from cotra_rdma.errors import DeadlineError, InvalidInputError

Answer = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.void]]
"""Labels int64[n_shards, n_queries, k], distances float32 likewise, and one `STATS_DTYPE` record for each query.

The first dimension is missing from the answer of one shard."""


class OutOfTimeError(DeadlineError):
    """The search reached its deadline, and no owner is to blame."""

    def __init__(self) -> None:
        super().__init__("the search did not end by its deadline")


class CollectionAnswer(NamedTuple):
    """The answer of a peer that searched the whole collection, merged over the shards.

    Attributes:
        labels: int64[n_queries, k], -1 in empty places. distances: float32 likewise, inf there.
        shards: int32[n_queries, k]: the place in `images` of the shard of each; -1 there.
        images: the checksums of the shards' images, which name them: the peer numbers them as it likes.
        stats: `STATS_DTYPE`[n_queries]: the peer's, but for latency_ns, which is this side's.
        failures: the places in `images` of shards that did not answer, and why.
    """

    labels: npt.NDArray[np.int64]
    distances: npt.NDArray[np.float32]
    shards: npt.NDArray[np.int32]
    images: tuple[int, ...]
    stats: npt.NDArray[np.void]
    failures: dict[int, str]


class Batch(NamedTuple):
    """A batch of queries.

    Attributes:
        queries: float32[n_queries, dim], checked.
        k, ef, beam: answers, how far to look and expansions a round at most.
        inflight: queries in progress at once in each thread; 0: chosen for the transport.
        timeout_s: the longest wait for one READ, or for an owner's answer, in seconds.
        stop: ends the search before its time.
        filters: for each shard None or a bitmap; None: no filter anywhere.
        mask: bool[n_queries, n_shards]: which shards each query is for; None: all.
        deadline: of the whole search, on `time.monotonic`'s clock.
        most: records that a walk expands at most; None: as many as it takes.
    """

    queries: npt.NDArray[np.float32]
    k: int
    ef: int
    beam: int
    inflight: int
    timeout_s: float
    stop: Stop
    filters: tuple[bytes | None, ...] | None = None
    mask: npt.NDArray[np.bool_] | None = None
    deadline: float = math.inf
    most: int | None = None

    def with_a_spare(self) -> Batch:
        """Returns the batch with half of its time for one wait.

        The other half is for another owner, or for going on without the shard.
        """
        return self if self.deadline == math.inf else self._replace(timeout_s=self.timeout_s / 2)

    def wait_s(self) -> float:
        """Returns how long to wait for an owner's answer that is asked for now, in seconds."""
        if self.deadline == math.inf:
            return self.timeout_s
        return max(min(self.timeout_s, self.deadline - time.monotonic()), 0.001)

    def is_cut_short(self, wait_s: float) -> bool:
        """Whether a wait that ended without an answer was so short that the owner is not to blame. `wait_s` is its length."""
        return wait_s < self.timeout_s / 2

    def of_shards(self, shards: Sequence[int]) -> Batch:
        """Returns the batch for some of the shards, which are numbered in this order in it."""
        if self.filters is None and self.mask is None:
            return self
        filters = None if self.filters is None else tuple(self.filters[shard] for shard in shards)
        return self._replace(filters=filters, mask=None if self.mask is None else self.mask[:, list(shards)])

    def split(self, n_parts: int) -> list[Batch]:
        """Splits the batch into parts of about the same number of queries."""
        masks = [None] * n_parts if self.mask is None else np.array_split(self.mask, n_parts)
        queries = np.array_split(self.queries, n_parts)
        return [self._replace(queries=part, mask=mask) for part, mask in zip(queries, masks, strict=True)]


def make_batch(
    queries: npt.ArrayLike,
    dim: int,
    counts: Sequence[int],
    *,
    k: int,
    ef: int,
    beam: int,
    stop: Stop,
    inflight: int = 0,
    timeout_s: float | None = None,
    filters: Sequence[npt.ArrayLike | bytes | None] | None = None,
    shards: npt.ArrayLike | None = None,
    max_expansions: int | None = None,
    progress: Progress | None = None,
) -> Batch:
    """Checks the arguments of `Cluster.search`, and starts the clock of the search.

    Args:
        dim: of the shards' vectors.
        counts: the number of rows of each shard.

    The other arguments are those of `Cluster.search`.

    Raises `InvalidInputError`.
    """
    deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
    rows, n_shards = check_queries(queries, dim), len(counts)
    check_search(k, ef, beam, inflight, timeout_s)
    check_most(max_expansions)
    packed = None
    if filters is not None:
        if len(filters) != n_shards:
            raise InvalidInputError(f"{len(filters)} filters for {n_shards} shards")
        packed = tuple(pack_filter(bits, count) for bits, count in zip(filters, counts, strict=True))
    mask = None
    if shards is not None:
        mask = np.asarray(shards)
        if mask.dtype != np.bool_ or mask.shape != (len(rows), n_shards):
            raise InvalidInputError(f"shards must be bool[{len(rows)}, {n_shards}], not {mask.dtype}{list(mask.shape)}")
    stop.begin(len(rows), progress)
    wait_s = DEFAULT_TIMEOUT_S if timeout_s is None else timeout_s
    return Batch(rows, k, ef, beam, inflight, wait_s, stop, packed, mask, deadline, max_expansions)
