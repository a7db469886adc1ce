"""The channel contract over shm, file and model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cotra_rdma import Arena, FabricModel, FormatError, TransportError
from cotra_rdma._native.channel import Channel
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


class TestFile(ChannelContract):
    @pytest.fixture
    def open_channel(self) -> Iterator[OpenChannel]:
        with ExitStack() as stack:

            def opened(arena: Arena) -> Channel:
                fd = arena.info.fd
                assert fd is not None
                return stack.enter_context(Channel.file(fd, len(arena)))

            yield opened

    def test_a_file_that_became_shorter_fails_the_read(self, tmp_path: Path) -> None:
        (tmp_path / "region").write_bytes(bytes(8192))
        with (tmp_path / "region").open("r+b") as file, Channel.file(file.fileno(), 8192) as channel:
            with pytest.raises(FormatError, match="8192 bytes where 8193"):
                Channel.file(file.fileno(), 8193)
            assert channel.read(0, 8192) == bytes(8192)
            file.truncate(4096)
            with pytest.raises(TransportError, match="pread of 1 bytes"):
                channel.read(4096, 1)


class TestModel(ChannelContract):
    @pytest.fixture
    def open_channel(self) -> Iterator[OpenChannel]:
        with ExitStack() as stack:
            fabric = FabricModel(round_trip_s=5e-6, bytes_per_s=12.5e9, reads_per_s=50e6)
            yield lambda arena: stack.enter_context(Channel.model(stack.enter_context(Channel.shm(arena)), fabric))
