"""`Connection`: a reader's side of one shard: the control connection, the path that was chosen, and how channels are opened."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from cotra_rdma._core.image_identity import ImageIdentity
from cotra_rdma._core.memory_region import MemoryRegion
from cotra_rdma._core.remote_expansion import Expansions
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
from cotra_rdma._reader.batch import Answer, Batch, CollectionAnswer
from cotra_rdma._reader.cost_model import Link
from cotra_rdma._reader.counters import OwnerCounts
from cotra_rdma._reader.owner_calls import OwnerCalls, stale_error
from cotra_rdma._routing.calibration import Calibration
from cotra_rdma._routing.coarse_table import CoarseTable
from cotra_rdma.errors import (
    CotraError,
    FormatError,
    InvalidInputError,
    StaleShardError,
    TransportError,
    VerbsUnavailableError,
)
from cotra_rdma.protocol.envelope import Payload, fields_of
from cotra_rdma.protocol.regions import (
    WANT_LEASE,
    WANT_QUEUE_PAIR,
    WANT_RELEASE,
    WANT_SHARED_MEMORY,
    QueuePairFields,
    RegionResponse,
    ShardFields,
    as_fields,
)
from cotra_rdma.protocol.tables import CoarseRouteResponse
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
        counts: OwnerCounts | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        """Makes the control connection, and asks for the shard's sizes and its coarse table. `choose` then chooses the path.

        Args:
            index: the position of the shard in the cluster.
            address: HOST:PORT of the owner.
            tls: this reader's certificate, or None for a plain connection.
            timeout_ms: the time-out of each call to the owner.
            options: the options of this side's queue pairs.
            fabric: the model that every READ goes through, or None.
            counts: counts what the connection does. None counts for nobody.
            tracing: makes a span of each call in a search, or None.

        Raises:
            TransportError: the owner cannot be reached.
            PeerError: the owner refused, or is of a version that does not name its image.
            FormatError: an answer is malformed.
        """
        self._begin(index, address, timeout_ms, fabric, counts)
        self._calls = calls = OwnerCalls(
            index, address, tls=tls, timeout_ms=timeout_ms, counts=self.counts, tracing=tracing
        )
        self._options = options
        try:
            with calls.in_time():
                self.capabilities = calls.introduce()
                self.shard, self.image = calls.shard, calls.image
                begin = time.perf_counter()
                self._take_coarse(calls.coarse_table())
                self.link = replace(self.link, rpc_s=time.perf_counter() - begin)
        except BaseException:
            self.close()
            raise

    _calls: OwnerCalls | None
    is_local = False
    link: Link
    capabilities: RegionResponse
    shard: ShardFields
    image: ImageIdentity

    def _begin(
        self,
        index: int,
        address: str,
        timeout_ms: int,
        fabric: FabricModel | None = None,
        counts: OwnerCounts | None = None,
    ) -> None:
        self.index = index
        self.address = address
        self.counts = counts or OwnerCounts()
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
        self._fabric = fabric
        self._calls = None
        self._device: Device | None = None
        self._arena: Arena | None = None
        self._first: tuple[Channel, ExitStack] | None = None
        self._gone = False
        self.is_dropped = False
        self._slot_bytes = _SLOT_BYTES

    def __str__(self) -> str:
        return f"shard {self.index} ({self.address})"

    @property
    def calls(self) -> OwnerCalls:
        """The calls to the owner. A shard of this process has none."""
        assert self._calls is not None
        return self._calls

    def _stale(self, image: ImageIdentity | None) -> StaleShardError:
        return stale_error(self, self.index, image, self.image)

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
        with self.calls.in_time():
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
        offer = self.calls.ask(WANT_SHARED_MEMORY).shared_memory
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
        answer = self.calls.ask(WANT_QUEUE_PAIR, as_fields(QueuePairFields, queue_pair.local))
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
            self.calls.ask(WANT_RELEASE, number=number, timeout_ms=_RELEASE_TIMEOUT_MS)
        except CotraError as error:
            log.debug("%s: its queue pair was not released: %s", self, error)
            self._gone = True

    def renew(self) -> None:
        """Renews this reader's lease, which keeps its queue pairs at the owner.

        Raises:
            StaleShardError: the owner serves another image than at connect.
            TransportError: the owner cannot be reached.
        """
        try:
            self.calls.ask(WANT_LEASE)
        except CotraError:
            self.counts.note("not renewed")
            raise
        self.counts.note("renewed")

    # ---- RPC ----

    def search(self, batch: Batch) -> Answer:
        """Has the owner search its shard, as `OwnerCalls.search` does."""
        return self.calls.search(batch)

    def search_all(self, batch: Batch, images: Sequence[int] = ()) -> CollectionAnswer:
        """Has the owner search the whole collection, as `OwnerCalls.search_all` does."""
        return self.calls.search_all(batch, images)

    def load_view(self) -> View:
        """Loads the header and the upper layers over RPC.

        Returns:
            The view. It is the caller's to close.

        Raises:
            PeerError: the owner does not offer its view.
            FormatError, ChecksumError: what came is not a valid view.
            StaleShardError: the view is not that of the announced shard.
            TransportError: the owner cannot be reached.
        """
        with self.calls.in_time():
            data = self.calls.load_view()
        view = View.load(data)
        info = view.info
        if any(getattr(info, name) != value for name, value in fields_of(self.shard).items()):
            view.close()
            raise self._stale(info.identity)
        return view

    def expand(
        self,
        queries: npt.NDArray[np.float32],
        pushes: npt.NDArray[np.void],
        timeout_s: float,
        stop: Stop | None = None,
    ) -> Expansions:
        """Has the owner expand nodes, as `OwnerCalls.expand` does. `view` must have been set by `load_view`."""
        assert self.view is not None
        return self.calls.expand(queries, pushes, self.view.info.degree, timeout_s, stop)

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
        if self._calls is not None:
            self._calls.close()


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
