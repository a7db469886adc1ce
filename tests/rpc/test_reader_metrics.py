"""What a reader has done, in numbers: `Cluster.metrics`, and its export to Prometheus."""

from __future__ import annotations

import gc
import json
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

import cotra_rdma
from cotra_rdma import Cluster, CotraError, InvalidInputError, OwnerMetrics, Shard, TransportError
from cotra_rdma._core.stats import STATS_DTYPE
from cotra_rdma._owner.metrics import MetricsServer
from cotra_rdma._reader import upkeep
from cotra_rdma.errors import BusyError
from cotra_rdma.protocol.envelope import VShardEnvelope
from helpers.faults import FaultyFabric

Floats = npt.NDArray[np.float32]
SEARCH = "VECTOR_SCATTER_REQUEST"


@pytest.fixture(autouse=True)
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Owners are looked for when a test says so, and not by the clock."""
    monkeypatch.setattr(upkeep, "LOOK_S", 3600.0)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as parts:
        yield parts


@pytest.fixture
def opened(shards: list[Path], stack: ExitStack) -> list[Shard]:
    return [stack.enter_context(Shard.open(path)) for path in shards]


def owner_at(cluster: Cluster, address: str) -> OwnerMetrics:
    (found,) = [owner for owner in cluster.metrics().owners if owner.address == address]
    return found


def samples(registry: CollectorRegistry) -> dict[tuple[str, ...], float]:
    """Every sample by its name and its labels, as name=value; empty ones are left out."""
    found = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            labels = sorted(f"{name}={value}" for name, value in sample.labels.items() if value)
            assert (sample.name, *labels) not in found
            found[(sample.name, *labels)] = sample.value
    return found


def test_searches_are_counted(opened: list[Shard], queries: Floats, stack: ExitStack) -> None:
    read = stack.enter_context(cotra_rdma.serve(opened[0], transports=("shm", "rpc")))
    asked = stack.enter_context(cotra_rdma.serve(opened[1], transports=("rpc",)))
    cluster = stack.enter_context(cotra_rdma.connect([read.address, asked.address]))
    before = cluster.metrics()
    assert (before.searches, before.queries, before.lost) == ({}, {}, {})
    assert set(before.stats.values()) == {0}
    results = [cluster.search(queries[:n], n_threads=2) for n in (1, 20, 200)]
    answer = cluster.walk(queries[:7])
    cluster.knn_query(queries[:2])
    with pytest.raises(InvalidInputError):
        cluster.search(queries[:, :5])
    told = cluster.metrics()
    assert told.searches == {"ok": 5, "InvalidInputError": 1}
    assert told.queries == {"ok": 1 + 20 + 200 + 7 + 2, "InvalidInputError": 0}
    assert sum(told.search_latencies.counts) == 6
    for name in STATS_DTYPE.names or ():
        if name != "latency_ns":
            stats = [*(result.stats for result in results), answer[2], cluster.search(queries[:2], 1).stats]
            assert told.stats[name] == sum(int(each[name].sum()) for each in stats)
    assert told.stats["reads"] > 0 < told.stats["rounds"]
    assert [(owner.state, owner.path, owner.error) for owner in told.owners] == [
        ("in use", "shm", ""),
        ("in use", "rpc", ""),
    ]
    assert [owner.image for owner in told.owners] == [shard.info.identity for shard in opened]
    assert [owner.connections for owner in told.owners] == [1, 1]
    assert SEARCH not in told.owners[0].calls
    assert told.owners[1].calls[SEARCH] == {"ok": 4}
    assert sum(told.owners[1].call_latencies[SEARCH].counts) == 4
    cluster.renew_leases()
    assert owner_at(cluster, asked.address).renewed == 1
    json.dumps(told.to_dict())


def test_a_shard_of_this_process(opened: list[Shard], queries: Floats) -> None:
    with cotra_rdma.connect(opened) as cluster:
        cluster.search(queries[:5])
        told = cluster.metrics()
    assert told.stats["own"] > 0 == told.stats["reads"]
    assert [(owner.address, owner.path, owner.calls) for owner in told.owners] == [("own", "own", {})] * 2
    assert cluster.metrics().searches == {"ok": 1}, "it can be asked when all is closed"


def test_an_owner_that_dies_and_comes_back(opened: list[Shard], queries: Floats, stack: ExitStack) -> None:
    first, second = (stack.enter_context(cotra_rdma.serve(opened[0], transports=("rpc",))) for _ in range(2))
    cluster = stack.enter_context(cotra_rdma.connect([[first.address, second.address]], transport="rpc"))
    used, spare = cluster.metrics().owners
    if used.state != "in use":
        used, spare = spare, used
    assert (spare.state, spare.path) == ("standby", "")
    dying = first if used.address == first.address else second
    dying.close()
    assert cluster.search(queries[:3]).coverage == 1.0
    gone = owner_at(cluster, used.address)
    assert (gone.state, gone.path, gone.replaced) == ("away", "", 1)
    assert gone.failures == {"TransportError": 1}
    assert gone.calls[SEARCH] == {"TransportError": 1}
    assert "nobody listens" in gone.error
    assert gone.since >= used.since
    assert owner_at(cluster, spare.address).state == "in use"
    again = stack.enter_context(cotra_rdma.serve(opened[0], used.address, transports=("rpc",)))
    assert cluster.revive() == [again.address]
    back = owner_at(cluster, used.address)
    assert (back.state, back.error) == ("standby", "")
    assert back.connections > 1
    assert back.since >= gone.since
    assert cluster.metrics().searches == {"ok": 1}


def test_a_shard_that_is_lost(opened: list[Shard], queries: Floats, stack: ExitStack) -> None:
    servers = [stack.enter_context(cotra_rdma.serve(shard, transports=("rpc",))) for shard in opened]
    cluster = stack.enter_context(cotra_rdma.connect([server.address for server in servers]))
    servers[1].close()
    with pytest.raises(TransportError):
        cluster.search(queries[:3])
    told = cluster.metrics()
    assert told.searches == {"PartialResultError": 1}
    assert told.stats["expansions"] > 0, "what the other one answered"
    assert owner_at(cluster, servers[1].address).state == "in use", (
        "nothing was given up: it is tried by the next search"
    )
    cluster.search(queries[:4], allow_partial=True)
    told = cluster.metrics()
    assert told.searches == {"PartialResultError": 1, "partial": 1}
    assert told.queries == {"PartialResultError": 3, "partial": 4}
    assert set(told.lost) == {1}
    assert [owner.state for owner in told.owners] == ["in use", "away"]
    assert told.owners[1].failures == {"TransportError": 2}
    cluster.renew_leases()


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ({"corrupt_every": 50}, "ChecksumError"),
        ({"fail_after_reads": 50, "fail_status": -10, "fail_wc_status": 12}, "CompletionError"),
    ],
)
def test_reads_that_fail(
    opened: list[Shard], queries: Floats, stack: ExitStack, fault: dict[str, int], error: str
) -> None:
    server = stack.enter_context(cotra_rdma.serve(opened[0], transports=("shm", "rpc")))
    cluster = stack.enter_context(cotra_rdma.connect(server.address))
    connection = cluster._connections[0]
    assert connection._first is not None
    connection._first[1].close()
    connection._fabric, connection._first = FaultyFabric(**fault), None
    with pytest.raises(CotraError):
        cluster.search(queries)
    told = cluster.metrics()
    assert told.searches == {error: 1}
    assert told.owners[0].failures == {error: 1}
    assert SEARCH not in told.owners[0].calls


def test_an_owner_with_another_image(opened: list[Shard], words: Floats, queries: Floats, stack: ExitStack) -> None:
    server = stack.enter_context(cotra_rdma.serve(opened[0], transports=("rpc",)))
    cluster = stack.enter_context(cotra_rdma.connect(server.address))
    with Shard.build(words[:300], metric="cosine", generation=2) as other:
        server.close()
        stack.enter_context(cotra_rdma.serve(other, server.address, transports=("rpc",)))
        assert cluster.search(queries[:3]).images == (other.info.image_checksum,)
        told = cluster.metrics()
        assert (told.followed, told.searches) == (1, {"ok": 1})
        assert told.owners[0].image == other.info.identity
        assert told.owners[0].calls[SEARCH] == {"StaleShardError": 1, "ok": 1}
        assert told.owners[0].connections >= 2
        assert told.to_dict()["owners"][0]["image"]["generation"] == 2
        cluster.close()


def test_a_lease_that_is_not_renewed(opened: list[Shard], stack: ExitStack) -> None:
    server = stack.enter_context(cotra_rdma.serve(opened[0], transports=("shm", "rpc")))
    cluster = stack.enter_context(cotra_rdma.connect(server.address))
    cluster.renew_leases()
    server.close()
    cluster.renew_leases()
    (owner,) = cluster.metrics().owners
    assert (owner.renewed, owner.not_renewed, owner.state) == (1, 1, "in use")


def test_an_owner_that_is_busy(opened: list[Shard], queries: Floats, stack: ExitStack) -> None:
    server = stack.enter_context(cotra_rdma.serve(opened[0], transports=("rpc",)))
    answer = server._rpc.handler

    def handle(request: VShardEnvelope) -> Any:
        if request.msg_type.name == SEARCH:
            raise BusyError("too much to do")
        return answer(request)

    cluster = stack.enter_context(cotra_rdma.connect(server.address))
    server._rpc.handler = handle
    with pytest.raises(BusyError):
        cluster.search(queries[:3])
    told = cluster.metrics()
    assert told.searches == {"BusyError": 1}
    assert told.owners[0].calls[SEARCH] == {"BusyError": 1}


def test_an_owner_that_was_never_reached(opened: list[Shard], stack: ExitStack) -> None:
    server = stack.enter_context(cotra_rdma.serve(opened[0], transports=("rpc",)))
    cluster = stack.enter_context(cotra_rdma.connect([[server.address, "127.0.0.1:1"]]))
    gone = owner_at(cluster, "127.0.0.1:1")
    assert (gone.state, gone.path, gone.image) == ("away", "", None)
    assert "nobody listens" in gone.error


def test_export(opened: list[Shard], queries: Floats, stack: ExitStack) -> None:
    server = stack.enter_context(cotra_rdma.serve(opened[1], transports=("rpc",)))
    registry = CollectorRegistry()
    cluster = cotra_rdma.connect([opened[0], server.address])
    cotra_rdma.register_metrics({"words": cluster}, registry)
    cluster.search(queries[:5])
    with pytest.raises(InvalidInputError):
        cluster.search(queries[:5], k=0)
    found, told = samples(registry), cluster.metrics()
    here = ("cluster=words",)
    assert found["cotra_reader_searches_total", *here, "outcome=ok"] == 1
    assert found["cotra_reader_searches_total", *here, "outcome=InvalidInputError"] == 1
    assert found["cotra_reader_queries_total", *here, "outcome=ok"] == 5
    assert found["cotra_reader_search_seconds_count", *here] == 2
    assert found["cotra_reader_own_records_total", *here] == told.stats["own"] > 0
    assert found["cotra_reader_read_bytes_total", *here] == told.stats["read_bytes"] > 0
    assert found["cotra_reader_query_seconds_total", *here] == pytest.approx(told.stats["latency_ns"] / 1e9)
    assert found["cotra_reader_lost_shards", *here] == 0
    owner = (f"address={server.address}", *here, "shard=1")
    assert found["cotra_reader_owner_away", *owner] == 0
    assert found["cotra_reader_owner_connections_total", *owner] == 1
    calls = (f"address={server.address}", *here, "outcome=ok", "shard=1", f"type={SEARCH}")
    assert found["cotra_reader_calls_total", *calls] == 1
    identity = opened[1].info.identity
    assert (
        "cotra_reader_owner_info",
        f"address={server.address}",
        f"checksum={identity.checksum:016x}",
        *here,
        f"generation={identity.generation}",
        f"lineage={identity.lineage:016x}",
        "path=rpc",
        "shard=1",
        "state=in use",
    ) in found
    cluster.close()
    assert samples(registry)["cotra_reader_searches_total", *here, "outcome=ok"] == 1
    del cluster, told
    gc.collect()
    assert samples(registry) == {}, "the registry kept it alive"


def test_the_metrics_of_an_owner_that_also_reads(opened: list[Shard], queries: Floats, stack: ExitStack) -> None:
    cluster = stack.enter_context(cotra_rdma.connect(opened))
    cluster.search(queries[:5])
    metrics = stack.enter_context(MetricsServer("127.0.0.1:0", [], lambda: {"peers": cluster}))
    with urllib.request.urlopen(f"http://{metrics.address}/metrics", timeout=30) as answer:
        assert 'cotra_reader_queries_total{cluster="peers",outcome="ok"} 5.0' in answer.read().decode()


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, opened: list[Shard]) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with (
        cotra_rdma.connect(opened) as cluster,
        pytest.raises(InvalidInputError, match=r"pip install 'cotra-rdma\[metrics\]'"),
    ):
        cotra_rdma.register_metrics(cluster)
