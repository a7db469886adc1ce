"""`MetricsServer`: an owner's metrics for Prometheus, its health and its readiness, over HTTP."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from cotra_rdma._core.prometheus import add_latencies, prometheus
from cotra_rdma._owner.server import Server
from cotra_rdma._reader.cluster import Cluster
from cotra_rdma._reader.exporter import ReaderCollector
from cotra_rdma.errors import TransportError
from cotra_rdma.protocol.address import join_address, parse_address

if TYPE_CHECKING:
    from prometheus_client.core import Metric


class MetricsServer:
    """Answers `/metrics`, `/healthz` and `/readyz` for the servers and readers of one process. It is a context manager.

    `/healthz` is 200 as long as the process answers.
    `/readyz` is 200 as long as all servers take new requests, and 503 afterwards.

    Attributes:
        address: HOST:PORT that it listens on.
    """

    def __init__(
        self, address: str, servers: Sequence[Server], readers: Callable[[], Mapping[str, Cluster]] | None = None
    ) -> None:
        """Listens at once.

        Args:
            address: HOST:PORT to listen on. Port 0 takes a free port.
            servers: the servers. They stay the caller's.
            readers: returns the clusters of this process, by the names that they have in the label `cluster`. None if there
                are none.

        Raises:
            TransportError: it cannot listen on the address.
            InvalidInputError: the address is malformed, or the package `prometheus-client` is missing.
        """
        client = prometheus()
        registry = client.CollectorRegistry()
        registry.register(_Collector(servers))
        if readers is not None:
            registry.register(ReaderCollector(readers))

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/metrics":
                    self._answer(200, client.generate_latest(registry), client.CONTENT_TYPE_LATEST)
                elif self.path == "/healthz":
                    self._answer(200, b"ok\n")
                elif self.path == "/readyz":
                    ready = all(server.is_ready for server in servers)
                    self._answer(200 if ready else 503, b"ready\n" if ready else b"draining\n")
                else:
                    self._answer(404, b"there are /metrics, /healthz and /readyz\n")

            def _answer(self, status: int, body: bytes, kind: str = "text/plain; charset=utf-8") -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Logs nothing, because a scraper asks every few seconds."""

        host, port = parse_address(address)
        Handler.timeout = 5.0
        try:
            self._http = ThreadingHTTPServer((host, port), Handler)
        except OSError as error:
            raise TransportError(f"cannot listen on {address} for metrics: {error}") from error
        self._http.daemon_threads = True
        self.address = join_address(host, self._http.server_address[1])
        self._thread = threading.Thread(target=self._http.serve_forever, name="cotra-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops listening. Idempotent."""
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class _Collector:
    """Turns the servers' counters into metrics when somebody asks, so that a request costs only the counting."""

    def __init__(self, servers: Sequence[Server]) -> None:
        self._servers = servers

    def collect(self) -> Iterator[Metric]:
        """Yields all metrics, as a collector of prometheus_client does."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        requests = CounterMetricFamily(
            "cotra_requests",
            "Requests over RPC, by message type and gRPC status.",
            labels=["address", "type", "status"],
        )
        latency = HistogramMetricFamily(
            "cotra_request_seconds", "From a request's arrival to its answer.", labels=["address", "type"]
        )
        received = CounterMetricFamily("cotra_received_bytes", "Bytes of requests.", labels=["address"])
        sent = CounterMetricFamily("cotra_sent_bytes", "Bytes of answers.", labels=["address"])
        gauges: dict[str, Any] = {
            name: GaugeMetricFamily(f"cotra_{name}", text, labels=["address"])
            for name, text in (
                ("requests_in_progress", "Requests that were not answered yet."),
                ("requests_waiting", "Those of them that wait to be read."),
                ("owed_bytes", "Bytes of answers that nobody has taken yet."),
                ("queue_pairs", "Queue pairs that readers hold."),
                ("readers_with_leases", "Readers that hold queue pairs."),
                (
                    "images",
                    "Images that are published: the one that is served, and those before it that leases may still hold.",
                ),
                ("ready", "1 as long as new requests are taken."),
            )
        }
        reaped = CounterMetricFamily(
            "cotra_reaped_queue_pairs", "Queue pairs that were taken back from silent readers.", labels=["address"]
        )
        image = GaugeMetricFamily(
            "cotra_image_info",
            "1, with what is served.",
            labels=["address", "checksum", "generation", "lineage", "dim", "metric", "count", "transports"],
        )
        for server in self._servers:
            at, seen = server.address, server.seen
            for kind, by_status in seen.by_kind().items():
                for status, count in by_status.items():
                    requests.add_metric([at, kind, status], count)
            for kind, latencies in seen.latencies().items():
                add_latencies(latency, [at, kind], latencies)
            received.add_metric([at], seen.received_bytes)
            sent.add_metric([at], seen.sent_bytes)
            for name, value in server.gauges().items():
                gauges[name].add_metric([at], value)
            reaped.add_metric([at], server.n_reaped)
            info = server.shard.info
            image.add_metric(
                [
                    at,
                    f"{info.image_checksum:016x}",
                    str(info.generation),
                    f"{info.graph_id:016x}",
                    str(info.dim),
                    info.metric,
                    str(info.count),
                    ",".join(server.transports),
                ],
                1,
            )
        yield from (requests, latency, received, sent, *gauges.values(), reaped, image)
