"""What both sides of the RPC must agree on: the names of gRPC's methods, the limits of messages, and the codes of refusals."""

from __future__ import annotations

from cotra_rdma.protocol.envelope import HEADER_BYTES, MAX_PAYLOAD_BYTES, VShardMessageType

SERVICE = "cotra.Owner"
CONTROL, WORK = "Control", "Work"
"""Methods of the service. A request and its answer are one envelope each, as bytes. What is quick goes to `CONTROL`, which has
threads of its own; all else to `WORK`."""
CONTROL_BYTES = 64 * 1024
"""A request to `CONTROL`, at most."""
MESSAGE_BYTES = MAX_PAYLOAD_BYTES + HEADER_BYTES
"""An answer, at most."""
_QUICK = (VShardMessageType.VECTOR_COARSE_ROUTE_REQUEST, VShardMessageType.VECTOR_MEM_REGION_REQUEST)


def method_of(kind: VShardMessageType) -> str:
    """The full name of the method that takes a request of this type."""
    return f"/{SERVICE}/{CONTROL if is_quick(kind) else WORK}"


def is_quick(kind: VShardMessageType) -> bool:
    """Whether a request of this type goes to `CONTROL`."""
    return kind in _QUICK
