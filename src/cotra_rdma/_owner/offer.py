"""`Offer`: one image as an owner gives it to readers, from the moment that it is published until the last reader has let go."""

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
    """The pinned copy of a shard's image, and the ways to it.

    Attributes:
        shard: the caller's.
        coarse: what is told of the shard from afar: a payload of type 53, or None.
        registration: the memory region for RDMA READs; None without a device.
        handover: of the memory to processes of this host; None where shared memory is not offered.
        expander: what works for readers over RPC; None where that is not offered.
        released: called when nobody uses the shard here any more.
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
            shard: stays the caller's.
            coarse: what is told of the shard from afar.
            device: registers the memory; None where RDMA is not offered.
            shared_memory, rpc: whether these are offered.
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
        """Of the image."""
        return self.shard.info.identity

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """While a request works with it, `close` waits."""
        with self._idle:
            self._n_users += 1
        try:
            yield
        finally:
            with self._idle:
                self._n_users -= 1
                self._idle.notify_all()

    def close(self) -> None:
        """Deregisters the memory: READs of it fail from then on. Waits for requests that work with it. Idempotent."""
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
