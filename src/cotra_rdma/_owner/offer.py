"""`Offer`: one image that an owner publishes. `Offers`: all of them, until no lease on them is left."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cotra_rdma._core.image_identity import ImageIdentity
from cotra_rdma._native.arena import Arena
from cotra_rdma._native.memfd_handover import HandOver
from cotra_rdma._native.verbs import Device, MemoryRegistration
from cotra_rdma._owner.expander import Expander
from cotra_rdma._owner.leases import LEASE_S
from cotra_rdma._shard.shard import Shard
from cotra_rdma.errors import ClosedError, MemlockError, StaleShardError

log = logging.getLogger(__name__)


class Offer:
    """A shard's image in pinned memory, and what gives readers access to it.

    Attributes:
        shard: the shard. It is the caller's.
        coarse: the shard's coarse table, as a payload of type 53, or None.
        registration: the memory region for RDMA READs, or None without a device.
        handover: hands the memory to processes on this host. None if shared memory is not offered.
        expander: expands nodes for readers. None if RPC is not offered.
        released: called after `close`, when the shard is no longer used here. None calls nothing.
    """

    def __init__(
        self,
        shard: Shard,
        coarse: bytes | None,
        device: Device | None,
        *,
        shared_memory: bool,
        rpc: bool,
    ) -> None:
        """Pins the image, and publishes it.

        Args:
            shard: the shard. It stays the caller's.
            coarse: the shard's coarse table, as a payload of type 53, or None.
            device: registers the memory. It stays the caller's. None offers no RDMA.
            shared_memory: whether shared memory is offered.
            rpc: whether expansions over RPC are offered.

        Raises:
            CotraError: the memory cannot be pinned, registered or handed over.
        """
        self.shard, self.coarse = shard, coarse
        self.released: Callable[[], object] | None = None
        self._n_users = 0
        self._idle = threading.Condition()
        self.registration: MemoryRegistration | None = None
        self.handover: HandOver | None = None
        self.expander: Expander | None = None
        try:
            pinned = _pinned(shard)
            if device is not None:
                self.registration = MemoryRegistration(device, pinned)
            if shared_memory:
                self.handover = HandOver(pinned)
            if rpc:
                self.expander = Expander(pinned, shard.info)
        except BaseException:
            self._close_parts()
            raise

    @property
    def identity(self) -> ImageIdentity:
        """The identity of the image."""
        return self.shard.info.identity

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Makes `close` wait until the block ends. A request enters it while it uses the image."""
        with self._idle:
            self._n_users += 1
        try:
            yield
        finally:
            with self._idle:
                self._n_users -= 1
                self._idle.notify_all()

    def close(self) -> None:
        """Deregisters the memory. READs of it fail from then on. Idempotent.

        It waits for requests that use the image.
        """
        with self._idle:
            self._idle.wait_for(lambda: not self._n_users)
        self._close_parts()
        released, self.released = self.released, None
        if released is not None:
            released()

    def _close_parts(self) -> None:
        for part in (self.registration, self.handover, self.expander):
            if part is not None:
                part.close()


def _pinned(shard: Shard) -> Arena:
    try:
        return shard.pinned(lock=True)
    except MemlockError as error:
        log.info("the region is not locked: %s", error)
        return shard.pinned(lock=False)


class Offers:
    """The images that an owner publishes: the one that it serves now, and those before it that leases may last on.

    Any thread may use it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._now: Offer | None = None
        self._retired: list[tuple[float, Offer]] = []  # each with the time at which the last lease on it ends

    def __len__(self) -> int:
        """The number of images that are published."""
        return 1 + len(self._retired)

    @property
    def is_open(self) -> bool:
        """Whether an image is served."""
        return self._now is not None

    @property
    def now(self) -> Offer:
        """The image that is served now.

        Raises:
            ClosedError: none is.
        """
        if self._now is None:
            raise ClosedError("the server is closed")
        return self._now

    def of(self, wanted: ImageIdentity | None) -> Offer:
        """Returns the offer of the image that a request is about. None stands for the image that is served now.

        Raises:
            StaleShardError: it is neither the image that is served now, nor one before it that leases may last on.
            ClosedError: no image is served.
        """
        with self._lock:
            offer = self.now
            there = [offer, *(before for _, before in self._retired)]
        for each in there:
            if wanted in (None, each.identity):
                return each
        raise StaleShardError(f"this owner serves {offer.identity}, and the request is about {wanted}")

    def begin(self, offer: Offer) -> None:
        """Serves the first image."""
        self._now = offer

    def replace(self, offer: Offer, released: Callable[[], object] | None) -> Offer:
        """Serves another image from now on.

        Args:
            offer: the image.
            released: called when the image before is no longer used.

        Returns:
            The image before, which stays published until the leases on it are over.

        Raises:
            ClosedError: no image is served.
        """
        with self._lock:
            before, self._now = self.now, offer
            before.released = released
            self._retired.append((time.monotonic() + LEASE_S, before))
        return before

    def close_retired(self) -> None:
        """Closes the images that no lease holds any more."""
        with self._lock:
            over = [offer for until, offer in self._retired if until < time.monotonic()]
            self._retired = [(until, offer) for until, offer in self._retired if offer not in over]
        for offer in over:
            offer.close()

    def close(self) -> None:
        """Closes all images. Idempotent."""
        with self._lock:
            offers = [offer for _, offer in self._retired] + ([self._now] if self._now is not None else [])
            self._retired, self._now = [], None
        for offer in offers:
            offer.close()
