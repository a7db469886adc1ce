"""Coarse tables, and the builders' tables of inverted lists: types 52 to 55, byte for byte."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cotra_rdma.errors import FormatError, InvalidInputError
from cotra_rdma.protocol.envelope import Payload, decode_array, encode_array
from cotra_rdma.protocol.msgpack_io import Reader, array_prefix, binary

_COARSE_REQUEST_FIELDS, _COARSE_FIELDS, _EXCHANGE_REQUEST_FIELDS, _EXCHANGE_FIELDS = 1, 8, 11, 2


CENTROID_TYPES = {"float16": "<f2", "float32": "<f4"}


@dataclass(frozen=True, slots=True, eq=False)
class CentroidTable:
    """Centroids, sizes and radii of one shard's clusters, as messages carry them.

    Attributes:
        centroids: float16[n_lists, dim] or float32[n_lists, dim], finite.
        sizes: uint32[n_lists]: the number of vectors in each cluster.
        radii: float32[n_lists]: the root mean square distance (l2) of a cluster's vectors from its centroid. It is finite and
            at least 0.
    """

    centroids: npt.NDArray[Any]
    sizes: npt.NDArray[np.uint32]
    radii: npt.NDArray[np.float32]

    @classmethod
    def of(cls, table: Any, centroid_type: str = "float32") -> CentroidTable:
        """Makes a table of any object with `centroids` [n_lists, dim], `sizes` [n_lists] and `radii` [n_lists].

        Args:
            table: the object. Its arrays may be of any real type.
            centroid_type: "float32", or "float16" for half the bytes. float16 rounds to 11 bits of mantissa.

        Raises:
            InvalidInputError: the shapes disagree, or a value does not fit.
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
        """Makes a table without centroids, of dimension 0, for an answer that only says what went wrong."""
        return cls(np.empty((0, 0), "<f4"), np.empty(0, "<u4"), np.empty(0, "<f4"))

    @property
    def centroid_type(self) -> str:
        """ "float16" or "float32"."""
        return str(self.centroids.dtype.name)

    def fault(self) -> str:
        """Returns what is wrong with the table, or "" if nothing is."""
        if self.centroids.ndim != 2 or not self.sizes.shape == self.radii.shape == self.centroids.shape[:1]:
            shapes = ", ".join(str(list(field.shape)) for field in (self.centroids, self.sizes, self.radii))
            return f"shapes {shapes} are not [n_lists, dim], [n_lists], [n_lists]"
        if not np.isfinite(self.centroids).all():
            return "a centroid holds NaN or infinity"
        if not (np.isfinite(self.radii) & (self.radii >= 0)).all():
            return "a radius is NaN, infinite or below 0"
        return ""

    def fields(self) -> list[bytes]:
        """Writes the fields that types 53 and 54 share: dim, n_lists, centroid_type, centroids, sizes, radii."""
        n_lists, dim = self.centroids.shape
        numbers = [encode_array(value) for value in (dim, n_lists, self.centroid_type)]
        return [*numbers, *(binary(field) for field in (self.centroids, self.sizes, self.radii))]

    @classmethod
    def read(cls, reader: Reader, what: str) -> CentroidTable:
        """Reads the fields that `fields` writes. `what` is the name of the message, for errors.

        Raises:
            FormatError: a field is malformed.
        """
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
    """Type 52: [collection str].

    Attributes:
        collection: the name of the collection, or "" if the owner serves one shard.
    """

    collection: str = ""

    def encode(self) -> bytes:
        """Writes the payload."""
        return array_prefix(_COARSE_REQUEST_FIELDS) + encode_array(self.collection)

    @classmethod
    def decode(cls, payload: Payload) -> CoarseRouteRequest:
        """Reads a payload.

        Raises:
            FormatError: the payload is malformed.
        """
        reader = Reader(payload, "coarse route request")
        if reader.array() != _COARSE_REQUEST_FIELDS:
            raise FormatError(f"coarse route request: an array of {_COARSE_REQUEST_FIELDS} was expected")
        request = cls(reader.text())
        reader.end()
        return request


