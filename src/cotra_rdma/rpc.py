"""Envelopes over ZeroMQ: a ROUTER in the owner, one DEALER for each peer and thread. Knows sockets and envelopes, nothing else.

A message is [request id, envelope...]: 8 bytes that the client chose, then one or more frames whose concatenation is one
`VShardEnvelope`. The answer carries the same id, so an answer that comes after its deadline is told apart and dropped.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import queue
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import zmq
from zmq.auth.thread import ThreadAuthenticator

from cotra_rdma.errors import ClosedError, CotraError, DeadlineError, FormatError, InvalidInputError, TransportError
from cotra_rdma.wire import HEADER_BYTES, MAX_PAYLOAD_BYTES, VShardEnvelope

log = logging.getLogger(__name__)

DEFAULT_TIMEOUT_MS = 5000
_ID = struct.Struct("<Q")
_ZERO_COPY_BYTES = 64 * 1024
_ZAP_DOMAIN = "cotra"  # where it is empty, ZeroMQ asks no authenticator

Handler = Callable[[VShardEnvelope], VShardEnvelope]


@dataclass(frozen=True, slots=True)
class ServerKeys:
    """CURVE keys of an owner (curve_security(7)): its own pair, and the public keys it lets in (empty: any with a key).

    Keys are Z85 text of 40 bytes, as `zmq.curve_keypair()` makes them.
    """

    public: bytes
    secret: bytes
    allowed: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class ClientKeys:
    """CURVE keys of a reader: its own pair, and the public key of the owners it talks to."""

    public: bytes
    secret: bytes
    server: bytes


def parse_address(address: str) -> tuple[str, int]:
    """HOST:PORT (or [V6]:PORT) apart. Raises `InvalidInputError`."""
    host, colon, port = address.removeprefix("tcp://").rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise InvalidInputError(f"an address is HOST:PORT, not {address!r}")
    return host.strip("[]"), int(port)


def _endpoint(host: str, port: int | str) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def _limit(socket: zmq.Socket[Any], host: str) -> None:
    socket.linger = 0
    socket.maxmsgsize = MAX_PAYLOAD_BYTES + HEADER_BYTES + 64
    socket.ipv6 = ":" in host


def connect_dealer(dealer: zmq.Socket[Any], address: str, keys: ClientKeys | None) -> None:
    """Connects a DEALER, of any kind of context, to an owner. Raises `InvalidInputError` for a bad address."""
    host, port = parse_address(address)
    _limit(dealer, host)
    if keys:
        dealer.curve_publickey, dealer.curve_secretkey = keys.public, keys.secret
        dealer.curve_serverkey = keys.server
    dealer.connect(_endpoint(host, port))


class RpcServer:
    """Answers envelopes: one I/O thread owns the ROUTER, `n_workers` threads run the handler, so that a long search does not
    hold up the control plane. A malformed message is dropped and logged; it never ends the server.

    `handler` may be replaced while it listens.
    """

    def __init__(self, address: str, handler: Handler, *, keys: ServerKeys | None = None, n_workers: int = 4) -> None:
        host, port = parse_address(address)
        self.handler = handler
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._authenticator = _authenticate(self._context, keys) if keys else None
        self._router = self._context.socket(zmq.ROUTER)
        _limit(self._router, host)
        if keys:
            self._router.curve_server = True
            self._router.curve_publickey, self._router.curve_secretkey = keys.public, keys.secret
            self._router.zap_domain = _ZAP_DOMAIN.encode()
        try:
            self._router.bind(_endpoint(host, port or "*"))
        except zmq.ZMQError as error:
            self._router.close()
            self._stop_authenticator()
            self._context.term()
            raise TransportError(f"cannot listen on {address}: {error}") from error
        endpoint = self._router.get_string(zmq.LAST_ENDPOINT)
        bound = endpoint.rpartition(":")[2].rstrip("\0")
        self.address = f"[{host}]:{bound}" if ":" in host else f"{host}:{bound}"
        self._replies: queue.SimpleQueue[list[bytes | memoryview]] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stopping = False
        self._closed = False
        self._workers = ThreadPoolExecutor(n_workers, "cotra-rpc-worker")
        self._thread = threading.Thread(target=self._run, name="cotra-rpc", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._wake, zmq.POLLIN)
        while not self._stopping:
            ready = dict(poller.poll())
            if self._wake in ready:
                os.eventfd_read(self._wake)
            while not self._replies.empty():
                self._send(self._replies.get())
            if self._router in ready:
                self._receive()

    def _send(self, frames: list[bytes | memoryview]) -> None:
        for i, frame in enumerate(frames):
            more = zmq.SNDMORE if i + 1 < len(frames) else 0
            with contextlib.suppress(zmq.ZMQError):  # the peer is gone
                self._router.send(frame, more, copy=len(frame) < _ZERO_COPY_BYTES)

    def _receive(self) -> None:
        with contextlib.suppress(zmq.Again):
            for _ in range(64):
                frames = self._router.recv_multipart(zmq.NOBLOCK, copy=False)
                self._workers.submit(self._answer, [frame.buffer for frame in frames])

    def _answer(self, frames: list[memoryview]) -> None:
        try:
            if len(frames) < 3 or len(frames[1]) != _ID.size:
                raise FormatError("a message is a request id and an envelope")
            request = VShardEnvelope.from_frames(frames[2:])
            if not request.msg_type.is_request:
                raise FormatError(f"message type {request.msg_type} is no request")
            reply = self.handler(request).frames()
        except CotraError as error:
            log.warning("%s: a message was dropped: %s", self.address, error)
            return
        except Exception:
            log.exception("%s: a message was dropped", self.address)
            return
        self._replies.put([bytes(frames[0]), bytes(frames[1]), *reply])
        os.eventfd_write(self._wake, 1)

    def _stop_authenticator(self) -> None:
        if self._authenticator:
            self._authenticator.stop()

    def close(self) -> None:
        """Stops listening; requests in progress are finished, their answers are not sent any more."""
        if self._closed:
            return
        self._closed = self._stopping = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        self._workers.shutdown(cancel_futures=True)
        self._router.close()
        self._stop_authenticator()
        self._context.term()
        os.close(self._wake)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class _AllowedKeys:
    """ThreadAuthenticator's credentials provider: a set of public keys; empty lets every key in."""

    def __init__(self, allowed: tuple[bytes, ...]) -> None:
        self._allowed = frozenset(allowed)

    def callback(self, _domain: str, key: bytes) -> bool:
        return not self._allowed or key in self._allowed


