"""`GrpcDispatch`: envelopes to many owners over gRPC, for asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import grpc

from cotra_rdma.errors import ClosedError, InvalidInputError, TransportError
from cotra_rdma.protocol.address import join_address, parse_address
from cotra_rdma.protocol.envelope import VShardEnvelope
from cotra_rdma.protocol.rpc_client import checked_reply, error_of, open_channel, pauses, was_refused
from cotra_rdma.protocol.service import method_of
from cotra_rdma.protocol.tls import Tls

Place = int | tuple[int, int]
"""A node's number, or a shard's (node_id, vshard_id)."""


class GrpcDispatch:
    """A `seam.ShardRpcDispatch` over gRPC. An async context manager; it belongs to the event loop of its first call.

    One connection for each owner, made at the first call, shared by all tasks, and made anew after it broke. The owner is told
    of a cancelled call.
    """

    def __init__(self, places: Mapping[Place, str], *, tls: Tls | None = None) -> None:
        """Opens nothing yet.

        Args:
            places: (node_id, vshard_id) or node_id -> HOST:PORT; for a shard, the first of these that is there.
            tls: this side's certificate, where the owners want one.

        Raises `InvalidInputError` for a bad address or certificate.
        """
        for address in places.values():
            parse_address(address)
        self._places = dict(places)
        self._credentials = None if tls is None else tls.for_client()
        self._channels: dict[str, grpc.Channel] = {}
        self._calls: set[Any] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    async def call(self, envelope: VShardEnvelope, timeout_ms: int) -> VShardEnvelope:
        """Sends a request to the owner of (target_node, vshard_id), and returns its answer.

        Raises:
            DeadlineError: no answer in time. TransportError: no address is known, nobody listens there, the connection broke.
            BusyError: the owner has too much to do. PeerError: it refuses the request.
            FormatError: the answer is malformed or of another type. ClosedError: it was closed, maybe during the call.
            InvalidInputError: a field does not fit the envelope, or it is another event loop's.
        """
        address = self._address(envelope.target_node, envelope.vshard_id)
        data, deadline = envelope.encode(), time.monotonic() + timeout_ms / 1000
        for pause_s in pauses():
            channel = self._channels.get(address)
            if channel is None:
                channel = self._channels[address] = open_channel(
                    join_address(*parse_address(address)), self._credentials
                )
            call = await self._finished(channel, envelope, data, max(deadline - time.monotonic(), 0.001))
            code = call.code()
            if code is grpc.StatusCode.OK:
                return checked_reply(call.result(), envelope, address)
            if not was_refused(call) or time.monotonic() + pause_s > deadline:
                break
            await asyncio.sleep(pause_s)
        if code is grpc.StatusCode.UNAVAILABLE and self._channels.get(address) is channel:
            del self._channels[address]  # its pause before it tries again is not ours
        raise error_of(code, call.details() or "", address, timeout_ms)

    async def _finished(self, channel: grpc.Channel, envelope: VShardEnvelope, data: bytes, timeout_s: float) -> Any:
        """Makes a call, and waits until it is over, well or not. Raises `ClosedError`."""
        if self._closed:
            raise ClosedError("the dispatch is closed")
        loop = asyncio.get_running_loop()
        over: asyncio.Future[None] = loop.create_future()
        send: Any = channel.unary_unary(method_of(envelope.msg_type), None, None)
        call = send.future(data, timeout=timeout_s)
        self._calls.add(call)
        call.add_done_callback(lambda _: _tell(loop, over))
        try:
            await over
        finally:
            self._calls.discard(call)
            call.cancel()  # nothing, where it is over
        if self._closed:
            raise ClosedError("the dispatch was closed during the call")
        return call

    def _address(self, node: int, vshard: int) -> str:
        if self._closed:
            raise ClosedError("the dispatch is closed")
        loop = asyncio.get_running_loop()
        if self._loop not in (None, loop):
            raise InvalidInputError("a GrpcDispatch belongs to the event loop of its first call, and this is another")
        self._loop = loop
        address = self._places.get((node, vshard)) or self._places.get(node)
        if address is None:
            raise TransportError(f"no address is known for shard {vshard} of node {node}")
        return address

    async def close(self) -> None:
        """Fails the calls in progress with `ClosedError`, and closes the connections. Idempotent."""
        self._closed = True
        for call in list(self._calls):
            call.cancel()
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()


def _tell(loop: asyncio.AbstractEventLoop, over: asyncio.Future[None]) -> None:
    """From gRPC's thread."""

    def end() -> None:
        if not over.done():
            over.set_result(None)

    with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits
        loop.call_soon_threadsafe(end)