@dataclass(frozen=True, slots=True, eq=False)
class CoarseRouteResponse:
    """Type 53.

    Its array is [code u32, message str, dim u32, n_lists u32, centroid_type str, centroids bin, sizes bin, radii bin].
    If the shard is one of a collection, a MessagePack map follows.
    Its key "shard" is the shard's number in the collection.
    Its key "calibration" is what `Calibration.to_json` makes, or nil.

    Attributes:
        code, message: as in `SearchResponse`. With an error, the table is empty.
        table: the shard's coarse table.
        collection: the map, or None.
    """

    code: int
    message: str
    table: CentroidTable
    collection: dict[str, Any] | None = None

    @classmethod
    def failed(cls, code: int, message: str) -> CoarseRouteResponse:
        """Makes an answer that only says what went wrong."""
        return cls(code, message, CentroidTable.empty())

    def encode(self) -> bytes:
        """Writes the payload."""
        head = [array_prefix(_COARSE_FIELDS), encode_array(self.code), encode_array(self.message)]
        tail = [] if self.collection is None else [encode_array(self.collection)]
        return b"".join([*head, *self.table.fields(), *tail])

    @classmethod
    def decode(cls, payload: Payload) -> CoarseRouteResponse:
        """Reads a payload.

        Raises:
            FormatError: the payload is malformed.
        """
        what = "coarse route response"
        reader = Reader(payload, what)
        if reader.array() != _COARSE_FIELDS:
            raise FormatError(f"{what}: an array of {_COARSE_FIELDS} was expected")
        code, message, table = reader.unsigned(), reader.text(), CentroidTable.read(reader, what)
        rest = reader.rest()
        return cls(code, message, table, decode_array(rest, dict[str, Any], what) if rest else None)


@dataclass(frozen=True, slots=True, eq=False)
class BuildExchangeRequest:
    """Type 54.

    Its array is [shard u32, dim u32, n_lists u32, centroid_type str, centroids bin, sizes bin, radii bin, offsets bin,
    lengths bin, region_offset u64, generation u64].
    Between the builders of one graph, a MessagePack map follows.

    Attributes:
        shard: the number of the sender's shard.
        table: the centroids, the sizes and the radii of the sender's inverted lists.
        offsets: uint64[n_lists]: where each list begins, in bytes after `region_offset`.
        lengths: uint32[n_lists]: the bytes of each list.
        region_offset: where the section of lists begins, in bytes after the start of the sender's memory region.
        generation: the generation of the sender's shard. After a rebuild, the table is out of date.
        told: the map, or None.
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
        """Makes a builder's message without a table."""
        none = np.empty(0, np.uint64)
        return cls(shard, CentroidTable.empty(), none, none.astype(np.uint32), 0, 0, told)

    def encode(self) -> bytes:
        """Writes the payload.

        Raises:
            InvalidInputError: offsets or lengths do not fit the table.
        """
        offsets, lengths = np.ascontiguousarray(self.offsets, "<u8"), np.ascontiguousarray(self.lengths, "<u4")
        if why := _misplaced(self.table, offsets, lengths, self.region_offset):
            raise InvalidInputError(f"build exchange: {why}")
        parts = [array_prefix(_EXCHANGE_REQUEST_FIELDS), encode_array(self.shard), *self.table.fields()]
        parts += [binary(offsets), binary(lengths), encode_array(self.region_offset), encode_array(self.generation)]
        parts += [] if self.told is None else [encode_array(self.told)]
        return b"".join(parts)

    @classmethod
    def decode(cls, payload: Payload) -> BuildExchangeRequest:
        """Reads a payload. Whoever READs the lists must check that they lie inside the sender's region.

        Raises:
            FormatError: the payload is malformed.
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
    """Returns what is wrong with offsets and lengths of lists, or "" if nothing is."""
    if not offsets.shape == lengths.shape == table.sizes.shape:
        return f"{offsets.size} offsets and {lengths.size} lengths for {table.sizes.size} lists"
    if not 0 <= region_offset < 2**64:
        return f"region_offset {region_offset} does not fit u64"
    room = np.uint64(2**64 - 1 - region_offset)
    # Differences are compared, because the sums could pass 64 bits.
    if (lengths > room).any() or (offsets > room - lengths.astype(np.uint64)).any():
        return "a list passes the end of the address space"
    return ""


@dataclass(frozen=True, slots=True)
class BuildExchangeResponse:
    """Type 55: [code u32, message str]. The attributes are as in `SearchResponse`."""

    code: int = 0
    message: str = ""

    def encode(self) -> bytes:
        """Writes the payload."""
        return array_prefix(_EXCHANGE_FIELDS) + encode_array(self.code) + encode_array(self.message)

    @classmethod
    def decode(cls, payload: Payload) -> BuildExchangeResponse:
        """Reads a payload.

        Raises:
            FormatError: the payload is malformed.
        """
        reader = Reader(payload, "build exchange response")
        if reader.array() != _EXCHANGE_FIELDS:
            raise FormatError(f"build exchange response: an array of {_EXCHANGE_FIELDS} was expected")
        response = cls(reader.unsigned(), reader.text())
        reader.end()
        return response
