"""The RPC layer by itself: deadlines, garbage, certificates, limits, large messages."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from cotra_rdma import (
    ClosedError,
    DeadlineError,
    FormatError,
    InvalidInputError,
    PeerError,
    SearchCancelledError,
    Stop,
    Tls,
    TransportError,
)
from cotra_rdma.protocol.address import parse_address
from cotra_rdma.protocol.certificates import make_certificate
from cotra_rdma.protocol.envelope import WIRE_VERSION, VShardEnvelope, VShardMessageType, join
from cotra_rdma.protocol.rpc_client import RpcClient
from cotra_rdma.protocol.rpc_server import Limits, RpcServer, asker
from cotra_rdma.protocol.service import CONTROL, CONTROL_BYTES, SERVICE, WORK

REQUEST = VShardMessageType.VECTOR_SCATTER_REQUEST
QUICK = VShardMessageType.VECTOR_MEM_REGION_REQUEST


def envelope(payload: bytes, kind: VShardMessageType = REQUEST) -> VShardEnvelope:
    return VShardEnvelope(WIRE_VERSION, kind, 1, 2, 3, payload)


WHOLE = envelope(b"abc").encode()


def echo(request: VShardEnvelope) -> VShardEnvelope:
    return envelope(bytes(join(request.payload)), request.msg_type.response)


Serve = Callable[..., RpcServer]


@pytest.fixture
def serve() -> Iterator[Serve]:
    with ExitStack() as stack:

        def started(handler: Callable[[VShardEnvelope], Any] = echo, **options: Any) -> RpcServer:
            return stack.enter_context(RpcServer("127.0.0.1:0", handler, **options))

        yield started


@pytest.mark.parametrize("size", [0, 1, 70_000, 7_000_000])
def test_payloads_of_every_size_come_back(serve: Serve, size: int) -> None:
    payload = (bytes(range(256)) * (size // 256 + 1))[:size]
    with RpcClient(serve().address) as client:
        assert bytes(join(client.call(envelope(payload)).payload)) == payload


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


def test_a_deadline_reaches_the_owner(serve: Serve) -> None:
    """What works for a call is stopped when its caller waits no more."""
    ended = threading.Event()

    def works(request: VShardEnvelope) -> VShardEnvelope:
        stop = asker.get()
        assert stop is not None
        while not stop.is_set:
            time.sleep(0.005)
        ended.set()
        return echo(request)

    with RpcClient(serve(works).address) as client, pytest.raises(DeadlineError):
        client.call(envelope(b"x"), 50)
    assert ended.wait(30)


@pytest.mark.parametrize("kind", [REQUEST, QUICK])
def test_a_call_that_is_given_up_ends_at_once_on_both_sides(serve: Serve, kind: VShardMessageType) -> None:
    begun, ended, stop = threading.Event(), threading.Event(), Stop()

    def works(request: VShardEnvelope) -> VShardEnvelope:
        begun.set()
        given_up = asker.get()
        assert given_up is not None
        while not given_up.is_set:
            time.sleep(0.005)
        ended.set()
        return echo(request)

    server = serve(works)
    with RpcClient(server.address) as client, ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.call, envelope(b"x", kind), 55_000, stop)
        assert begun.wait(30)
        assert server.n_at_work == 1
        stop.set()
        with pytest.raises(SearchCancelledError):
            call.result()
        assert ended.wait(30)


def test_nobody_there_is_said_before_the_deadline() -> None:
    with RpcClient("127.0.0.1:1") as client:
        for _ in range(2):
            with pytest.raises(TransportError, match=r"127.0.0.1:1 cannot be reached: nobody listens there") as caught:
                client.call(envelope(b""), 55_000)
            assert not isinstance(caught.value, DeadlineError)


def test_a_connection_that_breaks_fails_the_call_and_is_made_anew() -> None:
    begun = threading.Event()

    def hangs(request: VShardEnvelope) -> VShardEnvelope:
        begun.set()
        time.sleep(0.2)
        return echo(request)

    server = RpcServer("127.0.0.1:0", hangs)
    client = RpcClient(server.address)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.call, envelope(b"x"), 55_000)
        assert begun.wait(30)
        server.close()
        with pytest.raises(TransportError, match=client.address):
            call.result()
    with client:
        with pytest.raises(TransportError, match="nobody listens there"):
            client.call(envelope(b"gone"), 55_000)
        for name in (b"back", b"again"):  # the first owner's connection ends between two calls
            with RpcServer(client.address, echo):
                assert join(client.call(envelope(name), 5000).payload) == name


def test_connections_that_failed_are_closed_while_their_errors_are_kept() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _KEEPS_ERRORS], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def raw(server: RpcServer, method: str, *messages: bytes) -> bytes:
    """A call of gRPC's own, with any bytes."""
    with grpc.insecure_channel(server.address) as channel:
        call = channel.stream_unary(f"/{SERVICE}/{method}", None, None)
        return bytes(call(iter(messages), timeout=30))


