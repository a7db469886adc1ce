"""`ScatterGather` and `CoTraRdma`: the merge, over-fetch, selection, and the truth about shards that do not answer."""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import cotra_rdma
from cotra_rdma import (
    ClosedError,
    CoTraRdma,
    DeadlineError,
    FormatError,
    GrpcDispatch,
    InvalidInputError,
    PartialResultError,
    PeerError,
    ScatterGather,
    SeamResult,
    Shard,
    ShardStatus,
    TransportError,
    VectorShardSeam,
)
from cotra_rdma._core.stats import OWNER_STATS_DTYPE
from cotra_rdma._native.merge import merge
from cotra_rdma._owner.child_process import OwnerProcess
from cotra_rdma.protocol import search as search_messages
from cotra_rdma.protocol.certificates import make_certificate
from cotra_rdma.protocol.envelope import WIRE_VERSION, VShardEnvelope, VShardMessageType
from cotra_rdma.protocol.search import SearchRequest, SearchResponse
from cotra_rdma.seam.interface import ShardRef, ShardSubset
from helpers.begun import stop_process

Floats = npt.NDArray[np.float32]
HERE = ("shm", "rpc")
Answer = list[tuple[int, float]]


@pytest.fixture
def opened(shards: list[Path]) -> Iterator[list[Shard]]:
    with ExitStack() as stack:
        yield [stack.enter_context(Shard.open(path)) for path in shards]


@pytest.fixture
def addresses(opened: list[Shard]) -> Iterator[list[str]]:
    with ExitStack() as stack:
        yield [stack.enter_context(cotra_rdma.serve(shard, transports=HERE)).address for shard in opened]


def in_process(opened: Sequence[Shard], queries: Floats, k: int, ef: int) -> tuple[npt.NDArray[np.int64], Floats]:
    answers = [shard.search(queries, k, ef) for shard in opened]
    ids, distances, _ = merge(np.stack([a[0] for a in answers]), np.stack([a[1] for a in answers]))
    return ids, distances


class InMemory:
    """A dispatch to owners that are functions of the request: rows of (id, distance), an envelope, or an exception."""

    def __init__(self, owners: dict[int, Callable[[SearchRequest], Answer | Exception | VShardEnvelope]]) -> None:
        self.owners = owners
        self.asked: list[tuple[int, SearchRequest]] = []

    async def call(self, envelope: VShardEnvelope, timeout_ms: int) -> VShardEnvelope:
        request = SearchRequest.decode(envelope.payload)
        self.asked.append((envelope.vshard_id, request))
        answer = self.owners[envelope.vshard_id](request)
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, VShardEnvelope):
            return answer
        return respond(request, answer)


def respond(request: SearchRequest, answer: Answer, *, n: int = 1, stats: bytes = b"") -> VShardEnvelope:
    """The first k of an answer, to each of n queries."""
    rows = answer[: request.top_k]
    rows = rows + [(-1, float("inf"))] * (request.top_k - len(rows))
    labels, distances = ([[row[i] for row in rows]] * n for i in (0, 1))
    response = SearchResponse(0, "", np.array(labels, np.int64), np.array(distances, np.float32), stats)
    return VShardEnvelope(WIRE_VERSION, VShardMessageType.VECTOR_SCATTER_RESPONSE, 0, 0, 0, b"".join(response.encode()))


def over(
    owners: dict[int, Callable[[SearchRequest], Answer | Exception | VShardEnvelope]],
) -> tuple[ScatterGather, InMemory]:
    dispatch = InMemory(owners)
    return ScatterGather([ShardRef(0, number) for number in owners], dispatch, verify=False), dispatch


def search(gatherer: ScatterGather, k: int = 3, **given: object) -> SeamResult:
    return asyncio.run(gatherer.search(np.zeros(2, np.float32), k, **given))  # type: ignore[arg-type]


def found(result: SeamResult) -> list[tuple[int, float, int]]:
    columns = (result.ids[0].tolist(), result.distances[0].tolist(), result.shards[0].tolist())
    return list(zip(*columns, strict=True))


# ---- against real owners ----


