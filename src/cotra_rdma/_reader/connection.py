"""One shard as a reader sees it: its control connection, the path that was chosen to it, and how to open channels on it."""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from cotra_rdma._core.constants import METRICS
from cotra_rdma._core.image_identity import ImageIdentity
from cotra_rdma._core.memory_region import MemoryRegion
from cotra_rdma._core.remote_expansion import Expansions
from cotra_rdma._core.stats import STATS_DTYPE, unpack_stats
from cotra_rdma._core.stop import Stop
from cotra_rdma._core.tracing import Tracing
from cotra_rdma._native import memfd_handover as handover
from cotra_rdma._native.arena import Arena
from cotra_rdma._native.channel import Channel, FabricModel
from cotra_rdma._native.graph_engine import Source
from cotra_rdma._native.image import ImageInfo
from cotra_rdma._native.list_engine import IvfTable
from cotra_rdma._native.record_cache import RecordCache
from cotra_rdma._native.verbs import Device, QueuePair, QueuePairAttributes, QueuePairOptions
from cotra_rdma._native.view import View
from cotra_rdma._reader.batch import Answer, Batch, CollectionAnswer, OutOfTimeError
from cotra_rdma._reader.cost_model import Link
from cotra_rdma._reader.counters import OK, OwnerCounts
from cotra_rdma._routing.calibration import Calibration
from cotra_rdma._routing.coarse_table import CoarseTable
from cotra_rdma.errors import (
    CotraError,
    DeadlineError,
    FormatError,
    InvalidInputError,
    PeerError,
    StaleShardError,
    TransportError,
    VerbsUnavailableError,
)
from cotra_rdma.protocol.address import parse_address
from cotra_rdma.protocol.collection_search import CollectionResponse
from cotra_rdma.protocol.envelope import STALE, WIRE_VERSION, Payload, VShardEnvelope, VShardMessageType, fields_of
from cotra_rdma.protocol.regions import (
    WANT_CAPABILITIES,
    WANT_LEASE,
    WANT_QUEUE_PAIR,
    WANT_RELEASE,
    WANT_SHARED_MEMORY,
    WANT_VIEW,
    QueuePairFields,
    RegionRequest,
    RegionResponse,
    ShardFields,
    as_fields,
    decode_region_response,
    encode_region,
)
from cotra_rdma.protocol.remote_expansion import ExpandRequest, ExpandResponse, split_pushes
from cotra_rdma.protocol.rpc_client import RpcClient
from cotra_rdma.protocol.search import WHOLE_COLLECTION, SearchRequest, SearchResponse, queries_per_message
from cotra_rdma.protocol.service import method_of
from cotra_rdma.protocol.tables import CoarseRouteRequest, CoarseRouteResponse
from cotra_rdma.protocol.tls import Tls

log = logging.getLogger(__name__)

READ = ("verbs", "shm")
"""The paths over which another process's memory is read."""
ONE_SIDED = ("own", *READ)
"""The paths that need nothing of an owner's process: this process's own memory, READs, a mapping."""
LOST = "lost"
"""In the place of a path, where a shard has no owner left."""
_RELEASE_TIMEOUT_MS = 300
_SLOT_BYTES = 4096
_LIST_SLOT_BYTES = 16384  # as many of a list's blocks as fit are one READ
_PROBES = 32
_MAX_DIM = 4096
_MAX_RECORD_BYTES = 1 << 20


