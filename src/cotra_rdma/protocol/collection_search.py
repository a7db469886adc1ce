"""The answer (51) to a search of the whole collection, which an owner makes for who routed its queries there.

The page is docs/reference/wire.md.
"""

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
    """Type 51, and after its array another one: [images bin, shards bin, more_stats bin, failures map].

    Attributes:
        answer: merged over the shards.
        images: uint64[n_shards]: the checksum of each shard's image, which names it: the owner's order of the shards need not be
            that of who asks. 0 where the owner does not know it.
        shards: int32[n, k]: the place in `images` of the shard of each answer; -1 in empty places.
        more_stats: what `STATS_DTYPE` has beyond `OWNER_STATS_DTYPE`, [n], as raw bytes (16 each).
        failures: the places of shards that did not answer, and why.
    """

    answer: SearchResponse
    images: npt.NDArray[np.uint64]
    shards: npt.NDArray[np.int32]
    more_stats: Buffer
    failures: dict[int, str]

    def encode(self) -> tuple[Buffer, ...]:
        """The payload in parts."""
        fields = [array_prefix(_EXTENSION_FIELDS), binary(np.ascontiguousarray(self.images, "<u8"))]
        fields += [binary(np.ascontiguousarray(self.shards, "<i4")), bin_prefix(len(self.more_stats))]
        return (*self.answer.encode(), b"".join(fields), self.more_stats, encode_array(self.failures))

    @classmethod
    def decode(cls, payload: Payload) -> CollectionResponse:
        """Reads a payload; an error's has no second array. Raises `FormatError`."""
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