class TestOwners:
    def test_the_same_bits_as_in_process(self, opened: list[Shard], addresses: list[str], queries: Floats) -> None:
        ids, distances = in_process(opened, queries, 10, 50)

        async def body() -> SeamResult:
            async with ScatterGather.connect(addresses) as gatherer:
                return await gatherer.search(queries, 10, 50)

        result = asyncio.run(body())
        np.testing.assert_array_equal(result.ids, ids)
        np.testing.assert_array_equal(result.distances.view(np.uint32), distances.view(np.uint32))
        assert (result.shards == (result.ids >= 2000)).all()
        assert (result.coverage, result.transports) == (1.0, ("rpc", "rpc"))
        assert result.answered == (ShardRef(0, 0), ShardRef(0, 1))
        assert (result.timed_out, result.failed) == ((), ())
        assert (result.stats["reads"] == 0).all()
        assert (result.stats["rounds"] == 1).all()
        assert (result.stats["read_bytes"] > 0).all()
        assert (result.stats["expansions"] > 0).all()

    def test_without_an_event_loop_and_from_many_threads(
        self, opened: list[Shard], addresses: list[str], queries: Floats
    ) -> None:
        ids, _ = in_process(opened, queries, 10, 50)
        same: list[bool] = []
        with ScatterGather.connect(addresses) as gatherer:

            def work() -> None:
                for _ in range(3):
                    same.append((gatherer.search_sync(queries, 10, 50, timeout_s=30).ids == ids).all())

            threads = [threading.Thread(target=work) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            assert same == [True] * 12
            gatherer.close()
            with pytest.raises(ClosedError):
                gatherer.search_sync(queries)

    def test_a_large_batch_goes_in_parts(
        self, opened: list[Shard], addresses: list[str], queries: Floats, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(search_messages, "_MAX_BATCH_BYTES", 20_000)
        with ScatterGather.connect(addresses) as gatherer:
            result = gatherer.search_sync(queries, 10, 50)
        np.testing.assert_array_equal(result.ids, in_process(opened, queries, 10, 50)[0])

    def test_no_queries_no_answers(self, addresses: list[str]) -> None:
        with ScatterGather.connect(addresses) as gatherer:
            result = gatherer.search_sync(np.empty((0, 100), np.float32), k=3)
        assert result.ids.shape == (0, 3)
        assert result.coverage == 1.0

    def test_what_an_owner_refuses_is_a_failure_by_name(self, addresses: list[str], queries: Floats) -> None:
        with ScatterGather.connect(addresses) as gatherer:
            with pytest.raises(PartialResultError, match="has dim 100, and the queries have 99") as caught:
                gatherer.search_sync(queries[:1, :99])
            assert caught.value.result.failed == gatherer.shards
            assert isinstance(caught.value.__cause__, InvalidInputError)
            assert gatherer.search_sync(queries[:1]).coverage == 1.0

    def test_certificates(self, opened: list[Shard], queries: Floats, tmp_path: Path) -> None:
        owner, reader = make_certificate(tmp_path, "owner", ["127.0.0.1"]), make_certificate(tmp_path, "reader")
        with (
            cotra_rdma.serve(opened[0], transports=HERE, tls=owner) as server,
            ScatterGather.connect([server.address], tls=reader) as gatherer,
        ):
            assert gatherer.search_sync(queries, k=3).coverage == 1.0


class TestOwnersThatGoAway:
    def test_a_stopped_owner_times_out_and_a_dead_one_fails_and_both_are_named(
        self, shards: list[Path], queries: Floats
    ) -> None:
        with (
            Shard.open(shards[0]) as first,
            OwnerProcess([shards[0]], transports=HERE) as lives,
            OwnerProcess([shards[1]], transports=HERE) as stops,
            OwnerProcess([shards[1]], transports=HERE) as dies,
            ScatterGather.connect([*lives.addresses, *stops.addresses, *dies.addresses]) as gatherer,
        ):
            whole = gatherer.search_sync(queries, 5, timeout_s=30)
            assert whole.coverage == 1.0
            try:
                stop_process(stops.pid)
                os.waitpid(stops.pid, os.WUNTRACED)
                os.kill(dies.pid, signal.SIGKILL)
                os.waitid(os.P_PID, dies.pid, os.WEXITED | os.WNOWAIT)
                for _ in range(2):  # in the second round there is no connection to the dead one any more
                    with pytest.raises(PartialResultError) as caught:
                        gatherer.search_sync(queries, 5, timeout_s=0.5)  # before a stopped one's silence is noticed
                    result = caught.value.result
                    assert result.answered == (ShardRef(0, 0),)
                    assert result.timed_out == (ShardRef(0, 1),)
                    assert result.failed == (ShardRef(0, 2),)
                    assert result.coverage == pytest.approx(1 / 3)
                    assert caught.value.shard == 1
                    assert "shard 1 of node 0 timed out: " in str(caught.value)
                    assert f"shard 2 of node 0 failed: {dies.addresses[0]} cannot be reached" in str(caught.value)
                    assert isinstance(result.outcomes[2].error, TransportError)
                    assert result.outcomes[2].elapsed_s < result.outcomes[1].elapsed_s < 5
                    np.testing.assert_array_equal(result.ids, in_process([first], queries, 5, 64)[0])
                partial = gatherer.search_sync(queries, 5, timeout_s=1.0, allow_partial=True)
                assert partial.coverage == pytest.approx(1 / 3)
                np.testing.assert_array_equal(partial.ids, result.ids)
            finally:
                os.kill(stops.pid, signal.SIGCONT)
            again = gatherer.search_sync(queries, 5, timeout_s=30, allow_partial=True)
            assert again.answered == (ShardRef(0, 0), ShardRef(0, 1))  # its late answers were dropped
            np.testing.assert_array_equal(again.ids, whole.ids)


# ---- against owners made by hand ----


def test_merged_by_distance_then_shard_id_then_id() -> None:
    gatherer, _ = over(
        {
            9: lambda request: [(1, 0.5), (2, 1.0), (8, 2.0)],
            4: lambda request: [(7, 0.5), (9, 0.5), (3, 1.0), (6, 3.0)],
        }
    )
    # Shard 4 comes before shard 9, though it was given after it; `shards` has places in the order given.
    assert found(search(gatherer, 6)) == [(7, 0.5, 1), (9, 0.5, 1), (1, 0.5, 0), (3, 1.0, 1), (2, 1.0, 0), (8, 2.0, 0)]


def test_an_id_in_several_shards_is_there_once_at_its_nearest() -> None:
    gatherer, dispatch = over(
        {
            0: lambda request: [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)],
            1: lambda request: [(2, 0.5), (1, 1.0), (3, 3.5), (5, 5.0)],
        }
    )
    assert found(search(gatherer, 3)) == [(2, 0.5, 1), (1, 1.0, 0), (3, 3.0, 0)]
    assert [request.top_k for _, request in dispatch.asked] == [3, 3]  # k of each shard were enough


@pytest.mark.parametrize("others", [0, 1])
def test_more_is_asked_for_where_duplicates_leave_too_few(others: int) -> None:
    vectors = [(i // 4, float(i)) for i in range(40)]  # four vectors under each id
    owners: dict[int, Callable[[SearchRequest], Answer | Exception | VShardEnvelope]] = {0: lambda request: vectors}
    owners.update({1 + i: lambda request: [(0, 0.0)] for i in range(others)})
    gatherer, dispatch = over(owners)
    result = search(gatherer, 3, ef=4)
    assert found(result) == [(0, 0.0, 0), (1, 4.0, 0), (2, 8.0, 0)]
    assert [(shard, r.top_k, r.ef_search) for shard, r in dispatch.asked if shard == 0] == [
        (0, 3, 4),
        (0, 6, 6),
        (0, 12, 12),
    ]
    assert [shard for shard, _ in dispatch.asked if shard] == [1] * others  # it said that it has no more
    assert result.stats["rounds"].tolist() == [3]
    assert result.outcomes[0].n_queries == 1


def test_over_fetch_ends() -> None:
    gatherer, dispatch = over({0: lambda request: [(7, 1.0)] * request.top_k})
    assert found(search(gatherer, 2)) == [(7, 1.0, 0), (-1, np.inf, -1)]
    assert [request.top_k for _, request in dispatch.asked] == [2, 4, 8, 16, 32]


def test_a_shard_that_fails_when_it_is_asked_for_more_has_failed() -> None:
    gatherer, _ = over(
        {
            0: lambda request: [(i // 4, float(i)) for i in range(40)] if request.top_k < 4 else OSError("full"),
            1: lambda request: [(9, 9.0)],
        }
    )
    with pytest.raises(PartialResultError, match="shard 0 of node 0 failed: full") as caught:
        search(gatherer, 3)
    assert found(caught.value.result) == [(9, 9.0, 1), (-1, np.inf, -1), (-1, np.inf, -1)]
    assert caught.value.result.coverage == 0.5


def bad(**changes: object) -> Callable[[SearchRequest], VShardEnvelope]:
    def owner(request: SearchRequest) -> VShardEnvelope:
        fields = {
            "code": 0,
            "message": "",
            "labels": np.array([[1, 2, 3]]),
            "distances": np.array([[1, 2, 3]], np.float32),
            "stats": b"",
        }
        payload = b"".join(SearchResponse(**{**fields, **changes}).encode())  # type: ignore[arg-type]
        return VShardEnvelope(WIRE_VERSION, VShardMessageType.VECTOR_SCATTER_RESPONSE, 0, 0, 0, payload)

    return owner


@pytest.mark.parametrize(
    ("owner", "status", "kind", "reason"),
    [
        (lambda r: DeadlineError("too late"), ShardStatus.TIMED_OUT, DeadlineError, "too late"),
        (lambda r: TimeoutError(), ShardStatus.TIMED_OUT, TimeoutError, "no answer within"),
        (lambda r: ConnectionRefusedError("refused"), ShardStatus.FAILED, ConnectionRefusedError, "refused"),
        (lambda r: RuntimeError("a bug of the dispatch"), ShardStatus.FAILED, RuntimeError, "a bug"),
        (lambda r: KeyError(), ShardStatus.FAILED, KeyError, "KeyError"),
        (bad(code=3, message="no disk"), ShardStatus.FAILED, PeerError, "no disk"),
        (bad(labels=np.array([[1, 2]]), distances=np.zeros((1, 2), np.float32)), "failed", FormatError, "an answer of"),
        (bad(distances=np.array([[1, 3, 2]], np.float32)), "failed", FormatError, "not sorted"),
        (bad(distances=np.array([[1, np.nan, 2]], np.float32)), "failed", FormatError, "no numbers"),
        (bad(labels=np.array([[1, -1, 2]])), "failed", FormatError, "not sorted"),
        (bad(labels=np.array([[-1, 1, 2]])), "failed", FormatError, "not sorted"),
        (bad(stats=bytes(31)), "failed", FormatError, "31 bytes of stats"),
        (
            lambda r: VShardEnvelope(2, VShardMessageType(57), 0, 0, 0, b""),
            ShardStatus.FAILED,
            FormatError,
            "with type 57",
        ),
        (
            lambda r: VShardEnvelope(2, VShardMessageType(51), 0, 0, 0, b"\x97"),
            ShardStatus.FAILED,
            FormatError,
            "too early",
        ),
    ],
)
def test_what_a_shard_can_do_wrong(
    owner: Callable[[SearchRequest], Answer | Exception | VShardEnvelope],
    status: ShardStatus,
    kind: type[Exception],
    reason: str,
) -> None:
    gatherer, _ = over({0: owner, 5: lambda request: [(4, 4.0)]})
    with pytest.raises(PartialResultError, match=f"shard 0 of node 0 {status}: .*{reason}") as caught:
        search(gatherer)
    assert caught.value.shard == 0
    assert caught.value.__cause__ is caught.value.result.outcomes[0].error
    partial = search(gatherer, allow_partial=True)
    outcome = partial.outcomes[0]
    assert (outcome.status, type(outcome.error), outcome.n_queries) == (status, kind, 1)
    assert partial.outcomes[1].status is ShardStatus.ANSWERED
    assert partial.coverage == 0.5
    assert found(partial) == [(4, 4.0, 1), (-1, np.inf, -1), (-1, np.inf, -1)]


def test_a_lone_nan_is_refused() -> None:
    owner = bad(labels=np.array([[1]]), distances=np.array([[np.nan]], np.float32))
    with pytest.raises(PartialResultError, match="no numbers"):
        search(over({0: owner})[0], 1)


def test_when_all_fail_the_partial_result_is_empty() -> None:
    partial = search(over({0: lambda r: OSError("x"), 1: lambda r: OSError("y")})[0], allow_partial=True)
    assert partial.coverage == 0.0
    assert (partial.ids == -1).all()
    assert np.isinf(partial.distances).all()


def test_a_dispatch_that_ignores_its_deadline_is_not_waited_for() -> None:
    class Deaf:
        async def call(self, envelope: VShardEnvelope, timeout_ms: int) -> VShardEnvelope:
            assert 1 <= timeout_ms <= 100
            await asyncio.Event().wait()
            raise AssertionError

    with pytest.raises(PartialResultError, match=r"timed out: no answer within 0\.") as caught:
        search(ScatterGather([ShardRef(0, 0)], Deaf(), verify=False), timeout_s=0.1)
    assert caught.value.result.timed_out == (ShardRef(0, 0),)


def test_shards_are_asked_at_once() -> None:
    class Barrier:
        """Answers when all have been asked."""

        def __init__(self) -> None:
            self.n, self.all = 0, asyncio.Event()

        async def call(self, envelope: VShardEnvelope, timeout_ms: int) -> VShardEnvelope:
            self.n += 1
            if self.n == 5:
                self.all.set()
            await self.all.wait()
            return respond(SearchRequest.decode(envelope.payload), [(envelope.vshard_id, 1.0)])

    async def body() -> SeamResult:
        return await ScatterGather([ShardRef(0, i) for i in range(5)], Barrier(), verify=False).search(
            np.zeros(2), 5, timeout_s=60
        )

    assert asyncio.run(body()).ids.tolist() == [[0, 1, 2, 3, 4]]


def test_a_cancelled_search_cancels_its_calls() -> None:
    async def body() -> None:
        started, ended = asyncio.Event(), asyncio.Event()

        class Waits:
            async def call(self, envelope: VShardEnvelope, timeout_ms: int) -> VShardEnvelope:
                started.set()
                try:
                    await asyncio.Event().wait()
                finally:
                    ended.set()
                raise AssertionError

        task = asyncio.create_task(ScatterGather([ShardRef(0, 0)], Waits()).search(np.zeros(2), timeout_s=60))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended.is_set()

    asyncio.run(body())


class ByFirstNumber(VectorShardSeam):
    """Sends a query to the shard that its first number names; negative ones to none, large ones to all."""

    def select_shards(self, query_vector: Floats, all_shards: Sequence[int]) -> ShardSubset:
        first = int(query_vector[0])
        if first > 100:
            return ShardSubset.All
        return ShardSubset.Subset([] if first < 0 else [first, 77])


def test_a_selector_in_front() -> None:
    async def body() -> None:
        owners = {
            number: (
                lambda r, n=number: respond(r, [(n, 1.0)], n=len(r.queries) // 2, stats=bytes(16 * len(r.queries)))
            )
            for number in (10, 11, 12)
        }
        dispatch = InMemory(owners)  # type: ignore[arg-type]
        gatherer = ScatterGather(
            [ShardRef(1, number) for number in owners], dispatch, selector=ByFirstNumber(), verify=False
        )
        result = await gatherer.search(np.array([[10, 0], [11, 0], [10, 1], [200, 0]]), 3)
        assert [row[row >= 0].tolist() for row in result.ids] == [[10], [11], [10], [10, 11, 12]]
        assert {shard: len(request.queries) // 2 for shard, request in dispatch.asked} == {10: 3, 11: 2, 12: 1}
        assert [outcome.n_queries for outcome in result.outcomes] == [3, 2, 1]
        assert result.coverage == 1.0
        alone = await gatherer.search(np.array([[11, 0]]), 3)
        statuses = [outcome.status for outcome in alone.outcomes]
        assert statuses == [ShardStatus.NOT_SELECTED, ShardStatus.ANSWERED, ShardStatus.NOT_SELECTED]
        assert alone.coverage == 1.0
        with pytest.raises(PartialResultError, match="no shard was selected for some query") as caught:
            await gatherer.search(np.array([[11, 0], [-1, 0]]), 3)
        assert caught.value.result.coverage == 0.5
        assert caught.value.shard is None

    asyncio.run(body())


def test_a_failed_shard_weighs_as_many_queries_as_it_was_asked() -> None:
    async def body() -> None:
        owners = {
            10: lambda r: OSError("down"),
            11: lambda r: respond(r, [(11, 1.0)], n=len(r.queries) // 2),
        }
        gatherer = ScatterGather(
            [ShardRef(0, number) for number in owners],
            InMemory(owners),  # type: ignore[arg-type]
            selector=ByFirstNumber(),
            verify=False,
        )
        result = await gatherer.search(np.array([[10, 0], [11, 0], [11, 0], [11, 0]]), 1, allow_partial=True)
        assert result.coverage == 0.75
        assert result.ids[:, 0].tolist() == [-1, 11, 11, 11]

    asyncio.run(body())


def test_filters_go_to_their_shards() -> None:
    gatherer, dispatch = over({3: lambda r: [(1, 1.0)], 4: lambda r: [(2, 2.0)]})
    search(gatherer, filters={4: b"\x05"})
    assert {shard: request.filter_bitmap for shard, request in dispatch.asked} == {3: None, 4: b"\x05"}
    with pytest.raises(InvalidInputError, match=r"not there: \[5\]"):
        search(gatherer, filters={5: b""})


def test_bad_input() -> None:
    gatherer, dispatch = over({0: lambda r: []})
    for queries, k, why in (
        (np.full(2, np.nan), 3, "NaN"),
        (np.zeros(2), 0, "k must be a whole number"),
        (np.zeros(2), 65, "k must be a whole number"),
        (np.float32(1), 1, "queries must be"),
    ):
        with pytest.raises(InvalidInputError, match=why):
            asyncio.run(gatherer.search(queries, k))
    assert dispatch.asked == []
    with pytest.raises(InvalidInputError, match="at least one"):
        ScatterGather([], dispatch)
    with pytest.raises(InvalidInputError, match="same vshard_id"):
        ScatterGather([ShardRef(0, 1), ShardRef(1, 1)], dispatch)


def test_the_error_survives_pickling() -> None:
    with pytest.raises(PartialResultError) as caught:
        search(over({0: lambda r: OSError("x")})[0])
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.shard, copy.result.coverage) == (str(caught.value), 0, 0.0)


def test_closing_ends_what_waits() -> None:
    started, errors = threading.Event(), []

    class Waits:
        async def call(self, envelope: VShardEnvelope, timeout_ms: int) -> VShardEnvelope:
            started.set()
            await asyncio.Event().wait()
            raise AssertionError

    gatherer = ScatterGather([ShardRef(0, 0)], Waits())

    def work() -> None:
        try:
            gatherer.search_sync(np.zeros(2), 1, 1, timeout_s=60)
        except ClosedError as error:
            errors.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    assert started.wait(30)
    gatherer.close()
    thread.join(30)
    assert errors == ["cotra-scatter-gather was closed meanwhile"]
    gatherer.close()


def test_a_dispatch_of_the_callers() -> None:
    """It stays the caller's to close, and may serve several gatherers."""

    async def body(work: Callable[[ScatterGather], Awaitable[SeamResult]]) -> None:
        async with GrpcDispatch({0: "127.0.0.1:1"}) as dispatch:
            for _ in range(2):
                async with ScatterGather([ShardRef(0, 0)], dispatch) as gatherer:
                    assert (await work(gatherer)).coverage == 0.0

    asyncio.run(body(lambda gatherer: gatherer.search(np.zeros(2), allow_partial=True)))


# ---- CoTraRdma ----


class TestCoTraRdma:
    def test_it_walks_what_it_can_read(self, opened: list[Shard], addresses: list[str], queries: Floats) -> None:
        with cotra_rdma.connect(addresses, transport="shm") as cluster, CoTraRdma(cluster) as algorithm:
            assert isinstance(algorithm, VectorShardSeam)
            assert algorithm.select_shards(queries[0], [0, 1]) == ShardSubset.All
            result, plain = algorithm.search(queries, 10, 50), cluster.search(queries, 10, 50)
            assert algorithm.by_rpc == ()
        np.testing.assert_array_equal(result.ids, plain.ids)
        np.testing.assert_array_equal(result.shards, plain.shards)
        np.testing.assert_array_equal(result.stats["reads"], plain.stats["reads"])
        assert result.transports == ("shm", "shm")
        assert result.coverage == 1.0
        assert [outcome.status for outcome in result.outcomes] == [ShardStatus.ANSWERED] * 2

    @pytest.mark.parametrize("kinds", [("rpc", "shm"), ("rpc", "rpc")])
    def test_what_exposes_nothing_is_asked_and_it_says_so(
        self, opened: list[Shard], queries: Floats, kinds: tuple[str, ...], caplog: pytest.LogCaptureFixture
    ) -> None:
        with ExitStack() as stack:
            servers = [
                stack.enter_context(cotra_rdma.serve(shard, transports=dict.fromkeys(("rpc", kind))))
                for shard, kind in zip(opened, kinds, strict=True)
            ]
            cluster = stack.enter_context(cotra_rdma.connect([server.address for server in servers]))
            with caplog.at_level(logging.INFO, "cotra_rdma.seam.one_sided"):
                algorithm = stack.enter_context(CoTraRdma(cluster))
            assert algorithm.by_rpc == tuple(at for at, kind in enumerate(kinds) if kind == "rpc")
            assert len([r for r in caplog.records if "is asked over RPC" in r.message]) == len(algorithm.by_rpc)
            for _ in range(2):
                result = algorithm.search(queries, 10, 50)
                assert result.transports == kinds
                np.testing.assert_array_equal(result.ids, in_process(opened, queries, 10, 50)[0])
            assert (result.stats["reads"] > 0).all() == ("shm" in kinds)
            servers[0].close()
            with pytest.raises(PartialResultError, match="shard 0 of node 0 failed") as caught:
                algorithm.search(queries, 10, 50, timeout_s=2)
            assert caught.value.shard == 0
            partial = algorithm.search(queries, 10, 50, timeout_s=2, allow_partial=True)
            assert partial.coverage == 0.5
            np.testing.assert_array_equal(partial.ids, in_process(opened[1:], queries, 10, 50)[0])

    def test_regions(self, opened: list[Shard], addresses: list[str]) -> None:
        with cotra_rdma.serve(opened[0], transports=HERE) as server, cotra_rdma.connect(addresses) as cluster:
            assert CoTraRdma(server=server).exposed_region() is server.exposed_region() is None
            assert cluster.regions == (None, None)
            assert CoTraRdma(cluster).exposed_region() is None
            assert CoTraRdma().exposed_region() is None

    def test_bad_input(self, addresses: list[str], queries: Floats) -> None:
        with pytest.raises(InvalidInputError, match="no cluster to search"):
            CoTraRdma().search(queries)
        with cotra_rdma.connect(addresses, transport="rpc") as cluster:
            with CoTraRdma(cluster) as algorithm, pytest.raises(InvalidInputError, match="k must be"):
                algorithm.search(queries, k=0)
            with (
                ScatterGather.connect(addresses[:1]) as short,
                pytest.raises(InvalidInputError, match="the fallback has 1 shards, and 2 shards need one"),
            ):
                CoTraRdma(cluster, fallback=short)
            with ScatterGather.connect(addresses) as given, CoTraRdma(cluster, fallback=given) as algorithm:
                assert algorithm.search(queries, 3).coverage == 1.0
                algorithm.close()
                assert given.search_sync(queries, 3).coverage == 1.0  # it stayed the caller's


def test_stats_of_owners_are_added() -> None:
    stats = np.array([(5, 2, 5, 9, 320, 21000)], OWNER_STATS_DTYPE).tobytes()
    gatherer, _ = over({i: (lambda r: respond(r, [(1, 1.0)], stats=stats)) for i in range(2)})
    record = search(gatherer).stats[0]
    assert (record["reads"], record["rounds"], record["expansions"], record["cache_hits"]) == (0, 1, 10, 18)
    assert record["latency_ns"] == 21000


def test_what_the_caller_got_wrong_is_not_blamed_on_owners() -> None:
    gatherer, _ = over({0: lambda r: []})
    for change in ({"k": 2.5}, {"beam": 0}, {"ef": 2**21}, {"timeout_s": -1.0}, {"filters": {0: np.ones(8, bool)}}):
        with pytest.raises(InvalidInputError):
            gatherer.search_sync(np.zeros(2), **{"k": 1, **change})
    gatherer.close()


def test_a_dispatch_that_cancels_itself_has_failed() -> None:
    class Cancelling:
        async def call(self, envelope: VShardEnvelope, timeout_ms: int) -> VShardEnvelope:
            raise asyncio.CancelledError

    with ScatterGather([ShardRef(0, 0), ShardRef(0, 1)], Cancelling()) as gatherer:
        result = gatherer.search_sync(np.zeros(2), 1, allow_partial=True)
    assert [outcome.reason for outcome in result.outcomes] == ["CancelledError", "CancelledError"]
    assert result.coverage == 0.0
