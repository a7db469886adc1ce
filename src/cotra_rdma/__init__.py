"""Searches vectors in the memory of other processes. HNSW graphs are walked by one-sided RDMA READs.

Without RDMA, the same calls read shared memory, or ask owners over RPC.

A name without an underscore is public.
That holds here, and in `cotra_rdma.lowlevel`, `cotra_rdma.datasets`, `cotra_rdma.errors`, `cotra_rdma.protocol` and
`cotra_rdma.seam`.
Packages whose names begin with an underscore may change in any release.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cotra_rdma._build.collection import build_collection
    from cotra_rdma._build.machine import build_on_machine
    from cotra_rdma._collection.manifest import Collection
    from cotra_rdma._core.memory_region import MemoryRegion
    from cotra_rdma._core.query_checks import pack_filter
    from cotra_rdma._core.stop import Stop
    from cotra_rdma._native.arena import Arena
    from cotra_rdma._native.channel import FabricModel
    from cotra_rdma._native.verbs import QueuePairOptions, register
    from cotra_rdma._owner.child_process import OwnerProcess
    from cotra_rdma._owner.peering import Peering
    from cotra_rdma._owner.server import Server, serve
    from cotra_rdma._reader.cluster import Cluster
    from cotra_rdma._reader.connect import connect
    from cotra_rdma._reader.exporter import register_metrics
    from cotra_rdma._reader.metrics import ClusterMetrics, OwnerMetrics
    from cotra_rdma._reader.result import SearchResult
    from cotra_rdma._shard.shard import Shard
    from cotra_rdma.datasets import open_vectors
    from cotra_rdma.errors import (
        BoundsError,
        BusyError,
        ChecksumError,
        ClosedError,
        CompletionError,
        CotraError,
        DeadlineError,
        DeniedError,
        DeviceNotFoundError,
        FormatError,
        InvalidInputError,
        LossyVectorError,
        MemlockError,
        PartialResultError,
        PeerError,
        SearchCancelledError,
        StaleShardError,
        TransportError,
        VerbsUnavailableError,
    )
    from cotra_rdma.protocol.tls import Tls
    from cotra_rdma.seam.compass import Compass
    from cotra_rdma.seam.grpc_dispatch import GrpcDispatch
    from cotra_rdma.seam.interface import VectorShardSeam
    from cotra_rdma.seam.one_sided import CoTraRdma
    from cotra_rdma.seam.scatter_gather import ScatterGather, SeamResult, ShardOutcome, ShardStatus
    from cotra_rdma.seam.spire import Spire

    __version__: str

__all__ = [
    "Arena",
    "BoundsError",
    "BusyError",
    "ChecksumError",
    "ClosedError",
    "Cluster",
    "ClusterMetrics",
    "CoTraRdma",
    "Collection",
    "Compass",
    "CompletionError",
    "CotraError",
    "DeadlineError",
    "DeniedError",
    "DeviceNotFoundError",
    "FabricModel",
    "FormatError",
    "GrpcDispatch",
    "InvalidInputError",
    "LossyVectorError",
    "MemlockError",
    "MemoryRegion",
    "OwnerMetrics",
    "OwnerProcess",
    "PartialResultError",
    "PeerError",
    "Peering",
    "QueuePairOptions",
    "ScatterGather",
    "SeamResult",
    "SearchCancelledError",
    "SearchResult",
    "Server",
    "Shard",
    "ShardOutcome",
    "ShardStatus",
    "Spire",
    "StaleShardError",
    "Stop",
    "Tls",
    "TransportError",
    "VectorShardSeam",
    "VerbsUnavailableError",
    "build_collection",
    "build_on_machine",
    "connect",
    "open_vectors",
    "pack_filter",
    "register",
    "register_metrics",
    "serve",
]

# Each name is imported when it is first used, so that a program pays only for what it needs.
_HOMES = {
    "_build.collection": ("build_collection",),
    "_build.machine": ("build_on_machine",),
    "_collection.manifest": ("Collection",),
    "_core.memory_region": ("MemoryRegion",),
    "_core.query_checks": ("pack_filter",),
    "_core.stop": ("Stop",),
    "_native.arena": ("Arena",),
    "_native.channel": ("FabricModel",),
    "_native.verbs": ("QueuePairOptions", "register"),
    "_owner.child_process": ("OwnerProcess",),
    "_owner.peering": ("Peering",),
    "_owner.server": ("Server", "serve"),
    "_reader.cluster": ("Cluster",),
    "_reader.connect": ("connect",),
    "_reader.exporter": ("register_metrics",),
    "_reader.metrics": ("ClusterMetrics", "OwnerMetrics"),
    "_reader.result": ("SearchResult",),
    "_shard.shard": ("Shard",),
    "datasets": ("open_vectors",),
    "errors": (
        "BoundsError",
        "BusyError",
        "ChecksumError",
        "ClosedError",
        "CompletionError",
        "CotraError",
        "DeadlineError",
        "DeniedError",
        "DeviceNotFoundError",
        "FormatError",
        "InvalidInputError",
        "LossyVectorError",
        "MemlockError",
        "PartialResultError",
        "PeerError",
        "SearchCancelledError",
        "StaleShardError",
        "TransportError",
        "VerbsUnavailableError",
    ),
    "protocol.tls": ("Tls",),
    "seam.compass": ("Compass",),
    "seam.interface": ("VectorShardSeam",),
    "seam.one_sided": ("CoTraRdma",),
    "seam.scatter_gather": ("ScatterGather", "SeamResult", "ShardOutcome", "ShardStatus"),
    "seam.spire": ("Spire",),
    "seam.grpc_dispatch": ("GrpcDispatch",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        found: Any = import_module("importlib.metadata").version("cotra-rdma")
    elif name in _HOME_OF:
        found = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
