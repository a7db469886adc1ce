"""The control plane: memory regions, queue pairs, leases and views. Types 56 and 57, byte for byte."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from cotra_rdma._core.image_identity import ImageIdentity
from cotra_rdma.protocol.envelope import Payload, decode_array, encode_array, join

WANT_CAPABILITIES, WANT_QUEUE_PAIR, WANT_SHARED_MEMORY, WANT_RELEASE, WANT_LEASE, WANT_VIEW = range(6)
_U64 = Annotated[int, msgspec.Meta(ge=0)]

VIEW_PIECE_BYTES = 4 << 20
"""The most bytes of a view in one message."""


class QueuePairFields(msgspec.Struct, array_like=True, frozen=True):
    """`QueuePairAttributes` on the wire."""

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
    """What a reader must know of a shard before it reads it: fields of the image's header.

    Owners of earlier versions end with `record_bytes`.
    They do not send `image_checksum`, which is then None.
    Readers refuse them, because without it a reader cannot notice that the shard was built again.
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
        """The image's identity, or None if the owner does not send the checksum."""
        return (
            None if self.image_checksum is None else ImageIdentity(self.graph_id, self.generation, self.image_checksum)
        )


class SharedMemoryFields(msgspec.Struct, array_like=True, frozen=True):
    """Where the owner hands over its memory.

    Attributes:
        socket: the name of an abstract Unix socket.
        length: the bytes of the memory.
        boot_id: the boot id of the owner's host. The socket is of use on that host only.
    """

    socket: str
    length: int
    boot_id: str


class ViewFields(msgspec.Struct, array_like=True, frozen=True):
    """A piece of a shard's header and navigation section.

    Attributes:
        length: the bytes of both together.
        data: the piece.
    """

    length: int
    data: bytes


class RegionRequest(msgspec.Struct, array_like=True, frozen=True):
    """Type 56: [want u32, peer str, queue_pair array | nil, number u64, offset u64, image array | nil].

    Attributes:
        want: what the reader asks for: 0 capabilities, 1 a queue pair, 2 the socket of the shared memory, 3 the release of a
            queue pair, 4 the renewal of the lease, 5 a piece of header and navigation section.
        peer: a random name that the reader chose for itself. The lease is in this name.
        queue_pair: with want 1, the attributes of the reader's queue pair.
        number: with want 3, the number of the queue pair. 0 releases all of this reader's.
        offset: with want 5, where the piece begins, in bytes.
        image: with want 1, 2 and 5, the image that the request is about. None stands for the image that the owner serves now.
    """

    want: int
    peer: str
    queue_pair: QueuePairFields | None = None
    number: int = 0
    offset: int = 0
    image: ImageIdentity | None = None


class RegionResponse(msgspec.Struct, array_like=True, frozen=True):
    """Type 57.

    Its array is [code u32, message str, shard | nil, transports map, region | nil, queue_pair | nil, number u64, shared | nil,
    view | nil].

    Attributes:
        code, message: as in `SearchResponse`.
        shard: the shard, unless the answer is an error.
        transports: for each transport, "" if the reader can have it, or why not.
        region: the memory region, or nil if the owner offers no verbs.
        queue_pair: with want 1, the attributes of the owner's queue pair.
        number: with want 1, the number of the owner's queue pair.
        shared_memory: with want 2, where the memory is handed over.
        view: with want 5, the piece.
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


# msgspec inspects a type when it first decodes it. Two threads that did so at once have crashed it, so it is done at import.
for _kind in (RegionRequest, RegionResponse):
    msgspec.msgpack.Decoder(_kind)


def encode_region(message: RegionRequest | RegionResponse) -> bytes:
    """Writes a payload of type 56 or 57."""
    return encode_array(message)


def decode_region_request(payload: Payload) -> RegionRequest:
    """Reads a payload of type 56.

    Raises:
        FormatError: the payload is malformed.
    """
    return decode_array(join(payload), RegionRequest, "region request")


def decode_region_response(payload: Payload) -> RegionResponse:
    """Reads a payload of type 57.

    Raises:
        FormatError: the payload is malformed.
    """
    return decode_array(join(payload), RegionResponse, "region response")


def as_fields(kind: type[Any], value: Any) -> Any:
    """Makes a wire struct of any object that has attributes of the same names."""
    return kind(**{name: getattr(value, name) for name in kind.__struct_fields__})
