"""The channel contract over verbs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import ClassVar

import pytest

from cotra_rdma import Arena, FabricModel
from cotra_rdma._native.channel import Channel
from cotra_rdma._native.verbs import Device, QueuePairOptions
from helpers.contract import ChannelContract, OpenChannel, pattern  # noqa: F401 (a fixture)
from helpers.fakeverbs import Fake, connected


class TestVerbs(ChannelContract):
    options: ClassVar[QueuePairOptions] = QueuePairOptions()
    slots: ClassVar[int] = 0
    settings: ClassVar[dict[str, object]] = {}

    @pytest.fixture
    def open_channel(self, fake: Fake) -> Iterator[OpenChannel]:
        fake.set(**self.settings)
        with ExitStack() as stack:
            device = stack.enter_context(Device())
            yield lambda arena: self.opened(stack, arena, device)

    def opened(self, stack: ExitStack, arena: Arena, device: Device) -> Channel:
        return stack.enter_context(connected(arena, device, self.options)).channel(slots=self.slots)


class TestLateCompletions(TestVerbs):
    settings: ClassVar[dict[str, object]] = {"LATE": 3}


class TestShortSendQueue(TestVerbs):
    """Back-pressure: fewer work requests than READs that the callers want in progress."""

    options: ClassVar[QueuePairOptions] = QueuePairOptions(send_depth=3, max_rd_atomic=1)
    slots: ClassVar[int] = 100


class TestSmallDevice(TestVerbs):
    settings: ClassVar[dict[str, object]] = {"MAX_QP_WR": 20, "MAX_CQE": 20, "MAX_RD_ATOMIC": 1, "MTU": 1}


class TestProviderWithoutExtendedVerbs(TestVerbs):
    settings: ClassVar[dict[str, object]] = {"COMPAT": 1}


class TestInfiniBand(TestVerbs):
    settings: ClassVar[dict[str, object]] = {"LINK_LAYER": 1, "GIDS": ""}


class TestModelOverVerbs(TestVerbs):
    def opened(self, stack: ExitStack, arena: Arena, device: Device) -> Channel:
        inner = super().opened(stack, arena, device)
        return stack.enter_context(Channel.model(inner, FabricModel(round_trip_s=5e-6)))
