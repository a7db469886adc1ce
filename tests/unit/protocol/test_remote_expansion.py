"""Messages 58 and 59, and 51 to a search of the whole collection: golden bytes, round trips, refusals, how a round is split."""

from __future__ import annotations

import struct
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotra_rdma import FormatError, InvalidInputError
from cotra_rdma._core.image_identity import ImageIdentity
from cotra_rdma._core.remote_expansion import EXPANSION_DTYPE, PUSH_DTYPE, Expansions
from cotra_rdma._core.stats import MORE_STATS_DTYPE, STATS_DTYPE, pack_stats, unpack_stats
from cotra_rdma.protocol import remote_expansion as expansion_messages
from cotra_rdma.protocol.collection_search import CollectionResponse
from cotra_rdma.protocol.remote_expansion import ExpandRequest, ExpandResponse, check_fits, split_pushes
from cotra_rdma.protocol.search import SearchResponse
from helpers.properties import fixed

U32 = st.integers(0, 2**32 - 1)
TEXT = st.text(max_size=40)


def pushes_of(*queries: int) -> npt.NDArray[np.void]:
    made = np.zeros(len(queries), PUSH_DTYPE)
    made["query"], made["row"], made["limit"] = queries, np.arange(len(queries)) + 7, np.inf
    return made


def cut(data: bytes, cuts: list[int]) -> tuple[bytes, ...]:
    places = sorted({at % (len(data) + 1) for at in cuts})
    return tuple(data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True))


IMAGE = ImageIdentity(7, 1, 128)


# ---- 58 ----


def test_an_expand_request_byte_for_byte() -> None:
    request = ExpandRequest("", np.array([[1.0, -2.5]], np.float32), pushes_of(0), IMAGE)
    golden = bytes.fromhex("95 a0 02 c408") + struct.pack("<ff", 1, -2.5)
    golden += bytes.fromhex("c410") + struct.pack("<IIfI", 0, 7, np.inf, 0) + bytes.fromhex("93 07 01 cc80")
    assert b"".join(request.encode()) == golden
    assert len(msgspec.msgpack.decode(golden)) == 5


@fixed(150)
@given(
    name=TEXT,
    dim=st.integers(1, 9),
    counts=st.lists(st.integers(0, 3), max_size=9),
    seed=U32,
    cuts=st.lists(st.integers(0, 900)),
)
def test_expand_requests_round_trip(name: str, dim: int, counts: list[int], seed: int, cuts: list[int]) -> None:
    generator = np.random.default_rng(seed)
    queries = generator.normal(size=(len(counts), dim)).astype(np.float32)
    pushes = np.zeros(sum(counts), PUSH_DTYPE)
    pushes["query"] = np.repeat(np.arange(len(counts)), counts)
    pushes["row"], pushes["limit"] = generator.integers(0, 2**32, len(pushes)), generator.normal(size=len(pushes))
    parts = ExpandRequest(name, queries, pushes, IMAGE).encode()
    data = b"".join(parts)
    for payload in (data, memoryview(b"x" + data)[1:], parts, cut(data, cuts)):
        found = ExpandRequest.decode(payload)
        assert (found.collection, found.image) == (name, IMAGE)
        assert (found.queries.tobytes(), found.pushes.tobytes()) == (queries.tobytes(), pushes.tobytes())
        assert found.queries.shape == queries.shape
        for array in (found.queries, found.pushes):
            assert array.ctypes.data % 8 == 0, "C reads it where it lies"


def test_only_the_queries_that_occur_travel() -> None:
    queries = np.arange(12, dtype=np.float32).reshape(6, 2)
    pushes = pushes_of(1, 1, 4)
    request = ExpandRequest.of(queries, pushes, IMAGE)
    np.testing.assert_array_equal(request.queries, queries[[1, 4]])
    assert request.pushes["query"].tolist() == [0, 0, 1]
    assert request.pushes["row"].tolist() == [7, 8, 9]
    assert pushes["query"].tolist() == [1, 1, 4]  # the caller's stay as they are
    with pytest.raises(InvalidInputError, match="for query 6 of 6"):
        ExpandRequest.of(queries, pushes_of(1, 6), IMAGE)


