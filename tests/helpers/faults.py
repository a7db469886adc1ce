"""A fabric that fails as a test wants it to."""

from __future__ import annotations

from dataclasses import dataclass

from cotra_rdma import FabricModel


@dataclass(frozen=True, slots=True)
class FaultyFabric(FabricModel):
    """Faults beside the round-trip time and the rates.

    Attributes:
        fail_after_reads, fail_status, fail_wc_status: the READ after so many fails so; 0 never.
        drop_after_reads: READs after so many never complete; 0 never.
        corrupt_every: one bit of every n-th READ is flipped; 0 never.
    """

    fail_after_reads: int = 0
    fail_status: int = 0
    fail_wc_status: int = 0
    drop_after_reads: int = 0
    corrupt_every: int = 0

    def params(self) -> dict[str, int]:
        """With the faults."""
        faults = ("fail_after_reads", "fail_status", "fail_wc_status", "drop_after_reads", "corrupt_every")
        return {**FabricModel.params(self), **{name: getattr(self, name) for name in faults}}
