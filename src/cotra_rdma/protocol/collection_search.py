"""The answer to a search of the whole collection (type 51), which a home makes for a reader."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cotra_rdma.errors import FormatError
from cotra_rdma.protocol.envelope import Buffer, Payload, decode_array, encode_array
from cotra_rdma.protocol.msgpack_io import Reader, array_prefix, bin_prefix, binary
from cotra_rdma.protocol.search import SearchResponse

MORE_STATS_BYTES = 16
_EXTENSION_FIELDS = 4


@dataclass(frozen=True, slots=True, eq=False)
class CollectionResponse:
    """Type 51, followed by a second array: [images bin, shards bin, more_stats bin, failures map].

    Attributes:
        answer: the answers, merged over the shards.
        images: uint64[n_shards]: the checksum of each shard's image. It names the shard, because the owner may have the shards
            in another order than the reader. 0 is a checksum that the owner does not know.
        shards: int32[n, k]: the position in `images` of each answer's shard. -1 is an empty place.
        more_stats: the raw bytes of `MORE_STATS_DTYPE`[n], 16 bytes each.
        failures: why a shard did not answer, by its position in `images`.
    """

    answer: SearchResponse
    images: npt.NDArray[np.uint64]
    shards: npt.NDArray[np.int32]
    more_stats: Buffer
    failures: dict[int, str]

    def encode(self) -> tuple[Buffer, ...]:
        """Writes the payload in parts. Large fields are not copied."""
        fields = [array_prefix(_EXTENSION_FIELDS), binary(np.ascontiguousarray(self.images, "<u8"))]
        fields += [binary(np.ascontiguousarray(self.shards, "<i4")), bin_prefix(len(self.more_stats))]
        return (*self.answer.encode(), b"".join(fields), self.more_stats, encode_array(self.failures))

    @classmethod
    def decode(cls, payload: Payload) -> CollectionResponse:
        """Reads a payload. An answer with an error has no second array.

        Raises:
            FormatError: the payload is malformed.
        """
        what = "search response of a collection"
        reader = Reader(payload, what)
        answer = SearchResponse.read(reader)
        if answer.code:
            reader.end()
            return cls(answer, np.empty(0, np.uint64), np.empty(answer.labels.shape, np.int32), b"", {})
        if reader.array() != _EXTENSION_FIELDS:
            raise FormatError(f"{what}: an extension of {_EXTENSION_FIELDS} was expected")
        field = reader.binary()
        if not field or len(field) % 8:
            raise FormatError(f"{what}: {len(field)} bytes name no shards")
        images = np.frombuffer(field, "<u8")
        n, k = answer.labels.shape
        shards = reader.vector("<i4", n * k).reshape(n, k)
        if shards.size and not -1 <= shards.min() <= shards.max() < len(images):
            raise FormatError(f"{what}: an answer of a shard that is none of {len(images)}")
        if ((shards < 0) != (answer.labels < 0)).any():
            raise FormatError(f"{what}: an answer of no shard, or a shard of no answer")
        more_stats = reader.binary()
        if len(more_stats) != MORE_STATS_BYTES * n:
            raise FormatError(f"{what}: {len(more_stats)} bytes of stats to {n} queries")
        failures = decode_array(reader.rest(), dict[int, str], what)
        if any(not 0 <= at < len(images) for at in failures):
            raise FormatError(f"{what}: a failure of a shard that is none of {len(images)}")
        return cls(answer, images, shards, more_stats, failures)
