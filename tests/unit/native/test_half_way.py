"""Searches that stop half-way: own records in place, nodes that owners expand, shards that fail, are replaced or lost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from cotra_rdma import Arena, CotraError, FormatError, InvalidInputError, Shard, TransportError
from cotra_rdma._build.collection import build_collection
from cotra_rdma._collection.manifest import shard_paths
from cotra_rdma._core.query_checks import pack_filter
from cotra_rdma._native.channel import Channel
from cotra_rdma._native.graph_engine import EXPANSION_DTYPE, MOST_SLOTS, Engine, Expansions, Source
from cotra_rdma._native.merge import merge
from cotra_rdma._native.record_cache import RecordCache
from cotra_rdma._native.view import View
from cotra_rdma.datasets import open_vectors
from helpers.faults import FaultyFabric
from helpers.image import Image

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
N, N_SHARDS, LOST = 3000, 4, -14
METRICS = ("l2", "ip", "cosine")


class World:
    """The shards of one collection, opened in this process, and engines over them that reach each as they are told."""

    def __init__(self, paths: list[Path], stack: ExitStack) -> None:
        self.stack = stack
        self.arenas = [stack.enter_context(Shard.open(path)).arena for path in paths]
        channels = [stack.enter_context(Channel.shm(arena)) for arena in self.arenas]
        self.views = [stack.enter_context(View.open(channel)) for channel in channels]

    def source(self, shard: int, kind: str) -> Source:
        if kind == "pushed":
            return None
        if kind == "own":
            return self.arenas[shard]
        return self.stack.enter_context(Channel.shm(self.arenas[shard]))

    def engine(self, *kinds: str) -> Engine:
        sources = [self.source(shard, kind) for shard, kind in enumerate(kinds)]
        return self.stack.enter_context(Engine.create(self.views, sources))

    def failing(self, shard: int, after: int, drop: bool = False, **also: int) -> Channel:
        faults = {"drop_after_reads": after} if drop else {"fail_after_reads": after, "fail_status": LOST}
        inner = self.stack.enter_context(Channel.shm(self.arenas[shard]))
        return self.stack.enter_context(Channel.model(inner, FaultyFabric(**{**faults, **also})))


class Owners:
    """All owners at once: expands what is pushed, and has another way to a shard ready, or none."""

    def __init__(self, world: World, queries: Floats, others: Mapping[int, list[Source]] | None = None) -> None:
        self.world, self.queries = world, queries
        self.others = dict(others or {})
        self.errors: list[tuple[int, CotraError]] = []
        self.messages: list[int] = []
        self.silent: set[int] = set()
        self.lies: dict[int, Expansions] = {}

    def expand(self, pushes: Mapping[int, npt.NDArray[np.void]]) -> dict[int, Expansions | CotraError]:
        self.messages.append(len(pushes))
        return {shard: self.answer(shard, wanted) for shard, wanted in pushes.items()}

    def answer(self, shard: int, wanted: npt.NDArray[np.void]) -> Expansions | CotraError:
        assert (np.diff(np.flatnonzero(np.diff(wanted["query"], prepend=-1))) > 0).all()
        if shard in self.silent:
            return TransportError("gone")
        return self.lies.get(shard) or self.world.views[shard].expand(self.world.arenas[shard], self.queries, wanted)

    def replace(self, shard: int, error: CotraError) -> tuple[View, Source] | None:
        self.errors.append((shard, error))
        ways = self.others.get(shard, [])
        return (self.world.views[shard], ways.pop(0)) if ways else None


@pytest.fixture(scope="module")
def built(words: Floats, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Four shards of 3,000 words, one graph for each metric."""
    found = {}
    for metric in METRICS:
        directory = tmp_path_factory.mktemp(metric)
        np.save(directory / "base.npy", words[:N])
        with open_vectors(directory / "base.npy") as file:
            build_collection(
                file, directory / "index", N_SHARDS, metric=metric, M=6, ef_construction=40, graph="global", n_threads=1
            )
        found[metric] = shard_paths([directory / "index"])
    return found


