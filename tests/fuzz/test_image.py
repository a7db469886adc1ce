"""Graph images that lie: every mutation ends in an answer or in a typed error, and never in a READ outside the memory.

The memory under test ends at a page that faults, so that a read past its end ends the run.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotra_rdma import Arena, ChecksumError, CotraError, FormatError, Shard
from cotra_rdma._native.channel import Channel
from cotra_rdma._native.library import lib
from cotra_rdma._native.view import View
from helpers.image import (
    HEADER_BYTES,
    HEADER_FIELDS,
    RECORD_FIELDS,
    USED_HEADER_BYTES,
    GuardedMemory,
    Image,
    checksum,
    image_bytes,
    reader_of,
)
from helpers.properties import fixed

N, DIM = 60, 8
K, EF, BEAM = 5, 20, 4
QUERIES = np.random.default_rng(4).normal(size=(3, DIM)).astype(np.float32)
INTERESTING = (
    0,
    1,
    2,
    31,
    32,
    33,
    63,
    64,
    255,
    4096,
    4097,
    2**15,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**63,
    2**64 - 1,
)
WORDS = st.sampled_from(
    [*(value for value in INTERESTING if value < 2**32), 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F7FFFFF]
)
ANY_WORD = WORDS | st.integers(0, 2**32 - 1)
FLOATS = np.array([0, -0.0, 1e-45, 1e-30, -1, 3.4e38, np.inf, -np.inf, np.nan], np.float32)
FLOAT_BITS = [int(bits) for bits in FLOATS.view(np.uint32)]
# One of the header's numbers that, changed alone, contradicts others or the bytes.
STRUCTURAL = ["magic", "version", "image_bytes", "count", "upper_count", "records_offset", "nav_offset", "nav_bytes"]
STRUCTURAL += ["record_bytes", "code_dim", "M", "max_level", "ivf_offset", "ivf_bytes", "ivf_checksum"]


@pytest.fixture(scope="module")
def valid() -> bytes:
    rows = np.random.default_rng(3).normal(size=(N, DIM)).astype(np.float32)
    with Shard.build(rows, M=4, ef_construction=20, n_threads=1) as shard:
        assert shard.info.max_level >= 2
        return image_bytes(shard)


@pytest.fixture(scope="module")
def memory() -> GuardedMemory:
    return GuardedMemory(1 << 18)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("image") / "mutated.cotra"


def answers(memory: GuardedMemory, data: bytes, simd: int | None = None) -> np.ndarray:
    """Labels of a search of a peer's bytes, whatever they are. Raises what the search raises."""
    with reader_of(memory.hold(data), simd=simd) as engine:
        queries = QUERIES if engine._dim == DIM else np.ones((3, engine._dim), np.float32)
        labels, distances, stats = engine.search(queries, K, EF, BEAM)
    assert (distances[..., :-1] <= distances[..., 1:]).all()  # so none is NaN
    assert (stats["expansions"] <= int.from_bytes(data[24:32], "little")).all()  # each node once
    return labels[0]


def survives(memory: GuardedMemory, path: Path, data: bytes, *, may_open: bool = True) -> None:
    """Opened as a file and READ as a peer's memory, the bytes give answers or typed errors."""
    for simd in (lib.COTRA_SIMD_PORTABLE, lib.cotra_simd_best()):
        with suppress(CotraError):
            answers(memory, data, simd)
    path.write_bytes(data)
    for verify in (True, False):
        with suppress(FormatError), Shard.open(path, verify=verify) as shard:
            assert may_open
            shard.search(np.ones(shard.dim, np.float32), k=K, ef=EF)


def test_the_helper_knows_the_format(valid: bytes) -> None:
    assert bytes(Image(valid).seal(*range(N))) == valid
    assert checksum(valid[:USED_HEADER_BYTES], 0) != checksum(valid[:USED_HEADER_BYTES], 1)


def test_the_valid_image(memory: GuardedMemory, path: Path, valid: bytes) -> None:
    path.write_bytes(valid)
    with Shard.open(path) as shard:
        labels, _, _ = shard.search(QUERIES, k=K, ef=EF, beam=BEAM)
    assert (answers(memory, valid) == labels).all()


@fixed(250)
@given(flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=6))
def test_flipped_bytes(memory: GuardedMemory, path: Path, valid: bytes, flips: list[tuple[float, int]]) -> None:
    data = bytearray(valid)
    for place, mask in flips:
        data[int(place * len(data))] ^= mask
    survives(memory, path, bytes(data))
    path.write_bytes(data)
    padding = slice(USED_HEADER_BYTES, HEADER_BYTES)
    data[padding] = valid[padding]
    if data != valid:
        with pytest.raises(FormatError):
            Shard.open(path)


