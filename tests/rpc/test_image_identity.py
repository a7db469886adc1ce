"""An owner that comes back with another image: no answer is of an image that nobody asked about, on any path."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import cotra_rdma
from cotra_rdma import Cluster, FormatError, InvalidInputError, OwnerProcess, PartialResultError, Shard, StaleShardError
from cotra_rdma._core.remote_expansion import PUSH_DTYPE
from cotra_rdma._owner.server import Server
from cotra_rdma._reader.connection import Connection
from cotra_rdma._reader.session import Session
from cotra_rdma.seam.scatter_gather import ScatterGather, ShardStatus

Floats = npt.NDArray[np.float32]
N = 300
PUBLIC = np.arange(N) < N // 2
"""A filter for the rows of the old image, in which row i has id i."""


@dataclass
class Owner:
    """An owner on one port, whatever it serves."""

    vectors: Floats
    transports: tuple[str, ...]
    stack: ExitStack
    like: Owner | None = None
    server: Server = field(init=False)

    def __post_init__(self) -> None:
        if self.like is not None:
            self.old, self.new = self.like.old, self.like.new
        else:
            self.old = self.stack.enter_context(Shard.build(self.vectors))
            # the same vectors under the same ids, in other rows
            self.new = self.stack.enter_context(
                Shard.build(self.vectors[::-1].copy(), ids=np.arange(N)[::-1].copy(), generation=2)
            )
        self.start(self.old, "127.0.0.1:0")

    def start(self, shard: Shard, address: str) -> None:
        self.server = self.stack.enter_context(cotra_rdma.serve(shard, address, transports=self.transports))

    @property
    def address(self) -> str:
        return self.server.address

    def restart(self, shard: Shard | None = None) -> None:
        self.server.close()
        self.start(shard or self.new, self.address)


@pytest.fixture
def vectors() -> Floats:
    return np.random.default_rng(0).standard_normal((N, 16)).astype(np.float32)


@pytest.fixture(params=["rpc", "shm"])
def owner(vectors: Floats, request: pytest.FixtureRequest) -> Iterator[Owner]:
    with ExitStack() as stack:
        yield Owner(vectors, (request.param, "rpc") if request.param != "rpc" else ("rpc",), stack)


@pytest.fixture
def asked(vectors: Floats) -> Iterator[Owner]:
    with ExitStack() as stack:
        yield Owner(vectors, ("rpc",), stack)


def renew(cluster: Cluster) -> None:
    """As a thread does every few seconds."""
    cluster.renew_leases()


def test_a_filter_for_old_rows_is_refused(owner: Owner, vectors: Floats) -> None:
    with cotra_rdma.connect(owner.address) as cluster:
        assert (cluster.search(vectors[200], k=3, filters=[PUBLIC]).ids < N // 2).all()
        owner.restart()
        renew(cluster)
        for _ in range(2):
            with pytest.raises(StaleShardError):
                cluster.search(vectors[200], k=3, filters=[PUBLIC])
        # somebody else's search follows: the filter is refused all the same, and one for the new rows is taken
        assert cluster.search(vectors[200], k=3).ids[0, 0] == 200
        with pytest.raises(StaleShardError, match="filters are for the rows of images that are not searched any more"):
            cluster.search(vectors[200], k=3, filters=[PUBLIC])
        found = cluster.search(vectors[200], k=3, filters=[PUBLIC[::-1]], images=cluster.images)
        assert (found.ids < N // 2).all()
        assert found.images == cluster.images == (owner.new.info.image_checksum,)


@pytest.mark.parametrize("allow_partial", [True, False])
def test_a_search_follows_its_owner(asked: Owner, vectors: Floats, allow_partial: bool) -> None:
    with cotra_rdma.connect(asked.address) as cluster:
        cluster.search(vectors[:5])
        asked.restart()
        found = cluster.search(vectors, k=1, ef=64, allow_partial=allow_partial)
        assert (found.ids[:, 0] == np.arange(N)).all()
        assert (found.coverage, found.failures, found.images) == (1.0, {}, (asked.new.info.image_checksum,))


def test_following_can_be_switched_off(asked: Owner, vectors: Floats) -> None:
    with cotra_rdma.connect(asked.address, follow=False) as cluster:
        old = cluster.images
        asked.restart()
        for _ in range(2):
            with pytest.raises(StaleShardError, match="of generation 2, and the request is about image"):
                cluster.search(vectors[:5])
        found = cluster.search(vectors[:5], allow_partial=True)
        assert (found.coverage, found.images) == (0.0, old)
        assert isinstance(found.failures[0], StaleShardError)
        cluster.follow()  # by hand
        assert cluster.search(vectors[:5]).coverage == 1.0


def test_leases_tell_of_another_image(owner: Owner, vectors: Floats) -> None:
    """Also where nothing is asked of the owner for a search: its memory is mapped here."""
    with cotra_rdma.connect(owner.address) as cluster:
        assert cluster.transports == (owner.transports[0],)
        owner.restart()
        renew(cluster)
        assert cluster.images == (owner.new.info.image_checksum,)
        assert (cluster.search(vectors, k=1).ids[:, 0] == np.arange(N)).all()


def test_an_owner_that_serves_the_same_image_again_is_no_other(asked: Owner, vectors: Floats) -> None:
    with cotra_rdma.connect(asked.address) as cluster:
        before = cluster.search(vectors[:5], filters=[PUBLIC])
        asked.restart(asked.old)
        again = cluster.search(vectors[:5], filters=[PUBLIC])
        np.testing.assert_array_equal(again.ids, before.ids)


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (
            lambda x: Shard.build(x[:, :8].copy(), generation=2),
            r"serve 1 shards of l2\[8\] now, and served 1 of l2\[16\]",
        ),
        (lambda x: Shard.build(x, metric="cosine", generation=2), r"serve 1 shards of cosine\[16\] now"),
    ],
)
def test_what_cannot_be_followed(
    asked: Owner, vectors: Floats, build: Callable[[Floats], Shard], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    with cotra_rdma.connect(asked.address) as cluster, build(vectors) as other:
        asked.restart(other)
        for _ in range(2):
            with pytest.raises(StaleShardError):
                cluster.search(vectors[:5])
        assert "cannot be followed yet" in caplog.text
        with pytest.raises(StaleShardError, match=why):
            cluster.follow()


def test_a_rebuild_that_is_not_over_is_not_followed(vectors: Floats) -> None:
    with ExitStack() as stack:
        owners = [Owner(vectors, ("rpc",), stack) for _ in range(2)]
        cluster = stack.enter_context(cotra_rdma.connect([owner.address for owner in owners]))
        owners[0].restart()
        with pytest.raises(PartialResultError, match="of generation 2") as raised:
            cluster.search(vectors[:5])
        assert isinstance(raised.value.__cause__, StaleShardError)
        with pytest.raises(StaleShardError, match=r"generations \[1, 2\]: their rebuild is not over"):
            cluster.follow()
        owners[1].restart()
        assert cluster.search(vectors[:5]).coverage == 1.0


def test_replicas_are_rebuilt_one_after_the_other(vectors: Floats) -> None:
    """A shard with two owners: searches go on over the old image, and follow once no owner has that any more."""
    with ExitStack() as stack:
        first = Owner(vectors, ("rpc",), stack)
        owners = [first, Owner(vectors, ("rpc",), stack, first)]
        cluster = stack.enter_context(cotra_rdma.connect([[owner.address for owner in owners]]))
        for owner in owners:
            owner.restart()
            for _ in range(3):
                found = cluster.search(vectors, k=1)
                assert (found.ids[:, 0] == np.arange(N)).all()
                assert found.coverage == 1.0
                cluster.revive()
        assert cluster.images == (owners[0].new.info.image_checksum,)


def test_searches_in_progress_end_on_the_image_that_they_began_with(owner: Owner, vectors: Floats) -> None:
    with cotra_rdma.connect(owner.address) as cluster:
        images, errors, over = set(), [], threading.Event()

        def keep_searching() -> None:
            while not over.is_set():
                try:
                    found = cluster.search(vectors, k=1)
                    images.add(found.images)
                    assert (found.ids[:, 0] == np.arange(N)).all()
                except Exception as error:
                    errors.append(error)

        threads = [threading.Thread(target=keep_searching) for _ in range(3)]
        for thread in threads:
            thread.start()
        old = cluster._session
        cluster.search(vectors)
        # an owner that serves another image beside the old one, as one that reloads does
        with cotra_rdma.serve(owner.new, transports=owner.transports) as reloaded:
            for connection in old.replicas.connections:
                connection.address = reloaded.address
            cluster._connect = _to(cluster, reloaded.address)
            cluster.follow()
            cluster.search(vectors)
            over.set()
            for thread in threads:
                thread.join()
            assert errors == []
            assert images == {(owner.old.info.image_checksum,), (owner.new.info.image_checksum,)} or len(images) == 1
            assert old.replicas._closed
            cluster.close()


def _to(cluster: Cluster, address: str) -> Callable[..., object]:
    return lambda hooks: Session([[address]], cluster._connector, None, hooks, 0, 0.0, allow_partial=False)


class TestPushes:
    """One graph, of which a shard can only be asked to expand nodes."""

    def test_expansions_of_another_image_are_refused(self, asked: Owner, vectors: Floats) -> None:
        with cotra_rdma.connect(asked.address, follow=False) as cluster:
            connection: Connection = cluster._connections[0]
            connection.view = connection.load_view()
            pushes = np.zeros(1, PUSH_DTYPE)
            pushes["limit"] = np.inf
            assert len(connection.expand(vectors[:1], pushes, 5.0).found) == 1
            asked.restart()
            with pytest.raises(StaleShardError):
                connection.expand(vectors[:1], pushes, 5.0)
            with pytest.raises(StaleShardError):
                connection.load_view()


class TestScatterGather:
    """The seam's own search, which has no connection that could notice."""

    def test_an_owner_with_another_image_has_failed(self, asked: Owner, vectors: Floats) -> None:
        with ScatterGather.connect([asked.address]) as gatherer:
            assert gatherer.search_sync(vectors[200]).ids[0, 0] == 200
            asked.restart()
            bitmap = np.packbits(PUBLIC, bitorder="little").tobytes()
            for _ in range(2):
                result = gatherer.search_sync(vectors[200], filters={0: bitmap}, allow_partial=True)
                assert (result.coverage, result.outcomes[0].status) == (0.0, ShardStatus.FAILED)
                assert isinstance(result.outcomes[0].error, StaleShardError)
            gatherer.follow()
            assert gatherer.search_sync(vectors[200]).ids[0, 0] == 200

    def test_shards_that_cannot_be_merged(self, asked: Owner, vectors: Floats) -> None:
        with (
            Shard.build(vectors, metric="cosine") as cosine,
            cotra_rdma.serve(cosine, transports=["rpc"]) as other,
            ScatterGather.connect([asked.address, other.address]) as gatherer,
        ):
            result = gatherer.search_sync(vectors[:2], allow_partial=True)
            assert result.coverage == 0.5
            assert isinstance(result.outcomes[1].error, InvalidInputError)
            assert "cosine" in result.outcomes[1].reason
            with pytest.raises(PartialResultError, match="cosine"):
                gatherer.search_sync(vectors[:2])

    def test_queries_of_another_dim(self, asked: Owner, vectors: Floats) -> None:
        with ScatterGather.connect([asked.address]) as gatherer:
            result = gatherer.search_sync(vectors[:2, :8], allow_partial=True)
            assert isinstance(result.outcomes[0].error, InvalidInputError)


