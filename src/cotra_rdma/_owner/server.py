"""`serve`: an owner. It packs a shard into one pinned region, publishes it, and answers the control plane and RPC searches."""

from __future__ import annotations

import ipaddress
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from cotra_rdma._core.image_identity import ImageIdentity
from cotra_rdma._core.memory_region import MemoryRegion
from cotra_rdma._core.request_counts import RequestCounts
from cotra_rdma._core.stats import MORE_STATS_DTYPE, pack_stats
from cotra_rdma._core.tracing import Tracing, tracing_of
from cotra_rdma._native.memfd_handover import boot_id
from cotra_rdma._native.verbs import Device, QueuePair, QueuePairAttributes, QueuePairOptions
from cotra_rdma._owner.expander import Expander
from cotra_rdma._owner.leases import LEASE_S, MAX_NAME, Leases
from cotra_rdma._owner.offer import Offer
from cotra_rdma._owner.policy import PolicyFile, Rule
from cotra_rdma._shard.shard import Shard
from cotra_rdma.errors import (
    ClosedError,
    CotraError,
    DeniedError,
    InvalidInputError,
    SearchCancelledError,
    StaleShardError,
    VerbsUnavailableError,
)
from cotra_rdma.protocol.collection_search import CollectionResponse
from cotra_rdma.protocol.envelope import (
    FAILED,
    STALE,
    WIRE_VERSION,
    Payload,
    VShardEnvelope,
    VShardMessageType,
    fields_of,
)
from cotra_rdma.protocol.regions import (
    VIEW_PIECE_BYTES,
    WANT_CAPABILITIES,
    WANT_LEASE,
    WANT_QUEUE_PAIR,
    WANT_RELEASE,
    WANT_SHARED_MEMORY,
    WANT_VIEW,
    QueuePairFields,
    RegionFields,
    RegionRequest,
    RegionResponse,
    ShardFields,
    SharedMemoryFields,
    ViewFields,
    as_fields,
    decode_region_request,
    encode_region,
)
from cotra_rdma.protocol.remote_expansion import ExpandRequest, ExpandResponse, check_fits
from cotra_rdma.protocol.rpc_server import Later, Limits, RpcServer, Steps, asker, asker_names
from cotra_rdma.protocol.search import STATS_BYTES, WHOLE_COLLECTION, SearchRequest, SearchResponse
from cotra_rdma.protocol.tables import (
    BuildExchangeRequest,
    BuildExchangeResponse,
    CentroidTable,
    CoarseRouteRequest,
    CoarseRouteResponse,
)
from cotra_rdma.protocol.tls import Tls

if TYPE_CHECKING:
    from cotra_rdma._reader.cluster import Cluster

log = logging.getLogger(__name__)

TRANSPORTS = ("verbs", "shm", "rpc")

_MESSAGE_BYTES = 5 << 20
"""A request, beside a filter, at most."""
_STEP_EF = 1 << 15
"""The sum of ef over the queries that are searched at a time: as many expansions, about, and as many microseconds."""
_MAX_EF = 1 << 21
"""The same of all queries of a request."""
_ANSWER_BYTES = 12  # an id and a distance
_MAX_ANSWER_BYTES = 32 << 20
_TRANSPORT_OF = {WANT_QUEUE_PAIR: "verbs", WANT_SHARED_MEMORY: "shm", WANT_VIEW: "rpc"}
_Made = Payload | Callable[[], Payload] | Iterator[Payload | None]
"""What answers a request: see `rpc_server.Handler`."""

