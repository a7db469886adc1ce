"""`RpcServer`: an owner's side of the RPC. It knows gRPC and envelopes, and not the payloads in them.

gRPC bounds the bytes of a message before it reads the message.
It also passes on the caller's deadline, and says when the caller is gone.
This module does what gRPC does not do: it bounds the memory of all requests and all answers together, and is fair to senders.

A request is read after it is admitted (`FairShares`), and not before.
Until then, its bytes wait at its sender.
An answer is kept until its receiver has taken it.
If the kept answers are too many bytes, the sender that is owed most loses answers.
"""

from __future__ import annotations

import functools
import itertools
import logging
import resource
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple, Self

import grpc

from cotra_rdma._core.request_counts import RequestCounts
from cotra_rdma._core.stop import Stop
from cotra_rdma._core.tracing import Tracing
from cotra_rdma.errors import BusyError, CotraError, DeniedError, FormatError, SearchCancelledError, TransportError
from cotra_rdma.protocol.address import join_address, parse_address
from cotra_rdma.protocol.envelope import VShardEnvelope
from cotra_rdma.protocol.fair_shares import FairShares, Request
from cotra_rdma.protocol.service import CONTROL, CONTROL_BYTES, MESSAGE_BYTES, SERVICE, WORK, is_quick
from cotra_rdma.protocol.tls import Tls

log = logging.getLogger(__name__)

Later = Callable[[], VShardEnvelope]
"""Makes an answer that needs the answers of other owners.

Such work has workers of its own.
Otherwise owners that ask each other could have all their workers waiting, and no worker left to answer.
"""
Steps = Iterator[VShardEnvelope | None]
"""Does work in short steps. The last step yields the answer, and each other step yields None.

Other requests have their turns between the steps.
"""
Handler = Callable[[VShardEnvelope], VShardEnvelope | Later | Steps]
"""Answers a request, or returns what makes the answer."""

asker_names: ContextVar[tuple[str, ...]] = ContextVar("asker_names", default=())
"""The names in the caller's certificate, for a `Handler` and for what it returns. Empty without TLS."""
asker: ContextVar[Stop | None] = ContextVar("asker", default=None)
"""A `Stop` for a `Handler` and for what it returns. It is set when nobody waits for the answer any more."""

_THREADS = 512  # most of them wait
_LOOK_S = 0.05  # the interval at which the watching thread looks at deadlines and kept answers
_WINDOW_BYTES = 256 << 10  # the most bytes on their way to a request that is not admitted
_HANDSHAKE_MS = 5000
_FILES = 256  # open files that the process needs for other things than connections
_SHOWN = 1000  # the most characters of a reason
_OUR_FAULTS = (grpc.StatusCode.INTERNAL, grpc.StatusCode.RESOURCE_EXHAUSTED)
_LOG_S = 1.0  # the least interval between two log lines about refused requests


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that an owner spends on requests.

    Attributes:
        request_bytes: the bytes of one request.
        n_requests: the requests in memory at once, including those that are being read. It holds for each method by itself.
        owed_bytes: the bytes of all answers that were not taken yet.
        take_s: the seconds that an answer may wait to be taken.
        read_s: the seconds that the reading of a request may take.
        work_s: the seconds that the work on a request may take. A caller's deadline may be earlier.
        n_connections: the connections at once. More are refused.
        idle_s: the seconds after which a connection without a request is closed.
    """

    request_bytes: int = 8 << 20
    n_requests: int = 8
    owed_bytes: int = 96 << 20
    take_s: float = 10.0
    read_s: float = 10.0
    work_s: float = 120.0
    n_connections: int = 16384
    idle_s: float = 600.0


class _From(NamedTuple):
    """Where a request comes from, as `FairShares` knows it."""

    sender: str
    connection: str

    @classmethod
    def of(cls, context: grpc.ServicerContext, names: tuple[str, ...]) -> _From:
        """Returns where a call comes from. `names` are those in its certificate."""
        peer = context.peer()  # "ipv4:10.0.0.1:50123"
        return cls(", ".join(names) or peer.rpartition(":")[0], peer)


class _Kept:
    """The answers that their receivers did not take yet."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._calls: dict[int, tuple[_From, int, float, Callable[[], object]]] = {}
        self._owed: Counter[_From] = Counter()
        self._owed_to_sender: Counter[str] = Counter()
        self._numbers = itertools.count()
        self._bytes = 0

    def keep(self, to: _From, n_bytes: int, context: grpc.ServicerContext) -> None:
        """Adds an answer that is about to be sent.

        If there are too many bytes then, calls are ended: of the sender that is owed most, those of the connection that is
        owed most. This call may be one of them.
        """
        number = next(self._numbers)
        with self._lock:
            self._calls[number] = to, n_bytes, time.monotonic(), context.cancel
            self._owed[to] += n_bytes
            self._owed_to_sender[to.sender] += n_bytes
            self._bytes += n_bytes
        if not context.add_callback(functools.partial(self._forget, number)):
            self._forget(number)
        ends: list[Callable[[], object]] = []
        with self._lock:
            while self._bytes > self._limits.owed_bytes:
                sender, _ = self._owed_to_sender.most_common(1)[0]
                most = max((to for to in self._owed if to.sender == sender), key=self._owed.__getitem__)
                for at in [at for at, call in self._calls.items() if call[0] == most]:
                    ends.append(self._drop(at))
        for end in ends:
            end()

    def _drop(self, number: int) -> Callable[[], object]:
        to, n_bytes, _, end = self._calls.pop(number)
        self._owed[to] -= n_bytes
        if not self._owed[to]:
            del self._owed[to]
        self._owed_to_sender[to.sender] -= n_bytes
        if not self._owed_to_sender[to.sender]:
            del self._owed_to_sender[to.sender]
        self._bytes -= n_bytes
        return end

    def _forget(self, number: int) -> None:
        with self._lock:
            if number in self._calls:
                self._drop(number)

    def look(self) -> None:
        """Ends the calls whose answers were not taken for `take_s` seconds."""
        late = time.monotonic() - self._limits.take_s
        with self._lock:
            ends = [self._drop(at) for at, call in list(self._calls.items()) if call[2] < late]
        for end in ends:
            end()

    @property
    def n_bytes(self) -> int:
        return self._bytes

    def __bool__(self) -> bool:
        return bool(self._calls)


