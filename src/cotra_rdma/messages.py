"""The payloads of the messages that this release speaks: search (50, 51) and memory regions (56, 57).

The page is docs/reference/wire.md.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from cotra_rdma.errors import FormatError, InvalidInputError
from cotra_rdma.wire import Buffer, Payload, decode_array, encode_array, join

DEFAULT_BEAM = 4
_FLOAT32 = np.dtype([("marker", "u1"), ("value", ">f4")])
_FLOAT32_MARKER = 0xCA
_ANSWER_FIELDS = 7


def _length_prefix(length: int, fix: tuple[int, int], wide: tuple[tuple[int, str], ...]) -> bytes:
    """A MessagePack length: `fix` is (marker, limit) of the one-byte form, `wide` the larger ones."""
    if length < fix[1]:
        return bytes([fix[0] | length])
    for marker, code in wide:
        if length < 256 ** struct.calcsize(code):
            return bytes([marker]) + struct.pack(">" + code, length)
    raise InvalidInputError(f"MessagePack cannot hold {length} items")


def _array_prefix(length: int) -> bytes:
    return _length_prefix(length, (0x90, 16), ((0xDC, "H"), (0xDD, "I")))


def _bin_prefix(length: int) -> bytes:
    return _length_prefix(length, (0, 0), ((0xC4, "B"), (0xC5, "H"), (0xC6, "I")))


class _Reader:
    """Reads MessagePack items one after the other; large `bin` fields are not copied when a buffer holds them whole."""

    def __init__(self, payload: Payload, what: str) -> None:
        self._buffers = [memoryview(part) for part in (payload if isinstance(payload, tuple) else (payload,))]
        self._what = what

    def take(self, n: int) -> memoryview:
        """The next n bytes."""
        while self._buffers and not self._buffers[0]:
            self._buffers.pop(0)
        if n == 0:
            return memoryview(b"")
        if self._buffers and len(self._buffers[0]) >= n:
            head, self._buffers[0] = self._buffers[0][:n], self._buffers[0][n:]
            return head
        if sum(map(len, self._buffers)) < n:
            raise FormatError(f"{self._what}: it ends too early")
        self._buffers = [memoryview(b"".join(self._buffers))]
        return self.take(n)

    def at_end(self) -> bool:
        """Whether everything was read."""
        return not any(self._buffers)

    def number(self, code: str) -> int:
        """A bare big-endian integer of struct's format `code`."""
        return int(struct.unpack(">" + code, self.take(struct.calcsize(code)))[0])

    def _length(self, fix: tuple[int, int] | None, wide: dict[int, str], kind: str) -> int:
        marker = self.number("B")
        if fix and fix[0] <= marker < fix[0] + fix[1]:
            return marker - fix[0]
        if marker not in wide:
            raise FormatError(f"{self._what}: {kind} was expected, not the MessagePack marker 0x{marker:02x}")
        return self.number(wide[marker])

    def array(self) -> int:
        """An array's length."""
        return self._length((0x90, 16), {0xDC: "H", 0xDD: "I"}, "an array")

    def text(self) -> str:
        """A string."""
        length = self._length((0xA0, 32), {0xD9: "B", 0xDA: "H", 0xDB: "I"}, "a string")
        try:
            return bytes(self.take(length)).decode()
        except UnicodeDecodeError as error:
            raise FormatError(f"{self._what}: a string is not UTF-8: {error}") from error

    def binary(self) -> memoryview:
        """A bin field."""
        return self.take(self._length(None, {0xC4: "B", 0xC5: "H", 0xC6: "I"}, "a binary field"))

    def unsigned(self) -> int:
        """A u32 in any of its encodings."""
        marker = self.number("B")
        if marker < 0x80:
            return marker
        codes = {0xCC: "B", 0xCD: "H", 0xCE: "I"}
        if marker not in codes:
            raise FormatError(f"{self._what}: a u32 was expected, not the MessagePack marker 0x{marker:02x}")
        return self.number(codes[marker])

    def boolean(self) -> bool:
        """True or false."""
        marker = self.number("B")
        if marker not in (0xC2, 0xC3):
            raise FormatError(f"{self._what}: a boolean was expected, not the MessagePack marker 0x{marker:02x}")
        return marker == 0xC3

    def floats(self, n: int) -> npt.NDArray[np.float32]:
        """n float32 items. (Other encodings of numbers are not NodeDB's, and refused.)"""
        items = np.frombuffer(self.take(5 * n), _FLOAT32)
        if (items["marker"] != _FLOAT32_MARKER).any():
            raise FormatError(f"{self._what}: the query vector holds something else than float32 numbers")
        return items["value"].astype(np.float32)


