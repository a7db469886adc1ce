"""Hands a region over to a reader on the same host.

The owner sends a sealed memfd through a Unix socket, and only to a reader of the same user.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import secrets
import socket
import struct
import threading
from pathlib import Path

from cotra_rdma._native.arena import Arena
from cotra_rdma.errors import FormatError, TransportError

_SEAL_FUTURE_WRITE = 0x10  # linux/fcntl.h
_BLOCK_BYTES = 512  # of stat(2)'s st_blocks
_LENGTH = struct.Struct("<Q")
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid
_TIMEOUT_S = 5.0


def boot_id() -> str:
    """Returns the name of this boot of this host.

    If it is equal on both sides, a Unix socket may work.
    """
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


class HandOver:
    """The owner's side of the hand-over.

    It listens on a socket in the abstract namespace (unix(7)), and a thread answers the readers.
    """

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
            except OSError:  # the socket is closed
                return
            with peer, contextlib.suppress(OSError):  # the reader is gone
                peer.settimeout(_TIMEOUT_S)
                credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
                if _CREDENTIALS.unpack(credentials)[1] == os.geteuid():
                    socket.send_fds(peer, [_LENGTH.pack(self.length)], [self._fd])

    def close(self) -> None:
        """Stops handing over. Regions that are mapped stay mapped."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
        os.close(self._fd)


def receive(name: str, length: int) -> Arena:
    """Takes a memfd from an owner, and maps it read-only.

    This is the reader's side.

    Args:
        name: the name of the owner's socket.
        length: the length of the region in bytes.

    Raises:
        TransportError: the socket cannot be reached, or the owner refuses this user.
        FormatError: the memfd cannot be used.
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
        _check_whole(fds[0], length)
        return Arena.map_fd(fds[0], length)
    finally:
        for fd in fds:
            os.close(fd)


def _check_whole(fd: int, length: int) -> None:
    """Checks that a memfd of huge pages has all its pages, and keeps them.

    A reader of a page that is not there dies by SIGBUS where there is no huge page left.
    A memfd of ordinary pages has pages of zeros there.

    Raises:
        FormatError: pages are missing, or its owner could take some away.
    """
    status = os.fstat(fd)
    if status.st_blksize <= mmap.PAGESIZE:
        return
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise FormatError(f"the owner's memory is no memfd: {error}") from error
    if not seals & (fcntl.F_SEAL_WRITE | _SEAL_FUTURE_WRITE):
        raise FormatError(
            "the owner's memory has huge pages that the owner could take away: it is not sealed against that"
        )
    if status.st_blocks * _BLOCK_BYTES < length:
        raise FormatError("the owner's memory has huge pages, and some of them are missing")
