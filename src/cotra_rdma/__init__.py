"""Vector search in a peer's memory: HNSW graphs walked by one-sided RDMA READs, with shared-memory and RPC fallbacks."""

from __future__ import annotations

from importlib.metadata import version

from cotra_rdma._core.memory_region import MemoryRegion
from cotra_rdma._core.stop import Stop
from cotra_rdma._native.arena import Arena
from cotra_rdma._native.channel import FabricModel
from cotra_rdma._native.verbs import QueuePairOptions, register
from cotra_rdma._owner.server import Server, serve
from cotra_rdma._reader.cluster import Cluster, connect
from cotra_rdma._reader.result import SearchResult
from cotra_rdma._shard.shard import Shard
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
from cotra_rdma.protocol.rpc import ClientKeys, ServerKeys
from cotra_rdma.seam.algorithms import Compass, Spire
from cotra_rdma.seam.interface import VectorShardSeam
from cotra_rdma.seam.one_sided import CoTraRdma
from cotra_rdma.seam.scatter_gather import ScatterGather, SeamResult, ShardOutcome, ShardStatus
from cotra_rdma.seam.zmq_dispatch import ZmqDispatch

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