@pytest.fixture
def world(built: dict[str, list[Path]]) -> Iterator[World]:
    with ExitStack() as stack:
        yield World(built["cosine"], stack)


READ = ("read",) * N_SHARDS


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("beam", [1, 8])
@pytest.mark.parametrize(
    "kinds", [("own", "read", "pushed", "read"), ("pushed",) * N_SHARDS, ("own",) * N_SHARDS, ("pushed", "own") * 2]
)
def test_answers_do_not_depend_on_how_records_are_come_by(
    built: dict[str, list[Path]], queries: Floats, metric: str, beam: int, kinds: tuple[str, ...]
) -> None:
    with ExitStack() as stack:
        world = World(built[metric], stack)
        labels, distances, stats = world.engine(*READ).search(queries, 10, 32, beam)
        owners = Owners(world, queries)
        found = world.engine(*kinds).search(queries, 10, 32, beam, helper=owners)
    np.testing.assert_array_equal(found[0], labels)
    np.testing.assert_array_equal(found[1], distances)
    told = found[2]
    np.testing.assert_array_equal(told["expansions"], stats["expansions"])
    np.testing.assert_array_equal(told["reads"] + told["own"] + told["pushed"], told["expansions"])
    assert not owners.errors
    for kind, name in (("own", "own"), ("pushed", "pushed"), ("read", "reads")):
        assert (told[name].sum() > 0) == (kind in kinds)
    if set(kinds) == {"own"}:
        assert (told["rounds"] == 0).all()
    if set(kinds) == {"pushed"}:
        np.testing.assert_array_equal(told["rounds"], stats["rounds"])
        assert len(owners.messages) == stats["rounds"].max()  # one message a round, for all queries


def test_filters_masks_and_numbers_are_the_same_over_pushes(world: World, queries: Floats) -> None:
    generator = np.random.default_rng(3)
    counts = [view.info.count for view in world.views]
    mask = generator.random((len(queries), N_SHARDS)) < 0.7
    half = [pack_filter(generator.random(count) < 0.5, count) for count in counts]
    few = [pack_filter(generator.random(count) < 0.01, count) for count in counts]  # read row by row
    for filters, masked, numbers in ((half, None, False), (few, None, False), (None, mask, True), (half, mask, False)):
        options = {"filters": filters, "mask": masked, "numbers": numbers}
        wanted = world.engine(*READ).search(queries, 5, 20, 4, **options)
        found = world.engine("pushed", "own", "pushed", "read").search(
            queries, 5, 20, 4, helper=Owners(world, queries), **options
        )
        np.testing.assert_array_equal(found[0], wanted[0])
        np.testing.assert_array_equal(found[1], wanted[1])


def test_more_queries_than_walks_at_once(world: World, words: Floats) -> None:
    many = words[:1500]
    wanted = world.engine(*READ).search(many, 3, 8, 4)
    owners = Owners(world, many)
    found = world.engine("pushed", "pushed", "pushed", "read").search(many, 3, 8, 4, helper=owners)
    np.testing.assert_array_equal(found[0], wanted[0])
    few = world.engine("pushed", "pushed", "pushed", "read").search(many, 3, 8, 4, inflight=3, helper=owners)
    np.testing.assert_array_equal(few[0], wanted[0])


def test_shards_that_are_graphs_of_their_own_can_be_pushed_too(shards: list[Path], queries: Floats) -> None:
    with ExitStack() as stack:
        world = World(shards, stack)
        wanted = world.engine("read", "read").search(queries, 10, 32, 8)
        found = world.engine("own", "pushed").search(queries, 10, 32, 8, helper=Owners(world, queries))
    np.testing.assert_array_equal(found[0], wanted[0])
    np.testing.assert_array_equal(found[2]["expansions"], wanted[2]["expansions"])


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("other", ["read", "own", "pushed"])
def test_another_owner_takes_over_in_the_middle(world: World, queries: Floats, drop: bool, other: str) -> None:
    wanted = world.engine(*READ).search(queries, 10, 32, 8)
    sources = [world.source(shard, "read") for shard in range(N_SHARDS)]
    sources[1] = world.failing(1, 300, drop)
    engine = world.stack.enter_context(Engine.create(world.views, sources))
    owners = Owners(world, queries, {1: [world.source(1, other)]})
    found = engine.search(queries, 10, 32, 8, timeout_s=0.05, helper=owners)
    np.testing.assert_array_equal(found[0], wanted[0])
    np.testing.assert_array_equal(found[1], wanted[1])
    np.testing.assert_array_equal(found[2]["expansions"], wanted[2]["expansions"])
    assert [shard for shard, _ in owners.errors] == [1]
    with pytest.raises(CotraError, match="earlier search"):  # its old channel may hold READs still
        engine.search(queries, 10, 32, 8)


