"""The seam: what a vector database asks of a search algorithm.

The names and their meaning are those of NodeDB's `VectorShardSeam`.
An algorithm is a subclass of `VectorShardSeam`.
It overrides what it does differently; what it does not override is flat scatter-gather.
It speaks to other shards through a `ShardRpcDispatch`: a `GrpcDispatch`, or one of the caller's own.
"""

from __future__ import annotations

import enum
import inspect
from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from cotra_rdma import errors
from cotra_rdma._core.memory_region import MemoryRegion
from cotra_rdma.errors import CotraError, InvalidInputError
from cotra_rdma.protocol.envelope import WIRE_VERSION, VShardEnvelope, VShardMessageType, join

__all__ = [
    "DIRECT_MESSAGE_TIMEOUT_MS",
    "WIRE_VERSION",
    "BuildExchangeFailed",
    "DirectMessagingUnsupported",
    "MemoryRegion",
    "ShardMessage",
    "ShardMessageKind",
    "ShardMessageReply",
    "ShardRef",
    "ShardRpcDispatch",
    "ShardSubset",
    "TransportError",
    "VShardEnvelope",
    "VShardMessageType",
    "VectorSeamError",
    "VectorShardSeam",
    "exchange_with_peers",
]

DIRECT_MESSAGE_TIMEOUT_MS = 5000

# ---- errors ----


class VectorSeamError(CotraError):
    """The base of the errors that the seam itself raises."""


class DirectMessagingUnsupported(VectorSeamError):  # noqa: N818 (the seam's name)
    """This algorithm, or this place, cannot send a message from one shard to another."""

    def __init__(
        self, message: str = "direct shard-to-shard messaging is not supported by this implementation"
    ) -> None:
        super().__init__(message)


class BuildExchangeFailed(VectorSeamError):  # noqa: N818 (the seam's name)
    """The exchange with one peer at build time failed.

    Attributes:
        peer_shard: the peer's vshard id. The position in a list, `shard`, is not known here.
        detail: what went wrong.
    """

    def __init__(self, peer_shard: int, detail: object) -> None:
        super().__init__(f"build-time exchange failed for shard {peer_shard}: {detail}")
        self.peer_shard = peer_shard
        self.detail = str(detail)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.peer_shard, self.detail)


class TransportError(VectorSeamError, errors.TransportError):
    """A call through the dispatch failed: nobody answered, the answer was too late, or the path broke.

    Attributes:
        detail: what the dispatch said.
    """

    def __init__(self, detail: object) -> None:
        super().__init__(f"cluster transport error during seam call: {detail}")
        self.detail = str(detail)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.detail,)


# ---- values ----


@dataclass(frozen=True, slots=True)
class ShardRef:
    """Names a shard in a cluster.

    Attributes:
        node_id: the node that holds the shard (u64); 0 if nodes have no numbers.
        vshard_id: the shard (u32).

    Raises:
        InvalidInputError: a number does not fit.
    """

    node_id: int
    vshard_id: int

    def __post_init__(self) -> None:
        for name, value, limit in (("node_id", self.node_id, 2**64), ("vshard_id", self.vshard_id, 2**32)):
            if not 0 <= value < limit:
                raise InvalidInputError(f"ShardRef.{name} must be in [0, {limit}), not {value!r}")

    def __str__(self) -> str:
        return f"shard {self.vshard_id} of node {self.node_id}"


class ShardMessageKind(enum.Enum):
    """The subject of a message from shard to shard. The value is the type of the envelope that carries it."""

    CompassCoarseDescriptor = VShardMessageType.VECTOR_COARSE_ROUTE_REQUEST
    SpireCentroidTable = VShardMessageType.VECTOR_BUILD_EXCHANGE_REQUEST

    @property
    def message_type(self) -> VShardMessageType:
        """The type of the envelope."""
        return self.value


@dataclass(frozen=True, slots=True)
class ShardMessage:
    """A message from shard to shard.

    Attributes:
        kind: the subject.
        payload: the bytes that the receiver expects. `protocol.tables` has this project's payloads.
    """

    kind: ShardMessageKind
    payload: bytes


@dataclass(frozen=True, slots=True)
class ShardMessageReply:
    """The answer to a `ShardMessage`."""

    payload: bytes


