"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cotra_rdma._core.files import write_whole
from cotra_rdma.errors import InvalidInputError


def test_content_and_mode(tmp_path: Path) -> None:
    path = tmp_path / "file"
    before = os.umask(0o027)
    try:
        write_whole(path, [b"one", memoryview(b"two")])
    finally:
        assert os.umask(before) == 0o027, "it is the whole process's"
    assert path.read_bytes() == b"onetwo"
    assert path.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [path]


def test_what_fails_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def parts() -> Iterator[bytes]:
        yield b"new"
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        write_whole(path, parts())
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "file", tmp_path / "link"
    link.symlink_to(target)
    for content in (b"made", b"replaced"):
        write_whole(link, [content])
        assert link.is_symlink()
        assert target.read_bytes() == content


def test_what_is_no_ordinary_file_stays(tmp_path: Path) -> None:
    fifo, directory = tmp_path / "fifo", tmp_path / "directory"
    os.mkfifo(fifo)
    directory.mkdir()
    for path in (fifo, directory, Path("/dev/null")):
        with pytest.raises(InvalidInputError, match="is no ordinary file"):
            write_whole(path, [b"x"])
    assert fifo.is_fifo()


def test_a_long_name_and_a_directory_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 255)
    write_whole(path, [b"x"])
    assert path.read_bytes() == b"x"
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "gone" / "file", [b"x"])
