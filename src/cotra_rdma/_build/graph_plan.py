"""`GraphPlan`: what all shards of one graph know about each other before they link."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cotra_rdma.errors import InvalidInputError

MAX_NODES = 2**31 - 1


@dataclass(frozen=True, slots=True, eq=False)
class GraphPlan:
    """What all shards of one graph know about each other before they link.

    Attributes:
        bases: the number of each shard's first node in the graph, int64[n_shards].
        counts: the number of nodes of each shard, int64[n_shards].
        graph_id: the number that names the graph. It is made from the checksums of all shards' own images.
        centroids: float32[n_shards, dim]. For cosine, they are means of normalised vectors.
    """

    bases: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    graph_id: int
    centroids: npt.NDArray[np.float32]

    @classmethod
    def of(cls, infos: Sequence[Any], centroids: npt.NDArray[np.float32]) -> GraphPlan:
        """Makes the plan for shards with these images.

        Args:
            infos: the headers of the own images, in the order of the shards. They are `ImageInfo`s, or have the same
                fields.
            centroids: float32[n_shards, dim].

        Raises:
            InvalidInputError: the shards have too many nodes, or cannot be one graph.
        """
        first = infos[0]
        for at, info in enumerate(infos):
            for what in ("dim", "metric", "vector_type", "M", "degree", "seed"):
                ours, theirs = getattr(first, what), getattr(info, what)
                if ours != theirs:
                    raise InvalidInputError(f"shards 0 and {at} cannot be one graph: {what} {ours} and {theirs}")
        if centroids.shape != (len(infos), first.dim):
            raise InvalidInputError(
                f"centroids must be float32[{len(infos)}, {first.dim}], not {list(centroids.shape)}"
            )
        counts = np.array([info.count for info in infos], np.int64)
        if counts.sum() > MAX_NODES:
            raise InvalidInputError(f"one graph holds at most {MAX_NODES} nodes, not {counts.sum()}")
        graph_id = 0
        for info in infos:  # FNV-1a over whole words
            graph_id = (graph_id ^ info.image_checksum) * 0x100000001B3 % 2**64
        return cls(np.cumsum(counts) - counts, counts, graph_id or 1, centroids)
