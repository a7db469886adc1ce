"""`serve` and `connect` over verbs in one process: answers, queue pairs, failures on either side, and every order of closing."""

from __future__ import annotations

import errno
import gc
import itertools
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from cotra_rdma import (
    Cluster,
    CompletionError,
    CotraError,
    CoTraRdma,
    DeadlineError,
    DeviceNotFoundError,
    FabricModel,
    MemlockError,
    PeerError,
    QueuePairOptions,
    SearchResult,
    Server,
    Shard,
    Stop,
    TransportError,
    VerbsUnavailableError,
    connect,
    serve,
)
from helpers.begun import Signaller, waited
from helpers.fakeverbs import Fake

Floats = npt.NDArray[np.float32]


@pytest.fixture
def servers(fake: Fake, shards: list[Path]) -> Iterator[list[Server]]:
    with ExitStack() as stack:
        yield [stack.enter_context(serve(stack.enter_context(Shard.open(path, verify=False)))) for path in shards]


@pytest.fixture
def addresses(servers: list[Server]) -> list[str]:
    return [server.address for server in servers]


def assert_same(one: SearchResult, other: SearchResult) -> None:
    np.testing.assert_array_equal(one.ids, other.ids)
    np.testing.assert_array_equal(one.shards, other.shards)
    np.testing.assert_array_equal(one.distances.view(np.uint32), other.distances.view(np.uint32))
    for name in ("reads", "rounds", "expansions", "cache_hits", "read_bytes"):
        np.testing.assert_array_equal(one.stats[name], other.stats[name])


# ---- the seam ----


def test_regions_are_exposed_and_walked(
    fake: Fake, servers: list[Server], addresses: list[str], queries: Floats
) -> None:
    exposed = [server.exposed_region() for server in servers]
    assert None not in exposed
    assert [CoTraRdma(server=server).exposed_region() for server in servers] == exposed
    with (
        connect(addresses, "verbs") as cluster,
        connect(addresses[:1], "verbs") as one,
        CoTraRdma(cluster) as algorithm,
    ):
        assert cluster.regions == tuple(exposed)
        assert CoTraRdma(one).exposed_region() == exposed[0]
        assert algorithm.exposed_region() is None  # of two shards, which?
        result, expected = algorithm.search(queries), cluster.search(queries)
        assert (algorithm.by_rpc, result.transports, result.coverage) == ((), ("verbs", "verbs"), 1.0)
        np.testing.assert_array_equal(result.ids, expected.ids)
        np.testing.assert_array_equal(result.stats["reads"], expected.stats["reads"])


# ---- answers and queue pairs ----


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("late", [0, 5])
def test_same_answers_as_shm(
    fake: Fake, servers: list[Server], addresses: list[str], queries: Floats, n_threads: int, late: int
) -> None:
    assert all(server.transports == ("verbs", "shm", "rpc") for server in servers)
    with connect(addresses, "shm") as cluster:
        expected = cluster.search(queries)
    fake.set(LATE=late)
    with connect(addresses, "verbs") as cluster:
        assert cluster.transports == ("verbs", "verbs")
        for _ in range(2):
            result = cluster.search(queries, n_threads=n_threads)
            assert result.transports == ("verbs", "verbs")
            assert result.coverage == 1.0
            assert_same(result, expected)
        assert all(1 <= server.n_queue_pairs <= n_threads for server in servers)
    assert [server.n_queue_pairs for server in servers] == [0, 0]


def test_auto_takes_verbs(servers: list[Server], addresses: list[str], queries: Floats) -> None:
    with connect(addresses) as cluster:
        assert cluster.transports == ("verbs", "verbs")
        assert cluster.passed_over == ({}, {})
        latencies = cluster.ping(10)
        assert [len(each) for each in latencies] == [10, 10]
        assert "over verbs" in repr(cluster)
    assert [server.n_queue_pairs for server in servers] == [0, 0]


def test_the_region_is_told(fake: Fake, servers: list[Server], shards: list[Path]) -> None:
    for server, path in zip(servers, shards, strict=True):
        region = server.exposed_region()
        assert region is not None
        assert region.len == path.stat().st_size
        assert fake.access(region.rkey) == 1 << 2  # IBV_ACCESS_REMOTE_READ


