"""Values of remote expansion: what a walk asks a shard's owner to expand, and what the owner replies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

PUSH_DTYPE = np.dtype([("query", "<u4"), ("row", "<u4"), ("limit", "<f4"), ("reserved", "<u4")])
"""One push: a node that its shard's owner is asked to expand.

`query` is the row of the query that goes with it.
`row` is the node's row in its shard.
An estimate is of use only if it is below `limit`.
The C shim calls this type `cotra_push`, and the messages carry it too.
"""
EXPANSION_DTYPE = np.dtype(
    [("distance", "<f4"), ("scale", "<f4"), ("label", "<i8"), ("flags", "<u4"), ("count", "<u4")]
)
"""The owner's reply to one push, without the neighbours.

`distance` is the exact distance.
`scale` matters for inner products: it is the scale of the errors of estimates near the node.
`label` and `flags` are the node's.
`count` is the number of neighbours in the reply.
The C shim calls this type `cotra_expansion`, and the messages carry it too.
"""


@dataclass(frozen=True, slots=True, eq=False)
class Expansions:
    """The replies of an owner to some pushes.

    The neighbours of the first node come first, then those of the next.
    There are t of them, and t is the sum of the counts.

    Attributes:
        found: `EXPANSION_DTYPE`[n], one for each push, in the order of the pushes.
        numbers: the neighbours' numbers in the graph, uint32[t].
        estimates: estimates of the neighbours' distances, float32[t].
        weights: what each estimate counts for in a mean, float32[t]. A weight is the inverse of the standard deviation.
    """

    found: npt.NDArray[np.void]
    numbers: npt.NDArray[np.uint32]
    estimates: npt.NDArray[np.float32]
    weights: npt.NDArray[np.float32]

    @property
    def nbytes(self) -> int:
        """The bytes of all four arrays."""
        return self.found.nbytes + self.numbers.nbytes + self.estimates.nbytes + self.weights.nbytes

    @classmethod
    def none(cls) -> Expansions:
        """Makes the replies to no pushes."""
        floats = np.empty(0, np.float32)
        return cls(np.empty(0, EXPANSION_DTYPE), np.empty(0, np.uint32), floats, floats)

    @classmethod
    def joined(cls, parts: Sequence[Expansions]) -> Expansions:
        """Joins the replies of all parts, one part after the other."""
        if len(parts) == 1:
            return parts[0]
        columns = zip(
            *((part.found, part.numbers, part.estimates, part.weights) for part in [cls.none(), *parts]), strict=True
        )
        return cls(*(np.concatenate(column) for column in columns))
