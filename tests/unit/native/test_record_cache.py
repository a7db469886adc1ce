"""The reader's cache of records: the same answers for fewer READs, within its budget, and never from bytes that are not valid."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import pytest

from cotra_rdma import Arena, ChecksumError, FabricModel, InvalidInputError, Shard
from cotra_rdma._native.channel import Channel
from cotra_rdma._native.graph_engine import Engine
from cotra_rdma._native.record_cache import RecordCache
from cotra_rdma._native.view import View
from cotra_rdma.errors import StaleShardError
from helpers.faults import FaultyFabric
from helpers.image import HEADER_BYTES, RECORD_HEAD_BYTES, image_bytes

Floats = npt.NDArray[np.float32]
FAR = FabricModel(round_trip_s=2e-6)


@pytest.fixture(scope="module")
def shard(words: Floats) -> Iterator[Shard]:
    """3,000 words."""
    with Shard.build(words[:3000], metric="cosine", ef_construction=60, n_threads=1) as built:
        yield built


@contextmanager
def reader(
    arena: Arena, budget: int, n_engines: int = 1, fabric: FabricModel = FAR
) -> Iterator[tuple[RecordCache, list[Engine]]]:
    """Engines that share a cache, each over a modelled fabric."""
    with Channel.shm(arena) as first, View.open(first) as view, RecordCache.create(view, budget) as cache:
        engines = []
        for _ in range(n_engines):
            channel = Channel.model(Channel.shm(arena), fabric)
            engines.append(Engine.create([view], [channel], [cache]))
        yield cache, engines
        for engine in engines:
            engine.close()


def same(
    found: tuple[npt.NDArray, npt.NDArray, npt.NDArray], expected: tuple[npt.NDArray, npt.NDArray, npt.NDArray]
) -> None:
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1].view(np.uint32), expected[1].view(np.uint32))
    for name in ("expansions", "cache_hits"):
        np.testing.assert_array_equal(found[2][name], expected[2][name])
    assert (found[2]["reads"] + found[2]["cached_records"] == expected[2]["reads"]).all()
    assert (found[2]["rounds"] <= expected[2]["rounds"]).all()


def plain(arena: Arena, queries: Floats, **knobs: object) -> tuple[npt.NDArray, npt.NDArray, npt.NDArray]:
    with Channel.shm(arena) as channel, View.open(channel) as view, Engine.create([view], [channel]) as engine:
        return engine.search(queries, 10, 40, 4, **knobs)  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [0.003, 0.02, 0.3, 1.1])
@pytest.mark.parametrize("inflight", [1, 7, 0])
def test_answers_are_the_same(shard: Shard, queries: Floats, share: float, inflight: int) -> None:
    twice = np.concatenate([queries, queries[::-1]])
    expected = plain(shard.arena, twice)
    assert (expected[2]["cached_records"] == 0).all()
    with reader(shard.arena, int(share * shard.info.image_bytes)) as (cache, [engine]):
        for _ in range(2):
            found = engine.search(twice, 10, 40, 4, inflight=inflight)
            same(found, expected)
        assert found[2]["cached_records"].sum() > 0
        assert 0 < cache.info.records <= cache.info.places
        assert cache.info.nbytes <= share * shard.info.image_bytes


def test_a_repeated_query_reads_nothing(shard: Shard, queries: Floats) -> None:
    with reader(shard.arena, 2 * shard.info.image_bytes) as (cache, [engine]):
        assert cache.info.nbytes < 1.1 * shard.info.image_bytes  # no more than there are records
        engine.search(queries, 10, 40, 4)
        again = engine.search(queries, 10, 40, 4)
        same(again, plain(shard.arena, queries))
        for name in ("reads", "rounds", "read_bytes"):
            assert (again[2][name] == 0).all()
        assert (again[2]["cached_records"] == again[2]["expansions"]).all()
        cache.clear()
        assert cache.info.records == 0
        assert (engine.search(queries[:1], 10, 40, 4)[2]["cached_records"] == 0).all()


def test_budgets(shard: Shard, queries: Floats) -> None:
    with Channel.shm(shard.arena) as channel, View.open(channel) as view:
        with pytest.raises(InvalidInputError, match=r"a cache of 1200 bytes holds no record: it takes (\d+)") as error:
            RecordCache.create(view, 1200)
        least = int(str(error.value).split("takes ")[1].split()[0])
        with pytest.raises(InvalidInputError):
            RecordCache.create(view, least - 1)
        with pytest.raises(InvalidInputError, match="-1 bytes"):
            RecordCache.create(view, -1)
        for budget in (least, 3 * least, 20_000, 100_000, 1_234_567):
            with RecordCache.create(view, budget) as cache, Engine.create([view], [channel], [cache]) as engine:
                engine.search(queries, 10, 40, 4)
                info = cache.info
                assert info.nbytes <= budget
                assert 0 < info.records <= info.places
                assert info.places * shard.info.record_bytes > 0.9 * budget - 22_000  # whole buckets of 16


def test_hot_records_stay_under_a_scan_of_cold_ones(shard: Shard, queries: Floats) -> None:
    hot, cold = queries[:3], queries[3:80]
    with reader(shard.arena, shard.info.image_bytes // 10) as (_, [engine]):
        for _ in range(10):
            engine.search(hot, 10, 40, 4)
        before = int(engine.search(hot, 10, 40, 4)[2]["reads"].sum())
        assert engine.search(cold, 10, 40, 4)[2]["reads"].sum() > shard.info.count
        every_other = np.packbits(np.arange(shard.info.count) % 30 == 0, bitorder="little").tobytes()
        engine.search(cold[:5], 10, 40, 4, filters=[every_other])
        after = engine.search(hot, 10, 40, 4)[2]
        assert after["reads"].sum() <= before + 0.1 * after["expansions"].sum()


@pytest.mark.parametrize("step", [2, 30])
def test_filters(shard: Shard, queries: Floats, step: int) -> None:
    """A walk under a filter, and rows that are read directly."""
    bitmap = np.packbits(np.arange(shard.info.count) % step == 0, bitorder="little").tobytes()
    expected = plain(shard.arena, queries, filters=[bitmap])
    with reader(shard.arena, shard.info.image_bytes // 4) as (_, [engine]):
        for _ in range(3):
            found = engine.search(queries, 10, 40, 4, filters=[bitmap])
            same(found, expected)
        assert found[2]["cached_records"].sum() > 0


def test_threads_share_a_cache(shard: Shard, queries: Floats) -> None:
    expected = plain(shard.arena, queries)
    with (
        reader(shard.arena, shard.info.image_bytes // 20, n_engines=4) as (cache, engines),
        ThreadPoolExecutor(4) as pool,
    ):
        for _ in range(5):
            for found in pool.map(lambda engine: engine.search(queries, 10, 40, 4), engines):
                same(found, expected)
        assert found[2]["cached_records"].sum() > 0
        assert cache.info.records <= cache.info.places


def test_corrupt_records_are_never_kept(shard: Shard, queries: Floats) -> None:
    with reader(shard.arena, shard.info.image_bytes, fabric=FaultyFabric(corrupt_every=1)) as (cache, [engine]):
        with pytest.raises(ChecksumError):
            engine.search(queries, 10, 40, 4)
        assert cache.info.records == 0


def test_what_is_kept_is_private(shard: Shard, queries: Floats) -> None:
    """The owner's memory changes under the reader's feet: what was kept stays as it was, what was not is found corrupt."""
    memory = np.frombuffer(bytearray(image_bytes(shard)), np.uint8)
    expected = plain(shard.arena, queries[:50])
    with Arena.wrap(memory) as arena, reader(arena, 2 * len(memory)) as (_, [engine]):
        same(engine.search(queries[:50], 10, 40, 4), expected)
        for node in range(shard.info.count):
            memory[HEADER_BYTES + node * shard.info.record_bytes + RECORD_HEAD_BYTES] ^= 1
        same(engine.search(queries[:50], 10, 40, 4), expected)
        with pytest.raises(ChecksumError):
            engine.search(queries[50:], 10, 40, 4)


def test_a_shard_that_was_rebuilt(words: Floats, queries: Floats) -> None:
    """What is cached whole is answered as before; the first READ tells, and from then on the cache answers nothing."""
    images = []
    for generation in (1, 2):
        with Shard.build(words[:1000], generation=generation, n_threads=1) as built:
            images.append(np.frombuffer(image_bytes(built), np.uint8))
    memory = images[0].copy()
    with Arena.wrap(memory) as arena, reader(arena, 2 * len(memory), n_engines=3) as (_, engines):
        engines[0].search(queries[:5], 10, 40, 4)
        memory[4096:] = images[1][4096:]
        assert (engines[0].search(queries[:5], 10, 40, 4)[2]["reads"] == 0).all()
        for engine, asked in ((engines[1], queries[5:]), (engines[2], queries[:5])):
            with pytest.raises(StaleShardError, match="connect again"):
                engine.search(asked, 10, 40, 4)


def test_several_shards(words: Floats, queries: Floats) -> None:
    """One with a cache and one without; a cache of another image is refused."""
    with (
        Shard.build(words[:800], n_threads=1) as one,
        Shard.build(words[800:2000], M=8, n_threads=1) as other,
        Channel.shm(one.arena) as first,
        Channel.shm(other.arena) as second,
        View.open(first) as view,
        View.open(second) as their_view,
        RecordCache.create(view, one.info.image_bytes // 10) as cache,
        RecordCache.create(their_view, other.info.image_bytes) as theirs,
    ):
        views, channels = [view, their_view], [first, second]
        with pytest.raises(InvalidInputError, match="shard 0 is of another image"):
            Engine.create(views, channels, [theirs, cache])
        with pytest.raises(InvalidInputError, match="1 caches for 2 shards"):
            Engine.create(views, channels, [cache])
        with Engine.create(views, channels) as engine:
            expected = engine.search(queries, 10, 40, 4)
        for caches in ([cache, None], [None, theirs], [cache, theirs]):
            with Engine.create(views, channels, caches) as engine:
                for _ in range(2):
                    found = engine.search(queries, 10, 40, 4)
                    same(found, expected)
                assert found[2]["cached_records"].sum() > 0