def test_one_owner_after_the_other(world: World, queries: Floats) -> None:
    wanted = world.engine(*READ).search(queries, 10, 32, 8)
    sources = [world.source(shard, "read") for shard in range(N_SHARDS)]
    sources[2] = world.failing(2, 100)
    ways = [world.failing(2, 1), world.failing(2, 200, True), None, world.source(2, "read")]
    owners = Owners(world, queries, {2: ways})
    owners.silent = {2}  # the third
    with Engine.create(world.views, sources) as engine:
        found = engine.search(queries, 10, 32, 8, timeout_s=0.05, helper=owners)
    np.testing.assert_array_equal(found[0], wanted[0])
    assert [shard for shard, _ in owners.errors] == [2] * 4


@pytest.mark.parametrize("kind", ["failing", "dropping", "pushed"])
def test_a_shard_without_an_owner_is_walked_around(world: World, queries: Floats, kind: str) -> None:
    wanted = world.engine(*READ).search(queries, 10, 64, 8)
    sources = [world.source(shard, "read") for shard in range(N_SHARDS)]
    sources[3] = None if kind == "pushed" else world.failing(3, 200, kind == "dropping")
    owners = Owners(world, queries)
    owners.silent = {3}
    with Engine.create(world.views, sources) as engine:
        found = engine.search(queries, 10, 64, 8, timeout_s=0.05, helper=owners)
    assert [shard for shard, _ in owners.errors] == [3]
    held = set(ids_of(world, 3))
    all_ids, _, _ = merge(wanted[0], wanted[1])
    ids, _, _ = merge(found[0], found[1])
    left = [[i for i in row if i not in held] for row in all_ids.tolist()]
    kept = sum(len(set(row) & set(now)) for row, now in zip(left, ids.tolist(), strict=True))
    assert kept > 0.95 * sum(map(len, left))  # what the others hold is found as before
    assert (ids >= 0).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ["failing", "pushed"])
