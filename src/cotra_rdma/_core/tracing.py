"""`Tracing`: spans of OpenTelemetry. The package is imported when a `Tracing` is made, and not before.

Spans and attributes of calls are named as OpenTelemetry's semantic conventions for RPC name them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from cotra_rdma.errors import InvalidInputError

if TYPE_CHECKING:
    from opentelemetry.trace import Span

Headers = tuple[tuple[str, str], ...]
"""Metadata of a gRPC call."""


class Tracing:
    """Makes spans with the process's tracer provider. If the process has set none, the spans record nothing.

    Any thread may use it. The span that a thread is in is that of its `contextvars` context.
    """

    def __init__(self) -> None:
        """Raises `InvalidInputError` if the package `opentelemetry-api` is missing."""
        try:
            from opentelemetry import trace
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise InvalidInputError(
                "tracing needs the package opentelemetry-api: pip install 'cotra-rdma[tracing]'"
            ) from error
        self._trace = trace
        self._tracer = trace.get_tracer("cotra_rdma")
        self._propagator = TraceContextTextMapPropagator()

    def search(self, attributes: Mapping[str, Any]) -> AbstractContextManager[Span]:
        """A span for a search of a reader."""
        return self._span("cotra.search", attributes)

    def call(self, method: str, address: str, port: int, attributes: Mapping[str, Any]) -> AbstractContextManager[Any]:
        """A span for a call of an owner. It makes none outside of every other span, as for the renewal of a lease.

        Args:
            method: gRPC's full name of the method.
            address, port: the owner's.
            attributes: others.
        """
        if not self._trace.get_current_span().get_span_context().is_valid:
            return nullcontext()
        name = method.lstrip("/")
        known = {"rpc.system.name": "grpc", "rpc.method": name, "server.address": address, "server.port": port}
        return self._span(name, {**known, **attributes}, kind=self._trace.SpanKind.CLIENT)

    @contextmanager
    def _span(self, name: str, attributes: Mapping[str, Any], **options: Any) -> Iterator[Span]:
        with self._tracer.start_as_current_span(name, attributes=attributes, **options) as span:
            try:
                yield span
            except BaseException as error:
                span.set_attribute("error.type", type(error).__name__)
                raise

    def headers(self) -> Headers:
        """What tells an owner which span asks: `traceparent` and `tracestate` (W3C Trace Context)."""
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier)
        return tuple(carrier.items())

    @contextmanager
    def request(self, method: str, headers: Iterable[tuple[str, str | bytes]]) -> Iterator[Span]:
        """A span for a request that an owner answers, below the span that asks.

        The caller sets the span's status: a refusal is no exception.

        Args:
            method: the name of gRPC's service and method.
            headers: the request's metadata. Malformed values are ignored.
        """
        above = self._propagator.extract({name: value for name, value in headers if isinstance(value, str)})
        known = {"rpc.system.name": "grpc", "rpc.method": method}
        with self._tracer.start_as_current_span(
            method, context=above, kind=self._trace.SpanKind.SERVER, attributes=known
        ) as span:
            yield span

    def set_status(self, span: Span, status: str, error: str = "") -> None:
        """Sets how a request ended.

        Args:
            span: of `request`.
            status: gRPC's.
            error: why it failed, where that was this side's fault; else "".
        """
        span.set_attribute("rpc.response.status_code", status)
        if error:
            span.set_attribute("error.type", status)
            span.set_status(self._trace.Status(self._trace.StatusCode.ERROR, error))


def tracing_of(wanted: bool) -> Tracing | None:
    """A `Tracing`, or None if none is wanted. Raises as `Tracing`."""
    return Tracing() if wanted else None
