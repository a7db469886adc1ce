"""Searches: types 50 and 51, byte for byte.

The answer to a search of the whole collection is in `collection_search`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from cotra_rdma._core.image_identity import ImageIdentity
from cotra_rdma.errors import FormatError
from cotra_rdma.protocol.envelope import Buffer, Payload, encode_array
from cotra_rdma.protocol.msgpack_io import (
    FLOAT32,
    FLOAT32_MARKER,
    Reader,
    array_prefix,
    bin_prefix,
    binary,
    encode_image,
)

DEFAULT_BEAM = 8
OWN_SHARD, WHOLE_COLLECTION = range(2)
"""What an owner searches: its own shard, or the whole collection by its own connections."""
_ANSWER_FIELDS = 7


_MAX_BATCH_BYTES = 4 << 20
_MAX_BATCH_EF = 1 << 18
"""The largest sum of ef over the queries of a message.

It is about the number of expansions, and of microseconds.
The owner must answer the message before its time-out.
"""
STATS_BYTES = 32


def queries_per_message(dim: int, k: int, ef: int, *, filtered: bool) -> int:
    """Returns the most queries that a message of type 50 should hold. A larger batch is several messages.

    Args:
        dim, k, ef: as in the message.
        filtered: whether the message has filters, which make a walk longer.
    """
    fits = _MAX_BATCH_BYTES // max(5 * dim, 12 * k + STATS_BYTES)
    return max(1, min(fits, _MAX_BATCH_EF // (16 * ef if filtered else ef)))


@dataclass(frozen=True, slots=True)
class SearchRequest:
    """Type 50, NodeDB's VectorScatterPayload.

    It is a MessagePack array, then the filter, then an array of this project's own: beam, scope, most, filters and image.
    The second array ends after the last field that is not the default.

    Attributes:
        collection: the name of the collection, or "" if the owner serves one shard.
        queries: float32[n * dim]: the queries, one after the other. The owner knows dim.
        top_k: `k` of `Cluster.search`.
        ef_search: `ef` of `Cluster.search`.
        filter_bitmap: a bitmap as `pack_filter` makes it, or None for no filter.
        beam: the most nodes that a walk expands in one round.
        scope: `OWN_SHARD`, or `WHOLE_COLLECTION`, whose answer is a `CollectionResponse`.
        most: the most records that a walk expands. 0 sets no bound.
        filters: for a search of the whole collection, the filter of each shard: the checksum of its image, which names it, and
            a bitmap or None. None in place of all this is no filter.
        image: the image that the owner has to search. The owner refuses if it does not serve that image, and repeats the image
            in its answer. None stands for the image that it serves now.
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
    image: ImageIdentity | None = None

    def encode(self) -> bytes:
        """Writes the payload."""
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
        if self.filters is not None or self.image is not None:
            parts += [array_prefix(4 if self.image is None else 5), *map(encode_array, extension)]
            parts += self._encode_filters()
            parts += [] if self.image is None else [encode_image(self.image)]
        elif n:
            parts.append(encode_array(extension[:n]))
        return b"".join(parts)

    def _encode_filters(self) -> list[bytes]:
        if self.filters is None:
            return [array_prefix(0)]
        parts = [array_prefix(1 + len(self.filters)), binary(np.array([image for image, _ in self.filters], "<u8"))]
        for _, bitmap in self.filters:
            parts += [bin_prefix(len(bitmap or b"")), bitmap or b""]
        return parts

    @classmethod
    def decode(cls, payload: Payload) -> SearchRequest:
        """Reads a payload.

        Raises:
            FormatError: the payload is malformed.
        """
        reader = Reader(payload, "search request")
        if reader.array() != 5:
            raise FormatError("search request: an array of 5 was expected")
        collection = reader.text()
        queries = reader.floats(reader.array())
        top_k, ef_search, has_filter = reader.unsigned(), reader.unsigned(), reader.boolean()
        bitmap = None
        if has_filter:
            bitmap = bytes(reader.take(struct.unpack("<I", reader.take(4))[0]))
        beam, scope, most, filters, image = DEFAULT_BEAM, OWN_SHARD, 0, None, None
        if not reader.at_end():
            length = reader.array()
            if not 1 <= length <= 5:
                raise FormatError("search request: its extension must be an array of 1 to 5")
            beam = reader.unsigned()
            scope = reader.unsigned() if length > 1 else OWN_SHARD
            most = reader.unsigned() if length > 2 else 0
            filters = _read_filters(reader, may_be_none=length > 4) if length > 3 else None
            image = reader.image() if length > 4 else None
        if scope not in (OWN_SHARD, WHOLE_COLLECTION):
            raise FormatError(f"search request: scope {scope} is unknown")
        reader.end()
        return cls(collection, queries, top_k, ef_search, bitmap, beam, scope, most, filters, image)


