"""Vector search in a peer's memory: HNSW graphs walked by one-sided RDMA READs, with shared-memory and RPC fallbacks."""

from __future__ import annotations

from cotra_rdma.arena import Arena
from cotra_rdma.region import MemoryRegion
from cotra_rdma.shard import Shard

__all__ = ["Arena", "MemoryRegion", "Shard"]
