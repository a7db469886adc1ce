"""Inverted lists: what two rounds find, how wrong estimates are, what is refused, and what READs that fail do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import hnswlib
import numpy as np
import numpy.typing as npt
import pytest

from cotra_rdma import (
    Arena,
    ChecksumError,
    ClosedError,
    CompletionError,
    CotraError,
    DeadlineError,
    FabricModel,
    FormatError,
    InvalidInputError,
    Shard,
)
from cotra_rdma._core.query_checks import pack_filter
from cotra_rdma._native.channel import Channel
from cotra_rdma._native.library import lib
from cotra_rdma._native.list_engine import IvfTable, SpireEngine
from cotra_rdma._native.view import View
from cotra_rdma._shard.list_packer import append_lists, make_lists, own_vectors
from cotra_rdma.errors import StaleShardError
from helpers.faults import FaultyFabric
from helpers.image import image_bytes
from helpers.lists import distances_to_all, recall_of, spire_of
from helpers.rotation import rotate, signs

Floats = npt.NDArray[np.float32]
METRICS = ("l2", "ip", "cosine")
EVERY = 2**31  # lists to probe: all there are


def copy_of(shard: Shard) -> Arena:
    """The shard's image in an own memfd: to be changed, or to get other lists."""
    data = image_bytes(shard)
    arena = Arena.create(len(data))
    with arena.view() as view:
        view[:] = data
    return arena


@pytest.fixture(scope="module")
def rows(words: Floats) -> Floats:
    return words[:3000]


@pytest.fixture(scope="module")
def listed(rows: Floats) -> Iterator[Shard]:
    """3,000 words, l2, in 32 lists with 2 bits."""
    with Shard.build(rows, M=8, ef_construction=40, n_threads=1, n_lists=32, ivf_bits=2) as shard:
        yield shard


@pytest.fixture(scope="module")
def parts(rows: Floats) -> Iterator[list[Shard]]:
    """The same words in three shards of different sizes, bits and numbers of lists; labels are row numbers."""
    shards = []
    for begin, end, n_lists, bits in ((0, 500, 8, 1), (500, 1800, 16, 4), (1800, 3000, 12, 2)):
        ids = np.arange(begin, end)
        shards.append(
            Shard.build(rows[ids], ids=ids, M=8, ef_construction=30, n_threads=1, n_lists=n_lists, ivf_bits=bits)
        )
    yield shards
    for shard in shards:
        shard.close()


# ---- what a shard has ----


def test_a_shard_with_lists(listed: Shard, rows: Floats, queries: Floats, tmp_path: Path) -> None:
    info = listed.ivf_info
    assert info is not None
    assert (info.entries, info.n_lists, info.bits, info.code_dim) == (3000, 32, 2, 128)
    assert info.block_bytes == 2 * 4 * 128 + 512
    assert info.table_bytes + info.list_bytes == listed.info.ivf_bytes
    assert listed.info.image_bytes == listed.info.ivf_offset + listed.info.ivf_bytes == len(listed.arena)
    path = tmp_path / "listed.cotra"
    listed.save(path)
    with Shard.open(path) as opened, spire_of(opened.arena) as ours, spire_of(listed.arena) as theirs:
        assert opened.ivf_info == info
        for mine, other in zip(ours.search(queries, 10, 8)[:3], theirs.search(queries, 10, 8)[:3], strict=True):
            np.testing.assert_array_equal(mine, other)


def test_the_graph_is_the_same_beside_lists(listed: Shard, rows: Floats, queries: Floats) -> None:
    with Shard.build(rows, M=8, ef_construction=40, n_threads=1) as plain:
        assert plain.ivf_info is None
        assert (plain.info.ivf_offset, plain.info.ivf_bytes) == (0, 0)
        end = plain.info.nav_offset + plain.info.nav_bytes
        assert image_bytes(plain)[4096:] == image_bytes(listed)[4096:end]
        for mine, other in zip(plain.search(queries)[:2], listed.search(queries)[:2], strict=True):
            np.testing.assert_array_equal(mine, other)


