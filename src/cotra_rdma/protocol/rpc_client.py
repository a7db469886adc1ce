"""`RpcClient`: a reader's side of the RPC."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NoReturn, Self

import grpc

from cotra_rdma._core.stop import Stop
from cotra_rdma._core.tracing import Headers
from cotra_rdma.errors import (
    BusyError,
    ClosedError,
    DeadlineError,
    DeniedError,
    FormatError,
    PeerError,
    TransportError,
)
from cotra_rdma.protocol.address import join_address, parse_address
from cotra_rdma.protocol.envelope import VShardEnvelope
from cotra_rdma.protocol.service import MESSAGE_BYTES, method_of
from cotra_rdma.protocol.tls import Tls

DEFAULT_TIMEOUT_MS = 5000
_LOOK_S = 0.02  # the interval at which a waiting call checks its `Stop`
_OPTIONS = [
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_send_message_length", -1),
    (
        "grpc.use_local_subchannel_pool",
        1,
    ),  # gRPC would share a connection between clients, and owners are fair to connections
    ("grpc.enable_http_proxy", 0),
    ("grpc.keepalive_time_ms", 3000),  # a call in progress notices that the owner's host vanished
    ("grpc.keepalive_timeout_ms", 3000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


class RpcClient:
    """Calls one owner over one connection. Several threads may call at once.

    It connects at the first call.
    A call that finds the connection ended connects once more, so that an owner that is gone is an error at once.

    Attributes:
        address: the address of the owner, as given.
    """

    def __init__(
        self, address: str, *, tls: Tls | None = None, note: Callable[[str], object] = lambda event: None
    ) -> None:
        """Prepares the client. The first call connects.

        Args:
            address: HOST:PORT of the owner.
            tls: this reader's certificate, or None for a plain connection.
            note: called with "connections" when a connection is opened, and with "resent" when a call is sent again.

        Raises:
            InvalidInputError: the address is malformed, or a file holds no certificate.
        """
        self._target = join_address(*parse_address(address))
        self.address = address
        self._note = note
        self._credentials = None if tls is None else tls.for_client()
        self._lock = threading.Lock()
        self._channel: grpc.Channel | None = None
        self._calls: Counter[grpc.Channel] = Counter()  # calls in progress, of this channel and of earlier ones
        self._closed = False
        self._pid = os.getpid()

    def call(
        self,
        envelope: VShardEnvelope,
        timeout_ms: int = DEFAULT_TIMEOUT_MS,
        stop: Stop | None = None,
        headers: Headers = (),
    ) -> VShardEnvelope:
        """Sends a request, and waits for its answer. If the wait is given up, the owner is told.

        Args:
            envelope: the request.
            timeout_ms: the most milliseconds to wait.
            stop: ends the wait when it is set.
            headers: gRPC's metadata.

        Raises:
            SearchCancelledError: `stop` was set.
            TransportError: nobody listens there, or the connection ended during the call.
            DeadlineError: no answer came in time.
            BusyError: the owner has too much to do.
            DeniedError: the owner's policy does not allow the request.
            PeerError: the owner refused the request.
            FormatError: the answer is malformed, or of another type.
            ClosedError: the client is closed, or belongs to the process that this one was forked from.
        """
        data, deadline = envelope.encode(), time.monotonic() + timeout_ms / 1000
        for pause_s in pauses():
            with self._connected() as channel:
                send: Any = channel.unary_unary(method_of(envelope.msg_type), None, None)
                call: Any = send.future(data, timeout=max(deadline - time.monotonic(), 0.001), metadata=headers)
                try:
                    return checked_reply(self._answer_of(call, stop), envelope, self.address)
                except grpc.FutureCancelledError:
                    raise ClosedError(f"the client of {self.address} is closed") from None
                except grpc.RpcError:
                    if not was_refused(call) or time.monotonic() + pause_s > deadline:
                        self._fail(call, channel, timeout_ms)
                except BaseException:
                    call.cancel()
                    raise
            self._note("resent")
            time.sleep(pause_s)
        raise AssertionError  # `pauses` never ends

    @staticmethod
    def _answer_of(call: Any, stop: Stop | None) -> bytes:
        while True:
            try:
                return bytes(call.result(timeout=None if stop is None else _LOOK_S))
            except grpc.FutureTimeoutError:
                if stop is not None:
                    stop.check()

    @contextmanager
    def _connected(self) -> Iterator[grpc.Channel]:
        """Lends the channel for one call. The last call on a channel that has ended closes it."""
        with self._lock:
            if self._closed or self._pid != os.getpid():
                raise ClosedError(f"the client of {self.address} is closed")
            if self._channel is None:
                self._channel = open_channel(self._target, self._credentials)
                self._note("connections")
            channel = self._channel
            self._calls[channel] += 1
        try:
            yield channel
        finally:
            with self._lock:
                self._calls[channel] -= 1
                last = not self._calls[channel]
                if last:
                    del self._calls[channel]
                last = last and channel is not self._channel
            if last and self._pid == os.getpid():
                channel.close()

    def _fail(self, call: Any, channel: grpc.Channel, timeout_ms: int) -> NoReturn:
        code = call.code()
        if self._closed:
            raise ClosedError(f"the client of {self.address} is closed") from None
        if code is grpc.StatusCode.UNAVAILABLE:
            with self._lock:
                if self._channel is channel:  # a channel pauses before it connects again, and a new one does not
                    self._channel = None
        raise error_of(code, call.details() or "", self.address, timeout_ms) from None

    def close(self) -> None:
        """Closes the connection, and ends calls in progress. Idempotent."""
        with self._lock:
            self._closed = True
            channel, self._channel = self._channel, None
        if channel is not None and self._pid == os.getpid():
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def open_channel(target: str, credentials: grpc.ChannelCredentials | None) -> grpc.Channel:
    """Opens a gRPC channel with this package's options. It connects at the first call.

    Args:
        target: HOST:PORT.
        credentials: the reader's credentials, or None for a plain connection.
    """
    if credentials is None:
        return grpc.insecure_channel(target, _OPTIONS)
    return grpc.secure_channel(target, credentials, _OPTIONS)


def was_refused(call: Any) -> bool:
    """Returns whether the owner refused a call before it looked at it, because the connection had too many calls already.

    HTTP/2 promises that such a call may be sent again (RFC 9113, section 8.7: REFUSED_STREAM, error code 7).
    gRPC sends it again by itself, but only once.
    """
    details = call.details() or ""
    return call.code() is grpc.StatusCode.UNAVAILABLE and "RST_STREAM" in details and "error code 7" in details


def pauses() -> Iterator[float]:
    """Yields how many seconds to wait before each further attempt of a call that was refused. It never ends."""
    pause_s = 0.002
    while True:
        yield pause_s
        pause_s = min(2 * pause_s, 0.05)


def checked_reply(answer: bytes, request: VShardEnvelope, address: str) -> VShardEnvelope:
    """Reads the envelope of an answer.

    Raises:
        FormatError: the answer is malformed, or answers another type of request.
    """
    reply = VShardEnvelope.decode(memoryview(answer))
    if reply.msg_type != request.msg_type.response:
        raise FormatError(f"{address} answered type {request.msg_type} with type {reply.msg_type}")
    return reply


def error_of(code: grpc.StatusCode, details: str, address: str, timeout_ms: int) -> Exception:
    """Makes the error of a call that gRPC ended with this code."""
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineError(f"{address} did not answer within {timeout_ms} ms")
    if code is grpc.StatusCode.UNAVAILABLE:
        return TransportError(f"{address} cannot be reached: {_plain(details)}")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" not in details:
        return BusyError(f"{address}: {details}")
    if code is grpc.StatusCode.CANCELLED:
        return BusyError(f"{address} gave the request up: it has too much to do, or the request took too long")
    if code is grpc.StatusCode.PERMISSION_DENIED:
        return DeniedError(f"{address}: {details}")
    return PeerError(f"{address}: {details}")


def _plain(details: str) -> str:
    """Says in plain words why there is no connection. An unknown reason stays in gRPC's words."""
    for theirs, ours in (
        ("Connection refused", "nobody listens there"),
        ("Ssl handshake failed", "the TLS handshake failed"),
        ("SSL_ERROR", "the TLS handshake failed"),
        ("Verification Check failed", "the TLS handshake failed"),
        ("Socket closed", "the connection broke"),
        ("Connection reset", "the connection broke"),
        ("GOAWAY", "it is shutting down"),
    ):
        if theirs.lower() in details.lower():
            return ours if ours != "the TLS handshake failed" else f"{ours}: {details}"
    return details
