"""One graph over all shards: links that cross, one walk a query, and shards that are missing, alone, foreign or hostile."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from cotra_rdma import Arena, FormatError, InvalidInputError, Shard
from cotra_rdma._build.border import Border
from cotra_rdma._build.collection import build_collection
from cotra_rdma._build.cross_links import channel_of_file, link_shard
from cotra_rdma._build.graph_plan import GraphPlan
from cotra_rdma._clustering.kmeans import normalised
from cotra_rdma._collection.manifest import Collection, shard_paths
from cotra_rdma._native.channel import Channel
from cotra_rdma._native.graph_engine import Engine
from cotra_rdma._native.merge import merge
from cotra_rdma._native.record_cache import RecordCache
from cotra_rdma._native.view import View
from cotra_rdma.datasets import open_vectors
from helpers.image import HEADER_BYTES, Image, image_bytes, reader_of
from helpers.rotation import rotate, signs

Floats = npt.NDArray[np.float32]
N, N_SHARDS = 3000, 3
NONE = 0xFFFFFFFF


def build(directory: Path, vectors: npt.NDArray, n_shards: int = N_SHARDS, **options: object) -> list[Path]:
    directory.mkdir()
    np.save(directory / "base.npy", vectors)
    knobs = {"metric": "cosine", "M": 8, "ef_construction": 60, "graph": "global", "n_threads": 1} | options
    with open_vectors(directory / "base.npy") as file:
        build_collection(file, directory / "index", n_shards, **knobs)  # type: ignore[arg-type]
    return shard_paths([directory / "index"])


@pytest.fixture(scope="module")
def paths(words: Floats, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three shards of 3,000 words, linked to one graph, with inverted lists."""
    return build(tmp_path_factory.mktemp("one") / "graph", words[:N], n_lists=30)


@contextmanager
def engine_over(memory: Sequence[Path | Image], cache_bytes: int = 0) -> Iterator[Engine]:
    with ExitStack() as stack:
        views, channels, caches = [], [], []
        for source in memory:
            if isinstance(source, Path):
                arena = stack.enter_context(Shard.open(source)).arena
            else:
                arena = stack.enter_context(Arena.wrap(np.frombuffer(bytes(source), np.uint64).copy()))
            channels.append(stack.enter_context(Channel.shm(arena)))
            views.append(stack.enter_context(View.open(channels[-1])))
            if cache_bytes:
                caches.append(stack.enter_context(RecordCache.create(views[-1], cache_bytes)))
        yield stack.enter_context(Engine.create(views, channels, caches or None))


def images(paths: Sequence[Path]) -> list[Image]:
    found = []
    for path in paths:
        with Shard.open(path) as shard:
            found.append(Image(image_bytes(shard)))
    return found


def neighbours(image: Image) -> list[npt.NDArray[np.uint32]]:
    found = []
    for node in range(image.count):
        at = image.record(node)
        count = int.from_bytes(image.data[at + 20 : at + 22], "little")
        found.append(np.frombuffer(image.data, "<u4", count, at + image.numbers))
    return found


def exact(vectors: Floats, queries: Floats, rows: npt.NDArray[np.int64], k: int = 10) -> npt.NDArray[np.int64]:
    scores = normalised(queries) @ normalised(vectors[rows]).T
    return rows[np.argsort(-scores, axis=1, kind="stable")[:, :k]]


def recall(ids: npt.NDArray[np.int64], truth: npt.NDArray[np.int64]) -> float:
    return float(np.mean([len(np.intersect1d(a, b)) / len(b) for a, b in zip(ids, truth, strict=True)]))


# ---- the build ----


def test_every_node_has_its_number_and_links_cross(paths: list[Path]) -> None:
    parts, base = images(paths), 0
    for part in parts:
        head = part.header
        assert (head["graph_base"], head["graph_count"]) == (base, N)
        assert head["graph_id"] == parts[0].header["graph_id"] != 0
        nav = head["nav_offset"]
        assert part.data[nav : nav + 400] == parts[0].data[parts[0].nav : parts[0].nav + 400]  # the mean
        crossing = 0
        for node, numbers in enumerate(neighbours(part)):
            assert len(set(numbers.tolist())) == len(numbers) > 0
            assert (numbers < N).all()
            assert base + node not in numbers
            crossing += ((numbers < base) | (numbers >= base + part.count)).sum()
        assert 0.05 < crossing / (32 * part.count) < 0.8
        base += part.count
    assert base == N


