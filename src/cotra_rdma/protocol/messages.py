"""The payloads: search (50, 51), coarse routing (52, 53), exchange at build (54, 55) and memory regions (56, 57).

The page is docs/reference/wire.md. Nodes that are expanded for a peer (58, 59) are in `expansion_messages`, and the
answer to a search of the whole collection is in `collection_messages`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt

from cotra_rdma.errors import FormatError, InvalidInputError
from cotra_rdma.protocol.envelope import Buffer, Payload, decode_array, encode_array, join
from cotra_rdma.protocol.msgpack_io import FLOAT32, FLOAT32_MARKER, Reader, array_prefix, bin_prefix, binary

DEFAULT_BEAM = 8
OWN_SHARD, WHOLE_COLLECTION = range(2)
"""What a search is about: the owner's own shard, or the collection as the owner sees it."""
_ANSWER_FIELDS = 7


# ---- 50, 51: search ----

_MAX_BATCH_BYTES = 16 << 20
_MAX_BATCH_EF = 1 << 18
"""ef of all queries of a message: as many expansions, about, and as many microseconds. It must be answered in time."""
STATS_BYTES = 32


def queries_per_message(dim: int, k: int, ef: int, *, filtered: bool) -> int:
    """How many queries a message of type 50 should hold at most: a large batch goes in several."""
    fits = _MAX_BATCH_BYTES // max(5 * dim, 12 * k + STATS_BYTES)
    return max(1, min(fits, _MAX_BATCH_EF // (16 * ef if filtered else ef)))


@dataclass(frozen=True, slots=True)
class SearchRequest:
    """Type 50, NodeDB's VectorScatterPayload: a MessagePack array, then the filter, then (ours) beam, scope and what follows.

    Attributes:
        collection: a name; "" where the owner serves one shard.
        queries: float32[n * dim]: one query, or several one after the other; the owner knows dim.
        top_k, ef_search: as `Cluster.search`'s k and ef.
        filter_bitmap: bit i (of byte i // 8, lowest first) = local row i may be returned; None for no filter.
        beam: expansions a round; only written when it is not the default, 8, or the scope follows.
        scope: `OWN_SHARD`, or `WHOLE_COLLECTION`, which is answered with a `CollectionResponse`.
        most: records that a walk expands at most; 0: as many as it takes.
        filters: of a search of the whole collection: for each shard the checksum of its image, which names it, and a bitmap as
            `filter_bitmap`, or None. None: no filter anywhere.
    """

    collection: str
    queries: npt.NDArray[np.float32]
    top_k: int
    ef_search: int
    filter_bitmap: bytes | None = None
    beam: int = DEFAULT_BEAM
    scope: int = OWN_SHARD
    most: int = 0
    filters: tuple[tuple[int, bytes | None], ...] | None = None

    def encode(self) -> bytes:
        """The payload."""
        flat = np.ascontiguousarray(self.queries, np.float32).reshape(-1)
        items = np.empty(len(flat), FLOAT32)
        items["marker"], items["value"] = FLOAT32_MARKER, flat
        parts = [
            b"\x95",
            encode_array(self.collection),
            array_prefix(len(flat)),
            items.tobytes(),
            encode_array(self.top_k),
            encode_array(self.ef_search),
            encode_array(self.filter_bitmap is not None),
        ]
        if self.filter_bitmap is not None:
            parts += [struct.pack("<I", len(self.filter_bitmap)), self.filter_bitmap]
        extension = [self.beam, self.scope, self.most]
        n = 3 if self.most else 2 if self.scope != OWN_SHARD else 1 if self.beam != DEFAULT_BEAM else 0
        if self.filters is not None:
            parts += [array_prefix(4), *map(encode_array, extension), array_prefix(1 + len(self.filters))]
            parts.append(binary(np.array([image for image, _ in self.filters], "<u8")))
            for _, bitmap in self.filters:
                parts += [bin_prefix(len(bitmap or b"")), bitmap or b""]
        elif n:
            parts.append(encode_array(extension[:n]))
        return b"".join(parts)

    @classmethod
    def decode(cls, payload: Payload) -> SearchRequest:
        """Reads a payload. Raises `FormatError`."""
        reader = Reader(payload, "search request")
        if reader.array() != 5:
            raise FormatError("search request: an array of 5 was expected")
        collection = reader.text()
        queries = reader.floats(reader.array())
        top_k, ef_search, has_filter = reader.unsigned(), reader.unsigned(), reader.boolean()
        bitmap = None
        if has_filter:
            bitmap = bytes(reader.take(struct.unpack("<I", reader.take(4))[0]))
        beam, scope, most, filters = DEFAULT_BEAM, OWN_SHARD, 0, None
        if not reader.at_end():
            length = reader.array()
            if not 1 <= length <= 4:
                raise FormatError("search request: its extension must be an array of 1 to 4")
            beam = reader.unsigned()
            scope = reader.unsigned() if length > 1 else OWN_SHARD
            most = reader.unsigned() if length > 2 else 0
            filters = _read_filters(reader) if length > 3 else None
        if scope not in (OWN_SHARD, WHOLE_COLLECTION):
            raise FormatError(f"search request: scope {scope} is unknown")
        reader.end()
        return cls(collection, queries, top_k, ef_search, bitmap, beam, scope, most, filters)


def _read_filters(reader: Reader) -> tuple[tuple[int, bytes | None], ...]:
    n = reader.array() - 1
    images = reader.vector("<u8", n).tolist() if n >= 0 else []
    if not images:
        raise FormatError("search request: filters of no shards")
    return tuple((image, bytes(reader.binary()) or None) for image in images)


@dataclass(frozen=True, slots=True)
class SearchResponse:
    """Type 51: [code u32, message str, n u32, k u32, labels bin, distances bin, stats bin], and after the array, where the
    request had `most`, a bin: `incomplete`.

    Attributes:
        code: 0; else the request failed, `message` says why, and the rest is empty.
        labels: int64[n, k], little-endian. distances: float32[n, k]. stats: `engine.OWNER_STATS_DTYPE`[n] as raw bytes (32 each).
        incomplete: uint32[n], little-endian: walks that `most` ended; None where it was not asked.
    """

    code: int
    message: str
    labels: npt.NDArray[np.int64]
    distances: npt.NDArray[np.float32]
    stats: Buffer
    incomplete: npt.NDArray[np.uint32] | None = None

    def encode(self) -> tuple[Buffer, ...]:
        """The payload in parts: the large fields are the arrays' own memory."""
        n, k = self.labels.shape
        fields: list[Buffer] = [
            np.ascontiguousarray(self.labels, "<i8").reshape(-1).data.cast("B"),
            np.ascontiguousarray(self.distances, "<f4").reshape(-1).data.cast("B"),
            self.stats,
        ]
        numbers = b"".join(encode_array(value) for value in (self.code, self.message, n, k))
        head = array_prefix(_ANSWER_FIELDS) + numbers
        parts: list[Buffer] = [head + bin_prefix(len(fields[0])), fields[0]]
        for field in fields[1:]:
            parts += [bin_prefix(len(field)), field]
        if self.incomplete is not None:
            parts.append(binary(np.ascontiguousarray(self.incomplete, "<u4")))
        return tuple(parts)

    @classmethod
    def failed(cls, code: int, message: str) -> SearchResponse:
        """An answer that only says what went wrong."""
        return cls(code, message, np.empty((0, 0), np.int64), np.empty((0, 0), np.float32), b"")

    @classmethod
    def decode(cls, payload: Payload) -> SearchResponse:
        """Reads a payload; the arrays are views of it where it came in parts. Raises `FormatError`."""
        reader = Reader(payload, "search response")
        answer = cls.read(reader)
        if not reader.at_end():
            answer = replace(answer, incomplete=reader.vector("<u4", len(answer.labels)))
        reader.end()
        return answer

    @classmethod
    def read(cls, reader: Reader) -> SearchResponse:
        """Reads the array, after which something may follow. Raises `FormatError`."""
        if reader.array() != _ANSWER_FIELDS:
            raise FormatError(f"search response: an array of {_ANSWER_FIELDS} was expected")
        code, message, n, k = reader.unsigned(), reader.text(), reader.unsigned(), reader.unsigned()
        labels, distances, stats = reader.binary(), reader.binary(), reader.binary()
        if len(labels) != 8 * n * k or len(distances) != 4 * n * k:
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


# ---- 52 to 55: centroid tables ----

CENTROID_TYPES = {"float16": "<f2", "float32": "<f4"}
_COARSE_REQUEST_FIELDS, _COARSE_FIELDS, _EXCHANGE_REQUEST_FIELDS, _EXCHANGE_FIELDS = 1, 8, 11, 2


@dataclass(frozen=True, slots=True, eq=False)
class CentroidTable:
    """The inverted lists of one shard, as its peers see them.

    Attributes:
        centroids: float16[n_lists, dim] or float32[n_lists, dim], finite.
        sizes: uint32[n_lists]: vectors in each list.
        radii: float32[n_lists]: the root mean square distance (l2) of a list's vectors from its centroid; finite, at least 0.
    """

    centroids: npt.NDArray[Any]
    sizes: npt.NDArray[np.uint32]
    radii: npt.NDArray[np.float32]

    @classmethod
    def of(cls, table: Any, centroid_type: str = "float32") -> CentroidTable:
        """Makes one of any object with `centroids` [n_lists, dim], `sizes` [n_lists] and `radii` [n_lists].

        Args:
            table: its arrays may be of any real type.
            centroid_type: "float32", or "float16" for half the bytes (rounded to 11 bits of mantissa).

        Raises `InvalidInputError` for shapes that disagree and values that do not fit.
        """
        if centroid_type not in CENTROID_TYPES:
            raise InvalidInputError(f"centroid_type must be float16 or float32, not {centroid_type!r}")
        sizes = np.asarray(table.sizes)
        if sizes.size and not (sizes.min() >= 0 and sizes.max() < 2**32):
            raise InvalidInputError("centroid table: a size does not fit u32")
        with np.errstate(over="ignore"):
            made = cls(
                np.ascontiguousarray(table.centroids, CENTROID_TYPES[centroid_type]),
                np.ascontiguousarray(sizes, "<u4"),
                np.ascontiguousarray(table.radii, "<f4"),
            )
        if why := made.fault():
            raise InvalidInputError(f"centroid table: {why}")
        return made

    @classmethod
    def empty(cls) -> CentroidTable:
        """The table of an answer that only says what went wrong: no lists, of dim 0."""
        return cls(np.empty((0, 0), "<f4"), np.empty(0, "<u4"), np.empty(0, "<f4"))

    @property
    def centroid_type(self) -> str:
        """ "float16" or "float32"."""
        return str(self.centroids.dtype.name)

    def fault(self) -> str:
        """What is wrong with it; "" when nothing is."""
        if self.centroids.ndim != 2 or not self.sizes.shape == self.radii.shape == self.centroids.shape[:1]:
            shapes = ", ".join(str(list(field.shape)) for field in (self.centroids, self.sizes, self.radii))
            return f"shapes {shapes} are not [n_lists, dim], [n_lists], [n_lists]"
        if not np.isfinite(self.centroids).all():
            return "a centroid holds NaN or infinity"
        if not (np.isfinite(self.radii) & (self.radii >= 0)).all():
            return "a radius is NaN, infinite or below 0"
        return ""

    def fields(self) -> list[bytes]:
        """The part of a payload that 53 and 54 share: dim, n_lists, centroid_type, centroids, sizes, radii."""
        n_lists, dim = self.centroids.shape
        numbers = [encode_array(value) for value in (dim, n_lists, self.centroid_type)]
        return [*numbers, *(binary(field) for field in (self.centroids, self.sizes, self.radii))]

    @classmethod
    def read(cls, reader: Reader, what: str) -> CentroidTable:
        """Reads that part. Raises `FormatError`."""
        dim, n_lists, kind = reader.unsigned(), reader.unsigned(), reader.text()
        if kind not in CENTROID_TYPES:
            raise FormatError(f"{what}: centroids of type {kind[:40]!r} are unknown")
        if n_lists and not dim:
            raise FormatError(f"{what}: {n_lists} centroids of dim 0")
        centroids = reader.vector(CENTROID_TYPES[kind], n_lists * dim).reshape(n_lists, dim)
        table = cls(centroids, reader.vector("<u4", n_lists), reader.vector("<f4", n_lists))
        if why := table.fault():
            raise FormatError(f"{what}: {why}")
        return table


@dataclass(frozen=True, slots=True)
class CoarseRouteRequest:
    """Type 52: [collection str]. "" where the owner serves one shard."""

    collection: str = ""

    def encode(self) -> bytes:
        """The payload."""
        return array_prefix(_COARSE_REQUEST_FIELDS) + encode_array(self.collection)

    @classmethod
    def decode(cls, payload: Payload) -> CoarseRouteRequest:
        """Reads a payload. Raises `FormatError`."""
        reader = Reader(payload, "coarse route request")
        if reader.array() != _COARSE_REQUEST_FIELDS:
            raise FormatError(f"coarse route request: an array of {_COARSE_REQUEST_FIELDS} was expected")
        request = cls(reader.text())
        reader.end()
        return request


@dataclass(frozen=True, slots=True, eq=False)
class CoarseRouteResponse:
    """Type 53: [code u32, message str, dim u32, n_lists u32, centroid_type str, centroids bin, sizes bin, radii bin], and
    after the array, where the shard is one of a collection, a MessagePack map: "shard", its number in it, and "calibration",
    what `compass.Calibration.to_json` gives, or nil.

    Attributes:
        code, message: as in `SearchResponse`; with an error the table is empty.
        table: the shard's coarse description.
        collection: that map, or None.
    """

    code: int
    message: str
    table: CentroidTable
    collection: dict[str, Any] | None = None

    @classmethod
    def failed(cls, code: int, message: str) -> CoarseRouteResponse:
        """An answer that only says what went wrong."""
        return cls(code, message, CentroidTable.empty())

    def encode(self) -> bytes:
        """The payload."""
        head = [array_prefix(_COARSE_FIELDS), encode_array(self.code), encode_array(self.message)]
        tail = [] if self.collection is None else [encode_array(self.collection)]
        return b"".join([*head, *self.table.fields(), *tail])

    @classmethod
    def decode(cls, payload: Payload) -> CoarseRouteResponse:
        """Reads a payload. Raises `FormatError`."""
        what = "coarse route response"
        reader = Reader(payload, what)
        if reader.array() != _COARSE_FIELDS:
            raise FormatError(f"{what}: an array of {_COARSE_FIELDS} was expected")
        code, message, table = reader.unsigned(), reader.text(), CentroidTable.read(reader, what)
        rest = reader.rest()
        return cls(code, message, table, decode_array(rest, dict[str, Any], what) if rest else None)


@dataclass(frozen=True, slots=True, eq=False)
class BuildExchangeRequest:
    """Type 54: [shard u32, dim u32, n_lists u32, centroid_type str, centroids bin, sizes bin, radii bin, offsets bin,
    lengths bin, region_offset u64, generation u64], and after the array, between the builders of one graph, a MessagePack map.

    Attributes:
        shard: the sender's vshard id.
        table: its centroids, list sizes and radii.
        offsets: uint64[n_lists]: where each list begins, in bytes after `region_offset`.
        lengths: uint32[n_lists]: the bytes of each list.
        region_offset: where the lists' section begins, in bytes after the start of the sender's region.
        generation: of the shard's build; another one makes the table stale.
        told: that map, or None.
    """

    shard: int
    table: CentroidTable
    offsets: npt.NDArray[np.uint64]
    lengths: npt.NDArray[np.uint32]
    region_offset: int
    generation: int
    told: dict[str, Any] | None = None

    @classmethod
    def empty(cls, shard: int, told: dict[str, Any]) -> BuildExchangeRequest:
        """A builder's message without a table."""
        none = np.empty(0, np.uint64)
        return cls(shard, CentroidTable.empty(), none, none.astype(np.uint32), 0, 0, told)

    def encode(self) -> bytes:
        """The payload. Raises `InvalidInputError` when offsets and lengths do not fit the table."""
        offsets, lengths = np.ascontiguousarray(self.offsets, "<u8"), np.ascontiguousarray(self.lengths, "<u4")
        if why := _misplaced(self.table, offsets, lengths, self.region_offset):
            raise InvalidInputError(f"build exchange: {why}")
        parts = [array_prefix(_EXCHANGE_REQUEST_FIELDS), encode_array(self.shard), *self.table.fields()]
        parts += [binary(offsets), binary(lengths), encode_array(self.region_offset), encode_array(self.generation)]
        parts += [] if self.told is None else [encode_array(self.told)]
        return b"".join(parts)

    @classmethod
    def decode(cls, payload: Payload) -> BuildExchangeRequest:
        """Reads a payload; that the lists lie inside the region is checked against its length by who READs them.

        Raises `FormatError`.
        """
        what = "build exchange request"
        reader = Reader(payload, what)
        if reader.array() != _EXCHANGE_REQUEST_FIELDS:
            raise FormatError(f"{what}: an array of {_EXCHANGE_REQUEST_FIELDS} was expected")
        shard, table = reader.unsigned(), CentroidTable.read(reader, what)
        n_lists = len(table.sizes)
        offsets, lengths = reader.vector("<u8", n_lists), reader.vector("<u4", n_lists)
        numbers, rest = (reader.unsigned64(), reader.unsigned64()), reader.rest()
        told = decode_array(rest, dict[str, Any], what) if rest else None
        request = cls(shard, table, offsets, lengths, *numbers, told)
        if why := _misplaced(table, offsets, lengths, request.region_offset):
            raise FormatError(f"{what}: {why}")
        return request


def _misplaced(
    table: CentroidTable, offsets: npt.NDArray[np.uint64], lengths: npt.NDArray[np.uint32], region_offset: int
) -> str:
    """What is wrong with the places of lists; "" when nothing is."""
    if not offsets.shape == lengths.shape == table.sizes.shape:
        return f"{offsets.size} offsets and {lengths.size} lengths for {table.sizes.size} lists"
    if not 0 <= region_offset < 2**64:
        return f"region_offset {region_offset} does not fit u64"
    room = np.uint64(2**64 - 1 - region_offset)
    # Compared by subtraction, for the sums could pass 64 bits.
    if (lengths > room).any() or (offsets > room - lengths.astype(np.uint64)).any():
        return "a list passes the end of the address space"
    return ""


@dataclass(frozen=True, slots=True)
class BuildExchangeResponse:
    """Type 55: [code u32, message str]."""

    code: int = 0
    message: str = ""

    def encode(self) -> bytes:
        """The payload."""
        return array_prefix(_EXCHANGE_FIELDS) + encode_array(self.code) + encode_array(self.message)

    @classmethod
    def decode(cls, payload: Payload) -> BuildExchangeResponse:
        """Reads a payload. Raises `FormatError`."""
        reader = Reader(payload, "build exchange response")
        if reader.array() != _EXCHANGE_FIELDS:
            raise FormatError(f"build exchange response: an array of {_EXCHANGE_FIELDS} was expected")
        response = cls(reader.unsigned(), reader.text())
        reader.end()
        return response


# ---- 56, 57: memory regions, and what it takes to read them ----

WANT_CAPABILITIES, WANT_QUEUE_PAIR, WANT_SHARED_MEMORY, WANT_RELEASE, WANT_LEASE, WANT_VIEW = range(6)
VIEW_PIECE_BYTES = 4 << 20
"""Of a view's bytes in one message, at most."""


_U64 = Annotated[int, msgspec.Meta(ge=0)]


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
        image_checksum: likewise; it names the shard wherever it is. None: not told, and such an owner expands nothing for peers.
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
    """Type 56: [want u32, peer str, queue_pair array | nil, lane u64, offset u64].

    Attributes:
        want: 0 capabilities, 1 a queue pair for one lane, 2 the shared memory's socket, 3 to release a lane (0: all of
            this peer's), 4 to keep the peer's lanes alive, 5 a piece of header and navigation section.
        peer: a random name that the reader chose for itself; its lanes hang on it.
        queue_pair: with want 1, the reader's attributes.
        lane: with want 3, which one.
        offset: with want 5, where the piece begins.
    """

    want: int
    peer: str
    queue_pair: QueuePairFields | None = None
    lane: int = 0
    offset: int = 0


class RegionResponse(msgspec.Struct, array_like=True, frozen=True):
    """Type 57: [code u32, message str, shard | nil, transports map, region | nil, queue_pair | nil, lane u64, shared | nil,
    view | nil].

    Attributes:
        code, message: as in `SearchResponse`.
        shard: of every good answer.
        transports: name -> "" when it can be had, else why not.
        region: what exposed_region() gives; nil where no verbs device exists.
        queue_pair, lane: with want 1, the owner's attributes and the lane's number.
        shared_memory: with want 2.
        view: with want 5.
    """

    code: int = 0
    message: str = ""
    shard: ShardFields | None = None
    transports: dict[str, str] = {}
    region: RegionFields | None = None
    queue_pair: QueuePairFields | None = None
    lane: int = 0
    shared_memory: SharedMemoryFields | None = None
    view: ViewFields | None = None


for _kind in (RegionRequest, RegionResponse):
    msgspec.msgpack.Decoder(
        _kind
    )  # msgspec looks into a type when it first meets it; two threads at once have crashed it


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
