"""A libibverbs that lacks a symbol of the version IBVERBS_1.1 that we load."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from cotra_rdma import Shard, VerbsUnavailableError, connect, serve
from cotra_rdma._native.verbs import Device, devices, library

LIBRARY = "old"
WHY = "libibverbs has no ibv_query_gid of version IBVERBS_1.1: it is too old"


def test_the_symbol_is_there_in_another_version() -> None:
    loaded = ctypes.CDLL("libibverbs.so.1")
    assert loaded.ibv_query_gid
    assert loaded.ibv_open_device


def test_it_is_not_used_in_part() -> None:
    for call in (library, devices, Device):
        with pytest.raises(VerbsUnavailableError, match=WHY):
            call()


def test_serve_and_connect_without_it(shards: list[Path]) -> None:
    with Shard.open(shards[0]) as shard, serve(shard) as server:
        assert server.exposed_region() is None
        assert server.unavailable["verbs"] == WHY
        with connect(server.address) as cluster:
            assert cluster.transports == ("shm",)
            assert WHY in cluster.passed_over[0]["verbs"]
        with pytest.raises(VerbsUnavailableError, match=WHY):
            connect(server.address, "verbs")
