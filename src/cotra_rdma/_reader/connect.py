"""`connect`: from addresses to a cluster."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import partial

from cotra_rdma._collection.manifest import Collection, collection_directory
from cotra_rdma._collection.owners_file import addresses_of, misfit
from cotra_rdma._core.query_checks import check_timeout
from cotra_rdma._core.tracing import tracing_of
from cotra_rdma._native.channel import DEFAULT_TIMEOUT_S, FabricModel
from cotra_rdma._native.verbs import QueuePairOptions
from cotra_rdma._reader.cluster import Cluster
from cotra_rdma._reader.connector import Connector
from cotra_rdma._reader.replicas import Owner
from cotra_rdma._reader.session import Session, SessionHooks
from cotra_rdma.errors import (
    InvalidInputError,
)
from cotra_rdma.protocol.tls import Tls

TRANSPORTS = ("auto", "verbs", "shm", "rpc")


def connect(
    addresses: Owner | os.PathLike[str] | Sequence[Owner | Sequence[Owner]],
    transport: str = "auto",
    *,
    device: str | None = None,
    gid_index: int | None = None,
    tls: Tls | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    fabric: FabricModel | None = None,
    queue_pair: QueuePairOptions | None = None,
    cache_bytes: int = 0,
    halo: float = 0.0,
    allow_partial: bool = False,
    collection: Collection | None = None,
    follow: bool = True,
    tracing: bool = False,
) -> Cluster:
    """Connects to the owners of shards, and reads each shard's header and upper layers once.

    Args:
        addresses: for each shard the HOST:PORT of its server, or several of them, whose owners hold the same image: the nearest
            is used, and another takes over where it fails. Their order numbers the shards. In place of an address, a `Shard`
            that this process holds, or a `Server` of it: its records are used in place, without READs. A path: the shards of
            the collection there, whose owners its `owners.json` names (`cotra serve`); the files themselves need not be there.
        transport: "auto" takes verbs, else shm on the same host, else rpc, for each shard by itself; which, and why not a
            better one, is in `Cluster.transports` and `Cluster.passed_over`, and logged once. A name is binding.
        device, gid_index: of verbs on this side; None for the first active device and the GID that ranks best.
        tls: this reader's certificate, and whom it believes; None where the owners want none.
        timeout_s: for each call of the control plane.
        fabric: adds a modelled fabric to every one-sided READ.
        queue_pair: options of the queue pairs, time-outs say.
        cache_bytes: a bound for the memory in which the cluster keeps records that its walks read most often, beside
            headers and upper layers; 0 keeps none. All threads share it; each shard that is read has a part, by its size.
            It changes how much is read, and no answer. Of no use over shm, where a READ is a pointer.
        halo: where this process holds shards of one graph: records of the other shards that they link to most are read now and
            kept in a cache, so that walks near the border stay at home; as a share of the bytes of the own images.
        allow_partial: go on without shards that no owner can be reached of, as long as there is one.
        collection: whose shards these are, in its order: owners of another generation are not used. None: nothing is checked
            but what shards must have alike; for a path it is the collection there.
        follow: what a search does where owners serve other images than at this call, for their shards were built again. True: it
            connects to those, and searches them (`Cluster.follow`). False: it raises `StaleShardError`.
        tracing: make a span of OpenTelemetry of each search, and of each call of an owner in it. The process sets the tracer
            provider; without one nothing is recorded. Owners are told which span asks.

    Raises:
        TransportError: a shard cannot be reached.
        VerbsUnavailableError: verbs was asked for and cannot be had; the message says why.
        InvalidInputError: shards differ in dim or metric, owners of one shard hold different images, or a shard's part of
            `cache_bytes` holds no record. Or `tracing` was asked for, and the package `opentelemetry-api` is missing.
    """
    check_timeout(timeout_s)
    if cache_bytes < 0:
        raise InvalidInputError(f"cache_bytes must be 0 or more, not {cache_bytes}")
    if not 0 <= halo < math.inf:
        raise InvalidInputError(f"halo must be a share, 0 or more, not {halo}")
    if halo and cache_bytes:
        raise InvalidInputError("halo is a cache: it takes the place of cache_bytes")
    if transport not in TRANSPORTS:
        raise InvalidInputError(f"transport must be one of {', '.join(TRANSPORTS)}, not {transport!r}")
    connector = Connector(
        transport, device, gid_index, tls, timeout_s, fabric, queue_pair or QueuePairOptions(), tracing_of(tracing)
    )

    def connect_now(hooks: SessionHooks) -> Session:
        owners, shards = _owners_of(addresses, collection)
        if not any(owners) or not (allow_partial or all(owners)):
            empty = [at for at, of in enumerate(owners) if not of]
            raise InvalidInputError(f"connect needs at least one address for each shard; without: {empty or 'all'}")
        if shards is not None and len(owners) != len(shards.shards):
            raise InvalidInputError(f"owners of {len(owners)} shards, and the collection has {len(shards.shards)}")
        fits = None if shards is None else partial(misfit, shards)
        return Session(owners, connector, fits, hooks, cache_bytes, halo, allow_partial=allow_partial)

    return Cluster(connect_now, connector, follow=follow)


def _owners_of(
    addresses: Owner | os.PathLike[str] | Sequence[Owner | Sequence[Owner]], collection: Collection | None
) -> tuple[list[list[Owner]], Collection | None]:
    """The owners of each shard, and the collection that they are of. A path is read anew each time."""
    if isinstance(addresses, os.PathLike):
        collection = Collection.load(collection_directory(addresses), shard_files=False)
        addresses = addresses_of(addresses)
    elif isinstance(addresses, str) or not isinstance(addresses, Sequence):
        addresses = [addresses]
    return [list(of) if isinstance(of, Sequence) and not isinstance(of, str) else [of] for of in addresses], collection