def _authenticate(context: zmq.Context[zmq.Socket[bytes]], keys: ServerKeys) -> ThreadAuthenticator:
    authenticator = ThreadAuthenticator(context)
    authenticator.start()
    authenticator.configure_curve_callback(_ZAP_DOMAIN, credentials_provider=_AllowedKeys(keys.allowed))
    return authenticator


class RpcClient:
    """Calls one owner, from one thread at a time."""

    _ids = itertools.count(1)

    def __init__(self, address: str, *, keys: ClientKeys | None = None) -> None:
        parse_address(address)
        self.address = address
        dealer: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        connect_dealer(dealer, address, keys)
        self._socket: zmq.Socket[bytes] | None = dealer

    def call(self, envelope: VShardEnvelope, timeout_ms: int = DEFAULT_TIMEOUT_MS) -> VShardEnvelope:
        """Sends a request and waits for its answer.

        Raises `DeadlineError` when there is none in time, `FormatError` when it is malformed or of another type.
        """
        if self._socket is None:
            raise ClosedError(f"the client of {self.address} is closed")
        number = _ID.pack(next(self._ids))
        deadline = time.monotonic() + timeout_ms / 1000
        frames = [number, *envelope.frames()]
        self._socket.sndtimeo = timeout_ms
        try:
            for i, frame in enumerate(frames):
                more = zmq.SNDMORE if i + 1 < len(frames) else 0
                self._socket.send(frame, more, copy=len(frame) < _ZERO_COPY_BYTES)
        except zmq.Again:
            raise self._late(timeout_ms) from None
        while True:
            left = deadline - time.monotonic()
            if left <= 0 or not self._socket.poll(max(1, round(left * 1000))):
                raise self._late(timeout_ms)
            answer = self._socket.recv_multipart(copy=False)
            if len(answer) >= 2 and answer[0].bytes == number:
                reply = VShardEnvelope.from_frames([frame.buffer for frame in answer[1:]])
                if reply.msg_type != envelope.msg_type.response:
                    raise FormatError(f"{self.address} answered type {envelope.msg_type} with type {reply.msg_type}")
                return reply

    def _late(self, timeout_ms: int) -> DeadlineError:
        return DeadlineError(f"{self.address} did not answer within {timeout_ms} ms")

    def close(self) -> None:
        """Closes the connection."""
        socket, self._socket = self._socket, None
        if socket is not None:
            socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
