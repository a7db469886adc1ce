"""The hand-over of a region to a reader on the same host: a sealed memfd through a Unix socket, to the same user only."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import struct
import threading
from pathlib import Path

from cotra_rdma._native.arena import Arena
from cotra_rdma.errors import TransportError

_LENGTH = struct.Struct("<Q")
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid
_TIMEOUT_S = 5.0


def boot_id() -> str:
    """A name for this boot of this host: equal on both sides means that a Unix socket may work."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


class HandOver:
    """The owner's side: a listening socket in the abstract namespace (unix(7)), and a thread that answers it."""

    def __init__(self, arena: Arena) -> None:
        self.name = f"cotra-{secrets.token_hex(16)}"
        info = arena.info
        assert info.fd is not None
        assert info.sealed
        self._fd, self.length = os.dup(info.fd), info.len
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(b"\0" + self.name.encode())
        self._listener.listen()
        self._thread = threading.Thread(target=self._run, name="cotra-handover", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:  # closed
                return
            with peer, contextlib.suppress(OSError):  # a peer that went away
                peer.settimeout(_TIMEOUT_S)
                credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
                if _CREDENTIALS.unpack(credentials)[1] == os.geteuid():
                    socket.send_fds(peer, [_LENGTH.pack(self.length)], [self._fd])

    def close(self) -> None:
        """Stops handing over; regions that were mapped stay mapped."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
        os.close(self._fd)


def receive(name: str, length: int) -> Arena:
    """The reader's side: connects, takes the memfd and maps it read-only.

    Raises `TransportError` where the socket cannot be reached or refuses this user, `FormatError` for a bad memfd.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_TIMEOUT_S)
        try:
            connection.connect(b"\0" + name.encode())
            message, fds, _, _ = socket.recv_fds(connection, _LENGTH.size, 1)
        except OSError as error:
            raise TransportError(f"the owner's memory cannot be taken over: {error} (another container?)") from error
    try:
        if not fds or message != _LENGTH.pack(length):
            raise TransportError("the owner does not hand its memory to this user (it serves its own user only)")
        return Arena.map_fd(fds[0], length)
    finally:
        for fd in fds:
            os.close(fd)
