"""Envelopes over ZeroMQ: a ROUTER in the owner, one DEALER for each peer and thread. Knows sockets and envelopes, nothing else.

A message is [request id, envelope...]: 8 bytes that the client chose, then one or more frames whose concatenation is one
`VShardEnvelope`. The answer carries the same id, so an answer that comes after its deadline is told apart and dropped.

A connection that ends fails the calls in progress at once: the kernel tells of an owner that died, and by TCP's keep-alives of
a host that vanished. ZeroMQ's own heartbeats would tell of an owner that hangs, too, but they cost the CPU of idle owners.
The owner watches its connections as well: what works for one that ended is stopped. A reader that waits no more therefore
closes its connection.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import queue
import re
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import parse_monitor_message

from cotra_rdma._core.stop import Stop
from cotra_rdma.errors import (
    ClosedError,
    CotraError,
    DeadlineError,
    FormatError,
    InvalidInputError,
    SearchCancelledError,
    TransportError,
)
from cotra_rdma.protocol.envelope import HEADER_BYTES, MAX_PAYLOAD_BYTES, Buffer, VShardEnvelope

log = logging.getLogger(__name__)

DEFAULT_TIMEOUT_MS = 5000
_ID = struct.Struct("<Q")
_ZERO_COPY_BYTES = 64 * 1024
_ADDRESS = re.compile(r"(?:tcp://)?(?:\[([^\s\[\]]+)\]|([^\s\[\]]+)):([0-9]{1,5})")
_LOOK_S = 0.02  # between a waiting call's looks, whether it was given up
_SHOWN = 300  # characters of a bad address that an error repeats
_ZAP_DOMAIN = "cotra"  # where it is empty, ZeroMQ asks no authenticator
_IDLE_S, _PROBE_S, _PROBES = 2, 1, 3
"""A host that is silent for so long is probed so often, kernel to kernel: tcp(7), TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_KEEPCNT."""
_UNANSWERED_MS = 5000
"""What was sent to a host must be acknowledged by its kernel in this time: tcp(7), TCP_USER_TIMEOUT."""
_ENDS: dict[int, str] = {
    zmq.EVENT_CLOSED: "nobody listens there",
    zmq.EVENT_DISCONNECTED: "the connection broke",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "the handshake failed (does it want CURVE keys?)",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "the handshake failed (does it want CURVE keys?)",
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "it refused the CURVE key",
}

Later = Callable[[], VShardEnvelope]
"""What makes an answer that needs those of other owners. It runs in threads of its own: were all threads of owners that ask each
other busy waiting, none would be left to answer."""
Handler = Callable[[VShardEnvelope], VShardEnvelope | Later]

asker: ContextVar[Stop | None] = ContextVar("asker", default=None)
"""In a `Handler`, and in what it makes `Later`: set when nobody waits for the answer any more."""


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
    """HOST:PORT (or [V6]:PORT) apart. Raises `InvalidInputError`, also for a HOST that can be no name."""
    found = _ADDRESS.fullmatch(address)
    if found is None or not address.isprintable() or int(found[3]) > 65535:
        raise InvalidInputError(f"an address is HOST:PORT, not {address[:_SHOWN]!r}")
    host = found[1] or found[2]
    try:
        host.encode("idna")  # as sockets do
    except UnicodeError as error:
        raise InvalidInputError(f"an address is HOST:PORT, and {host[:_SHOWN]!r} is no host's name: {error}") from None
    return host, int(found[3])


def _endpoint(host: str, port: int | str) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def _limit(socket: zmq.Socket[Any], host: str) -> None:
    socket.linger = 0
    socket.maxmsgsize = MAX_PAYLOAD_BYTES + HEADER_BYTES + 64
    socket.ipv6 = ":" in host


def _probe(socket: zmq.Socket[Any]) -> None:
    """Has the kernel find out that the other host has vanished."""
    socket.tcp_keepalive, socket.tcp_keepalive_idle = 1, _IDLE_S
    socket.tcp_keepalive_intvl, socket.tcp_keepalive_cnt, socket.tcp_maxrt = _PROBE_S, _PROBES, _UNANSWERED_MS


_Dealer = TypeVar("_Dealer", bound=zmq.Socket[Any])


def connect_dealer(dealer: _Dealer, address: str, keys: ClientKeys | None) -> _Dealer:
    """Connects a DEALER, of any kind of context, to an owner: once, for it does not connect again by itself.

    Returns:
        A monitor: a PAIR that becomes readable when the connection has ended, `why_ended` tells why. `close_dealer` closes both.

    Raises `InvalidInputError` for a bad address, and `TransportError` where none can be made; the DEALER is then closed.
    """
    host, port = parse_address(address)
    try:
        monitor = dealer.get_monitor_socket(sum(_ENDS))
    except zmq.ZMQError as error:  # too many sockets
        dealer.close()
        raise TransportError(f"{address} cannot be reached: {error}") from error
    try:
        monitor.linger = 0
        _limit(dealer, host)
        dealer.immediate = True  # nothing is queued for an owner that is not there
        dealer.reconnect_ivl = -1
        _probe(dealer)
        if keys:
            dealer.curve_publickey, dealer.curve_secretkey = keys.public, keys.secret
            dealer.curve_serverkey = keys.server
        dealer.connect(_endpoint(host, port))
    except zmq.ZMQError as error:
        close_dealer(dealer, monitor)
        raise TransportError(f"{address} cannot be reached: {error}") from error
    return monitor


def close_dealer(dealer: zmq.Socket[Any], monitor: zmq.Socket[Any]) -> None:
    """Closes a DEALER and its monitor."""
    dealer.disable_monitor()
    monitor.close()
    dealer.close()


def why_ended(event: list[bytes]) -> str:
    """What a message of the monitor says about the connection's end."""
    return _ENDS[parse_monitor_message(event)["event"]]


