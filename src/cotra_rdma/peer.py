"""One shard as a reader sees it: its control connection, the path that was chosen to it, and how to open channels on it."""

from __future__ import annotations

import logging
import math
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from cotra_rdma import handover, messages
from cotra_rdma.arena import Arena
from cotra_rdma.channel import Channel, FabricModel
from cotra_rdma.coarse import CoarseTable
from cotra_rdma.compass import Calibration
from cotra_rdma.cost import Link
from cotra_rdma.engine import STATS_DTYPE, ImageInfo, RecordCache, View, unpack_stats
from cotra_rdma.errors import (
    CotraError,
    DeadlineError,
    FormatError,
    InvalidInputError,
    PeerError,
    TransportError,
    VerbsUnavailableError,
)
from cotra_rdma.ivf import IvfTable
from cotra_rdma.job import Answer, SearchJob
from cotra_rdma.region import MemoryRegion
from cotra_rdma.rpc import ClientKeys, RpcClient, parse_address
from cotra_rdma.verbs import Device, QueuePair, QueuePairAttributes, QueuePairOptions
from cotra_rdma.wire import WIRE_VERSION, VShardEnvelope, VShardMessageType, fields_of

log = logging.getLogger(__name__)

ONE_SIDED = ("verbs", "shm")
_RELEASE_TIMEOUT_MS = 300
_SLOT_BYTES = 4096
_LIST_SLOT_BYTES = 16384  # as many of a list's blocks as fit are one READ
_PROBES = 32