@dataclass(frozen=True, slots=True, repr=False)
class ShardSubset:
    """The shards that a query visits: `ShardSubset.All`, or `ShardSubset.Subset([...])` of vshard ids.

    Attributes:
        ids: the vshard ids in the order of preference; None for all.
    """

    ids: tuple[int, ...] | None
    All: ClassVar[ShardSubset]

    @classmethod
    def Subset(cls, ids: Iterable[int]) -> ShardSubset:  # noqa: N802 (the seam's name)
        """Makes a subset of these vshard ids."""
        return cls(tuple(int(number) for number in ids))

    def resolve(self, all_shards: Sequence[int]) -> list[int]:
        """Returns the shards to ask.

        Args:
            all_shards: the vshard ids that are present.

        Returns:
            For All, `all_shards` as a list.
            Otherwise the shards of the subset that are present, in the subset's order.
            A shard that the subset names twice is returned once.
        """
        if self.ids is None:
            return list(all_shards)
        present = frozenset(all_shards)
        return [number for number in dict.fromkeys(self.ids) if number in present]

    def __repr__(self) -> str:
        return "ShardSubset.All" if self.ids is None else f"ShardSubset.Subset({list(self.ids)})"


ShardSubset.All = ShardSubset(None)


# ---- the interface ----


@runtime_checkable
class ShardRpcDispatch(Protocol):
    """Carries envelopes to other shards. Many tasks may await it at once."""

    async def call(self, envelope: VShardEnvelope, timeout_ms: int) -> VShardEnvelope:
        """Delivers a request to (target_node, vshard_id), and returns the answer.

        Raises:
            errors.TransportError: there is no answer.
                A subclass may say more: `errors.DeadlineError` is for a deadline.
            OSError: there is no answer.
                `ConnectionError` and `TimeoutError` are such errors; the latter is for a deadline.
        """
        ...


class VectorShardSeam:
    """A search algorithm over shards. Each method has a default, and the defaults are flat scatter-gather."""

    def select_shards(self, query_vector: npt.NDArray[np.float32], all_shards: Sequence[int]) -> ShardSubset:
        """Chooses the shards that a query visits. The default is all.

        Args:
            query_vector: float32[dim], one query.
            all_shards: the vshard ids that are present.
        """
        return ShardSubset.All

    def build_time_exchange(self, peer: ShardRef, dispatch: ShardRpcDispatch) -> Awaitable[None] | None:
        """Exchanges messages with one peer after a shard was built.

        The default does nothing and never calls `dispatch`.

        It is called once for each peer.
        The method is synchronous, but the dispatch is not.
        An algorithm that sends nothing, or only takes note of the peer, returns None.
        An algorithm that sends overrides it with `async def`, which has the same signature:
        the call returns an awaitable, and the caller awaits it.
        `exchange_with_peers` is such a caller.
        No thread and no nested event loop is needed.

        Raises:
            BuildExchangeFailed: the exchange failed. It may be raised by the call, or when its result is awaited.
        """
        return None

    async def direct_message(
        self, peer: ShardRef, msg: ShardMessage, dispatch: ShardRpcDispatch, source_node: int
    ) -> ShardMessageReply:
        """Sends a message to a peer shard, and awaits the answer for at most 5,000 ms.

        Args:
            peer: the receiver.
            msg: the message.
                Its kind gives the type of the envelope: 52 for CompassCoarseDescriptor, 54 for SpireCentroidTable.
            dispatch: carries the message.
            source_node: the sender's node number (u64).

        Raises:
            TransportError: the seam's own error, whose cause is what the dispatch raised.
            DirectMessagingUnsupported: the implementation cannot send messages.
        """
        envelope = VShardEnvelope(
            WIRE_VERSION, msg.kind.message_type, source_node, peer.node_id, peer.vshard_id, msg.payload
        )
        try:
            reply = await dispatch.call(envelope, DIRECT_MESSAGE_TIMEOUT_MS)
        except VectorSeamError:
            raise
        except (errors.TransportError, OSError) as error:
            raise TransportError(error) from error
        return ShardMessageReply(bytes(join(reply.payload)))

    def exposed_region(self) -> MemoryRegion | None:
        """Returns the memory region that peers may READ. The default is None, and callers then use RPC."""
        return None


async def exchange_with_peers(seam: VectorShardSeam, peers: Iterable[ShardRef], dispatch: ShardRpcDispatch) -> None:
    """Calls `seam.build_time_exchange` for one peer after the other, and awaits each call that has to be awaited.

    Raises:
        BuildExchangeFailed: the exchange with a peer failed, and those after it were not tried. Its cause says why.
    """
    for peer in peers:
        try:
            pending = seam.build_time_exchange(peer, dispatch)
            if inspect.isawaitable(pending):
                await pending
        except BuildExchangeFailed:
            raise
        except (CotraError, OSError) as error:
            raise BuildExchangeFailed(peer.vshard_id, error) from error