# ---- 50, 51: search ----


@dataclass(frozen=True, slots=True)
class SearchRequest:
    """Type 50, NodeDB's VectorScatterPayload: a MessagePack array, then the filter, then (ours) the beam.

    Attributes:
        collection: a name; "" where the owner serves one shard.
        queries: float32[n * dim]: one query, or several one after the other; the owner knows dim.
        top_k, ef_search: as `Cluster.search`'s k and ef.
        filter_bitmap: bit i (of byte i // 8, lowest first) = local row i may be returned; None for no filter.
        beam: expansions a round; only written when it is not the default, 4.
    """

    collection: str
    queries: npt.NDArray[np.float32]
    top_k: int
    ef_search: int
    filter_bitmap: bytes | None = None
    beam: int = DEFAULT_BEAM

    def encode(self) -> bytes:
        """The payload."""
        flat = np.ascontiguousarray(self.queries, np.float32).reshape(-1)
        items = np.empty(len(flat), _FLOAT32)
        items["marker"], items["value"] = _FLOAT32_MARKER, flat
        parts = [
            b"\x95",
            encode_array(self.collection),
            _array_prefix(len(flat)),
            items.tobytes(),
            encode_array(self.top_k),
            encode_array(self.ef_search),
            encode_array(self.filter_bitmap is not None),
        ]
        if self.filter_bitmap is not None:
            parts += [struct.pack("<I", len(self.filter_bitmap)), self.filter_bitmap]
        if self.beam != DEFAULT_BEAM:
            parts.append(encode_array([self.beam]))
        return b"".join(parts)

    @classmethod
    def decode(cls, payload: Payload) -> SearchRequest:
        """Reads a payload. Raises `FormatError`."""
        reader = _Reader(payload, "search request")
        if reader.array() != 5:
            raise FormatError("search request: an array of 5 was expected")
        collection = reader.text()
        queries = reader.floats(reader.array())
        top_k, ef_search, has_filter = reader.unsigned(), reader.unsigned(), reader.boolean()
        bitmap = None
        if has_filter:
            bitmap = bytes(reader.take(struct.unpack("<I", reader.take(4))[0]))
        beam = DEFAULT_BEAM
        if not reader.at_end():
            if reader.array() != 1:
                raise FormatError("search request: its extension must be an array of 1")
            beam = reader.unsigned()
        if not reader.at_end():
            raise FormatError("search request: bytes are left over")
        return cls(collection, queries, top_k, ef_search, bitmap, beam)


