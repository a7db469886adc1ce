"""What an owner does for peers that cannot read its memory: it expands nodes, gives its upper layers away, and searches the whole
collection for them. With real servers and connections."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

import cotra_rdma
from cotra_rdma import (
    ChecksumError,
    CotraError,
    FormatError,
    InvalidInputError,
    PeerError,
    Server,
    Shard,
    StaleShardError,
    TransportError,
)
from cotra_rdma._core.remote_expansion import PUSH_DTYPE, Expansions
from cotra_rdma._core.stop import Stop
from cotra_rdma._native.channel import Channel
from cotra_rdma._native.graph_engine import Engine
from cotra_rdma._native.verbs import QueuePairOptions
from cotra_rdma._native.view import View
from cotra_rdma._owner import answers
from cotra_rdma._owner.child_process import OwnerProcess
from cotra_rdma._owner.expander import Expander
from cotra_rdma._reader.batch import Batch
from cotra_rdma._reader.connection import Connection
from cotra_rdma.protocol import remote_expansion as expansion_messages
from cotra_rdma.protocol import search
from cotra_rdma.protocol.envelope import VShardEnvelope, VShardMessageType, fields_of, join
from cotra_rdma.protocol.remote_expansion import ExpandRequest, ExpandResponse
from cotra_rdma.protocol.rpc_server import RpcServer
from cotra_rdma.protocol.search import SearchRequest, SearchResponse
from helpers.begun import answer_of, stop_process

Floats = npt.NDArray[np.float32]
EXPAND = VShardMessageType.VECTOR_EXPAND_REQUEST


@pytest.fixture
def shard(shards: list[Path]) -> Iterator[Shard]:
    with Shard.open(shards[0]) as opened:
        yield opened


@pytest.fixture
def server(shard: Shard) -> Iterator[Server]:
    with cotra_rdma.serve(shard, transports=("rpc",)) as served:
        yield served


def peer_of(address: str, stack: ExitStack) -> Connection:
    peer = Connection(0, address, tls=None, timeout_ms=5000, options=QueuePairOptions(), fabric=None)
    stack.callback(peer.close)
    return peer


@pytest.fixture
def peer(server: Server) -> Iterator[Connection]:
    """A reader that has no way to the shard but its owner."""
    with ExitStack() as stack:
        peer = peer_of(server.address, stack)
        peer.view = peer.load_view()
        yield peer


def some_pushes(n: int, n_queries: int, count: int) -> npt.NDArray[np.void]:
    generator = np.random.default_rng(5)
    pushes = np.zeros(n, PUSH_DTYPE)
    pushes["query"] = np.sort(generator.integers(0, n_queries, n))
    pushes["row"] = generator.integers(0, count, n)
    pushes["limit"] = generator.choice(np.array([np.inf, 0.5, -np.inf], np.float32), n)
    return pushes


def same(a: Expansions, b: Expansions) -> None:
    assert a.found.tobytes() == b.found.tobytes()
    assert a.numbers.tobytes() == b.numbers.tobytes()
    assert a.estimates.tobytes() == b.estimates.tobytes()


# ---- expansions ----


class TestExpansions:
    def test_they_are_bit_identical_to_those_made_at_home(
        self, shard: Shard, server: Server, peer: Connection, queries: Floats
    ) -> None:
        pushes = some_pushes(1600, len(queries), shard.info.count)
        with Channel.shm(shard.arena, slot_bytes=4096) as channel, View.open(channel) as view:
            at_home = view.expand(shard.arena, queries, pushes)
        found = peer.expand(queries, pushes, 5.0)
        same(found, at_home)
        assert len(found.numbers) > 1600
        assert server.request_counts[EXPAND] == 1

    @pytest.mark.parametrize("transports", [("rpc",), ("shm", "rpc")])
    def test_of_any_metric_and_memory(self, words: Floats, queries: Floats, transports: tuple[str, ...]) -> None:
        with (
            Shard.build(words[:500], metric="ip", M=4, ef_construction=20, n_threads=1) as shard,
            cotra_rdma.serve(shard, transports=transports) as server,
            ExitStack() as stack,
        ):
            peer = peer_of(server.address, stack)
            peer.view = peer.load_view()
            pushes = some_pushes(100, len(queries), 500)
            found = peer.expand(queries, pushes, 5.0)
            assert peer.view is not None
            same(found, peer.view.expand(shard.arena, queries, pushes))
        exact = 1 - np.einsum("ij,ij->i", queries[pushes["query"]], words[pushes["row"]])
        np.testing.assert_allclose(found.found["distance"], exact, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(found.found["label"], pushes["row"])

    def test_a_round_that_is_too_large_goes_in_parts(
        self, shard: Shard, server: Server, peer: Connection, queries: Floats, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pushes = some_pushes(1600, len(queries), shard.info.count)
        whole = peer.expand(queries, pushes, 5.0)
        before = server.request_counts[EXPAND]
        monkeypatch.setattr(expansion_messages, "_MAX_BATCH_BYTES", 20_000)
        same(peer.expand(queries, pushes, 5.0), whole)
        assert server.request_counts[EXPAND] - before > 10

    def test_nothing_to_expand(self, server: Server, peer: Connection, queries: Floats) -> None:
        found = peer.expand(queries, np.zeros(0, PUSH_DTYPE), 5.0)
        assert (len(found.found), len(found.numbers), len(found.estimates)) == (0, 0, 0)
        assert EXPAND not in server.request_counts

    def test_a_whole_search_that_its_owner_expands(
        self, shard: Shard, server: Server, peer: Connection, queries: Floats
    ) -> None:
        """The walk is the one that READs would make."""

        class Pushing:
            def expand(self, pushes: Mapping[int, npt.NDArray[np.void]]) -> dict[int, Expansions | CotraError]:
                return {at: peer.expand(queries, wanted, 5.0) for at, wanted in pushes.items()}

            def replace(self, shard: int, error: CotraError) -> None:
                raise error

        labels, distances, expected = shard.search(queries, 10, 50)
        assert peer.view is not None
        with Engine.create([peer.view], [None]) as engine:
            found = engine.search(queries, 10, 50, 8, inflight=len(queries), helper=Pushing())
        np.testing.assert_array_equal(found[0][0], labels)
        np.testing.assert_array_equal(found[1][0].view(np.uint32), distances.view(np.uint32))
        np.testing.assert_array_equal(found[2]["pushed"], expected["expansions"])
        assert server.request_counts[EXPAND] <= found[2]["rounds"].max()  # one message a round for all queries

    @pytest.mark.parametrize(
        ("request_of", "why"),
        [
            (
                lambda rows, pushes, image: ExpandRequest("", rows[:, :99], pushes, image),
                r"queries must be float32\[n, 100\]",
            ),
            (
                lambda rows, pushes, image: ExpandRequest("", rows * np.float32(np.nan), pushes, image),
                "query 0 holds NaN",
            ),
            (lambda rows, pushes, image: ExpandRequest("", rows + np.float32(1e20), pushes, image), "beyond 1e15"),
            (lambda rows, pushes, image: ExpandRequest("", rows[:1], pushes, image), "a node for query 1 of 1"),
            (lambda rows, pushes, image: ExpandRequest("", rows, with_row(pushes, 2000), image), "row 2000 of 2000"),
            (
                lambda rows, pushes, image: ExpandRequest("", rows, with_row(pushes, 2**32 - 1), image),
                "row 4294967295 of 2000",
            ),
            (
                lambda rows, pushes, image: ExpandRequest("", rows, np.repeat(pushes, 100_000), image),
                "do not fit one answer",
            ),
        ],
    )
    def test_hostile_requests_are_refused_and_the_owner_lives(
        self, peer: Connection, queries: Floats, request_of: Callable[[Floats, Any, Any], ExpandRequest], why: str
    ) -> None:
        pushes = some_pushes(2, 2, 2000)
        pushes["query"] = 0, 1
        reply = peer.calls.call(EXPAND, request_of(queries[:2], pushes, peer.image).encode(), 5000)
        answer = ExpandResponse.decode(reply.payload)
        assert answer.code == 1
        assert len(answer.told.found) == 0
        assert re.search(why, answer.message)
        assert len(peer.expand(queries, pushes, 5.0).found) == 2

    @pytest.mark.parametrize("payload", [b"", b"\xc0", b"\x94\xa0\x01", b"\xdd\xff\xff\xff\xff"])
    def test_garbage_is_refused(self, peer: Connection, payload: bytes) -> None:
        answer = ExpandResponse.decode(peer.calls.call(EXPAND, payload, 5000).payload)
        assert (answer.code, answer.message.partition(":")[0]) == (1, "FormatError")

    def test_bad_input_of_this_side(self, peer: Connection, queries: Floats) -> None:
        with pytest.raises(InvalidInputError, match="for query 200 of 200"):
            peer.expand(queries, with_row(some_pushes(3, 2, 2000), 1, query=200), 5.0)
        with pytest.raises(PeerError, match=r"shard 0 \(.*row 2000 of 2000") as caught:
            peer.expand(queries, with_row(some_pushes(3, 2, 2000), 2000), 5.0)
        assert caught.value.shard == 0

    def test_a_corrupt_record_is_an_error_that_says_so(self, words: Floats, queries: Floats) -> None:
        with Shard.build(words[:200], M=4, ef_construction=20, n_threads=1) as shard:
            with shard.arena.view() as memory:
                memory[shard.info.records_offset + 5 * shard.info.record_bytes + 40] ^= 1
            expander = Expander(shard.arena, shard.info)
            expander.expand(queries, with_row(some_pushes(2, 2, 200), 6))
            with pytest.raises(ChecksumError, match="record 5"):
                expander.expand(queries, with_row(some_pushes(2, 2, 200), 5))
            expander.close()
            expander.close()

    def test_an_owner_that_dies_in_a_round_is_known_at_once(self, shards: list[Path], queries: Floats) -> None:
        with (
            OwnerProcess([shards[0]], transports=("rpc",)) as owner,
            ExitStack() as stack,
            ThreadPoolExecutor(1) as pool,
        ):
            peer = peer_of(owner.addresses[0], stack)
            peer.view = peer.load_view()
            stop_process(owner.pid)
            os.waitid(os.P_PID, owner.pid, os.WSTOPPED)
            call = pool.submit(peer.expand, queries, some_pushes(50, 20, 2000), 55.0)
            os.kill(owner.pid, signal.SIGKILL)
            with pytest.raises(TransportError, match=r"shard 0 \(.*cannot be reached"):
                call.result(50)


def with_row(pushes: npt.NDArray[np.void], row: int, query: int | None = None) -> npt.NDArray[np.void]:
    pushes = pushes.copy()
    pushes["row"][-1] = row
    pushes["query"][-1] = pushes["query"][-1] if query is None else query
    return pushes


# ---- owners that are not as they should be ----

Change = Callable[[Any], Any]


@pytest.fixture
def lying(server: Server) -> Iterator[Callable[[VShardMessageType, Change], Connection]]:
    """A reader of an owner whose answers of one type are changed on their way."""
    with ExitStack() as stack:

        def made(kind: VShardMessageType, change: Change) -> Connection:
            def handle(request: VShardEnvelope) -> VShardEnvelope:
                reply = answer_of(server, request)
                if reply.msg_type == kind:
                    payload = change(join(reply.payload))
                    reply = VShardEnvelope(2, kind, 0, 0, 0, payload)
                return reply

            return peer_of(stack.enter_context(RpcServer("127.0.0.1:0", handle)).address, stack)

        yield made


def told(change: Callable[[Expansions], Expansions]) -> Change:
    def changed(payload: bytes) -> Any:
        answer = ExpandResponse.decode(payload)
        return replace(answer, told=change(answer.told)).encode()

    return changed


def with_count(count: int) -> Callable[[Expansions], Expansions]:
    def change(of: Expansions) -> Expansions:
        found = of.found.copy()
        found["count"][0] += count
        more = np.zeros(count, np.uint32)
        estimates, weights = (np.append(told, more.astype(np.float32)) for told in (of.estimates, of.weights))
        return Expansions(found, np.append(of.numbers, more), estimates, weights)

    return change


def without_last(of: Expansions) -> Expansions:
    left = int(of.found["count"][:-1].sum())
    return Expansions(of.found[:-1], of.numbers[:left], of.estimates[:left], of.weights[:left])


class TestOwnersThatLie:
    @pytest.mark.parametrize(
        ("change", "why"),
        [
            (without_last, "2 expansions of up to .* to 3 nodes"),
            (with_count(100), "of up to .* neighbours to 3 nodes of 32"),
            (
                lambda of: Expansions(of.found, of.numbers[:-1], of.estimates, of.weights),
                "weights where .* are counted",
            ),
        ],
        ids=["too few", "too many neighbours", "they do not add up"],
    )
    def test_expansions_that_do_not_fit(
        self, lying: Callable[..., Connection], queries: Floats, change: Callable[[Expansions], Expansions], why: str
    ) -> None:
        peer = lying(EXPAND.response, told(change))
        peer.view = peer.load_view()
        pushes = some_pushes(3, 3, 2000)
        pushes["limit"] = np.inf
        with pytest.raises(FormatError, match=why):
            peer.expand(queries, pushes, 5.0)

    def test_an_owner_of_an_earlier_version_is_refused(self, lying: Callable[..., Connection], queries: Floats) -> None:
        def as_before(payload: bytes) -> bytes:
            fields = msgspec.msgpack.decode(payload)
            fields[2] = fields[2][:6]
            return msgspec.msgpack.encode(fields[:8])

        with pytest.raises(PeerError, match=r"shard 0 \(.*earlier version, which does not tell its image from others"):
            lying(VShardMessageType.VECTOR_MEM_REGION_RESPONSE, as_before)

    @pytest.mark.parametrize(
        "change",
        [
            lambda length, data: None,
            lambda length, data: [length, b""],
            lambda length, data: [length - 1, data],
            lambda length, data: [2**63, data],
            lambda length, data: [-1, data],
            lambda length, data: [0, data],
            lambda length, data: [len(data) - 1, data],
        ],
    )
    def test_pieces_that_do_not_fit(
        self, lying: Callable[..., Connection], change: Callable[[int, bytes], Any]
    ) -> None:
        def changed(payload: bytes) -> bytes:
            fields = msgspec.msgpack.decode(payload)
            if fields[8] is not None:
                fields[8] = change(*fields[8])
            return msgspec.msgpack.encode(fields)

        peer = lying(VShardMessageType.VECTOR_MEM_REGION_RESPONSE, changed)
        with pytest.raises(FormatError):
            peer.load_view()

    @pytest.mark.parametrize(("at", "kind"), [(0, "not a graph image"), (-100, "checksum does not match")])
    def test_pieces_that_are_corrupt(self, lying: Callable[..., Connection], at: int, kind: str) -> None:
        def changed(payload: bytes) -> bytes:
            fields = msgspec.msgpack.decode(payload)
            if fields[8] is not None:
                data = bytearray(fields[8][1])
                data[at] ^= 1
                fields[8][1] = bytes(data)
            return msgspec.msgpack.encode(fields)

        with pytest.raises(FormatError, match=kind):
            lying(VShardMessageType.VECTOR_MEM_REGION_RESPONSE, changed).load_view()

    def test_the_view_of_another_shard(self, lying: Callable[..., Connection]) -> None:
        def changed(payload: bytes) -> bytes:
            fields = msgspec.msgpack.decode(payload)
            if fields[2] is not None:
                fields[2][9] ^= 1
            return msgspec.msgpack.encode(fields)

        with pytest.raises(StaleShardError, match="and the request is about image"):
            lying(VShardMessageType.VECTOR_MEM_REGION_RESPONSE, changed).load_view()


# ---- views ----


class TestViews:
    @pytest.mark.parametrize("piece", [None, 1000, 4096, 77_777])
    def test_over_rpc_it_is_the_one_that_is_read(
        self, shard: Shard, peer: Connection, queries: Floats, monkeypatch: pytest.MonkeyPatch, piece: int | None
    ) -> None:
        if piece is not None:
            monkeypatch.setattr(answers, "VIEW_PIECE_BYTES", piece)
        with Channel.shm(shard.arena, slot_bytes=4096) as channel, View.open(channel) as read, peer.load_view() as view:
            assert (view.info, view.nbytes) == (read.info, read.nbytes)
            with Engine.create([view], [channel]) as one, Engine.create([read], [channel]) as other:
                for a, b in zip(one.search(queries, 10, 50, 8), other.search(queries, 10, 50, 8), strict=True):
                    if a.dtype.names is None:
                        np.testing.assert_array_equal(a, b)
                    else:
                        np.testing.assert_array_equal(a["cache_hits"], b["cache_hits"])

    def test_pieces_are_the_images_own_bytes(self, shard: Shard) -> None:
        info, expander = shard.info, Expander(shard.arena, shard.info)
        with shard.arena.view() as memory:
            whole = bytes(memory[:4096]) + bytes(memory[info.nav_offset : info.nav_offset + info.nav_bytes])
        assert expander.view_bytes == len(whole)
        for offset in (0, 1, 4095, 4096, 4097, len(whole) - 1):
            for n_bytes in (1, 100, 5000, 2**40):
                assert expander.read_view(offset, n_bytes) == whole[offset : offset + n_bytes]
        for offset in (-1, len(whole), 2**63):
            with pytest.raises(InvalidInputError, match="there are none at"):
                expander.read_view(offset, 10)

    def test_what_is_told_of_the_shard(self, shard: Shard, peer: Connection) -> None:
        for name, value in fields_of(peer.shard).items():
            assert getattr(shard.info, name) == value

    def test_an_owner_without_rpc_refuses(self, shard: Shard, queries: Floats) -> None:
        with cotra_rdma.serve(shard, transports=("shm",)) as server, ExitStack() as stack:
            peer = peer_of(server.address, stack)
            with pytest.raises(PeerError, match=r"shard 0 \(.*this owner does not offer rpc"):
                peer.load_view()
            peer.choose("shm", None, "")
            with pytest.raises(PeerError, match="this owner does not offer rpc"):
                peer.expand(queries, some_pushes(3, 3, 2000), 5.0)
            with pytest.raises(PeerError, match="this owner does not offer rpc"):
                peer.search_all(job_of(queries))


# ---- searches of the whole collection ----


def job_of(queries: Floats, **changes: Any) -> Batch:
    return Batch(queries, 10, 50, 8, 0, 5.0, Stop())._replace(**changes)


@pytest.fixture
def owners(shards: list[Path]) -> Iterator[list[Server]]:
    with ExitStack() as stack:
        opened = [stack.enter_context(Shard.open(path)) for path in shards]
        yield [stack.enter_context(cotra_rdma.serve(shard, transports=("shm", "rpc"), n_workers=1)) for shard in opened]


@pytest.fixture
def addresses(owners: list[Server]) -> list[str]:
    return [owner.address for owner in owners]


class TestWholeCollection:
    def test_it_is_the_owners_own_search(self, owners: list[Server], addresses: list[str], queries: Floats) -> None:
        with cotra_rdma.connect(addresses) as reader, cotra_rdma.connect(addresses[::-1]) as at_home:
            owners[0].search_with(at_home)
            expected = reader.search(queries, k=10, ef=50)
            found = reader._connections[0].search_all(job_of(queries))
            np.testing.assert_array_equal(found.labels, expected.ids)
            np.testing.assert_array_equal(found.distances.view(np.uint32), expected.distances.view(np.uint32))
            assert found.images == at_home.images == reader.images[::-1]
            np.testing.assert_array_equal(1 - found.shards, expected.shards)  # it numbers them the other way round
            for name in ("reads", "rounds", "expansions", "own", "pushed", "cached_records"):
                np.testing.assert_array_equal(found.stats[name], expected.stats[name])
            assert found.failures == {}
            own = owners[0].request_counts[VShardMessageType.VECTOR_SCATTER_REQUEST]
            assert own == 1
            owners[0].search_with(None)
            with pytest.raises(PeerError, match="no connection to the others"):
                reader._connections[0].search_all(job_of(queries))

    def test_a_large_batch_goes_in_parts(
        self, owners: list[Server], addresses: list[str], queries: Floats, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with cotra_rdma.connect(addresses) as cluster:
            owners[1].search_with(cluster)
            expected = cluster.search(queries, k=10, ef=50)
            monkeypatch.setattr(search, "_MAX_BATCH_BYTES", 20_000)
            found = cluster._connections[1].search_all(job_of(queries))
            assert owners[1].request_counts[VShardMessageType.VECTOR_SCATTER_REQUEST] > 3
            np.testing.assert_array_equal(found.labels, expected.ids)
            np.testing.assert_array_equal(found.shards, expected.shards)
            assert cluster._connections[1].search_all(job_of(queries[:0])).labels.shape == (0, 10)

    def test_owners_that_ask_each_other_do_not_wait_in_vain(
        self, owners: list[Server], addresses: list[str], queries: Floats
    ) -> None:
        """Each has one thread for requests, and needs the other for what it is asked."""
        with ExitStack() as stack:
            for owner in owners:
                owner.search_with(stack.enter_context(cotra_rdma.connect(addresses, transport="rpc")))
            reader = stack.enter_context(cotra_rdma.connect(addresses))
            pool = stack.enter_context(ThreadPoolExecutor(6))
            expected = reader.search(queries, k=10, ef=50).ids
            job = job_of(queries, timeout_s=55.0)
            calls = [pool.submit(reader._connections[n % 2].search_all, job) for n in range(12)]
            for call in calls:
                found = call.result(50)
                assert found.failures == {}
                np.testing.assert_array_equal(found.labels, expected)

    def test_a_lost_shard_is_named(self, shards: list[Path], owners: list[Server], queries: Floats) -> None:
        with (
            OwnerProcess([shards[1]], transports=("rpc",)) as dies,
            cotra_rdma.connect([owners[0].address, *dies.addresses]) as cluster,
        ):
            owners[0].search_with(cluster)
            os.kill(dies.pid, signal.SIGKILL)
            os.waitid(os.P_PID, dies.pid, os.WEXITED | os.WNOWAIT)
            found = cluster._connections[0].search_all(job_of(queries))
            assert list(found.failures) == [1]
            assert "cannot be reached" in found.failures[1]
            assert (found.shards == 0).all()
            owners[0].search_with(None)

    def test_what_it_does_not_take(
        self, owners: list[Server], addresses: list[str], queries: Floats, words: Floats
    ) -> None:
        with cotra_rdma.connect(addresses) as cluster:
            owners[0].search_with(cluster)
            peer = cluster._connections[0]
            with pytest.raises(InvalidInputError, match="takes no mask"):
                peer.search_all(job_of(queries, mask=np.ones((200, 2), bool)))
            with pytest.raises(StaleShardError, match="filters are of other images"):
                peer.search_all(job_of(queries, filters=(None, None)), [cluster.images[0], 12])
            with pytest.raises(PeerError, match="a filter"):
                peer.search_all(job_of(queries, filters=(b"\0", None)), cluster.images)
            request = SearchRequest("", queries[:1], 10, 50, bytes(250), scope=1).encode()
            reply = peer.calls.call(VShardMessageType.VECTOR_SCATTER_REQUEST, request, 5000)
            assert "a filter is for the rows of one shard" in SearchResponse.decode(reply.payload).message
            with pytest.raises(PeerError, match="ef must be a whole number"):
                peer.search_all(job_of(queries, ef=2**31))
            cluster.close()
        with cotra_rdma.connect(addresses) as reader, pytest.raises(PeerError, match="the cluster is closed"):
            reader._connections[0].search_all(job_of(queries))

    def test_a_collection_of_others(self, owners: list[Server], words: Floats) -> None:
        with (
            Shard.build(words[:50], metric="l2") as other,
            cotra_rdma.serve(other, transports=("rpc",)) as server,
            cotra_rdma.connect(server.address) as cluster,
            pytest.raises(InvalidInputError, match=r"a shard of cosine\[100\] in a collection of l2\[100\]"),
        ):
            owners[0].search_with(cluster)
