"""What can be seen of an owner over HTTP."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import numpy as np
import numpy.typing as npt
import pytest
from prometheus_client.parser import text_string_to_metric_families

import cotra_rdma
from cotra_rdma import Server, Shard, TransportError
from cotra_rdma._core.request_counts import LATENCY_S, RequestCounts
from cotra_rdma._owner.metrics import MetricsServer

Floats = npt.NDArray[np.float32]


@pytest.fixture
def server(words: Floats) -> Iterator[Server]:
    with Shard.build(words[:500], metric="cosine") as shard, cotra_rdma.serve(shard, transports=("rpc",)) as server:
        yield server


def get(address: str, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def samples(address: str) -> dict[tuple[str, ...], float]:
    """Every sample by its name and the values of its labels, but the address."""
    found = {}
    for family in text_string_to_metric_families(get(address, "/metrics")[1]):
        for sample in family.samples:
            labels = [value for name, value in sorted(sample.labels.items()) if name != "address"]
            found[(sample.name, *labels)] = sample.value
    return found


def test_requests_are_counted(server: Server, words: Floats) -> None:
    with MetricsServer("127.0.0.1:0", [server]) as metrics:
        assert samples(metrics.address)["cotra_ready",] == 1
        with cotra_rdma.connect(server.address, transport="rpc") as cluster:
            for _ in range(3):
                cluster.search(words[:4])
            with pytest.raises(cotra_rdma.PeerError):
                cluster._connections[0].calls.ask(77)
        found = samples(metrics.address)
    kind = "VECTOR_SCATTER_REQUEST"
    assert found["cotra_requests_total", "OK", kind] == 3
    assert found["cotra_request_seconds_count", kind] == 3
    assert found["cotra_request_seconds_bucket", "+Inf", kind] == 3
    assert found["cotra_requests_total", "OK", "VECTOR_MEM_REGION_REQUEST"] >= 2
    assert found["cotra_received_bytes_total",] > 3 * 4 * words.shape[1]
    assert found["cotra_sent_bytes_total",] > 0
    assert found["cotra_requests_in_progress",] == 0
    info = next(key for key in found if key[0] == "cotra_image_info")
    assert f"{server.shard.info.image_checksum:016x}" in info


def test_what_is_refused_is_counted_by_its_status(server: Server) -> None:
    with grpc.insecure_channel(server.address) as channel:
        for method in ("Work", "Control"):
            with pytest.raises(grpc.RpcError):
                channel.unary_unary(f"/cotra.Owner/{method}", None, None)(b"junk", timeout=30)
    assert server.seen.requests["", "INVALID_ARGUMENT"] == 2


def test_health_and_readiness(server: Server) -> None:
    with MetricsServer("127.0.0.1:0", [server]) as metrics:
        assert get(metrics.address, "/healthz") == (200, "ok\n")
        assert get(metrics.address, "/readyz") == (200, "ready\n")
        assert get(metrics.address, "/else")[0] == 404
        server.drain(0.0)
        assert get(metrics.address, "/healthz")[0] == 200
        assert get(metrics.address, "/readyz") == (503, "draining\n")


def test_an_address_in_use(server: Server) -> None:
    with (
        MetricsServer("127.0.0.1:0", [server]) as metrics,
        pytest.raises(TransportError, match=r"cannot listen on .* for metrics"),
    ):
        MetricsServer(metrics.address, [server])


def test_buckets() -> None:
    seen = RequestCounts()
    for seconds in (0.0, LATENCY_S[0], LATENCY_S[0] * 1.01, 1e9):
        seen.note("a", "OK", seconds, 1, 2)
    assert seen.latencies()["a"].counts[:2] == (2, 1)
    assert seen.latencies()["a"].counts[-1] == 1
    assert (seen.received_bytes, seen.sent_bytes) == (4, 8)


def test_the_command_line(words: Floats, tmp_path: Path) -> None:
    with Shard.build(words[:200], metric="cosine") as shard:
        shard.save(tmp_path / "shard.cotra")
    command = [sys.executable, "-m", "cotra_rdma.cli", "serve", str(tmp_path / "shard.cotra"), "--json"]
    with (
        subprocess.Popen([*command, "--metrics", "127.0.0.1:0"], stdout=subprocess.PIPE) as owner,
        ExitStack() as stack,
    ):
        stack.callback(owner.kill)
        assert owner.stdout is not None
        ready = json.loads(owner.stdout.readline())
        assert get(ready["metrics"], "/readyz")[0] == 200
        assert ("cotra_queue_pairs",) in samples(ready["metrics"])
        owner.send_signal(signal.SIGTERM)
        assert owner.wait() == 0