@pytest.mark.parametrize(
    ("method", "messages", "why"),
    [
        (WORK, [], "without an envelope"),
        (WORK, [b""], "too few for a header"),
        (WORK, [b"x" * 28], "wire version"),
        (WORK, [WHOLE[:-1]], "its payload should be"),
        (WORK, [WHOLE + b"!"], "its payload should be"),
        (WORK, [b"\x09" + WHOLE[1:]], r"wire version 9 is unknown; this side speaks 2"),
        (WORK, [envelope(b"", REQUEST.response).encode()], "is no request"),
        (WORK, [envelope(b"", QUICK).encode()], "does not go to Work"),
        (CONTROL, [WHOLE], "does not go to Control"),
        (CONTROL, [envelope(bytes(CONTROL_BYTES), QUICK).encode()], f"has {CONTROL_BYTES} at most"),
    ],
)
def test_garbage_is_refused_and_the_server_lives(serve: Serve, method: str, messages: list[bytes], why: str) -> None:
    server = serve()
    with pytest.raises(grpc.RpcError, match=why) as caught:
        raw(server, method, *messages)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    with RpcClient(server.address) as client:
        assert join(client.call(envelope(b"good")).payload) == b"good"


def test_what_is_sent_after_the_envelope_is_not_read(serve: Serve) -> None:
    assert raw(serve(), WORK, WHOLE, *[bytes(1000)] * 50) == echo(envelope(b"abc")).encode()


def test_a_request_over_the_limit_is_refused_and_the_limit_named(serve: Serve) -> None:
    server = serve(limits=Limits(request_bytes=100_000))
    with RpcClient(server.address) as client:
        with pytest.raises(PeerError, match=r"100000"):
            client.call(envelope(bytes(200_000)))
        assert join(client.call(envelope(b"good")).payload) == b"good"


def test_a_handler_that_fails_is_told_and_leaves_the_server_up(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    def fails(request: VShardEnvelope) -> VShardEnvelope:
        if join(request.payload) == b"fail":
            raise RuntimeError("a bug")
        return echo(request)

    with RpcClient(serve(fails).address) as client:
        with pytest.raises(PeerError, match="RuntimeError: a bug"):
            client.call(envelope(b"fail"), 30_000)
        assert "a bug" in caplog.text
        assert join(client.call(envelope(b"fine")).payload) == b"fine"


def test_nonsense_does_not_fill_the_log(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    server = serve()
    for _ in range(50):
        with pytest.raises(grpc.RpcError):
            raw(server, WORK, b"junk")
    assert caplog.text.count("was refused") < 25


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
                if join(client.call(envelope(payload), 55_000).payload) != payload:
                    wrong.append(payload)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_threads_share_a_client(serve: Serve) -> None:
    with RpcClient(serve().address) as client, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: join(client.call(envelope(b"%d" % i), 55_000).payload), range(200)))
    assert answers == [b"%d" % i for i in range(200)]


def test_calls_beyond_what_a_connection_may_have_are_sent_again(serve: Serve) -> None:
    """HTTP/2's limit on streams refuses calls, at the start of a connection above all; nobody sees it."""
    server = serve()
    with RpcClient(server.address) as client, ThreadPoolExecutor(250) as pool:
        calls = [pool.submit(client.call, envelope(b"%d" % i), 55_000) for i in range(1000)]
        assert [join(call.result().payload) for call in calls] == [b"%d" % i for i in range(1000)]


class TestSteps:
    """Work in steps: a long request does not keep short ones waiting."""

    def test_others_have_a_turn_between_steps(self, serve: Serve) -> None:
        go, short = threading.Event(), []

        def handler(request: VShardEnvelope) -> Any:
            if join(request.payload) != b"long":
                return echo(request)

            def steps() -> Iterator[VShardEnvelope | None]:
                while not go.is_set():
                    time.sleep(0.001)
                    yield None
                yield echo(request)

            return steps()

        with (
            ThreadPoolExecutor(3) as pool,
            RpcClient(serve(handler, n_workers=1).address) as one,
        ):
            long = [pool.submit(one.call, envelope(b"long"), 55_000) for _ in range(3)]
            with RpcClient(one.address) as other:
                short = [join(other.call(envelope(b"short"), 55_000).payload) for _ in range(5)]
            go.set()
            assert [join(call.result().payload) for call in long] == [b"long"] * 3
        assert short == [b"short"] * 5

    def test_a_step_that_fails_is_told(self, serve: Serve) -> None:
        def steps(request: VShardEnvelope) -> Iterator[VShardEnvelope | None]:
            yield None
            raise InvalidInputError("no such thing")

        with RpcClient(serve(steps).address) as client, pytest.raises(PeerError, match="no such thing"):
            client.call(envelope(b""), 30_000)


