"""Fixtures of the checks that run where a Soft-RoCE device is. Owners are processes of their own; this process is the reader."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from owners import OUT, PyverbsOwner, start

from cotra_rdma._native.verbs import Device
from cotra_rdma._owner.child_process import OwnerProcess


@pytest.fixture(scope="session")
def shards() -> list[Path]:
    return sorted((OUT / "shards").glob("*.cotra"))


@pytest.fixture(scope="session")
def shard_with_lists() -> Path:
    return OUT / "collection" / "shard-000.cotra"


@pytest.fixture(scope="session")
def queries() -> npt.NDArray[np.float32]:
    return np.load(OUT / "queries.npy")


@pytest.fixture(scope="session")
def device_name() -> str:
    return os.environ["COTRA_RXE_DEVICE"]


@pytest.fixture
def device(device_name: str) -> Iterator[Device]:
    with Device(device_name) as opened:
        yield opened


@pytest.fixture(scope="session")
def host(device_name: str) -> str:
    """The address of the device's best GID: RoCEv2, IPv4."""
    with Device(device_name) as opened:
        return opened.gids()[0].address


@pytest.fixture(scope="session")
def owners(shards: list[Path], host: str, device_name: str) -> Iterator[list[OwnerProcess]]:
    """The owners that every check shares; a check that harms one starts its own."""
    started = start(shards, host, device_name)
    yield started
    for owner in started:
        owner.close()


@pytest.fixture(scope="session")
def addresses(owners: list[OwnerProcess]) -> list[str]:
    return [address for owner in owners for address in owner.addresses]


@pytest.fixture(scope="session")
def images(shards: list[Path]) -> list[bytes]:
    return [path.read_bytes() for path in shards]


@pytest.fixture
def pyverbs_owner(shards: list[Path], device: Device, device_name: str, host: str) -> Iterator[PyverbsOwner]:
    owner = PyverbsOwner(shards[0], device_name, device.gids(peer=host)[0].index)
    yield owner
    owner.close()
