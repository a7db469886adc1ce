"""Vector search in a peer's memory: HNSW graphs walked by one-sided RDMA READs, with shared-memory and RPC fallbacks."""

from __future__ import annotations

from importlib.metadata import version

from cotra_rdma.algorithms import Compass, Spire
from cotra_rdma.arena import Arena
from cotra_rdma.channel import FabricModel
from cotra_rdma.cluster import Cluster, connect
from cotra_rdma.cotra import CoTraRdma
from cotra_rdma.dispatch import ZmqDispatch
from cotra_rdma.errors import (
    BoundsError,
    ChecksumError,
    ClosedError,
    CompletionError,
    CotraError,
    DeadlineError,
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
from cotra_rdma.region import MemoryRegion
from cotra_rdma.result import SearchResult
from cotra_rdma.rpc import ClientKeys, ServerKeys
from cotra_rdma.scatter_gather import ScatterGather, SeamResult, ShardOutcome, ShardStatus
from cotra_rdma.seam import VectorShardSeam
from cotra_rdma.server import Server, serve
from cotra_rdma.shard import Shard
from cotra_rdma.stop import Stop
from cotra_rdma.verbs import QueuePairOptions, register

__version__ = version("cotra-rdma")

__all__ = [
    "Arena",
    "BoundsError",
    "ChecksumError",
    "ClientKeys",
    "ClosedError",
    "Cluster",
    "CoTraRdma",
    "Compass",
    "CompletionError",
    "CotraError",
    "DeadlineError",
    "DeviceNotFoundError",
    "FabricModel",
    "FormatError",
    "InvalidInputError",
    "LossyVectorError",
    "MemlockError",
    "MemoryRegion",
    "PartialResultError",
    "PeerError",
    "QueuePairOptions",
    "ScatterGather",
    "SeamResult",
    "SearchCancelledError",
    "SearchResult",
    "Server",
    "ServerKeys",
    "Shard",
    "ShardOutcome",
    "ShardStatus",
    "Spire",
    "StaleShardError",
    "Stop",
    "TransportError",
    "VectorShardSeam",
    "VerbsUnavailableError",
    "ZmqDispatch",
    "connect",
    "register",
    "serve",
]
