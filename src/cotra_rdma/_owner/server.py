"""`serve` and `Server`: an owner publishes a shard's memory, and answers the control plane and searches over RPC."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from cotra_rdma._core.memory_region import MemoryRegion
from cotra_rdma._core.request_counts import RequestCounts
from cotra_rdma._core.tracing import Tracing, tracing_of
from cotra_rdma._native.verbs import Device, QueuePair, QueuePairOptions
from cotra_rdma._owner.answers import TRANSPORTS, Answers, Exchange
from cotra_rdma._owner.leases import Leases
from cotra_rdma._owner.offer import Offer, Offers
from cotra_rdma._owner.policy import PolicyFile
from cotra_rdma._shard.shard import Shard
from cotra_rdma.errors import (
    CotraError,
    DeniedError,
    InvalidInputError,
    VerbsUnavailableError,
)
from cotra_rdma.protocol.envelope import (
    VShardMessageType,
)
from cotra_rdma.protocol.rpc_server import Limits, RpcServer
from cotra_rdma.protocol.tables import (
    CentroidTable,
    CoarseRouteResponse,
)
from cotra_rdma.protocol.tls import Tls

if TYPE_CHECKING:
    from cotra_rdma._reader.cluster import Cluster

log = logging.getLogger(__name__)

_MESSAGE_BYTES = 5 << 20
"""The most bytes of a request, without its filter."""


def serve(
    shard: Shard,
    address: str = "127.0.0.1:0",
    transports: Iterable[str] | None = None,
    device: str | None = None,
    gid_index: int | None = None,
    *,
    tls: Tls | None = None,
    queue_pair: QueuePairOptions | None = None,
    n_workers: int = 4,
    coarse: Any = None,
    exchange: Exchange | None = None,
    rpc: RpcServer | None = None,
    policy: PolicyFile | None = None,
    number: int | None = None,
    tracing: bool = False,
) -> Server:
    """Serves a shard until the server is closed.

    Args:
        shard: the shard. It stays the caller's, and must be closed after the server.
        address: HOST:PORT to listen on. Port 0 takes a free port, and `Server.address` has it. The server always listens,
            because RPC is also the control plane.
        transports: what readers may use: some of "verbs", "shm" and "rpc". None offers all. A transport that cannot be had
            here is left out, and `Server.unavailable` says why. If it was named, a warning is logged too.
        device: the name of the RDMA device. None takes the first active one.
        gid_index: the index of the GID. None takes for each reader the GID that ranks best.
        tls: the certificate of this owner, and the authority whose readers it lets in. None lets everybody in.
        queue_pair: options of the queue pairs, such as time-outs.
        n_workers: the number of threads that answer requests.
        coarse: the shard's coarse table, for readers that ask for it (type 52). It is an object with `centroids`
            [n_lists, dim], `sizes` [n_lists] and `radii` [n_lists], or a whole payload of type 53 as bytes. If it is None,
            readers are told that there is none.
        exchange: called with each table that a builder sends (type 54). If it is None, such tables are refused.
        rpc: an RPC server that listens already. It answers for this server from now on, and is closed with it. `address` is
            then ignored. None listens on `address`.
        policy: who may do what, by the names in certificates. It stays the caller's. None allows everything to whoever is
            let in.
        number: the number of the shard in its collection, which rules of `policy` name. None is for a shard of no
            collection.
        tracing: whether to make a span of OpenTelemetry for each request, below the span of the reader's call. The process
            sets the tracer provider. Without one, nothing is recorded.

    Returns:
        The server. Close it, or use it as a context manager.

    Raises:
        InvalidInputError: an unknown transport, a bad address, or values in `coarse` that do not fit. Or `tracing`
            is true, and the package `opentelemetry-api` is missing.
        FormatError: `coarse` is bytes, and they are not a payload of type 53.
        TransportError: the server cannot listen on the address.
        VerbsUnavailableError: `device` was named and cannot be had, or no transport can be had.
    """
    return Server(
        shard,
        address,
        None if transports is None else tuple(transports),
        device,
        gid_index,
        tls,
        queue_pair,
        n_workers,
        _coarse_payload(coarse),
        exchange,
        rpc,
        policy,
        number,
        tracing_of(tracing),
    )


def _coarse_payload(coarse: Any) -> bytes | None:
    if isinstance(coarse, bytes):
        CoarseRouteResponse.decode(coarse)
        return coarse
    return None if coarse is None else CoarseRouteResponse(0, "", CentroidTable.of(coarse)).encode()


class Server:
    """An owner: a shard that is being served. It is made by `serve`, and is a context manager.

    Any thread may call the methods.

    Attributes:
        unavailable: why a transport is not offered, by the name of the transport.
    """

    def __init__(
        self,
        shard: Shard,
        address: str,
        transports: tuple[str, ...] | None,
        device: str | None,
        gid_index: int | None,
        tls: Tls | None,
        queue_pair: QueuePairOptions | None,
        n_workers: int,
        coarse: bytes | None = None,
        exchange: Exchange | None = None,
        rpc: RpcServer | None = None,
        policy: PolicyFile | None = None,
        number: int | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        if policy is not None and tls is None and rpc is None:
            raise InvalidInputError("a policy is about the names in certificates: it takes tls")
        self._policy, self._number = policy, number
        named = transports is not None
        transports = TRANSPORTS if transports is None else transports
        unknown = [name for name in transports if name not in TRANSPORTS]
        if unknown or not transports:
            raise InvalidInputError(f"transports must be some of {', '.join(TRANSPORTS)}, not {unknown or 'none'}")
        self._pid = os.getpid()
        options = queue_pair or QueuePairOptions()
        self._options = options if gid_index is None else replace(options, gid_index=gid_index)
        self._device: Device | None = None
        self._offers = Offers()
        self._leases = Leases(then=self._offers.close_retired)
        self.unavailable: dict[str, str] = {name: "not offered" for name in TRANSPORTS if name not in transports}
        try:
            if "verbs" in transports:
                self._open_verbs(device, logging.WARNING if named else logging.INFO)
            try:
                self._offers.begin(self._make_offer(shard, coarse))
            except CotraError as error:
                if self._device is None or device is not None or isinstance(error, InvalidInputError):
                    raise
                self._without_verbs(error, logging.WARNING if named else logging.INFO)
                self._offers.begin(self._make_offer(shard, coarse))
            if not self.transports:
                raise VerbsUnavailableError(f"nothing can be offered: {self.unavailable}")
            limits = Limits(request_bytes=_MESSAGE_BYTES + shard.info.count // 8)  # a filter has a bit for each row
            self._answers = Answers(
                self._offers,
                self._leases,
                self._device,
                self._options,
                self.unavailable,
                exchange=exchange,
                policy=policy,
                number=number,
            )
            self._rpc = rpc or RpcServer(address, self._answers.handle, tls=tls, n_workers=n_workers, limits=limits)
            self._rpc.handler, self._rpc.tracing = self._answers.handle, tracing
            self._leases.start()
            if policy is not None:
                policy.when_changed(self._revoke)
        except BaseException:
            self._close_parts()
            raise

    def _make_offer(self, shard: Shard, coarse: bytes | None) -> Offer:
        offered = self.transports
        return Offer(shard, coarse, self._device, shared_memory="shm" in offered, rpc="rpc" in offered)

    def _open_verbs(self, name: str | None, level: int) -> None:
        """Opens the device. If it cannot be had and was not named, logs why with `level`.

        Raises:
            CotraError: the device was named and cannot be had.
        """
        try:
            self._device = Device(name)
            QueuePair(self._device, self._options).close()  # fails if there is no active port, or no GID
        except CotraError as error:
            if name is not None or isinstance(error, InvalidInputError):
                raise
            self._without_verbs(error, level)

    def _without_verbs(self, why: CotraError, level: int) -> None:
        self.unavailable["verbs"] = str(why)
        log.log(level, "verbs is not offered: %s", why)
        if self._device is not None:
            self._device.close()
        self._device = None

    # ---- what it offers ----

    @property
    def shard(self) -> Shard:
        """The shard that is served now. It is the caller's."""
        return self._offers.now.shard

    def replace(self, shard: Shard, coarse: Any = None, *, released: Callable[[], object] | None = None) -> None:
        """Serves another image of the shard from now on, at the same address.

        Readers notice at their next request, or when they renew their lease, and follow (`Cluster.follow`).
        The image before it stays published for a lease, which is 60 s, so that searches in progress can end on it.

        Args:
            shard: the new image. It has the dimension and the metric of the shard before. It stays the caller's.
            coarse: as for `serve`.
            released: called when this server no longer uses the shard before, which may then be closed. Any thread may call
                it.

        Raises:
            InvalidInputError: the dimension or the metric is another one.
            ClosedError: the server is closed.
        """
        now = self._offers.now
        if (shard.dim, shard.metric) != (now.shard.dim, now.shard.metric):
            raise InvalidInputError(
                f"a shard of {shard.metric}[{shard.dim}] in the place of one of {now.shard.metric}[{now.shard.dim}]"
            )
        offer = self._make_offer(shard, _coarse_payload(coarse))
        before = self._offers.replace(offer, released)
        log.info("%s serves %s from now on, and served %s", self.address, offer.identity, before.identity)

    @property
    def coarse(self) -> bytes | None:
        """The shard's coarse table, as a payload of type 53, or None."""
        return self._offers.now.coarse

    @property
    def address(self) -> str:
        """HOST:PORT that readers connect to."""
        return self._rpc.address

    @property
    def transports(self) -> tuple[str, ...]:
        """The transports that are offered. `unavailable` says why another is not."""
        return tuple(name for name in TRANSPORTS if name not in self.unavailable)

    def exposed_region(self) -> MemoryRegion | None:
        """Returns the memory region that readers READ, or None if verbs is not offered. Callers of NodeDB's seam then use RPC."""
        registration = self._offers.now.registration
        return None if registration is None else registration.region

    @property
    def n_queue_pairs(self) -> int:
        """The number of queue pairs that readers hold."""
        return len(self._leases)

    @property
    def request_counts(self) -> Mapping[VShardMessageType, int]:
        """The number of requests so far, by type."""
        return self._answers.counts

    @property
    def seen(self) -> RequestCounts:
        """Counters of the RPC server: requests, durations and bytes so far."""
        return self._rpc.seen

    @property
    def n_reaped(self) -> int:
        """The number of queue pairs that were taken from silent readers so far."""
        return self._leases.n_reaped

    @property
    def is_ready(self) -> bool:
        """Whether the server takes new requests."""
        return self._offers.is_open and not self._rpc.is_draining

    def gauges(self) -> dict[str, int]:
        """Returns numbers of this moment, by the names of their metrics without the prefix `cotra_`."""
        return {
            "requests_in_progress": self.n_at_work,
            "requests_waiting": self._rpc.n_waiting,
            "owed_bytes": self._rpc.owed_bytes,
            "queue_pairs": self.n_queue_pairs,
            "readers_with_leases": self._leases.n_readers,
            "images": len(self._offers),
            "ready": int(self.is_ready),
        }

    @property
    def n_at_work(self) -> int:
        """The number of requests in progress. A search whose reader is gone is stopped, and then no longer counted."""
        return self._rpc.n_at_work

    def search_with(self, cluster: Cluster | None) -> None:
        """Answers searches of the whole collection too, from now on.

        It returns when no search is in progress over the cluster before, which may then be closed.

        Args:
            cluster: this process's cluster of all shards of the collection. It stays the caller's, and must be closed after
                the server. None refuses such searches from now on.

        Raises:
            InvalidInputError: the cluster has another dimension or metric than the shard.
            ClosedError: the server is closed.
        """
        if cluster is not None and (cluster.dim, cluster.metric) != (self.shard.dim, self.shard.metric):
            raise InvalidInputError(
                f"a shard of {self.shard.metric}[{self.shard.dim}] in a collection of {cluster.metric}[{cluster.dim}]"
            )
        self._answers.search_with(cluster)

    # ---- the policy ----

    def _revoke(self) -> None:
        """Closes the queue pairs that readers may not have any more. It is called after each change of the policy."""

        def may_stay(names: tuple[str, ...]) -> bool:
            assert self._policy is not None
            try:
                self._policy.check(names, self._number, "verbs")
            except DeniedError:
                return False
            return True

        self._leases.revoke(may_stay)

    # ---- the end ----

    def _close_parts(self) -> None:
        self._leases.close()
        self._offers.close()
        if self._device is not None:
            self._device.close()
        self._device = None

    def drain(self, grace_s: float) -> None:
        """Refuses new requests, and waits until those in progress are answered. READs go on.

        Another thread may call it meanwhile, with a shorter wait.

        Args:
            grace_s: the most seconds to wait. Requests that are in progress after that are ended.
        """
        self._rpc.drain(grace_s)

    def close(self) -> None:
        """Stops listening, closes the queue pairs and deregisters the region. Readers' READs fail from then on. Idempotent.

        In a child of `fork` it closes nothing, because everything is the parent's.
        """
        if os.getpid() != self._pid:
            return
        self._rpc.close()
        self._close_parts()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
