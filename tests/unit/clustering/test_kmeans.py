"""k-means and balanced partitions: what they promise of sizes and distances, in memory and chunk by chunk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from cotra_rdma._clustering import balanced as partition_module
from cotra_rdma._clustering import kmeans as module
from cotra_rdma._clustering.balanced import balanced_partition
from cotra_rdma._clustering.kmeans import Clusters, kmeans, normalised
from cotra_rdma.datasets import open_vectors
from cotra_rdma.errors import InvalidInputError

Floats = npt.NDArray[np.float32]


def squared(rows: npt.NDArray[Any], centroids: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    gaps = rows[:, np.newaxis].astype(np.float64) - centroids[np.newaxis].astype(np.float64)
    return np.asarray(np.square(gaps).sum(axis=2))


def blobs(sizes: list[int], *, dim: int = 8, offset: float = 0.0, seed: int = 3) -> Floats:
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(len(sizes), dim)) * 20 + offset
    rows = np.concatenate([generator.normal(size=(n, dim)) + centre for n, centre in zip(sizes, centres, strict=True)])
    return generator.permutation(rows).astype(np.float32)


def same(one: Clusters, other: Clusters) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in Clusters.__slots__)


def test_clusters_are_what_they_say(words: Floats) -> None:
    rows = words[:3000]
    found = kmeans(rows, 32, seed=1)
    exact = squared(rows, found.centroids)
    assert (found.centroids.dtype, found.assignment.dtype) == (np.float32, np.int32)
    chosen = exact[np.arange(len(rows)), found.assignment]
    assert np.allclose(chosen, exact.min(axis=1), rtol=1e-4)
    assert found.sizes.tolist() == np.bincount(found.assignment, minlength=32).tolist()
    assert found.sizes.min() > 0
    for number in range(32):
        assert found.radii[number] == pytest.approx(np.sqrt(chosen[found.assignment == number].mean()), rel=1e-3)
    assert chosen.sum() < 0.9 * squared(rows, kmeans(rows, 32, seed=1, n_iterations=0).centroids).min(axis=1).sum()


@pytest.mark.parametrize("offset", [0.0, 10_000.0])
def test_separate_blobs_are_found_even_far_from_the_origin(offset: float) -> None:
    found = kmeans(blobs([50, 100, 150, 200], offset=offset), 4, seed=2)
    assert sorted(found.sizes.tolist()) == [50, 100, 150, 200]


def test_cosine_looks_at_directions_only() -> None:
    rows = blobs([100, 100, 100])
    stretched = rows * np.random.default_rng(1).uniform(0.1, 10, (len(rows), 1)).astype(np.float32)
    one, other = kmeans(normalised(rows), 3, seed=1), kmeans(stretched, 3, seed=1, metric="cosine")
    assert np.array_equal(one.assignment, other.assignment)
    assert np.allclose(one.centroids, other.centroids, atol=1e-6)
    assert normalised(np.zeros((1, 3))).tolist() == [[0, 0, 0]]


def test_a_seed_tells_everything(words: Floats) -> None:
    rows = words[:2000]
    assert same(kmeans(rows, 20, seed=5), kmeans(rows, 20, seed=5, n_threads=1))
    assert not same(kmeans(rows, 20, seed=5), kmeans(rows, 20, seed=6))
    one, other = balanced_partition(rows, 5, seed=5), balanced_partition(rows, 5, seed=5, n_threads=3)
    assert np.array_equal(one[0], other[0])
    assert np.array_equal(one[1], other[1])


def test_duplicates_leave_clusters_empty_and_all_else_whole() -> None:
    rows = np.repeat(np.eye(3, dtype=np.float32), 40, axis=0)
    found = kmeans(rows, 6, seed=1)
    assert sorted(found.sizes.tolist()) == [0, 0, 0, 40, 40, 40]
    assert np.abs(found.radii).max() < 1e-3
    assert np.isfinite(found.centroids).all()


def test_an_empty_cluster_starts_again_at_the_farthest_row() -> None:
    rows = np.array([[0], [1], [2], [50]], np.float32)
    centroids = np.array([[1], [1000]], np.float32)
    part = np.zeros(4, np.int32)
    assert module.move_centroids(rows, part, squared(rows, centroids[:1])[:, 0].astype(np.float32), centroids)
    assert centroids[1] == 50


@pytest.mark.parametrize("k", [1, 7, 300])
def test_as_many_clusters_as_rows_at_most(k: int) -> None:
    rows = np.random.default_rng(1).normal(size=(300, 4)).astype(np.float32)
    found = kmeans(rows, k, seed=1)
    assert (found.sizes.sum(), len(found.centroids)) == (300, k)
    if k == 300:
        assert (found.sizes == 1).all()
        assert np.abs(found.radii).max() < 1e-2


@pytest.mark.parametrize("dtype", ["float16", "float64", "uint8"])
def test_files_are_read_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    monkeypatch.setattr(module, "_SAMPLE_CHUNK", 97)
    monkeypatch.setattr(module, "_CHUNK_FLOATS", 1)
    monkeypatch.setattr(module, "ROWS_PER_CENTROID", 30)
    monkeypatch.setattr(partition_module, "ROWS_PER_CENTROID", 30)
    monkeypatch.setattr(partition_module, "ROWS_PER_PART", 100)
    rows = (blobs([400, 300, 200, 100]) + 60).astype(dtype)
    np.save(tmp_path / "rows.npy", rows)
    seen: list[tuple[str, int, int]] = []
    with open_vectors(tmp_path / "rows.npy") as file:
        found = kmeans(file, 4, seed=1, progress=lambda *step: seen.append(step))
        part, _ = balanced_partition(file, 4, seed=1)
    assert same(found, kmeans(rows, 4, seed=1))
    assert np.array_equal(part, balanced_partition(rows, 4, seed=1)[0])
    assert [step[0] for step in seen] == sorted((step[0] for step in seen), reverse=True)
    assert seen[-1] == ("assign", 1000, 1000)
    assert np.bincount(part).max() <= 275


@pytest.mark.parametrize("max_share", [1.0, 1.1, 2.0])
@pytest.mark.parametrize("sizes", [[1000, 20, 20, 20], [265] * 4, [1060]])
def test_no_part_is_larger_than_its_share(sizes: list[int], max_share: float) -> None:
    rows = blobs(sizes)
    part, centroids = balanced_partition(rows, 4, max_share=max_share, seed=1)
    counts = np.bincount(part, minlength=4)
    assert (part.dtype, centroids.shape) == (np.int32, (4, 8))
    assert counts.max() <= max_share * len(rows) / 4
    if max_share == 1.1 and len(sizes) == 4 and sizes[1] == 265:  # there is no need to tear these apart
        assert counts.tolist() == [265] * 4


def test_balance_costs_little_distance(words: Floats) -> None:
    rows = normalised(words[:8000])
    part, centroids = balanced_partition(rows, 8, seed=1, metric="cosine")
    gaps = squared(rows, centroids)
    assert np.bincount(part).max() <= 1.1 * 1000
    chosen = gaps[np.arange(len(rows)), part].sum()
    assert chosen < 1.06 * squared(rows, kmeans(rows, 8, seed=1).centroids).min(axis=1).sum()


def test_equal_rows_are_split_too() -> None:
    assert np.bincount(balanced_partition(np.ones((101, 3)), 4, seed=1)[0]).max() <= 27
    assert balanced_partition(np.ones((5, 3)), 1)[0].tolist() == [0] * 5
    assert sorted(balanced_partition(np.eye(5), 5)[0].tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("vectors", "k", "options", "reason"),
    [
        (np.ones((3, 2)), 4, {}, "3 vectors cannot"),
        (np.ones((3, 2)), 0, {}, "3 vectors cannot"),
        (np.ones(3), 1, {}, "not \\[3\\]"),
        (np.ones((0, 3)), 1, {}, "not \\[0, 3\\]"),
        (np.array([["a"]]), 1, {}, "real numbers"),
        (np.array([[1.0], [np.nan]]), 1, {}, "vector 1 holds NaN"),
        (np.array([[1.0], [1e30]]), 1, {}, "vector 1 holds a component beyond"),
        (np.array([[1.0], [1e300]]), 1, {}, "vector 1 holds NaN or infinity"),
        (np.ones((3, 2)), 1, {"metric": "manhattan"}, "metric must be"),
        (np.ones((3, 2)), 1, {"n_threads": -1}, "n_threads"),
    ],
)
def test_bad_input(vectors: npt.NDArray[Any], k: int, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidInputError, match=reason):
        kmeans(vectors, k, **options)
    with pytest.raises(InvalidInputError, match=reason):
        balanced_partition(vectors, k, **options)


def test_bad_options() -> None:
    with pytest.raises(InvalidInputError, match="max_share"):
        balanced_partition(np.ones((3, 2)), 2, max_share=0.9)
    with pytest.raises(InvalidInputError, match="n_iterations"):
        kmeans(np.ones((3, 2)), 2, n_iterations=-1)
