"""`Session`: the connections to one image of each shard, and what a cluster searches with over them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

from cotra_rdma._reader.caches import RecordCaches
from cotra_rdma._reader.connection import LOST, Connection, check_alike
from cotra_rdma._reader.connector import Connector, Misfit
from cotra_rdma._reader.engine_pool import EnginePool
from cotra_rdma._reader.executor import SearchExecutor
from cotra_rdma._reader.home_search import HomeSearch
from cotra_rdma._reader.planner import Planner, router_of, walked_of
from cotra_rdma._reader.replicas import Owner, Replicas, Tried
from cotra_rdma._reader.searcher import Searcher
from cotra_rdma._reader.threads import Threads
from cotra_rdma._reader.upkeep import Upkeep
from cotra_rdma.errors import ClosedError, CotraError, StaleShardError, TransportError


class SessionHooks(NamedTuple):
    """What a session gets from its cluster.

    Attributes:
        threads: the cluster's threads.
        revive: tries owners that are away. It is a bound method, and held weakly.
        follow: called if an owner serves another image than before. It is a bound method, and held weakly.
    """

    threads: Threads
    revive: Callable[[], object]
    follow: Callable[[], object]


class Session:
    """What a cluster searches with, from `connect` until owners serve other images.

    A cluster that follows its owners to new images makes another session.
    It closes this one after the last search over it.

    Attributes:
        dim: the dimension of the vectors.
        metric: "l2", "ip" or "cosine".
        one_graph: whether there are several shards and they are one graph.
        n_searches: the number of searches in progress. The cluster counts them.
    """

    def __init__(
        self,
        owners: Sequence[Sequence[Owner]],
        connector: Connector,
        misfit: Misfit | None,
        hooks: SessionHooks,
        cache_bytes: int,
        halo: float,
        *,
        allow_partial: bool,
    ) -> None:
        """Connects.

        Args:
            owners: for each shard, its owners.
            connector: connects to owners. It is the caller's to close.
            misfit: checks what an owner serves. An owner that serves another shard counts as one that cannot be reached.
            hooks: what the cluster gives.
            cache_bytes, halo, allow_partial: as for `connect`.

        Raises:
            CotraError: as for `connect`.
        """
        threads = hooks.threads
        self.n_searches = 0
        self._is_closing = False
        self._planner: Planner | None = None
        self._caches: RecordCaches | None = None
        self._upkeep: Upkeep | None = None
        self.engines = EnginePool(threads.searchers, threads.callers, self._fail_over)
        self.replicas = Replicas(
            owners, partial(connector.connect, misfit=misfit), connector.choose, self._equip_late, self._forget
        )
        try:
            replicas = self.replicas
            check_alike(replicas.known)
            connector.open_device(replicas.known)
            replicas.settle(allow_partial=allow_partial)
            shards = replicas.connections
            first = next(connection for connection in shards if connection.transport != LOST)
            self.dim: int = first.shard.dim
            self.metric: str = first.shard.metric
            graphs = {connection.shard.graph_id for connection in shards}
            self.one_graph: bool = len(shards) > 1 and len(graphs) == 1 and graphs != {0}
            self.planner = self._planner = Planner(
                shards, self.dim, router_of(shards), walked_of(shards), one_graph=self.one_graph
            )
            executor = SearchExecutor(replicas, self.engines, threads.callers)
            homes = HomeSearch(replicas, executor, threads.callers)
            self.searcher = Searcher(replicas, self.planner, executor, homes, one_graph=self.one_graph)
            self.caches = self._caches = RecordCaches(replicas, cache_bytes, halo)
            for connection in shards:
                self.caches.equip(connection)
            self.upkeep = self._upkeep = Upkeep(replicas, hooks.revive, hooks.follow, threads.callers)
        except BaseException:
            self.close()
            raise
        if any(not connection.is_local for connection in shards):
            self.upkeep.start()

    # ---- owners that come and go ----

    def _fail_over(self, failed: Connection, error: CotraError, give_up: bool, tried: set[Tried]) -> Connection | None:
        return self.replicas.replace(failed, error, give_up=give_up, tried=tried)

    def _forget(self, gone: Connection) -> None:
        """Removes what the session kept of an owner that is no longer used."""
        if self._planner is not None:
            self._planner.refresh()
        self.engines.drop(gone)

    def _equip_late(self, connection: Connection) -> None:
        if self._caches is not None:
            self._caches.equip_late(connection)

    def revive(self) -> list[str]:
        """Tries owners that are away. Returns the addresses of those that are back.

        Raises:
            ClosedError: the session is being closed.
        """
        return self.replicas.revive(self._between_owners)

    def _between_owners(self) -> None:
        """Renews leases, and ends `revive` if the session is being closed.

        It is called before each owner that is tried again.
        A silent owner takes long, and neither leases nor `close` can wait for many of them.
        """
        if self._is_closing:
            raise ClosedError("the cluster is closed")
        self.upkeep.renew_if_due()

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of rows of each shard."""
        return tuple(connection.shard.count for connection in self.replicas.connections)

    # ---- other images ----

    def is_behind(self, errors: Iterable[CotraError]) -> bool:
        """Whether a search failed because an owner serves another image than this session's."""
        renewed = bool(self.replicas.renewed)
        return any(
            isinstance(error, StaleShardError) or (renewed and isinstance(error, TransportError)) for error in errors
        )

    def check_images(self, images: Sequence[int]) -> None:
        """Checks that this session searches these images. A checksum of 0 is unknown, and agrees with any other.

        Raises:
            StaleShardError: it searches others.
        """
        ours = self.replicas.images
        if len(images) != len(ours) or any(a != b for a, b in zip(images, ours, strict=True) if a and b):
            raise StaleShardError(
                "the filters are for the rows of images that are not searched any more: make them for those of Cluster.images"
            )

    def check_follows(self, before: Session) -> None:
        """Checks that this session can take the place of the one before it.

        The shards of one build change together: a mixture of two builds would be no index.

        Raises:
            StaleShardError: it cannot.
        """
        a, b = before.replicas.connections, self.replicas.connections
        if (before.dim, before.metric, len(a), before.one_graph) != (self.dim, self.metric, len(b), self.one_graph):
            raise StaleShardError(
                f"owners serve {len(b)} shards of {self.metric}[{self.dim}] now, and served {len(a)} of "
                f"{before.metric}[{before.dim}]: connect again"
            )
        generations = [{connection.shard.generation for connection in shards} for shards in (a, b)]
        if len(generations[0]) == 1 < len(generations[1]):
            raise StaleShardError(
                f"owners serve shards of the generations {sorted(generations[1])}: their rebuild is not over"
            )

    def begin_close(self) -> None:
        """Makes a `revive` in progress end at the next owner, so that `close` need not wait for it."""
        self._is_closing = True

    def close(self) -> None:
        """Closes engines, then connections. No search may be in progress. Idempotent."""
        self._is_closing = True
        if self._upkeep is not None:
            self._upkeep.stop()
        self.engines.close()
        self.replicas.close()
