"""Which owners answer: one short control call to each, several at once, each with a time-out of its own."""

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
    """What an owner told, or why it told nothing.

    Attributes:
        address: where it was asked.
        serves: what it serves; None where it did not answer.
        transports: the ways to its shard that it offers.
        latency_s: of a control call on a connection that stands, in seconds; 0 where it did not answer.
        problem: why there is no answer, or why it cannot be used; "" where all is well.
    """

    address: str
    serves: ShardFields | None
    transports: tuple[str, ...]
    latency_s: float
    problem: str


def ask_owners(addresses: Sequence[str], timeout_s: float, tls: Tls | None = None) -> list[OwnerStatus]:
    """Asks owners what they serve, up to 32 at once.

    Args:
        addresses: HOST:PORT of each.
        timeout_s: the longest wait for one of them, in seconds.
        tls: this side's certificate, where the owners want one.

    Returns: one for each address, in order. It raises nothing: what goes wrong is the status's `problem`.
    """
    if not addresses:
        return []
    with ThreadPoolExecutor(min(AT_ONCE, len(addresses)), "cotra-ask") as pool:
        return list(pool.map(lambda address: _ask(address, timeout_s, tls), addresses))


def _ask(address: str, timeout_s: float, tls: Tls | None) -> OwnerStatus:
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
        return OwnerStatus(address, None, (), latency_s, answer.message or "it does not say what it serves")
    offered = tuple(name for name, why_not in answer.transports.items() if not why_not)
    return OwnerStatus(address, answer.shard, offered, latency_s, "")