def test_codes_of_far_neighbours_are_of_their_vectors(paths: list[Path]) -> None:
    vectors, mine = [], []
    for path in paths:
        with Shard.open(path) as shard, shard.arena.view() as view:
            info = shard.info
            records = np.frombuffer(view, np.uint8, info.count * info.record_bytes, HEADER_BYTES)
            own = records.reshape(info.count, -1)[:, 32 : 32 + 4 * info.dim].copy().view("<f4")
            vectors.append(own)
            mine.append(shard.info)
            del records
    everything = np.concatenate(vectors)
    flips, part, info = signs(mine[1].seed, mine[1].code_dim), images(paths)[1], mine[1]
    factors = part.numbers + 4 * part.slots
    for node in range(0, part.count, 97):
        numbers, at = neighbours(part)[node], part.record(node)
        for slot, number in enumerate(numbers):
            r = rotate(everything[number] - everything[info.graph_base + node], flips)
            f1 = np.frombuffer(part.data, "<u2", 1, at + factors + 2 * part.slots + 2 * slot).astype("<u4") << 16
            np.testing.assert_allclose(f1.view("<f4"), (r @ r) / np.abs(r).sum(), rtol=2**-7)
            codes = at + factors + 4 * part.slots
            nibbles = np.frombuffer(part.data, "u1", info.code_dim * 4, codes).reshape(-1, 16)[:, slot % 16]
            nibbles = nibbles >> 4 if slot >= 16 else nibbles & 15
            bits = (nibbles[:, np.newaxis] >> np.arange(4) & 1).ravel()
            clear = np.abs(r) > 1e-4
            np.testing.assert_array_equal(bits[clear] == 1, (r >= 0)[clear])


def test_the_build_is_the_same_each_time(paths: list[Path], words: Floats, tmp_path: Path) -> None:
    again = build(tmp_path / "again", words[:N], n_lists=30)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in paths]
    assert Collection.load(again[0].parent).graph == "global"
    assert sorted(path.suffix for path in again[0].parent.iterdir()) == 3 * [".coarse"] + 3 * [".cotra"] + [".json"]


@pytest.fixture(scope="module")
def own(words: Floats, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], GraphPlan]:
    """Two shards before they are linked."""
    directory, infos = tmp_path_factory.mktemp("own"), []
    rows = [words[:400], words[400:900]]
    mean = words[:900].mean(axis=0)
    for number, part in enumerate(rows):
        with Shard.build(part, M=4, ef_construction=30, n_threads=1, mean=mean) as shard:
            shard.save(directory / str(number))
            infos.append(shard.info)
    centroids = np.stack([part.mean(axis=0) for part in rows])
    return [directory / str(number) for number in range(2)], GraphPlan.of(infos, centroids)


def linked(own: tuple[list[Path], GraphPlan], image: Path | None = None, **knobs: object) -> bytes:
    files, plan = own
    with tempfile.TemporaryDirectory() as directory, Arena.map_file(image or files[0]) as arena:
        path = Path(directory) / "linked"
        info = link_shard(arena, 0, plan, lambda other: channel_of_file(files[other], 4096), path, **knobs)  # type: ignore[arg-type]
        with Shard.open(path) as made:  # every record is checked
            assert made.info == info
        assert [file.name for file in Path(directory).iterdir()] == ["linked"]
        return path.read_bytes()


def test_threads_make_no_difference(own: tuple[list[Path], GraphPlan]) -> None:
    assert linked(own, n_threads=1) == linked(own, n_threads=3)


def test_how_far_a_shard_looks(own: tuple[list[Path], GraphPlan]) -> None:
    few, many = (
        sum((n >= 400).sum() for n in neighbours(Image(linked(own, border=Border(k=k, ef=k))))) for k in (1, 12)
    )
    assert 0 < few <= 400 < many


def test_images_that_cannot_be_linked(own: tuple[list[Path], GraphPlan], words: Floats, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="500 nodes, and 400 in the plan"):
        linked(own, own[0][1])
    with Shard.build(words[:400], M=4, n_threads=1, n_lists=4) as shard:
        shard.save(tmp_path / "lists")
    with pytest.raises(InvalidInputError, match="without inverted lists"):
        linked(own, tmp_path / "lists")
    (tmp_path / "linked").write_bytes(linked(own))
    with pytest.raises(InvalidInputError, match="own graph"):
        linked(own, tmp_path / "linked")
    files, plan = own
    with pytest.raises(FormatError, match="shard 1: its image is not the image"):
        linked(([files[0], files[0]], plan))


def test_shards_that_cannot_be_one_graph(words: Floats) -> None:
    with Shard.build(words[:50], n_threads=1) as one, Shard.build(words[:50], n_threads=1, seed=7) as other:
        with pytest.raises(InvalidInputError, match="seed 100 and 7"):
            GraphPlan.of([one.info, other.info], words[:2])
        with pytest.raises(InvalidInputError, match="centroids"):
            GraphPlan.of([one.info, one.info], words[:3])


