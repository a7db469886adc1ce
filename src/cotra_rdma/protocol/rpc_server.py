"""`RpcServer`: an owner's side of the RPC. It knows gRPC and envelopes, and nothing of what is in them.

gRPC bounds the bytes of a message before it reads it, tells the deadline of who asks, and says when who asks is gone.
What it does not do is here: it bounds what all requests and all answers take together, and it is fair to connections.

A request is read when it is let in (`FairShares`), and not before: what was not let in waits in its sender.
An answer is kept until its receiver has taken it. Where the kept ones are too many bytes, who is owed most loses its own.
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
from typing import Any, Self

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
"""What makes an answer that needs those of other owners. It has workers of its own: were all workers of owners that ask each
other busy waiting, none would be left to answer."""
Steps = Iterator[VShardEnvelope | None]
"""Work in short steps, each of which gives None, but the last one, which gives the answer. Others have a turn in between."""
Handler = Callable[[VShardEnvelope], VShardEnvelope | Later | Steps]

asker_names: ContextVar[tuple[str, ...]] = ContextVar("asker_names", default=())
"""In a `Handler`, and in what it returns: the names in the certificate of who asks; empty without TLS."""
asker: ContextVar[Stop | None] = ContextVar("asker", default=None)
"""In a `Handler`, and in what it returns: set when nobody waits for the answer any more."""

_THREADS = 512  # that wait, most of them
_LOOK_S = 0.05
_WINDOW_BYTES = 256 << 10  # of what may be on its way to a request that was not let in
_HANDSHAKE_MS = 5000
_FILES = 256  # that the process needs for other things
_SHOWN = 1000  # characters of a reason
_OUR_FAULTS = (grpc.StatusCode.INTERNAL, grpc.StatusCode.RESOURCE_EXHAUSTED)
_LOG_S = 1.0  # between two lines about messages that were refused


@dataclass(frozen=True, slots=True)
class Limits:
    """What an owner spends on requests, at most.

    Attributes:
        request_bytes: of one request.
        n_requests: in memory at once, those that are being read included; twice: quick ones, and others.
        owed_bytes: of answers that were not taken yet, all together.
        take_s: how long an answer may wait to be taken.
        read_s: how long a request may take to be read.
        work_s: how long it may be worked on, where who asks gives no deadline.
        n_connections: at once; more are refused.
        idle_s: after which a connection without a request is closed.
    """

    request_bytes: int = 8 << 20
    n_requests: int = 8
    owed_bytes: int = 96 << 20
    take_s: float = 10.0
    read_s: float = 10.0
    work_s: float = 120.0
    n_connections: int = 16384
    idle_s: float = 600.0


class _Kept:
    """Answers that their receivers did not take yet."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._calls: dict[int, tuple[str, int, float, Callable[[], object]]] = {}
        self._owed: Counter[str] = Counter()
        self._numbers = itertools.count()
        self._bytes = 0

    def keep(self, connection: str, n_bytes: int, context: grpc.ServicerContext) -> None:
        """Notes an answer that is about to be sent. Too many: the calls of who is owed most end, this one too, maybe."""
        number = next(self._numbers)
        with self._lock:
            self._calls[number] = connection, n_bytes, time.monotonic(), context.cancel
            self._owed[connection] += n_bytes
            self._bytes += n_bytes
        if not context.add_callback(functools.partial(self._forget, number)):
            self._forget(number)
        ends: list[Callable[[], object]] = []
        with self._lock:
            while self._bytes > self._limits.owed_bytes:
                most, _ = self._owed.most_common(1)[0]
                for at in [at for at, call in self._calls.items() if call[0] == most]:
                    ends.append(self._drop(at))
        for end in ends:
            end()

    def _drop(self, number: int) -> Callable[[], object]:
        connection, n_bytes, _, end = self._calls.pop(number)
        self._owed[connection] -= n_bytes
        if self._owed[connection] <= 0:
            del self._owed[connection]
        self._bytes -= n_bytes
        return end

    def _forget(self, number: int) -> None:
        with self._lock:
            if number in self._calls:
                self._drop(number)

    def look(self) -> None:
        """Ends calls whose answers nobody takes."""
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
    """What is counted and told of one request."""

    kind: str = ""
    status: grpc.StatusCode = grpc.StatusCode.UNKNOWN
    why: str = ""
    received: int = 0
    sent: int = 0


