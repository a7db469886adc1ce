"""`BuildSpec`: what is built; and what builds of one graph and of independent shards have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cotra_rdma._clustering.kmeans import normalised
from cotra_rdma._collection.manifest import Collection, ShardFile
from cotra_rdma._core.exact import long_products
from cotra_rdma._routing.calibration import Calibration
from cotra_rdma._shard.params import BuildParams

_PACK_SHARE = 0.1  # of the time that the build of a shard takes, about
_SCATTER_ROWS = 128  # of a covariance that are computed at once

ShardProgress = Callable[[str, int], None]
"""Called with the phase of a step, and the rows that are done of those that the builder has to do in it.

The phases are "partition", "build", "link", "pack", "border", "relink" and "calibrate".
"""

Progress = Callable[[int, str, int], None]
"""Called with (shard, phase, rows done), for all builders."""


@dataclass(frozen=True, slots=True)
class BuildSpec:
    """What is built. All builders of one graph share it.

    Attributes:
        count: the number of rows of the input.
        dim: the components of a vector.
        n_shards: the number of shards.
        params: the parameters of each shard's graph. `n_lists` counts the lists of all shards together, and `n_threads`
            is the number of threads of each builder.
        generation: the generation of the collection.
    """

    count: int
    dim: int
    n_shards: int
    params: BuildParams
    generation: int

    def lists_of(self, count: int) -> int:
        """Returns the number of inverted lists of a shard of `count` vectors."""
        n_lists = self.params.n_lists
        return min(count, max(1, round(n_lists * count / self.count))) if n_lists else 0

    def shared(self) -> dict[str, Any]:
        """Returns the fields that must be equal everywhere, by name.

        The number of threads may differ, and the builders agree on a generation.
        """
        fields = {"count": self.count, "dim": self.dim, "n_shards": self.n_shards} | asdict(self.params)
        del fields["n_threads"]
        return fields

    def collection(
        self,
        shards: Sequence[ShardFile],
        partition: str,
        graph: str,
        calibration: Calibration | None,
        graph_id: int = 0,
    ) -> Collection:
        """Makes the manifest of the collection. The arguments are fields of `Collection`."""
        params = self.params
        return Collection(
            self.dim,
            params.metric,
            self.count,
            params.M,
            params.ef_construction,
            params.seed,
            self.generation,
            tuple(shards),
            partition,
            graph,
            calibration,
            graph_id,
        )


def rows_done(count: int, report: ShardProgress) -> Callable[[str, int, int], None]:
    """Makes the `progress` of the build of a shard. It counts rows from the first node added to the last node packed.

    Args:
        count: the number of rows of the shard.
        report: called with (phase, rows done).
    """

    def progress(phase: str, done: int, total: int) -> None:
        share = done / max(total, 1)
        share = share * (1 - _PACK_SHARE) if phase == "build" else 1 - _PACK_SHARE + share * _PACK_SHARE
        report(phase, round(share * count))

    return progress


def scatter(
    some: npt.NDArray[Any], centroids: npt.NDArray[np.float32], lists: npt.NDArray[np.int32], count: int, metric: str
) -> npt.NDArray[np.float64]:
    """Estimates the covariance of a shard's vectors about their centroids, times the number of vectors.

    Args:
        some: a sample of the vectors, [n, dim].
        centroids: the centroids of the shard's lists, float32[n_lists, dim].
        lists: the list of each vector of the sample, int32[n].
        count: the number of vectors of the shard.
        metric: for "cosine", vectors are normalised first.

    Returns:
        float64[dim, dim].
    """
    rows = normalised(some) if metric == "cosine" else some.astype(np.float32)
    gaps = rows - centroids[lists]
    found = np.empty((gaps.shape[1], gaps.shape[1]))
    for start in range(0, len(found), _SCATTER_ROWS):
        found[start : start + _SCATTER_ROWS] = long_products(gaps.T[start : start + _SCATTER_ROWS], gaps.T)
    found *= count / len(some)
    return found