def test_a_model_over_verbs(servers: list[Server], addresses: list[str], queries: Floats) -> None:
    with connect(addresses, "shm") as cluster:
        expected = cluster.search(queries[:20])
    with connect(addresses, "verbs", fabric=FabricModel(round_trip_s=3e-6)) as cluster:
        assert_same(cluster.search(queries[:20]), expected)


def test_options_on_both_sides(fake: Fake, shards: list[Path], queries: Floats) -> None:
    options = QueuePairOptions(send_depth=8, max_rd_atomic=2)
    with (
        Shard.open(shards[0]) as shard,
        serve(shard, gid_index=0, queue_pair=options) as server,
        connect(server.address, "verbs", gid_index=1, queue_pair=options) as cluster,
        connect(server.address, "shm") as other,
    ):
        assert_same(cluster.search(queries[:20]), other.search(queries[:20]))


# ---- failures ----


def test_an_error_completion_names_the_shard(
    fake: Fake, servers: list[Server], addresses: list[str], queries: Floats
) -> None:
    with connect(addresses, "verbs") as cluster:
        expected = cluster.search(queries)
        for status in (9, 10, 11, 12):
            fake.complete(50, status)
            with pytest.raises(CompletionError) as caught:
                cluster.search(queries)
            assert caught.value.wc_status == status
            assert caught.value.shard in (0, 1)
            assert addresses[caught.value.shard] in str(caught.value)
            fake.heal()
            assert_same(cluster.search(queries), expected)
    assert [server.n_queue_pairs for server in servers] == [0, 0]


@pytest.mark.parametrize(("call", "nth"), [("post_send", 1), ("post_send", 40), ("poll_cq", 10)])
def test_a_queue_pair_that_breaks(
    fake: Fake, servers: list[Server], addresses: list[str], queries: Floats, call: str, nth: int
) -> None:
    with connect(addresses, "verbs") as cluster:
        expected = cluster.search(queries)
        fake.fail(call, errno.EIO, nth=nth)
        with pytest.raises(TransportError, match=f"ibv_{call}") as caught:
            cluster.search(queries)
        assert caught.value.shard in (0, 1)
        fake.heal()
        assert_same(cluster.search(queries), expected)
    assert [server.n_queue_pairs for server in servers] == [0, 0]


def test_reads_that_never_complete(fake: Fake, servers: list[Server], addresses: list[str], queries: Floats) -> None:
    with connect(addresses, "verbs") as cluster:
        expected = cluster.search(queries)
        fake.complete(100, "never")
        with pytest.raises(DeadlineError, match=r"shard \d .*: a READ did not complete within \d+ ms"):
            cluster.search(queries, timeout_s=0.5)
        fake.heal()
        assert_same(cluster.search(queries), expected)
    assert [server.n_queue_pairs for server in servers] == [0, 0]


@pytest.mark.parametrize("n_threads", [1, 2])
def test_ctrl_c(fake: Fake, servers: list[Server], addresses: list[str], queries: Floats, n_threads: int) -> None:
    """Engines that were searching are gone, with their queue pairs: no READ of theirs can land in the next search's."""
    many = np.tile(queries, (200, 1))
    with connect(addresses, "verbs") as cluster:
        expected, stop = cluster.search(queries), Stop()
        with Signaller(lambda: stop.memory[1] > 0), pytest.raises(KeyboardInterrupt):
            cluster.search(many, ef=1024, n_threads=n_threads, stop=stop)
        assert stop.n_answered < len(many) / 2
        waited(lambda: [server.n_queue_pairs for server in servers] == [0, 0])
        assert_same(cluster.search(queries), expected)
    assert [server.n_queue_pairs for server in servers] == [0, 0]


