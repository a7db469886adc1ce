"""Pushed expansions: what a walk asks a shard's owner to expand for it, and what it is told of that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

PUSH_DTYPE = np.dtype([("query", "<u4"), ("row", "<u4"), ("limit", "<f4"), ("reserved", "<u4")])
"""A node that its shard's owner is asked to expand: the row of the query that goes with it, the node's row in its shard, and the
limit that estimates must be below to be of use. `cotra_push` of the C shim, and on the wire."""
EXPANSION_DTYPE = np.dtype(
    [("distance", "<f4"), ("scale", "<f4"), ("label", "<i8"), ("flags", "<u4"), ("count", "<u4")]
)
"""What the owner tells of it: the exact distance, for inner products the scale of what estimates near it are wrong by, label
and flags, and of how many neighbours it tells. `cotra_expansion` of the C shim, and on the wire."""


@dataclass(frozen=True, slots=True, eq=False)
class Expansions:
    """What an owner makes of pushed nodes.

    Attributes:
        found: `EXPANSION_DTYPE`[n], one for each push, in their order.
        numbers: uint32[t], of the neighbours in the graph: those of the first node, then of the next; t: the sum of the counts.
        estimates: float32[t] of their distances.
        weights: float32[t]: what each estimate counts for in a mean, the inverse of its standard deviation.
    """

    found: npt.NDArray[np.void]
    numbers: npt.NDArray[np.uint32]
    estimates: npt.NDArray[np.float32]
    weights: npt.NDArray[np.float32]

    @property
    def nbytes(self) -> int:
        """Of all four."""
        return self.found.nbytes + self.numbers.nbytes + self.estimates.nbytes + self.weights.nbytes

    @classmethod
    def none(cls) -> Expansions:
        """Of no nodes."""
        floats = np.empty(0, np.float32)
        return cls(np.empty(0, EXPANSION_DTYPE), np.empty(0, np.uint32), floats, floats)

    @classmethod
    def joined(cls, parts: Sequence[Expansions]) -> Expansions:
        """Of the nodes of all parts, one after the other."""
        if len(parts) == 1:
            return parts[0]
        columns = zip(
            *((part.found, part.numbers, part.estimates, part.weights) for part in [cls.none(), *parts]), strict=True
        )
        return cls(*(np.concatenate(column) for column in columns))
