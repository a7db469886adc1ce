"""Inverted lists that lie: every mutation ends in an answer or in a typed error, and never in a READ outside the memory.

The memory under test ends at a page that faults, so that a read past its end ends the run.
"""

from __future__ import annotations

import struct
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotra_rdma import Arena, ChecksumError, CotraError, FormatError, Shard
from cotra_rdma._native.channel import Channel
from cotra_rdma._native.library import lib
from cotra_rdma._native.list_engine import IvfTable
from cotra_rdma._native.view import View
from helpers.image import IVF_FIELDS, IVF_HEADER_BYTES, GuardedMemory, Image, checksum, image_bytes
from helpers.lists import spire_of
from helpers.properties import fixed

N, DIM, LISTS, BITS = 90, 8, 3, 2
QUERIES = np.random.default_rng(4).normal(size=(3, DIM)).astype(np.float32)
WORDS = st.sampled_from([0, 1, 31, 32, 33, 89, 90, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 0x7F800000, 0xFF800000])
FLOATS = st.sampled_from([0x7FC00000, 0x7F7FFFFF, 0xFF7FFFFF, 1, 0x80000000])
ANY_WORD = WORDS | FLOATS | st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module")
def valid() -> bytes:
    rows = np.random.default_rng(3).normal(size=(N, DIM)).astype(np.float32)
    with Shard.build(rows, M=4, ef_construction=20, n_threads=1, n_lists=LISTS, ivf_bits=BITS) as shard:
        return image_bytes(shard)


@pytest.fixture(scope="module")
def memory() -> GuardedMemory:
    return GuardedMemory(1 << 18)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ivf") / "mutated.cotra"


def answers(memory: GuardedMemory, data: bytes, simd: int | None = None) -> np.ndarray:
    """Labels of a search of a peer's lists, whatever they are. Raises what the search raises."""
    with Arena.wrap(memory.hold(data)) as arena, spire_of(arena, simd=simd) as engine:
        queries = QUERIES if engine._dim == DIM else np.ones((3, engine._dim), np.float32)
        labels, distances, _, stats = engine.search(queries, 5, 2)
        assert (distances[:, :-1] <= distances[:, 1:]).all()  # so none is NaN
        assert (stats["rounds"] <= 2).all()
        engine.search(queries, 5, 2**31, N, filters=[b"\x55" * 4096])
    return labels


def survives(memory: GuardedMemory, path: Path, data: bytes) -> None:
    for simd in (lib.COTRA_SIMD_PORTABLE, lib.cotra_simd_best()):
        with suppress(CotraError):
            answers(memory, data, simd)
    path.write_bytes(data)
    for verify in (True, False):
        with suppress(FormatError), Shard.open(path, verify=verify) as shard:
            assert shard.ivf_info is None or shard.ivf_info.n_lists > 0


def refuses(memory: GuardedMemory, path: Path, data: bytes) -> None:
    """Both readers refuse it."""
    with pytest.raises(FormatError):
        answers(memory, data)
    path.write_bytes(data)
    with pytest.raises(FormatError):
        Shard.open(path)
    survives(memory, path, data)


def test_the_helper_knows_the_format(memory: GuardedMemory, path: Path, valid: bytes) -> None:
    image = Image(valid)
    assert (image.ivf["n_lists"], image.ivf["bits"], sum(image.ivf["sizes"])) == (LISTS, BITS, N)
    assert bytes(image.seal_lists()) == valid
    survives(memory, path, valid)
    assert (answers(memory, valid) >= 0).all()


@fixed(200)
@given(flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=6))
def test_flipped_bytes(memory: GuardedMemory, path: Path, valid: bytes, flips: list[tuple[float, int]]) -> None:
    data, start = bytearray(valid), Image(valid).header["ivf_offset"]
    for place, mask in flips:
        data[start + int(place * (len(data) - start))] ^= mask
    survives(memory, path, bytes(data))
    path.write_bytes(data)
    if data != valid:
        with pytest.raises(FormatError):
            Shard.open(path)


@fixed(100)
@given(length=st.integers(0, 2**16))
def test_truncated(memory: GuardedMemory, path: Path, valid: bytes, length: int) -> None:
    start = Image(valid).header["ivf_offset"]
    refuses(memory, path, valid[: start + length % (len(valid) - start)])


