"""Memory regions and what leads to them: types 56 and 57, byte for byte."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from cotra_rdma._core.image_identity import ImageIdentity
from cotra_rdma.protocol.envelope import Payload, decode_array, encode_array, join

WANT_CAPABILITIES, WANT_QUEUE_PAIR, WANT_SHARED_MEMORY, WANT_RELEASE, WANT_LEASE, WANT_VIEW = range(6)
_U64 = Annotated[int, msgspec.Meta(ge=0)]

VIEW_PIECE_BYTES = 4 << 20
"""Of a view's bytes in one message, at most."""


class QueuePairFields(msgspec.Struct, array_like=True, frozen=True):
    """`verbs.QueuePairAttributes` on the wire."""

    gid: bytes
    qp_number: int
    packet_sequence: int
    lid: int
    mtu_bytes: int
    max_rd_atomic: int
    max_init_rd_atomic: int


class RegionFields(msgspec.Struct, array_like=True, frozen=True):
    """`MemoryRegion` on the wire."""

    addr: int
    rkey: int
    len: int


class ShardFields(msgspec.Struct, array_like=True, frozen=True):
    """What a reader must know of a shard before it reads it. Owners of earlier versions end with `record_bytes`.

    Attributes:
        graph_id, graph_base, graph_count: as in the image's header.
        image_checksum: likewise. None: not told; readers refuse such an owner, for they could not tell a restart.
    """

    dim: int
    metric: str
    count: int
    generation: int
    image_bytes: int
    record_bytes: int
    graph_id: _U64 = 0
    graph_base: _U64 = 0
    graph_count: _U64 = 0
    image_checksum: _U64 | None = None

    @property
    def identity(self) -> ImageIdentity | None:
        """What tells the image from every other; None where the owner does not tell it."""
        return (
            None if self.image_checksum is None else ImageIdentity(self.graph_id, self.generation, self.image_checksum)
        )


class SharedMemoryFields(msgspec.Struct, array_like=True, frozen=True):
    """Where the memfd is handed over: an abstract Unix socket of the host with this boot id."""

    socket: str
    length: int
    boot_id: str


class ViewFields(msgspec.Struct, array_like=True, frozen=True):
    """A piece of a shard's header and navigation section, which are `length` bytes, one after the other."""

    length: int
    data: bytes


class RegionRequest(msgspec.Struct, array_like=True, frozen=True):
    """Type 56: [want u32, peer str, queue_pair array | nil, number u64, offset u64, image array | nil].

    Attributes:
        want: 0 capabilities, 1 a queue pair, 2 the shared memory's socket, 3 to release a queue pair (0: all of
            this reader's), 4 to keep the reader's queue pairs alive, 5 a piece of header and navigation section.
        peer: a random name that the reader chose for itself; its queue pairs hang on it.
        queue_pair: with want 1, the reader's attributes.
        number: with want 3, of which queue pair.
        offset: with want 5, where the piece begins.
        image: with want 1, 2 and 5, which image it is about; None: the one that the owner serves now.
    """

    want: int
    peer: str
    queue_pair: QueuePairFields | None = None
    number: int = 0
    offset: int = 0
    image: ImageIdentity | None = None


class RegionResponse(msgspec.Struct, array_like=True, frozen=True):
    """Type 57: [code u32, message str, shard | nil, transports map, region | nil, queue_pair | nil, number u64, shared | nil,
    view | nil].

    Attributes:
        code, message: as in `SearchResponse`.
        shard: of every good answer.
        transports: name -> "" when it can be had, else why not.
        region: what exposed_region() gives; nil where no verbs device exists.
        queue_pair, number: with want 1, the owner's attributes and the queue pair's number.
        shared_memory: with want 2.
        view: with want 5.
    """

    code: int = 0
    message: str = ""
    shard: ShardFields | None = None
    transports: dict[str, str] = {}
    region: RegionFields | None = None
    queue_pair: QueuePairFields | None = None
    number: int = 0
    shared_memory: SharedMemoryFields | None = None
    view: ViewFields | None = None


# msgspec looks into a type when it first meets it, and two threads that do so at once have crashed it.
for _kind in (RegionRequest, RegionResponse):
    msgspec.msgpack.Decoder(_kind)


def encode_region(message: RegionRequest | RegionResponse) -> bytes:
    """Type 56 or 57 as a payload."""
    return encode_array(message)


def decode_region_request(payload: Payload) -> RegionRequest:
    """Type 56. Raises `FormatError`."""
    return decode_array(join(payload), RegionRequest, "region request")


def decode_region_response(payload: Payload) -> RegionResponse:
    """Type 57. Raises `FormatError`."""
    return decode_array(join(payload), RegionResponse, "region response")


def as_fields(kind: type[Any], value: Any) -> Any:
    """A wire struct from any object with the same attribute names."""
    return kind(**{name: getattr(value, name) for name in kind.__struct_fields__})