@dataclass(frozen=True, slots=True)
class SearchResponse:
    """Type 51: [code u32, message str, n u32, k u32, labels bin, distances bin, stats bin].

    Attributes:
        code: 0; else the request failed, `message` says why, and the rest is empty.
        labels: int64[n, k], little-endian. distances: float32[n, k]. stats: `engine.STATS_DTYPE`[n] as raw bytes (32 each).
    """

    code: int
    message: str
    labels: npt.NDArray[np.int64]
    distances: npt.NDArray[np.float32]
    stats: Buffer

    def encode(self) -> tuple[Buffer, ...]:
        """The payload in parts: the large fields are the arrays' own memory."""
        n, k = self.labels.shape
        fields: list[Buffer] = [
            np.ascontiguousarray(self.labels, "<i8").reshape(-1).data.cast("B"),
            np.ascontiguousarray(self.distances, "<f4").reshape(-1).data.cast("B"),
            self.stats,
        ]
        numbers = b"".join(encode_array(value) for value in (self.code, self.message, n, k))
        head = _array_prefix(_ANSWER_FIELDS) + numbers
        parts: list[Buffer] = [head + _bin_prefix(len(fields[0])), fields[0]]
        for field in fields[1:]:
            parts += [_bin_prefix(len(field)), field]
        return tuple(parts)

    @classmethod
    def failed(cls, code: int, message: str) -> SearchResponse:
        """An answer that only says what went wrong."""
        return cls(code, message, np.empty((0, 0), np.int64), np.empty((0, 0), np.float32), b"")

    @classmethod
    def decode(cls, payload: Payload) -> SearchResponse:
        """Reads a payload; the arrays are views of it where it came in parts. Raises `FormatError`."""
        reader = _Reader(payload, "search response")
        if reader.array() != _ANSWER_FIELDS:
            raise FormatError(f"search response: an array of {_ANSWER_FIELDS} was expected")
        code, message, n, k = reader.unsigned(), reader.text(), reader.unsigned(), reader.unsigned()
        labels, distances, stats = reader.binary(), reader.binary(), reader.binary()
        if not reader.at_end() or len(labels) != 8 * n * k or len(distances) != 4 * n * k:
            raise FormatError(
                f"search response: fields of {len(labels)} and {len(distances)} bytes for {n} x {k} answers"
            )
        return cls(
            code,
            message,
            np.frombuffer(labels, "<i8").reshape(n, k),
            np.frombuffer(distances, "<f4").reshape(n, k),
            stats,
        )


# ---- 56, 57: memory regions, and what it takes to read them ----

WANT_CAPABILITIES, WANT_QUEUE_PAIR, WANT_SHARED_MEMORY, WANT_RELEASE, WANT_LEASE = range(5)


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
    """What a reader must know of a shard before it reads it."""

    dim: int
    metric: str
    count: int
    generation: int
    image_bytes: int
    record_bytes: int


class SharedMemoryFields(msgspec.Struct, array_like=True, frozen=True):
    """Where the memfd is handed over: an abstract Unix socket of the host with this boot id."""

    socket: str
    length: int
    boot_id: str


class RegionRequest(msgspec.Struct, array_like=True, frozen=True):
    """Type 56: [want u32, peer str, queue_pair array | nil, lane u64].

    Attributes:
        want: 0 capabilities, 1 a queue pair for one lane, 2 the shared memory's socket, 3 to release a lane (0: all of
            this peer's), 4 to keep the peer's lanes alive.
        peer: a random name that the reader chose for itself; its lanes hang on it.
        queue_pair: with want 1, the reader's attributes.
        lane: with want 3, which one.
    """

    want: int
    peer: str
    queue_pair: QueuePairFields | None = None
    lane: int = 0


class RegionResponse(msgspec.Struct, array_like=True, frozen=True):
    """Type 57: [code u32, message str, shard | nil, transports map, region | nil, queue_pair | nil, lane u64, shared | nil].

    Attributes:
        code, message: as in `SearchResponse`.
        shard: of every good answer.
        transports: name -> "" when it can be had, else why not.
        region: what exposed_region() gives; nil where no verbs device exists.
        queue_pair, lane: with want 1, the owner's attributes and the lane's number.
        shared_memory: with want 2.
    """

    code: int = 0
    message: str = ""
    shard: ShardFields | None = None
    transports: dict[str, str] = {}
    region: RegionFields | None = None
    queue_pair: QueuePairFields | None = None
    lane: int = 0
    shared_memory: SharedMemoryFields | None = None


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
