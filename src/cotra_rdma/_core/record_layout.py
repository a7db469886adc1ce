"""Where the parts of a record lie, for Python: csrc/format/image.h says the same in C, and a test compares the two.

A record is a head, the node's own vector, and for each neighbour a number, two factors and a code (docs/reference/format.md).
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
"""In places for neighbours that are not used."""
LINK_BYTES = 8
"""Of a neighbour's number and factors; its code comes on top."""
ELEMENTS: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "uint8": np.dtype("u1")}
"""A component, by the vector type's name."""

_BLOCK = 32  # neighbours whose codes are scanned together, and bytes that the own vector is padded to
_Records = npt.NDArray[np.uint8]


class Header(Protocol):
    """What of an image's header the layout hangs on: an `ImageInfo`."""

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
    """The least multiple of `unit` that is not below `value`."""
    return -(-value // unit) * unit


def vector_bytes(header: Header) -> int:
    """Of an own vector, without padding."""
    return header.dim * ELEMENTS[header.vector_type].itemsize


def records_of(image: Any, header: Header) -> _Records:
    """All records of an image, a buffer: uint8[count, record_bytes], a view of it."""
    records = np.frombuffer(image, np.uint8, header.count * header.record_bytes, header.records_offset)
    return records.reshape(header.count, header.record_bytes)


def heads_of(records: _Records) -> npt.NDArray[np.void]:
    """The heads of records uint8[n, record_bytes]: `HEAD`[n], a copy."""
    return np.ascontiguousarray(records[:, : HEAD.itemsize]).view(HEAD)[:, 0]


def vectors_of(records: _Records, header: Header, rows: slice | npt.NDArray[np.intp] = slice(None)) -> npt.NDArray[Any]:
    """The own vectors of some of the records, as they are held: [n, dim], a copy."""
    raw = records[rows, HEAD.itemsize : HEAD.itemsize + vector_bytes(header)]
    return np.ascontiguousarray(raw).view(ELEMENTS[header.vector_type])


def links_of(records: _Records, header: Header) -> npt.NDArray[np.uint32]:
    """The numbers of neighbours, those of places that are not used too: uint32[n, places], a copy."""
    begin = HEAD.itemsize + round_up(vector_bytes(header), _BLOCK)
    return np.ascontiguousarray(records[:, begin : begin + 4 * round_up(header.degree, _BLOCK)]).view("<u4")
