"""Envelopes and payloads: golden bytes of NodeDB's wire, msgspec as the independent reader, round trips, and refusals."""

from __future__ import annotations

import dataclasses
import struct
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotra_rdma import FormatError, InvalidInputError
from cotra_rdma._core.image_identity import ImageIdentity
from cotra_rdma.protocol.envelope import (
    HEADER_BYTES,
    MAX_PAYLOAD_BYTES,
    WIRE_VERSION,
    VShardEnvelope,
    VShardMessageType,
    fields_of,
    join,
)
from cotra_rdma.protocol.regions import (
    QueuePairFields,
    RegionFields,
    RegionRequest,
    RegionResponse,
    ShardFields,
    SharedMemoryFields,
    ViewFields,
    as_fields,
    decode_region_request,
    decode_region_response,
    encode_region,
)
from cotra_rdma.protocol.search import SearchRequest, SearchResponse
from helpers.properties import fixed

U16, U32, U64 = (st.integers(0, 2**bits - 1) for bits in (16, 32, 64))
TEXT = st.text(max_size=40)
FLOATS = st.lists(st.floats(width=32), max_size=40).map(lambda values: np.array(values, np.float32))

# ---- the envelope ----

HEADER = bytes.fromhex(
    "0200"  # version 2
    "3200"  # type 50
    "0807060504030201"  # source node 0x0102030405060708
    "0200000000000000"  # target node 2
    "2a000000"  # vshard 42
    "03000000"  # 3 bytes follow
)


def envelope(payload: Any = b"abc", **changes: Any) -> VShardEnvelope:
    first = VShardEnvelope(2, VShardMessageType.VECTOR_SCATTER_REQUEST, 0x0102030405060708, 2, 42, payload)
    return dataclasses.replace(first, **changes)


def test_the_header_is_28_bytes() -> None:
    assert (HEADER_BYTES, WIRE_VERSION, len(HEADER)) == (28, 2, 28)
    assert envelope().encode() == HEADER + b"abc"
    assert VShardEnvelope.decode(HEADER + b"abc") == envelope()
    assert envelope().payload_len == 3


def test_message_types() -> None:
    assert [int(kind) for kind in VShardMessageType] == list(range(50, 60))
    for kind in VShardMessageType:
        assert kind.is_request == (kind % 2 == 0)
        if kind.is_request:
            assert kind.response == kind + 1


IMAGES = st.none() | st.builds(ImageIdentity, *[st.integers(0, 2**64 - 1)] * 3)


