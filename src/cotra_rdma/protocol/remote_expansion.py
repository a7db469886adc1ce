"""Remote expansions: types 58 and 59, byte for byte.

One message carries the pushes of one round of all walks for one shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cotra_rdma._core.image_identity import ImageIdentity
from cotra_rdma._core.remote_expansion import EXPANSION_DTYPE, PUSH_DTYPE, Expansions
from cotra_rdma.errors import FormatError, InvalidInputError
from cotra_rdma.protocol.envelope import MAX_PAYLOAD_BYTES, Buffer, Payload, encode_array
from cotra_rdma.protocol.msgpack_io import Reader, array_prefix, bin_prefix, encode_image

_MAX_BATCH_BYTES = 4 << 20
_NEIGHBOUR_BYTES = 12  # a node's number, an estimate and its weight
_REQUEST_FIELDS, _RESPONSE_FIELDS = 5, 7
_ALIGNMENT = 8  # the C code reads arrays in place, in the received bytes
_HEAD_BYTES = 1024  # more than an answer has beside its arrays


def split_pushes(pushes: npt.NDArray[np.void], dim: int, degree: int) -> Iterator[slice]:
    """Splits the pushes of a round into parts that fit a message each. Most rounds are one part.

    Args:
        pushes: `PUSH_DTYPE`[n]. The pushes of one query follow each other.
        dim: the dimension of the queries. Each part holds the queries of its pushes.
        degree: the most neighbours of a node.

    Yields:
        The slice of `pushes` of each part.
    """
    if not len(pushes):
        return
    fresh = np.append(True, pushes["query"][1:] != pushes["query"][:-1])
    asked_bytes = np.cumsum(PUSH_DTYPE.itemsize + 4 * dim * fresh)
    most = _MAX_BATCH_BYTES // _expansion_bytes(1, degree)
    begin = 0
    while begin < len(pushes):
        before = asked_bytes[begin - 1] if begin else 0
        room = before + _MAX_BATCH_BYTES - (0 if fresh[begin] else 4 * dim)
        end = max(begin + 1, min(begin + most, int(np.searchsorted(asked_bytes, room, "right"))))
        yield slice(begin, end)
        begin = end


def check_fits(n_pushes: int, degree: int) -> None:
    """Checks that the answer to `n_pushes` pushes fits a message, before anything is allocated for it.

    Raises:
        InvalidInputError: it may not fit.
    """
    if _expansion_bytes(n_pushes, degree) > MAX_PAYLOAD_BYTES - _HEAD_BYTES:
        raise InvalidInputError(f"{n_pushes} nodes of {degree} neighbours do not fit one answer: ask for fewer at once")


def _expansion_bytes(n: int, degree: int) -> int:
    return n * (EXPANSION_DTYPE.itemsize + _NEIGHBOUR_BYTES * degree)


def _bytes_of(array: npt.NDArray[Any], dtype: Any) -> memoryview:
    return np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8).data


def _in_parts(head: bytes, *fields: memoryview) -> tuple[Buffer, ...]:
    """Writes a payload whose large fields are not copied."""
    parts: list[Buffer] = [head]
    for field in fields:
        parts += [bin_prefix(len(field)), field]
    return tuple(parts)


def _take(reader: Reader, dtype: Any, what: str) -> npt.NDArray[Any]:
    """Reads a bin field as an array that C may read. It is a view of the received bytes if they are aligned."""
    field, size = reader.binary(), np.dtype(dtype).itemsize
    if len(field) % size:
        raise FormatError(f"{what}: a field of {len(field)} bytes, of items of {size}")
    array = np.frombuffer(field, dtype)
    return array.copy() if array.__array_interface__["data"][0] % _ALIGNMENT else array


@dataclass(frozen=True, slots=True, eq=False)
class ExpandRequest:
    """Type 58: [collection str, dim u32, queries bin, pushes bin, image array].

    Attributes:
        collection: the name of the collection, or "" if the owner serves one shard.
        queries: float32[n_queries, dim]: the queries that `pushes` names.
        pushes: `PUSH_DTYPE`[n]. The owner is fastest if the pushes of one query follow each other.
        image: the image whose rows are to be expanded.
    """

    collection: str
    queries: npt.NDArray[np.float32]
    pushes: npt.NDArray[np.void]
    image: ImageIdentity

    @classmethod
    def of(cls, queries: npt.NDArray[np.float32], pushes: npt.NDArray[np.void], image: ImageIdentity) -> ExpandRequest:
        """Makes a request that holds only the queries that `pushes` names. They are numbered anew.

        Args:
            queries: float32[n_queries, dim].
            pushes: `PUSH_DTYPE`[n]. It is not changed.
            image: the image whose rows are to be expanded.

        Raises:
            InvalidInputError: a push names a query that is not in `queries`.
        """
        used, numbers = np.unique(pushes["query"], return_inverse=True)
        if len(used) and used[-1] >= len(queries):
            raise InvalidInputError(f"a node to expand for query {used[-1]} of {len(queries)}")
        pushes = pushes.copy()
        pushes["query"] = numbers
        return cls("", queries[used], pushes, image)

    def encode(self) -> tuple[Buffer, ...]:
        """Writes the payload in parts. The large fields are not copied."""
        head = array_prefix(_REQUEST_FIELDS) + encode_array(self.collection) + encode_array(self.queries.shape[1])
        parts = _in_parts(head, _bytes_of(self.queries, "<f4"), _bytes_of(self.pushes, PUSH_DTYPE))
        return (*parts, encode_image(self.image))

    @classmethod
    def decode(cls, payload: Payload) -> ExpandRequest:
        """Reads a payload. The expander checks that the rows exist and that the queries are finite.

        Raises:
            FormatError: the payload is malformed.
        """
        what = "expand request"
        reader = Reader(payload, what)
        if reader.array() != _REQUEST_FIELDS:
            raise FormatError(f"{what}: an array of {_REQUEST_FIELDS} was expected")
        collection, dim = reader.text(), reader.unsigned()
        flat, pushes = _take(reader, "<f4", what), _take(reader, PUSH_DTYPE, what)
        image = reader.image()
        reader.end()
        if image is None:
            raise FormatError(f"{what}: it names no image")
        if not dim or len(flat) % dim:
            raise FormatError(f"{what}: {len(flat)} numbers are no queries of dim {dim}")
        queries = flat.reshape(-1, dim)
        if len(pushes) and int(pushes["query"].max()) >= len(queries):
            raise FormatError(f"{what}: a node for query {pushes['query'].max()} of {len(queries)}")
        if np.isnan(pushes["limit"]).any():
            raise FormatError(f"{what}: a limit is NaN")
        return cls(collection, queries, pushes, image)


@dataclass(frozen=True, slots=True, eq=False)
class ExpandResponse:
    """Type 59: [code u32, message str, expansions bin, numbers bin, estimates bin, weights bin, image array].

    Attributes:
        code, message: as in `SearchResponse`. With an error, the other fields are empty.
        told: the expansions, in the order of the pushes.
        image: the image whose rows were expanded, or None with an error.
    """

    code: int
    message: str
    told: Expansions
    image: ImageIdentity | None = None

    @classmethod
    def failed(cls, code: int, message: str) -> ExpandResponse:
        """Makes an answer that only says what went wrong."""
        return cls(code, message, Expansions.none())

    def encode(self) -> tuple[Buffer, ...]:
        """Writes the payload in parts. The large fields are not copied."""
        head = array_prefix(_RESPONSE_FIELDS) + encode_array(self.code) + encode_array(self.message)
        told = self.told
        parts = _in_parts(
            head,
            _bytes_of(told.found, EXPANSION_DTYPE),
            _bytes_of(told.numbers, "<u4"),
            _bytes_of(told.estimates, "<f4"),
            _bytes_of(told.weights, "<f4"),
        )
        return (*parts, encode_image(self.image))

    @classmethod
    def decode(cls, payload: Payload) -> ExpandResponse:
        """Reads a payload.

        The caller must check that there are as many expansions as pushes.
        The engine checks that each number is one of the graph's nodes.

        Raises:
            FormatError: the payload is malformed.
        """
        what = "expand response"
        reader = Reader(payload, what)
        if reader.array() != _RESPONSE_FIELDS:
            raise FormatError(f"{what}: an array of {_RESPONSE_FIELDS} was expected")
        code, message = reader.unsigned(), reader.text()
        found = _take(reader, EXPANSION_DTYPE, what)
        numbers = _take(reader, "<u4", what)
        estimates, weights = _take(reader, "<f4", what), _take(reader, "<f4", what)
        image = reader.image()
        reader.end()
        total = int(found["count"].sum(dtype=np.uint64))
        if not total == len(numbers) == len(estimates) == len(weights):
            raise FormatError(
                f"{what}: {len(numbers)} neighbours, {len(estimates)} estimates and {len(weights)} weights where {total} are "
                "counted"
            )
        if not (np.isfinite(found["distance"]).all() and np.isfinite(found["scale"]).all()):
            raise FormatError(f"{what}: a distance is NaN or infinite")
        if np.isnan(estimates).any():
            raise FormatError(f"{what}: an estimate is NaN")
        return cls(code, message, Expansions(found, numbers, estimates, weights), image)