def test_an_owner_that_closes_under_its_readers(
    fake: Fake, servers: list[Server], addresses: list[str], queries: Floats
) -> None:
    cluster = connect(addresses, "verbs")
    cluster.search(queries[:10])
    servers[1].close()
    with pytest.raises(CompletionError, match="the owner does not answer") as caught:
        cluster.search(queries[:10])
    assert caught.value.shard == 1
    assert addresses[1] in str(caught.value)
    cluster.close()


READER_FAULTS: list[tuple[str, int, int | None, type[CotraError]]] = [
    ("get_device_list", errno.ENOSYS, None, VerbsUnavailableError),
    ("open_device", errno.EACCES, None, DeviceNotFoundError),
    ("query_device", errno.EIO, None, DeviceNotFoundError),
    ("alloc_pd", errno.ENOMEM, None, CotraError),
    ("reg_mr", errno.ENOMEM, None, MemlockError),
    ("query_gid", errno.EIO, None, DeviceNotFoundError),
    ("create_cq", errno.ENOMEM, 1, CotraError),
    ("create_qp", errno.ENOMEM, 1, CotraError),
    ("modify_qp.INIT", errno.EINVAL, 1, CotraError),
    ("modify_qp.RTR", errno.ENETUNREACH, 2, CotraError),
    ("modify_qp.RTS", errno.EINVAL, 2, CotraError),
    ("post_send", errno.EIO, None, TransportError),
    ("poll_cq", errno.EIO, None, TransportError),
]


@pytest.mark.parametrize(("call", "error", "nth", "kind"), READER_FAULTS, ids=[fault[0] for fault in READER_FAULTS])
def test_a_reader_without_verbs_falls_back_and_says_so(
    fake: Fake,
    servers: list[Server],
    addresses: list[str],
    queries: Floats,
    call: str,
    error: int,
    nth: int | None,
    kind: type[CotraError],
) -> None:
    fake.fail(call, error, nth=nth)
    with pytest.raises(CotraError, match=f"ibv_{call.partition('.')[0]}") as caught:
        connect(addresses[0], "verbs")
    assert type(caught.value) is kind
    fake.reset()
    with connect(addresses[0]) as cluster:
        assert cluster.transports == ("shm",)
        assert f"ibv_{call.partition('.')[0]}" in cluster.passed_over[0]["verbs"]
        assert cluster.search(queries[:3]).transports == ("shm",)
    fake.heal()
    assert servers[0].n_queue_pairs == 0


@pytest.mark.parametrize("call", ["create_cq", "create_qp", "modify_qp.INIT", "modify_qp.RTR", "modify_qp.RTS"])
def test_an_owner_that_can_give_no_queue_pair(
    fake: Fake, servers: list[Server], addresses: list[str], queries: Floats, call: str
) -> None:
    nth = (
        1 if call in ("modify_qp.RTR", "modify_qp.RTS") else 2
    )  # the owner's: made after the reader's, connected before
    fake.fail(call, errno.EINVAL, nth=nth)
    with pytest.raises(PeerError, match=rf"shard 0 \({addresses[0]}\): ibv_{call.partition('.')[0]}"):
        connect(addresses[0], "verbs")
    fake.reset()
    with connect(addresses[0]) as cluster:
        assert cluster.transports == ("shm",)
        assert f"ibv_{call.partition('.')[0]}" in cluster.passed_over[0]["verbs"]
    assert servers[0].n_queue_pairs == 0


OWNER_FAULTS = [
    fault for fault in READER_FAULTS if fault[0] not in ("modify_qp.RTR", "modify_qp.RTS", "post_send", "poll_cq")
]