@fixed(200)
@given(
    kind=st.sampled_from(list(VShardMessageType)),
    source=U64,
    target=U64,
    vshard=U32,
    parts=st.lists(st.binary(max_size=50), max_size=5),
    cuts=st.lists(st.integers(HEADER_BYTES, 200), max_size=3),
)
def test_envelopes_round_trip(
    kind: VShardMessageType, source: int, target: int, vshard: int, parts: list[bytes], cuts: list[int]
) -> None:
    whole = b"".join(parts)
    sent = VShardEnvelope(2, kind, source, target, vshard, tuple(parts))
    data = sent.encode()
    assert b"".join(sent.frames()) == data == dataclasses.replace(sent, payload=whole).encode()
    assert data == struct.pack("<HHQQII", 2, kind, source, target, vshard, len(whole)) + whole
    assert VShardEnvelope.decode(data) == dataclasses.replace(sent, payload=whole)
    places = sorted(cut % (len(data) + 1) for cut in cuts if cut % (len(data) + 1) >= HEADER_BYTES)
    frames = [memoryview(data)[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]
    received = VShardEnvelope.from_frames(frames)
    assert bytes(join(received.payload)) == whole
    assert received.payload_len == len(whole)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "too few"),
        (HEADER[:27], "too few"),
        (b"\x01" + HEADER[1:] + b"abc", "wire version 1 is unknown; this side speaks 2"),
        (b"\x03" + HEADER[1:] + b"abc", "wire version 3"),
        (b"\x02\x01" + HEADER[2:] + b"abc", "wire version 258"),
        (HEADER[:2] + b"\x31\x00" + HEADER[4:] + b"abc", "type 49"),
        (HEADER[:2] + b"\x3c\x00" + HEADER[4:] + b"abc", "type 60"),
        (HEADER[:2] + b"\x32\x01" + HEADER[4:] + b"abc", "type 306"),
        (HEADER, "should be 3 bytes and is 0"),
        (HEADER + b"ab", "should be 3 bytes and is 2"),
        (HEADER + b"abcd", "should be 3 bytes and is 4"),
        (HEADER[:24] + b"\xff\xff\xff\xff", "passes the limit"),
    ],
)
def test_malformed_envelopes(data: bytes, reason: str) -> None:
    for decode in (VShardEnvelope.decode, lambda data: VShardEnvelope.from_frames([memoryview(data)])):
        with pytest.raises(FormatError, match=reason):
            decode(data)


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 1},
        {"version": 3},
        {"msg_type": 49},
        {"source_node": -1},
        {"source_node": 2**64},
        {"target_node": 2**64},
        {"vshard_id": 2**32},
        {"vshard_id": -1},
        pytest.param({"payload": (bytes(MAX_PAYLOAD_BYTES), b"x")}, id="64 MiB + 1"),
    ],
)
def test_envelopes_that_cannot_be_written(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        envelope(**changes).encode()


# ---- 50: search request ----


def test_a_search_request_byte_for_byte() -> None:
    request = SearchRequest("docs", np.array([1.0, -2.5], np.float32), 10, 128)
    golden = bytes.fromhex(
        "95"  # an array of 5
        "a4 646f6373"  # "docs"
        "92 ca3f800000 cac0200000"  # [1.0, -2.5] as float32
        "0a"  # top_k 10
        "cc80"  # ef_search 128
        "c2"  # no filter
    )
    assert request.encode() == golden
    assert SearchRequest.decode(golden).beam == 8
    filtered = dataclasses.replace(request, filter_bitmap=b"\x05\x80")
    assert filtered.encode() == golden[:-1] + bytes.fromhex("c3 02000000 0580")
    assert dataclasses.replace(filtered, beam=4).encode() == filtered.encode() + bytes.fromhex("91 04")
    whole = dataclasses.replace(request, scope=1)
    assert whole.encode() == golden + bytes.fromhex("92 08 01")
    assert dataclasses.replace(request, most=300).encode() == golden + bytes.fromhex("93 08 00 cd012c")
    filters = ((7, b"\x05\x80"), (2**64 - 1, None))
    assert dataclasses.replace(whole, filters=filters).encode() == golden + bytes.fromhex(
        "94 08 01 00"  # beam, scope, no bound
        "93 c410 0700000000000000 ffffffffffffffff"  # the images of two shards
        "c402 0580 c400"  # and a filter of the first
    )


@fixed(200)
@given(
    name=TEXT,
    queries=FLOATS,
    top_k=U32,
    ef=U32,
    bitmap=st.none() | st.binary(max_size=40),
    beam=U32,
    scope=st.integers(0, 1),
    most=U32,
    filters=st.none()
    | st.lists(
        st.tuples(st.integers(0, 2**64 - 1), st.none() | st.binary(min_size=1, max_size=9)), min_size=1, max_size=20
    ).map(tuple),
    image=IMAGES,
)
def test_search_requests_round_trip(
    name: str,
    queries: np.ndarray,
    top_k: int,
    ef: int,
    bitmap: bytes | None,
    beam: int,
    scope: int,
    most: int,
    filters: tuple[tuple[int, bytes | None], ...] | None,
    image: ImageIdentity | None,
) -> None:
    sent = SearchRequest(name, queries, top_k, ef, bitmap, beam, scope, most, filters, image)
    data = sent.encode()
    for payload in (data, memoryview(data), (data[:3], data[3:3], data[3:])):
        found = SearchRequest.decode(payload)
        assert found.queries.tobytes() == queries.tobytes()  # NaN's bits too
        assert dataclasses.replace(found, queries=queries) == sent


@fixed(100)
@given(name=TEXT, queries=FLOATS, top_k=U32, ef=U32)
def test_msgspec_reads_and_writes_the_same(name: str, queries: np.ndarray, top_k: int, ef: int) -> None:
    data = SearchRequest(name, queries, top_k, ef).encode()
    read = msgspec.msgpack.decode(data)
    assert [read[0], *read[2:]] == [name, top_k, ef, False]
    assert np.array(read[1], np.float32).tobytes() == queries.tobytes()
    with_doubles = msgspec.msgpack.encode(read)  # msgspec writes numbers as float64: longer, and refused
    if len(queries):
        with pytest.raises(FormatError, match="float32"):
            SearchRequest.decode(with_doubles + bytes(5 * len(queries)))
    else:
        assert with_doubles == data


@pytest.mark.parametrize("dim", [0, 1, 15, 16, 4096, 65535, 65536])
def test_lengths_of_query_vectors(dim: int) -> None:
    values = np.arange(dim, dtype=np.float32)
    data = SearchRequest("c" * (dim % 300), values, 1, 1).encode()
    read = msgspec.msgpack.decode(data)
    assert read[0] == "c" * (dim % 300)
    assert read[1] == values.tolist()
    assert (SearchRequest.decode(data).queries == values).all()


@pytest.mark.parametrize("queries", [np.zeros((3, 4), np.float32), np.zeros((3, 8), np.float64)[:, ::2], [0.0] * 12])
def test_several_queries_are_one_flat_vector(queries: Any) -> None:
    assert SearchRequest.decode(SearchRequest("", queries, 1, 1).encode()).queries.shape == (12,)


GOOD = SearchRequest("docs", np.array([1.0, -2.5], np.float32), 10, 128).encode()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\x94" + GOOD[1:], "array of 5"),
        (b"\x96" + GOOD[1:], "array of 5"),
        (b"\xc0" + GOOD[1:], "an array was expected"),
        (GOOD[:1] + b"\xc4" + GOOD[2:], "a string was expected"),
        (GOOD.replace(b"docs", b"d\xffcs"), "not UTF-8"),
        (GOOD.replace(b"\xca", b"\xcb"), "float32"),
        (GOOD.replace(b"\x0a\xcc", b"\xff\xcc"), "a u32 was expected"),
        (GOOD.replace(b"\xcc\x80", b"\xcf" + bytes(8)), "a u32 was expected"),
        (GOOD[:-1] + b"\x00", "a boolean was expected"),
        (GOOD + b"\x00", "an array was expected"),
        (GOOD + b"\x96\x08\x00\x00\x90\x90\x00", "array of 1 to 5"),
        (GOOD + b"\x90", "array of 1 to 5"),
        (GOOD + b"\x95\x08\x00\x00\x90\x00", "an array was expected"),
        (GOOD + b"\x95\x08\x00\x00\x90\x94\x00\x00\x00\x00", "the identity of an image is 3 numbers, not 4"),
        (GOOD + b"\x95\x08\x00\x00\x90\x93\x00\x00", "too early"),
        (GOOD + b"\x94\x08\x01\x00\x90", "filters of no shards"),
        (GOOD + b"\x94\x08\x01\x00\x91\xc4\x00", "filters of no shards"),
        (GOOD + b"\x94\x08\x01\x00\x92\xc4\x07" + bytes(7), "1 numbers take 8"),
        (GOOD + b"\x94\x08\x01\x00\x92\xc4\x08" + bytes(8), "too early"),
        (GOOD + b"\x94\x08\x01\x00\xdd\xff\xff\xff\xff\xc4\x08" + bytes(8), "numbers take"),
        (GOOD + b"\x92\x08\x02", "scope 2 is unknown"),
        (GOOD + b"\x92\x08", "too early"),
        (GOOD + b"\x91\x08\x08", "left over"),
        (GOOD[:-1] + b"\xc3\xff\xff\xff\xff", "too early"),
        (GOOD.replace(b"\x92\xca", b"\xdd\xff\xff\xff\xff\xca"), "too early"),
        *((GOOD[:n], "too early") for n in range(len(GOOD))),
    ],
)
def test_malformed_search_requests(data: bytes, reason: str) -> None:
    with pytest.raises(FormatError, match=reason):
        SearchRequest.decode(data)