def _read_filters(reader: Reader, *, may_be_none: bool) -> tuple[tuple[int, bytes | None], ...] | None:
    n = reader.array() - 1
    if n < 0 and may_be_none:
        return None
    images = reader.vector("<u8", n).tolist() if n >= 0 else []
    if not images:
        raise FormatError("search request: filters of no shards")
    return tuple((image, bytes(reader.binary()) or None) for image in images)


@dataclass(frozen=True, slots=True)
class SearchResponse:
    """Type 51: [code u32, message str, n u32, k u32, labels bin, distances bin, stats bin].

    If the request named an image, an array follows: `image`.
    If the request had `most`, a bin field follows: `incomplete`.

    Attributes:
        code: 0, or the code of an error. With an error, the other fields but `message` are empty.
        message: what went wrong.
        labels: int64[n, k], little-endian: the ids.
        distances: float32[n, k], little-endian.
        stats: the raw bytes of `OWNER_STATS_DTYPE`[n], 32 bytes each.
        incomplete: uint32[n], little-endian: the walks that `most` ended. None if the request had no `most`.
        image: the image that was searched. None if the request named none.
    """

    code: int
    message: str
    labels: npt.NDArray[np.int64]
    distances: npt.NDArray[np.float32]
    stats: Buffer
    incomplete: npt.NDArray[np.uint32] | None = None
    image: ImageIdentity | None = None

    def encode(self) -> tuple[Buffer, ...]:
        """Writes the payload in parts. The large fields are not copied."""
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
        if self.image is not None:
            parts.append(encode_image(self.image))
        if self.incomplete is not None:
            parts.append(binary(np.ascontiguousarray(self.incomplete, "<u4")))
        return tuple(parts)

    @classmethod
    def failed(cls, code: int, message: str) -> SearchResponse:
        """Makes an answer that only says what went wrong."""
        return cls(code, message, np.empty((0, 0), np.int64), np.empty((0, 0), np.float32), b"")

    @classmethod
    def decode(cls, payload: Payload) -> SearchResponse:
        """Reads a payload. The arrays are views of it if each lies in one buffer.

        Raises:
            FormatError: the payload is malformed.
        """
        reader = Reader(payload, "search response")
        answer = cls.read(reader)
        if reader.is_array_next():
            answer = replace(answer, image=reader.image())
        if not reader.at_end():
            answer = replace(answer, incomplete=reader.vector("<u4", len(answer.labels)))
        reader.end()
        return answer

    def check(self, n_queries: int, k: int) -> None:
        """Checks that the answer can be merged with others. What an owner sends is not to be trusted.

        Raises:
            FormatError: the shape is not [n_queries, k], a distance is NaN, a row is not sorted by distance, or its empty places
                (-1, inf) are not at the end.
        """
        if self.labels.shape != (n_queries, k):
            raise FormatError(f"an answer of {list(self.labels.shape)} to {n_queries} queries for {k}")
        filled = self.labels >= 0
        if np.isnan(self.distances).any():
            raise FormatError("an answer with distances that are no numbers")
        distances = np.where(filled, self.distances, np.float32(np.inf))
        if (filled[:, 1:] & ~filled[:, :-1]).any() or not (distances[:, 1:] >= distances[:, :-1]).all():
            raise FormatError("an answer that is not sorted by distance")

    @classmethod
    def read(cls, reader: Reader) -> SearchResponse:
        """Reads the array. Other items may follow it.

        Raises:
            FormatError: the array is malformed.
        """
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
