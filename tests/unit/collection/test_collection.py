"""Collections: a file of vectors split over shard files that together hold every row, and nothing half-written ever."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from cotra_rdma._build.collection import build_collection
from cotra_rdma._collection.manifest import MANIFEST, Collection, shard_paths
from cotra_rdma._shard.shard import Shard
from cotra_rdma.datasets import open_vectors
from cotra_rdma.errors import CotraError, FormatError, InvalidInputError

N, DIM = 250, 12


@pytest.fixture
def source(tmp_path: Path) -> Path:
    np.save(tmp_path / "base.npy", np.random.default_rng(1).normal(size=(N, DIM)).astype(np.float32))
    return tmp_path / "base.npy"


def build(source: Path, out: Path, n_shards: int, **options: object) -> Collection:
    with open_vectors(source) as vectors:
        return build_collection(vectors, out, n_shards, n_threads=1, **options)


def files(n_shards: int, generation: str = "") -> set[str]:
    """The names in a collection's directory."""
    return {MANIFEST, *(f"shard-{i:03d}{generation}.{kind}" for i in range(n_shards) for kind in ("cotra", "coarse"))}


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_shards_hold_every_row_under_its_number(source: Path, tmp_path: Path) -> None:
    built = build(source, tmp_path / "out", 4, metric="cosine", M=8)
    assert (built.count, built.dim, built.metric, built.M, built.generation) == (N, DIM, "cosine", 8, 1)
    assert Collection.load(tmp_path / "out") == built
    assert names(tmp_path / "out") == files(4)
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
    building = [step for step in seen if step[0] >= 0]
    assert [done for _, _, done in building] == sorted(done for _, _, done in building)
    assert {step[:2] for step in building} == {(i, phase) for i in range(3) for phase in ("build", "link", "pack")}
    assert building[-1] == (2, "pack", N)
    assert seen == [*building, (-1, "calibrate", N)]
    seen.clear()
    build(source, tmp_path / "other", 3, partition="kmeans", progress=lambda *step: seen.append(step))
    assert seen[0] == (-1, "partition", 0)
    assert (-1, "partition", N) in seen


def test_nothing_is_replaced_without_force(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(source, out, 3)
    with pytest.raises(InvalidInputError, match="holds a collection already"):
        build(source, out, 2)
    assert len(Collection.load(out).shards) == 3
    assert build(source, out, 2, force=True).generation == 2
    assert names(out) == files(2, "-g2")
    with Shard.open(out / "shard-000-g2.cotra") as shard:
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
    assert names(tmp_path / "old") == files(2)


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
        ({"format_version": 4}, "version 4"),
        ({"format": "other"}, "other version 3"),
        ({"dim": "12"}, "dim, count or graph_id"),
        ({"graph_id": -1}, "dim, count or graph_id"),
        ({"graph_id": True}, "dim, count or graph_id"),
        ({"shards": [{**good["shards"][0], "count": 1 << 31}]}, "shard 0: its count"),
        ({"shards": [{**good["shards"][0], "base": 3}]}, "shard 0: its base is 3"),
        ({"shards": [{**good["shards"][0], "generation": None}]}, "shard 0: its generation"),
        ({"shards": [{**good["shards"][0], "image_checksum": 1 << 64}]}, "shard 0: its generation or image_checksum"),
        ({"shards": [{**good["shards"][0], "centroid": [1.0] * 11}]}, "shard 0: its centroid is not 12"),
        ({"shards": [{**good["shards"][0], "centroid": [1.0] * 11 + [float("inf")]}]}, "its centroid"),
        ({"shards": [{**good["shards"][0], "centroid": 7}]}, "malformed manifest"),
        ({"shards": [{**good["shards"][0], "centroid": ["1"] * 12}]}, "its centroid"),
        ({"partition": "round-robin"}, "round-robin"),
        ({"calibration": {}}, "calibration"),
        ({"calibration": 7}, "calibration"),
        ({"shards": [{**good["shards"][0], "coarse_name": "gone.coarse"}]}, "not a file beside it"),
        ({"shards": [{**good["shards"][0], "coarse_name": 7}]}, "not a file beside it"),
        ({"shards": [{**good["shards"][0], "name": "../base.npy"}]}, "not a file beside it"),
        ({"shards": [{**good["shards"][0], "name": "gone.cotra"}]}, "not a file beside it"),
    ):
        (out / MANIFEST).write_text(json.dumps(good | change))
        with pytest.raises(FormatError, match=reason):
            Collection.load(out)


