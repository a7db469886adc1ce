"""Servers and clusters on this host: which path is taken and said, the merge, bad input, and owners that go away."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import hnswlib
import numpy as np
import numpy.typing as npt
import pytest

import cotra_rdma
from cotra_rdma import (
    ClosedError,
    DeadlineError,
    FabricModel,
    InvalidInputError,
    PartialResultError,
    PeerError,
    Server,
    Shard,
    TransportError,
    VerbsUnavailableError,
)
from cotra_rdma._native.merge import merge
from cotra_rdma._owner import server as server_module
from cotra_rdma._owner.child_process import OwnerProcess
from cotra_rdma.protocol import search
from cotra_rdma.protocol.certificates import make_certificate
from helpers.begun import stop_process
from helpers.faults import FaultyFabric

Floats = npt.NDArray[np.float32]
HERE = ("shm", "rpc")


@pytest.fixture
def opened(shards: list[Path]) -> Iterator[list[Shard]]:
    with ExitStack() as stack:
        yield [stack.enter_context(Shard.open(path)) for path in shards]


@pytest.fixture
def servers(opened: list[Shard]) -> Iterator[list[Server]]:
    with ExitStack() as stack:
        yield [stack.enter_context(cotra_rdma.serve(shard, transports=HERE)) for shard in opened]


@pytest.fixture
def addresses(servers: list[Server]) -> list[str]:
    return [server.address for server in servers]


def in_process(opened: list[Shard], queries: Floats, k: int, ef: int) -> tuple[npt.NDArray[np.int64], Floats]:
    answers = [shard.search(queries, k, ef) for shard in opened]
    ids, distances, _ = merge(np.stack([a[0] for a in answers]), np.stack([a[1] for a in answers]))
    return ids, distances


class TestPaths:
    @pytest.mark.parametrize("transport", HERE)
    @pytest.mark.parametrize("n_threads", [1, 3])
    def test_every_path_gives_the_same_bits(
        self, opened: list[Shard], addresses: list[str], queries: Floats, transport: str, n_threads: int
    ) -> None:
        ids, distances = in_process(opened, queries, 10, 50)
        with cotra_rdma.connect(addresses, transport=transport) as cluster:
            result = cluster.search(queries, k=10, ef=50, n_threads=n_threads)
        assert result.transports == (transport, transport)
        np.testing.assert_array_equal(result.ids, ids)
        np.testing.assert_array_equal(result.distances.view(np.uint32), distances.view(np.uint32))
        assert result.coverage == 1.0

    def test_auto_takes_shm_on_the_same_host_and_says_why_not_verbs(
        self, addresses: list[str], queries: Floats, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.INFO, "cotra_rdma"), cotra_rdma.connect(addresses) as cluster:
            assert cluster.transports == ("shm", "shm")
            assert all("not offered" in reasons["verbs"] for reasons in cluster.passed_over)
            for _ in range(3):
                assert cluster.search(queries[:5], k=3).transports == ("shm", "shm")
        assert len([record for record in caplog.records if "passed over" in record.message]) == len(addresses)

    def test_auto_falls_to_rpc_for_the_shard_that_has_nothing_better(
        self, opened: list[Shard], queries: Floats
    ) -> None:
        with (
            cotra_rdma.serve(opened[0], transports=("rpc",)) as first,
            cotra_rdma.serve(opened[1], transports=HERE) as second,
            cotra_rdma.connect([first.address, second.address]) as cluster,
        ):
            result = cluster.search(queries, k=10, ef=50)
            assert result.transports == ("rpc", "shm")
            assert set(cluster.passed_over[0]) == {"verbs", "shm"}
            np.testing.assert_array_equal(result.ids, in_process(opened, queries, 10, 50)[0])

    @pytest.mark.parametrize(("name", "kind"), [("verbs", VerbsUnavailableError), ("shm", TransportError)])
    def test_a_path_asked_for_by_name_is_had_or_is_an_error(
        self, opened: list[Shard], name: str, kind: type[Exception]
    ) -> None:
        with (
            cotra_rdma.serve(opened[0], transports=("rpc",)) as server,
            pytest.raises(kind, match=r"does not offer|no verbs on this side|kernel offers no verbs|libibverbs"),
        ):
            cotra_rdma.connect(server.address, transport=name)

    @pytest.mark.parametrize("n_threads", [1, 2])
    def test_a_cache_of_records_changes_what_is_read_and_no_answer(
        self, opened: list[Shard], addresses: list[str], queries: Floats, n_threads: int
    ) -> None:
        images = sum(shard.info.image_bytes for shard in opened)
        with cotra_rdma.connect(addresses, transport="shm") as cluster:
            expected = cluster.search(queries, k=10, ef=50)
            views = cluster.cached_bytes
            assert cluster.record_caches == (None, None)
        with cotra_rdma.connect(addresses, transport="shm", cache_bytes=images // 5) as cluster:
            kept = [cache.nbytes for cache in cluster.record_caches if cache is not None]
            assert len(kept) == 2
            assert sum(kept) == cluster.cached_bytes - views <= images // 5
            for _ in range(3):
                result = cluster.search(queries, k=10, ef=50, n_threads=n_threads)
                np.testing.assert_array_equal(result.ids, expected.ids)
                np.testing.assert_array_equal(result.distances.view(np.uint32), expected.distances.view(np.uint32))
                all_of_it = result.stats["reads"] + result.stats["cached_records"]
                np.testing.assert_array_equal(all_of_it, expected.stats["reads"])
            saved = result.stats["cached_records"].sum()
            assert saved > 0.1 * expected.stats["reads"].sum()
            cluster.clear_caches()
            assert cluster.search(queries[:1], k=10, ef=50).stats["cached_records"].sum() == 0

    def test_a_cache_without_room_or_use(self, opened: list[Shard], addresses: list[str], queries: Floats) -> None:
        with pytest.raises(InvalidInputError, match=r"shard 0 \(.*\): a cache of \d+ bytes holds no record"):
            cotra_rdma.connect(addresses, transport="shm", cache_bytes=1000)
        with pytest.raises(InvalidInputError, match="cache_bytes must be 0 or more"):
            cotra_rdma.connect(addresses, cache_bytes=-1)
        with cotra_rdma.connect(addresses, transport="rpc", cache_bytes=1000) as cluster:
            assert cluster.record_caches == (None, None)
            assert (cluster.search(queries[:5], k=3).stats["cached_records"] == 0).all()

    def test_an_owner_without_rpc_refuses_it(self, opened: list[Shard]) -> None:
        with cotra_rdma.serve(opened[0], transports=("shm",)) as server:
            assert server.transports == ("shm",)
            with pytest.raises(TransportError, match="does not offer rpc"):
                cotra_rdma.connect(server.address, transport="rpc")

    def test_a_modelled_fabric_changes_nothing_but_time(self, addresses: list[str], queries: Floats) -> None:
        with cotra_rdma.connect(addresses) as plain:
            expected = plain.search(queries, k=10, ef=40)
        with cotra_rdma.connect(addresses, fabric=FabricModel(round_trip_s=20e-6)) as cluster:
            result = cluster.search(queries, k=10, ef=40)
        np.testing.assert_array_equal(result.ids, expected.ids)
        np.testing.assert_array_equal(result.stats["reads"], expected.stats["reads"])

    def test_connecting_costs_little(self, opened: list[Shard], addresses: list[str]) -> None:
        with cotra_rdma.connect(addresses) as cluster:
            assert cluster.cached_bytes <= 0.05 * sum(shard.info.image_bytes for shard in opened)
            assert len(cluster) == sum(map(len, opened))

    def test_what_rpc_costs_is_one_message(self, addresses: list[str], queries: Floats) -> None:
        with cotra_rdma.connect(addresses, transport="rpc") as cluster:
            stats = cluster.search(queries, k=10).stats
        assert (stats["reads"] == 0).all()
        assert (stats["rounds"] == 1).all()

    def test_a_ping_is_a_real_read(self, addresses: list[str]) -> None:
        with cotra_rdma.connect(addresses, transport="shm") as cluster:
            assert [len(latencies) for latencies in cluster.ping(10)] == [10, 10]
        with cotra_rdma.connect(addresses, transport="rpc") as cluster:
            assert [len(latencies) for latencies in cluster.ping(10)] == [0, 0]


class TestSearch:
    def test_an_id_in_two_shards_is_returned_once(self, opened: list[Shard], queries: Floats) -> None:
        with (
            cotra_rdma.serve(opened[0], transports=HERE) as one,
            cotra_rdma.serve(opened[0], transports=HERE) as two,
            cotra_rdma.connect([one.address, two.address]) as cluster,
        ):
            result = cluster.search(queries, k=10, ef=50)
        np.testing.assert_array_equal(result.ids, in_process(opened[:1], queries, 10, 50)[0])
        assert (result.shards == 0).all()

    def test_more_answers_than_vectors(self, queries: Floats) -> None:
        with (
            Shard.build(queries[:3]) as shard,
            cotra_rdma.serve(shard, transports=HERE) as server,
            cotra_rdma.connect(server.address) as cluster,
        ):
            result = cluster.search(queries[0], k=8)
        assert sorted(result.ids[0][:3].tolist()) == [0, 1, 2]
        assert (result.ids[0][3:] == -1).all()
        assert np.isinf(result.distances[0][3:]).all()
        assert (result.shards[0][3:] == -1).all()

    def test_as_hnswlib(self, words: Floats, queries: Floats) -> None:
        index = hnswlib.Index(space="l2", dim=words.shape[1])
        index.init_index(2000, M=16, ef_construction=100)
        index.add_items(words[:2000], num_threads=1)
        index.set_ef(200)
        with (
            Shard.from_hnswlib(index) as shard,
            cotra_rdma.serve(shard, transports=HERE) as server,
            cotra_rdma.connect(server.address) as cluster,
        ):
            cluster.set_ef(200)
            ours, theirs = cluster.knn_query(queries, k=5), index.knn_query(queries, k=5)
            assert (ours[0].dtype, ours[1].dtype) == (theirs[0].dtype, theirs[1].dtype)
            assert (ours[0] == theirs[0]).mean() > 0.98
            assert np.isclose(ours[1], theirs[1], rtol=1e-5).mean() > 0.98
            with pytest.raises(InvalidInputError, match="fewer than"):
                cluster.knn_query(queries[:1], k=2001)

    def test_a_large_batch_goes_in_parts_over_rpc(
        self, opened: list[Shard], addresses: list[str], queries: Floats, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(search, "_MAX_BATCH_BYTES", 20_000)
        with cotra_rdma.connect(addresses, transport="rpc") as cluster:
            result = cluster.search(queries, k=10, ef=50)
        np.testing.assert_array_equal(result.ids, in_process(opened, queries, 10, 50)[0])

    @pytest.mark.parametrize("transport", HERE)
    def test_from_many_threads_at_once(
        self, opened: list[Shard], addresses: list[str], queries: Floats, transport: str
    ) -> None:
        expected = in_process(opened, queries, 10, 50)[0]
        wrong: list[object] = []
        with cotra_rdma.connect(addresses, transport=transport) as cluster:

            def work() -> None:
                for _ in range(3):
                    if (cluster.search(queries, k=10, ef=50).ids != expected).any():
                        wrong.append(1)

            threads = [threading.Thread(target=work) for _ in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            assert not any(thread.is_alive() for thread in threads)
        assert wrong == []

    @pytest.mark.parametrize("transport", HERE)
    @pytest.mark.parametrize(
        ("change", "why"),
        [
            ({"queries": np.zeros((1, 99), np.float32)}, "queries must be"),
            ({"queries": np.full((2, 100), np.nan, np.float32)}, "query 0 holds NaN"),
            ({"queries": np.full((2, 100), np.inf, np.float32)}, "query 0 holds NaN or infinity"),
            ({"queries": np.array([["a"] * 100])}, "real numbers"),
            ({"k": 0}, "k must be a whole number"),
            ({"k": 65}, "k must be a whole number"),
            ({"beam": 0}, "beam"),
            ({"n_threads": 0}, "n_threads"),
            ({"timeout_s": -1}, "timeout_s"),
            ({"inflight": -1}, "inflight"),
            ({"beam": 10**10}, "beam"),
        ],
    )
    def test_bad_input_is_said_and_nothing_is_lost(
        self, addresses: list[str], queries: Floats, transport: str, change: dict[str, object], why: str
    ) -> None:
        with cotra_rdma.connect(addresses, transport=transport) as cluster:
            good = {"queries": queries[:1], "k": 5, "ef": 64, "beam": 4, "n_threads": 1}
            with pytest.raises((InvalidInputError, PeerError), match=why):
                cluster.search(**{**good, **change})
            assert cluster.search(**good).ids.shape == (1, 5)

    def test_no_queries_no_answers(self, addresses: list[str]) -> None:
        for transport in HERE:
            with cotra_rdma.connect(addresses, transport=transport) as cluster:
                assert cluster.search(np.empty((0, 100), np.float32), k=3).ids.shape == (0, 3)


class TestScope:
    """Filters, subsets of the shards, and shards that fail."""

    @pytest.mark.parametrize("share", [0.5, 0.02])
    def test_filters_give_the_same_on_every_path(
        self, opened: list[Shard], addresses: list[str], queries: Floats, share: float
    ) -> None:
        allowed = [np.random.default_rng(8).random(2000) < share, None]
        answers = [shard.search(queries, 10, 50, rows=rows) for shard, rows in zip(opened, allowed, strict=True)]
        ids, distances, _ = merge(np.stack([a[0] for a in answers]), np.stack([a[1] for a in answers]))
        for transport in HERE:
            with cotra_rdma.connect(addresses, transport=transport) as cluster:
                result = cluster.search(queries, k=10, ef=50, filters=allowed)
            np.testing.assert_array_equal(result.ids, ids)
            np.testing.assert_array_equal(result.distances, distances)

    @pytest.mark.parametrize("transport", HERE)
    @pytest.mark.parametrize("n_threads", [1, 3])
    def test_each_query_asks_its_own_shards(
        self, opened: list[Shard], addresses: list[str], queries: Floats, transport: str, n_threads: int
    ) -> None:
        mask = np.random.default_rng(9).random((len(queries), 2)) < 0.5
        alone = [shard.search(queries, 10, 50) for shard in opened]
        labels = np.stack([a[0] for a in alone])
        labels[~mask.T] = -1
        ids = merge(labels, np.stack([a[1] for a in alone]))[0]
        with cotra_rdma.connect(addresses, transport=transport) as cluster:
            result = cluster.search(queries, k=10, ef=50, shards=mask, n_threads=n_threads)
        np.testing.assert_array_equal(result.ids, ids)
        np.testing.assert_array_equal(result.asked, mask.sum(axis=1))
        if transport == "shm":
            assert (result.stats["reads"][result.asked == 0] == 0).all()

    def test_bad_scopes(self, addresses: list[str], queries: Floats) -> None:
        with cotra_rdma.connect(addresses) as cluster:
            with pytest.raises(InvalidInputError, match="1 filters for 2 shards"):
                cluster.search(queries, filters=[None])
            with pytest.raises(InvalidInputError, match="a filter is bool"):
                cluster.search(queries, filters=[np.ones(7, bool), None])
            with pytest.raises(InvalidInputError, match="shards must be bool"):
                cluster.search(queries, shards=np.ones((1, 2), bool))

    def test_a_partial_answer_is_asked_for_or_is_an_error_that_holds_it(
        self, opened: list[Shard], shards: list[Path], queries: Floats
    ) -> None:
        with (
            OwnerProcess([shards[0]], transports=HERE) as stays,
            OwnerProcess([shards[1]], transports=HERE) as dies,
            cotra_rdma.connect([*stays.addresses, *dies.addresses], transport="rpc") as cluster,
        ):
            os.kill(dies.pid, signal.SIGKILL)
            os.waitid(os.P_PID, dies.pid, os.WEXITED | os.WNOWAIT)
            with pytest.raises(PartialResultError, match=r"1 of 2 shards failed: shard 1") as caught:
                cluster.search(queries, k=10, ef=50, timeout_s=55)
            partial = cluster.search(queries, k=10, ef=50, timeout_s=55, allow_partial=True)
        for result in (partial, caught.value.result):
            assert isinstance(result, cotra_rdma.SearchResult)
            assert result.coverage == 0.5
            assert list(result.failures) == [1]
            assert isinstance(result.failures[1], TransportError)
            np.testing.assert_array_equal(result.ids, opened[0].search(queries, 10, 50)[0])

    def test_a_one_sided_shard_that_fails_is_left_out(
        self, opened: list[Shard], addresses: list[str], queries: Floats
    ) -> None:
        with cotra_rdma.connect(addresses, transport="shm") as cluster:
            second = cluster._connections[1]
            second._fabric = FaultyFabric(fail_after_reads=20, fail_status=-10, fail_wc_status=12)
            second._first = None  # the channel that connect made, without the fabric
            with pytest.raises(TransportError) as caught:
                cluster.search(queries, k=10, ef=50)
            assert caught.value.shard == 1
            result = cluster.search(queries, k=10, ef=50, allow_partial=True)
            assert result.coverage == 0.5
            assert result.failures[1].shard == 1
            for found, shards_of, near in zip(
                result.ids, result.shards, opened[0].search(queries, 10, 50)[0], strict=True
            ):
                left = found[shards_of == 0]  # beside them, what was read of the other before it failed
                np.testing.assert_array_equal(left, near[: len(left)])
            again = cluster.search(queries, k=10, ef=50, allow_partial=True)
            np.testing.assert_array_equal(again.ids, opened[0].search(queries, 10, 50)[0])


class TestConnecting:
    def test_nobody_there(self) -> None:
        with pytest.raises(TransportError, match=r"shard 0 \(127.0.0.1:1\) cannot be reached") as caught:
            cotra_rdma.connect("127.0.0.1:1")
        assert caught.value.shard == 0

    def test_no_address_and_no_such_transport(self) -> None:
        with pytest.raises(InvalidInputError, match="at least one address"):
            cotra_rdma.connect([])
        with pytest.raises(InvalidInputError, match="transport must be one of"):
            cotra_rdma.connect("127.0.0.1:1", transport="tcp")
        with pytest.raises(InvalidInputError, match="HOST:PORT"):
            cotra_rdma.connect("nonsense")

    @pytest.mark.parametrize(("change", "what"), [({"metric": "l2"}, "metric"), ({"dim": 50}, "dim")])
    def test_shards_that_do_not_belong_together(
        self, opened: list[Shard], words: Floats, change: dict[str, object], what: str
    ) -> None:
        rows = words[:50, : int(str(change.get("dim", 100)))]
        with (
            Shard.build(rows, metric=str(change.get("metric", "cosine"))) as other,
            cotra_rdma.serve(opened[0], transports=HERE) as one,
            cotra_rdma.serve(other, transports=HERE) as two,
            pytest.raises(InvalidInputError, match=f"mixed shards: .* has {what}") as caught,
        ):
            cotra_rdma.connect([one.address, two.address])
        assert caught.value.shard == 1

    def test_a_server_that_can_offer_nothing_does_not_start(
        self, opened: list[Shard], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def no_device(_name: str | None) -> None:
            raise VerbsUnavailableError("none here")

        monkeypatch.setattr(server_module, "Device", no_device)
        with pytest.raises(VerbsUnavailableError, match=r"nothing can be offered.*none here"):
            cotra_rdma.serve(opened[0], transports=("verbs",))

    def test_what_is_no_owner_is_a_deadline_with_a_hint(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as mute:
            port = mute.getsockname()[1]
            with pytest.raises(DeadlineError, match="is it an owner of cotra-rdma"):
                cotra_rdma.connect(f"127.0.0.1:{port}", timeout_s=0.2)

    def test_certificates(self, opened: list[Shard], queries: Floats, tmp_path: Path) -> None:
        owner, reader = make_certificate(tmp_path, "owner", ["127.0.0.1"]), make_certificate(tmp_path, "reader")
        with cotra_rdma.serve(opened[0], transports=HERE, tls=owner) as server:
            for transport in HERE:
                with cotra_rdma.connect(server.address, transport=transport, tls=reader) as cluster:
                    assert cluster.search(queries, k=3).ids.shape == (200, 3)
            with pytest.raises(TransportError, match="does it want a certificate"):
                cotra_rdma.connect(server.address)

    def test_serving_bad_input(self, opened: list[Shard]) -> None:
        with pytest.raises(InvalidInputError, match="transports must be some of"):
            cotra_rdma.serve(opened[0], transports=("tcp",))
        with pytest.raises(InvalidInputError, match="transports must be some of"):
            cotra_rdma.serve(opened[0], transports=())
        with pytest.raises(TransportError, match="cannot listen on"):
            cotra_rdma.serve(opened[0], "192.0.2.1:0", transports=HERE)  # RFC 5737: nobody's address

    def test_closed_is_closed(self, addresses: list[str], queries: Floats) -> None:
        cluster = cotra_rdma.connect(addresses)
        cluster.close()
        cluster.close()
        with pytest.raises(ClosedError):
            cluster.search(queries)


class TestOwnersThatGoAway:
    def test_over_rpc_it_is_an_error_that_names_the_shard(self, shards: list[Path], queries: Floats) -> None:
        with (
            OwnerProcess([shards[0]], transports=HERE) as stays,
            OwnerProcess([shards[1]], transports=HERE) as dies,
            cotra_rdma.connect([*stays.addresses, *dies.addresses], transport="rpc") as cluster,
        ):
            assert cluster.search(queries, k=3).coverage == 1.0
            os.kill(dies.pid, signal.SIGKILL)
            os.waitid(os.P_PID, dies.pid, os.WEXITED | os.WNOWAIT)
            with pytest.raises(TransportError, match=r"shard 1 .* cannot be reached") as caught:
                cluster.search(queries, k=3, timeout_s=55)  # known long before
            assert caught.value.shard == 1
            assert not isinstance(caught.value.__cause__, DeadlineError)

    def test_over_rpc_an_owner_killed_during_a_call_is_known_at_once(self, shards: list[Path], queries: Floats) -> None:
        with (
            OwnerProcess([shards[0]], transports=HERE) as owner,
            cotra_rdma.connect(owner.addresses, transport="rpc") as cluster,
            ThreadPoolExecutor(1) as pool,
        ):
            stop_process(owner.pid)
            os.waitid(os.P_PID, owner.pid, os.WSTOPPED)
            call = pool.submit(cluster.search, queries, k=3, timeout_s=55)
            os.kill(owner.pid, signal.SIGKILL)
            with pytest.raises(TransportError, match=r"shard 0 .* cannot be reached") as caught:
                call.result(50)
            assert not isinstance(caught.value, DeadlineError)

    def test_memory_that_was_mapped_outlives_its_owner(self, shards: list[Path], queries: Floats) -> None:
        with (
            OwnerProcess([shards[0]], transports=HERE) as owner,
            cotra_rdma.connect(owner.addresses, transport="shm") as cluster,
        ):
            expected = cluster.search(queries, k=3).ids
            os.kill(owner.pid, signal.SIGKILL)
            os.waitid(os.P_PID, owner.pid, os.WEXITED | os.WNOWAIT)
            np.testing.assert_array_equal(cluster.search(queries, k=3).ids, expected)

    def test_a_stopped_owner_is_read_and_uses_no_cpu(self, shards: list[Path], queries: Floats) -> None:
        with (
            OwnerProcess([shards[0]], transports=HERE) as owner,
            cotra_rdma.connect(owner.addresses, transport="shm") as cluster,
        ):
            try:
                stop_process(owner.pid)
                os.waitpid(owner.pid, os.WUNTRACED)
                before = owner.cpu_s()
                assert cluster.search(queries, k=3).ids.shape == (200, 3)
                assert owner.cpu_s() == before
            finally:
                os.kill(owner.pid, signal.SIGCONT)
