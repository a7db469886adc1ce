"""`VShardEnvelope`: the frame of NodeDB's messages, byte for byte, and what their payloads share.

The payloads are in the modules beside this one.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from cotra_rdma.errors import FormatError, InvalidInputError

WIRE_VERSION = 2
FAILED, STALE = 1, 2
"""The codes of an answer that is an error. STALE means that the request is about another image than the owner serves."""
MAX_PAYLOAD_BYTES = 64 << 20
"""The most bytes of a payload."""

_HEADER = struct.Struct("<HHQQII")
HEADER_BYTES = _HEADER.size  # 28

Buffer = bytes | memoryview
Payload = Buffer | tuple[Buffer, ...]
"""A payload as one buffer, or as several that follow each other. Large answers need not be copied into one."""


class VShardMessageType(enum.IntEnum):
    """The message types of the vector seam. Types 58 and 59 are this project's own.

    The number of an answer is that of its request plus one.
    """

    VECTOR_SCATTER_REQUEST = 50
    VECTOR_SCATTER_RESPONSE = 51
    VECTOR_COARSE_ROUTE_REQUEST = 52
    VECTOR_COARSE_ROUTE_RESPONSE = 53
    VECTOR_BUILD_EXCHANGE_REQUEST = 54
    VECTOR_BUILD_EXCHANGE_RESPONSE = 55
    VECTOR_MEM_REGION_REQUEST = 56
    VECTOR_MEM_REGION_RESPONSE = 57
    VECTOR_EXPAND_REQUEST = 58
    VECTOR_EXPAND_RESPONSE = 59

    @property
    def is_request(self) -> bool:
        """Whether the message asks for an answer."""
        return self % 2 == 0

    @property
    def response(self) -> VShardMessageType:
        """The type that answers this request."""
        return VShardMessageType(self + 1)


@dataclass(frozen=True, slots=True)
class VShardEnvelope:
    """One message.

    Its bytes are `version u16 | msg_type u16 | source_node u64 | target_node u64 | vshard_id u32 | payload_len u32 | payload`,
    all little-endian.

    Attributes:
        version: the version of the wire, `WIRE_VERSION`.
        msg_type: the type of the message.
        source_node: NodeDB's number of the sender (u64), or 0 if it has none.
        target_node: NodeDB's number of the receiver (u64), or 0 if it has none.
        vshard_id: the shard that the message is about (u32).
        payload: the payload. In a message that was received, its buffers are views of the received bytes.
    """

    version: int
    msg_type: VShardMessageType
    source_node: int
    target_node: int
    vshard_id: int
    payload: Payload

    @property
    def payload_len(self) -> int:
        """The payload's length in bytes."""
        return sum(map(len, self.payload)) if isinstance(self.payload, tuple) else len(self.payload)

    def frames(self) -> list[Buffer]:
        """Writes the message as buffers that follow each other. Only the first part of the payload is copied.

        Raises:
            InvalidInputError: a field does not fit its place, or the payload is too long.
        """
        length = self.payload_len
        if self.version != WIRE_VERSION:
            raise InvalidInputError(f"envelope: version {self.version} cannot be written, only {WIRE_VERSION}")
        if length > MAX_PAYLOAD_BYTES:
            raise InvalidInputError(f"envelope: a payload of {length} bytes passes the limit of {MAX_PAYLOAD_BYTES}")
        numbers = (self.source_node, self.target_node, self.vshard_id)
        try:
            header = _HEADER.pack(self.version, VShardMessageType(self.msg_type), *numbers, length)
        except (struct.error, ValueError) as error:
            raise InvalidInputError(f"envelope: a field does not fit its place: {error}") from error
        parts = self.payload if isinstance(self.payload, tuple) else (self.payload,)
        first, rest = (parts[0], parts[1:]) if parts else (b"", ())
        return [header + first, *rest]

    def encode(self) -> bytes:
        """Writes the message as bytes.

        Raises:
            InvalidInputError: as for `frames`.
        """
        return b"".join(self.frames())

    @classmethod
    def decode(cls, data: Buffer) -> VShardEnvelope:
        """Reads one whole message.

        Raises:
            FormatError: the message is too short or too long, or its version or type is unknown.
        """
        return cls.from_frames([data])

    @classmethod
    def from_frames(cls, frames: Sequence[Buffer]) -> VShardEnvelope:
        """Reads one whole message from buffers that follow each other. A memoryview's bytes are not copied.

        Raises:
            FormatError: as for `decode`.
        """
        first, total = frames[0], sum(map(len, frames))
        if len(first) < HEADER_BYTES:
            raise FormatError(f"envelope: {len(first)} bytes are too few for a header of {HEADER_BYTES}")
        version, msg_type, source, target, vshard, length = _HEADER.unpack_from(first)
        if version != WIRE_VERSION:
            raise FormatError(f"envelope: wire version {version} is unknown; this side speaks {WIRE_VERSION}")
        if msg_type not in _KNOWN_TYPES:
            raise FormatError(f"envelope: message type {msg_type} is unknown")
        if length > MAX_PAYLOAD_BYTES:
            raise FormatError(f"envelope: a payload of {length} bytes passes the limit of {MAX_PAYLOAD_BYTES}")
        if total - HEADER_BYTES != length:
            raise FormatError(f"envelope: its payload should be {length} bytes and is {total - HEADER_BYTES}")
        head = first[HEADER_BYTES:]
        payload = (head, *frames[1:]) if len(frames) > 1 else head
        return cls(version, VShardMessageType(msg_type), source, target, vshard, payload)


_KNOWN_TYPES = frozenset(VShardMessageType)


def join(payload: Payload) -> Buffer:
    """Returns the payload as one buffer. It copies only if there are several."""
    return b"".join(payload) if isinstance(payload, tuple) else payload


T = TypeVar("T")


def decode_array(data: Buffer, kind: type[T], what: str) -> T:
    """Reads one MessagePack array as `kind`.

    Args:
        data: all bytes of the array.
        kind: the type to make.
        what: the name of the message, for an error.

    Raises:
        FormatError: the bytes are anything else.
    """
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:  # arrays in arrays in arrays recurse
        raise FormatError(f"{what}: {error}") from error


def encode_array(value: Any) -> bytes:
    """Writes a value as MessagePack. Integers have their smallest encoding."""
    return msgspec.msgpack.encode(value)


def fields_of(value: msgspec.Struct) -> dict[str, Any]:
    """Returns the fields of a wire struct by name."""
    return {name: getattr(value, name) for name in value.__struct_fields__}