# ---- 51: search response ----


@pytest.mark.parametrize(
    ("labels", "distances", "reason"),
    [
        ([[3, 1, 2]], [[0.5, 0.5, 1.0]], ""),
        ([[3, 1, -1]], [[0.5, 0.5, np.inf]], ""),
        ([[3, 1, -1]], [[0.5, 0.5, 0.0]], ""),  # what stands in an empty place is not looked at
        ([[3, 1]], [[0.5, 0.5]], "an answer of"),
        ([[3, 1, 2]], [[0.5, 0.4, 1.0]], "not sorted"),
        ([[3, -1, 2]], [[0.5, np.inf, np.inf]], "not sorted"),
        ([[3, 1, 2]], [[0.5, np.nan, 1.0]], "no numbers"),
    ],
)
def test_answers_that_cannot_be_merged(labels: list[list[int]], distances: list[list[float]], reason: str) -> None:
    answer = SearchResponse(0, "", np.array(labels), np.array(distances, np.float32), b"")
    if not reason:
        answer.check(1, 3)
        return
    with pytest.raises(FormatError, match=reason):
        answer.check(1, 3)


def test_a_search_response_byte_for_byte() -> None:
    response = SearchResponse(0, "", np.array([[7, -1]]), np.array([[0.5, np.inf]], np.float32), b"s" * 32)
    golden = bytes.fromhex("97 00 a0 01 02 c410") + struct.pack("<qq", 7, -1)
    golden += bytes.fromhex("c408") + struct.pack("<ff", 0.5, np.inf) + bytes.fromhex("c420") + b"s" * 32
    assert b"".join(response.encode()) == golden
    assert msgspec.msgpack.decode(golden)[:4] == [0, "", 1, 2]
    told = dataclasses.replace(response, incomplete=np.array([2], np.uint32))
    assert b"".join(told.encode()) == golden + bytes.fromhex("c404 02000000")
    assert SearchResponse.decode(b"".join(told.encode())).incomplete == 2
    assert SearchResponse.decode(golden).incomplete is None
    of = dataclasses.replace(told, image=ImageIdentity(7, 1, 128))
    assert b"".join(of.encode()) == golden + bytes.fromhex("93 07 01 cc80 c404 02000000")
    both = SearchResponse.decode(b"".join(of.encode()))
    assert (both.incomplete, both.image) == (2, (7, 1, 128))
    with pytest.raises(FormatError, match="1 numbers take 4"):
        SearchResponse.decode(golden + bytes.fromhex("c403 020000"))
    assert b"".join(SearchResponse.failed(3, "no").encode()) == bytes.fromhex("97 03 a2 6e6f 00 00 c400 c400 c400")