@pytest.mark.parametrize("knobs", [{"graph": "ring"}, {"graph": "global", "partition": "range"}])
def test_collections_that_cannot_be_one_graph(words: Floats, tmp_path: Path, knobs: dict[str, object]) -> None:
    with pytest.raises(InvalidInputError, match="graph"):
        build(tmp_path / "new", words[:100], **knobs)


@pytest.mark.parametrize(
    ("metric", "dtype", "dim"), [("l2", np.uint8, 20), ("ip", np.float32, 33), ("l2", np.float16, 70)]
)
def test_other_metrics_and_types(metric: str, dtype: type, dim: int, tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    middles = generator.normal(128, 40, (12, dim))
    rows = (middles[generator.integers(12, size=900)] + generator.normal(0, 15, (900, dim))).clip(0, 255).astype(dtype)
    queries = rows[:40].astype(np.float32) + 1
    with engine_over(build(tmp_path / "new", rows, 4, metric=metric)) as engine:
        ids, distances, _ = merge(*engine.search(queries, 5, 60, 8)[:2])
    wide = rows.astype(np.float32)
    truth = np.square(queries[:, np.newaxis] - wide).sum(axis=2) if metric == "l2" else 1 - queries @ wide.T
    np.testing.assert_allclose(distances, np.take_along_axis(truth, ids, 1), rtol=1e-4)
    assert recall(ids, np.argsort(truth, axis=1)[:, :5]) > (0.9 if metric == "ip" else 0.95)


# ---- the search ----


def test_one_walk_finds_what_all_shards_hold(paths: list[Path], words: Floats, queries: Floats) -> None:
    truth = exact(words, queries, np.arange(N))
    with engine_over(paths) as engine:
        labels, distances, stats = engine.search(queries, 10, 48, 8)
    ids, _, shards = merge(labels, distances)
    assert recall(ids, truth) > 0.95
    assert set(shards.ravel()) == set(range(N_SHARDS))
    with Shard.build(words[:N], metric="cosine", M=8, ef_construction=60, n_threads=1) as whole:
        expected = whole.search(queries, 10, 48, 8)
    assert recall(ids, truth) > recall(expected[0], truth) - 0.01
    assert stats["reads"].mean() < 1.2 * expected[2]["reads"].mean()
    assert stats["rounds"].mean() < 1.1 * expected[2]["rounds"].mean()


def test_the_answer_does_not_depend_on_how_it_is_found(paths: list[Path], queries: Floats) -> None:
    with engine_over(paths) as engine:
        labels, distances, stats = engine.search(queries, 10, 40, 4, inflight=1)
        for inflight in (7, 0):
            again = engine.search(queries, 10, 40, 4, inflight=inflight)
            np.testing.assert_array_equal(again[0], labels)
            for name in ("reads", "rounds", "expansions", "cache_hits", "read_bytes"):
                np.testing.assert_array_equal(again[2][name], stats[name])
    with engine_over([paths[at] for at in (2, 0, 1)]) as engine:
        again = engine.search(queries, 10, 40, 4)
        np.testing.assert_array_equal(again[0], labels[[2, 0, 1]])
        np.testing.assert_array_equal(again[1], distances[[2, 0, 1]])
    with engine_over(paths, cache_bytes=200_000) as engine:
        for _ in range(3):
            again = engine.search(queries, 10, 40, 4)
            np.testing.assert_array_equal(again[0], labels)
        assert again[2]["cached_records"].mean() > 1


def test_numbers_in_place_of_labels(paths: list[Path], queries: Floats) -> None:
    with ExitStack() as stack:
        labels = np.concatenate([stack.enter_context(Shard.open(path)).labels() for path in paths])
    with engine_over(paths) as engine:
        numbers = engine.search(queries, 5, 40, 4, numbers=True)[0]
        expected = engine.search(queries, 5, 40, 4)[0]
    known = numbers >= 0
    np.testing.assert_array_equal(labels[numbers[known]], expected[known])


@pytest.mark.parametrize("share", [0.5, 0.1, 0.01])
def test_filters_are_by_local_rows(paths: list[Path], words: Floats, queries: Floats, share: float) -> None:
    open_to = np.random.default_rng(2).random(N) < share
    bitmaps = []
    for path in paths:
        with Shard.open(path) as shard:
            bitmaps.append(np.packbits(open_to[shard.labels()], bitorder="little").tobytes())
    with engine_over(paths) as engine:
        ids, _, _ = merge(*engine.search(queries, 10, 64, 8, filters=bitmaps)[:2])
        some, _, _ = merge(*engine.search(queries, 10, 64, 8, filters=[bitmaps[0], None, None])[:2])
        with pytest.raises(InvalidInputError, match="shard 1"):
            engine.search(queries, 10, 64, 8, filters=[None, bitmaps[1][:-1], None])
    assert open_to[ids].all()
    assert recall(ids, exact(words, queries, np.flatnonzero(open_to))) > (0.95 if share == 0.5 else 0.999)
    assert not open_to[some].all()


def test_masked_shards_are_left_out(paths: list[Path], words: Floats, queries: Floats) -> None:
    mask = np.ones((len(queries), N_SHARDS), bool)
    mask[::2, 1] = False
    mask[3] = False
    with engine_over(paths) as engine:
        labels, _, stats = engine.search(queries, 10, 64, 8, mask=mask)
        found, _, _ = engine.search(queries, 10, 64, 8)
    assert (labels[1, ::2] == -1).all()
    assert (labels[:, 3] == -1).all()
    assert stats["reads"][3] == 0
    np.testing.assert_array_equal(labels[:, 1::4], found[:, 1::4])
    with Shard.open(paths[1]) as shard:
        others = np.setdiff1d(np.arange(N), shard.labels())
    ids = np.sort(labels[[0, 2]][:, ::2].transpose(1, 0, 2).reshape(len(queries[::2]), -1))[:, -10:]
    assert recall(ids, exact(words, queries[::2], others)) > 0.9


def test_a_missing_shard_is_walked_around(paths: list[Path], words: Floats, queries: Floats) -> None:
    with ExitStack() as stack:
        there = np.concatenate([stack.enter_context(Shard.open(path)).labels() for path in paths[1:]])
    with engine_over(paths[1:]) as engine:
        ids, _, _ = merge(*engine.search(queries, 10, 64, 8)[:2])
    assert np.isin(ids, there).all()
    assert recall(ids, exact(words, queries, np.sort(there))) > 0.9


def test_each_shard_can_be_searched_by_itself(paths: list[Path], words: Floats, queries: Floats) -> None:
    for path in paths:
        with Shard.open(path) as shard:
            ids, _, _ = shard.search(queries, 10, 64)
            assert recall(ids, exact(words, queries, np.sort(shard.labels()))) > 0.9


def test_shards_of_several_graphs_are_walked_each_by_itself(
    paths: list[Path], own: tuple[list[Path], GraphPlan]
) -> None:
    with engine_over(paths[:1]) as engine:
        alone = engine.search(np.ones((3, 100), np.float32), 5, 20, 4)
    other = images(paths)[1]
    other.set("graph_id", other.get("graph_id") ^ 1)
    with engine_over([paths[0], other.seal_header()]) as engine:
        both = engine.search(np.ones((3, 100), np.float32), 5, 20, 4)
    np.testing.assert_array_equal(both[0][0], alone[0][0])


# ---- hostile and foreign shards ----


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("graph_count", N + 2**31),
        ("graph_count", 10),
        ("graph_base", N),
        ("graph_base", 2**64 - 1),
        ("graph_id", 0),
    ],
)
def test_a_place_in_the_graph_that_cannot_be(paths: list[Path], field: str, value: int) -> None:
    image = images(paths)[1]
    image.set(field, value)
    with pytest.raises(FormatError, match="graph over all shards"), engine_over([image.seal_header()]):
        pass