REQUEST = b"".join(ExpandRequest("", np.ones((2, 1), np.float32), pushes_of(0, 1), IMAGE).encode())


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\x94" + REQUEST[1:], "array of 5"),
        (REQUEST.replace(b"\xa0\x01", b"\xa0\x00"), "2 numbers are no queries of dim 0"),
        (REQUEST.replace(b"\xa0\x01", b"\xa0\x04"), "2 numbers are no queries of dim 4"),
        (REQUEST.replace(b"\xa0\x01", b"\xa0\x02"), "a node for query 1 of 1"),
        (REQUEST.replace(b"\xc4\x08", b"\xc4\x07"), "items of 4"),
        (REQUEST.replace(b"\xc4\x20", b"\xc4\x1f"), "items of 16"),
        (REQUEST[:-11] + b"\xc0\x7f" + REQUEST[-9:], "a limit is NaN"),
        (REQUEST[:-5] + b"\x90", "it names no image"),
        (REQUEST[:-5] + b"\x92\x07\x01", "the identity of an image is 3 numbers, not 2"),
        (REQUEST + b"\0", "left over"),
        *((REQUEST[:n], "too early") for n in range(len(REQUEST))),
    ],
)
def test_malformed_expand_requests(data: bytes, reason: str) -> None:
    for payload in (data, (data[:7], data[7:])):
        with pytest.raises(FormatError, match=reason):
            ExpandRequest.decode(payload)


# ---- how a round is split ----


def test_an_ordinary_round_is_one_message() -> None:
    pushes = pushes_of(*np.repeat(np.arange(600), 8))
    assert list(split_pushes(pushes, 1536, 32)) == [slice(0, 4800)]
    assert list(split_pushes(pushes[:0], 128, 32)) == []


@fixed(100)
@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=60), dim=st.integers(1, 20), degree=st.integers(2, 12))
def test_no_part_is_too_large_and_none_is_smaller_than_need_be(counts: list[int], dim: int, degree: int) -> None:
    pushes = pushes_of(*np.repeat(np.arange(len(counts)), counts))
    queries = np.zeros((len(counts), dim), np.float32)
    limit = 1000

    def sizes(part: slice) -> tuple[int, int]:
        request = ExpandRequest.of(queries, pushes[part], IMAGE)
        return request.queries.nbytes + request.pushes.nbytes, len(request.pushes) * (24 + 12 * degree)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expansion_messages, "_MAX_BATCH_BYTES", limit)
        parts = list(split_pushes(pushes, dim, degree))
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    assert parts[-1].stop == len(pushes)
    for part in parts:
        assert max(sizes(part)) <= limit
        if part.stop < len(pushes):
            assert max(sizes(slice(part.start, part.stop + 1))) > limit


def test_a_push_that_is_too_large_by_itself_goes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expansion_messages, "_MAX_BATCH_BYTES", 10)
    assert list(split_pushes(pushes_of(0, 0), 4, 32)) == [slice(0, 1), slice(1, 2)]


def test_an_answer_that_would_not_fit_is_refused_before_it_is_made() -> None:
    check_fits(160_000, 32)
    with pytest.raises(InvalidInputError, match="170000 nodes of 32 neighbours do not fit"):
        check_fits(170_000, 32)


# ---- 59 ----


def told_of(*counts: int) -> Expansions:
    found = np.zeros(len(counts), EXPANSION_DTYPE)
    found["label"], found["count"] = np.arange(len(counts)), counts
    total = sum(counts)
    estimates, weights = (np.linspace(start, 1, total, dtype=np.float32) for start in (0, 0.5))
    return Expansions(found, np.arange(total, dtype=np.uint32), estimates, weights)


