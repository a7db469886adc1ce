"""Graph images as bytes to be changed: the format written down a second time (csrc/format/image.h), and memory that faults."""

from __future__ import annotations

import ctypes
import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from cotra_rdma import Arena, Shard
from cotra_rdma._native.channel import Channel
from cotra_rdma._native.graph_engine import Engine
from cotra_rdma._native.view import View

HEADER_BYTES, RECORD_HEAD_BYTES, BLOCK = 4096, 32, 32
_U64 = ["image_bytes", "count", "deleted_count", "upper_count", "generation", "seed", "records_offset", "nav_offset"]
_U64 += ["nav_bytes", "image_checksum"]
_U32 = ["record_bytes", "dim", "code_dim", "metric", "vector_type", "M", "degree", "ef_construction", "max_level"]
_U32 += ["entry_node", "format_version", "nav_checksum"]
# name -> (offset, struct format)
HEADER_FIELDS = (
    {"magic": (0, "<Q"), "version": (8, "<I"), "header_checksum": (12, "<I")}
    | {name: (16 + 8 * i, "<Q") for i, name in enumerate(_U64)}
    | {name: (96 + 4 * i, "<I") for i, name in enumerate(_U32)}
    | {"ivf_offset": (144, "<Q"), "ivf_bytes": (152, "<Q"), "ivf_checksum": (160, "<I"), "reserved": (164, "<I")}
    | {"graph_id": (168, "<Q"), "graph_count": (176, "<Q"), "graph_base": (184, "<Q")}
)
USED_HEADER_BYTES = 192
IVF_HEADER_BYTES = 64
IVF_FIELDS = {
    "magic": (0, "<Q"),
    "version": (8, "<I"),
    "n_lists": (12, "<I"),
    "bits": (16, "<I"),
    "code_dim": (20, "<I"),
    "centroid_type": (24, "<I"),
    "table_checksum": (28, "<I"),
    "entries": (32, "<Q"),
    "table_bytes": (40, "<Q"),
    "list_bytes": (48, "<Q"),
    "reserved": (56, "<Q"),
}
RECORD_FIELDS = {
    "checksum": (0, "<I"),
    "node": (4, "<I"),
    "label": (8, "<q"),
    "flags": (16, "<I"),
    "count": (20, "<H"),
    "reserved": (22, "<H"),
    "generation": (24, "<I"),
    "norm2": (28, "<I"),  # the bits of a float32
}


