"""Coarse tables and tables of inverted lists: types 52 to 55, byte for byte."""

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
