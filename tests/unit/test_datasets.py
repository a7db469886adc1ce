"""Readers of vector files: every format round-trips, and every malformed file is a FormatError that says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest

from cotra_rdma.datasets import open_vectors, read_ground_truth, read_queries
from cotra_rdma.errors import FormatError

Array = npt.NDArray[Any]


@pytest.fixture
def rows() -> Array:
    return np.random.default_rng(7).integers(0, 256, (57, 6)).astype(np.uint8)


def write_texmex(path: Path, rows: Array) -> Path:
    dims = np.full((len(rows), 1), rows.shape[1], "<i4").view("u1")
    body = np.ascontiguousarray(rows).view("u1").reshape(len(rows), -1)
    np.hstack([dims, body]).tofile(path)
    return path


def write_hdf5(path: Path, distance: str | None = "angular", **arrays: Array) -> Path:
    with h5py.File(path, "w") as file:
        if distance is not None:
            file.attrs["distance"] = distance
        for name, array in arrays.items():
            file[name] = array
    return path


def write(path: Path, rows: Array) -> Path:
    if path.suffix == ".npy":
        np.save(path, rows)
        return path
    return write_hdf5(path, train=rows) if path.suffix == ".hdf5" else write_texmex(path, rows)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("a.npy", "u1"),
        ("a.npy", "<f2"),
        ("a.npy", ">f4"),
        ("a.npy", "<f8"),
        ("a.fvecs", "<f4"),
        ("a.bvecs", "u1"),
        ("a.hdf5", "<f4"),
        ("a.hdf5", ">f2"),
    ],
)
def test_every_format_round_trips(tmp_path: Path, rows: Array, name: str, dtype: str) -> None:
    with open_vectors(write(tmp_path / name, rows.astype(dtype))) as file:
        assert file.shape == rows.shape == (len(file), file.dim)
        assert file.dtype == np.dtype(dtype).newbyteorder("=")
        assert file.read().dtype == file.dtype
        np.testing.assert_array_equal(file.read(), rows)
        np.testing.assert_array_equal(file.read(5, 9), rows[5:9])


@pytest.mark.parametrize("name", ["a.npy", "a.bvecs"])
def test_what_was_read_is_not_kept_in_memory(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, np.ones((4000, 64), np.uint8))

    def resident() -> int:
        with open("/proc/self/smaps") as maps:
            lines = list(maps)
        at = next(i for i, line in enumerate(lines) if line.rstrip().endswith(str(path)))
        return next(int(line.split()[1]) for line in lines[at:] if line.startswith("Rss:"))

    with open_vectors(path) as file:
        assert file.read().flags.owndata
        assert resident() == 0
        np.testing.assert_array_equal(file.take(np.array([3, 5, 3999])), np.ones((3, 64)))
        assert resident() == 0
        kept = file._rows[::10].sum() if name == "a.npy" else file._rows["row"][::10].sum()
        assert kept == 400 * 64
        assert resident() > 0  # the mapping is there


def test_chunks_cover_all_rows_in_order(tmp_path: Path, rows: Array) -> None:
    with open_vectors(write(tmp_path / "a.bvecs", rows)) as file:
        chunks = list(file.chunks(10))
        assert [len(chunk) for chunk in chunks] == [10, 10, 10, 10, 10, 7]
        np.testing.assert_array_equal(np.concatenate(chunks), rows)


@pytest.mark.parametrize(("distance", "metric"), [("euclidean", "l2"), ("angular", "cosine"), (None, None)])
def test_hdf5_names_its_metric(tmp_path: Path, rows: Array, distance: str | None, metric: str | None) -> None:
    with open_vectors(write_hdf5(tmp_path / "a.h5", distance, train=rows)) as file:
        assert file.metric == metric


def test_hdf5_parts(tmp_path: Path, rows: Array) -> None:
    path = write_hdf5(
        tmp_path / "a.hdf5", train=rows, test=rows[:3] / 2, neighbors=np.arange(12, dtype="i4").reshape(3, 4)
    )
    queries, truth = read_queries(path), read_ground_truth(path)
    assert queries.dtype == np.float32
    np.testing.assert_array_equal(queries, rows[:3] / 2)
    np.testing.assert_array_equal(truth, np.arange(12).reshape(3, 4))
    with open_vectors(path, "test") as file:
        assert file.shape == (3, rows.shape[1])


@pytest.mark.parametrize("name", ["gt.npy", "gt.ivecs"])
def test_ground_truth(tmp_path: Path, name: str) -> None:
    truth = np.arange(40, dtype="<i4").reshape(4, 10)
    read = read_ground_truth(write(tmp_path / name, truth))
    assert read.dtype == np.int64
    np.testing.assert_array_equal(read, truth)


def test_missing_file_is_an_os_error(tmp_path: Path) -> None:
    for name in ("a.npy", "a.fvecs", "a.hdf5"):
        with pytest.raises(FileNotFoundError):
            open_vectors(tmp_path / name)


@pytest.mark.parametrize("name", ["a.npy", "a.fvecs", "a.bvecs", "a.hdf5"])
@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 100, b"\0" * 100, b"not a vector file at all\n" * 9])
def test_foreign_bytes(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FormatError, match=name):
        open_vectors(tmp_path / name)


@pytest.mark.parametrize("name", ["a.npy", "a.fvecs", "a.bvecs", "a.hdf5"])
def test_truncated_files(tmp_path: Path, rows: Array, name: str) -> None:
    path = write(tmp_path / name, rows.astype("u1" if name == "a.bvecs" else "<f4"))
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(FormatError, match=name):
        open_vectors(path)


def test_row_of_another_dimension(tmp_path: Path, rows: Array) -> None:
    path = write_texmex(tmp_path / "a.bvecs", rows)
    content = bytearray(path.read_bytes())
    content[20 * (4 + rows.shape[1])] += 1
    path.write_bytes(content)
    with open_vectors(path) as file:
        np.testing.assert_array_equal(file.read(0, 20), rows[:20])
        with pytest.raises(FormatError, match="row 20 has dimension 7, and row 0 has 6"):
            file.read(10, 30)


def test_contents_that_are_not_vectors(tmp_path: Path, rows: Array) -> None:
    np.save(tmp_path / "ints.npy", rows.astype(np.int64))
    np.save(tmp_path / "flat.npy", rows.astype(np.float32).ravel())
    np.save(tmp_path / "none.npy", rows[:0])
    np.save(tmp_path / "objects.npy", np.array([["a", object()]], object), allow_pickle=True)
    with (tmp_path / "zip.npy").open("wb") as file:
        np.savez(file, rows=rows)
    for name, reason in (
        ("ints", "float dtype or uint8"),
        ("flat", r"one array \[rows, dim\]"),
        ("none", "no vectors"),
        ("objects", "not a whole .npy file"),
        ("zip", "archive"),
    ):
        with pytest.raises(FormatError, match=reason):
            open_vectors(tmp_path / f"{name}.npy")
    np.save(tmp_path / "floats.npy", rows.astype(np.float32))
    with pytest.raises(FormatError, match="integer ids"):
        read_ground_truth(tmp_path / "floats.npy")
    with pytest.raises(FormatError, match=r"unknown kind of vector file '\.csv'"):
        open_vectors(tmp_path / "a.csv")


def test_hdf5_that_is_not_a_vector_set(tmp_path: Path, rows: Array) -> None:
    with pytest.raises(FormatError, match="no data set 'train'; it has base"):
        open_vectors(write_hdf5(tmp_path / "a.hdf5", base=rows))
    with pytest.raises(FormatError, match="must be \\[rows, dim\\]"):
        open_vectors(write_hdf5(tmp_path / "b.hdf5", train=rows.ravel()))
    with pytest.raises(FormatError, match="jaccard"):
        open_vectors(write_hdf5(tmp_path / "c.hdf5", "jaccard", train=rows))