def _keys() -> npt.NDArray[np.uint64]:
    """SplitMix64 from 0."""
    z = np.arange(1, 129, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return z ^ z >> np.uint64(31)


_KEYS = _keys().view("<u4").reshape(-1, 2)


def checksum(data: bytes, seed: int) -> int:
    """csrc/base/checksum.c: NH of each chunk of 128 words, chained."""
    words = np.frombuffer(data, "<u4").reshape(-1, 2)
    state, first = len(data) << 32 | seed, -len(words) % 8
    while len(words):
        chunk, words = words[: 128 - first], words[128 - first :]
        halves = (chunk + _KEYS[first : first + len(chunk)]).astype(np.uint64)
        state = (state + int(halves.prod(axis=1, dtype=np.uint64).sum(dtype=np.uint64))) * 0xFF51AFD7ED558CCD % 2**64
        state ^= state >> 32
        first = 0
    return state * 0xC4CEB9FE1A85EC53 % 2**64 >> 32


class Image:
    """A valid image's bytes, to be spoiled. Checksums stay as they were until `seal`."""

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)
        self.header = {name: self.get(name) for name in HEADER_FIELDS}  # as it was made
        self.record_bytes, self.count = self.header["record_bytes"], self.header["count"]
        dim, code_dim, degree = (self.header[name] for name in ("dim", "code_dim", "degree"))
        vector_bytes = dim * (4, 2, 1)[self.header["vector_type"]]
        self.slots = -(-degree // BLOCK) * BLOCK
        self.numbers = RECORD_HEAD_BYTES + -(-vector_bytes // 32) * 32
        self.f0 = self.numbers + 4 * self.slots
        self.f1 = self.f0 + 2 * self.slots
        self.codes = self.f1 + 2 * self.slots
        self.used_record_bytes = self.codes + self.slots // BLOCK * (code_dim // 4 * 16)
        upper = self.header["upper_count"]
        self.nav = self.header["nav_offset"]
        self.nav_nodes = self.nav + -(-4 * dim // 8) * 8
        self.nav_first_row = self.nav_nodes + -(-4 * upper // 8) * 8
        self.nav_rows = self.nav_first_row + -(-4 * (upper + 1) // 8) * 8
        self.ivf = self._read_ivf() if self.header["ivf_bytes"] else {}  # as it was made, too

    def get(self, field: str) -> int:
        offset, code = HEADER_FIELDS[field]
        return int(struct.unpack_from(code, self.data, offset)[0])

    def set(self, field: str, value: int) -> None:
        """A number of the header."""
        offset, code = HEADER_FIELDS[field]
        struct.pack_into(code, self.data, offset, value % 256 ** struct.calcsize(code))

    def record(self, node: int) -> int:
        """Where a record is."""
        return HEADER_BYTES + node * self.record_bytes

    def set_record(self, node: int, field: str, value: int) -> None:
        """A number of a record's head."""
        offset, code = RECORD_FIELDS[field]
        size = 8 * struct.calcsize(code)
        value %= 2**size
        struct.pack_into(code.upper(), self.data, self.record(node) + offset, value)

    def set_word(self, offset: int, value: int) -> None:
        """A u32 anywhere."""
        struct.pack_into("<I", self.data, offset, value)

    def set_half(self, offset: int, value: int) -> None:
        """A u16 anywhere: the bits of a bfloat16 for one."""
        struct.pack_into("<H", self.data, offset, value)

    def get_word(self, offset: int) -> int:
        return int(struct.unpack_from("<I", self.data, offset)[0])

    def seal_record(self, node: int) -> None:
        """Makes one record's checksum right."""
        at = self.record(node)
        self.set_word(at, checksum(bytes(self.data[at + 8 : at + self.record_bytes]), node))

    def seal(self, *records: int) -> Image:
        """Makes the checksums of the named records, the navigation section, the whole, and the header right."""
        for node in records:
            self.seal_record(node)
        nav = bytes(self.data[self.nav : self.nav + self.header["nav_bytes"]])
        self.set("nav_checksum", checksum(nav, 1))
        chain = 0
        for node in range(self.count):
            chain = checksum(struct.pack("<Q", chain << 32 | self.get_word(self.record(node))), 2)
        self.set("image_checksum", self.get("nav_checksum") << 32 | chain)
        return self.seal_header()

    def seal_lists(self) -> Image:
        """Makes the checksums of the inverted lists, their table and header, and the image's header right, as far as the
        section's numbers (as they were made) allow."""
        at, head = self.header["ivf_offset"], self.ivf
        data, checksums = at + head["table_bytes"], at + head["checksums"]
        for number, size in enumerate(head["sizes"]):
            total = 0
            for block in range(-(-size // BLOCK)):
                total += checksum(bytes(self.data[data : data + head["block_bytes"]]), block)
                data += head["block_bytes"]
            self.set_word(checksums + 4 * number, total % 2**32)
        return self.seal_table()

    def seal_table(self) -> Image:
        """The same without the lists."""
        at, head = self.header["ivf_offset"], self.ivf
        self.set_word(at + 28, checksum(bytes(self.data[at + IVF_HEADER_BYTES : at + head["table_bytes"]]), 4))
        return self.seal_ivf_header()

    def seal_ivf_header(self) -> Image:
        """The same without the table."""
        at = self.header["ivf_offset"]
        self.set("ivf_checksum", checksum(bytes(self.data[at : at + IVF_HEADER_BYTES]), 3))
        return self.seal_header()

    def _read_ivf(self) -> dict[str, Any]:
        """The inverted lists' header and where the parts of table and blocks are, from the section's first byte."""
        at, head = self.header["ivf_offset"], {}
        for name, (offset, code) in IVF_FIELDS.items():
            head[name] = int(struct.unpack_from(code, self.data, at + offset)[0])
        n = head["n_lists"]
        stride = -(-self.header["dim"] * (4, 2)[head["centroid_type"]] // 32) * 32
        column = -(-4 * n // 64) * 64
        head["sizes_at"] = IVF_HEADER_BYTES + -(-n * stride // 64) * 64
        head["radii"], head["errors"] = head["sizes_at"] + column, head["sizes_at"] + 2 * column
        head["checksums"] = head["sizes_at"] + 3 * column
        head["f0"] = head["bits"] * 4 * head["code_dim"]
        head["block_bytes"] = head["f0"] + 512
        head["sizes"] = list(struct.unpack_from(f"<{n}I", self.data, at + head["sizes_at"]))
        return head

    def seal_header(self) -> Image:
        """Makes the header's checksum right, and no other."""
        self.set("header_checksum", 0)
        self.set("header_checksum", checksum(bytes(self.data[:USED_HEADER_BYTES]), 0))
        return self

    def __bytes__(self) -> bytes:
        return bytes(self.data)


class GuardedMemory:
    """Memory with a page on both sides that faults: bytes put in it end right before the second one (8-byte aligned)."""

    def __init__(self, capacity: int) -> None:
        page = mmap.PAGESIZE
        self._inside = -(-capacity // page) * page
        self._map = mmap.mmap(-1, self._inside + 2 * page, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._bytes = np.frombuffer(self._map, np.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        for start in (0, page + self._inside):
            address = ctypes.c_void_p(self._bytes.ctypes.data + start)
            if libc.mprotect(address, ctypes.c_size_t(page), 0) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")

    def hold(self, data: bytes) -> npt.NDArray[np.uint8]:
        """The bytes, at the end of the memory; the next call overwrites them."""
        start = mmap.PAGESIZE + self._inside - -(-len(data) // 8) * 8
        view = self._bytes[start : start + len(data)]
        view[:] = np.frombuffer(data, np.uint8)
        return view


@contextmanager
def reader_of(memory: npt.NDArray[np.uint8], *, simd: int | None = None) -> Iterator[Engine]:
    """What a reader makes of a peer's memory, whose bytes nobody has checked."""
    with (
        Arena.wrap(memory) as arena,
        Channel.shm(arena) as channel,
        View.open(channel) as view,
        Engine.create([view], [channel], simd=simd) as engine,
    ):
        yield engine


class ImageBytes(bytes):
    """Bytes that do not fill a failing test's report."""

    def __repr__(self) -> str:
        return f"<{len(self)} bytes of an image>"


def image_bytes(shard: Shard) -> ImageBytes:
    """A shard's image."""
    with shard.arena.view() as view:
        return ImageBytes(view)