class Peer:
    """A shard at an address. `transport` is the path in use, `passed_over` says why the better ones are not."""

    def __init__(
        self,
        index: int,
        address: str,
        *,
        keys: ClientKeys | None,
        timeout_ms: int,
        options: QueuePairOptions,
        fabric: FabricModel | None,
    ) -> None:
        self.index = index
        self.address = address
        self.transport = ""
        self.passed_over: dict[str, str] = {}
        self.view: View | None = None
        self.lists: IvfTable | None = None
        self.cache: RecordCache | None = None
        self.coarse: CoarseTable | None = None
        self.calibration: Calibration | None = None
        self.number: int | None = None  # in its collection
        self.link = Link(math.inf, 0.0, 0.0, math.inf)
        self._keys = keys
        self._timeout_ms = timeout_ms
        self._options = options
        self._fabric = fabric
        self._name = secrets.token_hex(8)
        self._clients: list[RpcClient] = []
        self._lock = threading.Lock()
        self._device: Device | None = None
        self._arena: Arena | None = None
        self._first: tuple[Channel, ExitStack] | None = None
        self._gone = False
        self._slot_bytes = _SLOT_BYTES
        self._reach()
        self.capabilities = self._ask(messages.WANT_CAPABILITIES)
        shard = self.capabilities.shard
        if shard is None:
            raise FormatError(f"{self}: the answer does not describe the shard")
        self.shard = shard
        begin = time.perf_counter()
        self._ask_coarse()
        self.link = replace(self.link, rpc_s=time.perf_counter() - begin)

    def __str__(self) -> str:
        return f"shard {self.index} ({self.address})"

    # ---- calls ----

    def _reach(self) -> None:
        """A refused connection is told at once; ZeroMQ would try again until the deadline."""
        try:
            socket.create_connection(parse_address(self.address), self._timeout_ms / 1000).close()
        except OSError as error:
            raise TransportError(f"{self} cannot be reached: {error}", shard=self.index) from error

    @contextmanager
    def _client(self) -> Iterator[RpcClient]:
        with self._lock:
            client = self._clients.pop() if self._clients else None
        client = client or RpcClient(self.address, keys=self._keys)
        try:
            yield client
        except BaseException:
            client.close()
            raise
        with self._lock:
            self._clients.append(client)

    def _call(self, kind: VShardMessageType, payload: bytes, timeout_ms: int) -> VShardEnvelope:
        envelope = VShardEnvelope(WIRE_VERSION, kind, 0, 0, self.index, payload)
        try:
            with self._client() as client:
                return client.call(envelope, timeout_ms)
        except DeadlineError as error:
            hint = " (is it an owner of cotra-rdma, and does it want CURVE keys?)" if not hasattr(self, "shard") else ""
            raise DeadlineError(f"{self}: {error}{hint}", shard=self.index) from None

    def _ask(
        self,
        want: int,
        queue_pair: messages.QueuePairFields | None = None,
        lane: int = 0,
        timeout_ms: int | None = None,
    ) -> messages.RegionResponse:
        request = messages.RegionRequest(want, self._name, queue_pair, lane)
        reply = self._call(
            VShardMessageType.VECTOR_MEM_REGION_REQUEST, messages.encode_region(request), timeout_ms or self._timeout_ms
        )
        answer = messages.decode_region_response(reply.payload)
        if answer.code:
            raise PeerError(f"{self}: {answer.message}", shard=self.index)
        return answer

    def _ask_coarse(self) -> None:
        """The shard from afar, where its owner tells: what Compass chooses by."""
        request = messages.CoarseRouteRequest().encode()
        reply = self._call(VShardMessageType.VECTOR_COARSE_ROUTE_REQUEST, request, self._timeout_ms)
        answer = messages.CoarseRouteResponse.decode(reply.payload)
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
        offer = self._ask(messages.WANT_SHARED_MEMORY).shared_memory
        if offer is None or offer.boot_id != handover.boot_id():
            raise TransportError(f"{self} is on another host", shard=self.index)
        self._arena = handover.receive(offer.socket, offer.length)

    def _connect_view(self) -> None:
        channel, stack = self.open_channel()
        try:
            self.view = View.open(channel, timeout_s=self._timeout_ms / 1000)
            info, told = self.view.info, self.shard
            if (info.dim, info.metric, info.generation) != (told.dim, told.metric, told.generation):
                raise FormatError(f"{self}: its region holds another shard than it announced", shard=self.index)
            self.link = replace(self.link, **_measure(channel))
            if info.ivf_bytes:
                self.lists = IvfTable.open(channel, self.view, timeout_s=self._timeout_ms / 1000)
                self._slot_bytes = max(_LIST_SLOT_BYTES, self.lists.info.block_bytes)
        except BaseException:
            stack.close()
            raise
        if self.lists is None:
            self._first = (channel, stack)
        else:  # made now, for a search must not need the owner
            stack.close()
            self._first = self.open_channel()

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

    def open_channel(self) -> tuple[Channel, ExitStack]:
        """A new channel for one lane, and the stack that closes it and all it hangs on."""
        if self._first is not None:
            first, self._first = self._first, None
            return first
        with ExitStack() as stack:
            slot_bytes = max(self._slot_bytes, self.shard.record_bytes)
            if self.transport == "shm":
                assert self._arena is not None
                channel = stack.enter_context(Channel.shm(self._arena, slot_bytes=slot_bytes))
            else:
                channel = self._open_verbs(stack, slot_bytes)
            if self._fabric is not None:
                channel = stack.enter_context(Channel.model(channel, self._fabric))
            return channel, stack.pop_all()

    def _open_verbs(self, stack: ExitStack, slot_bytes: int) -> Channel:
        assert self._device is not None
        queue_pair = stack.enter_context(QueuePair(self._device, self._options))
        answer = self._ask(messages.WANT_QUEUE_PAIR, messages.as_fields(messages.QueuePairFields, queue_pair.local))
        stack.callback(self._release, answer.lane)
        if answer.queue_pair is None or answer.region is None:
            raise FormatError(f"{self}: the answer has no queue pair", shard=self.index)
        queue_pair.connect(QueuePairAttributes(**fields_of(answer.queue_pair)))
        region = MemoryRegion(**fields_of(answer.region))
        return stack.enter_context(Channel.verbs(queue_pair, region, slot_bytes=slot_bytes))

    def _release(self, lane: int) -> None:
        """Best effort: an owner that is gone holds nothing, and one that missed it takes the lane back with the lease."""
        if self._gone:
            return
        try:
            self._ask(messages.WANT_RELEASE, lane=lane, timeout_ms=_RELEASE_TIMEOUT_MS)
        except CotraError as error:
            log.debug("%s: its queue pair was not released: %s", self, error)
            self._gone = True

    def renew(self) -> None:
        """Keeps the queue pairs that the owner holds for this reader."""
        self._ask(messages.WANT_LEASE)

    # ---- RPC ----

    def search(self, job: SearchJob) -> Answer:
        """The owner searches; one message for the batch (several where one would be too large).

        Args:
            job: its filters and mask are those of this shard alone.
        """
        asked = np.arange(len(job.queries)) if job.mask is None else np.flatnonzero(job.mask[:, 0])
        labels = np.full((len(job.queries), job.k), -1, np.int64)
        distances = np.full(labels.shape, np.inf, np.float32)
        stats = np.zeros(len(job.queries), STATS_DTYPE)
        filtered = job.filters is not None and job.filters[0] is not None
        rows = messages.queries_per_message(job.queries.shape[1], job.k, job.ef, filtered=filtered)
        for begin in range(0, len(asked), rows):
            part = asked[begin : begin + rows]
            labels[part], distances[part], stats[part] = self._search_part(job, job.queries[part])
        return labels, distances, stats

    def _search_part(self, job: SearchJob, queries: npt.NDArray[np.float32]) -> Answer:
        bitmap = None if job.filters is None else job.filters[0]
        request = messages.SearchRequest("", queries, job.k, job.ef, bitmap, job.beam).encode()
        begin = time.perf_counter_ns()
        reply = self._call(VShardMessageType.VECTOR_SCATTER_REQUEST, request, max(1, round(job.timeout_s * 1000)))
        answer = messages.SearchResponse.decode(reply.payload)
        if answer.code:
            raise PeerError(f"{self}: {answer.message}", shard=self.index)
        if answer.labels.shape != (len(queries), job.k):
            raise FormatError(f"{self}: an answer of {answer.labels.shape} to {len(queries)} queries", shard=self.index)
        try:
            stats = unpack_stats(answer.stats, len(queries))
        except FormatError as error:
            raise FormatError(f"{self}: {error}", shard=self.index) from None
        # What the owner read in its own memory crossed no wire: this side made one round of one message.
        stats["reads"], stats["rounds"] = 0, 1
        stats["read_bytes"] = (len(request) + reply.payload_len) // len(queries)
        stats["latency_ns"] = time.perf_counter_ns() - begin  # the whole batch's: nobody has an answer before that
        return answer.labels, answer.distances, stats

    def close(self) -> None:
        """Closes everything; lanes that were opened on it must be closed before."""
        if self._first is not None:
            self._first[1].close()
        for part in (self.lists, self.cache, self.view, self._arena):
            if part is not None:
                part.close()
        with self._lock:
            clients, self._clients = self._clients, []
        for client in clients:
            client.close()


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


def check_alike(peers: list[Peer]) -> None:
    """Raises `InvalidInputError` when shards differ in what a search needs alike."""
    first = peers[0]
    for peer in peers[1:]:
        for what in ("dim", "metric"):
            a, b = getattr(first.shard, what), getattr(peer.shard, what)
            if a != b:
                raise InvalidInputError(f"mixed shards: {first} has {what} {a}, {peer} has {b}", shard=peer.index)
