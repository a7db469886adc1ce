"""What payloads are made of: MessagePack, read item by item, and the beginnings of its large items.

`msgspec` does the small messages; those that carry arrays are read and written here, without copying them.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt

from cotra_rdma._core.image_identity import ImageIdentity
from cotra_rdma.errors import FormatError, InvalidInputError
from cotra_rdma.protocol.envelope import Payload, encode_array

FLOAT32 = np.dtype([("marker", "u1"), ("value", ">f4")])
"""An item of an array of MessagePack's float32."""
FLOAT32_MARKER = 0xCA


def _length_prefix(length: int, fix: tuple[int, int], wide: tuple[tuple[int, str], ...]) -> bytes:
    """A MessagePack length: `fix` is (marker, limit) of the one-byte form, `wide` the larger ones."""
    if length < fix[1]:
        return bytes([fix[0] | length])
    for marker, code in wide:
        if length < 256 ** struct.calcsize(code):
            return bytes([marker]) + struct.pack(">" + code, length)
    raise InvalidInputError(f"MessagePack cannot hold {length} items")


def array_prefix(length: int) -> bytes:
    """The beginning of an array."""
    return _length_prefix(length, (0x90, 16), ((0xDC, "H"), (0xDD, "I")))


def bin_prefix(length: int) -> bytes:
    """The beginning of a bin field."""
    return _length_prefix(length, (0, 0), ((0xC4, "B"), (0xC5, "H"), (0xC6, "I")))


def binary(field: npt.NDArray[Any]) -> bytes:
    """An array's memory as a bin field."""
    return bin_prefix(field.nbytes) + field.tobytes()


def encode_image(image: ImageIdentity | None) -> bytes:
    """An identity as an array of three numbers; None as an array of none."""
    return encode_array(image or ())


class Reader:
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

    def _unsigned(self, codes: dict[int, str], kind: str) -> int:
        marker = self.number("B")
        if marker < 0x80:
            return marker
        if marker not in codes:
            raise FormatError(f"{self._what}: a {kind} was expected, not the MessagePack marker 0x{marker:02x}")
        return self.number(codes[marker])

    def unsigned(self) -> int:
        """A u32 in any of its encodings."""
        return self._unsigned({0xCC: "B", 0xCD: "H", 0xCE: "I"}, "u32")

    def unsigned64(self) -> int:
        """A u64 in any of its encodings."""
        return self._unsigned({0xCC: "B", 0xCD: "H", 0xCE: "I", 0xCF: "Q"}, "u64")

    def vector(self, kind: str, n: int) -> npt.NDArray[Any]:
        """A bin field that holds n numbers of numpy's `kind`; a view where a buffer holds it whole."""
        field, wanted = self.binary(), n * np.dtype(kind).itemsize
        if len(field) != wanted:
            raise FormatError(f"{self._what}: a field of {len(field)} bytes where {n} numbers take {wanted}")
        return np.frombuffer(field, kind)

    def image(self) -> ImageIdentity | None:
        """An identity, or None, as `encode_image` writes them."""
        length = self.array()
        if length not in (0, 3):
            raise FormatError(f"{self._what}: the identity of an image is 3 numbers, not {length}")
        return ImageIdentity(*(self.unsigned64() for _ in range(3))) if length else None

    def is_array_next(self) -> bool:
        """Whether the next item is an array."""
        marker = next((part[0] for part in self._buffers if part), 0)
        return 0x90 <= marker < 0xA0 or marker in (0xDC, 0xDD)

    def rest(self) -> bytes:
        """All that is left."""
        return bytes(self.take(sum(map(len, self._buffers))))

    def end(self) -> None:
        """Raises when anything is left."""
        if not self.at_end():
            raise FormatError(f"{self._what}: bytes are left over")

    def boolean(self) -> bool:
        """True or false."""
        marker = self.number("B")
        if marker not in (0xC2, 0xC3):
            raise FormatError(f"{self._what}: a boolean was expected, not the MessagePack marker 0x{marker:02x}")
        return marker == 0xC3

    def floats(self, n: int) -> npt.NDArray[np.float32]:
        """n float32 items. (Other encodings of numbers are not NodeDB's, and refused.)"""
        items = np.frombuffer(self.take(5 * n), FLOAT32)
        if (items["marker"] != FLOAT32_MARKER).any():
            raise FormatError(f"{self._what}: the query vector holds something else than float32 numbers")
        return items["value"].astype(np.float32)