@fixed(150)
@given(
    code=U32, message=TEXT, n=st.integers(0, 40), k=st.integers(0, 40), seed=U32, cuts=st.lists(st.integers(0, 20000))
)
def test_search_responses_round_trip(code: int, message: str, n: int, k: int, seed: int, cuts: list[int]) -> None:
    generator = np.random.default_rng(seed)
    labels = generator.integers(-(2**63), 2**63 - 1, (n, k))
    distances = generator.normal(size=(n, k)).astype(np.float32)
    parts = SearchResponse(code, message, labels, distances, bytes(32 * n)).encode()
    data = b"".join(parts)
    read = msgspec.msgpack.decode(data)
    assert read == [code, message, n, k, labels.tobytes(), distances.tobytes(), bytes(32 * n)]
    places = sorted({cut % (len(data) + 1) for cut in cuts})
    pieces = tuple(data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True))
    for payload in (data, parts, pieces):
        found = SearchResponse.decode(payload)
        assert (found.code, found.message, bytes(found.stats)) == (code, message, bytes(32 * n))
        assert (found.labels == labels).all()
        assert (found.distances == distances).all()
        assert found.labels.shape == found.distances.shape == (n, k)


def test_large_fields_are_not_copied() -> None:
    labels, distances = np.zeros((100, 50), np.int64), np.zeros((100, 50), np.float32)
    parts = SearchResponse(0, "", labels, distances, bytes(3200)).encode()
    found = SearchResponse.decode(parts)
    assert np.shares_memory(found.labels, labels)
    assert np.shares_memory(found.distances, distances)


ANSWER = b"".join(SearchResponse(0, "", np.zeros((1, 2), np.int64), np.zeros((1, 2), np.float32), b"").encode())


@pytest.mark.parametrize(
    "data",
    [
        b"\x96" + ANSWER[1:],
        ANSWER[:3] + b"\x02" + ANSWER[4:],  # n = 2
        ANSWER[:4] + b"\x03" + ANSWER[5:],  # k = 3
        ANSWER[:3] + b"\xce\xff\xff\xff\xff\xce\xff\xff\xff\xff" + ANSWER[5:],
        ANSWER + b"\0",
        ANSWER.replace(b"\xc4\x10", b"\xc6\xff\xff\xff\xff"),
        ANSWER.replace(b"\xc4\x10", b"\xa0\x10"),
        *(ANSWER[:n] for n in range(len(ANSWER))),
    ],
)
def test_malformed_search_responses(data: bytes) -> None:
    for payload in (data, (data,), (data[:5], data[5:]), tuple(data[i : i + 1] for i in range(len(data)))):
        with pytest.raises(FormatError, match="search response"):
            SearchResponse.decode(payload)


# ---- 56, 57: memory regions ----