class TestClosing:
    def test_closing_twice_and_using_after(self, serve: Serve) -> None:
        server = serve()
        client = RpcClient(server.address)
        client.close()
        client.close()
        with pytest.raises(ClosedError):
            client.call(envelope(b""))
        server.close()
        server.close()

    def test_with_grace_what_was_begun_is_answered_and_the_rest_refused(self, serve: Serve) -> None:
        begun, go = threading.Event(), threading.Event()

        def handler(request: VShardEnvelope) -> VShardEnvelope:
            begun.set()
            go.wait(30)
            return echo(request)

        server = serve(handler)
        with RpcClient(server.address) as client, RpcClient(server.address) as late, ThreadPoolExecutor(2) as pool:
            call = pool.submit(client.call, envelope(b"begun"), 55_000)
            assert begun.wait(30)
            closing = pool.submit(server.drain, 30.0)
            time.sleep(0.1)
            with pytest.raises(TransportError) as refused:
                late.call(envelope(b"late"), 5000)
            assert not isinstance(refused.value, DeadlineError)
            go.set()
            assert join(call.result().payload) == b"begun"
            closing.result()

    def test_without_grace_what_was_begun_is_ended(self, serve: Serve) -> None:
        begun = threading.Event()

        def handler(request: VShardEnvelope) -> VShardEnvelope:
            begun.set()
            stop = asker.get()
            assert stop is not None
            while not stop.is_set:
                time.sleep(0.005)
            return echo(request)

        server = serve(handler)
        with RpcClient(server.address) as client, ThreadPoolExecutor(1) as pool:
            call = pool.submit(client.call, envelope(b"begun"), 55_000)
            assert begun.wait(30)
            server.close()
            with pytest.raises(TransportError):
                call.result()


def test_a_child_of_fork_cannot_use_its_parents_client(serve: Serve) -> None:
    with RpcClient(serve().address) as client:
        client.call(envelope(b"x"))
        child = os.fork()
        if not child:
            try:
                client.call(envelope(b"x"), 5000)
            except ClosedError:
                os._exit(7)
            os._exit(8)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert join(client.call(envelope(b"y")).payload) == b"y"


def test_an_address_in_use_is_said(serve: Serve) -> None:
    with pytest.raises(TransportError, match=r"cannot listen on .*Address already in use"):
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


class TestCertificates:
    def test_only_who_has_one_of_the_authority_is_answered(self, serve: Serve, tmp_path: Path) -> None:
        owner, friend = (
            make_certificate(tmp_path / "a", "owner", ["127.0.0.1"]),
            make_certificate(tmp_path / "a", "friend"),
        )
        stranger = make_certificate(tmp_path / "b", "friend")
        elsewhere = make_certificate(tmp_path / "a", "elsewhere", ["192.0.2.1"])
        server = serve(tls=owner)
        with RpcClient(server.address, tls=friend) as client:
            assert join(client.call(envelope(b"hello")).payload) == b"hello"
        for tls in (None, stranger, Tls(stranger.certificate, stranger.key, friend.ca)):
            with RpcClient(server.address, tls=tls) as client, pytest.raises(TransportError, match="cannot be reached"):
                client.call(envelope(b"hello"), 5000)
        with (
            RpcClient(serve(tls=elsewhere).address, tls=friend) as client,
            pytest.raises(TransportError, match="the TLS handshake failed"),
        ):
            client.call(envelope(b"hello"), 5000)

    def test_files_that_are_none(self, serve: Serve, tmp_path: Path) -> None:
        good = make_certificate(tmp_path, "good")
        (tmp_path / "junk").write_text("junk")
        for bad in (tmp_path / "gone", tmp_path / "junk"):
            with pytest.raises(InvalidInputError, match=r"the TLS key .* (cannot be read|is no PEM file)"):
                RpcClient("127.0.0.1:1", tls=Tls(good.certificate, bad, good.ca))

    def test_a_new_certificate_is_taken_up(self, serve: Serve, tmp_path: Path) -> None:
        """Files that are replaced hold for connections that are made from then on."""
        owner, friend = (
            make_certificate(tmp_path / "a", "owner", ["127.0.0.1"]),
            make_certificate(tmp_path / "a", "friend"),
        )
        server = serve(tls=owner)
        renewed = make_certificate(tmp_path / "b", "owner", ["127.0.0.1"])
        other = make_certificate(tmp_path / "b", "friend")
        for old, new in ((owner.certificate, renewed.certificate), (owner.key, renewed.key), (owner.ca, renewed.ca)):
            os.replace(new, old)
        with (
            RpcClient(server.address, tls=Tls(friend.certificate, friend.key, owner.ca)) as client,
            pytest.raises(TransportError, match="cannot be reached"),  # of the authority before
        ):
            client.call(envelope(b"hello"), 5000)
        with RpcClient(server.address, tls=Tls(other.certificate, other.key, owner.ca)) as client:
            assert join(client.call(envelope(b"hello"), 5000).payload) == b"hello"