def test_an_expand_response_byte_for_byte() -> None:
    found = np.array([(0.5, 0, 7, 1, 1)], EXPANSION_DTYPE)
    estimate, weight = np.array([0.25], np.float32), np.array([2], np.float32)
    response = ExpandResponse(0, "", Expansions(found, np.array([9], np.uint32), estimate, weight), IMAGE)
    golden = bytes.fromhex("97 00 a0 c418") + struct.pack("<ffqII", 0.5, 0, 7, 1, 1)
    golden += bytes.fromhex("c404") + struct.pack("<I", 9) + bytes.fromhex("c404") + struct.pack("<f", 0.25)
    golden += bytes.fromhex("c404") + struct.pack("<f", 2) + bytes.fromhex("93 07 01 cc80")
    assert b"".join(response.encode()) == golden
    assert b"".join(ExpandResponse.failed(1, "no").encode()) == bytes.fromhex("97 01 a2 6e6f c400 c400 c400 c400 90")


@fixed(150)
@given(
    code=U32,
    message=TEXT,
    counts=st.lists(st.integers(0, 70), max_size=9),
    cuts=st.lists(st.integers(0, 5000), max_size=9),
)
def test_expand_responses_round_trip(code: int, message: str, counts: list[int], cuts: list[int]) -> None:
    told = told_of(*counts)
    parts = ExpandResponse(code, message, told, IMAGE).encode()
    data = b"".join(parts)
    for payload in (data, memoryview(b"x" + data)[1:], parts, cut(data, cuts)):
        found = ExpandResponse.decode(payload)
        assert (found.code, found.message, found.image) == (code, message, IMAGE)
        for name in ("found", "numbers", "estimates", "weights"):
            sent, received = getattr(told, name), getattr(found.told, name)
            np.testing.assert_array_equal(received, sent)
            assert received.ctypes.data % 8 == 0


def test_large_answers_are_not_copied() -> None:
    told = told_of(*[30] * 100)
    found = ExpandResponse.decode(ExpandResponse(0, "", told).encode()).told
    for name in ("found", "numbers", "estimates", "weights"):
        assert np.shares_memory(getattr(found, name), getattr(told, name))


RESPONSE = b"".join(ExpandResponse(0, "", told_of(2)).encode())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"count": 1}, "2 neighbours, 2 estimates and 2 weights where 1 are counted"),
        ({"count": 2**32 - 1}, "where 4294967295 are counted"),
        ({"distance": np.nan}, "a distance is NaN"),
        ({"distance": np.inf}, "a distance is NaN or infinite"),
        ({"scale": -np.inf}, "a distance is NaN or infinite"),
        ({"estimates": np.full(2, np.nan, np.float32)}, "an estimate is NaN"),
        ({"weights": np.zeros(1, np.float32)}, "2 neighbours, 2 estimates and 1 weights"),
        ({"estimates": np.zeros(3, np.float32)}, "2 neighbours, 3 estimates and 2 weights"),
    ],
)
def test_answers_that_contradict_themselves(change: dict[str, Any], reason: str) -> None:
    told = told_of(2)
    for name in set(change) & set(EXPANSION_DTYPE.names or ()):
        told.found[name] = change[name]
    told = Expansions(
        told.found, told.numbers, change.get("estimates", told.estimates), change.get("weights", told.weights)
    )
    with pytest.raises(FormatError, match=reason):
        ExpandResponse.decode(ExpandResponse(0, "", told).encode())


def test_counts_whose_sum_wraps_around() -> None:
    told = told_of(1, 0)
    told.found["count"] = 2**31 + 1, 2**31
    with pytest.raises(FormatError, match="where 4294967297 are counted"):
        ExpandResponse.decode(ExpandResponse(0, "", told).encode())


@pytest.mark.parametrize(
    "data",
    [
        b"\x96" + RESPONSE[1:],
        RESPONSE + b"\0",
        RESPONSE.replace(b"\xc4\x18", b"\xc4\x17"),
        *(RESPONSE[:n] for n in range(len(RESPONSE))),
    ],
)
def test_malformed_expand_responses(data: bytes) -> None:
    with pytest.raises(FormatError, match="expand response"):
        ExpandResponse.decode(data)


