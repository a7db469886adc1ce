"""The layout of a record, for Python.

`csrc/format/image.h` holds the same layout for C, and a test compares the two.
A record is a head, the node's own vector, and for each neighbour a number, two factors and a code.
The format is described in docs/reference/format.md.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

HEAD = np.dtype(
    [
        ("checksum", "<u4"),
        ("node", "<u4"),
        ("label", "<i8"),
        ("flags", "<u4"),
        ("count", "<u2"),
        ("reserved", "<u2"),
        ("generation", "<u4"),
        ("norm2", "<f4"),
    ]
)
DELETED = 1
"""The flag of a node that is never returned."""
NO_NODE = 0xFFFFFFFF
"""The number in places for neighbours that are not used."""
LINK_BYTES = 8
"""The bytes of a neighbour's number and factors. Its code comes on top."""
ELEMENTS: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "uint8": np.dtype("u1")}
"""The type of a component, by the name of the vector type."""

_BLOCK = 32  # neighbours whose codes are scanned together, and the bytes to whose multiple the own vector is padded
_Records = npt.NDArray[np.uint8]


class Header(Protocol):
    """The fields of an image's header that decide the layout. `ImageInfo` has them."""

    @property
    def dim(self) -> int: ...
    @property
    def degree(self) -> int: ...
    @property
    def count(self) -> int: ...
    @property
    def vector_type(self) -> str: ...
    @property
    def record_bytes(self) -> int: ...
    @property
    def records_offset(self) -> int: ...


def round_up(value: int, unit: int) -> int:
    """Returns the least multiple of `unit` that is not below `value`."""
    return -(-value // unit) * unit


def vector_bytes(header: Header) -> int:
    """Returns the bytes of a node's own vector, without padding."""
    return header.dim * ELEMENTS[header.vector_type].itemsize


def records_of(image: Any, header: Header) -> _Records:
    """Returns all records of an image as uint8[count, record_bytes].

    Args:
        image: the image, as a buffer. The result is a view of it, not a copy.
        header: the image's header.
    """
    records = np.frombuffer(image, np.uint8, header.count * header.record_bytes, header.records_offset)
    return records.reshape(header.count, header.record_bytes)


def heads_of(records: _Records) -> npt.NDArray[np.void]:
    """Copies the heads of records.

    Args:
        records: uint8[n, record_bytes].

    Returns:
        `HEAD`[n].
    """
    return np.ascontiguousarray(records[:, : HEAD.itemsize]).view(HEAD)[:, 0]


def vectors_of(records: _Records, header: Header, rows: slice | npt.NDArray[np.intp] = slice(None)) -> npt.NDArray[Any]:
    """Copies the own vectors of some records, in the type in which they are stored.

    Args:
        records: uint8[n, record_bytes].
        header: the image's header.
        rows: which records; all by default.

    Returns:
        [n, dim] of the image's vector type.
    """
    raw = records[rows, HEAD.itemsize : HEAD.itemsize + vector_bytes(header)]
    return np.ascontiguousarray(raw).view(ELEMENTS[header.vector_type])


def links_of(records: _Records, header: Header) -> npt.NDArray[np.uint32]:
    """Copies the numbers of the neighbours.

    Args:
        records: uint8[n, record_bytes].
        header: the image's header.

    Returns:
        uint32[n, places], with the places that are not used.
    """
    begin = HEAD.itemsize + round_up(vector_bytes(header), _BLOCK)
    return np.ascontiguousarray(records[:, begin : begin + 4 * round_up(header.degree, _BLOCK)]).view("<u4")
