"""`GrpcDispatch`: many calls at once, deadlines, late answers, cancellation, certificates, and owners that go away."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from cotra_rdma import (
    ClosedError,
    DeadlineError,
    FormatError,
    InvalidInputError,
    TransportError,
)
from cotra_rdma.protocol.certificates import make_certificate
from cotra_rdma.protocol.envelope import WIRE_VERSION, VShardEnvelope, VShardMessageType, join
from cotra_rdma.protocol.rpc_server import RpcServer, asker
from cotra_rdma.seam.grpc_dispatch import GrpcDispatch
from cotra_rdma.seam.interface import ShardRpcDispatch

REQUEST = VShardMessageType.VECTOR_SCATTER_REQUEST
Serve = Callable[..., RpcServer]


def envelope(payload: bytes, *, node: int = 0, shard: int = 0) -> VShardEnvelope:
    return VShardEnvelope(WIRE_VERSION, REQUEST, 9, node, shard, payload)


def echo(request: VShardEnvelope) -> VShardEnvelope:
    payload = bytes(join(request.payload))
    return VShardEnvelope(
        WIRE_VERSION, request.msg_type.response, request.target_node, request.source_node, request.vshard_id, payload
    )


@pytest.fixture
def serve() -> Iterator[Serve]:
    with ExitStack() as stack:
        yield lambda handler=echo, **given: stack.enter_context(RpcServer("127.0.0.1:0", handler, **given))


def run(body: Callable[[], Awaitable[Any]]) -> Any:
    """Runs a coroutine; what a broken one would leave behind is an error here, not in a later test."""

    async def watched() -> Any:
        complaints: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: complaints.append(context))
        async with asyncio.timeout(60):
            result = await body()
        gc.collect()
        assert complaints == []
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return result

    return asyncio.run(watched())


def test_it_is_a_dispatch_of_the_seam() -> None:
    assert isinstance(GrpcDispatch({}), ShardRpcDispatch)


def test_places_are_shards_before_nodes(serve: Serve) -> None:
    def named(name: bytes) -> Callable[[VShardEnvelope], VShardEnvelope]:
        return lambda request: VShardEnvelope(WIRE_VERSION, request.msg_type.response, 0, 0, 0, name)

    async def body() -> None:
        places = {5: serve(named(b"node 5")).address, (5, 2): serve(named(b"shard 2")).address}
        async with GrpcDispatch(places) as dispatch:
            assert join((await dispatch.call(envelope(b"", node=5, shard=1), 5000)).payload) == b"node 5"
            assert join((await dispatch.call(envelope(b"", node=5, shard=2), 5000)).payload) == b"shard 2"
            with pytest.raises(TransportError, match="no address is known for shard 2 of node 6"):
                await dispatch.call(envelope(b"", node=6, shard=2), 5000)

    run(body)


def test_envelopes_go_and_come_whole(serve: Serve) -> None:
    async def body() -> None:
        async with GrpcDispatch({7: serve().address}) as dispatch:
            large = bytes(range(256)) * 4096
            for payload in (b"", b"x", large, (large[:1000], memoryview(large)[1000:])):
                reply = await dispatch.call(VShardEnvelope(WIRE_VERSION, REQUEST, 3, 7, 9, payload), 5000)
                assert (reply.source_node, reply.target_node, reply.vshard_id) == (7, 3, 9)
                assert bytes(join(reply.payload)) == bytes(join(payload))

    run(body)


def test_many_tasks_share_connections(serve: Serve) -> None:
    async def body() -> None:
        places = {node: serve(n_workers=3).address for node in range(3)}
        async with GrpcDispatch(places) as dispatch:
            asked = [(i % 3, b"%d" % i) for i in range(600)]
            replies = await asyncio.gather(
                *(dispatch.call(envelope(payload, node=node), 30_000) for node, payload in asked)
            )
        assert [bytes(join(reply.payload)) for reply in replies] == [payload for _, payload in asked]

    run(body)


def test_answers_may_come_in_any_order(serve: Serve) -> None:
    gates = [threading.Event() for _ in range(4)]

    def waits(request: VShardEnvelope) -> VShardEnvelope:
        number = int(bytes(join(request.payload)))
        gates[number].wait(30)
        if number:
            gates[number - 1].set()
        return echo(request)

    async def body() -> None:
        async with GrpcDispatch({0: serve(waits).address}) as dispatch:
            calls = [asyncio.create_task(dispatch.call(envelope(b"%d" % i), 50_000)) for i in range(4)]
            gates[3].set()  # the last one is answered first
            assert [bytes(join((await call).payload)) for call in calls] == [b"0", b"1", b"2", b"3"]

    run(body)


def test_a_late_answer_and_a_cancelled_call_leave_nothing_behind(serve: Serve) -> None:
    ended = threading.Semaphore(0)

    def hangs(request: VShardEnvelope) -> VShardEnvelope:
        stop = asker.get()
        assert stop is not None
        while join(request.payload) != b"quick" and not stop.is_set:
            time.sleep(0.005)
        time.sleep(0 if join(request.payload) == b"quick" else 0.1)  # the deadline is over at the caller, too
        ended.release()
        return echo(request)

    async def body() -> None:
        async with GrpcDispatch({0: serve(hangs).address}) as dispatch:
            with pytest.raises(DeadlineError, match="did not answer within 50 ms"):
                await dispatch.call(envelope(b"late"), 50)
            call = asyncio.create_task(dispatch.call(envelope(b"given up"), 60_000))
            await asyncio.sleep(0.1)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert dispatch._calls == set()
            for _ in range(2):  # the owner knows of both
                assert await asyncio.to_thread(ended.acquire, timeout=30)
            assert bytes(join((await dispatch.call(envelope(b"quick"), 50_000)).payload)) == b"quick"

    run(body)


@pytest.mark.parametrize("kind", [50, 57])
def test_an_answer_of_another_type_is_said(serve: Serve, kind: int) -> None:
    def wrong(request: VShardEnvelope) -> VShardEnvelope:
        return VShardEnvelope(WIRE_VERSION, VShardMessageType(kind), 0, 0, 0, b"")

    async def body() -> None:
        async with GrpcDispatch({0: serve(wrong).address}) as dispatch:
            with pytest.raises(FormatError, match=f"with type {kind}"):
                await dispatch.call(envelope(b""), 5000)

    run(body)


def test_nobody_there_is_said_before_the_deadline() -> None:
    async def body() -> None:
        async with GrpcDispatch({0: "127.0.0.1:1"}) as dispatch:
            for _ in range(2):
                with pytest.raises(
                    TransportError, match=r"127.0.0.1:1 cannot be reached: nobody listens there"
                ) as caught:
                    await dispatch.call(envelope(b""), 55_000)
                assert not isinstance(caught.value, DeadlineError)

    run(body)


def test_a_connection_that_breaks_fails_its_calls_and_is_made_anew() -> None:
    begun = threading.Semaphore(0)

    def hangs(request: VShardEnvelope) -> VShardEnvelope:
        begun.release()
        time.sleep(0.2)
        return echo(request)

    async def body() -> None:
        owner = RpcServer("127.0.0.1:0", hangs)
        async with GrpcDispatch({0: owner.address}) as dispatch:
            calls = [asyncio.create_task(dispatch.call(envelope(b"x"), 55_000)) for _ in range(3)]
            for _ in calls:
                await asyncio.to_thread(begun.acquire)
            await asyncio.to_thread(owner.close)
            for outcome in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(outcome, TransportError)
            with pytest.raises(TransportError, match="nobody listens there"):
                await dispatch.call(envelope(b"gone"), 5000)
            with RpcServer(owner.address, echo):
                assert bytes(join((await dispatch.call(envelope(b"back"), 5000)).payload)) == b"back"

    run(body)


def test_closing(serve: Serve) -> None:
    go = threading.Event()

    def hangs(request: VShardEnvelope) -> VShardEnvelope:
        go.wait(30)
        return echo(request)

    async def body() -> None:
        async with GrpcDispatch({0: serve(hangs).address}) as dispatch:
            call = asyncio.create_task(dispatch.call(envelope(b""), 55_000))
            await asyncio.sleep(0.1)
            await dispatch.close()
            await dispatch.close()
            with pytest.raises(ClosedError, match="during the call"):
                await call
            with pytest.raises(ClosedError):
                await dispatch.call(envelope(b""), 1000)
        go.set()
        await GrpcDispatch({0: serve().address}).close()

    run(body)


def test_an_envelope_that_cannot_be_written(serve: Serve) -> None:
    async def body() -> None:
        async with GrpcDispatch({0: serve().address}) as dispatch:
            with pytest.raises(InvalidInputError, match="version 3"):
                await dispatch.call(VShardEnvelope(3, REQUEST, 0, 0, 0, b""), 1000)

    run(body)


def test_bad_addresses_are_said_at_once() -> None:
    with pytest.raises(InvalidInputError, match="HOST:PORT"):
        GrpcDispatch({0: "127.0.0.1:7000", 1: "nowhere"})


def test_another_event_loop_is_refused(serve: Serve) -> None:
    async def body() -> None:
        async with GrpcDispatch({0: serve().address}) as dispatch:
            await dispatch.call(envelope(b""), 5000)
            with pytest.raises(InvalidInputError, match="event loop"):
                await asyncio.to_thread(asyncio.run, dispatch.call(envelope(b""), 5000))

    run(body)


def test_certificates(serve: Serve, tmp_path: Path) -> None:
    owner, friend = make_certificate(tmp_path / "a", "owner", ["127.0.0.1"]), make_certificate(tmp_path / "a", "friend")
    stranger = make_certificate(tmp_path / "b", "friend")
    server = serve(tls=owner)

    async def body() -> None:
        async with GrpcDispatch({0: server.address}, tls=friend) as dispatch:
            assert bytes(join((await dispatch.call(envelope(b"hello"), 5000)).payload)) == b"hello"
        for wrong in (None, stranger):
            async with GrpcDispatch({0: server.address}, tls=wrong) as dispatch:
                with pytest.raises(TransportError, match="cannot be reached"):
                    await dispatch.call(envelope(b"hello"), 5000)

    run(body)
