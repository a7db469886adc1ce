"""What a scaling study measures: numbers of shards, paths, machines and halos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from cotra_rdma._bench.data import DataSet
from cotra_rdma._bench.scaling.prediction import Machine
from cotra_rdma._bench.transports import parse_transport
from cotra_rdma.errors import InvalidInputError

RECALL = 0.95
"""The recall at which costs are compared."""
FABRIC = "model:rtt=2us:gbit=100:mreads=10"
"""The modelled fabric of a study by default."""
NO_FABRIC = "model:rtt=0"
"""A modelled fabric without limits. It shows what posting and completing a READ costs the CPU."""


@dataclass(frozen=True, slots=True)
class Scale:
    """What to study.

    Attributes:
        n_shards: the numbers of shards, ascending and from 1 on.
        transport: the path to the shards.
        fabric: the modelled fabric.
        machine: the machine of the predictions.
        halos: the halos of home peers, ascending and from 0 on. The prediction takes the last.
        local_share: the part of a routed query's expansions that stays at its home, at the most shards.
            None measures it.
    """

    n_shards: Sequence[int] = (1, 2, 4, 8, 16)
    transport: str = "shm"
    fabric: str = FABRIC
    machine: Machine = field(default_factory=Machine)
    halos: Sequence[float] = (0.0, 0.25, 0.5)
    local_share: float | None = None

    def check(self, data: DataSet) -> None:
        """Checks before a long measurement that the study can be made.

        Raises:
            InvalidInputError: it cannot.
        """
        kind, fabric = parse_transport(self.fabric)
        if fabric is None or fabric.round_trip_s == 0 or parse_transport(self.transport)[0] not in ("shm", "verbs"):
            raise InvalidInputError(
                f"a scaling study needs shm or verbs and a model with a round trip, not {self.transport} and {kind}"
            )
        if len(self.n_shards) < 2 or self.n_shards[0] != 1:
            raise InvalidInputError("a scaling study compares several numbers of shards with 1: give another --shards")
        if data.vectors.count < 1000:
            raise InvalidInputError(
                f"{data.vectors.count} vectors are too few for a scaling study, which needs at least 1,000"
            )
        if self.local_share is not None and not 1 / self.n_shards[-1] <= self.local_share <= 1:
            raise InvalidInputError(
                f"the local share of {self.n_shards[-1]} shards is 1 / {self.n_shards[-1]} to 1, not {self.local_share}"
            )