@pytest.mark.parametrize(("call", "error", "nth", "kind"), OWNER_FAULTS, ids=[fault[0] for fault in OWNER_FAULTS])
def test_an_owner_without_verbs_offers_the_rest(
    fake: Fake, shards: list[Path], queries: Floats, call: str, error: int, nth: int | None, kind: type[CotraError]
) -> None:
    fake.fail(call, error, nth=nth)
    with Shard.open(shards[0]) as shard:
        with serve(shard) as server:
            fake.heal()
            assert fake.live_objects() == ""
            assert server.transports == ("shm", "rpc")
            assert server.exposed_region() is None
            assert f"ibv_{call.partition('.')[0]}" in server.unavailable["verbs"]
            with connect(server.address) as cluster:
                assert cluster.transports == ("shm",)
                assert server.unavailable["verbs"] in cluster.passed_over[0]["verbs"]
            with pytest.raises(VerbsUnavailableError, match="does not offer verbs: ibv_"):
                connect(server.address, "verbs")
        fake.fail(call, error, nth=nth)
        with pytest.raises(kind, match=f"ibv_{call.partition('.')[0]}"):
            serve(shard, device="fake0")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"DEVICES": ""}, r"no verbs device has an active port \(devices: none\)"),
        ({"PORT_STATE": 1}, r"no verbs device has an active port \(devices: fake0\)"),
        ({"GIDS": "::"}, "port 1 of fake0 has no GID"),
    ],
)
def test_no_usable_device(
    fake: Fake, servers: list[Server], addresses: list[str], shards: list[Path], settings: dict[str, object], says: str
) -> None:
    fake.set(**settings)
    with Shard.open(shards[0]) as shard, serve(shard) as server:
        assert server.exposed_region() is None
        with pytest.raises(VerbsUnavailableError, match=says):
            connect(server.address, "verbs")
        with connect(server.address) as cluster:
            assert cluster.transports == ("shm",)
            assert "does not offer verbs" in cluster.passed_over[0]["verbs"]
    with pytest.raises(VerbsUnavailableError, match=says):  # an owner that has verbs, a reader that has not
        connect(addresses[0], "verbs")
    with connect(addresses[0]) as cluster:
        assert cluster.transports == ("shm",)


def test_a_device_that_is_not_there(
    fake: Fake, servers: list[Server], addresses: list[str], shards: list[Path]
) -> None:
    with Shard.open(shards[0]) as shard, pytest.raises(DeviceNotFoundError, match="named mlx5_0"):
        serve(shard, device="mlx5_0")
    for transport in ("auto", "verbs"):
        with pytest.raises(DeviceNotFoundError, match="named mlx5_0"):
            connect(addresses, transport, device="mlx5_0")


# ---- the end ----


@pytest.mark.parametrize("order", list(itertools.permutations(["cluster", "server", "shard"])), ids="-".join)
def test_any_order_of_closing(fake: Fake, shards: list[Path], queries: Floats, order: tuple[str, ...]) -> None:
    shard = Shard.open(shards[0])
    server = serve(shard)
    cluster = connect(server.address, "verbs")
    cluster.search(queries[:10], n_threads=3)
    parts: dict[str, Shard | Server | Cluster] = {"shard": shard, "server": server, "cluster": cluster}
    for name in order:
        parts[name].close()
        parts[name].close()
    assert server.n_queue_pairs == 0
    assert fake.live_objects() == ""


def test_a_process_that_closes_nothing_ends_well(fake: Fake, shards: list[Path]) -> None:
    """Only at its end are the objects finalized, in any order, threads and all."""
    program = """
import sys
import numpy as np
from cotra_rdma import Shard, connect, serve
server = serve(Shard.open(sys.argv[1]))
cluster = connect(server.address, "verbs")
print(cluster.search(np.ones(100, np.float32), n_threads=3).transports)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, shards[0]],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "('verbs',)\n", "")


@pytest.mark.filterwarnings("ignore:Unclosed socket:ResourceWarning")
def test_dropped_without_closing(fake: Fake, shards: list[Path], queries: Floats) -> None:
    shard = Shard.open(shards[0])
    server = serve(shard)
    cluster = connect(server.address, "verbs")
    cluster.search(queries[:10], n_threads=3)
    held = server.n_queue_pairs
    del cluster
    gc.collect()
    assert server.n_queue_pairs == held  # nobody gave them back: they go with the lease, or with the server
    server.close()
    shard.close()
    assert server.n_queue_pairs == 0


def test_leases_are_renewed(servers: list[Server], addresses: list[str]) -> None:
    with connect(addresses, "verbs", timeout_s=0.5) as cluster:
        cluster.renew_leases()
        servers[0].close()
        cluster.renew_leases()