# ---- 51 to a search of the whole collection ----


def answer_of(labels: list[list[int]]) -> SearchResponse:
    array = np.array(labels, np.int64)
    return SearchResponse(0, "", array, array.astype(np.float32), bytes(32 * len(labels)))


def whole(**changes: Any) -> bytes:
    given: dict[str, Any] = {
        "answer": answer_of([[5, -1]]),
        "images": np.array([2**64 - 1, 9], np.uint64),
        "shards": np.array([[1, -1]], np.int32),
        "more_stats": struct.pack("<IIII", 1, 2, 3, 0),
        "failures": {0: "gone"},
    }
    return b"".join(CollectionResponse(**{**given, **changes}).encode())


def test_an_answer_of_the_whole_collection_byte_for_byte() -> None:
    golden = b"".join(answer_of([[5, -1]]).encode()) + bytes.fromhex(
        "94"
        "c410 ffffffffffffffff 0900000000000000"  # two images
        "c408 01000000 ffffffff"  # the hit is the second's
        "c410 01000000 02000000 03000000 00000000"
        "81 00 a4 676f6e65"  # the first one is gone
    )
    assert whole() == golden
    for payload in (golden, (golden[:9], golden[9:])):
        found = CollectionResponse.decode(payload)
        assert found.answer.labels.tolist() == [[5, -1]]
        assert found.images.tolist() == [2**64 - 1, 9]
        assert found.shards.tolist() == [[1, -1]]
        assert np.frombuffer(found.more_stats, MORE_STATS_DTYPE).tolist() == [(1, 2, 3, 0)]
        assert found.failures == {0: "gone"}
    refused = CollectionResponse.decode(b"".join(SearchResponse.failed(1, "no").encode()))
    assert (refused.answer.code, refused.answer.message) == (1, "no")


def test_who_asked_for_one_shard_is_not_answered_for_all() -> None:
    with pytest.raises(FormatError, match="the identity of an image is 3 numbers, not 4"):
        SearchResponse.decode(whole())


WHOLE = whole()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (whole(images=np.empty(0, np.uint64)), "0 bytes name no shards"),
        (whole(shards=np.array([[2, -1]], np.int32)), "none of 2"),
        (whole(shards=np.array([[-2, -1]], np.int32)), "none of 2"),
        (whole(shards=np.array([[1, 1]], np.int32)), "no answer"),
        (whole(shards=np.array([[-1, -1]], np.int32)), "of no shard"),
        (whole(shards=np.array([[1]], np.int32)), "a field of 4 bytes where 2 numbers take 8"),
        (whole(more_stats=bytes(15)), "15 bytes of stats to 1 queries"),
        (whole(failures={2: "x"}), "none of 2"),
        (whole(failures={-1: "x"}), "none of 2"),
        (WHOLE[:-5] + b"\xc0" + WHOLE[-4:], ""),
        (WHOLE + b"\0", ""),
        (b"".join(answer_of([[5, -1]]).encode()), "too early"),
        (b"".join(SearchResponse.failed(1, "no").encode()) + b"\0", "left over"),
        *((WHOLE[:n], "") for n in range(len(WHOLE))),
    ],
)
def test_malformed_answers_of_the_whole_collection(data: bytes, reason: str) -> None:
    with pytest.raises(FormatError, match=f"search response.*{reason}"):
        CollectionResponse.decode(data)


def test_stats_travel_in_two_parts() -> None:
    stats = np.zeros(3, STATS_DTYPE)
    for n, name in enumerate(STATS_DTYPE.names or ()):
        stats[name] = np.arange(3) + 10 * n
    np.testing.assert_array_equal(unpack_stats(pack_stats(stats), 3, pack_stats(stats, MORE_STATS_DTYPE)), stats)
    assert unpack_stats(pack_stats(stats), 3)["own"].tolist() == [0, 0, 0]
    with pytest.raises(FormatError, match="48 bytes of stats to 4 queries"):
        unpack_stats(bytes(32 * 4), 4, pack_stats(stats, MORE_STATS_DTYPE))