def test_an_owner_answers_from_its_own_memory(vectors: Floats, tmp_path: Path) -> None:
    """The file of a shard that is served is overwritten, and truncated: nobody notices, and nobody dies."""
    path = tmp_path / "shard.cotra"
    with Shard.build(vectors) as shard:
        shard.save(path)
    with OwnerProcess([path], transports=("rpc",)) as owner, cotra_rdma.connect(owner.addresses[0]) as cluster:
        wanted = cluster.search(vectors[:20])
        with path.open("r+b") as file:
            file.write(b"junk" * 1000)
            file.truncate(4096)
        for _ in range(2):
            np.testing.assert_array_equal(cluster.search(vectors[:20]).ids, wanted.ids)
        with cotra_rdma.connect(owner.addresses[0]) as late:
            np.testing.assert_array_equal(late.search(vectors[:20]).ids, wanted.ids)


def test_a_shard_that_was_read_and_not_mapped(vectors: Floats, tmp_path: Path) -> None:
    path = tmp_path / "shard.cotra"
    with Shard.build(vectors) as shard:
        shard.save(path)
        wanted = shard.search(vectors[:20])[0]
    with Shard.open(path, copy=True) as copied:
        os.truncate(path, 100)
        np.testing.assert_array_equal(copied.search(vectors[:20])[0], wanted)
    with pytest.raises(FormatError):
        Shard.open(path, copy=True)
    os.truncate(path, 0)
    with pytest.raises(FormatError, match="is empty"):
        Shard.open(path, copy=True)
