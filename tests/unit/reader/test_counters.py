"""What a cluster counts: sums of stats however they come in, and snapshots that are JSON."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cotra_rdma._core.image_identity import ImageIdentity
from cotra_rdma._core.request_counts import LATENCY_S, Latencies, RequestCounts
from cotra_rdma._core.stats import STATS_DTYPE
from cotra_rdma._reader.counters import SEARCH, Counters, OwnerCounts
from cotra_rdma._reader.metrics import ClusterMetrics, OwnerMetrics
from cotra_rdma.errors import ChecksumError, TransportError


def test_latencies_are_counted_by_their_bounds() -> None:
    counts = RequestCounts()
    for seconds in (0.0, LATENCY_S[0], LATENCY_S[0] * 1.01, 1e9):
        counts.note("a", "OK", seconds, 1, 2)
    counts.note("b", "UNKNOWN", 0.5)
    told = counts.latencies()
    assert told["a"].counts == (2, 1, *(0 for _ in LATENCY_S[2:]), 1)
    assert told["b"].total_s == 0.5
    assert (counts.received_bytes, counts.sent_bytes) == (4, 8)
    assert counts.by_kind() == {"a": {"OK": 4}, "b": {"UNKNOWN": 1}}


@pytest.mark.parametrize("sizes", [[1] * 2500, [4000, 1], []])
def test_stats_are_summed_up_in_batches(sizes: list[int]) -> None:
    """Also past 32 bits, and also where who has the result writes to it."""
    generator, counters = np.random.default_rng(1), Counters()
    expected = dict.fromkeys(STATS_DTYPE.names or (), 0)
    for size in sizes:
        stats = generator.integers(0, 256, (size, STATS_DTYPE.itemsize), np.uint8).view(STATS_DTYPE)[:, 0]
        stats["read_bytes"] >>= np.uint64(16)  # sums of them fit in 64 bits
        stats["latency_ns"] >>= np.uint64(16)
        for name in expected:
            expected[name] += sum(stats[name].tolist())
        counters.note_search("ok", size, 0.001, stats)
        stats[:] = 0
    assert counters.stats() == expected
    assert counters.stats() == expected
    assert counters.queries().get("ok", 0) == sum(sizes)


def test_threads_lose_no_count() -> None:
    counters = Counters()

    def work(_: int) -> None:
        for _ in range(200):
            counters.note_search("ok", 3, 0.0, np.ones(3, STATS_DTYPE))
            counters.of(0, "a").note("resent")
            counters.of(0, "a").note_failure(ChecksumError("torn"))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert counters.stats()["reads"] == 4 * 200 * 3
    assert counters.searches.by_kind() == {SEARCH: {"ok": 800}}
    assert counters.of(0, "a").snapshot() == ({"resent": 800}, {"ChecksumError": 800})
    assert counters.of(1, "a").snapshot() == ({}, {})


def test_an_owner_is_away_since_it_was_away_first() -> None:
    counts = OwnerCounts()
    counts.note_reached(ImageIdentity(1, 2, 3))
    reached = counts.since
    counts.note_away(TransportError("gone"))
    away = counts.since
    counts.note_away(TransportError("still gone"))
    assert (counts.since, counts.error) == (away, "still gone")
    assert away >= reached
    counts.note_reached(ImageIdentity(1, 2, 3))
    assert counts.error == ""
    assert counts.since >= away


def test_a_snapshot_is_json() -> None:
    latencies = Latencies()
    owner = OwnerMetrics(
        shard=0,
        address="a:1",
        state="in use",
        path="rpc",
        since=1.0,
        error="",
        image=ImageIdentity(2**64 - 1, 3, 255),
        connections=1,
        resent=0,
        renewed=2,
        not_renewed=0,
        replaced=0,
        failures={"ChecksumError": 1},
        calls={"VECTOR_SCATTER_REQUEST": {"ok": 2}},
        call_latencies={"VECTOR_SCATTER_REQUEST": latencies},
    )
    told = ClusterMetrics(1.0, {"ok": 1}, {"ok": 5}, latencies, {"reads": 7}, 0, {1: "gone"}, (owner,))
    plain = told.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["owners"][0]["image"] == {"lineage": "f" * 16, "generation": 3, "checksum": f"{255:016x}"}
    assert plain["lost"] == {"1": "gone"}
    assert plain["search_latencies"] == {"counts": [0] * (len(LATENCY_S) + 1), "total_s": 0.0}