def test_a_table(listed: Shard, rows: Floats) -> None:
    with Channel.shm(listed.arena) as channel, View.open(channel) as view, IvfTable.open(channel, view) as table:
        info = table.info
        assert info == listed.ivf_info
        centroids, sizes, radii, errors, offsets = (
            table.centroids,
            table.sizes,
            table.radii,
            table.errors,
            table.offsets,
        )
    assert centroids.shape == (32, 100)
    nearest = distances_to_all(centroids, rows, "l2").argmin(axis=1)
    np.testing.assert_allclose(sizes, np.bincount(nearest, minlength=32), atol=3)  # float16 moves a border or two
    gaps = np.sqrt(((rows - centroids[nearest]) ** 2).sum(axis=1))
    for i in range(32):
        assert radii[i] == pytest.approx(np.sqrt(np.mean(gaps[nearest == i] ** 2)), rel=0.02)
    assert (errors > 0).all()
    assert (errors < radii * 0.5 / np.sqrt(127)).all()  # 2 bits: the tangent of about 20 degrees
    blocks = -(-sizes.astype(np.int64) // 32)
    expected = listed.info.ivf_offset + info.table_bytes + np.cumsum([0, *blocks[:-1]]) * info.block_bytes
    np.testing.assert_array_equal(offsets, expected)
    assert info.longest == sizes.max()


def test_tables_and_views_of_different_images(listed: Shard, parts: list[Shard]) -> None:
    with (
        Channel.shm(listed.arena) as one,
        Channel.shm(parts[0].arena) as two,
        View.open(one) as view,
        View.open(two) as other,
        IvfTable.open(two, other) as table,
    ):
        with pytest.raises(InvalidInputError, match="not the view's"):
            SpireEngine.create([view], [table], [one])
        with pytest.raises(InvalidInputError, match="one table and one channel"):
            SpireEngine.create([other], [table], [])


def test_threads_make_the_same_lists(listed: Shard, rows: Floats) -> None:
    images = []
    with Shard.build(rows, M=8, ef_construction=40, n_threads=1) as plain:
        assignment = np.arange(len(rows)) % 20
        for n_threads in (1, 4):
            with copy_of(plain) as arena:
                seen: list[tuple[int, int]] = []
                append_lists(
                    arena,
                    rows[:20],
                    assignment,
                    bits=3,
                    n_threads=n_threads,
                    progress=lambda *done, seen=seen: seen.append(done),
                )
                assert seen[-1] == (20, 20)
                with arena.view() as view:
                    images.append(bytes(view))
    assert images[0] == images[1]


# ---- estimates ----


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("metric", METRICS)
def test_estimates_are_as_near_as_the_papers_say(metric: str, bits: int) -> None:
    """Extended RaBitQ, section 5: |<o, q> - estimate| of unit vectors is below 5.75 / (2^B sqrt(D)) in 99.9 %."""
    generator = np.random.default_rng(bits)
    dim, n = 100, 400
    vectors = generator.normal(size=(n, dim)).astype(np.float32) + 1
    queries = generator.normal(size=(30, dim)) + 1
    with Shard.build(vectors, metric=metric, M=4, ef_construction=20, n_threads=1, n_lists=4, ivf_bits=bits) as shard:
        own = np.array(own_vectors(shard.arena, shard.info)[0], np.float64)
        with Channel.shm(shard.arena) as channel, View.open(channel) as view:
            table = IvfTable.open(channel, view)
            centroids, sizes, errors, offsets = table.centroids, table.sizes, table.errors, table.offsets
            lists = [
                channel.read(int(at), -(-int(size) // 32) * table.info.block_bytes)
                for at, size in zip(offsets, sizes, strict=True)
            ]
            block_bytes = table.info.block_bytes
            table.close()
        flips = signs(shard.info.seed, shard.info.code_dim)
    if metric == "cosine":
        queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    factor = 2 if metric == "l2" else 1
    scaled, relative = [], []
    for number, data in enumerate(lists):
        centroid = centroids[number].astype(np.float64)
        t = np.ones(len(queries)) if metric == "l2" else queries @ centroid / (centroid @ centroid)
        residuals = queries - t[:, np.newaxis] * centroid
        turned, gaps = np.array([rotate(u, flips) for u in residuals]), np.linalg.norm(residuals, axis=1)
        base = distances_to_all(centroid[np.newaxis], queries, "l2" if metric == "l2" else "ip")[:, 0]
        for entry in range(int(sizes[number])):
            block, slot = data[entry // 32 * block_bytes :][:block_bytes], entry % 32
            columns = np.frombuffer(block, "<u4", 128, block_bytes - 512).reshape(4, 32)[:, slot]
            f0, f1 = columns[:2].copy().view("<f4").astype(np.float64)
            planes = np.frombuffer(block, "u1", block_bytes - 512).reshape(bits, -1, 16)[:, :, slot % 16]
            planes = planes >> 4 if slot >= 16 else planes & 15
            levels = (planes[:, :, np.newaxis] >> np.arange(4) & 1).reshape(bits, -1)
            v = 2.0 * (levels << np.arange(bits)[:, np.newaxis]).sum(axis=0) - (2**bits - 1)
            x = own[int(columns[2])]
            exact = ((queries - x) ** 2).sum(axis=1) if metric == "l2" else 1 - queries @ x
            wrong = (base + t * f0 - f1 * (turned @ v) - exact) / factor / gaps
            scaled.append(wrong / np.linalg.norm(x - centroid))
            relative.append(wrong / errors[number])
    bound = 5.75 / 2**bits / np.sqrt(128) + 2e-5  # float32
    assert (np.abs(scaled) <= bound).mean() >= 0.999
    deviation = np.std(relative)
    assert 0.6 < deviation < 1.15  # the error that a table tells is a standard deviation
    assert abs(np.mean(relative)) < 0.1


# ---- what two rounds find ----


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("metric", METRICS)
def test_recall(metric: str, bits: int, rows: Floats, queries: Floats) -> None:
    exact = distances_to_all(rows, queries, metric)
    built = Shard.build(rows, metric=metric, M=4, ef_construction=20, n_threads=1, n_lists=40, ivf_bits=bits)
    with built as shard, spire_of(shard.arena) as engine:
        labels, distances, shards, stats = engine.search(queries, 10, EVERY)
        assert recall_of(labels, exact) >= 0.99
        assert (stats["rounds"] == 2).all()
        assert (stats["lists"] == 40).all()
        assert (stats["estimated"] == 3000).all()
        assert (shards == 0).all()
        scale = 1e-5 * (np.abs(exact).max() + 1)
        np.testing.assert_allclose(distances, np.take_along_axis(exact, labels, axis=1), rtol=0, atol=scale)
        some = [recall_of(engine.search(queries, 10, n_probe)[0], exact) for n_probe in (2, 8, 24, 40)]
        assert some == sorted(some)
        assert some[2] > 0.9
        given = engine.search(queries, 10, EVERY, 10)
        assert (given[3]["reranked"] == 10).all()
        assert recall_of(given[0], exact) >= {1: 0.5, 2: 0.7, 4: 0.9}[bits]
        assert recall_of(engine.search(queries, 10, EVERY, 3000)[0], exact) == 1


def test_more_bits_need_fewer_vectors(rows: Floats, queries: Floats) -> None:
    reranked = []
    with Shard.build(rows, M=4, ef_construction=20, n_threads=1) as plain:
        for bits in range(1, 9):
            with copy_of(plain) as arena:
                make_lists(arena, plain.info, 20, bits)
                with spire_of(arena) as engine:
                    reranked.append(engine.search(queries, 10, EVERY)[3]["reranked"].mean())
    assert reranked[0] > 3 * reranked[3]
    assert reranked == sorted(reranked, reverse=True)
    assert reranked[-1] < 13


@pytest.mark.parametrize("kind", [np.float32, np.float16, np.uint8])
@pytest.mark.parametrize("dim", [1, 2, 65, 100, 1000, 4096])
@pytest.mark.parametrize("metric", METRICS)
def test_dimensions_and_vector_types(metric: str, dim: int, kind: type) -> None:
    generator = np.random.default_rng(dim)
    n = 150 if dim < 1000 else 70
    octets = generator.integers(1, 256, (n, dim), np.uint8)
    vectors = octets if kind is np.uint8 else generator.normal(size=(n, dim)).astype(kind)
    queries = (vectors[:20].astype(np.float32) + 0.05 * generator.normal(size=(20, dim))).astype(np.float32)
    exact = distances_to_all(vectors, queries, metric)
    built = Shard.build(vectors, metric=metric, M=4, ef_construction=20, n_threads=1, n_lists=7, ivf_bits=3)
    with built as shard, spire_of(shard.arena) as engine:
        labels, distances, _, stats = engine.search(queries, 5, EVERY, n)
        assert recall_of(labels, exact) == 1
        scale = (3e-5 if metric == "cosine" else 1e-5) * (np.abs(exact).max() + 1)
        np.testing.assert_allclose(distances, np.take_along_axis(exact, labels, axis=1), rtol=0, atol=scale)
        size = 32 + -(-dim * np.dtype(shard.info.vector_type).itemsize // 32) * 32
        assert (stats["read_bytes"] - stats["list_bytes"] == n * size).all()
        assert recall_of(engine.search(queries, 5, EVERY)[0], exact) >= 0.97


def test_tiny_and_large_vectors() -> None:
    """Centroids that float16 cannot hold stay float32."""
    vectors = np.random.default_rng(1).normal(size=(200, 20)).astype(np.float32)
    for scale, kind in ((1, "float16"), (1e-9, "float32"), (1e7, "float32")):
        with Shard.build(vectors * np.float32(scale), M=4, ef_construction=20, n_threads=1, n_lists=5) as shard:
            assert shard.ivf_info is not None
            assert shard.ivf_info.centroid_type == kind
            with spire_of(shard.arena) as engine:
                labels, _, _, _ = engine.search(vectors[:50] * np.float32(scale), 1, 5)
                assert (labels[:, 0] == np.arange(50)).all()


def test_equal_vectors() -> None:
    vectors = np.ones((100, 8), np.float32)
    with (
        Shard.build(vectors, M=4, ef_construction=20, n_threads=1, n_lists=3) as shard,
        spire_of(shard.arena) as engine,
    ):
        labels, distances, _, _ = engine.search(vectors[:2], 100, EVERY, 100)
        assert (labels == np.arange(100)).all()
        assert (distances == 0).all()


def test_several_shards(parts: list[Shard], rows: Floats, queries: Floats) -> None:
    exact = distances_to_all(rows, queries, "l2")
    with spire_of(*(shard.arena for shard in parts)) as engine:
        labels, distances, shards, stats = engine.search(queries, 10, EVERY)
        assert recall_of(labels, exact) >= 0.99
        np.testing.assert_array_equal(shards, np.digitize(labels, [500, 1800]))
        assert (np.diff(distances) >= 0).all()
        assert (stats["rounds"] == 2).all()
        assert (stats["lists"] == 36).all()
        few = engine.search(queries, 10, 9)  # the nearest nine of all shards together
        assert (few[3]["lists"] == 9).all()
        assert recall_of(few[0], exact) > 0.6


def test_a_label_in_several_shards_is_kept_once(rows: Floats, queries: Floats) -> None:
    build = {"M": 4, "ef_construction": 20, "n_threads": 1, "n_lists": 6, "ivf_bits": 4}
    with Shard.build(rows[:300], **build) as one, Shard.build(rows[:300], **build) as two:
        with spire_of(one.arena, two.arena) as engine:
            labels, distances, shards, _ = engine.search(queries, 10, EVERY, 300)
        exact = distances_to_all(rows[:300], queries, "l2")
        assert recall_of(labels, exact) == 1
        assert all(len(set(row)) == 10 for row in labels.tolist())
        assert (shards == 0).all()  # at the same distance, the lower shard
        assert (np.diff(distances) >= 0).all()


def test_fewer_than_k(queries: Floats, rows: Floats) -> None:
    with (
        Shard.build(rows[:7], M=4, ef_construction=20, n_threads=1, n_lists=2) as shard,
        spire_of(shard.arena) as engine,
    ):
        for n_rerank in (0, 50):
            labels, distances, shards, _ = engine.search(queries, 20, EVERY, n_rerank)
            assert (np.sort(labels[:, :7]) == np.arange(7)).all()
            assert (labels[:, 7:] == -1).all()
            assert (shards[:, 7:] == -1).all()
            assert np.isinf(distances[:, 7:]).all()
        assert engine.search(queries[:0], 3, 1)[0].shape == (0, 3)


# ---- filters, masks, deleted rows ----


@pytest.mark.parametrize("share", [0.5, 0.1, 0.01, 0])
def test_filters(parts: list[Shard], rows: Floats, queries: Floats, share: float) -> None:
    allowed = np.random.default_rng(3).random(len(rows)) < share
    pieces = [allowed[:500], None, allowed[1800:]]
    filters = [pack_filter(piece, shard.info.count) for piece, shard in zip(pieces, parts, strict=True)]
    allowed[500:1800] = True
    exact = distances_to_all(rows, queries, "l2")
    with spire_of(*(shard.arena for shard in parts)) as engine:
        labels, _, _, _ = engine.search(queries, 10, EVERY, filters=filters)
    assert allowed[labels].all()
    assert recall_of(labels, exact, np.flatnonzero(allowed).tolist()) >= 0.99


def test_a_filter_that_lets_nothing_through(listed: Shard, queries: Floats) -> None:
    with spire_of(listed.arena) as engine:
        labels, distances, _, stats = engine.search(queries, 3, 4, filters=[bytes(375)])
        assert (labels == -1).all()
        assert np.isinf(distances).all()
        assert (stats["rounds"] == 1).all()
        with pytest.raises(InvalidInputError, match="its filter"):
            engine.search(queries, 3, 4, filters=[bytes(374)])
        with pytest.raises(InvalidInputError, match="2 filters"):
            engine.search(queries, 3, 4, filters=[None, None])
        everything = engine.search(queries, 3, 4)
        np.testing.assert_array_equal(engine.search(queries, 3, 4, filters=[b"\xff" * 375])[0], everything[0])


def test_masks(parts: list[Shard], queries: Floats) -> None:
    mask = np.random.default_rng(5).random((len(queries), 3)) < 0.5
    mask[0] = False
    with spire_of(*(shard.arena for shard in parts)) as engine:
        labels, distances, shards, stats = engine.search(queries, 10, 12, mask=mask)
        assert (labels[0] == -1).all()
        assert stats[0]["rounds"] == 0
        for row, answer in enumerate(shards):
            assert mask[row, answer[answer >= 0]].all()
        alone = engine.search(queries[1:2], 10, 12, mask=mask[1:2])
        np.testing.assert_array_equal(alone[0][0], labels[1])
        np.testing.assert_array_equal(alone[1][0], distances[1])
        with pytest.raises(InvalidInputError, match="mask"):
            engine.search(queries, 10, 12, mask=mask[:, :2])


def test_deleted_rows_are_in_no_list(rows: Floats, queries: Floats) -> None:
    index = hnswlib.Index(space="l2", dim=100)
    index.init_index(max_elements=400, M=4, ef_construction=20, random_seed=1)
    index.add_items(rows[:400], num_threads=1)
    for label in range(0, 400, 3):
        index.mark_deleted(label)
    left = [label for label in range(400) if label % 3]
    with Shard.from_hnswlib(index, n_lists=9, ivf_bits=4) as shard, spire_of(shard.arena) as engine:
        assert shard.ivf_info is not None
        assert shard.ivf_info.entries == len(left) == len(shard)
        labels, _, _, _ = engine.search(queries, 10, EVERY, 100)
        assert (labels % 3 != 0).all()
        assert recall_of(labels, distances_to_all(rows[:400], queries, "l2"), left) == 1
        with pytest.raises(InvalidInputError, match="cannot make"):
            make_lists(shard.arena, shard.info, len(left) + 1, 4)


# ---- the same bits, whatever the way ----


def modelled(fabric: FabricModel, **limits: int) -> Callable[[Arena], Channel]:
    return lambda arena: Channel.model(Channel.shm(arena, **limits), fabric)


@pytest.mark.parametrize("n_rerank", [0, 40])
def test_every_way_gives_the_same_bits(parts: list[Shard], queries: Floats, n_rerank: int) -> None:
    arenas = [shard.arena for shard in parts]
    with spire_of(*arenas) as engine:
        expected = engine.search(queries, 10, 12, n_rerank)
        for inflight in (1, 7, 64):
            for column, again in zip(
                expected[:3], engine.search(queries, 10, 12, n_rerank, inflight=inflight), strict=False
            ):
                np.testing.assert_array_equal(column, again)
        one_by_one = [engine.search(query[np.newaxis], 10, 12, n_rerank)[0][0] for query in queries]
        np.testing.assert_array_equal(expected[0], one_by_one)
    for open_channel, more_reads in (
        (modelled(FabricModel(round_trip_s=2e-5)), False),
        (modelled(FabricModel(round_trip_s=1e-5, bytes_per_s=1e9, reads_per_s=1e6), slots=3), False),
        (lambda arena: Channel.shm(arena, slots=1, slot_bytes=2560), True),  # a block a READ, one at a time
        (lambda arena: Channel.shm(arena, slots=5, slot_bytes=6000), True),
    ):
        with spire_of(*arenas, open_channel=open_channel) as engine:
            found = engine.search(queries, 10, 12, n_rerank)
            for column, again in zip(expected[:2], found[:2], strict=True):
                np.testing.assert_array_equal(column.view(np.uint32), again.view(np.uint32))
            for name in ("rounds", "lists", "reranked", "estimated", "list_bytes", "read_bytes"):
                np.testing.assert_array_equal(found[3][name], expected[3][name])
            assert (found[3]["reads"] > expected[3]["reads"]).any() == more_reads


def test_threads_share_tables(parts: list[Shard], queries: Floats) -> None:
    with ExitStack() as stack:
        channels = [stack.enter_context(Channel.shm(shard.arena)) for shard in parts]
        views = [stack.enter_context(View.open(channel)) for channel in channels]
        tables = [
            stack.enter_context(IvfTable.open(channel, view)) for channel, view in zip(channels, views, strict=True)
        ]

        def search(rows: Floats) -> npt.NDArray[np.int64]:
            with ExitStack() as own:
                channels = [own.enter_context(Channel.shm(shard.arena)) for shard in parts]
                engine = own.enter_context(SpireEngine.create(views, tables, channels))
                return engine.search(rows, 10, 12)[0]

        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(search, np.array_split(queries, 9)))
        np.testing.assert_array_equal(np.concatenate(found), search(queries))


def test_simd_levels_find_the_same(listed: Shard, queries: Floats) -> None:
    with spire_of(listed.arena, simd=lib.COTRA_SIMD_PORTABLE) as one, spire_of(listed.arena) as best:
        ours, theirs = one.search(queries, 10, 8, 3000), best.search(queries, 10, 8, 3000)
    assert (ours[0] == theirs[0]).mean() >= 0.998  # exact distances differ by the order of their sums
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-5)


# ---- READs that fail, bytes that changed ----


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ({"fail_after_reads": 30, "fail_status": lib.COTRA_ERR_COMPLETION, "fail_wc_status": 12}, CompletionError),
        ({"corrupt_every": 20}, ChecksumError),
        ({"drop_after_reads": 40}, DeadlineError),
    ],
)
def test_a_failing_read_names_its_shard(
    parts: list[Shard], queries: Floats, fault: dict[str, Any], error: type[CotraError]
) -> None:
    arenas = [shard.arena for shard in parts]
    channels = [Channel.shm(arena) for arena in arenas]
    views = [View.open(channel) for channel in channels]
    tables = [IvfTable.open(channel, view) for channel, view in zip(channels, views, strict=True)]
    channels[1] = Channel.model(channels[1], FaultyFabric(**fault))
    with SpireEngine.create(views, tables, channels) as engine:
        with pytest.raises(error) as caught:
            engine.search(queries, 10, EVERY, timeout_s=0.05)
        assert caught.value.shard == 1
        with pytest.raises(ClosedError):
            engine.search(queries, 10, EVERY)


def test_bytes_that_changed_under_a_reader(listed: Shard, queries: Floats) -> None:
    info = listed.info
    table_end = info.ivf_offset + (listed.ivf_info.table_bytes if listed.ivf_info else 0)

    def spoil_list(memory: npt.NDArray[np.uint8]) -> None:
        memory[table_end::1024] ^= 1

    def spoil_vectors(memory: npt.NDArray[np.uint8]) -> None:
        memory[info.records_offset + 40 : info.nav_offset : info.record_bytes] ^= 1

    def spoil_labels(memory: npt.NDArray[np.uint8]) -> None:
        memory[info.records_offset + 8 : info.nav_offset : info.record_bytes] ^= 1

    def rebuild(memory: npt.NDArray[np.uint8]) -> None:
        memory[info.records_offset + 24 : info.nav_offset : info.record_bytes] ^= 3
        spoil_vectors(memory)

    for spoil, error in (
        (spoil_list, ChecksumError),
        (spoil_vectors, ChecksumError),
        (spoil_labels, ChecksumError),
        (rebuild, StaleShardError),
    ):
        with copy_of(listed) as arena, spire_of(arena) as engine:
            engine.search(queries, 3, 4)
            with arena.view() as view:
                spoil(np.frombuffer(view, np.uint8))
            with pytest.raises(error) as caught:
                engine.search(queries, 3, 4)
            assert caught.value.shard == 0


# ---- what is refused ----


def test_what_a_build_refuses(rows: Floats) -> None:
    for wrong in ({"n_lists": -1}, {"n_lists": 51}, {"n_lists": 3, "ivf_bits": 0}, {"n_lists": 3, "ivf_bits": 9}):
        with pytest.raises(InvalidInputError):
            Shard.build(rows[:50], n_threads=1, **wrong)


def test_what_appending_refuses(rows: Floats, tmp_path: Path) -> None:
    assignment = np.zeros(50, np.int64)
    with Shard.build(rows[:50], M=4, ef_construction=20, n_threads=1) as shard:
        before = image_bytes(shard)
        bad = rows[:2].copy()
        bad[1, 3] = np.nan
        for centroids, lists, bits in (
            (rows[:2, :50], assignment, 4),
            (rows[:0], assignment, 4),
            (rows[:2], assignment[:49], 4),
            (rows[:2], assignment.astype(np.float64), 4),
            (rows[:2], assignment + 2, 4),
            (rows[:2], assignment - 1, 4),
            (rows[:2], assignment + 2**32, 4),
            (rows[:2], assignment, 0),
            (rows[:2], assignment, 9),
            (bad, assignment, 4),
        ):
            with pytest.raises(InvalidInputError):
                append_lists(shard.arena, centroids, lists, bits=bits)
        assert image_bytes(shard) == before
        shard.save(tmp_path / "plain.cotra")
        with Shard.open(tmp_path / "plain.cotra") as mapped, pytest.raises(InvalidInputError, match="own memfd"):
            append_lists(mapped.arena, rows[:2], assignment)
        append_lists(shard.arena, rows[:2], assignment)  # one list stays empty
        with pytest.raises(InvalidInputError, match="some already"):
            append_lists(shard.arena, rows[:2], assignment)
        with spire_of(shard.arena) as engine:
            assert recall_of(engine.search(rows[:50], 5, 2)[0], distances_to_all(rows[:50], rows[:50], "l2")) > 0.97
        shard.arena.seal()
        with pytest.raises(InvalidInputError, match="sealed"):
            append_lists(shard.arena, rows[:2], assignment)


def test_an_image_of_another_version(listed: Shard, tmp_path: Path) -> None:
    path = tmp_path / "old.cotra"
    for version in (3, 5):
        data = bytearray(image_bytes(listed))
        data[8] = version
        path.write_bytes(data)
        with pytest.raises(FormatError, match=f"format version {version}: this build reads version 4"):
            Shard.open(path)


def test_what_a_reader_refuses(listed: Shard, rows: Floats, queries: Floats) -> None:
    with (
        Shard.build(rows[:50], M=4, ef_construction=20, n_threads=1) as plain,
        Channel.shm(plain.arena) as channel,
        View.open(channel) as view,
        pytest.raises(InvalidInputError, match="no inverted lists"),
    ):
        IvfTable.open(channel, view)
    with (
        Channel.shm(listed.arena, slot_bytes=1024) as short,
        View.open(short) as view,
        IvfTable.open(short, view) as table,
    ):
        with pytest.raises(InvalidInputError, match="slot_bytes"):
            SpireEngine.create([view], [table], [short])
        with Channel.shm(listed.arena) as channel:
            with pytest.raises(InvalidInputError, match="same channel"):
                SpireEngine.create([view, view], [table, table], [channel, channel])
            with SpireEngine.create([view], [table], [channel]) as engine:
                for wrong in ((0, 1, 0), (1, 0, 0), (5, 1, 4), (2**21, 1, 0), (1, 2**32, 0), (1, 1.5, 0), (1, 1, -1)):
                    with pytest.raises(InvalidInputError):
                        engine.search(queries, *wrong)
                with pytest.raises(InvalidInputError, match="queries must be"):
                    engine.search(queries[:, :50], 1, 1)
                engine.search(queries, 1, 1)
            with pytest.raises(ClosedError):
                engine.search(queries, 1, 1)
