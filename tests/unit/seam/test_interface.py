"""The seam's published behaviour point by point, and each message type against bytes computed by hand."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import pickle
import struct
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotra_rdma import BoundsError, CotraError, DeadlineError, FormatError, InvalidInputError, errors
from cotra_rdma._core import memory_region as region
from cotra_rdma._core.image_identity import ImageIdentity
from cotra_rdma._core.remote_expansion import PUSH_DTYPE
from cotra_rdma.protocol import envelope as wire
from cotra_rdma.protocol.regions import (
    WANT_CAPABILITIES,
    RegionRequest,
    RegionResponse,
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
from cotra_rdma.seam import interface as seam
from cotra_rdma.seam.interface import (
    BuildExchangeFailed,
    DirectMessagingUnsupported,
    MemoryRegion,
    ShardMessage,
    ShardMessageKind,
    ShardMessageReply,
    ShardRef,
    ShardRpcDispatch,
    ShardSubset,
    VectorSeamError,
    VectorShardSeam,
    VShardEnvelope,
    VShardMessageType,
    exchange_with_peers,
)
from helpers.properties import fixed

U32, U64 = (st.integers(0, 2**bits - 1) for bits in (32, 64))
PEER = ShardRef(0x0102030405060708, 42)


class Records:
    """A dispatch that answers with an echo, or raises what it is given."""

    def __init__(self, fails: Exception | None = None, payload: Any = None) -> None:
        self.calls: list[tuple[VShardEnvelope, int]] = []
        self.fails, self.payload = fails, payload

    async def call(self, envelope: VShardEnvelope, timeout_ms: int) -> VShardEnvelope:
        self.calls.append((envelope, timeout_ms))
        if self.fails is not None:
            raise self.fails
        payload = envelope.payload if self.payload is None else self.payload
        return VShardEnvelope(2, envelope.msg_type.response, envelope.target_node, envelope.source_node, 0, payload)


# ---- the interface ----


class TestDefaults:
    def test_all_shards_are_selected(self) -> None:
        subset = VectorShardSeam().select_shards(np.zeros(4, np.float32), [3, 1, 2])
        assert subset is ShardSubset.All
        assert subset.resolve([3, 1, 2]) == [3, 1, 2]

    def test_no_region_is_exposed(self) -> None:
        assert VectorShardSeam().exposed_region() is None

    def test_the_exchange_does_nothing_and_never_dispatches(self) -> None:
        dispatch = Records()
        assert VectorShardSeam().build_time_exchange(PEER, dispatch) is None
        asyncio.run(exchange_with_peers(VectorShardSeam(), [PEER] * 3, dispatch))
        assert dispatch.calls == []

    @pytest.mark.parametrize(
        ("kind", "number"), [(ShardMessageKind.CompassCoarseDescriptor, 52), (ShardMessageKind.SpireCentroidTable, 54)]
    )
    def test_a_direct_message_is_an_envelope_of_its_kind(self, kind: ShardMessageKind, number: int) -> None:
        dispatch = Records()
        reply = asyncio.run(VectorShardSeam().direct_message(PEER, ShardMessage(kind, b"abc"), dispatch, 7))
        assert reply == ShardMessageReply(b"abc")
        ((envelope, timeout_ms),) = dispatch.calls
        assert timeout_ms == 5000
        assert envelope == VShardEnvelope(2, VShardMessageType(number), 7, 0x0102030405060708, 42, b"abc")
        assert envelope.encode() == bytes.fromhex(
            f"0200 {number:02x}00 0700000000000000 0807060504030201 2a000000 03000000 616263"
        )

    @pytest.mark.parametrize("payload", [b"xyz", memoryview(b"xyz"), (memoryview(b"x"), b"yz")])
    def test_a_reply_is_bytes(self, payload: Any) -> None:
        message = ShardMessage(ShardMessageKind.SpireCentroidTable, b"")
        reply = asyncio.run(VectorShardSeam().direct_message(PEER, message, Records(payload=payload), 7))
        assert reply.payload == b"xyz"
        assert type(reply.payload) is bytes

    @pytest.mark.parametrize(
        "error", [DeadlineError("late"), errors.TransportError("late"), ConnectionError("late"), TimeoutError("late")]
    )
    def test_a_transport_failure_is_the_seams(self, error: Exception) -> None:
        message = ShardMessage(ShardMessageKind.SpireCentroidTable, b"")
        with pytest.raises(seam.TransportError, match=r"^cluster transport error during seam call: late$") as caught:
            asyncio.run(VectorShardSeam().direct_message(PEER, message, Records(error), 7))
        assert caught.value.__cause__ is error

    @pytest.mark.parametrize(
        "error", [DirectMessagingUnsupported(), seam.TransportError("x"), FormatError("x"), RuntimeError("a bug")]
    )
    def test_other_errors_stay_what_they_are(self, error: Exception) -> None:
        message = ShardMessage(ShardMessageKind.SpireCentroidTable, b"")
        with pytest.raises(type(error)) as caught:
            asyncio.run(VectorShardSeam().direct_message(PEER, message, Records(error), 7))
        assert caught.value is error


class TestSubsets:
    @pytest.mark.parametrize(
        ("subset", "present", "expected"),
        [
            (ShardSubset.All, [4, 2, 9], [4, 2, 9]),
            (ShardSubset.All, [], []),
            (ShardSubset.Subset([]), [1, 2], []),
            (ShardSubset.Subset([9, 4]), [4, 2, 9], [9, 4]),
            (ShardSubset.Subset([9, 5, 4]), [4, 2, 9], [9, 4]),
            (ShardSubset.Subset([5, 6]), [4, 2, 9], []),
            (ShardSubset.Subset([4, 9, 4]), [4, 2, 9], [4, 9]),
            (ShardSubset.Subset(np.array([2, 4])), (4, 2), [2, 4]),
        ],
    )
    def test_resolve(self, subset: ShardSubset, present: Sequence[int], expected: list[int]) -> None:
        resolved = subset.resolve(present)
        assert resolved == expected
        assert type(resolved) is list
        assert resolved is not present

    @given(ids=st.lists(U32, max_size=20), present=st.lists(U32, max_size=20, unique=True))
    @fixed(200)
    def test_only_what_is_present_in_the_subsets_order(self, ids: list[int], present: list[int]) -> None:
        resolved = ShardSubset.Subset(ids).resolve(present)
        assert set(resolved) == set(ids) & set(present)
        assert [ids.index(number) for number in resolved] == sorted(ids.index(number) for number in resolved)
        assert ShardSubset.All.resolve(present) == present

    def test_as_values(self) -> None:
        assert ShardSubset.Subset([1, 2]) == ShardSubset.Subset((1, 2)) != ShardSubset.Subset([2, 1])
        assert ShardSubset.Subset([]) != ShardSubset.All
        assert len({ShardSubset.All, ShardSubset.Subset([1]), ShardSubset.Subset([1])}) == 2
        assert (repr(ShardSubset.All), repr(ShardSubset.Subset([3]))) == ("ShardSubset.All", "ShardSubset.Subset([3])")
        assert copy.deepcopy(ShardSubset.All) == pickle.loads(pickle.dumps(ShardSubset.All)) == ShardSubset.All


class TestValues:
    def test_shards_are_frozen_and_hashable(self) -> None:
        assert len({ShardRef(1, 2), ShardRef(1, 2), ShardRef(2, 1)}) == 2
        with pytest.raises(dataclasses.FrozenInstanceError):
            PEER.node_id = 3  # type: ignore[misc]
        assert str(PEER) == f"shard 42 of node {0x0102030405060708}"
        assert ShardRef(2**64 - 1, 2**32 - 1).vshard_id == 2**32 - 1
        for node, shard in ((-1, 0), (2**64, 0), (0, -1), (0, 2**32)):
            with pytest.raises(InvalidInputError, match="ShardRef"):
                ShardRef(node, shard)

    def test_messages_are_frozen_and_hashable(self) -> None:
        kinds = list(ShardMessageKind)
        assert [kind.name for kind in kinds] == ["CompassCoarseDescriptor", "SpireCentroidTable"]
        assert [kind.message_type for kind in kinds] == [52, 54]
        assert len({ShardMessage(kind, b"x") for kind in kinds * 2}) == 2
        assert len({ShardMessageReply(b"x"), ShardMessageReply(b"x")}) == 1
        with pytest.raises(dataclasses.FrozenInstanceError):
            ShardMessage(kinds[0], b"").payload = b"x"  # type: ignore[misc]

    def test_a_region_is_addr_rkey_len(self) -> None:
        exposed = MemoryRegion(addr=0x7F0000000000, rkey=0x1234, len=4096)
        assert (exposed.remote_addr, exposed.addr, exposed.rkey, exposed.len) == (
            2**32 * 0x7F00,
            2**32 * 0x7F00,
            4660,
            4096,
        )
        assert exposed.slice(64, 32) == MemoryRegion(0x7F0000000040, 0x1234, 32)
        with pytest.raises(BoundsError):
            exposed.slice(4090, 7)

    def test_what_is_exported(self) -> None:
        assert seam.MemoryRegion is region.MemoryRegion
        assert seam.VShardEnvelope is wire.VShardEnvelope
        assert seam.VShardMessageType is wire.VShardMessageType
        assert seam.WIRE_VERSION == wire.WIRE_VERSION == 2
        assert all(hasattr(seam, name) for name in seam.__all__)
        assert isinstance(Records(), ShardRpcDispatch)
        assert not isinstance(object(), ShardRpcDispatch)


class TestErrors:
    @pytest.mark.parametrize(
        ("error", "message"),
        [
            (DirectMessagingUnsupported(), "direct shard-to-shard messaging is not supported by this implementation"),
            (BuildExchangeFailed(3, "no memory"), "build-time exchange failed for shard 3: no memory"),
            (seam.TransportError("refused"), "cluster transport error during seam call: refused"),
        ],
    )
    def test_messages(self, error: VectorSeamError, message: str) -> None:
        assert str(error) == message
        assert isinstance(error, VectorSeamError)
        assert isinstance(error, CotraError)
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), vars(again)) == (type(error), message, vars(error))

    def test_fields_and_kin(self) -> None:
        failed = BuildExchangeFailed(3, ValueError("no memory"))
        assert (failed.peer_shard, failed.detail) == (3, "no memory")
        assert issubclass(seam.TransportError, errors.TransportError)
        assert issubclass(seam.TransportError, ConnectionError)
        assert seam.TransportError("x").detail == "x"


class TestExchange:
    def test_once_for_each_peer_in_order(self) -> None:
        noted: list[Any] = []

        class Sends(VectorShardSeam):
            async def build_time_exchange(self, peer: ShardRef, dispatch: ShardRpcDispatch) -> None:
                noted.append(peer)
                message = ShardMessage(ShardMessageKind.SpireCentroidTable, b"table")
                noted.append((await self.direct_message(peer, message, dispatch, 1)).payload)

        class Notes(VectorShardSeam):
            def build_time_exchange(self, peer: ShardRef, dispatch: ShardRpcDispatch) -> None:
                noted.append(peer)

        peers = [ShardRef(5, 1), ShardRef(4, 2)]
        asyncio.run(exchange_with_peers(Sends(), peers, Records()))
        assert noted == [peers[0], b"table", peers[1], b"table"]
        noted.clear()
        asyncio.run(exchange_with_peers(Notes(), peers, Records()))
        assert noted == peers

    @pytest.mark.parametrize(
        "error", [DeadlineError("late"), FormatError("late"), OSError("late"), BuildExchangeFailed(9, "late")]
    )
    def test_a_failure_names_the_peer(self, error: Exception) -> None:
        class Fails(VectorShardSeam):
            async def build_time_exchange(self, peer: ShardRef, dispatch: ShardRpcDispatch) -> None:
                raise error

        with pytest.raises(BuildExchangeFailed, match=r"^build-time exchange failed for shard 9: late$") as caught:
            asyncio.run(exchange_with_peers(Fails(), [ShardRef(5, 9)], Records()))
        assert caught.value is error or caught.value.__cause__ is error

    def test_a_bug_stays_a_bug(self) -> None:
        class Fails(VectorShardSeam):
            def build_time_exchange(self, peer: ShardRef, dispatch: ShardRpcDispatch) -> None:
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            asyncio.run(exchange_with_peers(Fails(), [PEER], Records()))


# ---- golden bytes: written down from the field tables, not from what the encoders give ----

HEAD = "02 00  {:02x} 00  01 00 00 00 00 00 00 00  02 00 00 00 00 00 00 00  03 00 00 00  {:02x} 00 00 00"
TABLE = CentroidTable(
    np.array([[1.0, -0.5], [2.0, 0.25]], np.float32), np.array([3, 300], np.uint32), np.array([0.5, 1.5], np.float32)
)
QUERY = np.array([1.0, -2.0], np.float32)


def as_bytes(payload: Any) -> bytes:
    return payload if isinstance(payload, bytes) else b"".join(payload)


GOLDEN: list[tuple[str, int, str, Any, Callable[[bytes], Any]]] = [
    (
        "search request",
        50,
        "95 a1 63  92 ca 3f 80 00 00 ca c0 00 00 00  0a cd 01 00 c2",
        SearchRequest("c", QUERY, 10, 256).encode(),
        lambda data: SearchRequest.decode(data).encode(),
    ),
    (
        "search request with a filter",
        50,
        "95 a1 63  92 ca 3f 80 00 00 ca c0 00 00 00  0a cd 01 00 c3  03 00 00 00  05 00 80",
        SearchRequest("c", QUERY, 10, 256, b"\x05\x00\x80").encode(),
        lambda data: SearchRequest.decode(data).encode(),
    ),
    (
        "search response",
        51,
        "97 00 a0 01 01  c4 08 ff ff ff ff ff ff ff ff  c4 04 00 00 80 7f  c4 00",
        SearchResponse(0, "", np.array([[-1]]), np.array([[np.inf]], np.float32), b"").encode(),
        lambda data: SearchResponse.decode(data).encode(),
    ),
    (
        "coarse route request",
        52,
        "91 a1 63",
        CoarseRouteRequest("c").encode(),
        lambda data: CoarseRouteRequest.decode(data).encode(),
    ),
    (
        "coarse route response in float16",
        53,
        "98 00 a0 02 02 a7 66 6c 6f 61 74 31 36  c4 08 00 3c 00 b8 00 40 00 34"
        "  c4 08 03 00 00 00 2c 01 00 00  c4 08 00 00 00 3f 00 00 c0 3f",
        CoarseRouteResponse(0, "", CentroidTable.of(TABLE, "float16")).encode(),
        lambda data: CoarseRouteResponse.decode(data).encode(),
    ),
    (
        "coarse route response in float32",
        53,
        "98 00 a0 02 02 a7 66 6c 6f 61 74 33 32  c4 10 00 00 80 3f 00 00 00 bf 00 00 00 40 00 00 80 3e"
        "  c4 08 03 00 00 00 2c 01 00 00  c4 08 00 00 00 3f 00 00 c0 3f",
        CoarseRouteResponse(0, "", TABLE).encode(),
        lambda data: CoarseRouteResponse.decode(data).encode(),
    ),
    (
        "coarse route response of a shard in a collection",
        53,
        "98 00 a0 02 02 a7 66 6c 6f 61 74 33 32  c4 10 00 00 80 3f 00 00 00 bf 00 00 00 40 00 00 80 3e"
        "  c4 08 03 00 00 00 2c 01 00 00  c4 08 00 00 00 3f 00 00 c0 3f"
        "  82 a5 73 68 61 72 64 02  ab 63 61 6c 69 62 72 61 74 69 6f 6e c0",
        CoarseRouteResponse(0, "", TABLE, {"shard": 2, "calibration": None}).encode(),
        lambda data: CoarseRouteResponse.decode(data).encode(),
    ),
    (
        "coarse route response that failed",
        53,
        "98 01 a2 6e 6f 00 00 a7 66 6c 6f 61 74 33 32 c4 00 c4 00 c4 00",
        CoarseRouteResponse.failed(1, "no").encode(),
        lambda data: CoarseRouteResponse.decode(data).encode(),
    ),
    (
        "build exchange request",
        54,
        "9b 07 02 02 a7 66 6c 6f 61 74 33 32  c4 10 00 00 80 3f 00 00 00 bf 00 00 00 40 00 00 80 3e"
        "  c4 08 03 00 00 00 2c 01 00 00  c4 08 00 00 00 3f 00 00 c0 3f"
        "  c4 10 00 00 00 00 00 00 00 00 40 00 00 00 00 00 00 00  c4 08 40 00 00 00 00 19 00 00"
        "  cf 00 00 00 01 00 00 00 00  cc 80",
        BuildExchangeRequest(
            7, TABLE, np.array([0, 64], np.uint64), np.array([64, 6400], np.uint32), 2**32, 128
        ).encode(),
        lambda data: BuildExchangeRequest.decode(data).encode(),
    ),
    (
        "build exchange response",
        55,
        "92 01 a5 73 74 61 6c 65",
        BuildExchangeResponse(1, "stale").encode(),
        lambda data: BuildExchangeResponse.decode(data).encode(),
    ),
    (
        "region request",
        56,
        "96 00 a1 70 c0 00 00 c0",
        encode_region(RegionRequest(WANT_CAPABILITIES, "p")),
        lambda data: encode_region(decode_region_request(data)),
    ),
    (
        "region response",
        57,
        "99 01 a2 6e 6f c0 80 c0 c0 00 c0 c0",
        encode_region(RegionResponse(1, "no")),
        lambda data: encode_region(decode_region_response(data)),
    ),
    (
        "expand request",
        58,
        "95 a0 02 c4 08 00 00 80 3f 00 00 00 c0 c4 10 00 00 00 00 07 00 00 00 00 00 80 3f 00 00 00 00 93 07 01 cc 80",
        ExpandRequest("", QUERY[np.newaxis], np.array([(0, 7, 1.0, 0)], PUSH_DTYPE), ImageIdentity(7, 1, 128)).encode(),
        lambda data: ExpandRequest.decode(data).encode(),
    ),
    (
        "expand response",
        59,
        "97 01 a2 6e 6f c4 00 c4 00 c4 00 c4 00 90",
        ExpandResponse.failed(1, "no").encode(),
        lambda data: ExpandResponse.decode(data).encode(),
    ),
]


@pytest.mark.parametrize(
    ("kind", "golden", "payload", "again"), [row[1:] for row in GOLDEN], ids=[r[0] for r in GOLDEN]
)
def test_golden_bytes(kind: int, golden: str, payload: Any, again: Callable[[bytes], Any]) -> None:
    raw = bytes.fromhex(golden)
    assert as_bytes(payload) == raw
    assert as_bytes(again(raw)) == raw
    whole = bytes.fromhex(HEAD.format(kind, len(raw))) + raw
    envelope = VShardEnvelope(2, VShardMessageType(kind), 1, 2, 3, payload)
    assert envelope.encode() == whole
    assert VShardEnvelope.decode(whole) == dataclasses.replace(envelope, payload=raw)


def test_golden_bytes_cover_every_type() -> None:
    assert {row[1] for row in GOLDEN} == set(VShardMessageType)


# ---- 52 to 55 ----


@st.composite
def tables(draw: st.DrawFn) -> CentroidTable:
    n_lists, dim = draw(st.integers(0, 20)), draw(st.integers(1, 20))
    generator = np.random.default_rng(draw(U32))
    kind = draw(st.sampled_from([np.float16, np.float32]))
    return CentroidTable(
        generator.normal(size=(n_lists, dim)).astype(kind),
        generator.integers(0, 2**32, n_lists, np.uint32),
        generator.random(n_lists, np.float32),
    )


def assert_same(one: CentroidTable, other: CentroidTable) -> None:
    for name in ("centroids", "sizes", "radii"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


@fixed(100)
@given(table=tables(), code=U32, message=st.text(max_size=20), place=U64, generation=U64, shard=U32, seed=U32)
def test_tables_round_trip(
    table: CentroidTable, code: int, message: str, place: int, generation: int, shard: int, seed: int
) -> None:
    generator, n = np.random.default_rng(seed), len(table.sizes)
    place //= 2
    sent = BuildExchangeRequest(
        shard,
        table,
        generator.integers(0, 2**62, n, np.uint64),
        generator.integers(0, 2**32, n, np.uint32),
        place,
        generation,
    )
    for data in (sent.encode(), memoryview(sent.encode()), (sent.encode()[:9], sent.encode()[9:])):
        found = BuildExchangeRequest.decode(data)
        assert_same(found.table, table)
        assert (found.shard, found.region_offset, found.generation) == (shard, place, generation)
        assert (found.offsets == sent.offsets).all()
        assert (found.lengths == sent.lengths).all()
    answer = CoarseRouteResponse.decode(CoarseRouteResponse(code, message, table).encode())
    assert (answer.code, answer.message) == (code, message)
    assert_same(answer.table, table)
    told = BuildExchangeResponse(code, message)
    assert BuildExchangeResponse.decode(told.encode()) == told
    assert CoarseRouteRequest.decode(CoarseRouteRequest(message).encode()).collection == message


JSON = st.recursive(
    st.none() | st.booleans() | U64 | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@fixed(100)
@given(table=tables(), told=st.none() | st.dictionaries(st.text(max_size=12), JSON, max_size=4))
def test_the_map_of_a_collection_round_trips(table: CentroidTable, told: dict[str, Any] | None) -> None:
    data = CoarseRouteResponse(0, "", table, told).encode()
    for payload in (data, memoryview(data), (data[:-1], data[-1:])):
        found = CoarseRouteResponse.decode(payload)
        assert found.collection == told
        assert_same(found.table, table)
    bare = CoarseRouteResponse(0, "", table).encode()
    assert data[: len(bare)] == bare
    assert (data == bare) == (told is None)


def test_a_table_of_any_object() -> None:
    given_table = SimpleNamespace(
        centroids=np.asfortranarray(TABLE.centroids.astype(np.float64)),
        sizes=TABLE.sizes.astype(np.int64),
        radii=[0.5, 1.5],
    )
    assert_same(CentroidTable.of(given_table), TABLE)
    assert CentroidTable.of(given_table, "float16").centroid_type == "float16"
    assert CentroidTable.of(TABLE).centroid_type == "float32"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"centroids": np.zeros(4)}, "are not"),
        ({"centroids": np.zeros((3, 2))}, "are not"),
        ({"sizes": [1, 2, 3]}, "are not"),
        ({"radii": [1.0]}, "are not"),
        ({"sizes": [-1, 2]}, "u32"),
        ({"sizes": [1, 2**32]}, "u32"),
        ({"radii": [1.0, -0.1]}, "radius"),
        ({"radii": [1.0, np.nan]}, "radius"),
        ({"radii": [1.0, np.inf]}, "radius"),
        ({"centroids": [[1, 2], [np.nan, 0]]}, "centroid holds"),
        ({"centroids": [[1, 2], [1e39, 0]]}, "centroid holds"),
    ],
)
def test_tables_that_cannot_be_written(change: dict[str, Any], why: str) -> None:
    fields = {"centroids": TABLE.centroids, "sizes": TABLE.sizes, "radii": TABLE.radii}
    with pytest.raises(InvalidInputError, match=why):
        CentroidTable.of(SimpleNamespace(**{**fields, **change}))


def test_what_does_not_fit_its_place() -> None:
    with pytest.raises(InvalidInputError, match="float16 or float32"):
        CentroidTable.of(TABLE, "bfloat16")
    with pytest.raises(InvalidInputError, match="centroid holds"):
        CentroidTable.of(SimpleNamespace(centroids=[[70000.0]], sizes=[1], radii=[0.0]), "float16")
    zeros = np.zeros(2, np.uint32)
    for offsets, lengths, place, why in (
        (np.zeros(3, np.uint64), zeros, 0, "3 offsets and 2 lengths for 2 lists"),
        (np.zeros(2, np.uint64), np.zeros(1, np.uint32), 0, "1 lengths"),
        (np.array([0, 2**63], np.uint64), zeros, 2**63, "address space"),
        (np.zeros(2, np.uint64), zeros + 2, 2**64 - 2, "address space"),
        (np.zeros(2, np.uint64), zeros, 2**64, "does not fit u64"),
    ):
        with pytest.raises(InvalidInputError, match=why):
            BuildExchangeRequest(1, TABLE, offsets, lengths, place, 1).encode()
    assert BuildExchangeRequest(1, TABLE, np.zeros(2, np.uint64), zeros + 2, 2**64 - 3, 1).encode()


COARSE = CoarseRouteResponse(0, "", TABLE).encode()
COLLECTION = CoarseRouteResponse(0, "", TABLE, {"shard": 300, "calibration": {"k": 10}}).encode()[len(COARSE) :]
EXCHANGE = BuildExchangeRequest(
    7, TABLE, np.array([0, 64], np.uint64), np.array([64, 640], np.uint32), 4096, 1
).encode()


@pytest.mark.parametrize(
    ("decode", "data", "reason"),
    [
        (CoarseRouteRequest.decode, b"\x92\xa0\xa0", "array of 1"),
        (CoarseRouteRequest.decode, b"\x91\xa0\x00", "left over"),
        (CoarseRouteRequest.decode, b"\x91\x00", "a string was expected"),
        (CoarseRouteResponse.decode, b"\x97" + COARSE[1:], "array of 8"),
        (CoarseRouteResponse.decode, COARSE + b"\0", "Expected `object`"),
        (CoarseRouteResponse.decode, COARSE + b"\xc0", "Expected `object`"),
        (CoarseRouteResponse.decode, COARSE + b"\x90", "Expected `object`"),
        (CoarseRouteResponse.decode, COARSE + b"\x81\x01\x02", "Expected `str`"),
        (CoarseRouteResponse.decode, COARSE + b"\x81\xa1\xff\x02", "coarse route response: "),
        (CoarseRouteResponse.decode, COARSE + b"\x80\x80", "trailing characters"),
        pytest.param(
            *(CoarseRouteResponse.decode, COARSE + b"\x81\xa1a" + b"\x91" * 100_000, "coarse route response: "),
            id="deep",
        ),
        (CoarseRouteResponse.decode, COARSE.replace(b"float32", b"float64"), "type 'float64' are unknown"),
        (CoarseRouteResponse.decode, COARSE.replace(b"float32", b"float16"), "16 bytes where 4 numbers take 8"),
        (CoarseRouteResponse.decode, COARSE[:3] + b"\x03" + COARSE[4:], "numbers take"),
        (CoarseRouteResponse.decode, COARSE[:4] + b"\x03" + COARSE[5:], "numbers take"),
        (CoarseRouteResponse.decode, COARSE[:3] + b"\x00" + COARSE[4:], "centroids of dim 0"),
        (
            CoarseRouteResponse.decode,
            COARSE[:3] + b"\xce\xff\xff\xff\xff\xce\xff\xff\xff\xff" + COARSE[5:],
            "numbers take",
        ),
        (CoarseRouteResponse.decode, COARSE[:3] + b"\x00\xce\xff\xff\xff\xff" + COARSE[5:], "of dim 0"),
        (
            CoarseRouteResponse.decode,
            COARSE.replace(struct.pack("<f", -0.5), struct.pack("<f", np.nan)),
            "centroid holds",
        ),
        (CoarseRouteResponse.decode, COARSE.replace(struct.pack("<f", 1.5), struct.pack("<f", -1.5)), "radius"),
        (BuildExchangeRequest.decode, b"\x9a" + EXCHANGE[1:], "array of 11"),
        (BuildExchangeRequest.decode, EXCHANGE + b"\0", "Expected `object`"),
        (BuildExchangeRequest.decode, EXCHANGE[:-4] + b"\xcf" + b"\xff" * 8 + b"\x01", "address space"),
        (BuildExchangeRequest.decode, EXCHANGE[:-1] + b"\xff", "a u64 was expected"),
        (BuildExchangeRequest.decode, EXCHANGE[:-1] + b"\xcf\0", "too early"),
        (BuildExchangeResponse.decode, b"\x93\x00\xa0\x00", "array of 2"),
        (BuildExchangeResponse.decode, b"\x92\x00\xa0\x00", "left over"),
        (BuildExchangeResponse.decode, b"\x92\xcf" + bytes(8) + b"\xa0", "a u32 was expected"),
        *((CoarseRouteResponse.decode, COARSE[:n], "too early") for n in range(len(COARSE))),
        *((CoarseRouteResponse.decode, COARSE + COLLECTION[:n], "truncated") for n in range(1, len(COLLECTION))),
        *((BuildExchangeRequest.decode, EXCHANGE[:n], "too early") for n in range(len(EXCHANGE))),
    ],
)
def test_malformed_tables(decode: Callable[[Any], Any], data: bytes, reason: str) -> None:
    for payload in (data, memoryview(data), (data[:4], data[4:])):
        with pytest.raises(FormatError, match=reason):
            decode(payload)


DECODERS: list[Callable[[Any], Any]] = [
    VShardEnvelope.decode,
    SearchRequest.decode,
    SearchResponse.decode,
    CoarseRouteRequest.decode,
    CoarseRouteResponse.decode,
    BuildExchangeRequest.decode,
    BuildExchangeResponse.decode,
    decode_region_request,
    decode_region_response,
]


@pytest.mark.parametrize("decode", DECODERS, ids=lambda decode: decode.__qualname__)
@fixed(300)
@given(
    which=st.integers(0, len(GOLDEN) - 1),
    edits=st.lists(st.tuples(st.integers(0, 200), st.binary(max_size=3)), max_size=5),
    tail=st.binary(max_size=20),
)
def test_any_bytes_are_a_value_or_a_format_error(
    decode: Callable[[Any], Any], which: int, edits: list[tuple[int, bytes]], tail: bytes
) -> None:
    """Golden payloads of every type with bytes changed, given to every decoder. (tests/fuzz goes further.)"""
    data = bytearray(bytes.fromhex(GOLDEN[which][2]) + tail)
    for place, put in edits:
        at = place % (len(data) + 1)
        data[at : at + len(put)] = put
    with contextlib.suppress(FormatError):
        decode(bytes(data))
