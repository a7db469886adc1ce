"""Collections: a file of vectors split over shard files that together hold every row, and nothing half-written ever."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cotra_rdma.collection import MANIFEST, Collection, build_collection, shard_paths
from cotra_rdma.datasets import open_vectors
from cotra_rdma.errors import CotraError, FormatError, InvalidInputError
from cotra_rdma.shard import Shard

N, DIM = 250, 12


@pytest.fixture
def source(tmp_path: Path) -> Path:
    np.save(tmp_path / "base.npy", np.random.default_rng(1).normal(size=(N, DIM)).astype(np.float32))
    return tmp_path / "base.npy"


def build(source: Path, out: Path, n_shards: int, **options: object) -> Collection:
    with open_vectors(source) as vectors:
        return build_collection(vectors, out, n_shards, n_threads=1, **options)


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_shards_hold_every_row_under_its_number(source: Path, tmp_path: Path) -> None:
    built = build(source, tmp_path / "out", 4, metric="cosine", M=8)
    assert (built.count, built.dim, built.metric, built.M, built.generation) == (N, DIM, "cosine", 8, 1)
    assert Collection.load(tmp_path / "out") == built
    assert names(tmp_path / "out") == {MANIFEST, *(f"shard-00{i}.cotra" for i in range(4))}
    rows = np.load(source)
    found = []
    for path, entry in zip(shard_paths([tmp_path / "out"]), built.shards, strict=True):
        with Shard.open(path) as shard:
            assert (len(shard), shard.info.image_bytes) == (entry.count, path.stat().st_size)
            ids, _, _ = shard.search(rows[entry.first_id : entry.first_id + entry.count], k=1)
            found += ids[:, 0].tolist()
    assert found == list(range(N))


def test_progress_counts_the_rows_of_the_whole_set(source: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, str, int]] = []
    build(source, tmp_path / "out", 3, progress=lambda shard, phase, done: seen.append((shard, phase, done)))
    assert [done for _, _, done in seen] == sorted(done for _, _, done in seen)
    assert {(shard, phase) for shard, phase, _ in seen} == {(i, phase) for i in range(3) for phase in ("build", "pack")}
    assert seen[-1] == (2, "pack", N)


def test_nothing_is_replaced_without_force(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(source, out, 3)
    with pytest.raises(InvalidInputError, match="holds a collection already"):
        build(source, out, 2)
    assert len(Collection.load(out).shards) == 3
    assert build(source, out, 2, force=True).generation == 2
    assert names(out) == {MANIFEST, "shard-000.cotra", "shard-001.cotra"}
    with Shard.open(out / "shard-000.cotra") as shard:
        assert shard.info.generation == 2


def test_a_failed_run_leaves_everything_as_it_was(source: Path, tmp_path: Path) -> None:
    rows = np.load(source)
    rows[N - 1, 0] = np.nan
    np.save(tmp_path / "bad.npy", rows)
    with pytest.raises(InvalidInputError, match="NaN"):
        build(tmp_path / "bad.npy", tmp_path / "new", 2)
    assert not (tmp_path / "new").exists()
    before = build(source, tmp_path / "old", 2)
    with pytest.raises(InvalidInputError, match="NaN"):
        build(tmp_path / "bad.npy", tmp_path / "old", 3, force=True)
    assert Collection.load(tmp_path / "old") == before
    assert len(names(tmp_path / "old")) == 3


@pytest.mark.parametrize("n_shards", [0, N + 1])
def test_shards_that_would_be_empty(source: Path, tmp_path: Path, n_shards: int) -> None:
    with pytest.raises(InvalidInputError, match="cannot be split"):
        build(source, tmp_path / "out", n_shards)


def test_a_file_where_the_directory_should_be(source: Path) -> None:
    with pytest.raises(InvalidInputError, match="not a directory"):
        build(source, source, 1)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"format": "cotra-collection", "format_version": 1}', '{"format": "x"}', "null", "\udcff"],
)
def test_malformed_manifests(tmp_path: Path, content: str) -> None:
    (tmp_path / MANIFEST).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(FormatError):
        Collection.load(tmp_path)


def test_manifests_of_other_versions_and_with_paths(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(source, out, 1)
    good = json.loads((out / MANIFEST).read_text())
    for change, reason in (
        ({"format_version": 2}, "version 2"),
        ({"shards": [{**good["shards"][0], "name": "../base.npy"}]}, "not a file beside it"),
        ({"shards": [{**good["shards"][0], "name": "gone.cotra"}]}, "not a file beside it"),
    ):
        (out / MANIFEST).write_text(json.dumps(good | change))
        with pytest.raises(FormatError, match=reason):
            Collection.load(out)


def test_shard_paths_takes_files_and_directories(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(source, out, 2)
    one = out / "shard-001.cotra"
    assert shard_paths([one, out]) == [one, out / "shard-000.cotra", one]
    with pytest.raises(CotraError, match=MANIFEST):
        shard_paths([tmp_path])