@pytest.mark.parametrize("number", [N, 2**31, NONE])
def test_a_neighbour_beyond_the_graph(paths: list[Path], queries: Floats, number: int, tmp_path: Path) -> None:
    parts = images(paths)
    for node in range(parts[2].count):
        parts[2].set_word(parts[2].record(node) + parts[2].numbers, number)
    parts[2].seal(*range(parts[2].count))
    with engine_over(parts) as engine, pytest.raises(FormatError, match=f"node {number} of {N}"):
        engine.search(queries, 10, 64, 8)
    with (
        reader_of(np.frombuffer(bytes(parts[2]), np.uint8).copy()) as engine,
        pytest.raises(FormatError, match=f"node {number} of {N}"),
    ):
        engine.search(queries, 10, 64, 8)
    (tmp_path / "bad").write_bytes(bytes(parts[2]))
    with pytest.raises(FormatError, match=f"links to node {number} of {N}"):
        Shard.open(tmp_path / "bad")


def test_shards_that_do_not_fit_together(paths: list[Path]) -> None:
    with pytest.raises(FormatError, match="shards 0 and 1 hold the same nodes"), engine_over([paths[0], paths[0]]):
        pass
    for change, what in ((("seed", 7), "rotation"), (("graph_count", N + 1), "size")):
        other = images(paths)[1]
        other.set(*change)
        with pytest.raises(FormatError, match=what), engine_over([paths[0], other.seal_header()]):
            pass
    other = images(paths)[1]
    other.data[other.nav] ^= 1
    with pytest.raises(FormatError, match="mean vector"), engine_over([paths[0], other.seal()]):
        pass
