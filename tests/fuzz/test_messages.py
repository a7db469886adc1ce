"""Hostile messages: every decoder gives a value or a FormatError, whatever the bytes and however they are cut into frames."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cotra_rdma import FormatError
from cotra_rdma._core.image_identity import ImageIdentity
from cotra_rdma._core.remote_expansion import EXPANSION_DTYPE, PUSH_DTYPE, Expansions
from cotra_rdma.protocol.collection_search import CollectionResponse
from cotra_rdma.protocol.envelope import VShardEnvelope, VShardMessageType, join
from cotra_rdma.protocol.regions import (
    QueuePairFields,
    RegionFields,
    RegionRequest,
    RegionResponse,
    ShardFields,
    SharedMemoryFields,
    ViewFields,
    decode_region_request,
    decode_region_response,
    encode_region,
)
from cotra_rdma.protocol.remote_expansion import ExpandRequest, ExpandResponse
from cotra_rdma.protocol.search import SearchRequest, SearchResponse
from cotra_rdma.protocol.tables import (
    BuildExchangeRequest,
    BuildExchangeResponse,
    CentroidTable,
    CoarseRouteRequest,
    CoarseRouteResponse,
)
from helpers.properties import fixed

Decoder = Callable[[Any], Any]

_PAIR = QueuePairFields(bytes(range(16)), 17, 2**24 - 1, 3, 4096, 16, 16)
_TABLE = CentroidTable(
    np.arange(6, dtype=np.float32).reshape(3, 2), np.array([1, 2, 300], np.uint32), np.array([0, 1, 2.5], np.float32)
)
_FOUND = np.zeros(3, EXPANSION_DTYPE)
_FOUND["count"] = 2, 0, 1
_PUSHES = np.zeros(3, PUSH_DTYPE)
_PUSHES["query"] = 0, 0, 1
_IMAGE = ImageIdentity(7, 1, 2**63)
_ANSWER = SearchResponse(0, "", np.ones((2, 1), np.int64), np.ones((2, 1), np.float32), bytes(64))
SEEDS: dict[Decoder, list[bytes]] = {
    SearchRequest.decode: [
        SearchRequest("docs", np.arange(20, dtype=np.float32), 10, 300, b"\xff" * 9).encode(),
        SearchRequest("", np.empty(0, np.float32), 1, 1, scope=1).encode(),
        SearchRequest("", np.empty(0, np.float32), 1, 1, image=_IMAGE).encode(),
    ],
    SearchResponse.decode: [
        b"".join(SearchResponse(0, "", np.ones((3, 4), np.int64), np.ones((3, 4), np.float32), bytes(96)).encode()),
        b"".join(SearchResponse.failed(4, "no such shard").encode()),
        b"".join(replace(_ANSWER, incomplete=np.ones(2, np.uint32), image=_IMAGE).encode()),
    ],
    CollectionResponse.decode: [
        b"".join(
            CollectionResponse(
                _ANSWER, np.arange(3, dtype=np.uint64), np.full((2, 1), 2, np.int32), bytes(32), {1: "gone"}
            ).encode()
        ),
        b"".join(SearchResponse.failed(1, "no connection").encode()),
    ],
    ExpandRequest.decode: [b"".join(ExpandRequest("docs", np.ones((2, 4), np.float32), _PUSHES, _IMAGE).encode())],
    ExpandResponse.decode: [
        b"".join(
            ExpandResponse(
                0, "", Expansions(_FOUND, np.arange(3, dtype=np.uint32), *np.ones((2, 3), np.float32)), _IMAGE
            ).encode()
        ),
        b"".join(ExpandResponse.failed(1, "no such row").encode()),
    ],
    decode_region_request: [encode_region(RegionRequest(1, "peer", _PAIR, 2**40, 2**41))],
    decode_region_response: [
        encode_region(
            RegionResponse(
                shard=ShardFields(100, "cosine", 10**6, 1, 10**9, 1344, 2**63, 10**7, 10**8, 2**64 - 1),
                transports={"shm": "", "verbs": "no device"},
                region=RegionFields(2**47, 0x1234, 10**9),
                queue_pair=_PAIR,
                number=3,
                shared_memory=SharedMemoryFields("\0cotra", 10**9, "boot"),
                view=ViewFields(10**6, b"header"),
            )
        )
    ],
    CoarseRouteRequest.decode: [CoarseRouteRequest("docs").encode()],
    CoarseRouteResponse.decode: [
        CoarseRouteResponse(0, "", CentroidTable.of(_TABLE, "float16")).encode(),
        CoarseRouteResponse.failed(1, "no table").encode(),
    ],
    BuildExchangeRequest.decode: [
        BuildExchangeRequest(
            2**31, _TABLE, np.arange(3, dtype=np.uint64), np.full(3, 2**31, np.uint32), 2**40, 2**33
        ).encode()
    ],
    BuildExchangeResponse.decode: [BuildExchangeResponse(1, "stale").encode()],
    VShardEnvelope.decode: [VShardEnvelope(2, VShardMessageType(50), 1, 2, 3, b"payload").encode()],
}
DECODERS = list(SEEDS)
decoders = pytest.mark.parametrize("decode", DECODERS, ids=lambda decode: decode.__qualname__)
# MessagePack's markers and their neighbours, and lengths that promise too much.
MARKERS = [0x00, 0x7F, 0x80, 0x8F, 0x90, 0x95, 0x97, 0x98, 0x9F, 0xA0, 0xBF, *range(0xC0, 0xE1), 0xFF]
TOKENS = st.sampled_from([bytes([marker]) for marker in MARKERS] + [b"\xdd\xff\xff\xff\xff", b"\xc6\x7f\xff\xff\xff"])
BYTES = st.binary(max_size=80) | st.lists(TOKENS | st.binary(max_size=4), max_size=40).map(b"".join)
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["flip", "put", "cut", "insert", "repeat"]), st.floats(0, 1), TOKENS | st.binary(max_size=5)
    ),
    min_size=1,
    max_size=6,
)


def changed(data: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    for verb, place, token in changes:
        at = int(place * len(data))
        if verb == "flip" and at < len(data):
            data = data[:at] + bytes([data[at] ^ (1 << len(token))]) + data[at + 1 :]
        elif verb == "put":
            data = data[:at] + token + data[at + len(token) :]
        elif verb == "cut":
            data = data[:at] + data[at + len(token) + 1 :]
        elif verb == "insert":
            data = data[:at] + token + data[at:]
        elif verb == "repeat":
            data = (data[:at] + data)[:4096]
    return data


def decoded(decode: Decoder, data: bytes) -> None:
    """The whole, a view, and the same bytes in frames: a value each time, or FormatError each time."""
    cut = len(data) // 2
    payloads: list[Any] = [data, memoryview(data)]
    if decode != VShardEnvelope.decode:
        payloads += [(data[:cut], data[cut:]), (b"", data, b"")]
    refused = []
    for payload in payloads:
        try:
            decode(payload)
        except FormatError:
            refused.append(payload)
    assert len(refused) in (0, len(payloads))


@decoders
@fixed(300)
@given(data=BYTES)
@example(data=b"\x91" * 60_000)
@example(data=b"\x95\x00\xa0\xc0\x00" + b"\x91" * 60_000)
@example(data=b"\x98\x00\xa0\xc0\x80\xc0\xc0\x00" + b"\x81\xa0" * 60_000)
def test_any_bytes(decode: Decoder, data: bytes) -> None:
    decoded(decode, data)


@decoders
@fixed(300)
@given(changes=CHANGES, which=st.integers(0, 1))
def test_changed_messages(decode: Decoder, changes: list[tuple[str, float, bytes]], which: int) -> None:
    seeds = SEEDS[decode]
    decoded(decode, changed(seeds[which % len(seeds)], changes))


_IMAGE_BYTES, _COUNTS_BYTES = b"\x93\x07\x01\xcf\x80" + bytes(7), b"\xc4\x08" + b"\1\0\0\0" * 2
MAY_BE_LEFT_OUT = {
    b"\x92\x08\x01",
    b"\x95\x08\x00\x00\x90" + _IMAGE_BYTES,
    _COUNTS_BYTES,
    _IMAGE_BYTES + _COUNTS_BYTES,
}
"""What follows a whole message of an earlier version."""


@decoders
def test_every_byte_and_every_length(decode: Decoder) -> None:
    for data in SEEDS[decode]:
        decode(data)
        for n in range(len(data)):
            if data[n:] not in MAY_BE_LEFT_OUT:
                with pytest.raises(FormatError):
                    decode(data[:n])
            for value in (0x00, 0x80, 0x91, 0xC0, 0xC6, 0xDD, 0xFF):
                decoded(decode, data[:n] + bytes([value]) + data[n + 1 :])


@fixed(200)
@given(data=BYTES, frames=st.lists(BYTES, max_size=3), known=st.booleans())
def test_envelopes_in_frames(data: bytes, frames: list[bytes], known: bool) -> None:
    """What a socket gives: frames that anybody may have cut anywhere."""
    if known:
        size = len(data) + sum(map(len, frames))
        data = VShardEnvelope(2, VShardMessageType(51), 0, 0, 0, bytes(size)).encode()[:28] + data
    with suppress(FormatError):
        found = VShardEnvelope.from_frames([memoryview(data), *map(memoryview, frames)])
        assert known
        assert bytes(join(found.payload)) == data[28:] + b"".join(frames)
        with suppress(FormatError):
            SearchResponse.decode(found.payload)
        return
    assert not known
