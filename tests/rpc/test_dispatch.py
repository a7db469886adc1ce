"""`ZmqDispatch`: many calls at once, deadlines, late answers, cancellation, keys, and owners that go away."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import pytest
import zmq
import zmq.asyncio

from cotra_rdma import (
    ClientKeys,
    ClosedError,
    DeadlineError,
    FormatError,
    InvalidInputError,
    ServerKeys,
    TransportError,
)
from cotra_rdma.protocol.envelope import WIRE_VERSION, VShardEnvelope, VShardMessageType, join
from cotra_rdma.protocol.rpc import RpcServer
from cotra_rdma.seam.interface import ShardRpcDispatch
from cotra_rdma.seam.zmq_dispatch import ZmqDispatch

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


@asynccontextmanager
async def router() -> AsyncIterator[tuple[zmq.asyncio.Socket, ZmqDispatch]]:
    """An owner whose answers the test makes by hand, and a dispatch towards it."""
    context = zmq.asyncio.Context()
    owner = context.socket(zmq.ROUTER)
    owner.linger = 0
    port = owner.bind_to_random_port("tcp://127.0.0.1")
    try:
        async with ZmqDispatch({0: f"127.0.0.1:{port}"}) as dispatch:
            yield owner, dispatch
    finally:
        owner.close()
        context.term()


def test_it_is_a_dispatch_of_the_seam() -> None:
    assert isinstance(ZmqDispatch({}), ShardRpcDispatch)


def test_places_are_shards_before_nodes(serve: Serve) -> None:
    def named(name: bytes) -> Callable[[VShardEnvelope], VShardEnvelope]:
        return lambda request: VShardEnvelope(WIRE_VERSION, request.msg_type.response, 0, 0, 0, name)

    async def body() -> None:
        places = {5: serve(named(b"node 5")).address, (5, 2): serve(named(b"shard 2")).address}
        async with ZmqDispatch(places) as dispatch:
            assert join((await dispatch.call(envelope(b"", node=5, shard=1), 5000)).payload) == b"node 5"
            assert join((await dispatch.call(envelope(b"", node=5, shard=2), 5000)).payload) == b"shard 2"
            with pytest.raises(TransportError, match="no address is known for shard 2 of node 6"):
                await dispatch.call(envelope(b"", node=6, shard=2), 5000)

    run(body)


def test_envelopes_go_and_come_whole(serve: Serve) -> None:
    async def body() -> None:
        async with ZmqDispatch({7: serve().address}) as dispatch:
            large = bytes(range(256)) * 4096
            for payload in (b"", b"x", large, (large[:1000], memoryview(large)[1000:])):
                reply = await dispatch.call(VShardEnvelope(WIRE_VERSION, REQUEST, 3, 7, 9, payload), 5000)
                assert (reply.source_node, reply.target_node, reply.vshard_id) == (7, 3, 9)
                assert bytes(join(reply.payload)) == bytes(join(payload))

    run(body)


def test_many_tasks_share_connections(serve: Serve) -> None:
    async def body() -> None:
        places = {node: serve(n_workers=3).address for node in range(3)}
        async with ZmqDispatch(places) as dispatch:
            asked = [(i % 3, b"%d" % i) for i in range(600)]
            replies = await asyncio.gather(
                *(dispatch.call(envelope(payload, node=node), 30_000) for node, payload in asked)
            )
        assert [bytes(join(reply.payload)) for reply in replies] == [payload for _, payload in asked]

    run(body)


def test_a_late_answer_is_dropped() -> None:
    async def body() -> None:
        async with router() as (owner, dispatch):
            with pytest.raises(DeadlineError, match="did not answer within 50 ms"):
                await dispatch.call(envelope(b"first"), 50)
            peer, number, *first = await owner.recv_multipart()
            second = asyncio.create_task(dispatch.call(envelope(b"second"), 5000))
            request = await owner.recv_multipart()
            for head, frames in (([peer, number], first), (request[:2], request[2:])):
                asked = VShardEnvelope.decode(b"".join(frames))
                await owner.send_multipart([*head, echo(asked).encode()])
            assert bytes(join((await second).payload)) == b"second"

    run(body)


def test_answers_may_come_in_any_order() -> None:
    async def body() -> None:
        async with router() as (owner, dispatch):
            calls = [asyncio.create_task(dispatch.call(envelope(b"%d" % i), 5000)) for i in range(20)]
            requests = [await owner.recv_multipart() for _ in calls]
            for peer, number, *frames in reversed(requests):
                await owner.send_multipart([peer, number, echo(VShardEnvelope.decode(b"".join(frames))).encode()])
            assert [bytes(join((await call).payload)) for call in calls] == [b"%d" % i for i in range(20)]

    run(body)


def test_a_cancelled_call_leaves_nothing_behind() -> None:
    async def body() -> None:
        async with router() as (owner, dispatch):
            call = asyncio.create_task(dispatch.call(envelope(b"given up"), 60_000))
            peer, number, *frames = await owner.recv_multipart()
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            await owner.send_multipart([peer, number, echo(VShardEnvelope.decode(b"".join(frames))).encode()])
            (connection,) = dispatch._connections.values()
            assert connection._waiting == {}
            again = asyncio.create_task(dispatch.call(envelope(b"again"), 5000))
            peer, number, *frames = await owner.recv_multipart()
            await owner.send_multipart([peer, number, echo(VShardEnvelope.decode(b"".join(frames))).encode()])
            assert bytes(join((await again).payload)) == b"again"

    run(body)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ([], "without an envelope"),
        ([b""], "too few"),
        ([b"\x09" + bytes(27)], "wire version 9"),
        ([envelope(b"").encode()], "with type 50"),
        ([VShardEnvelope(WIRE_VERSION, VShardMessageType(57), 0, 0, 0, b"").encode()], "with type 57"),
        ([echo(envelope(b"")).encode() + b"!"], "should be 0 bytes"),
    ],
)
def test_a_malformed_answer_is_said(answer: list[bytes], reason: str) -> None:
    async def body() -> None:
        async with router() as (owner, dispatch):
            call = asyncio.create_task(dispatch.call(envelope(b""), 5000))
            request = await owner.recv_multipart()
            await owner.send_multipart([*request[:2], *answer])
            with pytest.raises(FormatError, match=reason):
                await call

    run(body)


def test_frames_that_answer_nothing_are_ignored() -> None:
    async def body() -> None:
        async with router() as (owner, dispatch):
            call = asyncio.create_task(dispatch.call(envelope(b"x"), 5000))
            peer, number, *frames = await owner.recv_multipart()
            for garbage in ([b""], [b"no such id", b"x"], [b"\xff" * 8, b"x" * 100]):
                await owner.send_multipart([peer, *garbage])
            await owner.send_multipart([peer, number, echo(VShardEnvelope.decode(b"".join(frames))).encode()])
            assert bytes(join((await call).payload)) == b"x"

    run(body)


def test_nobody_there_is_said_before_the_deadline() -> None:
    async def body() -> None:
        async with ZmqDispatch({0: "127.0.0.1:1"}) as dispatch:
            for _ in range(2):
                with pytest.raises(
                    TransportError, match=r"127.0.0.1:1 cannot be reached: nobody listens there"
                ) as caught:
                    await dispatch.call(envelope(b""), 55_000)
                assert not isinstance(caught.value, DeadlineError)

    run(body)


def test_a_connection_that_breaks_fails_its_calls_and_is_made_anew() -> None:
    async def body() -> None:
        async with router() as (owner, dispatch):
            calls = [asyncio.create_task(dispatch.call(envelope(b"x"), 55_000)) for _ in range(3)]
            for _ in calls:
                await owner.recv_multipart()
            owner.close()
            for outcome in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(outcome, TransportError)
                assert "the connection broke" in str(outcome)
            (address,) = dispatch._connections
            with RpcServer(address, echo):
                assert bytes(join((await dispatch.call(envelope(b"back"), 5000)).payload)) == b"back"

    run(body)


def test_closing(serve: Serve) -> None:
    async def body() -> None:
        async with router() as (owner, dispatch):
            call = asyncio.create_task(dispatch.call(envelope(b""), 55_000))
            await owner.recv_multipart()
            await dispatch.close()
            await dispatch.close()
            with pytest.raises(ClosedError, match="during the call"):
                await call
            with pytest.raises(ClosedError):
                await dispatch.call(envelope(b""), 1000)
        await ZmqDispatch({0: serve().address}).close()

    run(body)


def test_an_envelope_that_cannot_be_written(serve: Serve) -> None:
    async def body() -> None:
        async with ZmqDispatch({0: serve().address}) as dispatch:
            with pytest.raises(InvalidInputError, match="version 3"):
                await dispatch.call(VShardEnvelope(3, REQUEST, 0, 0, 0, b""), 1000)

    run(body)


def test_bad_addresses_are_said_at_once() -> None:
    with pytest.raises(InvalidInputError, match="HOST:PORT"):
        ZmqDispatch({0: "127.0.0.1:7000", 1: "nowhere"})


def test_another_event_loop_is_refused(serve: Serve) -> None:
    async def body() -> None:
        async with ZmqDispatch({0: serve().address}) as dispatch:
            await dispatch.call(envelope(b""), 5000)
            with pytest.raises(InvalidInputError, match="event loop"):
                await asyncio.to_thread(asyncio.run, dispatch.call(envelope(b""), 5000))

    run(body)


class TestKeys:
    def test_a_known_key_is_answered_and_others_are_not(self, serve: Serve) -> None:
        owner, friend, stranger = (zmq.curve_keypair() for _ in range(3))
        server = serve(keys=ServerKeys(*owner, allowed=(friend[0],)))

        async def body() -> None:
            keys = ClientKeys(*friend, server=owner[0])
            async with ZmqDispatch({0: server.address}, keys=keys) as dispatch:
                assert bytes(join((await dispatch.call(envelope(b"hello"), 5000)).payload)) == b"hello"
            for wrong in (None, ClientKeys(*stranger, server=owner[0]), ClientKeys(*friend, server=stranger[0])):
                async with ZmqDispatch({0: server.address}, keys=wrong) as dispatch:
                    with pytest.raises(TransportError):
                        await dispatch.call(envelope(b"hello"), 300)

        run(body)

    def test_a_malformed_key_is_said(self, serve: Serve) -> None:
        async def body() -> None:
            async with ZmqDispatch({0: serve().address}, keys=ClientKeys(b"x", b"y", b"z")) as dispatch:
                with pytest.raises(TransportError, match="cannot be reached"):
                    await dispatch.call(envelope(b""), 300)

        run(body)