@pytest.mark.parametrize("n_lost", [2, 3])
def test_a_walk_starts_anew_where_it_lost_the_shards_that_it_started_in(
    built: dict[str, list[Path]], queries: Floats, metric: str, kind: str, n_lost: int
) -> None:
    with ExitStack() as stack:
        world = World(built[metric], stack)
        for lost in combinations(range(N_SHARDS), n_lost):
            here = [shard for shard in range(N_SHARDS) if shard not in lost]
            with Engine.create([world.views[s] for s in here], [world.arenas[s] for s in here]) as engine:
                wanted, _, _ = merge(*engine.search(queries, 10, 64, 8)[:2])
            sources: list[Source] = [*world.arenas]
            for shard in lost:
                sources[shard] = None if kind == "pushed" else world.failing(shard, 3)
            told = {number for shard in lost for number in ids_of(world, shard)}  # what they tell before is no error
            owners = Owners(world, queries)
            owners.silent = set(lost)
            with Engine.create(world.views, sources) as engine:
                found = engine.search(queries, 10, 64, 8, helper=owners)
            ids, _, _ = merge(*found[:2])
            assert {shard for shard, _ in owners.errors} == set(lost)
            assert (ids >= 0).all()
            kept = sum(
                len((set(row) | told) & set(now)) for row, now in zip(wanted.tolist(), ids.tolist(), strict=True)
            )
            assert kept >= 0.95 * ids.size, (lost, kept / ids.size)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Five clusters in a row, far apart, a shard each: links lead to the next ones only."""
    directory = tmp_path_factory.mktemp("chain")
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(5, 100, 16)).astype(np.float32)
    rows[:, :, 0] += np.float32(40) * np.arange(5, dtype=np.float32)[:, np.newaxis]
    np.save(directory / "base.npy", rows.reshape(500, 16))
    with open_vectors(directory / "base.npy") as file:
        build_collection(file, directory / "index", 5, M=6, ef_construction=40, graph="global", n_threads=1)
    return shard_paths([directory / "index"])


def test_a_lost_bridge_hides_no_shard(chain: list[Path]) -> None:
    """Whether it is lost in the search, or was missing before; and a mask or filter may be the gap as well."""
    with ExitStack() as stack:
        world = World(chain, stack)
        everything: list[Source] = [*world.arenas]
        query, step = np.zeros((1, 16), np.float32), np.eye(1, 16, dtype=np.float32) * 40
        with Engine.create(world.views, everything) as engine:
            far = [engine.search(query + i * step, 1, 8, 4)[0][:, 0, 0].argmax() for i in range(5)]
        order = [int(shard) for shard in far]
        assert sorted(order) == list(range(5))
        bridge, end = order[2], order[3]
        only = [
            pack_filter(np.full(view.info.count, shard == end), view.info.count)
            for shard, view in enumerate(world.views)
        ]
        here = [shard for shard in range(5) if shard != bridge]
        with Engine.create([world.views[s] for s in here], [world.arenas[s] for s in here]) as engine:
            labels = engine.search(query, 10, 32, 8, filters=[only[s] for s in here])[0]
        assert (labels[here.index(end)] >= 0).all()
        owners = Owners(world, query)
        owners.silent = {bridge}
        sources = [None if shard == bridge else world.arenas[shard] for shard in range(5)]
        for filters, k in ((only, 10), (None, 400)):
            with Engine.create(world.views, sources) as engine:
                labels, distances, _ = engine.search(query, k, 400, 8, filters=filters, helper=owners)
            assert (merge(labels, distances)[0] >= 0).sum() >= 0.98 * k
        mask = np.ones((1, 5), bool)
        mask[0, [order[1], order[3]]] = False
        with Engine.create(world.views, everything) as engine:
            labels, distances, _ = engine.search(query, 300, 300, 8, mask=mask)
        assert (merge(labels, distances)[0] >= 0).sum() >= 294


def ids_of(world: World, shard: int) -> list[int]:
    with world.arenas[shard].view() as view:
        info = world.views[shard].info
        records = np.frombuffer(view, np.uint8, info.count * info.record_bytes, info.records_offset)
        return records.reshape(info.count, info.record_bytes)[:, 8:16].copy().view(np.int64)[:, 0].tolist()


def test_all_shards_may_be_lost(world: World, queries: Floats) -> None:
    with Engine.create(world.views, [None] * N_SHARDS) as engine:
        owners = Owners(world, queries)
        owners.silent = set(range(N_SHARDS))
        labels, distances, _ = engine.search(queries, 10, 32, 8, helper=owners)
    assert (labels == -1).all()
    assert np.isinf(distances).all()
    assert sorted(shard for shard, _ in owners.errors) == list(range(N_SHARDS))


def test_a_broken_record_is_a_failure_of_its_shard(world: World, queries: Floats) -> None:
    wanted = world.engine(*READ).search(queries, 10, 32, 8)
    sources = [world.source(shard, "read") for shard in range(N_SHARDS)]
    sources[0] = world.stack.enter_context(
        Channel.model(world.source(0, "read"), FaultyFabric(corrupt_every=200))  # type: ignore[arg-type]
    )
    owners = Owners(world, queries, {0: [world.source(0, "read")]})
    with Engine.create(world.views, sources) as engine:
        found = engine.search(queries, 10, 32, 8, helper=owners)
    ((shard, error),) = owners.errors
    assert shard == 0
    assert isinstance(error, FormatError)
    np.testing.assert_array_equal(found[0], wanted[0])


def test_what_a_lying_owner_told_of_a_node_is_not_in_the_answer_beside_the_truth(world: World, queries: Floats) -> None:
    with world.arenas[1].view() as memory:
        image = Image(bytes(memory[: world.views[1].info.image_bytes]))
    for node in range(image.count):  # all that was there stays, but one link
        image.set_word(image.record(node) + image.numbers, N)
        image.seal_record(node)
    liar = world.stack.enter_context(Arena.create(len(bytes(image))))
    with liar.view() as memory:
        memory[: len(bytes(image))] = bytes(image)
    wanted = world.engine(*READ).search(queries, 10, 32, 8)
    sources = [world.source(shard, "read") for shard in range(N_SHARDS)]
    sources[1] = liar
    owners = Owners(world, queries, {1: [world.source(1, "read")]})
    with Engine.create(world.views, sources) as engine:
        found = engine.search(queries, 10, 32, 8, helper=owners)
    assert [shard for shard, _ in owners.errors] == [1]
    assert f"links to node {N} of {N}" in str(owners.errors[0][1])
    np.testing.assert_array_equal(found[0], wanted[0])
    np.testing.assert_array_equal(found[2]["expansions"], wanted[2]["expansions"])


def test_a_cache_goes_on_with_the_next_owner(world: World, queries: Floats) -> None:
    wanted = world.engine(*READ).search(queries, 10, 32, 8)
    sources = [world.source(shard, "read") for shard in range(N_SHARDS)]
    sources[1] = world.failing(1, 300)
    cache = world.stack.enter_context(RecordCache.create(world.views[1], 1 << 20))
    owners = Owners(world, queries, {1: [world.source(1, "read")]})
    with Engine.create(world.views, sources, [None, cache, None, None]) as engine:
        found = engine.search(queries, 10, 32, 8, helper=owners)
    np.testing.assert_array_equal(found[0], wanted[0])
    assert found[2]["cached_records"].sum() > 0


def test_what_owners_tell_is_checked(world: World, queries: Floats) -> None:
    def lie(count: int, n_neighbours: int, number: int = 0, weight: float = 1) -> Expansions:
        found = np.zeros(1, EXPANSION_DTYPE)
        found["count"] = count
        estimates, weights = np.full(n_neighbours, -1, np.float32), np.full(n_neighbours, weight, np.float32)
        return Expansions(found, np.full(n_neighbours, number, np.uint32), estimates, weights)

    for told, what in (
        (lie(5, 4), "1 expansions of 4 neighbours"),
        (lie(1000, 1000), "1000 neighbours"),
        (Expansions.none(), "0 expansions"),
        (lie(2, 2, weight=np.nan), "the weight nan"),
        (lie(2, 2, weight=-1), "the weight -1"),
        (lie(2, 2, weight=1e31), "the weight 1e+31"),
        (lie(2, 2, N), f"links to node {N}"),
    ):
        owners = Owners(world, queries)
        owners.lies = {1: told}
        sources = [world.arenas[0], None, world.arenas[2], world.arenas[3]]
        for query in queries:  # until one asks the liar for a single node
            owners.queries = query[np.newaxis]
            with Engine.create(world.views, sources) as engine:
                found = engine.search(owners.queries, 5, 16, 1, helper=owners)[0]
            if owners.errors:
                break
        assert (found[1] == -1).all()
        assert what in str(owners.errors[0][1])
        assert isinstance(owners.errors[0][1], FormatError)


def test_an_owner_checks_what_it_is_asked(world: World, queries: Floats) -> None:
    view, arena = world.views[0], world.arenas[0]
    pushes = np.zeros(2, [("query", "<u4"), ("row", "<u4"), ("limit", "<f4"), ("reserved", "<u4")])
    pushes["limit"] = np.inf
    pushes["row"][1] = 7
    told = view.expand(arena, queries[:1], pushes)
    assert told.found["count"].sum() == len(told.numbers) == len(told.estimates) > 0
    assert len(view.expand(arena, queries[:1], pushes[:0]).found) == 0
    pushes["limit"] = np.nan
    assert len(view.expand(arena, queries[:1], pushes).numbers) == 0
    for field, value in (("query", 1), ("row", view.info.count)):
        bad = pushes.copy()
        bad[field][1] = value
        with pytest.raises(InvalidInputError, match="expand: row"):
            view.expand(arena, queries[:1], bad)
    with Arena.create(4096) as small, pytest.raises(InvalidInputError, match="in an arena of 4096"):
        view.expand(small, queries[:1], pushes)


def test_no_helper_no_pushes(world: World, queries: Floats) -> None:
    with pytest.raises(InvalidInputError, match="takes a helper"):
        world.engine("pushed", "read", "read", "read").search(queries, 10, 32, 8)


def test_what_cannot_replace_a_shard(world: World, queries: Floats) -> None:
    sources = [world.source(shard, "read") for shard in range(N_SHARDS)]
    sources[1] = world.failing(1, 100)
    narrow = world.stack.enter_context(Channel.shm(world.arenas[1], slots=4))
    owners = Owners(world, queries, {1: [world.arenas[0], world.source(1, "read")]})
    wanted = world.engine(*READ).search(queries, 10, 32, 8)
    with Engine.create(world.views, sources) as engine:
        found = engine.search(queries, 10, 32, 8, helper=owners)
    assert "holds another image" in str(owners.errors[1][1])
    np.testing.assert_array_equal(found[0], wanted[0])
    sources[1] = world.failing(1, 100)
    owners = Owners(world, queries, {1: [narrow, world.source(1, "read")]})
    with (
        Engine.create(world.views, sources) as engine,
        pytest.raises(InvalidInputError, match="4 slots, the search needs"),
    ):
        engine.search(queries, 10, 32, 8, helper=owners)
    assert len(owners.errors) == 1  # whoever offered it is to blame, and no owner


@pytest.mark.parametrize(("beam", "few"), [(16, False), (200, False), (8, True)])
def test_a_channel_of_as_many_slots_as_the_search_needs_replaces_a_pushed_shard(
    world: World, words: Floats, beam: int, few: bool
) -> None:
    """However many queries wait, and however wide their rounds are: under a filter of few rows it is the rows' own width."""
    many = np.tile(words[:550], (2, 1))
    filters = None
    if few:
        filters = [pack_filter(np.arange(view.info.count) % 211 == 0, view.info.count) for view in world.views]
    wanted = world.engine(*READ).search(many, 3, 24, beam, filters=filters)

    class Offering(Owners):
        slots = 0

        def replace(self, shard: int, error: CotraError) -> tuple[View, Source] | None:
            self.errors.append((shard, error))
            self.slots = engine.slots
            return self.world.views[shard], stack.enter_context(Channel.shm(self.world.arenas[shard], slots=self.slots))

    owners = Offering(world, many)
    owners.silent = {1}
    with ExitStack() as stack, Engine.create(world.views, [None] * N_SHARDS) as engine:
        found = engine.search(many, 3, 24, beam, filters=filters, helper=owners)
    assert [shard for shard, _ in owners.errors] == [1]
    assert 0 < owners.slots <= MOST_SLOTS
    np.testing.assert_array_equal(found[0], wanted[0])


def test_own_memory_must_hold_the_image(world: World) -> None:
    with pytest.raises(FormatError, match="the memory for shard 0 holds another image"):
        Engine.create(world.views, [world.arenas[1], None, None, None])


def test_a_view_of_bytes_is_the_view_of_a_channel(world: World, queries: Floats) -> None:
    with world.arenas[0].view() as memory:
        info = world.views[0].info
        data = bytes(memory[:4096]) + bytes(memory[info.nav_offset : info.nav_offset + info.nav_bytes])
    with View.load(data) as view:
        assert view.info == info
        wanted = world.engine(*READ).search(queries, 10, 32, 8)
        with Engine.create([view, *world.views[1:]], world.arenas) as engine:
            np.testing.assert_array_equal(engine.search(queries, 10, 32, 8)[0], wanted[0])
    for bad, what in ((data[:-64], "upper layers"), (data[:100], "100 bytes"), (data + b"\0" * 64, "upper layers")):
        with pytest.raises(FormatError, match=what):
            View.load(bad)
    broken = bytearray(data)
    broken[5000] ^= 1
    with pytest.raises(FormatError):
        View.load(broken)
