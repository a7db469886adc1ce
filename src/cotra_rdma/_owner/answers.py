"""`Answers`: what an owner answers to each request."""

from __future__ import annotations

import ipaddress
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from cotra_rdma._core.stats import MORE_STATS_DTYPE, pack_stats
from cotra_rdma._native.memfd_handover import boot_id
from cotra_rdma._native.verbs import Device, QueuePair, QueuePairAttributes, QueuePairOptions
from cotra_rdma._owner.expander import Expander
from cotra_rdma._owner.leases import MAX_NAME, Leases
from cotra_rdma._owner.offer import Offer, Offers
from cotra_rdma._owner.policy import PolicyFile, Rule
from cotra_rdma._owner.rates import Rates
from cotra_rdma.errors import (
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
from cotra_rdma.protocol.rpc_server import Later, Steps, asker, asker_names
from cotra_rdma.protocol.search import STATS_BYTES, WHOLE_COLLECTION, SearchRequest, SearchResponse
from cotra_rdma.protocol.tables import (
    BuildExchangeRequest,
    BuildExchangeResponse,
    CoarseRouteRequest,
    CoarseRouteResponse,
)

if TYPE_CHECKING:
    from cotra_rdma._reader.cluster import Cluster

log = logging.getLogger(__name__)

TRANSPORTS = ("verbs", "shm", "rpc")

_STEP_EF = 1 << 15
"""The largest sum of ef over the queries of one step. It is about the number of expansions, and of microseconds."""
_MAX_EF = 1 << 21
"""The largest sum of ef over the queries of a request."""
_ANSWER_BYTES = 12  # an id and a distance
_MAX_ANSWER_BYTES = 32 << 20
_TRANSPORT_OF = {WANT_QUEUE_PAIR: "verbs", WANT_SHARED_MEMORY: "shm", WANT_VIEW: "rpc"}
_Made = Payload | Callable[[], Payload] | Iterator[Payload | None]
"""The payload of an answer, or what makes it: see `rpc_server.Handler`."""

Exchange = Callable[[BuildExchangeRequest], object]
"""Takes the table that a builder sends (type 54).

Any of the server's threads calls it, and several may call it at once.
What it returns is ignored.
What it raises is the answer to the builder, which may send the table again.
A list's `append` is enough.
"""


class Answers:
    """Answers the requests that readers and builders send to one owner.

    Any thread may call the methods.
    """

    def __init__(
        self,
        offers: Offers,
        leases: Leases,
        device: Device | None,
        options: QueuePairOptions,
        unavailable: Mapping[str, str],
        *,
        exchange: Exchange | None,
        policy: PolicyFile | None,
        number: int | None,
    ) -> None:
        """Answers with these parts of a server, which stay the server's.

        Args:
            offers: the images that the owner publishes.
            leases: the queue pairs that readers hold.
            device: makes queue pairs, or None if verbs is not offered.
            options: the options of queue pairs.
            unavailable: why a transport is not offered, by the name of the transport.
            exchange, policy, number: as for `serve`.
        """
        self._offers, self._leases, self._device = offers, leases, device
        self._options, self._unavailable = options, unavailable
        self._exchange, self._policy, self._number = exchange, policy, number
        self._rates = Rates()
        self._lock = threading.Lock()
        self._counts: Counter[VShardMessageType] = Counter()
        self._let_go = threading.Condition()
        self._cluster: Cluster | None = None
        self._searching: Counter[Cluster] = Counter()  # for each cluster, the searches in progress over it
        self._made_by: dict[VShardMessageType, Callable[[VShardEnvelope], _Made]] = {
            VShardMessageType.VECTOR_SCATTER_REQUEST: self._search,
            VShardMessageType.VECTOR_COARSE_ROUTE_REQUEST: self._describe_coarsely,
            VShardMessageType.VECTOR_BUILD_EXCHANGE_REQUEST: self._take_table,
            VShardMessageType.VECTOR_MEM_REGION_REQUEST: lambda request: encode_region(self._region(request)),
            VShardMessageType.VECTOR_EXPAND_REQUEST: self._expand,
        }

    @property
    def counts(self) -> Mapping[VShardMessageType, int]:
        """The number of requests so far, by type."""
        with self._lock:
            return dict(self._counts)

    def search_with(self, cluster: Cluster | None) -> None:
        """Answers searches of the whole collection over `cluster` from now on. None refuses them.

        It returns when no search is in progress over the cluster before.
        """
        with self._let_go:
            before, self._cluster = self._cluster, cluster
            self._let_go.wait_for(lambda: before is cluster or before is None or not self._searching[before])

    @contextmanager
    def _held_cluster(self) -> Iterator[Cluster]:
        """Lends the cluster for one search of the whole collection.

        Raises:
            InvalidInputError: there is none.
        """
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

    def _check_policy(self, transport: str | None = None) -> Rule:
        """Returns the rule of the reader that asks.

        Raises:
            DeniedError: it may not read this shard, or not by `transport`.
        """
        return Rule() if self._policy is None else self._policy.check(asker_names.get(), self._number, transport)

    def handle(self, request: VShardEnvelope) -> VShardEnvelope | Later | Steps:
        """Answers a request, as a `rpc_server.Handler` does.

        Raises:
            DeniedError: the policy does not allow the request.
            BusyError: the sender has moved as many bytes as the policy allows for now.
        """
        with self._lock:
            self._counts[request.msg_type] += 1
        rate, names = self._check_policy().bytes_per_s, asker_names.get()

        def answer(payload: Payload) -> VShardEnvelope:
            response = _answer(request, payload)
            if rate is not None:
                self._rates.charge(names, request.payload_len + response.payload_len, rate)
            return response

        if rate is not None:
            self._rates.check(names)
        made = self._made_by[request.msg_type](request)
        if callable(made):
            return lambda: answer(made())
        if isinstance(made, Iterator):
            return (None if step is None else answer(step) for step in made)
        return answer(made)

    def _describe_coarsely(self, request: VShardEnvelope) -> bytes:
        try:
            CoarseRouteRequest.decode(request.payload)
            coarse = self._offers.now.coarse
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
        except Exception as error:  # the callback may raise anything, and the builder waits for an answer
            log.exception("the exchange callback failed")
            return BuildExchangeResponse(FAILED, f"{type(error).__name__}: {error}").encode()

    def _search(self, request: VShardEnvelope) -> _Made:
        self._check_policy("rpc")
        try:
            wanted = SearchRequest.decode(request.payload)
            offer = self._offers.of(wanted.image)
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
        """Searches some queries at a time. Between the steps, the thread can answer other requests."""
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
        """Searches the whole collection by this process's cluster.

        The cluster asks each other owner about that owner's shard only, so no owner passes the search on.
        """
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
            offer = self._offers.of(wanted.image)
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
            offer = self._offers.of(wanted.image)
            if not 0 < len(wanted.peer) <= MAX_NAME:
                raise InvalidInputError(f"a reader's name has 1 to {MAX_NAME} characters, not {len(wanted.peer)}")
            self._leases.renew(wanted.peer, asker_names.get())
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
                self._leases.release(wanted.peer, wanted.number, asker_names.get())
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
        """For each transport, returns why the reader that asks cannot have it, or "" if it can."""
        allowed = self._check_policy().transports
        return {
            name: self._unavailable.get(name, "" if name in allowed else "not allowed by the owner's policy")
            for name in TRANSPORTS
        }

    def _offer_memory(self, offer: Offer) -> RegionResponse:
        memory = offer.handover
        if memory is None:
            raise InvalidInputError(f"shared memory: {self._unavailable['shm']}")
        return self._describe(offer, shared_memory=SharedMemoryFields(memory.name, memory.length, boot_id()))

    def _offer_view(self, offer: Offer, offset: int) -> RegionResponse:
        expander = _expander_of(offer)
        with offer.in_use():
            piece = expander.read_view(offset, VIEW_PIECE_BYTES)
        return self._describe(offer, view=ViewFields(expander.view_bytes, piece))

    def _open_queue_pair(self, offer: Offer, wanted: RegionRequest) -> RegionResponse:
        if self._device is None:
            raise VerbsUnavailableError(self._unavailable["verbs"])
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

    def _options_towards(self, gid: bytes) -> QueuePairOptions:
        """Returns the options of a queue pair towards a reader with this GID.

        The GID holds the reader's address, by which this side's GIDs are ranked.
        """
        address = ipaddress.IPv6Address(gid) if len(gid) == 16 else None
        if self._options.peer_address is not None or not address or not int(address):
            return self._options
        return replace(self._options, peer_address=str(address.ipv4_mapped or address))


def _expander_of(offer: Offer) -> Expander:
    """Returns the expander of an image.

    Raises:
        InvalidInputError: the owner does not offer rpc.
    """
    if offer.expander is None:
        raise InvalidInputError("this owner does not offer rpc")
    return offer.expander


def _check_cost(n_queries: int, wanted: SearchRequest) -> None:
    """Checks that a request does not take too long, and that its answer is not too large.

    Raises:
        InvalidInputError: it does, or is.
    """
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
    """Returns the filter of each image, in the order of `images`.

    Raises:
        StaleShardError: an image has no filter. Its rows must not be returned unfiltered.
    """
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