class RpcServer:
    """Answers envelopes. A request that is malformed gets gRPC's INVALID_ARGUMENT with the reason; nothing ends the server."""

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
            address: HOST:PORT; port 0 takes a free one.
            handler: makes the answer to a request; it may be replaced while the server listens.
            tls: the owner's certificate, and whom it lets in; None: everybody.
            n_workers: requests that are worked on at once.
            limits: what requests may cost.
            tracing: makes a span of each request; it may be replaced, too. None makes none.

        Raises:
            TransportError: the address cannot be listened on. InvalidInputError: a bad address or certificate.
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
        connection, begin = context.peer(), time.perf_counter()
        call, reply = _Call(), b""
        with self._span(method, context, call):
            try:
                reply = self._reply(method, messages, context, connection, call)
                call.status, call.sent = grpc.StatusCode.OK, len(reply)
            except SearchCancelledError:
                log.debug("%s: who asked is gone", self.address)
                call.status, call.why = grpc.StatusCode.CANCELLED, "nobody waits for it any more"
            except BusyError as error:
                call.status, call.why = grpc.StatusCode.RESOURCE_EXHAUSTED, str(error)
            except DeniedError as error:
                self._seldom.warning("%s: %s was denied a request: %s", self.address, connection, error)
                call.status, call.why = grpc.StatusCode.PERMISSION_DENIED, str(error)
            except CotraError as error:
                self._seldom.warning("%s: a request of %s was refused: %s", self.address, connection, error)
                call.status, call.why = grpc.StatusCode.INVALID_ARGUMENT, f"{type(error).__name__}: {error}"
            except grpc.RpcError:
                call.status, call.why = grpc.StatusCode.CANCELLED, "the request was not read whole"
            except Exception as error:
                log.exception("%s: a request failed", self.address)
                call.status, call.why = grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error}"
        self.seen.note(call.kind, call.status.name, time.perf_counter() - begin, call.received, call.sent)
        if call.status is not grpc.StatusCode.OK:
            context.abort(call.status, call.why[:_SHOWN])
        self._kept.keep(connection, len(reply), context)
        return reply

    @contextmanager
    def _span(self, method: str, context: grpc.ServicerContext, call: _Call) -> Iterator[None]:
        """Makes a span of a request, where spans are wanted. A request ends in it, and raises nothing."""
        tracing = self.tracing
        if tracing is None:
            yield
            return
        with tracing.request(f"{SERVICE}/{method}", context.invocation_metadata()) as span:
            yield
            span.set_attributes({"cotra.message_type": call.kind, "cotra.sent_bytes": call.sent})
            tracing.set_status(span, call.status.name, call.why if call.status in _OUR_FAULTS else "")

    def _reply(
        self, method: str, messages: Iterator[bytes], context: grpc.ServicerContext, connection: str, call: _Call
    ) -> bytes:
        stop = Stop()
        with self._shares[method].admit(connection, context.cancel) as request:
            if not context.add_callback(functools.partial(self._gone, request, stop)):
                raise SearchCancelledError("who asked is gone")
            envelope = self._read(method, messages, context, call)
            request.begin_work()
            reply = b"".join(self._work(envelope, method, request, stop, context, connection))
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
        connection: str,
    ) -> list[Any]:
        left_s = context.time_remaining()
        seconds = self._limits.work_s if left_s is None else min(left_s, self._limits.work_s)
        token = asker.set(stop)
        asker_names.set(_names_of(context))
        try:
            with self._deadline(seconds, functools.partial(self._gone, request, stop)):
                if method == CONTROL:
                    made = self.handler(envelope)
                else:
                    with request.turn():
                        made = self.handler(envelope)
                if callable(made):
                    with self._later.admit(connection, context.cancel) as later, later.turn():
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
        """Calls `end` where the block takes longer."""
        number = next(self._numbers)
        self._deadlines[number] = time.monotonic() + seconds, end
        self._watched.set()
        try:
            yield
        finally:
            self._deadlines.pop(number, None)

    # ---- beside the requests ----

    def _look(self) -> None:
        """What the watching thread does: some times a second, as long as there is any request or answer."""
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
        """Requests that wait to be read."""
        return sum(shares.n_outside for shares in self._shares.values())

    @property
    def owed_bytes(self) -> int:
        """Of answers that were not taken yet."""
        return self._kept.n_bytes

    @property
    def n_at_work(self) -> int:
        """Requests that were not answered yet, those that wait to be read included."""
        return sum(map(len, self._shares.values()))

    def drain(self, grace_s: float) -> None:
        """Stops listening. New requests are refused; those in progress have `grace_s` seconds, and are ended then.

        Another thread may call it with less grace meanwhile.
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
    """The names in the certificate that a connection showed: those of its SAN, then its common name."""
    shown = context.auth_context()
    values = [*shown.get("x509_subject_alternative_name", ()), *shown.get("x509_common_name", ())]
    return tuple(dict.fromkeys(bytes(value).decode(errors="replace") for value in values))


class _Seldom:
    """Logs at most a line in so many seconds, and how many were left out: who sends nonsense must not fill a disk."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._next = 0.0
        self._left_out = 0

    def warning(self, text: str, *values: object) -> None:
        """As a logger's."""
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
        ("grpc.http2.bdp_probe", 0),  # windows stay small: what was not read is not in this process's memory
        ("grpc.http2.lookahead_bytes", _WINDOW_BYTES),
        ("grpc.max_allowed_incoming_connections", max(1, min(limits.n_connections, files - _FILES))),
        ("grpc.max_connection_idle_ms", round(limits.idle_s * 1000)),
        ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MS),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 1000),
        ("grpc.keepalive_permit_without_calls", 1),
    ]


def _why_not(host: str, port: int) -> str:
    """What the kernel says to who wants to listen there; gRPC does not tell."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        return str(error)
    return ""
