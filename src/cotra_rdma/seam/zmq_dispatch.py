"""`ZmqDispatch`: envelopes to many owners over ZeroMQ, for asyncio. What goes over the wire is what `rpc` sends."""

from __future__ import annotations

import asyncio
import itertools
import struct
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import zmq
import zmq.asyncio

from cotra_rdma.errors import ClosedError, CotraError, DeadlineError, FormatError, InvalidInputError, TransportError
from cotra_rdma.protocol.envelope import Buffer, VShardEnvelope
from cotra_rdma.protocol.rpc import ClientKeys, close_dealer, connect_dealer, parse_address, why_ended

Place = int | tuple[int, int]
"""A node's number, or a shard's (node_id, vshard_id)."""

_ID = struct.Struct("<Q")


class _Connection:
    """A DEALER to one owner, until it breaks: then every call that waits fails, and the next call needs a new one.

    `_waiting` holds a future for each call in progress. An answer whose id is not there came late, and is dropped.
    """

    def __init__(self, context: zmq.asyncio.Context, address: str, keys: ClientKeys | None) -> None:
        self.address = address
        self.broken = False
        self._waiting: dict[bytes, asyncio.Future[list[zmq.Frame]]] = {}
        self._socket = context.socket(zmq.DEALER)
        self._monitor = connect_dealer(self._socket, address, keys)
        self._tasks = [asyncio.create_task(self._receive()), asyncio.create_task(self._watch())]

    async def call(self, number: bytes, frames: list[Buffer]) -> list[zmq.Frame]:
        """Sends a request and waits for the frames of its answer, for as long as the caller lets it."""
        answer: asyncio.Future[list[zmq.Frame]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        sending = asyncio.ensure_future(self._socket.send_multipart([number, *frames], copy=False))

        def sent(done: asyncio.Future[Any]) -> None:
            if not done.cancelled() and (error := done.exception()) and not answer.done():
                answer.set_exception(TransportError(f"{self.address}: {error}"))

        sending.add_done_callback(sent)
        try:
            return await answer
        except asyncio.CancelledError:
            if len(self._waiting) == 1:  # by the end of the connection its owner knows; but others may wait for it, too
                self.close(TransportError(f"{self.address}: a call was given up"))
            raise
        finally:
            del self._waiting[number]
            sending.cancel()  # a request goes out whole or not at all

    async def _receive(self) -> None:
        while True:
            number, *answer = await self._socket.recv_multipart(copy=False)
            waiting = self._waiting.get(number.bytes)
            if waiting is not None and not waiting.done():
                waiting.set_result(answer)

    async def _watch(self) -> None:
        why = why_ended(await self._monitor.recv_multipart())
        self.close(TransportError(f"{self.address} cannot be reached: {why}"))

    def close(self, why: CotraError) -> None:
        """Fails what waits, and closes the socket."""
        if self.broken:
            return
        self.broken = True
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(why)
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()
        close_dealer(self._socket, self._monitor)

    async def wait_closed(self) -> None:
        """Waits until its tasks have ended, after `close`."""
        await asyncio.gather(*self._tasks, return_exceptions=True)


class ZmqDispatch:
    """A `seam.ShardRpcDispatch` over ZeroMQ. An async context manager; it belongs to the event loop of its first call.

    One connection for each owner, made at the first call, shared by all tasks, and made anew after it broke. A cancelled call
    leaves nothing behind.
    """

    def __init__(self, places: Mapping[Place, str], *, keys: ClientKeys | None = None) -> None:
        """Opens nothing yet.

        Args:
            places: (node_id, vshard_id) or node_id -> HOST:PORT; for a shard, the first of these that is there.
            keys: CURVE keys, where the owners want them.

        Raises `InvalidInputError` for a bad address.
        """
        for address in places.values():
            parse_address(address)
        self._places = dict(places)
        self._keys = keys
        self._context: zmq.asyncio.Context | None = None
        self._connections: dict[str, _Connection] = {}
        self._ids = itertools.count(1)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    async def call(self, envelope: VShardEnvelope, timeout_ms: int) -> VShardEnvelope:
        """Sends a request to the owner of (target_node, vshard_id), and returns its answer.

        Raises:
            DeadlineError: no answer in time. TransportError: no address is known, nobody listens there, the connection broke.
            FormatError: the answer is malformed or of another type. ClosedError: it was closed, maybe during the call.
            InvalidInputError: a field does not fit the envelope, or it is another event loop's.
        """
        connection = self._connection(envelope.target_node, envelope.vshard_id)
        frames = envelope.frames()
        try:
            async with asyncio.timeout(timeout_ms / 1000):
                answer = await connection.call(_ID.pack(next(self._ids)), frames)
        except TimeoutError as error:
            if isinstance(error, CotraError):
                raise
            raise DeadlineError(f"{connection.address} did not answer within {timeout_ms} ms") from None
        if not answer:
            raise FormatError(f"{connection.address} answered without an envelope")
        reply = VShardEnvelope.from_frames([frame.buffer for frame in answer])
        if reply.msg_type != envelope.msg_type.response:
            raise FormatError(f"{connection.address} answered type {envelope.msg_type} with type {reply.msg_type}")
        return reply

    def _connection(self, node: int, vshard: int) -> _Connection:
        if self._closed:
            raise ClosedError("the dispatch is closed")
        loop = asyncio.get_running_loop()
        if self._loop not in (None, loop):
            raise InvalidInputError("a ZmqDispatch belongs to the event loop of its first call, and this is another")
        self._loop = loop
        address = self._places.get((node, vshard)) or self._places.get(node)
        if address is None:
            raise TransportError(f"no address is known for shard {vshard} of node {node}")
        connection = self._connections.get(address)
        if connection is None or connection.broken:
            if self._context is None:
                # A shadow of the process's own: to end a context waits for its sockets, and a dispatch that was dropped
                # without `close` would wait for ever in the garbage collector.
                self._context = zmq.asyncio.Context.shadow(zmq.Context.instance())
            connection = self._connections[address] = _Connection(self._context, address, self._keys)
        return connection

    async def close(self) -> None:
        """Fails the calls in progress with `ClosedError`, and closes the connections. Idempotent."""
        self._closed = True
        connections, self._connections = self._connections, {}
        for connection in connections.values():
            connection.close(ClosedError("the dispatch was closed during the call"))
            await connection.wait_closed()
        self._context = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()
