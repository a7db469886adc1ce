"""Messages 52 to 55 between real servers: what a shard tells of itself, and tables from shard to shard."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import cotra_rdma
from cotra_rdma import FormatError, GrpcDispatch, InvalidInputError, Server, Shard
from cotra_rdma.protocol.tables import (
    BuildExchangeRequest,
    BuildExchangeResponse,
    CentroidTable,
    CoarseRouteRequest,
    CoarseRouteResponse,
)
from cotra_rdma.seam.interface import (
    BuildExchangeFailed,
    ShardMessage,
    ShardMessageKind,
    ShardRef,
    ShardRpcDispatch,
    VectorShardSeam,
    VShardMessageType,
    exchange_with_peers,
)

EXCHANGE = VShardMessageType.VECTOR_BUILD_EXCHANGE_REQUEST
COARSE = VShardMessageType.VECTOR_COARSE_ROUTE_REQUEST
Serve = Callable[..., Server]


@pytest.fixture
def shard(words: npt.NDArray[np.float32]) -> Iterator[Shard]:
    with Shard.build(words[:50], n_threads=1) as shard:
        yield shard


@pytest.fixture
def serve(shard: Shard) -> Iterator[Serve]:
    with ExitStack() as stack:
        yield lambda **given: stack.enter_context(cotra_rdma.serve(shard, transports=("rpc",), **given))


def table(number: int) -> CentroidTable:
    return CentroidTable(
        np.full((3, 4), number, np.float32), np.array([1, 2, 3], np.uint32), np.array([0.5, 1, 2], np.float32)
    )


def request(number: int) -> BuildExchangeRequest:
    return BuildExchangeRequest(
        number, table(number), np.array([0, 64, 128], np.uint64), np.array([64, 64, 9], np.uint32), 4096, 1
    )


def ask(server: Server, kind: ShardMessageKind, payload: bytes) -> bytes:
    async def body() -> bytes:
        async with GrpcDispatch({0: server.address}) as dispatch:
            reply = await VectorShardSeam().direct_message(ShardRef(0, 0), ShardMessage(kind, payload), dispatch, 0)
            return reply.payload

    return asyncio.run(body())


def ask_coarse(server: Server, payload: bytes | None = None) -> CoarseRouteResponse:
    payload = CoarseRouteRequest().encode() if payload is None else payload
    return CoarseRouteResponse.decode(ask(server, ShardMessageKind.CompassCoarseDescriptor, payload))


def give_table(server: Server, payload: bytes | None = None) -> BuildExchangeResponse:
    payload = request(1).encode() if payload is None else payload
    return BuildExchangeResponse.decode(ask(server, ShardMessageKind.SpireCentroidTable, payload))


@pytest.mark.parametrize(
    "coarse",
    [
        table(2),
        SimpleNamespace(centroids=np.full((3, 4), 2.0), sizes=np.array([1, 2, 3]), radii=[0.5, 1, 2]),
        CoarseRouteResponse(0, "", table(2)).encode(),
    ],
)
def test_a_shard_tells_how_it_looks(serve: Serve, coarse: Any) -> None:
    server = serve(coarse=coarse)
    for _ in range(3):
        answer = ask_coarse(server)
        assert (answer.code, answer.message) == (0, "")
        np.testing.assert_array_equal(answer.table.centroids, table(2).centroids)
        assert answer.table.sizes.tolist() == [1, 2, 3]
        assert answer.table.radii.tolist() == [0.5, 1, 2]
    assert server.request_counts == {COARSE: 3}


def test_a_shard_without_a_table_says_so(serve: Serve) -> None:
    server = serve()
    answer = ask_coarse(server)
    assert (answer.code, answer.message) == (1, "this owner has no coarse table: it serves without `coarse`")
    assert give_table(server) == BuildExchangeResponse(
        1, "this owner takes no tables of its peers: it serves without `exchange`"
    )


def test_malformed_requests_are_answered(serve: Serve) -> None:
    taken: list[BuildExchangeRequest] = []
    server = serve(coarse=table(1), exchange=taken.append)
    assert (
        ask_coarse(server, b"\xc0").message
        == "coarse route request: an array was expected, not the MessagePack marker 0xc0"
    )
    assert give_table(server, b"").message == "build exchange request: it ends too early"
    assert taken == []


def test_bad_tables_are_refused_when_serving(shard: Shard) -> None:
    with pytest.raises(FormatError, match="coarse route response"):
        cotra_rdma.serve(shard, coarse=b"\x90")
    with pytest.raises(InvalidInputError, match="centroid table"):
        cotra_rdma.serve(shard, coarse=SimpleNamespace(centroids=np.zeros((2, 2)), sizes=[1], radii=[1]))


@pytest.mark.parametrize(
    ("error", "message"),
    [(InvalidInputError("stale"), "stale"), (ZeroDivisionError("a bug"), "ZeroDivisionError: a bug")],
)
def test_what_the_callback_raises_is_told(
    serve: Serve, error: Exception, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    def refuses(_: BuildExchangeRequest) -> None:
        raise error

    server = serve(exchange=refuses)
    assert give_table(server) == BuildExchangeResponse(1, message)
    assert ("callback failed" in caplog.text) == isinstance(error, ZeroDivisionError)


class SendsItsTable(VectorShardSeam):
    """What SPIRE does at build."""

    def __init__(self, number: int) -> None:
        self.number = number

    async def build_time_exchange(self, peer: ShardRef, dispatch: ShardRpcDispatch) -> None:
        message = ShardMessage(ShardMessageKind.SpireCentroidTable, request(self.number).encode())
        reply = BuildExchangeResponse.decode((await self.direct_message(peer, message, dispatch, self.number)).payload)
        if reply.code:
            raise BuildExchangeFailed(peer.vshard_id, reply.message)


def exchange_all(servers: Sequence[Server]) -> None:
    refs = [ShardRef(0, number) for number in range(len(servers))]

    async def body() -> None:
        places = {(0, number): server.address for number, server in enumerate(servers)}
        async with GrpcDispatch(places) as dispatch:
            await asyncio.gather(
                *(
                    exchange_with_peers(SendsItsTable(me.vshard_id), [peer for peer in refs if peer != me], dispatch)
                    for me in refs
                )
            )

    asyncio.run(body())


def test_tables_go_from_shard_to_shard_and_through_nobody(serve: Serve) -> None:
    taken: list[list[BuildExchangeRequest]] = [[], [], [], []]
    servers = [serve(exchange=tables.append) for tables in taken]
    exchange_all(servers)
    for number, (server, tables) in enumerate(zip(servers, taken, strict=True)):
        assert server.request_counts == {EXCHANGE: 3}
        assert sorted(found.shard for found in tables) == [other for other in range(4) if other != number]
        for found in tables:
            np.testing.assert_array_equal(found.table.centroids, table(found.shard).centroids)
            assert found.offsets.tolist() == [0, 64, 128]
            assert (found.region_offset, found.generation) == (4096, 1)


def test_a_peer_that_takes_no_tables_is_named(serve: Serve) -> None:
    with pytest.raises(BuildExchangeFailed, match="failed for shard 1: this owner takes no tables"):
        exchange_all([serve(exchange=lambda table: None), serve()])


def test_a_peer_that_is_gone_is_named(serve: Serve) -> None:
    there, gone = serve(exchange=lambda table: None), serve()
    gone.close()
    with pytest.raises(
        BuildExchangeFailed, match=r"shard 1: cluster transport error during seam call: .* cannot be reached"
    ):
        exchange_all([there, gone])
