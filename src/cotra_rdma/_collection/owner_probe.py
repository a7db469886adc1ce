"""Asks owners whether they answer, and what they serve.

Each owner gets one short control call with a time-out of its own, and several owners are asked at once.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from cotra_rdma.errors import CotraError
from cotra_rdma.protocol.envelope import WIRE_VERSION, VShardEnvelope, VShardMessageType
from cotra_rdma.protocol.regions import (
    WANT_CAPABILITIES,
    RegionRequest,
    ShardFields,
    decode_region_response,
    encode_region,
)
from cotra_rdma.protocol.rpc_client import RpcClient
from cotra_rdma.protocol.tls import Tls

AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class OwnerStatus:
    """What an owner answered, or why it did not.

    Attributes:
        address: the address that was asked.
        serves: what the owner serves. None if it did not answer.
        transports: the transports that the owner offers for its shard.
        latency_s: the time of a control call on an open connection, in seconds. 0 if the owner did not answer.
        problem: why there is no answer, or why the answer cannot be used. "" if all is well.
    """

    address: str
    serves: ShardFields | None
    transports: tuple[str, ...]
    latency_s: float
    problem: str


def ask_owners(addresses: Sequence[str], timeout_s: float, tls: Tls | None = None) -> list[OwnerStatus]:
    """Asks owners what they serve, up to 32 at once. It raises no error; a failure is in the status.

    Args:
        addresses: HOST:PORT of each owner.
        timeout_s: the longest wait for one of them, in seconds.
        tls: this side's certificate, if the owners want one.

    Returns:
        A status for each address, in order.
    """
    if not addresses:
        return []
    with ThreadPoolExecutor(min(AT_ONCE, len(addresses)), "cotra-ask") as pool:
        return list(pool.map(lambda address: _ask(address, timeout_s, tls), addresses))


def _ask(address: str, timeout_s: float, tls: Tls | None) -> OwnerStatus:
    """Asks one owner."""
    deadline = time.monotonic() + timeout_s
    request = encode_region(RegionRequest(WANT_CAPABILITIES, secrets.token_hex(8)))
    envelope = VShardEnvelope(WIRE_VERSION, VShardMessageType.VECTOR_MEM_REGION_REQUEST, 0, 0, 0, request)

    def left_ms() -> int:
        return max(1, round((deadline - time.monotonic()) * 1000))

    try:
        with RpcClient(address, tls=tls) as client:
            client.call(envelope, left_ms())  # makes the connection
            begin = time.perf_counter()
            reply = client.call(envelope, left_ms())
            latency_s = time.perf_counter() - begin
        answer = decode_region_response(reply.payload)
    except (CotraError, OSError, ValueError) as error:
        return OwnerStatus(address, None, (), 0.0, str(error) or type(error).__name__)
    if answer.code or answer.shard is None:
        return OwnerStatus(address, None, (), latency_s, answer.message or "the owner does not say what it serves")
    offered = tuple(name for name, why_not in answer.transports.items() if not why_not)
    return OwnerStatus(address, answer.shard, offered, latency_s, "")