class TestLimits:
    def test_a_request_that_is_never_finished_ends(self, serve: Serve) -> None:
        server = serve(limits=Limits(read_s=0.1))
        blocked = threading.Event()

        def trickle() -> Iterator[bytes]:
            blocked.wait(60)
            yield WHOLE

        with grpc.insecure_channel(server.address) as channel:
            call = channel.stream_unary(f"/{SERVICE}/{WORK}", None, None)
            with pytest.raises(grpc.RpcError) as caught:
                call(trickle(), timeout=55)
            assert caught.value.code() is grpc.StatusCode.CANCELLED
            blocked.set()

    def test_answers_that_nobody_takes_are_bounded(self, serve: Serve) -> None:
        """Who is owed most loses its answers, and who takes them is answered."""
        size = 1 << 20
        server = serve(
            lambda request: envelope(bytes(size), request.msg_type.response),
            limits=Limits(owed_bytes=4 * size, take_s=60.0),
        )
        with who_takes_nothing(server), RpcClient(server.address) as client:
            for _ in range(20):
                assert client.call(envelope(b"x"), 55_000).payload_len == size
            assert server._kept._bytes <= 4 * size

    def test_who_had_less_is_let_in_before_who_had_more(self, serve: Serve) -> None:
        """One connection holds all places with requests that it does not finish; another one is answered all the same."""
        server = serve(limits=Limits(n_requests=4, read_s=60.0))
        over = threading.Event()

        def never() -> Iterator[bytes]:
            over.wait(60)
            yield WHOLE

        with grpc.insecure_channel(server.address) as channel:
            call = channel.stream_unary(f"/{SERVICE}/{WORK}", None, None)
            hanging = [call.future(never(), timeout=60) for _ in range(4)]
            while server.n_at_work < 4:
                time.sleep(0.005)
            with RpcClient(server.address) as client:
                assert join(client.call(envelope(b"good"), 30_000).payload) == b"good"
            over.set()
            assert any(isinstance(one.exception(), grpc.RpcError) for one in hanging)


@contextmanager
def who_takes_nothing(server: RpcServer) -> Iterator[None]:
    """A process that asks for many answers, and is stopped before it takes any."""
    command = [sys.executable, "-c", _GREEDY, server.address, f"/{SERVICE}/{WORK}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as greedy:
        try:
            assert greedy.stdout is not None
            assert greedy.stdout.readline() == b"asked\n"
            greedy.send_signal(signal.SIGSTOP)
            yield
        finally:
            greedy.kill()


_GREEDY = """
import sys, grpc
from cotra_rdma.protocol.envelope import VShardEnvelope
channel = grpc.insecure_channel(sys.argv[1], [("grpc.max_receive_message_length", -1)])
call = channel.unary_unary(sys.argv[2], None, None)
calls = [call.future(VShardEnvelope(2, 50, 0, 0, 0, b"x").encode(), timeout=600) for _ in range(60)]
print("asked", flush=True)
import time; time.sleep(600)
"""

_KEEPS_ERRORS = """
import os, time
from cotra_rdma import TransportError
from cotra_rdma.protocol.envelope import VShardEnvelope
from cotra_rdma.protocol.rpc_client import RpcClient

def files():
    return len(os.listdir("/proc/self/fd"))

before, kept = files(), []
with RpcClient("127.0.0.1:1") as client:
    for _ in range(3):
        try:
            client.call(VShardEnvelope(2, 50, 0, 0, 0, b"x"))
        except TransportError as error:
            kept.append(error)
deadline = time.monotonic() + 30
while files() > before and time.monotonic() < deadline:  # gRPC ends its own some time after the last connection
    time.sleep(0.05)
assert len(kept) == 3
assert files() <= before, [before, files()]
"""
