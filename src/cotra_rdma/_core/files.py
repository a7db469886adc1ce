"""Files that are written whole or not at all, and are there after a crash."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterable
from pathlib import Path

from cotra_rdma.errors import InvalidInputError


def sync_directory(path: Path) -> None:
    """Has the names in a directory survive a crash (fsync(2))."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_file(path: Path) -> None:
    """Has the content of a file survive a crash."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_whole(path: str | os.PathLike[str], parts: Iterable[bytes | memoryview]) -> None:
    """Writes a file: its new content is there as a whole, after a crash too, or the old one is.

    A temporary file beside it is renamed over it.
    A symbolic link is followed.

    Raises:
        InvalidInputError: the path names a device, a FIFO, a socket or a directory.
        OSError: it cannot be written; there is no directory for it.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(target.parent))
    try:
        if not stat.S_ISREG(target.stat().st_mode):
            raise InvalidInputError(f"{os.fspath(path)}: is no ordinary file, and is left as it is")
    except FileNotFoundError:
        pass
    aside = target.parent / f".cotra-{secrets.token_hex(8)}"
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)  # less the process's umask
    try:
        with open(fd, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(target)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_directory(target.parent)
