"""`ClusterMetrics`: what a cluster has done since `connect`, and how its owners stand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from cotra_rdma._core.image_identity import ImageIdentity
from cotra_rdma._core.request_counts import Latencies
from cotra_rdma._reader.counters import SEARCH, Counters, OwnerCounts
from cotra_rdma._reader.replicas import Replicas


@dataclass(frozen=True, slots=True)
class OwnerMetrics:
    """One owner of one shard, as a reader sees it. Counts are since `connect`, over all connections to this address.

    Attributes:
        shard: the position of the shard.
        address: HOST:PORT; "own" for a shard that this process holds and does not serve.
        state: "in use", "standby" (it takes over where the one in use fails), or "away" (it failed, or was never reached; it is
            tried again every 5 s).
        path: how it is reached: "own" memory, "verbs", "shm" or "rpc"; "" where none is chosen.
        since: the Unix time since when it is connected to, or away, in seconds.
        error: why it is away; "" if it is not.
        image: lineage, generation and checksum of what it served last; None if it was never reached.
        connections: RPC connections that were opened. One more than 1 is a reconnect, or was made to follow it to another image.
        resent: calls that it refused unread, for it had too many of this connection, and that were sent again.
        renewed, not_renewed: renewals of the lease, and those that failed.
        replaced: how often it failed and another owner took its place.
        failures: how often a search could not go on over it, by the class of the error: `CompletionError` is a READ that
            failed, `ChecksumError` a torn or corrupt record, `StaleShardError` a record of another image. A search counts
            once for each of its threads.
        calls: over RPC: message type -> how they ended -> number. "ok", or the class of the error: `BusyError`,
            `StaleShardError`, `DeadlineError`...
        call_latencies: how long those took, by message type.
    """

    shard: int
    address: str
    state: str
    path: str
    since: float
    error: str
    image: ImageIdentity | None
    connections: int
    resent: int
    renewed: int
    not_renewed: int
    replaced: int
    failures: Mapping[str, int]
    calls: Mapping[str, Mapping[str, int]]
    call_latencies: Mapping[str, Latencies]


@dataclass(frozen=True, slots=True)
class ClusterMetrics:
    """What a cluster has done since `connect`, and how its owners stand: a snapshot, made by `Cluster.metrics`.

    Attributes:
        since: the Unix time of `connect`, in seconds.
        searches: calls of `search`, `knn_query` and `walk`, by how they ended: "ok", "partial" (shards are missing), or the class
            of the error that was raised.
        queries: the same of their queries. Of arguments that were refused, none.
        search_latencies: how long the searches took.
        stats: the sum of each field of `SearchResult.stats` over all queries: reads, rounds, read_bytes, pushed and so on.
            Of a search that raised, only what a `PartialResultError` has.
        followed: how often the cluster went on to other images.
        lost: the shards without an owner, and why.
        owners: in the order of the shards.
    """

    since: float
    searches: Mapping[str, int]
    queries: Mapping[str, int]
    search_latencies: Latencies
    stats: Mapping[str, int]
    followed: int
    lost: Mapping[int, str]
    owners: tuple[OwnerMetrics, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns the same as dicts, lists, numbers and text, as JSON has them. Lineages and checksums are hexadecimal."""
        plain: dict[str, Any] = _plain(self)
        return plain


def metrics_of(counters: Counters, replicas: Replicas) -> ClusterMetrics:
    """Makes a snapshot."""
    return ClusterMetrics(
        since=counters.since,
        searches=counters.searches.by_kind().get(SEARCH, {}),
        queries=counters.queries(),
        search_latencies=counters.searches.latencies().get(SEARCH, Latencies()),
        stats=counters.stats(),
        followed=counters.n_followed,
        lost={shard: str(error) for shard, error in sorted(replicas.lost.items())},
        owners=tuple(
            _owner_metrics(counters.of(shard, address), shard, address, state, path)
            for shard, address, state, path in replicas.all_owners()
        ),
    )


def _owner_metrics(counts: OwnerCounts, shard: int, address: str, state: str, path: str) -> OwnerMetrics:
    events, failures = counts.snapshot()
    return OwnerMetrics(
        shard=shard,
        address=address,
        state=state,
        path=path,
        since=counts.since,
        error=counts.error,
        image=counts.image,
        connections=events["connections"],
        resent=events["resent"],
        renewed=events["renewed"],
        not_renewed=events["not renewed"],
        replaced=events["replaced"],
        failures=failures,
        calls=counts.calls.by_kind(),
        call_latencies=counts.calls.latencies(),
    )


def _plain(value: Any) -> Any:
    """A value of a snapshot as JSON has it."""
    if isinstance(value, ImageIdentity):
        return {
            "lineage": f"{value.lineage:016x}",
            "generation": value.generation,
            "checksum": f"{value.checksum:016x}",
        }
    if isinstance(value, Latencies):
        return {"counts": list(value.counts), "total_s": value.total_s}
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return {each.name: _plain(getattr(value, each.name)) for each in fields(value)} if is_dataclass(value) else value