@dataclass(slots=True)
class _Call:
    """What is known of one request: what is counted, and why it failed."""

    kind: str = ""
    status: grpc.StatusCode = grpc.StatusCode.UNKNOWN
    why: str = ""
    received: int = 0
    sent: int = 0


class RpcServer:
    """Listens, and answers envelopes. It is a context manager.

    A malformed request gets gRPC's status INVALID_ARGUMENT with the reason.
    No request ends the server.

    Attributes:
        address: HOST:PORT that it listens on.
        handler: answers requests. It may be replaced while the server listens.
        seen: the counters.
        is_draining: whether new requests are refused.
    """

    def __init__(
        self,
        address: str,
        handler: Handler,
        *,
        tls: Tls | None = None,
        n_workers: int = 4,
        limits: Limits | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        """Listens at once.

        Args:
            address: HOST:PORT to listen on. Port 0 takes a free port.
            handler: answers requests. Several threads call it at once.
            tls: the owner's certificate, and the authority whose callers it lets in. None lets everybody in.
            n_workers: the most requests of a method that are worked on at once.
            limits: the most that requests may cost. None takes the defaults.
            tracing: makes a span of each request, or None. It may be replaced while the server listens.

        Raises:
            TransportError: it cannot listen on the address.
            InvalidInputError: the address is malformed, or a certificate cannot be read.
        """
        host, port = parse_address(address)
        self.handler, self.tracing = handler, tracing
        self._limits = limits = limits or Limits()
        self._shares = {
            CONTROL: FairShares(n_workers, limits.n_requests),
            WORK: FairShares(n_workers, limits.n_requests),
        }
        self._later = FairShares(n_workers, _THREADS)
        self._kept = _Kept(limits)
        self.seen = RequestCounts()
        self.is_draining = False
        self._deadlines: dict[int, tuple[float, Callable[[], object]]] = {}
        self._numbers = itertools.count()
        self._seldom = _Seldom(_LOG_S)
        self._closed = False
        self._watched = threading.Event()
        self._threads = ThreadPoolExecutor(_THREADS, "cotra-rpc")
        self._server = grpc.server(self._threads, options=_options(limits), handlers=[self._methods()])
        where = join_address(host, port)
        try:
            if tls is None:
                bound = self._server.add_insecure_port(where)
            else:
                bound = self._server.add_secure_port(where, tls.for_server())
        except RuntimeError as error:
            self._server.stop(None)
            raise TransportError(f"cannot listen on {address}: {_why_not(host, port) or error}") from error
        self.address = join_address(host, bound)
        self._server.start()
        self._watch = threading.Thread(target=self._look, name="cotra-rpc-watch", daemon=True)
        self._watch.start()

    def _methods(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                name: grpc.stream_unary_rpc_method_handler(functools.partial(self._answer, name))
                for name in (CONTROL, WORK)
            },
        )

    # ---- a request ----

    def _answer(self, method: str, messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        names, begin = _names_of(context), time.perf_counter()
        came, call, reply = _From.of(context, names), _Call(), b""
        with self._span(method, context, call):
            try:
                reply = self._reply(method, messages, context, names, came, call)
                call.status, call.sent = grpc.StatusCode.OK, len(reply)
            except SearchCancelledError:
                log.debug("%s: who asked is gone", self.address)
                call.status, call.why = grpc.StatusCode.CANCELLED, "nobody waits for it any more"
            except BusyError as error:
                call.status, call.why = grpc.StatusCode.RESOURCE_EXHAUSTED, str(error)
            except DeniedError as error:
                self._seldom.warning("%s: %s was denied a request: %s", self.address, came.connection, error)
                call.status, call.why = grpc.StatusCode.PERMISSION_DENIED, str(error)
            except CotraError as error:
                self._seldom.warning("%s: a request of %s was refused: %s", self.address, came.connection, error)
                call.status, call.why = grpc.StatusCode.INVALID_ARGUMENT, f"{type(error).__name__}: {error}"
            except grpc.RpcError:
                call.status, call.why = grpc.StatusCode.CANCELLED, "the request was not read whole"
            except Exception as error:
                log.exception("%s: a request failed", self.address)
                call.status, call.why = grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error}"
        self.seen.note(call.kind, call.status.name, time.perf_counter() - begin, call.received, call.sent)
        if call.status is not grpc.StatusCode.OK:
            context.abort(call.status, call.why[:_SHOWN])
        self._kept.keep(came, len(reply), context)
        return reply

    @contextmanager
    def _span(self, method: str, context: grpc.ServicerContext, call: _Call) -> Iterator[None]:
        """Makes a span of a request, if there is tracing. The block raises nothing."""
        tracing = self.tracing
        if tracing is None:
            yield
            return
        with tracing.request(f"{SERVICE}/{method}", context.invocation_metadata()) as span:
            yield
            span.set_attributes({"cotra.message_type": call.kind, "cotra.sent_bytes": call.sent})
            tracing.set_status(span, call.status.name, call.why if call.status in _OUR_FAULTS else "")

    def _reply(
        self,
        method: str,
        messages: Iterator[bytes],
        context: grpc.ServicerContext,
        names: tuple[str, ...],
        came: _From,
        call: _Call,
    ) -> bytes:
        stop = Stop()
        with self._shares[method].admit(*came, context.cancel) as request:
            if not context.add_callback(functools.partial(self._gone, request, stop)):
                raise SearchCancelledError("who asked is gone")
            envelope = self._read(method, messages, context, call)
            request.begin_work()
            asker_names.set(names)
            reply = b"".join(self._work(envelope, method, request, stop, context, came))
        if len(reply) > MESSAGE_BYTES:
            raise BusyError(
                f"the answer of {len(reply)} bytes passes the limit of {MESSAGE_BYTES}: ask for less at once"
            )
        return reply

    def _read(
        self, method: str, messages: Iterator[bytes], context: grpc.ServicerContext, call: _Call
    ) -> VShardEnvelope:
        with self._deadline(self._limits.read_s, context.cancel):
            try:
                data = next(messages)
            except StopIteration:
                raise FormatError("a request without an envelope") from None
        call.received = len(data)
        if method == CONTROL and len(data) > CONTROL_BYTES:
            raise FormatError(f"{len(data)} bytes, and a request to {CONTROL} has {CONTROL_BYTES} at most")
        envelope = VShardEnvelope.decode(memoryview(data))
        call.kind = envelope.msg_type.name
        if not envelope.msg_type.is_request:
            raise FormatError(f"message type {envelope.msg_type} is no request")
        if is_quick(envelope.msg_type) != (method == CONTROL):
            raise FormatError(f"message type {envelope.msg_type} does not go to {method}")
        return envelope

    def _work(
        self,
        envelope: VShardEnvelope,
        method: str,
        request: Request,
        stop: Stop,
        context: grpc.ServicerContext,
        came: _From,
    ) -> list[Any]:
        left_s = context.time_remaining()
        seconds = self._limits.work_s if left_s is None else min(left_s, self._limits.work_s)
        token = asker.set(stop)
        try:
            with self._deadline(seconds, functools.partial(self._gone, request, stop)):
                if method == CONTROL:
                    made = self.handler(envelope)
                else:
                    with request.turn():
                        made = self.handler(envelope)
                if callable(made):
                    with self._later.admit(*came, context.cancel) as later, later.turn():
                        made = made()
                if isinstance(made, VShardEnvelope):
                    return made.frames()
                answer: VShardEnvelope | None = None
                while answer is None:
                    with request.turn():
                        answer = next(made)
                return answer.frames()
        finally:
            asker.reset(token)

    def _gone(self, request: Request, stop: Stop) -> None:
        stop.set()
        request.cancel()

    @contextmanager
    def _deadline(self, seconds: float, end: Callable[[], object]) -> Iterator[None]:
        """Calls `end` if the block takes longer than `seconds`."""
        number = next(self._numbers)
        self._deadlines[number] = time.monotonic() + seconds, end
        self._watched.set()
        try:
            yield
        finally:
            self._deadlines.pop(number, None)

    # ---- the watching thread ----

    def _look(self) -> None:
        """Ends what is late, every `_LOOK_S` seconds while there is a request or an answer."""
        while self._watched.wait() and not self._closed:
            time.sleep(_LOOK_S)
            now = time.monotonic()
            for number, (deadline, end) in list(self._deadlines.items()):
                if now > deadline and self._deadlines.pop(number, None) is not None:
                    end()
            for shares in (*self._shares.values(), self._later):
                if shares.is_crowded:
                    shares.look()
            self._kept.look()
            self._watched.clear()
            if self._closed or self.n_at_work or self._kept or self._deadlines:
                self._watched.set()

    @property
    def n_waiting(self) -> int:
        """The number of requests that wait to be read."""
        return sum(shares.n_outside for shares in self._shares.values())

    @property
    def owed_bytes(self) -> int:
        """The bytes of the answers that were not taken yet."""
        return self._kept.n_bytes

    @property
    def n_at_work(self) -> int:
        """The number of requests in progress, including those that wait to be read."""
        return sum(map(len, self._shares.values()))

    def drain(self, grace_s: float) -> None:
        """Stops listening, and waits for the requests in progress. New requests are refused.

        Another thread may call it meanwhile, with a shorter wait.

        Args:
            grace_s: the most seconds to wait. Requests that are in progress after that are ended.
        """
        self.is_draining = True
        self._server.stop(grace_s or None).wait()

    def close(self) -> None:
        """Stops listening, and ends the requests in progress. Idempotent."""
        self.drain(0.0)
        if self._closed:
            return
        self._closed = True
        self._watched.set()
        self._watch.join()
        self._threads.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _names_of(context: grpc.ServicerContext) -> tuple[str, ...]:
    """Returns the names in a caller's certificate: its subject alternative names, then its common name."""
    shown = context.auth_context()
    values = [*shown.get("x509_subject_alternative_name", ()), *shown.get("x509_common_name", ())]
    return tuple(dict.fromkeys(bytes(value).decode(errors="replace") for value in values))


