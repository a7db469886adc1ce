"""The channel contract over shm and model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from cotra_rdma import Arena, FabricModel
from cotra_rdma.channel import Channel
from helpers.contract import ChannelContract, OpenChannel, pattern  # noqa: F401 (a fixture)


class TestShm(ChannelContract):
    @pytest.fixture
    def open_channel(self) -> Iterator[OpenChannel]:
        with ExitStack() as stack:
            yield lambda arena: stack.enter_context(Channel.shm(arena))


class TestShmOfAnotherMapping(ChannelContract):
    """What a same-host peer has: its own read-only mapping of the owner's sealed memfd."""

    @pytest.fixture
    def open_channel(self) -> Iterator[OpenChannel]:
        with ExitStack() as stack:

            def opened(arena: Arena) -> Channel:
                arena.seal()
                fd = arena.info.fd
                assert fd is not None
                copy = os.dup(fd)
                try:
                    mapped = stack.enter_context(Arena.map_fd(copy, len(arena)))
                finally:
                    os.close(copy)
                return stack.enter_context(Channel.shm(mapped))

            yield opened


class TestModel(ChannelContract):
    @pytest.fixture
    def open_channel(self) -> Iterator[OpenChannel]:
        with ExitStack() as stack:
            fabric = FabricModel(round_trip_s=5e-6, bytes_per_s=12.5e9, reads_per_s=50e6)
            yield lambda arena: stack.enter_context(Channel.model(stack.enter_context(Channel.shm(arena)), fabric))
