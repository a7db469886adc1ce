"""`Offer`: one image that an owner publishes, until no lease on it is left."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cotra_rdma._core.image_identity import ImageIdentity
from cotra_rdma._native.arena import Arena
from cotra_rdma._native.memfd_handover import HandOver
from cotra_rdma._native.verbs import Device, MemoryRegistration
from cotra_rdma._owner.expander import Expander
from cotra_rdma._shard.shard import Shard
from cotra_rdma.errors import MemlockError

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