@pytest.mark.parametrize("partition", ["range", "kmeans"])
def test_the_manifest_tells_what_the_images_are(source: Path, tmp_path: Path, partition: str) -> None:
    out = tmp_path / "out"
    built = build(source, out, 3, partition=partition)
    assert built == Collection.load(out)
    assert built.graph_id == 0
    for entry in built.shards:
        with Shard.open(out / entry.name) as shard:
            assert entry.image_checksum == shard.info.image_checksum
            assert entry.generation == shard.info.generation == 1
        assert entry.base == 0
        assert (entry.centroid is None) == (partition == "range")


def test_collections_of_the_first_version_are_read(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(source, out, 2)
    raw = json.loads((out / MANIFEST).read_text()) | {"format_version": 1}
    del raw["partition"], raw["calibration"]
    for shard in raw["shards"]:
        (out / shard.pop("coarse_name")).unlink()
        for name in ("base", "generation", "image_checksum", "centroid"):
            del shard[name]
    del raw["graph_id"]
    (out / MANIFEST).write_text(json.dumps(raw))
    old = Collection.load(out)
    assert (old.graph_id, old.shards[1].base, old.shards[1].image_checksum) == (0, 0, None)
    assert (old.partition, old.calibration, old.coarse_table(out, 0), old.router(out)) == ("range", None, None, None)
    assert build(source, out, 3, force=True).generation == 2
    assert names(out) == files(3, "-g2")


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("suffix", ["npy", "fvecs"])
def test_kmeans_keeps_neighbours_together_and_row_numbers_as_ids(
    words: npt.NDArray[np.float32], tmp_path: Path, metric: str, suffix: str
) -> None:
    rows = np.ascontiguousarray(words[:1200, :20])
    if suffix == "npy":
        np.save(tmp_path / "base.npy", rows)
    else:
        np.hstack([np.full((1200, 1), 20, "<i4").view("<f4"), rows]).tofile(tmp_path / "base.fvecs")
    out = tmp_path / "out"
    built = build(tmp_path / f"base.{suffix}", out, 4, metric=metric, partition="kmeans")
    assert built == Collection.load(out)
    assert built.partition == "kmeans"
    assert sum(entry.count for entry in built.shards) == 1200
    assert max(entry.count for entry in built.shards) <= 1.1 * 300
    router = built.router(out)
    assert router is not None
    best = router.shares(rows).argmax(axis=1)
    found = []
    for number, (path, entry) in enumerate(zip(shard_paths([out]), built.shards, strict=True)):
        table = built.coarse_table(out, number)
        assert table is not None
        assert table.count == entry.count
        with Shard.open(path) as shard:
            ids, _, _ = shard.search(rows, k=entry.count, ef=entry.count)
            held = np.unique(ids)
            assert (len(held), held[0]) == (entry.count, entry.first_id)
            found += held.tolist()
            assert (best[held] == number).mean() > 0.7
            near, distances, _ = shard.search(rows[held], k=1)
            assert np.array_equal(near[:, 0], held)
            assert np.abs(distances).max() < 1e-5
    assert sorted(found) == list(range(1200))


def test_types_survive_the_partition(tmp_path: Path) -> None:
    rows = np.random.default_rng(1).integers(0, 255, (300, 8)).astype(np.uint8)
    np.save(tmp_path / "base.npy", rows)
    build(tmp_path / "base.npy", tmp_path / "out", 3, partition="kmeans")
    for path in shard_paths([tmp_path / "out"]):
        with Shard.open(path) as shard:
            assert shard.info.vector_type == "uint8"


def test_equal_vectors_make_no_empty_shard(tmp_path: Path) -> None:
    np.save(tmp_path / "base.npy", np.ones((40, 4), np.float32))
    for n_shards in (3, 40):
        built = build(tmp_path / "base.npy", tmp_path / f"out{n_shards}", n_shards, partition="kmeans")
        assert min(entry.count for entry in built.shards) >= 1
        assert sum(entry.count for entry in built.shards) == 40


def test_coarse_tables_of_other_shards_or_none_are_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    built = build(source, out, 3)
    good = (out / "shard-000.coarse").read_bytes()
    (out / "shard-000.coarse").write_bytes((out / "shard-002.coarse").read_bytes())
    with pytest.raises(FormatError, match=r"shard-000\.coarse: is of 84 vectors"):
        built.coarse_table(out, 0)
    (out / "shard-000.coarse").write_bytes(good[:-1])
    with pytest.raises(FormatError, match=r"shard-000\.coarse: coarse table"):
        built.router(out)


def test_an_unknown_partition(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="partition must be"):
        build(source, tmp_path / "out", 2, partition="random")


def test_shard_paths_takes_files_and_directories(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(source, out, 2)
    one = out / "shard-001.cotra"
    assert shard_paths([one, out]) == [one, out / "shard-000.cotra", one]
    with pytest.raises(CotraError, match=MANIFEST):
        shard_paths([tmp_path])
