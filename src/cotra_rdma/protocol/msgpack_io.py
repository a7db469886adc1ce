"""Reads MessagePack item by item, and writes the prefixes of its large items.

It serves messages that carry arrays, which are not copied.
`msgspec` reads and writes the other messages.
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
"""One item of a MessagePack array of float32: the marker, then the number."""
FLOAT32_MARKER = 0xCA


def _length_prefix(length: int, fix: tuple[int, int], wide: tuple[tuple[int, str], ...]) -> bytes:
    """Writes the length of a MessagePack item.

    Args:
        length: the length.
        fix: the marker of the one-byte form, and the first length that it cannot hold.
        wide: the marker of each wider form, and struct's code of its length. The shortest form is first.
    """
    if length < fix[1]:
        return bytes([fix[0] | length])
    for marker, code in wide:
        if length < 256 ** struct.calcsize(code):
            return bytes([marker]) + struct.pack(">" + code, length)
    raise InvalidInputError(f"MessagePack cannot hold {length} items")


def array_prefix(length: int) -> bytes:
    """Writes the prefix of an array of `length` items."""
    return _length_prefix(length, (0x90, 16), ((0xDC, "H"), (0xDD, "I")))


def bin_prefix(length: int) -> bytes:
    """Writes the prefix of a bin field of `length` bytes."""
    return _length_prefix(length, (0, 0), ((0xC4, "B"), (0xC5, "H"), (0xC6, "I")))


def binary(field: npt.NDArray[Any]) -> bytes:
    """Writes the memory of an array as a bin field."""
    return bin_prefix(field.nbytes) + field.tobytes()


def encode_image(image: ImageIdentity | None) -> bytes:
    """Writes an image's identity as an array of three numbers, and None as an empty array."""
    return encode_array(image or ())


class Reader:
    """Reads MessagePack items one after the other.

    A `bin` field that lies in one buffer is not copied.
    Each method raises `FormatError` if the next item is of another kind, or if the payload ends too early.
    """

    def __init__(self, payload: Payload, what: str) -> None:
        """Begins at the first byte of the payload. `what` is the name of the message, for errors."""
        self._buffers = [memoryview(part) for part in (payload if isinstance(payload, tuple) else (payload,))]
        self._what = what

    def take(self, n: int) -> memoryview:
        """Reads n bytes."""
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
        """Returns whether everything was read."""
        return not any(self._buffers)

    def number(self, code: str) -> int:
        """Reads a big-endian integer without a marker. `code` is struct's code of it."""
        return int(struct.unpack(">" + code, self.take(struct.calcsize(code)))[0])

    def _length(self, fix: tuple[int, int] | None, wide: dict[int, str], kind: str) -> int:
        marker = self.number("B")
        if fix and fix[0] <= marker < fix[0] + fix[1]:
            return marker - fix[0]
        if marker not in wide:
            raise FormatError(f"{self._what}: {kind} was expected, not the MessagePack marker 0x{marker:02x}")
        return self.number(wide[marker])

    def array(self) -> int:
        """Reads the prefix of an array, and returns the number of its items."""
        return self._length((0x90, 16), {0xDC: "H", 0xDD: "I"}, "an array")

    def text(self) -> str:
        """Reads a string."""
        length = self._length((0xA0, 32), {0xD9: "B", 0xDA: "H", 0xDB: "I"}, "a string")
        try:
            return bytes(self.take(length)).decode()
        except UnicodeDecodeError as error:
            raise FormatError(f"{self._what}: a string is not UTF-8: {error}") from error

    def binary(self) -> memoryview:
        """Reads a bin field."""
        return self.take(self._length(None, {0xC4: "B", 0xC5: "H", 0xC6: "I"}, "a binary field"))

    def _unsigned(self, codes: dict[int, str], kind: str) -> int:
        marker = self.number("B")
        if marker < 0x80:
            return marker
        if marker not in codes:
            raise FormatError(f"{self._what}: a {kind} was expected, not the MessagePack marker 0x{marker:02x}")
        return self.number(codes[marker])

    def unsigned(self) -> int:
        """Reads a u32 in any of its encodings."""
        return self._unsigned({0xCC: "B", 0xCD: "H", 0xCE: "I"}, "u32")

    def unsigned64(self) -> int:
        """Reads a u64 in any of its encodings."""
        return self._unsigned({0xCC: "B", 0xCD: "H", 0xCE: "I", 0xCF: "Q"}, "u64")

    def vector(self, kind: str, n: int) -> npt.NDArray[Any]:
        """Reads a bin field that holds n numbers of numpy's type `kind`. It is a view if one buffer holds the field."""
        field, wanted = self.binary(), n * np.dtype(kind).itemsize
        if len(field) != wanted:
            raise FormatError(f"{self._what}: a field of {len(field)} bytes where {n} numbers take {wanted}")
        return np.frombuffer(field, kind)

    def image(self) -> ImageIdentity | None:
        """Reads an image's identity or None, as `encode_image` writes them."""
        length = self.array()
        if length not in (0, 3):
            raise FormatError(f"{self._what}: the identity of an image is 3 numbers, not {length}")
        return ImageIdentity(*(self.unsigned64() for _ in range(3))) if length else None

    def is_array_next(self) -> bool:
        """Returns whether the next item is an array."""
        marker = next((part[0] for part in self._buffers if part), 0)
        return 0x90 <= marker < 0xA0 or marker in (0xDC, 0xDD)

    def rest(self) -> bytes:
        """Reads all bytes that are left."""
        return bytes(self.take(sum(map(len, self._buffers))))

    def end(self) -> None:
        """Checks that nothing is left.

        Raises:
            FormatError: bytes are left.
        """
        if not self.at_end():
            raise FormatError(f"{self._what}: bytes are left over")

    def boolean(self) -> bool:
        """Reads a truth value."""
        marker = self.number("B")
        if marker not in (0xC2, 0xC3):
            raise FormatError(f"{self._what}: a boolean was expected, not the MessagePack marker 0x{marker:02x}")
        return marker == 0xC3

    def floats(self, n: int) -> npt.NDArray[np.float32]:
        """Reads n float32 items. NodeDB writes no other encoding, so any other is an error."""
        items = np.frombuffer(self.take(5 * n), FLOAT32)
        if (items["marker"] != FLOAT32_MARKER).any():
            raise FormatError(f"{self._what}: the query vector holds something else than float32 numbers")
        return items["value"].astype(np.float32)