QUEUE_PAIR = st.builds(QueuePairFields, st.binary(min_size=16, max_size=16), U32, U32, U32, U32, U32, U32)
REQUEST = st.builds(RegionRequest, U32, TEXT, st.none() | QUEUE_PAIR, U64, U64)
RESPONSE = st.builds(
    RegionResponse,
    U32,
    TEXT,
    st.none() | st.builds(ShardFields, U32, TEXT, U64, U64, U64, U32, U64, U64, U64, st.none() | U64),
    st.dictionaries(TEXT, TEXT, max_size=4),
    st.none() | st.builds(RegionFields, U64, U32, U64),
    st.none() | QUEUE_PAIR,
    U64,
    st.none() | st.builds(SharedMemoryFields, TEXT, U64, TEXT),
    st.none() | st.builds(ViewFields, U64, st.binary(max_size=40)),
)


@fixed(150)
@given(request=REQUEST, response=RESPONSE)
def test_region_messages_round_trip(request: RegionRequest, response: RegionResponse) -> None:
    for message, decode in ((request, decode_region_request), (response, decode_region_response)):
        data = encode_region(message)
        assert decode(data) == decode((data[:2], data[2:])) == decode(memoryview(data)) == message
        assert isinstance(msgspec.msgpack.decode(data), list)


def test_region_messages_byte_for_byte() -> None:
    assert encode_region(RegionRequest(1, "p", None, 2)) == bytes.fromhex("96 01 a170 c0 02 00 c0")
    response = RegionResponse(shard=None, transports={"shm": ""}, region=RegionFields(2**63, 7, 4096), number=1)
    golden = bytes.fromhex("99 00 a0 c0 81a373686da0 93 cf8000000000000000 07 cd1000 c0 01 c0 c0")
    assert encode_region(response) == golden


def test_region_messages_of_other_versions() -> None:
    """Fields that are missing at the end, or more than are known."""
    old = bytes.fromhex("98 00 a0 96 64 a26c32 05 01 cd1000 40 80 c0 c0 00 c0")
    shard = decode_region_response(old).shard
    assert shard == ShardFields(100, "l2", 5, 1, 4096, 64)
    assert shard is not None
    assert shard.image_checksum is None
    new = bytes.fromhex("9a 00 a0 9c 64 a26c32 05 01 cd1000 40 07 08 09 0a 0b 0c 80 c0 c0 00 c0 92 0c c402aabb c3")
    found = decode_region_response(new)
    assert found.shard == ShardFields(100, "l2", 5, 1, 4096, 64, 7, 8, 9, 10)
    assert found.view == ViewFields(12, b"\xaa\xbb")
    assert decode_region_request(bytes.fromhex("94 01 a170 c0 02")) == RegionRequest(1, "p", None, 2)
    assert decode_region_request(bytes.fromhex("97 05 a170 c0 00 09 93 07 01 cc80 c0")) == RegionRequest(
        5, "p", None, 0, 9, ImageIdentity(7, 1, 128)
    )


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc0",
        b"\x80",
        b"\x91\x00",
        b"\x92\xa0\x00",
        b"\x92\x00\xa1\xff",
        b"\x93\x00\xa0\x91\x00",
        b"\x92\x00\xa0\x00",
        b"\x92\xcb" + bytes(8) + b"\xa0",
        pytest.param(b"\x95\x00\xa0\xc0\x00" + b"\x91" * 100_000, id="deep"),
    ],
)
def test_malformed_region_requests(data: bytes) -> None:
    with pytest.raises(FormatError, match="region request"):
        decode_region_request(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x91\xa0",
        b"\x94\x00\xa0\xc0\xc0",
        b"\x94\x00\xa0\xc0\x81\x00\xa0",
        b"\x95\x00\xa0\xc0\x80\x92\x00\x00",
        b"\x93\x00\xa0\x9a\x01\xa0\x01\x01\x01\x01\x00\x00\x00\xff",  # an image_checksum of -1
        pytest.param(b"\x99\x00\xa0\xc0\x80\xc0\xc0\x00\xc0" + b"\x91" * 100_000, id="deep"),
    ],
)
def test_malformed_region_responses(data: bytes) -> None:
    with pytest.raises(FormatError, match="region response"):
        decode_region_response(data)


def test_fields_by_name() -> None:
    region = RegionFields(1, 2, 3)
    assert fields_of(region) == {"addr": 1, "rkey": 2, "len": 3}
    assert as_fields(RegionFields, region) == region