Exchange = Callable[[BuildExchangeRequest], object]
"""What takes the table that a peer sends at build time: from any of the server's threads, several at once maybe. What it
returns is not looked at; what it raises is told to the peer, which may send the table again. A list's `append` will do."""


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
    """Serves a shard until the server is closed (it is a context manager).

    Args:
        shard: stays the caller's; close it after the server.
        address: HOST:PORT to listen on; port 0 takes a free one, which `server.address` tells. RPC is the control plane, so
            it always listens.
        transports: what peers may use: "verbs", "shm", "rpc"; None: all of these. One that cannot be had here is left out, and
            explained in `server.unavailable`; where it was named it is also a warning in the log.
        device, gid_index: of verbs; None for the first active device, and the GID that ranks best for each peer.
        tls: the certificate of this owner, and whom it lets in; None: everybody.
        queue_pair: options of the queue pairs towards peers, time-outs say.
        n_workers: threads that answer requests.
        coarse: the answer to peers that ask how this shard looks from afar (type 52): an object with `centroids`
            [n_lists, dim], `sizes` [n_lists] and `radii` [n_lists], or a whole payload of type 53 as bytes. None: peers are
            told that there is none.
        exchange: called with the table that a peer sends at build time (type 54). None: peers are told that it is not taken.
        rpc: listens already, and answers for this server from now on; it is closed with it. None: `address` is listened on.
        policy: who may do what, by the names in certificates; it stays the caller's. None: whoever is let in may do all.
        number: of the shard in its collection, which rules may be about.
        tracing: make a span of OpenTelemetry of each request, below the reader's span that it comes from. The process sets the
            tracer provider; without one nothing is recorded.

    Raises:
        InvalidInputError: an unknown transport, a bad address, or a coarse table with values that do not fit. Or `tracing` was
            asked for, and the package `opentelemetry-api` is missing.
        FormatError: `coarse` is bytes, and no payload of type 53. TransportError: the address cannot be listened on.
        VerbsUnavailableError: `device` was asked for by name and cannot be had.
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
    """A shard being served; made by `serve`."""

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
        self._exchange = exchange
        self._counts: Counter[VShardMessageType] = Counter()
        self._pid = os.getpid()
        self._cluster: Cluster | None = None
        self._searching: Counter[Cluster] = Counter()  # searches in progress over each
        self._answers: dict[VShardMessageType, Callable[[VShardEnvelope], _Made]] = {
            VShardMessageType.VECTOR_SCATTER_REQUEST: self._search,
            VShardMessageType.VECTOR_COARSE_ROUTE_REQUEST: self._describe_coarsely,
            VShardMessageType.VECTOR_BUILD_EXCHANGE_REQUEST: self._take_table,
            VShardMessageType.VECTOR_MEM_REGION_REQUEST: lambda request: encode_region(self._region(request)),
            VShardMessageType.VECTOR_EXPAND_REQUEST: self._expand,
        }
        options = queue_pair or QueuePairOptions()
        self._options = options if gid_index is None else replace(options, gid_index=gid_index)
        self._device: Device | None = None
        self._offer: Offer | None = None
        self._retired: list[tuple[float, Offer]] = []  # until when leases of theirs may last
        self._leases = Leases(then=self._close_retired)
        self._lock = threading.Lock()
        self._let_go = threading.Condition()
        self.unavailable: dict[str, str] = {name: "not offered" for name in TRANSPORTS if name not in transports}
        try:
            if "verbs" in transports:
                self._open_verbs(device, logging.WARNING if named else logging.INFO)
            try:
                self._offer = self._make_offer(shard, coarse)
            except CotraError as error:
                if self._device is None or device is not None or isinstance(error, InvalidInputError):
                    raise
                self._without_verbs(error, logging.WARNING if named else logging.INFO)
                self._offer = self._make_offer(shard, coarse)
            if not self.transports:
                raise VerbsUnavailableError(f"nothing can be offered: {self.unavailable}")
            limits = Limits(request_bytes=_MESSAGE_BYTES + shard.info.count // 8)  # a filter fits beside the queries
            self._rpc = rpc or RpcServer(address, self._handle, tls=tls, n_workers=n_workers, limits=limits)
            self._rpc.handler, self._rpc.tracing = self._handle, tracing
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
        """`level`: of the log's line where it cannot be had."""
        try:
            self._device = Device(name)
            QueuePair(self._device, self._options).close()  # a port and a GID there are
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

    def _options_towards(self, gid: bytes) -> QueuePairOptions:
        """The options of a queue pair towards a reader with this GID: it tells the address, which ranks our own GIDs."""
        address = ipaddress.IPv6Address(gid) if len(gid) == 16 else None
        if self._options.peer_address is not None or not address or not int(address):
            return self._options
        return replace(self._options, peer_address=str(address.ipv4_mapped or address))

    # ---- what it offers ----

    @property
    def _offered_now(self) -> Offer:
        if self._offer is None:
            raise ClosedError("the server is closed")
        return self._offer

    @property
    def shard(self) -> Shard:
        """The shard that it serves; the caller's."""
        return self._offered_now.shard

    def replace(self, shard: Shard, coarse: Any = None, *, released: Callable[[], object] | None = None) -> None:
        """Serves another image of the shard from now on, at the same address.

        Readers notice at their next request, or when they renew their lease, and follow: `Cluster.follow`.
        What they have of the image before it lasts as long as a lease, 60 s: searches in progress end on it.

        Args:
            shard: with the dim and metric of the one before. It stays the caller's.
            coarse: as for `serve`.
            released: called, by any thread, when this server does not use the shard before any more; it may be closed then.

        Raises `InvalidInputError` for another dim or metric, and `ClosedError`.
        """
        now = self._offered_now
        if (shard.dim, shard.metric) != (now.shard.dim, now.shard.metric):
            raise InvalidInputError(
                f"a shard of {shard.metric}[{shard.dim}] in the place of one of {now.shard.metric}[{now.shard.dim}]"
            )
        offer = self._make_offer(shard, _coarse_payload(coarse))
        with self._lock:
            before, self._offer = self._offered_now, offer
            before.released = released
            self._retired.append((time.monotonic() + LEASE_S, before))
        log.info("%s serves %s from now on, and served %s", self.address, offer.identity, before.identity)

    def _close_retired(self) -> None:
        """Lets images go whose readers' leases are over."""
        with self._lock:
            over = [offer for until, offer in self._retired if until < time.monotonic()]
            self._retired = [(until, offer) for until, offer in self._retired if offer not in over]
        for offer in over:
            offer.close()

    @property
    def coarse(self) -> bytes | None:
        """What it tells of the shard from afar: a payload of type 53."""
        return self._offered_now.coarse

    @property
    def address(self) -> str:
        """HOST:PORT that peers connect to."""
        return self._rpc.address

    @property
    def transports(self) -> tuple[str, ...]:
        """The transports that peers can have; why another cannot be had is in `unavailable`."""
        return tuple(name for name in TRANSPORTS if name not in self.unavailable)

    def exposed_region(self) -> MemoryRegion | None:
        """The region that peers READ, or None where no verbs device exists (NodeDB's seam: callers fall back to RPC)."""
        registration = self._offered_now.registration
        return None if registration is None else registration.region

    @property
    def n_queue_pairs(self) -> int:
        """Queue pairs that peers hold."""
        return len(self._leases)

    @property
    def request_counts(self) -> Mapping[VShardMessageType, int]:
        """How many requests of each type came in so far."""
        with self._lock:
            return dict(self._counts)

    @property
    def seen(self) -> RequestCounts:
        """What came in over RPC so far, in numbers."""
        return self._rpc.seen

    @property
    def n_reaped(self) -> int:
        """Queue pairs that were taken back from silent readers."""
        return self._leases.n_reaped

    @property
    def is_ready(self) -> bool:
        """Whether it takes new requests."""
        return self._offer is not None and not self._rpc.is_draining

    def gauges(self) -> dict[str, int]:
        """Numbers of this moment, by the names of their metrics."""
        return {
            "requests_in_progress": self.n_at_work,
            "requests_waiting": self._rpc.n_waiting,
            "owed_bytes": self._rpc.owed_bytes,
            "queue_pairs": self.n_queue_pairs,
            "readers_with_leases": self._leases.n_readers,
            "images": 1 + len(self._retired),
            "ready": int(self.is_ready),
        }

    @property
    def n_at_work(self) -> int:
        """Requests that were not answered yet. Those whose reader is gone are stopped, where they are searches, and go."""
        return self._rpc.n_at_work

    def search_with(self, cluster: Cluster | None) -> None:
        """From now on, answers searches of the whole collection as well, by `cluster`: this process's connection to all of its
        shards; None ends that. It stays the caller's. Returns when no search is in progress over the one before: that one may
        then be closed, as may the last one after the server."""
        if cluster is not None and (cluster.dim, cluster.metric) != (self.shard.dim, self.shard.metric):
            raise InvalidInputError(
                f"a shard of {self.shard.metric}[{self.shard.dim}] in a collection of {cluster.metric}[{cluster.dim}]"
            )
        with self._let_go:
            before, self._cluster = self._cluster, cluster
            self._let_go.wait_for(lambda: before is cluster or before is None or not self._searching[before])

    @contextmanager
    def _held_cluster(self) -> Iterator[Cluster]:
        """What a search of the whole collection is made over. Raises `InvalidInputError` where there is none."""
        with self._let_go:
            cluster = self._cluster
            if cluster is None:
                raise InvalidInputError("this owner searches its own shard only: it has no connection to the others")
            self._searching[cluster] += 1
        try:
            yield cluster
        finally:
            with self._let_go:
                self._searching[cluster] -= 1
                if not self._searching[cluster]:
                    del self._searching[cluster]
                    self._let_go.notify_all()

    # ---- who may ----

    def _check_policy(self, transport: str | None = None) -> Rule:
        """The rule of who asks. Raises `DeniedError`."""
        return Rule() if self._policy is None else self._policy.check(asker_names.get(), self._number, transport)

    def _revoke(self) -> None:
        """The policy changed: takes queue pairs from those that may not have them any more."""

        def may_stay(names: tuple[str, ...]) -> bool:
            assert self._policy is not None
            try:
                self._policy.check(names, self._number, "verbs")
            except DeniedError:
                return False
            return True

        self._leases.revoke(may_stay)

    # ---- requests ----

    def _handle(self, request: VShardEnvelope) -> VShardEnvelope | Later | Steps:
        with self._lock:
            self._counts[request.msg_type] += 1
        self._check_policy()
        made = self._answers[request.msg_type](request)
        if callable(made):
            return lambda: _answer(request, made())
        if isinstance(made, Iterator):
            return (None if step is None else _answer(request, step) for step in made)
        return _answer(request, made)

    def _describe_coarsely(self, request: VShardEnvelope) -> bytes:
        try:
            CoarseRouteRequest.decode(request.payload)
            coarse = self._offered_now.coarse
            if coarse is None:
                raise InvalidInputError("this owner has no coarse table: it serves without `coarse`")
            return coarse
        except CotraError as error:
            return CoarseRouteResponse.failed(FAILED, str(error)).encode()

    def _take_table(self, request: VShardEnvelope) -> bytes:
        if self._policy is not None and not self._check_policy().build:
            raise DeniedError(f"{', '.join(asker_names.get())} may not build here")
        try:
            table = BuildExchangeRequest.decode(request.payload)
            if self._exchange is None:
                raise InvalidInputError("this owner takes no tables of its peers: it serves without `exchange`")
            self._exchange(table)
            return BuildExchangeResponse().encode()
        except CotraError as error:
            return BuildExchangeResponse(FAILED, str(error)).encode()
        except Exception as error:  # the callback is not ours, and a peer that waits is owed an answer
            log.exception("%s: the exchange callback failed", self.address)
            return BuildExchangeResponse(FAILED, f"{type(error).__name__}: {error}").encode()

    def _offer_of(self, wanted: ImageIdentity | None) -> Offer:
        """What a request is about: the image that is served now, or one before it that readers may have still. Raises
        `StaleShardError` for any other."""
        with self._lock:
            offer = self._offered_now
            there = [offer, *(before for _, before in self._retired)]
        for each in there:
            if wanted in (None, each.identity):
                return each
        raise StaleShardError(f"this owner serves {offer.identity}, and the request is about {wanted}")

    def _search(self, request: VShardEnvelope) -> _Made:
        self._check_policy("rpc")
        try:
            wanted = SearchRequest.decode(request.payload)
            offer = self._offer_of(wanted.image)
            _expander_of(offer)
            dim = offer.shard.dim
            if len(wanted.queries) % dim:
                raise InvalidInputError(f"{len(wanted.queries)} numbers are no queries of dim {dim}")
            if wanted.scope == WHOLE_COLLECTION:
                return lambda: self._search_collection(wanted, dim)
            _check_cost(len(wanted.queries) // dim, wanted)
            return self._search_in_steps(offer, wanted)
        except (CotraError, MemoryError) as error:
            return SearchResponse.failed(_code_of(error), _message_of(error)).encode()

    def _search_in_steps(self, offer: Offer, wanted: SearchRequest) -> Iterator[Payload | None]:
        """Searches some queries at a time, so that others' searches wait for none of many."""
        try:
            queries = wanted.queries.reshape(-1, offer.shard.dim)
            step = max(1, _STEP_EF // max(wanted.ef_search, 1))
            parts = []
            for begin in range(0, max(len(queries), 1), step):
                if begin:
                    yield None
                with offer.in_use():
                    parts.append(
                        offer.shard.search(
                            queries[begin : begin + step],
                            wanted.top_k,
                            wanted.ef_search,
                            wanted.beam,
                            rows=wanted.filter_bitmap,
                            max_expansions=wanted.most or None,
                            stop=asker.get(),
                        )
                    )
            labels, distances, stats = (np.concatenate(column) for column in zip(*parts, strict=True))
            incomplete = stats["incomplete"] if wanted.most else None
            yield SearchResponse(0, "", labels, distances, pack_stats(stats), incomplete, wanted.image).encode()
        except SearchCancelledError:
            raise
        except (CotraError, MemoryError) as error:
            yield SearchResponse.failed(_code_of(error), _message_of(error)).encode()

    def _search_collection(self, wanted: SearchRequest, dim: int) -> Payload:
        """The search is this process's own: what it asks of other owners is about their shards, so none routes it on."""
        try:
            if wanted.filter_bitmap is not None:
                raise InvalidInputError(
                    "a filter is for the rows of one shard, and this search is of the whole collection"
                )
            queries = wanted.queries.reshape(-1, dim)
            with self._held_cluster() as cluster:
                images = cluster.images
                filters = None if wanted.filters is None else _filters_of(images, dict(wanted.filters))
                found = cluster.search(
                    queries,
                    wanted.top_k,
                    wanted.ef_search,
                    wanted.beam,
                    filters=filters,
                    images=images,
                    allow_partial=True,
                    max_expansions=wanted.most or None,
                    stop=asker.get(),
                )
            return CollectionResponse(
                SearchResponse(0, "", found.ids, found.distances, pack_stats(found.stats)),
                np.array(found.images, np.uint64),
                found.shards,
                pack_stats(found.stats, MORE_STATS_DTYPE),
                {shard: str(error) for shard, error in found.failures.items()},
            ).encode()
        except SearchCancelledError:
            raise
        except (CotraError, MemoryError) as error:
            return SearchResponse.failed(_code_of(error), _message_of(error)).encode()

    def _expand(self, request: VShardEnvelope) -> Payload:
        self._check_policy("rpc")
        try:
            if (stop := asker.get()) is not None:
                stop.check()
            wanted = ExpandRequest.decode(request.payload)
            offer = self._offer_of(wanted.image)
            expander = _expander_of(offer)
            check_fits(len(wanted.pushes), offer.shard.info.degree)
            with offer.in_use():
                return ExpandResponse(0, "", expander.expand(wanted.queries, wanted.pushes), wanted.image).encode()
        except SearchCancelledError:
            raise
        except (CotraError, MemoryError) as error:
            return ExpandResponse.failed(_code_of(error), _message_of(error)).encode()

    def _region(self, request: VShardEnvelope) -> RegionResponse:
        try:
            wanted = decode_region_request(request.payload)
            offer = self._offer_of(wanted.image)
            if not 0 < len(wanted.peer) <= MAX_NAME:
                raise InvalidInputError(f"a reader's name has 1 to {MAX_NAME} characters, not {len(wanted.peer)}")
            self._leases.renew(wanted.peer)
            transport = _TRANSPORT_OF.get(wanted.want)
            if transport is not None:
                self._check_policy(transport)
            if wanted.want == WANT_QUEUE_PAIR:
                return self._open_queue_pair(offer, wanted)
            if wanted.want == WANT_SHARED_MEMORY:
                return self._offer_memory(offer)
            if wanted.want == WANT_VIEW:
                return self._offer_view(offer, wanted.offset)
            if wanted.want == WANT_RELEASE:
                self._leases.release(wanted.peer, wanted.number)
            elif wanted.want not in (WANT_CAPABILITIES, WANT_LEASE):
                raise InvalidInputError(f"want {wanted.want} is unknown")
            return self._describe(offer)
        except DeniedError:
            raise
        except (CotraError, MemoryError) as error:
            return RegionResponse(code=_code_of(error), message=str(error))

    def _describe(
        self,
        offer: Offer,
        *,
        queue_pair: QueuePairFields | None = None,
        number: int = 0,
        shared_memory: SharedMemoryFields | None = None,
        view: ViewFields | None = None,
    ) -> RegionResponse:
        region = None if offer.registration is None else offer.registration.region
        return RegionResponse(
            shard=as_fields(ShardFields, offer.shard.info),
            transports=self._reasons(),
            region=None if region is None else as_fields(RegionFields, region),
            queue_pair=queue_pair,
            number=number,
            shared_memory=shared_memory,
            view=view,
        )

    def _reasons(self) -> dict[str, str]:
        """For each transport why who asks cannot have it; "" where it can."""
        allowed = self._check_policy().transports
        return {
            name: self.unavailable.get(name, "" if name in allowed else "not allowed by the owner's policy")
            for name in TRANSPORTS
        }

    def _offer_memory(self, offer: Offer) -> RegionResponse:
        memory = offer.handover
        if memory is None:
            raise InvalidInputError(f"shared memory: {self.unavailable['shm']}")
        return self._describe(offer, shared_memory=SharedMemoryFields(memory.name, memory.length, boot_id()))

    def _offer_view(self, offer: Offer, offset: int) -> RegionResponse:
        expander = _expander_of(offer)
        with offer.in_use():
            piece = expander.read_view(offset, VIEW_PIECE_BYTES)
        return self._describe(offer, view=ViewFields(expander.view_bytes, piece))

    def _open_queue_pair(self, offer: Offer, wanted: RegionRequest) -> RegionResponse:
        if self._device is None:
            raise VerbsUnavailableError(self.unavailable["verbs"])
        if wanted.queue_pair is None:
            raise InvalidInputError("a queue pair's attributes are missing")
        remote = QueuePairAttributes(**fields_of(wanted.queue_pair))
        most, names = self._check_policy("verbs").queue_pairs, asker_names.get()
        number, queue_pair = self._leases.lease(wanted.peer, lambda: self._connect(remote), names, most)
        return self._describe(offer, queue_pair=as_fields(QueuePairFields, queue_pair.local), number=number)

    def _connect(self, remote: QueuePairAttributes) -> QueuePair:
        assert self._device is not None
        queue_pair = QueuePair(self._device, self._options_towards(remote.gid))
        try:
            queue_pair.connect(remote)
        except BaseException:
            queue_pair.close()
            raise
        return queue_pair

    # ---- the end ----

    def _close_parts(self) -> None:
        self._leases.close()
        with self._lock:
            offers = [offer for _, offer in self._retired] + ([self._offer] if self._offer is not None else [])
            self._retired, self._offer = [], None
        for offer in offers:
            offer.close()
        if self._device is not None:
            self._device.close()
        self._device = None

    def drain(self, grace_s: float) -> None:
        """Refuses new requests, and waits until those in progress are answered, `grace_s` seconds at most; what is left then is
        ended. READs go on. Another thread may call it with less meanwhile."""
        self._rpc.drain(grace_s)

    def close(self) -> None:
        """Stops listening, takes back the queue pairs and deregisters the region: peers' READs fail from then on. Idempotent.

        In a child of `fork` it closes nothing: all is the parent's.
        """
        if os.getpid() != self._pid:
            return
        self._rpc.close()
        self._close_parts()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _expander_of(offer: Offer) -> Expander:
    """What works for readers that ask over RPC."""
    if offer.expander is None:
        raise InvalidInputError("this owner does not offer rpc")
    return offer.expander


def _check_cost(n_queries: int, wanted: SearchRequest) -> None:
    """Raises `InvalidInputError` for a request that would take too long, or whose answer would be too large."""
    if n_queries * wanted.ef_search > _MAX_EF:
        raise InvalidInputError(
            f"{n_queries} queries with ef {wanted.ef_search} are too many at once: ask for {_MAX_EF} in all at most"
        )
    if n_queries * (wanted.top_k * _ANSWER_BYTES + STATS_BYTES) > _MAX_ANSWER_BYTES:
        raise InvalidInputError(
            f"{wanted.top_k} answers to each of {n_queries} queries pass the limit of {_MAX_ANSWER_BYTES} bytes: "
            "ask for less at once"
        )


def _code_of(error: Exception) -> int:
    return STALE if isinstance(error, StaleShardError) else FAILED


def _message_of(error: Exception) -> str:
    return str(error) if isinstance(error, StaleShardError) else f"{type(error).__name__}: {error}"


def _filters_of(images: Sequence[int], filters: dict[int, bytes | None]) -> list[bytes | None]:
    """The filter of each image. Raises `StaleShardError` where one has none: its rows must not be returned unfiltered."""
    if not set(images) <= set(filters):
        raise StaleShardError("the filters are of other images than those that this owner is connected to")
    return [filters[image] for image in images]


def _answer(request: VShardEnvelope, payload: Payload) -> VShardEnvelope:
    return VShardEnvelope(
        WIRE_VERSION,
        request.msg_type.response,
        request.target_node,
        request.source_node,
        request.vshard_id,
        payload,
    )