class _Seldom:
    """Logs at most one line in `seconds` seconds, so that a sender of nonsense cannot fill a disk. It counts the others."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._next = 0.0
        self._left_out = 0

    def warning(self, text: str, *values: object) -> None:
        """Logs a warning, as a logger does."""
        now = time.monotonic()
        if now < self._next:
            self._left_out += 1
            return
        more = f" ({self._left_out} like it were not logged)" if self._left_out else ""
        self._next, self._left_out = now + self._seconds, 0
        log.warning(text + more, *values)


def _options(limits: Limits) -> list[tuple[str, Any]]:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return [
        ("grpc.max_receive_message_length", limits.request_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_concurrent_streams", 100),
        ("grpc.so_reuseport", 0),
        (
            "grpc.http2.bdp_probe",
            0,
        ),  # the windows must stay small, because unread bytes must not fill this process's memory
        ("grpc.http2.lookahead_bytes", _WINDOW_BYTES),
        ("grpc.max_allowed_incoming_connections", max(1, min(limits.n_connections, files - _FILES))),
        ("grpc.max_connection_idle_ms", round(limits.idle_s * 1000)),
        ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MS),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 1000),
        ("grpc.keepalive_permit_without_calls", 1),
    ]


def _why_not(host: str, port: int) -> str:
    """Returns why the kernel refuses to listen there, which gRPC does not say, or "" if it does not refuse."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        return str(error)
    return ""
