"""Spans of OpenTelemetry: of a search, of its calls, and of the owners' requests, which are all one trace."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

import cotra_rdma
from cotra_rdma import InvalidInputError, PartialResultError, Shard
from cotra_rdma._build.collection import build_collection
from cotra_rdma._collection.manifest import shard_paths
from cotra_rdma._core.stats import STATS_DTYPE
from cotra_rdma.datasets import open_vectors

Floats = npt.NDArray[np.float32]
SEARCH, EXPAND = "VECTOR_SCATTER_REQUEST", "VECTOR_EXPAND_REQUEST"


@pytest.fixture(scope="module")
def provider() -> TracerProvider:
    """That of this process: it can be set once."""
    provider = TracerProvider()
    trace.set_tracer_provider(provider)
    return provider


@pytest.fixture
def exporter(provider: TracerProvider) -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    processor = SimpleSpanProcessor(exporter)
    provider.add_span_processor(processor)
    yield exporter
    exporter.shutdown()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as parts:
        yield parts


@pytest.fixture
def opened(shards: list[Path], stack: ExitStack) -> list[Shard]:
    return [stack.enter_context(Shard.open(path)) for path in shards]


def of_kind(spans: tuple[ReadableSpan, ...], kind: SpanKind) -> list[ReadableSpan]:
    return [span for span in spans if span.kind is kind]


def attributes(span: ReadableSpan) -> dict[str, object]:
    return dict(span.attributes or {})


def check_one_tree(spans: tuple[ReadableSpan, ...]) -> ReadableSpan:
    """All are of one trace: a search, below it calls, and below each call its request. Returns the search."""
    (search,) = of_kind(spans, SpanKind.INTERNAL)
    calls, requests = of_kind(spans, SpanKind.CLIENT), of_kind(spans, SpanKind.SERVER)
    assert search.parent is None
    assert {span.context.trace_id for span in spans} == {search.context.trace_id}
    assert {call.parent.span_id for call in calls if call.parent} == {search.context.span_id}
    assert sorted(request.parent.span_id for request in requests if request.parent) == sorted(
        call.context.span_id for call in calls
    )
    return search


def test_a_search_is_one_trace(
    exporter: InMemorySpanExporter, opened: list[Shard], queries: Floats, stack: ExitStack
) -> None:
    servers = [stack.enter_context(cotra_rdma.serve(shard, transports=("rpc",), tracing=True)) for shard in opened]
    cluster = stack.enter_context(cotra_rdma.connect([server.address for server in servers], tracing=True))
    assert of_kind(exporter.get_finished_spans(), SpanKind.CLIENT) == [], "connect is no part of a span here"
    cluster.renew_leases()
    assert of_kind(exporter.get_finished_spans(), SpanKind.CLIENT) == [], "nor is the renewal of leases"
    exporter.clear()
    result = cluster.search(queries[:7], k=5, ef=40)
    spans = exporter.get_finished_spans()
    assert len(spans) == 1 + 2 + 2
    search = check_one_tree(spans)
    assert search.name == "cotra.search"
    assert search.status.status_code is StatusCode.UNSET
    told = attributes(search)
    assert {name: told[f"cotra.{name}"] for name in ("k", "ef", "queries", "algorithm", "coverage")} == {
        "k": 5,
        "ef": 40,
        "queries": 7,
        "algorithm": "cotra",
        "coverage": 1.0,
    }
    assert told["cotra.transports"] == ("rpc", "rpc")
    for name in STATS_DTYPE.names or ():
        assert told[f"cotra.{name}"] == result.stats[name].sum()
    for call in of_kind(spans, SpanKind.CLIENT):
        told = attributes(call)
        server = servers[int(str(told["cotra.shard"]))]
        assert f"{told['server.address']}:{told['server.port']}" == server.address
        assert (call.name, told["rpc.method"], told["rpc.system.name"]) == ("cotra.Owner/Work", call.name, "grpc")
        assert told["cotra.message_type"] == SEARCH
    for request in of_kind(spans, SpanKind.SERVER):
        assert attributes(request)["rpc.response.status_code"] == "OK"
        assert attributes(request)["cotra.message_type"] == SEARCH


def test_calls_of_other_threads_are_in_the_trace(
    exporter: InMemorySpanExporter, words: Floats, queries: Floats, tmp_path: Path, stack: ExitStack
) -> None:
    """The threads that share a search push to owners, through further threads."""
    np.save(tmp_path / "base.npy", words[:600])
    with open_vectors(tmp_path / "base.npy") as file:
        build_collection(
            file, tmp_path / "index", 2, metric="cosine", M=8, ef_construction=40, graph="global", n_threads=1
        )
    opened = [stack.enter_context(Shard.open(path)) for path in shard_paths([tmp_path / "index"])]
    servers = [stack.enter_context(cotra_rdma.serve(shard, transports=("rpc",), tracing=True)) for shard in opened]
    cluster = stack.enter_context(cotra_rdma.connect([server.address for server in servers], tracing=True))
    exporter.clear()
    assert cluster.search(queries[:20], n_threads=2).transports == ("push", "push")
    n_calls = sum(owner.calls[EXPAND]["ok"] for owner in cluster.metrics().owners)
    spans = exporter.get_finished_spans()
    check_one_tree(spans)
    assert len(of_kind(spans, SpanKind.CLIENT)) == n_calls > 4


def test_a_search_that_fails(
    exporter: InMemorySpanExporter, opened: list[Shard], queries: Floats, stack: ExitStack
) -> None:
    servers = [stack.enter_context(cotra_rdma.serve(shard, transports=("rpc",))) for shard in opened]
    cluster = stack.enter_context(cotra_rdma.connect([server.address for server in servers], tracing=True))
    servers[1].close()
    with pytest.raises(PartialResultError):
        cluster.search(queries[:3])
    with pytest.raises(InvalidInputError):
        cluster.search(queries[:3], k=0)
    spans = exporter.get_finished_spans()
    failed, refused = of_kind(spans, SpanKind.INTERNAL)
    assert failed.status.status_code is refused.status.status_code is StatusCode.ERROR
    assert attributes(failed)["error.type"] == "PartialResultError"
    assert attributes(failed)["cotra.missing"] == (1,)
    assert attributes(refused)["error.type"] == "InvalidInputError"
    good, bad = sorted(of_kind(spans, SpanKind.CLIENT), key=lambda span: str(attributes(span)["cotra.shard"]))
    assert good.status.status_code is StatusCode.UNSET
    assert bad.status.status_code is StatusCode.ERROR
    assert attributes(bad)["error.type"] == "TransportError"
    assert of_kind(spans, SpanKind.SERVER) == [], "these owners make none"


def test_an_owner_whose_handler_fails(
    exporter: InMemorySpanExporter, opened: list[Shard], queries: Floats, stack: ExitStack
) -> None:
    server = stack.enter_context(cotra_rdma.serve(opened[0], transports=("rpc",), tracing=True))
    cluster = stack.enter_context(cotra_rdma.connect(server.address))
    exporter.clear()
    server._rpc.handler = lambda request: 1 // 0  # type: ignore[assignment, return-value]
    with pytest.raises(cotra_rdma.PeerError):
        cluster.search(queries[:3])
    (request,) = exporter.get_finished_spans()
    assert request.parent is None, "its reader makes no spans"
    assert request.status.status_code is StatusCode.ERROR
    assert attributes(request)["rpc.response.status_code"] == "INTERNAL"


@pytest.mark.parametrize("header", ["", "junk", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "ff-1-1-1", "0" * 1000])
def test_malformed_headers_are_ignored(
    exporter: InMemorySpanExporter, opened: list[Shard], stack: ExitStack, header: str
) -> None:
    server = stack.enter_context(cotra_rdma.serve(opened[0], transports=("rpc",), tracing=True))
    cluster = stack.enter_context(cotra_rdma.connect(server.address))
    (connection,) = cluster._connections
    client = connection.calls._client
    assert client is not None
    exporter.clear()
    call = client.call
    headers = (("traceparent", header), ("tracestate", header), ("x-bin", b"\xff"))
    client.call = lambda envelope, timeout_ms, stop, _: call(envelope, timeout_ms, stop, headers)  # type: ignore[method-assign, assignment, arg-type]
    connection.renew()
    assert [span.parent for span in exporter.get_finished_spans()] == [None]


def test_without_tracing_nothing_is_imported(shards: list[Path]) -> None:
    code = (
        "import sys, cotra_rdma\n"
        f"with cotra_rdma.Shard.open({str(shards[0])!r}) as shard, cotra_rdma.serve(shard, transports=['rpc']) as server:\n"
        "    with cotra_rdma.connect(server.address) as cluster:\n"
        "        cluster.search(range(100))\n"
        "assert not [name for name in sys.modules if name.startswith(('opentelemetry', 'prometheus_client'))]\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)


def test_without_a_provider_nothing_is_recorded(shards: list[Path]) -> None:
    code = (
        "import cotra_rdma\n"
        f"with cotra_rdma.Shard.open({str(shards[0])!r}) as shard:\n"
        "    with cotra_rdma.serve(shard, transports=['rpc'], tracing=True) as server:\n"
        "        with cotra_rdma.connect(server.address, tracing=True) as cluster:\n"
        "            assert cluster.search(range(100)).coverage == 1.0\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, opened: list[Shard]) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    for use in (cotra_rdma.serve, cotra_rdma.connect):
        with pytest.raises(InvalidInputError, match=r"pip install 'cotra-rdma\[tracing\]'"):
            use(opened[0], tracing=True)  # type: ignore[operator]
