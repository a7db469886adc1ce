"""The RPC layer by itself: deadlines, garbage, keys, large messages."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import zmq

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
from cotra_rdma.protocol.rpc import RpcClient, RpcServer, parse_address

REQUEST = VShardMessageType.VECTOR_SCATTER_REQUEST


def envelope(payload: bytes, kind: VShardMessageType = REQUEST) -> VShardEnvelope:
    return VShardEnvelope(WIRE_VERSION, kind, 1, 2, 3, payload)


WHOLE = b"".join(envelope(b"abc").frames())


def echo(request: VShardEnvelope) -> VShardEnvelope:
    return envelope(join(request.payload), request.msg_type.response)


Serve = Callable[..., RpcServer]


@pytest.fixture
def serve() -> Iterator[Serve]:
    with ExitStack() as stack:

        def started(handler: Callable[[VShardEnvelope], VShardEnvelope] = echo, **options: Any) -> RpcServer:
            return stack.enter_context(RpcServer("127.0.0.1:0", handler, **options))

        yield started


@pytest.mark.parametrize("size", [0, 1, 70_000, 20_000_000])
def test_payloads_of_every_size_come_back(serve: Serve, size: int) -> None:
    payload = bytes(range(256)) * (size // 256 + 1)
    with RpcClient(serve().address) as client:
        assert join(client.call(envelope(payload[:size])).payload) == payload[:size]


def test_a_deadline_is_kept_and_a_late_answer_is_not_mistaken(serve: Serve) -> None:
    go = threading.Event()

    def slow_once(request: VShardEnvelope) -> VShardEnvelope:
        if join(request.payload) == b"slow":
            go.wait(10)
        return echo(request)

    with RpcClient(serve(slow_once).address) as client:
        with pytest.raises(DeadlineError, match="did not answer within 50 ms"):
            client.call(envelope(b"slow"), 50)
        go.set()
        for number in range(20):
            assert join(client.call(envelope(b"%d" % number)).payload) == b"%d" % number


def test_nobody_there_is_said_before_the_deadline() -> None:
    with RpcClient("127.0.0.1:1") as client:
        for _ in range(2):
            with pytest.raises(TransportError, match=r"127.0.0.1:1 cannot be reached: nobody listens there") as caught:
                client.call(envelope(b""), 55_000)
            assert not isinstance(caught.value, DeadlineError)


def test_a_connection_that_breaks_fails_the_call_and_is_made_anew() -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as owner:
        owner.linger = 0
        client = RpcClient(f"127.0.0.1:{owner.bind_to_random_port('tcp://127.0.0.1')}")
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(client.call, envelope(b"x"), 55_000)
            owner.recv_multipart()
            owner.close()
            with pytest.raises(TransportError, match=f"{client.address} cannot be reached: the connection broke"):
                call.result()
    with client:
        with pytest.raises(TransportError, match="nobody listens there"):
            client.call(envelope(b"gone"), 55_000)
        for name in (b"back", b"again"):  # the first owner's connection ends between two calls
            with RpcServer(client.address, echo):
                assert join(client.call(envelope(name), 5000).payload) == name


def test_the_kernel_probes_a_silent_host(serve: Serve) -> None:
    """proc(5), /proc/net/tcp: the timer of an idle connection of a reader's is TCP's keep-alive, 2."""
    server = serve()
    with RpcClient(server.address) as client:
        client.call(envelope(b"x"))
        port = f"{int(server.address.rpartition(':')[2]):04X}"
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        timers = [row[5].partition(":")[0] for row in rows if row[2].endswith(f":{port}") and row[3] == "01"]
    assert timers == ["02"]


@pytest.mark.parametrize(
    "frames",
    [
        [b""],
        [b"short"],
        [b"12345678"],
        [b"12345678", b""],
        [b"12345678", b"x" * 28],
        [b"12345678", WHOLE[:-1]],
        [b"12345678", WHOLE + b"!"],
        [b"12345678", b"\x09" + WHOLE[1:]],
        [b"1234567", WHOLE],
        [b"12345678", b"".join(envelope(b"", REQUEST.response).frames())],
        [b"12345678", *([b"a"] * 5000)],
    ],
)
def test_garbage_is_dropped_and_the_server_lives(serve: Serve, frames: list[bytes]) -> None:
    server = serve()
    with zmq.Context() as context, context.socket(zmq.DEALER) as raw:
        raw.linger = 0
        raw.connect(f"tcp://{server.address}")
        raw.send_multipart(frames)
        good = [b"87654321", b"".join(envelope(b"good").frames())]
        raw.send_multipart(good)
        assert raw.poll(5000)
        assert raw.recv_multipart()[0] == b"87654321"  # the garbage, which came first, has no answer


def test_a_handler_that_fails_leaves_the_server_up(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    def fails(request: VShardEnvelope) -> VShardEnvelope:
        if join(request.payload) == b"fail":
            raise RuntimeError("a bug")
        return echo(request)

    with RpcClient(serve(fails).address) as client:
        with pytest.raises(DeadlineError):
            client.call(envelope(b"fail"), 200)
        assert "a bug" in caplog.text
        assert join(client.call(envelope(b"fine")).payload) == b"fine"


def test_an_answer_of_another_type_is_refused(serve: Serve) -> None:
    wrong = VShardMessageType.VECTOR_MEM_REGION_REQUEST.response
    with RpcClient(serve(lambda request: envelope(b"", wrong)).address) as client, pytest.raises(FormatError):
        client.call(envelope(b""))


def test_many_clients_at_once(serve: Serve) -> None:
    server = serve(n_workers=4)
    wrong: list[object] = []

    def work(number: int) -> None:
        with RpcClient(server.address) as client:
            for i in range(50):
                payload = b"%d-%d" % (number, i)
                if join(client.call(envelope(payload)).payload) != payload:
                    wrong.append(payload)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


def test_closing_twice_and_using_after(serve: Serve) -> None:
    server = serve()
    client = RpcClient(server.address)
    client.close()
    client.close()
    with pytest.raises(ClosedError):
        client.call(envelope(b""))
    server.close()
    server.close()


def test_an_address_in_use_is_said(serve: Serve) -> None:
    with pytest.raises(TransportError, match="cannot listen on"):
        RpcServer(serve().address, echo)


@pytest.mark.parametrize(
    "address",
    [
        *("", "host", "host:", ":1", "host:70000", "host:x", f"host:{'9' * 5000}", "host:\u0661", "host:-1"),
        *("a..b:1", f"{'x' * 64}:1", "[]:1", "[::1:1", "::1]:1", "a\0b:1", "a b:1", "a\n:1", "\ud800:1"),
    ],
)
def test_bad_addresses(address: str) -> None:
    with pytest.raises(InvalidInputError, match="HOST:PORT"):
        parse_address(address)


def test_ipv6_addresses() -> None:
    assert parse_address("[::1]:7700") == ("::1", 7700)


class TestKeys:
    def test_only_peers_with_an_allowed_key_are_answered(self, serve: Serve) -> None:
        owner, friend, stranger = (zmq.curve_keypair() for _ in range(3))
        server = serve(keys=ServerKeys(*owner, allowed=(friend[0],)))
        with RpcClient(server.address, keys=ClientKeys(*friend, server=owner[0])) as client:
            assert join(client.call(envelope(b"hello")).payload) == b"hello"
        for keys in (None, ClientKeys(*stranger, server=owner[0]), ClientKeys(*friend, server=stranger[0])):
            with RpcClient(server.address, keys=keys) as client, pytest.raises(TransportError, match="CURVE key"):
                client.call(envelope(b"hello"), 5000)

    def test_a_malformed_key_is_said(self, serve: Serve) -> None:
        with (
            RpcClient(serve().address, keys=ClientKeys(b"x", b"y", b"z")) as client,
            pytest.raises(TransportError, match="cannot be reached"),
        ):
            client.call(envelope(b""), 300)

    def test_no_list_lets_every_key_in(self, serve: Serve) -> None:
        owner, anyone = zmq.curve_keypair(), zmq.curve_keypair()
        server = serve(keys=ServerKeys(*owner))
        with RpcClient(server.address, keys=ClientKeys(*anyone, server=owner[0])) as client:
            assert join(client.call(envelope(b"hello")).payload) == b"hello"


def test_no_more_sockets_is_an_error_of_transport(monkeypatch: pytest.MonkeyPatch) -> None:
    with zmq.Context() as context:
        context.set(zmq.MAX_SOCKETS, 1)
        monkeypatch.setattr(zmq.Context, "instance", lambda: context)
        for _ in range(3):  # the DEALER is closed when its monitor cannot be had
            with RpcClient("127.0.0.1:1") as client, pytest.raises(TransportError, match="cannot be reached"):
                client.call(envelope(b""), 1000)