@pytest.mark.parametrize("field", list(IVF_FIELDS))
def test_header_numbers_with_right_checksums(memory: GuardedMemory, path: Path, valid: bytes, field: str) -> None:
    offset, code = IVF_FIELDS[field]
    original = Image(valid).ivf[field]
    width = 2 ** (8 * struct.calcsize(code))
    interesting = (0, 1, 2, 3, 8, 9, 64, 2**20, 2**20 + 1, 2**31, 2**32 - 1, 2**56, 2**63, 2**64 - 1)
    for value in {value % width for value in (*interesting, original - 1, original + 1, 2 * original, original + 64)}:
        image = Image(valid)
        struct.pack_into(code, image.data, image.header["ivf_offset"] + offset, value)
        data = bytes(image.seal_ivf_header())
        # a few more empty lists, or longer centroids, fit into the padding
        if value != original and field != "reserved" and not (field in ("n_lists", "centroid_type") and value <= 16):
            refuses(memory, path, data)
        survives(memory, path, data)


@fixed(100)
@given(
    n_lists=st.integers(0, 200) | st.sampled_from([2**20, 2**20 + 1, 2**31, 2**32 - 1]),
    bits=st.integers(0, 9),
    kind=st.integers(0, 2),
    counted=st.booleans(),
)
def test_consistent_headers_of_other_bytes(
    memory: GuardedMemory, path: Path, valid: bytes, n_lists: int, bits: int, kind: int, counted: bool
) -> None:
    """A header whose numbers fit each other, for bytes that they do not fit."""
    image = Image(valid + valid)
    at = image.header["ivf_offset"]
    stride = 32
    table = IVF_HEADER_BYTES + -(-n_lists * stride // 64) * 64 + 4 * (-(-4 * n_lists // 64) * 64)
    block = bits * 4 * 64 + 512
    whole = table + (n_lists * block if counted else 5 * block)
    struct.pack_into("<4I", image.data, at + 12, n_lists, bits, 64, kind)
    struct.pack_into("<3Q", image.data, at + 32, N, table, whole - table)
    image.set("ivf_bytes", whole)
    image.set("image_bytes", at + whole)
    image.ivf["table_bytes"] = table
    if counted and 1 <= n_lists <= 200:  # lists of one entry: the checks behind those of sizes get their turn
        sizes = at + IVF_HEADER_BYTES + -(-n_lists * stride // 64) * 64
        for i in range(n_lists):
            image.set_word(sizes + 4 * i, 1 if i else max(N - n_lists + 1, 1))
    image.seal_table()
    survives(memory, path, bytes(image))


@fixed(200)
@given(changes=st.lists(st.tuples(st.integers(0, 2**16), ANY_WORD), min_size=1, max_size=4))
def test_tables_with_right_checksums(
    memory: GuardedMemory, path: Path, valid: bytes, changes: list[tuple[int, int]]
) -> None:
    image = Image(valid)
    at, table = image.header["ivf_offset"] + IVF_HEADER_BYTES, image.ivf["table_bytes"] - IVF_HEADER_BYTES
    for place, value in changes:
        image.set_word(at + place * 4 % table, value)
    survives(memory, path, bytes(image.seal_table()))


def test_numbers_that_a_table_must_not_hold(memory: GuardedMemory, path: Path, valid: bytes) -> None:
    head = Image(valid).ivf
    first, second = head["sizes"][:2]
    for spoil in (
        {head["sizes_at"]: first + 1},
        {head["sizes_at"]: first - 1},
        {head["sizes_at"]: 2**32 - 1},
        {head["sizes_at"]: first + 96, head["sizes_at"] + 4: (second - 96) % 2**32},
        {head["radii"]: 0x7F800000},
        {head["radii"] + 4: 0xBF800000},
        {head["errors"]: 0x7FC00000},
        {head["errors"] + 8: 0xBF800000},
        {IVF_HEADER_BYTES: 0xFFFFFFFF},
    ):
        image = Image(valid)
        for offset, value in spoil.items():
            image.set_word(image.header["ivf_offset"] + offset, value)
        refuses(memory, path, bytes(image.seal_table()))


@fixed(250)
@given(changes=st.lists(st.tuples(st.integers(0, 2**16), ANY_WORD | st.integers(0, N)), min_size=1, max_size=12))
def test_lists_with_right_checksums(
    memory: GuardedMemory, path: Path, valid: bytes, changes: list[tuple[int, int]]
) -> None:
    image = Image(valid)
    at = image.header["ivf_offset"] + image.ivf["table_bytes"]
    for place, value in changes:
        image.set_word(at + place * 4 % image.ivf["list_bytes"], value)
    survives(memory, path, bytes(image.seal_lists()))


def test_entries_that_a_list_must_not_hold(memory: GuardedMemory, path: Path, valid: bytes) -> None:
    """A row out of range, twice, or with another vector's checksum."""
    head = Image(valid).ivf
    start = Image(valid).header["ivf_offset"] + head["table_bytes"]
    rows, sums = start + head["f0"] + 256, start + head["f0"] + 384
    other = Image(valid).get_word(rows + 4)
    for offset, value, reason in (
        (rows, N, f"has row {N} of"),
        (rows, 2**32 - 1, "has row"),
        (rows, other, "again"),
        (sums, Image(valid).get_word(sums) ^ 1, "another checksum"),
    ):
        image = Image(valid)
        image.set_word(offset, value)
        if value == other:
            image.set_word(sums, image.get_word(sums + 4))
        data = bytes(image.seal_lists())
        path.write_bytes(data)
        with pytest.raises(FormatError, match=reason):
            Shard.open(path)
        if value != other:
            with pytest.raises(FormatError), Arena.wrap(memory.hold(data)) as arena, spire_of(arena) as engine:
                engine.search(QUERIES, 5, LISTS, N)
        survives(memory, path, data)


@fixed(80)
@given(seed=st.integers(0, 2**32 - 1), what=st.sampled_from(["rows", "floats", "codes", "all"]))
def test_every_list_is_hostile(memory: GuardedMemory, path: Path, valid: bytes, seed: int, what: str) -> None:
    """All rows, factors or codes are random, all checksums of lists are right."""
    image, generator = Image(valid), np.random.default_rng(seed)
    floats = np.array([0, -0.0, np.inf, -np.inf, np.nan, 3.4e38, -3.4e38, 1e-45, 1, -1], np.float32)
    start, head = image.header["ivf_offset"] + image.ivf["table_bytes"], image.ivf
    blocks = np.frombuffer(image.data, np.uint8)[start:].reshape(-1, head["block_bytes"])
    for block in blocks:
        if what in ("rows", "all"):
            block[head["f0"] + 256 : head["f0"] + 384].view(np.uint32)[:] = generator.integers(0, N, 32)
        if what in ("floats", "all"):
            block[head["f0"] : head["f0"] + 256].view(np.float32)[:] = generator.choice(floats, 64)
        if what in ("codes", "all"):
            block[: head["f0"]] = generator.integers(0, 256, head["f0"])
    del block, blocks
    survives(memory, path, bytes(image.seal_lists()))


@fixed(80)
@given(seed=st.integers(0, 2**32 - 1))
def test_hostile_vectors_with_right_checksums(memory: GuardedMemory, path: Path, valid: bytes, seed: int) -> None:
    image, generator = Image(valid), np.random.default_rng(seed)
    floats = np.array([0, np.inf, -np.inf, np.nan, 3.4e38, -3.4e38, 1e-45, 1], np.float32)
    entries = np.frombuffer(image.data, np.uint8)[image.header["ivf_offset"] + image.ivf["table_bytes"] :]
    columns = [
        entry[image.ivf["f0"] + 256 :].view(np.uint32).reshape(2, 32)
        for entry in entries.reshape(-1, image.ivf["block_bytes"])
    ]
    for node in generator.choice(N, 20, replace=False).tolist():
        at = image.record(node)
        image.data[at + 32 : at + 64] = generator.choice(floats, DIM).astype("<f4").tobytes()
        image.set_record(node, "label", int(generator.choice([-1, 0, 5, -(2**63)])))
        image.set_record(node, "flags", int(generator.integers(0, 4)))
        sealed = checksum_of_prefix(image, node)
        for rows, sums in columns:
            sums[rows == node] = sealed
    del columns, entries, rows, sums
    survives(memory, path, bytes(image.seal_lists()))


def checksum_of_prefix(image: Image, node: int) -> int:
    at = image.record(node)
    return checksum(bytes(image.data[at + 8 : at + 64]), node)


@fixed(150)
@given(changes=st.lists(st.tuples(st.integers(0, 2**13), st.integers(1, 255)), min_size=1, max_size=4))
def test_tables_that_were_changed(valid: bytes, changes: list[tuple[int, int]]) -> None:
    image = Image(valid)
    start, length = image.header["ivf_offset"], image.ivf["table_bytes"]
    data = bytearray(valid)
    for place, mask in changes:
        data[start + place % length] ^= mask
    with Arena.wrap(data) as arena, Channel.shm(arena) as channel, View.open(channel) as view:
        if data == valid:
            IvfTable.open(channel, view).close()
        else:
            with pytest.raises(FormatError):
                IvfTable.open(channel, view)


def test_memory_that_changes_after_the_table_was_read(memory: GuardedMemory, valid: bytes) -> None:
    view_of = memory.hold(valid)
    head, start = Image(valid).ivf, Image(valid).header["ivf_offset"]
    with Arena.wrap(view_of) as arena, spire_of(arena) as engine:
        before = engine.search(QUERIES, 5, LISTS)[0]
        view_of[:4096] = 0
        view_of[start : start + head["table_bytes"]] = 255
        assert (engine.search(QUERIES, 5, LISTS)[0] == before).all()
        view_of[start + head["table_bytes"] :] = 255
        with pytest.raises(ChecksumError):
            engine.search(QUERIES, 5, LISTS)