@fixed(150)
@given(place=st.integers(0, USED_HEADER_BYTES * 8 - 1))
def test_every_bit_of_the_header_counts(path: Path, valid: bytes, place: int) -> None:
    data = bytearray(valid)
    data[place // 8] ^= 1 << place % 8
    path.write_bytes(data)
    with pytest.raises(FormatError):
        Shard.open(path, verify=False)


@fixed(100)
@given(
    length=st.integers(0, 2**18) | st.sampled_from([0, 1, 8, 167, 191, 192, 4095, 4096, 4097]),
    tail=st.binary(max_size=70),
)
def test_truncated_and_extended(memory: GuardedMemory, path: Path, valid: bytes, length: int, tail: bytes) -> None:
    short = valid[: length % len(valid)]
    survives(memory, path, short or b"\0", may_open=False)
    path.write_bytes(short)
    with pytest.raises(FormatError):
        Shard.open(path, verify=False)
    survives(memory, path, valid + tail)


def test_foreign_bytes(memory: GuardedMemory, path: Path) -> None:
    generator = np.random.default_rng(5)
    for length in (1, 64, 4096, 5000, 100_000):
        for data in (bytes(length), generator.bytes(length), b"\x7fELF".ljust(length, b"\xff")):
            survives(memory, path, data, may_open=False)


@pytest.mark.parametrize("field", list(HEADER_FIELDS))
def test_header_numbers_with_a_right_checksum(memory: GuardedMemory, path: Path, valid: bytes, field: str) -> None:
    original = Image(valid).get(field)
    width = 2 ** (64 if HEADER_FIELDS[field][1] == "<Q" else 32)
    values = {value % width for value in (*INTERESTING, original - 1, original + 1, 2 * original, original ^ 2**31)}
    for value in sorted(values - {original}):
        image = Image(valid)
        image.set(field, value)
        if field != "header_checksum":
            image.seal_header()
        data = bytes(image)
        survives(memory, path, data, may_open=field not in STRUCTURAL)
        if field in STRUCTURAL:
            with pytest.raises(FormatError) as caught:
                answers(memory, data)
            if field not in ("upper_count", "M"):  # their navigation section is another one: its checksum tells too
                assert not isinstance(caught.value, ChecksumError)


@st.composite
def consistent_headers(draw: st.DrawFn) -> dict[str, int]:
    """Numbers of a header that fit each other, for bytes that they do not fit."""
    info = {
        "dim": draw(st.integers(1, 80) | st.sampled_from([4095, 4096, 4097])),
        "vector_type": draw(st.integers(0, 3)),
        "degree": draw(st.integers(1, 70) | st.sampled_from([1024, 1025])),
        "M": draw(st.integers(1, 35) | st.sampled_from([512, 513])),
        "count": draw(st.integers(1, 200) | st.sampled_from([2**31 - 1, 2**31, 2**32, 2**52, 2**63])),
        "upper_count": draw(st.integers(0, 70) | st.sampled_from([2**31 - 1, 2**31])),
        "max_level": draw(st.integers(0, 5) | st.sampled_from([63, 64])),
        "entry_node": draw(st.integers(0, 70)),
        "records_offset": HEADER_BYTES,
        "metric": draw(st.integers(0, 2)),
    }
    n_rows = draw(st.integers(0, 5)) * info["upper_count"]
    vector_bytes = info["dim"] * {0: 4, 1: 2}.get(info["vector_type"], 1)
    stride, slots = -(-vector_bytes // 32) * 32, -(-info["degree"] // 32) * 32
    info["code_dim"] = -(-info["dim"] // 64) * 64
    info["record_bytes"] = -(-(32 + stride + 8 * slots + slots // 32 * info["code_dim"] * 4) // 64) * 64
    at = (
        -(-4 * info["dim"] // 8) * 8 + -(-4 * info["upper_count"] // 8) * 8 + -(-4 * (info["upper_count"] + 1) // 8) * 8
    )
    at = -(-(at + 4 * n_rows * (1 + info["M"])) // 64) * 64
    info["nav_bytes"] = -(-(at + info["upper_count"] * stride) // 64) * 64
    info["nav_offset"] = HEADER_BYTES + info["count"] * info["record_bytes"]
    info["image_bytes"] = info["nav_offset"] + info["nav_bytes"]
    return info


@fixed(300)
@given(info=consistent_headers(), rising=st.booleans())
def test_consistent_headers_of_other_bytes(
    memory: GuardedMemory, path: Path, valid: bytes, info: dict[str, int], rising: bool
) -> None:
    image = Image(valid * 4)
    for field, value in info.items():
        image.set(field, value)
    nav, n = info["nav_offset"], info["upper_count"]
    if info["image_bytes"] <= len(image.data):
        if rising:  # upper nodes in order, with one row each: the checks behind those get their turn
            at = nav + -(-4 * info["dim"] // 8) * 8
            for u in range(n):
                image.set_word(at + 4 * u, u)
            at += -(-4 * n // 8) * 8
            for u in range(n + 1):
                image.set_word(at + 4 * u, u)
        image.set("nav_checksum", checksum(bytes(image.data[nav : nav + info["nav_bytes"]]), 1))
    survives(memory, path, bytes(image.seal_header()))


@fixed(300)
@given(changes=st.lists(st.tuples(st.integers(0, 2**16), ANY_WORD | st.integers(0, 70)), min_size=1, max_size=4))
def test_navigation_sections_with_right_checksums(
    memory: GuardedMemory, path: Path, valid: bytes, changes: list[tuple[int, int]]
) -> None:
    image = Image(valid)
    for place, value in changes:
        image.set_word(image.nav + place * 4 % image.header["nav_bytes"], value)
    survives(memory, path, bytes(image.seal()))


def test_a_link_of_an_upper_layer_to_a_lower_node(memory: GuardedMemory, valid: bytes) -> None:
    """A link that is in range, but to a node without that level: its row would be another node's."""
    image = Image(valid)
    n, width = image.header["upper_count"], 1 + image.header["M"]
    first = [image.get_word(image.nav_first_row + 4 * u) for u in range(n + 1)]
    levels = np.diff(first)
    top, low = int(levels.argmax()), int(levels.argmin())
    row = image.nav_rows + 4 * width * (first[top] + int(levels[top]) - 1)
    image.set_word(row, 1)
    image.set_word(row + 4, low)
    with pytest.raises(FormatError, match="which is not on level"):
        answers(memory, bytes(image.seal()))


@pytest.fixture(scope="module")
def flat() -> bytes:
    """An image without upper layers: every walk begins at the entry node's record."""
    rows = np.random.default_rng(3).normal(size=(N, DIM)).astype(np.float32)
    for seed in range(1000):
        with Shard.build(rows[:12], M=16, ef_construction=20, n_threads=1, seed=seed) as shard:
            if shard.info.max_level == 0:
                return image_bytes(shard)
    raise AssertionError("no seed without upper layers")


@pytest.mark.parametrize("field", list(RECORD_FIELDS))
@pytest.mark.parametrize("value", [*INTERESTING, *FLOAT_BITS])
def test_heads_of_records(memory: GuardedMemory, path: Path, flat: bytes, field: str, value: int) -> None:
    image = Image(flat)
    image.set_record(image.header["entry_node"], field, value)
    if bytes(image) != flat:
        with pytest.raises(ChecksumError):
            answers(memory, bytes(image))
    survives(memory, path, bytes(image))
    if field != "checksum":
        survives(memory, path, bytes(image.seal(image.header["entry_node"])))


def test_numbers_that_a_record_must_not_hold(memory: GuardedMemory, path: Path, flat: bytes) -> None:
    node = Image(flat).get("entry_node")
    for spoil, reason in (
        (lambda image: image.set_record(node, "count", image.header["degree"] + 1), "neighbours where"),
        (lambda image: image.set_record(node, "count", 65535), "neighbours where"),
        (lambda image: image.set_word(image.record(node) + image.numbers, image.count), "links to node"),
        (lambda image: image.set_word(image.record(node) + image.numbers, 2**32 - 1), "links to node"),
        (lambda image: image.set_record(node, "node", node ^ 1), "torn or corrupt"),
    ):
        image = Image(flat)
        spoil(image)
        data = bytes(image.seal(node))
        with pytest.raises(FormatError, match=reason):
            answers(memory, data)
        path.write_bytes(data)
        with pytest.raises(FormatError, match=reason):
            Shard.open(path)


@fixed(300)
@given(
    changes=st.lists(
        st.tuples(st.integers(0, N - 1), st.integers(0, 143), ANY_WORD | st.integers(0, N)), min_size=1, max_size=12
    )
)
def test_records_with_right_checksums(
    memory: GuardedMemory, path: Path, valid: bytes, changes: list[tuple[int, int, int]]
) -> None:
    image = Image(valid)
    for node, word, value in changes:
        image.set_word(image.record(node) + 4 * word, value)
    survives(memory, path, bytes(image.seal(*{node for node, _, _ in changes})))


@fixed(100)
@given(seed=st.integers(0, 2**32 - 1), what=st.sampled_from(["links", "floats", "codes", "all"]))
def test_every_record_is_hostile(memory: GuardedMemory, path: Path, valid: bytes, seed: int, what: str) -> None:
    """All links, factors or codes are random, all checksums are right."""
    image, generator = Image(valid), np.random.default_rng(seed)
    floats = np.array([0, -0.0, np.inf, -np.inf, np.nan, 3.4e38, -3.4e38, 1e-45, 1, -1], np.float32)
    for node in range(N):
        record = np.frombuffer(image.data, np.uint8)[image.record(node) :][: image.record_bytes]
        if what in ("links", "all"):
            record[image.numbers : image.f0].view(np.uint32)[:] = generator.integers(0, N, image.slots)
            image.set_record(node, "count", int(generator.integers(0, image.header["degree"] + 1)))
        if what in ("floats", "all"):
            record[32 : image.numbers].view(np.float32)[:] = generator.choice(floats, DIM)
            halves = (floats.view(np.uint32) >> 16).astype(np.uint16)
            record[image.f0 : image.codes].view(np.uint16)[:] = generator.choice(halves, 2 * image.slots)
            image.set_record(node, "norm2", int(generator.choice(floats.view(np.uint32))))
            image.set_record(node, "flags", int(generator.integers(0, 4)))
        if what in ("codes", "all"):
            record[image.codes :] = generator.integers(0, 256, image.record_bytes - image.codes)
        del record
    survives(memory, path, bytes(image.seal(*range(N))))


@pytest.fixture(
    scope="module",
    params=[("l2", np.float32), ("ip", np.float32), ("cosine", np.float32), ("cosine", np.float16)],
    ids=str,
)
def of_metric(request: pytest.FixtureRequest) -> bytes:
    metric, kind = request.param
    rows = np.random.default_rng(3).normal(size=(N, DIM)).astype(kind)
    with Shard.build(rows, metric=metric, M=4, ef_construction=20, n_threads=1) as shard:
        return image_bytes(shard)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("norm2", FLOATS, ids=str)
def test_estimates_of_hostile_numbers(
    memory: GuardedMemory, path: Path, of_metric: bytes, norm2: np.float32, centred: bool
) -> None:
    """The norm in each record, any factors, and the flag that has a table made for the record: right checksums, and a walk that
    ends."""
    image = Image(of_metric)
    for node in range(N):
        image.set_record(node, "norm2", int(norm2.view(np.uint32)))
        if centred:
            image.set_record(node, "flags", 2)
    survives(memory, path, bytes(image.seal(*range(N))))
    for f0, f1 in ((0xFF80, 0), (0x7FC0, 0x7FC0), (0, 0x7F80), (0x3F80, 0xFF80), (0x7F7F, 0x7F7F), (0, 0x8000)):
        for node in range(N):
            at = image.record(node)
            for slot in range(image.slots):
                image.set_half(at + image.f0 + 2 * slot, f0)
                image.set_half(at + image.f1 + 2 * slot, f1)
        survives(memory, path, bytes(image.seal(*range(N))))


def test_a_cycle_of_equal_records_ends(memory: GuardedMemory, valid: bytes) -> None:
    """All nodes the same vector, links in a ring, estimates of -inf: each is still expanded once."""
    image = Image(valid)
    for node in range(N):
        at = image.record(node)
        image.data[at + 32 : at + image.numbers] = bytes(image.numbers - 32)
        for slot in range(image.header["degree"]):
            image.set_word(at + image.numbers + 4 * slot, (node + slot + 1) % N)
            image.set_half(at + image.f0 + 2 * slot, 0xFF80)
            image.set_half(at + image.f1 + 2 * slot, 0)
        image.set_record(node, "count", image.header["degree"])
    labels = answers(memory, bytes(image.seal(*range(N))))
    assert all(len(set(row[row >= 0].tolist())) == (row >= 0).sum() for row in labels)


def test_memory_that_changes_after_the_view_was_read(memory: GuardedMemory, valid: bytes) -> None:
    """A rebuilt, torn or hostile image under a reader's feet."""
    view_of = memory.hold(valid)
    with Arena.wrap(view_of) as arena, Channel.shm(arena) as channel, View.open(channel) as view:
        assert view.info.count == N
        view_of[:HEADER_BYTES] = 0
        view_of[view.info.nav_offset :] = 255
    with reader_of(memory.hold(valid)) as engine:
        before = engine.search(QUERIES, K, EF, BEAM)[0]
        view_of[:HEADER_BYTES] = 0
        view_of[-64:] = 255
        assert (engine.search(QUERIES, K, EF, BEAM)[0] == before).all()
        view_of[HEADER_BYTES:] ^= 1
        with pytest.raises(ChecksumError):
            engine.search(QUERIES, K, EF, BEAM)
