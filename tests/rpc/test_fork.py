"""A child of `fork`: what its parent opened says so at once, and goes on in the parent."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pytest

import cotra_rdma
from cotra_rdma import ClosedError, ScatterGather, Server, Shard

Floats = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    vectors = np.random.default_rng(0).standard_normal((500, 16)).astype(np.float32)
    with Shard.build(vectors) as shard, cotra_rdma.serve(shard, transports=("shm", "rpc")) as server:
        yield server


def in_child(work: Callable[[], object]) -> int:
    """The exit status of a child that does it: 0 where it is done, 1 where it raised."""
    child = os.fork()
    if not child:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc(file=sys.stderr)
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("transport", ["shm", "rpc"])
def test_a_cluster_of_the_parent(server: Server, transport: str) -> None:
    query = np.zeros((1, 16), np.float32)
    with cotra_rdma.connect(server.address, transport) as cluster:
        wanted = cluster.search(query).ids

        def work() -> None:
            for use in (lambda: cluster.search(query), cluster.revive, cluster.follow):
                with pytest.raises(ClosedError, match="forked from"):
                    use()
            cluster.close()  # closes nothing
            server.close()
            with cotra_rdma.connect(server.address, transport) as own:
                np.testing.assert_array_equal(own.search(query).ids, wanted)

        assert in_child(work) == 0
        np.testing.assert_array_equal(cluster.search(query).ids, wanted)


def test_scatter_gather_of_the_parent(server: Server) -> None:
    query = np.zeros((1, 16), np.float32)
    with ScatterGather.connect([server.address]) as gatherer:
        gatherer.search_sync(query)

        def work() -> None:
            with pytest.raises(ClosedError, match="forked from"):
                gatherer.search_sync(query)
            gatherer.close()

        assert in_child(work) == 0
        assert gatherer.search_sync(query).coverage == 1.0


def test_a_shard_can_be_searched_in_a_child(server: Server) -> None:
    query = np.zeros((1, 16), np.float32)
    wanted = server.shard.search(query)[0]
    assert in_child(lambda: np.testing.assert_array_equal(server.shard.search(query)[0], wanted)) == 0
