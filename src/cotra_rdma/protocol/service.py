"""What both sides of the RPC must agree on: the names of gRPC's methods, and the limits of messages."""

from __future__ import annotations

from cotra_rdma.protocol.envelope import HEADER_BYTES, MAX_PAYLOAD_BYTES, VShardMessageType

SERVICE = "cotra.Owner"
CONTROL, WORK = "Control", "Work"
"""The methods of the service.

A request and its answer are one envelope each, as bytes.
Requests that are answered quickly go to `CONTROL`, and the others to `WORK`.
So searches do not keep the control plane waiting.
"""
CONTROL_BYTES = 64 * 1024
"""The most bytes of a request to `CONTROL`."""
MESSAGE_BYTES = MAX_PAYLOAD_BYTES + HEADER_BYTES
"""The most bytes of an answer."""
_QUICK = (VShardMessageType.VECTOR_COARSE_ROUTE_REQUEST, VShardMessageType.VECTOR_MEM_REGION_REQUEST)


def method_of(kind: VShardMessageType) -> str:
    """Returns the full name of the gRPC method for a request of this type."""
    return f"/{SERVICE}/{CONTROL if is_quick(kind) else WORK}"


def is_quick(kind: VShardMessageType) -> bool:
    """Returns whether a request of this type goes to `CONTROL`."""
    return kind in _QUICK
