"""No libibverbs that can be loaded: verbs says why, and everything else works."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cotra_rdma import Shard, VerbsUnavailableError, connect, serve
from cotra_rdma._native.verbs import Device, compiled, devices, library

LIBRARY = "broken"
WHY = r"libibverbs cannot be loaded \(.*libibverbs.so.1.*\); install it: libibverbs1"


@pytest.mark.parametrize("call", [library, devices, Device, lambda: Device("mlx5_0")])
def test_each_entry_says_why(call: Callable[[], object]) -> None:
    assert compiled()
    for _ in range(2):
        with pytest.raises(VerbsUnavailableError, match=WHY) as caught:
            call()
        assert type(caught.value) is VerbsUnavailableError


def test_serve_and_connect_without_it(shards: list[Path]) -> None:
    with Shard.open(shards[0]) as shard, serve(shard) as server:
        assert server.exposed_region() is None
        assert server.transports == ("shm", "rpc")
        with connect(server.address) as cluster:
            assert cluster.transports == ("shm",)
            assert "libibverbs cannot be loaded" in cluster.passed_over[0]["verbs"]
        with pytest.raises(VerbsUnavailableError, match=WHY):
            connect(server.address, "verbs")
    with Shard.open(shards[0]) as shard, serve(shard, transports=["verbs", "rpc"]) as server:
        assert server.transports == ("rpc",)
        with connect(server.address) as cluster:
            assert cluster.transports == ("rpc",)
            assert set(cluster.passed_over[0]) == {"verbs", "shm"}
            assert "not offered" in cluster.passed_over[0]["shm"]


def test_a_device_by_name_without_it(shards: list[Path]) -> None:
    with Shard.open(shards[0]) as shard, pytest.raises(VerbsUnavailableError, match=WHY):
        serve(shard, device="mlx5_0")