class _Work:
    """What an owner works on, each request with the connection that it came over. A monitor of the ROUTER tells when one ends:
    what works for it is stopped. `begin` and `look` are for the thread that owns the ROUTER."""

    def __init__(self, router: zmq.Socket[Any]) -> None:
        self._router = router
        self.monitor = router.get_monitor_socket(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        self.monitor.linger = 0
        self._numbers = itertools.count(1)
        self._connections: dict[int, int] = {}  # a number for each: the kernel uses descriptors again
        self._requests: dict[Stop, int] = {}
        self._lock = threading.Lock()

    def begin(self, message: list[zmq.Frame]) -> Stop:
        """A request came in. What ends the work on it: is set at once where its connection has ended already."""
        self.look()  # a connection is told of before anything comes over it
        number = self._connections.get(int(message[-1].get(zmq.SRCFD)), 0)
        stop = Stop()
        if not number:
            stop.set()
        with self._lock:
            self._requests[stop] = number
        return stop

    def end(self, stop: Stop) -> None:
        """It was answered, or dropped."""
        with self._lock:
            del self._requests[stop]

    def look(self) -> None:
        """Takes what the monitor tells."""
        while self.monitor.poll(0):
            told = parse_monitor_message(self.monitor.recv_multipart())
            if told["event"] == zmq.EVENT_ACCEPTED:
                self._connections[int(told["value"])] = next(self._numbers)
            else:
                self._stop(self._connections.pop(int(told["value"]), 0))

    def _stop(self, number: int | None = None) -> None:
        """What works for a connection; None: for all."""
        with self._lock:
            for stop, of in self._requests.items():
                if number in (None, of):
                    stop.set()

    def __len__(self) -> int:
        """Requests that were not answered yet."""
        return len(self._requests)

    def close(self) -> None:
        """Stops all of it, for the ROUTER is about to be closed."""
        self._stop()
        self._router.disable_monitor()
        self.monitor.close()


class RpcServer:
    """Answers envelopes: one I/O thread owns the ROUTER, `n_workers` threads run the handler, so that a long search does not
    hold up the control plane, and as many run what it makes of answers that come `Later`. A malformed message is dropped and
    logged; it never ends the server. `handler` may be replaced while it listens.
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
        _probe(self._router)
        self._work = _Work(self._router)
        try:
            self._router.bind(_endpoint(host, port or "*"))
        except zmq.ZMQError as error:
            self._work.close()
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
        self._waiters = ThreadPoolExecutor(n_workers, "cotra-rpc-waiter")
        self._thread = threading.Thread(target=self._run, name="cotra-rpc", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._wake, zmq.POLLIN)
        poller.register(self._work.monitor, zmq.POLLIN)
        while not self._stopping:
            ready = dict(poller.poll())
            if self._wake in ready:
                os.eventfd_read(self._wake)
            while not self._replies.empty():
                self._send(self._replies.get())
            if self._work.monitor in ready:
                self._work.look()
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
                stop = self._work.begin(frames)
                self._workers.submit(self._answer, [frame.buffer for frame in frames], stop)

    def _answer(self, frames: list[memoryview], stop: Stop) -> None:
        self._reply(frames, stop, lambda: self.handler(_request(frames)))

    def _reply(self, frames: list[memoryview], stop: Stop, work: Callable[[], VShardEnvelope | Later]) -> None:
        asker.set(stop)
        try:
            made = work()
            if not isinstance(made, VShardEnvelope):
                self._waiters.submit(self._reply, frames, stop, made)
                return
            reply = made.frames()
        except SearchCancelledError:
            log.debug("%s: who asked is gone", self.address)
            self._work.end(stop)
            return
        except CotraError as error:
            log.warning("%s: a message was dropped: %s", self.address, error)
            self._work.end(stop)
            return
        except Exception:
            log.exception("%s: a message was dropped", self.address)
            self._work.end(stop)
            return
        self._work.end(stop)
        self._replies.put([bytes(frames[0]), bytes(frames[1]), *reply])
        os.eventfd_write(self._wake, 1)

    @property
    def n_at_work(self) -> int:
        """Requests that were not answered yet, those that wait for a thread included."""
        return len(self._work)

    def _stop_authenticator(self) -> None:
        if self._authenticator:
            self._authenticator.stop()

    def close(self) -> None:
        """Stops listening, and the searches in progress; other requests are finished, but not answered any more."""
        if self._closed:
            return
        self._closed = self._stopping = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        self._work.close()
        self._workers.shutdown(cancel_futures=True)
        self._waiters.shutdown(cancel_futures=True)
        self._router.close()
        self._stop_authenticator()
        self._context.term()
        os.close(self._wake)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _request(frames: list[memoryview]) -> VShardEnvelope:
    if len(frames) < 3 or len(frames[1]) != _ID.size:
        raise FormatError("a message is a request id and an envelope")
    request = VShardEnvelope.from_frames(frames[2:])
    if not request.msg_type.is_request:
        raise FormatError(f"message type {request.msg_type} is no request")
    return request


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


class _Connection:
    """A DEALER to an owner, until it ends."""

    def __init__(self, address: str, keys: ClientKeys | None) -> None:
        self._address = address
        try:
            self._dealer: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        except zmq.ZMQError as error:  # too many sockets
            raise TransportError(f"{address} cannot be reached: {error}") from error
        self._monitor: zmq.Socket[bytes] = connect_dealer(self._dealer, address, keys)
        self._poller = zmq.Poller()
        self._poller.register(self._monitor, zmq.POLLIN)

    def has_ended(self) -> bool:
        """Whether it ended; a call then needs a new one."""
        return bool(self._monitor.poll(0))

    def _wait(self, event: int, deadline: float, stop: Stop | None) -> bool:
        """Until the DEALER can do it; False when time is up. Raises `TransportError` when the connection ends before."""
        self._poller.register(self._dealer, event)
        ready: dict[Any, int] = {}
        while not ready and (left := deadline - time.monotonic()) > 0:
            if stop is not None:
                stop.check()
                left = min(left, _LOOK_S)
            ready = dict(self._poller.poll(max(1, round(left * 1000))))
        if self._monitor in ready and self._dealer not in ready:
            why = why_ended(self._monitor.recv_multipart())
            raise TransportError(f"{self._address} cannot be reached: {why}")
        return self._dealer in ready

    def send(self, frames: list[Buffer], deadline: float, stop: Stop | None) -> bool:
        """Sends a message once there is a connection; False when time is up."""
        while self._wait(zmq.POLLOUT, deadline, stop):
            try:
                self._dealer.send_multipart(frames, zmq.NOBLOCK, copy=sum(map(len, frames)) < _ZERO_COPY_BYTES)
            except zmq.Again:  # it ended in between
                continue
            return True
        return False

    def receive(self, deadline: float, stop: Stop | None) -> list[zmq.Frame]:
        """The next message; empty when time is up."""
        return self._dealer.recv_multipart(copy=False) if self._wait(zmq.POLLIN, deadline, stop) else []

    def close(self) -> None:
        close_dealer(self._dealer, self._monitor)


class RpcClient:
    """Calls one owner, from one thread at a time. It connects at the first call, and anew at a call that finds the connection
    ended: once, so that an owner that is gone is an error at once."""

    _ids = itertools.count(1)

    def __init__(self, address: str, *, keys: ClientKeys | None = None) -> None:
        parse_address(address)
        self.address = address
        self._keys = keys
        self._connection: _Connection | None = None
        self._closed = False

    def call(
        self, envelope: VShardEnvelope, timeout_ms: int = DEFAULT_TIMEOUT_MS, stop: Stop | None = None
    ) -> VShardEnvelope:
        """Sends a request and waits for its answer. One that is given up, for whatever reason, ends the connection: by that the
        owner knows.

        Raises:
            SearchCancelledError: `stop` was set.
            TransportError: nobody listens there, or the connection ended during the call. DeadlineError: no answer in time.
            FormatError: it is malformed or of another type. ClosedError: the client was closed.
        """
        if self._closed:
            raise ClosedError(f"the client of {self.address} is closed")
        deadline = time.monotonic() + timeout_ms / 1000
        number = _ID.pack(next(self._ids))
        frames = [number, *envelope.frames()]
        if self._connection is not None and self._connection.has_ended():
            self._disconnect()
        if self._connection is None:
            self._connection = _Connection(self.address, self._keys)
        try:
            answer = self._connection.send(frames, deadline, stop) and self._connection.receive(deadline, stop)
            while answer and not (len(answer) > 1 and answer[0].bytes == number):
                answer = self._connection.receive(deadline, stop)
        except BaseException:
            self._disconnect()
            raise
        if not answer:
            self._disconnect()
            raise DeadlineError(f"{self.address} did not answer within {timeout_ms} ms")
        reply = VShardEnvelope.from_frames([frame.buffer for frame in answer[1:]])
        if reply.msg_type != envelope.msg_type.response:
            raise FormatError(f"{self.address} answered type {envelope.msg_type} with type {reply.msg_type}")
        return reply

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def close(self) -> None:
        """Closes the connection. Idempotent."""
        self._closed = True
        self._disconnect()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
