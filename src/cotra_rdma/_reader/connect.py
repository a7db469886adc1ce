"""`connect`: makes a `Cluster` from the addresses of owners."""

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
from cotra_rdma.errors import InvalidInputError
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
        addresses: the owners of each shard, in the order that numbers the shards. For each shard, it is one of these:

            - HOST:PORT of its owner.
            - A `Shard` that this process holds, or a `Server` of it. Its records are used in place, without READs.
            - A sequence of these, whose owners hold the same image. The nearest is used. Another takes over if it fails.

            A path in place of all this stands for the collection there. `owners.json` in it names the owners, as
            `cotra serve` writes it. The shard files need not be there.
        transport: "verbs", "shm" or "rpc" allows this path only. "auto" chooses for each shard: verbs, else shm on the same
            host, else rpc. `Cluster.transports` and `Cluster.passed_over` say what was chosen and why.
        device: the name of this side's RDMA device. None takes the first active one.
        gid_index: the index of this side's GID. None takes the GID that ranks best for each owner.
        tls: this reader's certificate, and the authority that it trusts. None if the owners want no certificate.
        timeout_s: the time-out in seconds of each call to an owner that is not a search.
        fabric: a model that delays every one-sided READ, for measurements. None adds nothing.
        queue_pair: options of this side's queue pairs, such as time-outs.
        cache_bytes: the most bytes of records that the cluster keeps, beside headers and upper layers. It keeps the records
            that its walks read most often. All threads share them, and each shard has a part by its size. The cache changes
            how much is read, never an answer. It is of no use over shm, where a READ is a pointer. 0 keeps none.
        halo: for a process that holds shards of one graph. It is the size of a cache, as a share of the bytes of these
            shards' images. The cache is filled at once, with the records of other shards that these shards link to most.
            It takes the place of `cache_bytes`.
        allow_partial: whether to go on without a shard if none of its owners can be reached. One shard has to be reached.
        collection: the collection of these shards, in its order. Owners of another generation are then not used. None checks
            only that the shards go together. For a path, it is the collection there.
        follow: what a search does if owners serve other images than at this call, after a rebuild. True connects to them and
            searches them, as `Cluster.follow` does. False raises `StaleShardError`.
        tracing: whether to make a span of OpenTelemetry for each search, and for each call to an owner in it. Owners are told
            which span calls. The process sets the tracer provider. Without one, nothing is recorded.

    Returns:
        The cluster. Close it, or use it as a context manager.

    Raises:
        TransportError: a shard cannot be reached.
        VerbsUnavailableError: "verbs" was asked for and cannot be had. The message says why.
        InvalidInputError: an argument is out of its range, shards differ in dimension or metric, owners of one shard hold
            different images, or a shard's part of `cache_bytes` holds no record. Or `tracing` is true, and the package
            `opentelemetry-api` is missing.
        FormatError: an owner's answer, an image or a file of the collection is malformed.
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
    """Returns the owners of each shard, and their collection if it is known. A path is read again at each call."""
    if isinstance(addresses, os.PathLike):
        collection = Collection.load(collection_directory(addresses), shard_files=False)
        addresses = addresses_of(addresses)
    elif isinstance(addresses, str) or not isinstance(addresses, Sequence):
        addresses = [addresses]
    return [list(of) if isinstance(of, Sequence) and not isinstance(of, str) else [of] for of in addresses], collection
