"""`Connection`: a reader's side of one shard: the control connection, the path that was chosen, and how channels are opened."""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
from cotra_rdma.protocol.tables import CoarseRouteRequest, CoarseRouteResponse
from cotra_rdma.protocol.tls import Tls

log = logging.getLogger(__name__)

READ = ("verbs", "shm")
"""The paths by which a reader READs another process's memory."""
ONE_SIDED = ("own", *READ)
"""The paths that need no work of the owner's process. "own" is memory of the reader's process."""
LOST = "lost"
"""Stands in place of a path if a shard has no owner left."""
_RELEASE_TIMEOUT_MS = 300
_SLOT_BYTES = 4096
_LIST_SLOT_BYTES = 16384  # one READ takes as many of a list's blocks as fit a slot
_PROBES = 32  # READs in each measurement of a link
_MAX_DIM = 4096
_MAX_RECORD_BYTES = 1 << 20


class Connection:
    """A connection to one owner of a shard.

    Attributes:
        index: the position of the shard in the cluster.
        address: HOST:PORT of the owner.
        transport: the path that is in use; "" before `choose`.
        passed_over: why a better path is not in use, by the name of that path.
        capabilities: what the owner said at connect: the shard, the transports, the memory region.
        shard: the shard's sizes, as the owner announced them.
        image: names the image that the owner served at connect. Whoever sets `shard` sets it too.
        view: the shard's header and navigation section, or None if the shard is only asked over RPC.
        lists: the shard's list table, or None.
        cache: the record cache of the shard, or None.
        coarse: the shard's coarse table, or None if the owner has none.
        calibration: the calibration of the shard's collection, or None.
        number: the shard's number in its collection, or None if the owner does not say.
        link: what the path costs, as measured at connect.
        is_local: whether this process owns the shard.
        is_dropped: whether the engine pool keeps no engine over this connection any more.
    """

    def __init__(
        self,
        index: int,
        address: str,
        *,
        tls: Tls | None,
        timeout_ms: int,
        options: QueuePairOptions,
        fabric: FabricModel | None,
    ) -> None:
        """Makes the control connection, and asks for the shard's sizes and its coarse table. `choose` then chooses the path.

        Args:
            index: the position of the shard in the cluster.
            address: HOST:PORT of the owner.
            tls: this reader's certificate, or None for a plain connection.
            timeout_ms: the time-out of each call to the owner.
            options: the options of this side's queue pairs.
            fabric: the model that every READ goes through, or None.

        Raises:
            TransportError: the owner cannot be reached.
            PeerError: the owner refused, or is of a version that does not name its image.
            FormatError: an answer is malformed.
        """
        self._begin(index, address, timeout_ms, fabric)
        self._client = RpcClient(address, tls=tls)
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
        begin = time.perf_counter()
        self._ask_coarse()
        self.link = replace(self.link, rpc_s=time.perf_counter() - begin)

    _client: RpcClient | None
    is_local = False
    link: Link
    image: ImageIdentity

    def _begin(self, index: int, address: str, timeout_ms: int, fabric: FabricModel | None = None) -> None:
        self.index = index
        self.address = address
        self.transport = ""
        self.passed_over: dict[str, str] = {}
        self.view: View | None = None
        self.lists: IvfTable | None = None
        self.cache: RecordCache | None = None
        self.coarse: CoarseTable | None = None
        self.calibration: Calibration | None = None
        self.number: int | None = None
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
        self.is_dropped = False
        self._slot_bytes = _SLOT_BYTES

    def __str__(self) -> str:
        return f"shard {self.index} ({self.address})"

    # ---- calls ----

    @contextmanager
    def _in_time(self) -> Iterator[None]:
        """Bounds all calls in the block together by the time-out of one call."""
        before, self._until = self._until, min(self._until, time.monotonic() + self._timeout_ms / 1000)
        try:
            yield
        finally:
            self._until = before

    def _call(
        self, kind: VShardMessageType, payload: Payload, timeout_ms: int, stop: Stop | None = None
    ) -> VShardEnvelope:
        envelope = VShardEnvelope(WIRE_VERSION, kind, 0, 0, self.index, payload)
        try:
            assert self._client is not None
            return self._client.call(envelope, timeout_ms, stop)
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
        reply = self._call(
            VShardMessageType.VECTOR_MEM_REGION_REQUEST, encode_region(request), timeout_ms or self._left_ms()
        )
        answer = decode_region_response(reply.payload)
        self._check_code(answer.code, answer.message)
        if hasattr(self, "image") and answer.shard != self.shard:
            raise self._stale(answer.shard.identity if answer.shard else None)
        return answer

    def _left_ms(self) -> int:
        left_s = self._until - time.monotonic()
        return self._timeout_ms if left_s == math.inf else max(1, min(self._timeout_ms, round(left_s * 1000)))

    def _check_code(self, code: int, message: str) -> None:
        """Checks the code of an answer.

        Raises:
            StaleShardError: the code says that the owner serves another image.
            PeerError: the code is any other error.
        """
        if code:
            raise (StaleShardError if code == STALE else PeerError)(f"{self}: {message}", shard=self.index)

    def _check_image(self, image: ImageIdentity | None) -> None:
        """Checks that an answer is about the image that this reader asked about.

        Raises:
            StaleShardError: it is not.
        """
        if image != self.image:
            raise self._stale(image)

    def _stale(self, image: ImageIdentity | None) -> StaleShardError:
        serves = "an image that it does not name" if image is None else image
        return StaleShardError(
            f"{self} serves {serves}, and had {self.image} when this reader connected", shard=self.index
        )

    def _ask_coarse(self) -> None:
        """Asks for the coarse table, which Compass needs. Not every owner has one."""
        request = CoarseRouteRequest().encode()
        reply = self._call(VShardMessageType.VECTOR_COARSE_ROUTE_REQUEST, request, self._left_ms())
        self._take_coarse(reply.payload)

    def _take_coarse(self, payload: Payload) -> None:
        answer = CoarseRouteResponse.decode(payload)
        if answer.code == 0:
            table = answer.table
            self.coarse = CoarseTable(
                table.centroids.astype(np.float32), table.sizes.astype(np.int64), table.radii.astype(np.float32)
            )
            collection = answer.collection or {}
            if isinstance(collection.get("shard"), int):
                self.number = collection["shard"]
            if collection.get("calibration") is not None:
                self.calibration = Calibration.from_json(collection["calibration"])

    # ---- choosing the path ----

    def choose(self, wanted: str, device: Device | None, no_device: str) -> None:
        """Chooses the path, and opens the shard's view if the path is one-sided.

        Args:
            wanted: "verbs", "shm" or "rpc". "auto" takes the first of these that works.
            device: this side's device, or None if there is none.
            no_device: why there is none, for an error message.

        Raises:
            VerbsUnavailableError: "verbs" was wanted and cannot be had.
            TransportError: the wanted path does not work, or no path does.
            FormatError: the shard's header or upper layers are malformed.
            InvalidInputError: an option does not fit the shard.
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
        else:  # the slots are larger now; a new channel is opened here because a search must not need the owner
            stack.close()
            self._first = self.open_channel()

    def _read_view(self, channel: Channel) -> None:
        """Reads the view and the list table, and measures the link by some READs.

        Raises:
            StaleShardError: the header is not that of the announced shard.
        """
        self.view = View.open(channel, timeout_s=self._timeout_ms / 1000)
        info = self.view.info
        if any(getattr(info, name) != value for name, value in fields_of(self.shard).items()):
            raise self._stale(info.identity)
        self.link = replace(self.link, **_measure(channel))
        if info.ivf_bytes:
            self.lists = IvfTable.open(channel, self.view, timeout_s=self._timeout_ms / 1000)
            self._slot_bytes = max(_LIST_SLOT_BYTES, self.lists.info.block_bytes)

    @property
    def owner(self) -> Any:
        """What `Replicas` was given for this owner: its address, or a shard or server of this process."""
        return self.address

    def take_over(self, failed: Connection) -> None:
        """Takes the record cache of another owner's connection. Both owners hold the same records."""
        if self.cache is None and self.transport != "own":
            self.cache, failed.cache = failed.cache, None

    def open_source(self, slots: int = 0) -> tuple[Source, ExitStack]:
        """Opens the source of records for one engine.

        Args:
            slots: as for `open_channel`.

        Returns:
            A channel, or None if the shard cannot be read; and the stack that closes it, which is the caller's.

        Raises:
            TransportError: as for `open_channel`.
        """
        return self.open_channel(slots) if self.transport in ONE_SIDED else (None, ExitStack())

    @property
    def info(self) -> ImageInfo | None:
        """The image's header, or None if the shard is only asked over RPC."""
        return None if self.view is None else self.view.info

    @property
    def memory(self) -> Arena | None:
        """The owner's memory, mapped into this process. It is None unless the path is "shm"."""
        return self._arena

    # ---- one-sided ----

    def make_cache(self, budget_bytes: int) -> None:
        """Makes a record cache of `budget_bytes` bytes.

        Raises:
            InvalidInputError: so few bytes hold no record.
        """
        assert self.view is not None
        try:
            self.cache = RecordCache.create(self.view, budget_bytes)
        except InvalidInputError as error:
            raise InvalidInputError(f"{self}: {error}", shard=self.index) from None

    def open_channel(self, slots: int = 0) -> tuple[Channel, ExitStack]:
        """Opens a channel for one engine.

        Args:
            slots: the number of READs in progress at once. 0 chooses it by the transport.

        Returns:
            The channel, and the stack that closes it with all that it needs. The stack is the caller's to close.

        Raises:
            TransportError: the owner cannot be reached, or has no queue pair for this reader.
            VerbsUnavailableError: this side's device makes no queue pair.
        """
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
        """Releases a queue pair at the owner. A failure does no harm: the owner destroys the queue pair when the lease ends."""
        if self._gone:
            return
        try:
            self._ask(WANT_RELEASE, number=number, timeout_ms=_RELEASE_TIMEOUT_MS)
        except CotraError as error:
            log.debug("%s: its queue pair was not released: %s", self, error)
            self._gone = True

    def renew(self) -> None:
        """Renews this reader's lease, which keeps its queue pairs at the owner.

        Raises:
            StaleShardError: the owner serves another image than at connect.
            TransportError: the owner cannot be reached.
        """
        self._ask(WANT_LEASE)

    # ---- RPC ----

    def search(self, batch: Batch) -> Answer:
        """Has the owner search its shard. The batch is one message, or several if one would be too large.

        Args:
            batch: its filters and its mask are of this shard alone.

        Returns:
            ids int64[n_queries, k] (-1 in empty places), distances float32[n_queries, k] (inf there), and
            `STATS_DTYPE`[n_queries].

        Raises:
            StaleShardError: the owner serves another image.
            PeerError: the owner refused.
            OutOfTimeError: the batch's time was over before the owner was late.
            TransportError: the owner is gone or late.
            FormatError: an answer is malformed, or does not fit the request.
        """
        asked = np.arange(len(batch.queries)) if batch.mask is None else np.flatnonzero(batch.mask[:, 0])
        labels = np.full((len(batch.queries), batch.k), -1, np.int64)
        distances = np.full(labels.shape, np.inf, np.float32)
        stats = np.zeros(len(batch.queries), STATS_DTYPE)
        filtered = batch.filters is not None and batch.filters[0] is not None
        rows = queries_per_message(batch.queries.shape[1], batch.k, batch.ef, filtered=filtered)
        for begin in range(0, len(asked), rows):
            part = asked[begin : begin + rows]
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
        # What the owner read in its own memory crossed no network. The reader sent one message, which is one round.
        stats["reads"], stats["rounds"] = 0, 1
        stats["read_bytes"] = (len(request) + reply.payload_len) // len(queries)
        stats["latency_ns"] = time.perf_counter_ns() - begin  # the whole message's: no query is answered before its end
        return answer.labels, answer.distances, stats

    def search_all(self, batch: Batch, images: Sequence[int] = ()) -> CollectionAnswer:
        """Has the owner search the whole collection. The messages are as in `search`.

        Args:
            batch: has no mask.
            images: if the batch has filters, the checksum of the image that each of them is for.

        Raises:
            InvalidInputError: the batch has a mask.
            PeerError: the owner has no connection to the other shards, or is of an earlier version.
            OutOfTimeError, TransportError, FormatError: as for `search`.
        """
        if batch.mask is not None:
            raise InvalidInputError("a search that a peer makes of the whole collection takes no mask")
        filters = None if batch.filters is None else tuple(zip(images, batch.filters, strict=True))
        rows = queries_per_message(batch.queries.shape[1], batch.k, batch.ef, filtered=filters is not None)
        starts = range(0, max(len(batch.queries), 1), rows)
        parts = []
        for begin in starts:
            part = batch.queries[begin : begin + rows]
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
        response = CollectionResponse.decode(reply.payload)
        answer = response.answer
        self._check_code(answer.code, answer.message)
        try:
            answer.check(len(queries), batch.k)
            stats = unpack_stats(answer.stats, len(queries), response.more_stats)
        except FormatError as error:
            raise FormatError(f"{self}: {error}", shard=self.index) from None
        stats["latency_ns"] = time.perf_counter_ns() - begin  # the whole message's, as in `search`
        images = tuple(response.images.tolist())
        return CollectionAnswer(answer.labels, answer.distances, response.shards, images, stats, response.failures)

    # ---- remote expansions, for a shard that cannot be read ----

    def load_view(self) -> View:
        """Loads the header and the upper layers over RPC, in pieces.

        Returns:
            The view. It is the caller's to close.

        Raises:
            PeerError: the owner does not offer its view.
            FormatError, ChecksumError: the pieces are not a valid view.
            StaleShardError: the view is not that of the announced shard.
            TransportError: the owner cannot be reached.
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
        """Has the owner expand nodes. The round is one message, or several if one would be too large.

        `view` must have been set by `load_view`.

        Args:
            queries: float32[n_queries, dim]. Only the queries that `pushes` names are sent.
            pushes: `PUSH_DTYPE`[n]. The pushes of one query follow each other.
            timeout_s: the time-out of each message.
            stop: ends the wait for an answer.

        Returns:
            The expansions, in the order of `pushes`.

        Raises:
            TransportError: the owner is gone or late.
            PeerError: the owner refused.
            StaleShardError: the owner serves another image.
            FormatError: an answer is malformed, or does not fit the pushes.
            SearchCancelledError: `stop` was set.
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
        """Closes the connection and all that it holds. Engines over it must be closed before."""
        if self._first is not None:
            self._first[1].close()
        for part in (self.lists, self.cache, self.view, self._arena):
            if part is not None:
                part.close()
        self.retire()

    def retire(self) -> None:
        """Closes the control connection. What searches in other threads still read through stays open until `close`."""
        if self._client is not None:
            self._client.close()


def _measure(channel: Channel) -> dict[str, float]:
    """Measures a channel by some READs of the region's first bytes. Returns fields of `Link`."""
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
    """Checks the sizes that an owner announced, before anything is allocated by them.

    Raises:
        FormatError: no image has such sizes.
    """
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
    """Checks that all shards have the same dimension and the same metric.

    Raises:
        InvalidInputError: they differ.
    """
    for connection in connections[1:]:
        first = connections[0]
        for what in ("dim", "metric"):
            a, b = getattr(first.shard, what), getattr(connection.shard, what)
            if a != b:
                raise InvalidInputError(
                    f"mixed shards: {first} has {what} {a}, {connection} has {b}", shard=connection.index
                )