class Connection:
    """One of a shard's owners. `transport` is the path to it that is in use, `passed_over` says why the better ones are not."""

    def __init__(
        self,
        index: int,
        address: str,
        *,
        tls: Tls | None,
        timeout_ms: int,
        options: QueuePairOptions,
        fabric: FabricModel | None,
        counts: OwnerCounts | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self._begin(index, address, timeout_ms, fabric, counts, tracing)
        self._client = RpcClient(address, tls=tls, note=self.counts.note)
        self._options = options
        try:
            with self._in_time():
                self._introduce()
        except BaseException:
            self.close()
            raise

    def _introduce(self) -> None:
        self.capabilities = self._ask(WANT_CAPABILITIES)
        shard = self.capabilities.shard
        if shard is None:
            raise FormatError(f"{self}: the answer does not describe the shard")
        if shard.identity is None:
            raise PeerError(
                f"{self}: its owner is of an earlier version, which does not tell its image from others: update it",
                shard=self.index,
            )
        _check_announced(self, shard)
        self.shard, self.image = shard, shard.identity
        self.counts.note_reached(self.image)
        begin = time.perf_counter()
        self._ask_coarse()
        self.link = replace(self.link, rpc_s=time.perf_counter() - begin)

    _client: RpcClient | None
    is_local = False
    """Whether this process owns the shard itself."""
    link: Link
    image: ImageIdentity
    """Of the image that the owner served when this reader came; set by whoever sets `shard`."""

    def _begin(
        self,
        index: int,
        address: str,
        timeout_ms: int,
        fabric: FabricModel | None = None,
        counts: OwnerCounts | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self.index = index
        self.address = address
        self.counts = counts or OwnerCounts()
        self._tracing = tracing
        self.transport = ""
        self.passed_over: dict[str, str] = {}
        self.view: View | None = None
        self.lists: IvfTable | None = None
        self.cache: RecordCache | None = None
        self.coarse: CoarseTable | None = None
        self.calibration: Calibration | None = None
        self.number: int | None = None  # in its collection
        self.link = Link(math.inf, 0.0, 0.0, math.inf)
        self._timeout_ms = timeout_ms
        self._until = math.inf  # on time.monotonic's clock
        self._fabric = fabric
        self._name = secrets.token_hex(8)
        self._client = None
        self._device: Device | None = None
        self._arena: Arena | None = None
        self._first: tuple[Channel, ExitStack] | None = None
        self._gone = False
        self.is_dropped = False  # no engine over it is kept
        self._slot_bytes = _SLOT_BYTES

    def __str__(self) -> str:
        return f"shard {self.index} ({self.address})"

    # ---- calls ----

    @contextmanager
    def _in_time(self) -> Iterator[None]:
        """All calls in the block together take as long as one may."""
        before, self._until = self._until, min(self._until, time.monotonic() + self._timeout_ms / 1000)
        try:
            yield
        finally:
            self._until = before

    @contextmanager
    def _counted(self, kind: VShardMessageType) -> Iterator[None]:
        """The block makes a call, and looks at its answer. It is counted, and is a span where there is one around it."""
        begin, outcome = time.perf_counter(), OK
        try:
            with self._span(kind):
                yield
        except BaseException as error:
            outcome = type(error).__name__
            raise
        finally:
            self.counts.calls.note(kind.name, outcome, time.perf_counter() - begin)

    def _span(self, kind: VShardMessageType) -> AbstractContextManager[object]:
        if self._tracing is None:
            return nullcontext()
        attributes = {"cotra.message_type": kind.name, "cotra.shard": self.index}
        return self._tracing.call(method_of(kind), *parse_address(self.address), attributes)

    def _call(
        self, kind: VShardMessageType, payload: Payload, timeout_ms: int, stop: Stop | None = None
    ) -> VShardEnvelope:
        envelope = VShardEnvelope(WIRE_VERSION, kind, 0, 0, self.index, payload)
        try:
            assert self._client is not None
            headers = () if self._tracing is None else self._tracing.headers()
            return self._client.call(envelope, timeout_ms, stop, headers)
        except TransportError as error:
            hint = "" if hasattr(self, "shard") else " (is it an owner of cotra-rdma, and does it want a certificate?)"
            hint = "" if "nobody listens" in str(error) else hint
            what = str(error).removeprefix(self.address).lstrip()
            raise type(error)(f"{self}{'' if what.startswith(':') else ' '}{what}{hint}", shard=self.index) from None

    def _ask(
        self,
        want: int,
        queue_pair: QueuePairFields | None = None,
        number: int = 0,
        timeout_ms: int | None = None,
        offset: int = 0,
    ) -> RegionResponse:
        image = self.image if want in (WANT_QUEUE_PAIR, WANT_SHARED_MEMORY, WANT_VIEW) else None
        request = RegionRequest(want, self._name, queue_pair, number, offset, image)
        kind = VShardMessageType.VECTOR_MEM_REGION_REQUEST
        with self._counted(kind):
            reply = self._call(kind, encode_region(request), timeout_ms or self._left_ms())
            answer = decode_region_response(reply.payload)
            self._check_code(answer.code, answer.message)
            if hasattr(self, "image") and answer.shard != self.shard:
                raise self._stale(answer.shard.identity if answer.shard else None)
        return answer

    def _left_ms(self) -> int:
        left_s = self._until - time.monotonic()
        return self._timeout_ms if left_s == math.inf else max(1, min(self._timeout_ms, round(left_s * 1000)))

    def _check_code(self, code: int, message: str) -> None:
        """Raises what an answer with this code says."""
        if code:
            raise (StaleShardError if code == STALE else PeerError)(f"{self}: {message}", shard=self.index)

    def _check_image(self, image: ImageIdentity | None) -> None:
        """Raises `StaleShardError` unless an answer is about the image that this reader asked about."""
        if image != self.image:
            raise self._stale(image)

    def _stale(self, image: ImageIdentity | None) -> StaleShardError:
        serves = "an image that it does not name" if image is None else image
        return StaleShardError(
            f"{self} serves {serves}, and had {self.image} when this reader connected", shard=self.index
        )

    def _ask_coarse(self) -> None:
        """The shard from afar, where its owner tells: what Compass chooses by."""
        kind = VShardMessageType.VECTOR_COARSE_ROUTE_REQUEST
        with self._counted(kind):
            reply = self._call(kind, CoarseRouteRequest().encode(), self._left_ms())
            self._take_coarse(reply.payload)

    def _take_coarse(self, payload: Payload) -> None:
        answer = CoarseRouteResponse.decode(payload)
        if answer.code == 0:
            table = answer.table
            self.coarse = CoarseTable(
                table.centroids.astype(np.float32), table.sizes.astype(np.int64), table.radii.astype(np.float32)
            )
            told = answer.collection or {}
            if isinstance(told.get("shard"), int):
                self.number = told["shard"]
            if told.get("calibration") is not None:
                self.calibration = Calibration.from_json(told["calibration"])

    # ---- choosing the path ----

    def choose(self, wanted: str, device: Device | None, no_device: str) -> None:
        """Takes the path that was asked for, or for "auto" the best that works: verbs, shm, rpc.

        Raises what is wrong when a path was asked for by name.
        """
        with self._in_time():
            self._choose(wanted, device, no_device)

    def _choose(self, wanted: str, device: Device | None, no_device: str) -> None:
        for name in ("verbs", "shm", "rpc") if wanted == "auto" else (wanted,):
            reason = self.capabilities.transports.get(name, "this owner does not know it")
            try:
                if reason:
                    kind = VerbsUnavailableError if name == "verbs" else TransportError
                    raise kind(f"{self} does not offer {name}: {reason}", shard=self.index)
                if name == "verbs":
                    if device is None:
                        raise VerbsUnavailableError(f"no verbs on this side: {no_device}", shard=self.index)
                    self._device = device
                elif name == "shm":
                    self._map()
                self.transport = name
                if name in ONE_SIDED:
                    self._connect_view()
            except CotraError as error:
                if wanted != "auto" or isinstance(error, (FormatError, InvalidInputError)):
                    raise
                self.transport = ""
                self.passed_over[name] = str(error)
                continue
            if self.passed_over:
                log.info("%s is reached over %s; passed over: %s", self, name, self.passed_over)
            return
        raise TransportError(f"{self}: no transport works: {self.passed_over}", shard=self.index)

    def _map(self) -> None:
        offer = self._ask(WANT_SHARED_MEMORY).shared_memory
        if offer is None or offer.boot_id != handover.boot_id():
            raise TransportError(f"{self} is on another host", shard=self.index)
        self._arena = handover.receive(offer.socket, offer.length)

    def _connect_view(self) -> None:
        channel, stack = self.open_channel()
        try:
            self._read_view(channel)
        except BaseException:
            stack.close()
            raise
        if self.lists is None:
            self._first = (channel, stack)
        else:  # made now, for a search must not need the owner
            stack.close()
            self._first = self.open_channel()

    def _read_view(self, channel: Channel) -> None:
        """Reads what is kept of the shard, and times some READs."""
        self.view = View.open(channel, timeout_s=self._timeout_ms / 1000)
        info, told = self.view.info, self.shard
        if any(getattr(info, name) != value for name, value in fields_of(told).items()):
            raise self._stale(info.identity)
        self.link = replace(self.link, **_measure(channel))
        if info.ivf_bytes:
            self.lists = IvfTable.open(channel, self.view, timeout_s=self._timeout_ms / 1000)
            self._slot_bytes = max(_LIST_SLOT_BYTES, self.lists.info.block_bytes)

    @property
    def owner(self) -> Any:
        """What this peer was made of: an address, or what this process holds."""
        return self.address

    def take_over(self, failed: Connection) -> None:
        """Goes on with what was kept of another owner's records, which are the same."""
        if self.cache is None and self.transport != "own":
            self.cache, failed.cache = failed.cache, None

    def open_source(self, slots: int = 0) -> tuple[Source, ExitStack]:
        """How one engine comes by the records, and the stack that closes it: a channel where they can be READ, with so many slots
        (0: as many as usual)."""
        return self.open_channel(slots) if self.transport in ONE_SIDED else (None, ExitStack())

    @property
    def info(self) -> ImageInfo | None:
        """The image's header; None for a shard that is only asked over RPC."""
        return None if self.view is None else self.view.info

    @property
    def memory(self) -> Arena | None:
        """The owner's memory, mapped here; None where it is not of this host."""
        return self._arena

    # ---- one-sided ----

    def make_cache(self, budget_bytes: int) -> None:
        """Keeps the records that walks read most often, in so many bytes. Raises `InvalidInputError` where they hold none."""
        assert self.view is not None
        try:
            self.cache = RecordCache.create(self.view, budget_bytes)
        except InvalidInputError as error:
            raise InvalidInputError(f"{self}: {error}", shard=self.index) from None

    def open_channel(self, slots: int = 0) -> tuple[Channel, ExitStack]:
        """A new channel for one engine, and the stack that closes it and all it hangs on. `slots`: READs at once, 0 as usual."""
        if self._first is not None and not slots:
            first, self._first = self._first, None
            return first
        with ExitStack() as stack:
            slot_bytes = max(self._slot_bytes, self.shard.record_bytes)
            if self.transport == "shm":
                assert self._arena is not None
                channel = stack.enter_context(Channel.shm(self._arena, slots=slots, slot_bytes=slot_bytes))
            else:
                channel = self._open_verbs(stack, slots, slot_bytes)
            if self._fabric is not None:
                channel = stack.enter_context(Channel.model(channel, self._fabric))
            return channel, stack.pop_all()

    def _open_verbs(self, stack: ExitStack, slots: int, slot_bytes: int) -> Channel:
        assert self._device is not None
        queue_pair = stack.enter_context(QueuePair(self._device, self._options))
        answer = self._ask(WANT_QUEUE_PAIR, as_fields(QueuePairFields, queue_pair.local))
        stack.callback(self._release, answer.number)
        if answer.queue_pair is None or answer.region is None:
            raise FormatError(f"{self}: the answer has no queue pair", shard=self.index)
        queue_pair.connect(QueuePairAttributes(**fields_of(answer.queue_pair)))
        region = MemoryRegion(**fields_of(answer.region))
        return stack.enter_context(Channel.verbs(queue_pair, region, slots=slots, slot_bytes=slot_bytes))

    def _release(self, number: int) -> None:
        """Best effort: an owner that is gone holds nothing, and one that missed it takes the queue pair back with the lease."""
        if self._gone:
            return
        try:
            self._ask(WANT_RELEASE, number=number, timeout_ms=_RELEASE_TIMEOUT_MS)
        except CotraError as error:
            log.debug("%s: its queue pair was not released: %s", self, error)
            self._gone = True

    def renew(self) -> None:
        """Keeps the queue pairs that the owner holds for this reader."""
        try:
            self._ask(WANT_LEASE)
        except CotraError:
            self.counts.note("not renewed")
            raise
        self.counts.note("renewed")

    # ---- RPC ----

    def search(self, batch: Batch) -> Answer:
        """The owner searches; one message for the batch (several where one would be too large).

        Args:
            job: its filters and mask are those of this shard alone.
        """
        asked = np.arange(len(batch.queries)) if batch.mask is None else np.flatnonzero(batch.mask[:, 0])
        labels = np.full((len(batch.queries), batch.k), -1, np.int64)
        distances = np.full(labels.shape, np.inf, np.float32)
        stats = np.zeros(len(batch.queries), STATS_DTYPE)
        filtered = batch.filters is not None and batch.filters[0] is not None
        rows = queries_per_message(batch.queries.shape[1], batch.k, batch.ef, filtered=filtered)
        for begin in range(0, len(asked), rows):
            part = asked[begin : begin + rows]
            with self._counted(VShardMessageType.VECTOR_SCATTER_REQUEST):
                labels[part], distances[part], stats[part] = self._search_part(batch, batch.queries[part])
            batch.stop.note(len(part))
        batch.stop.note(len(batch.queries) - len(asked))
        return labels, distances, stats

    def _call_to_search(self, batch: Batch, request: bytes) -> VShardEnvelope:
        wait_s = batch.wait_s()
        try:
            return self._call(
                VShardMessageType.VECTOR_SCATTER_REQUEST, request, max(1, round(wait_s * 1000)), batch.stop
            )
        except DeadlineError:
            if batch.is_cut_short(wait_s):
                raise OutOfTimeError from None
            raise

    def _search_part(self, batch: Batch, queries: npt.NDArray[np.float32]) -> Answer:
        bitmap = None if batch.filters is None else batch.filters[0]
        request = SearchRequest(
            "", queries, batch.k, batch.ef, bitmap, batch.beam, most=batch.most or 0, image=self.image
        ).encode()
        begin = time.perf_counter_ns()
        reply = self._call_to_search(batch, request)
        answer = SearchResponse.decode(reply.payload)
        self._check_code(answer.code, answer.message)
        self._check_image(answer.image)
        try:
            answer.check(len(queries), batch.k)
            stats = unpack_stats(answer.stats, len(queries))
        except FormatError as error:
            raise FormatError(f"{self}: {error}", shard=self.index) from None
        if answer.incomplete is not None:
            stats["incomplete"] = answer.incomplete
        # What the owner read in its own memory crossed no wire: this side made one round of one message.
        stats["reads"], stats["rounds"] = 0, 1
        stats["read_bytes"] = (len(request) + reply.payload_len) // len(queries)
        stats["latency_ns"] = time.perf_counter_ns() - begin  # the whole batch's: nobody has an answer before that
        return answer.labels, answer.distances, stats

    def search_all(self, batch: Batch, images: Sequence[int] = ()) -> CollectionAnswer:
        """The owner searches the whole collection, as it sees it; messages as of `search`.

        Args:
            job: without mask.
            images: the checksum of the image of each shard that the job has a filter for.

        Raises `PeerError` where the owner has no connection to the other shards, or is of an earlier version.
        """
        if batch.mask is not None:
            raise InvalidInputError("a search that a peer makes of the whole collection takes no mask")
        filters = None if batch.filters is None else tuple(zip(images, batch.filters, strict=True))
        rows = queries_per_message(batch.queries.shape[1], batch.k, batch.ef, filtered=filters is not None)
        starts = range(0, max(len(batch.queries), 1), rows)
        parts = []
        for begin in starts:
            part = batch.queries[begin : begin + rows]
            with self._counted(VShardMessageType.VECTOR_SCATTER_REQUEST):
                parts.append(self._search_all_part(batch, part, filters))
            batch.stop.note(len(part))
        if any(part.images != parts[0].images for part in parts):
            raise FormatError(f"{self}: its shards changed during the search", shard=self.index)
        failures = {shard: why for part in parts for shard, why in part.failures.items()}
        columns = zip(*((part.labels, part.distances, part.shards, part.stats) for part in parts), strict=True)
        labels, distances, shards, stats = (np.concatenate(column) for column in columns)
        return CollectionAnswer(labels, distances, shards, parts[0].images, stats, failures)

    def _search_all_part(
        self,
        batch: Batch,
        queries: npt.NDArray[np.float32],
        filters: tuple[tuple[int, bytes | None], ...] | None,
    ) -> CollectionAnswer:
        scope = WHOLE_COLLECTION
        wanted = SearchRequest("", queries, batch.k, batch.ef, None, batch.beam, scope, batch.most or 0, filters)
        request = wanted.encode()
        begin = time.perf_counter_ns()
        reply = self._call_to_search(batch, request)
        told = CollectionResponse.decode(reply.payload)
        answer = told.answer
        self._check_code(answer.code, answer.message)
        try:
            answer.check(len(queries), batch.k)
            stats = unpack_stats(answer.stats, len(queries), told.more_stats)
        except FormatError as error:
            raise FormatError(f"{self}: {error}", shard=self.index) from None
        stats["latency_ns"] = time.perf_counter_ns() - begin  # the whole batch's, as in `search`
        images = tuple(told.images.tolist())
        return CollectionAnswer(answer.labels, answer.distances, told.shards, images, stats, told.failures)

    # ---- pushed expansions: of a shard that cannot be read ----

    def load_view(self) -> View:
        """Header and upper layers over RPC, in pieces; the caller closes the view.

        Raises `PeerError` where the owner does not offer it, `FormatError` and `ChecksumError` for what is not the shard's.
        """
        with self._in_time():
            data = self._load_pieces()
        view = View.load(data)
        info = view.info
        if any(getattr(info, name) != value for name, value in fields_of(self.shard).items()):
            view.close()
            raise self._stale(info.identity)
        return view

    def _load_pieces(self) -> bytearray:
        data, length = bytearray(), 0
        while not data or len(data) < length:
            piece = self._ask(WANT_VIEW, offset=len(data)).view
            length = length or (piece.length if piece is not None else 0)
            left = length - len(data)
            if piece is None or piece.length != length or not 0 < len(piece.data) <= left <= self.shard.image_bytes:
                raise FormatError(f"{self}: a piece that does not fit its upper layers", shard=self.index)
            data += piece.data
        return data

    def expand(
        self,
        queries: npt.NDArray[np.float32],
        pushes: npt.NDArray[np.void],
        timeout_s: float,
        stop: Stop | None = None,
    ) -> Expansions:
        """The owner expands nodes; one message for the round (several where one would be too large).

        Args:
            queries: float32[n_queries, dim], of which those travel that occur in `pushes`.
            pushes: `PUSH_DTYPE`[n]; those of one query follow each other.
            timeout_s: for each message.
            stop: ends the wait for it.

        Raises `TransportError` where the owner is gone, `PeerError` where it refuses, `FormatError` for an answer that does not
        fit. The view must be there (`load_view`).
        """
        assert self.view is not None
        degree = self.view.info.degree
        parts = [
            self._expand_part(ExpandRequest.of(queries, pushes[part], self.image), degree, timeout_s, stop)
            for part in split_pushes(pushes, queries.shape[1], degree)
        ]
        return Expansions.joined(parts)

    def _expand_part(self, request: ExpandRequest, degree: int, timeout_s: float, stop: Stop | None) -> Expansions:
        kind = VShardMessageType.VECTOR_EXPAND_REQUEST
        with self._counted(kind):
            reply = self._call(kind, request.encode(), max(1, round(timeout_s * 1000)), stop)
            answer = ExpandResponse.decode(reply.payload)
            self._check_code(answer.code, answer.message)
            self._check_image(answer.image)
            found = answer.told.found
            if len(found) != len(request.pushes) or (found["count"] > degree).any():
                raise FormatError(
                    f"{self}: {len(found)} expansions of up to {found['count'].max(initial=0)} neighbours to "
                    f"{len(request.pushes)} nodes of {degree}",
                    shard=self.index,
                )
        return answer.told

    def close(self) -> None:
        """Closes everything; engines that were opened on it must be closed before."""
        if self._first is not None:
            self._first[1].close()
        for part in (self.lists, self.cache, self.view, self._arena):
            if part is not None:
                part.close()
        self.retire()

    def retire(self) -> None:
        """Lets the owner go. What other threads' searches still read through stays until they let go of it."""
        if self._client is not None:
            self._client.close()


def _measure(channel: Channel) -> dict[str, float]:
    """What a channel can do: fields of `Link`."""
    short = min(1024, channel.info.region_bytes)
    long = min(channel.info.slot_bytes, channel.info.region_bytes)
    depth = min(16, channel.info.slots)
    here = np.zeros(_PROBES, np.uint64)
    _, latencies = channel.read_loop(here, short)
    many_s, _ = channel.read_loop(here, short, depth=depth)
    long_s, _ = channel.read_loop(here, long, depth=depth)
    return {
        "rtt_s": float(np.median(latencies)) / 1e9,
        "reads_per_s": _PROBES / max(many_s, 1e-9),
        "bytes_per_s": _PROBES * long / max(long_s, 1e-9),
    }


def _check_announced(connection: Connection, shard: ShardFields) -> None:
    """Raises `FormatError` for numbers that no image has, before anything is made of them."""
    for name, least, most in (
        ("dim", 1, _MAX_DIM),
        ("count", 0, 2**32),
        ("record_bytes", 1, _MAX_RECORD_BYTES),
        ("image_bytes", 1, 2**56),
        ("generation", 0, 2**64 - 1),
    ):
        if not least <= getattr(shard, name) <= most:
            raise FormatError(f"{connection}: it announces {name} {getattr(shard, name)}", shard=connection.index)
    if shard.metric not in METRICS:
        raise FormatError(f"{connection}: it announces the metric {shard.metric[:20]!r}", shard=connection.index)


def check_alike(connections: list[Connection]) -> None:
    """Raises `InvalidInputError` when shards differ in what a search needs alike."""
    for connection in connections[1:]:
        first = connections[0]
        for what in ("dim", "metric"):
            a, b = getattr(first.shard, what), getattr(connection.shard, what)
            if a != b:
                raise InvalidInputError(
                    f"mixed shards: {first} has {what} {a}, {connection} has {b}", shard=connection.index
                )
