"""The parts of a search, for programs that build their own: memory, channels that READ it, and engines over channels.

What another process wrote is validated before it is used.
Objects may be closed in any order.
Most are context managers.
"""

from __future__ import annotations

from cotra_rdma._core.image_identity import ImageIdentity
from cotra_rdma._core.memory_region import MemoryRegion
from cotra_rdma._core.remote_expansion import EXPANSION_DTYPE, PUSH_DTYPE, Expansions
from cotra_rdma._core.stats import MORE_STATS_DTYPE, OWNER_STATS_DTYPE, STATS_DTYPE, pack_stats, unpack_stats
from cotra_rdma._native.arena import Arena
from cotra_rdma._native.channel import Channel, FabricModel
from cotra_rdma._native.graph_engine import Engine, Helper, simd_level
from cotra_rdma._native.image import ImageInfo
from cotra_rdma._native.list_engine import IvfInfo, IvfTable, SpireEngine
from cotra_rdma._native.merge import merge
from cotra_rdma._native.record_cache import RecordCache
from cotra_rdma._native.verbs import (
    Device,
    DeviceInfo,
    QueuePair,
    QueuePairAttributes,
    QueuePairOptions,
    devices,
    register,
)
from cotra_rdma._native.view import View

__all__ = [
    "EXPANSION_DTYPE",
    "MORE_STATS_DTYPE",
    "OWNER_STATS_DTYPE",
    "PUSH_DTYPE",
    "STATS_DTYPE",
    "Arena",
    "Channel",
    "Device",
    "DeviceInfo",
    "Engine",
    "Expansions",
    "FabricModel",
    "Helper",
    "ImageIdentity",
    "ImageInfo",
    "IvfInfo",
    "IvfTable",
    "MemoryRegion",
    "QueuePair",
    "QueuePairAttributes",
    "QueuePairOptions",
    "RecordCache",
    "SpireEngine",
    "View",
    "devices",
    "merge",
    "pack_stats",
    "register",
    "simd_level",
    "unpack_stats",
]
