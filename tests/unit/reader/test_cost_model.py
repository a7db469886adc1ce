"""The cost model: what it prefers on which link, what it learns, and what it must never take; and the plans made by it."""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotra_rdma._core.stop import Stop
from cotra_rdma._reader.batch import Batch
from cotra_rdma._reader.cost_model import (
    EXPANSION_S,
    Experience,
    Link,
    Needs,
    Prediction,
    cheapest,
    forbidden,
    guess_lists,
    guess_walk,
    over_rpc,
    predict_asked,
    predict_pushed,
    predict_read,
    pushed,
)
from cotra_rdma._reader.planner import Plan, Planner
from cotra_rdma.errors import InvalidInputError

NEAR = Link(rtt_s=2e-6, reads_per_s=5e6, bytes_per_s=12e9, rpc_s=50e-6)
FAR = Link(rtt_s=10e-3, reads_per_s=1600, bytes_per_s=100e6, rpc_s=10e-3)
WALK = guess_walk(k=10, ef=64, beam=4, record_bytes=1024)
LISTS = guess_lists(k=10, n_probe=32, n_lists=1000, list_bytes=40e6, entries=1e6, vector_bytes=512)
DIM = 128


def read(
    link: Link, needs: Needs = WALK, *, n_shards: int = 1, n_queries: int = 1, n_threads: int = 1, share: float = 1.0
) -> Prediction:
    return predict_read("cotra", needs, [link] * n_shards, [share] * n_shards, n_queries, n_threads)


def asked(link: Link, *, n_shards: int = 1, n_queries: int = 1, share: float = 1.0) -> Prediction:
    needs = over_rpc(WALK, DIM, 10)
    return predict_asked("scatter-gather", needs, [link] * n_shards, [share] * n_shards, n_queries)


# ---- which way is quicker ----


def test_a_near_link_is_read_and_a_far_one_asked() -> None:
    assert cheapest([read(NEAR), asked(NEAR)]).algorithm == "cotra"
    assert cheapest([read(FAR), asked(FAR)]).algorithm == "scatter-gather"


def test_what_is_forbidden_is_not_taken_however_quick() -> None:
    quick = forbidden(asked(FAR), "the owners' CPU is not to be used")
    assert quick.seconds < read(FAR).seconds
    assert cheapest([quick, read(FAR)]) == read(FAR)
    assert (quick.allowed, quick.why) == (False, "the owners' CPU is not to be used")
    assert replace(quick, allowed=True, why="") == asked(FAR)
    with pytest.raises(ValueError, match="empty"):
        cheapest([quick])


def test_among_equals_the_first() -> None:
    one = Prediction("a", 1.0, 0, 0, 0, 0, 1)
    assert cheapest([one, replace(one, algorithm="b")]) is one


def test_two_rounds_win_on_a_slow_link_and_fewer_bytes_on_a_thin_one() -> None:
    walk, lists = replace(read(FAR), algorithm="cotra"), predict_read("spire", LISTS, [FAR], [1.0], 1, 1)
    assert LISTS.bytes > WALK.bytes
    assert lists.rounds == 2.0 < walk.rounds
    assert lists.seconds < walk.seconds / 2
    thin = replace(NEAR, bytes_per_s=1e6)
    assert read(thin).seconds < predict_read("spire", LISTS, [thin], [1.0], 1, 1).seconds


def test_many_queries_hide_the_round_trips() -> None:
    """Rounds follow each other within a query, not from one query to the next."""
    one, many = read(FAR), read(FAR, n_queries=1000)
    assert one.seconds > WALK.rounds * FAR.rtt_s
    assert many.seconds < 1000 * one.seconds
    assert many.seconds - WALK.rounds * FAR.rtt_s == pytest.approx(1000 * (one.seconds - WALK.rounds * FAR.rtt_s))


def test_threads_share_the_cpu_and_not_the_link() -> None:
    fast = Link(rtt_s=1e-6, reads_per_s=1e9, bytes_per_s=1e12, rpc_s=1e-3)
    seconds = [read(fast, n_queries=64, n_threads=n).seconds - WALK.rounds * fast.rtt_s for n in (1, 2, 4, 64, 200)]
    np.testing.assert_allclose(seconds[0] / np.array(seconds), [1, 2, 4, 64, 64])
    assert read(FAR, n_queries=64, n_threads=8) == read(FAR, n_queries=64)


def test_owners_work_side_by_side_and_this_side_alone() -> None:
    """So with many shards and one thread asking is quicker, where it is allowed; with as many threads it is not."""
    link = Link(rtt_s=1e-6, reads_per_s=1e9, bytes_per_s=1e12, rpc_s=50e-6)
    assert asked(link, n_shards=8, n_queries=1000).seconds == asked(link, n_queries=1000).seconds
    assert asked(link, n_shards=8, n_queries=1000).seconds < read(link, n_shards=8, n_queries=1000).seconds
    assert read(link, n_shards=8, n_queries=1000, n_threads=8).seconds < asked(link, n_queries=1000).seconds


def test_the_slowest_shard_decides() -> None:
    links = [NEAR, FAR, NEAR]
    mixed = predict_read("cotra", WALK, links, [1.0] * 3, 1, 1)
    assert mixed.seconds >= WALK.rounds * FAR.rtt_s
    assert predict_asked("scatter-gather", over_rpc(WALK, DIM, 10), links, [1.0] * 3, 1).seconds >= FAR.rpc_s


def test_shards_that_are_left_out_cost_nothing() -> None:
    whole, half = read(NEAR, n_shards=4, n_queries=100), read(NEAR, n_shards=4, n_queries=100, share=0.5)
    assert (whole.shards, half.shards) == (4.0, 2.0)
    assert (half.reads, half.bytes) == (whole.reads / 2, whole.bytes / 2)
    assert half.seconds < whole.seconds
    assert asked(NEAR, share=0.5, n_queries=100).owner_cpu_s == asked(NEAR, n_queries=100).owner_cpu_s / 2


def test_reading_uses_no_cpu_of_owners_and_asking_no_reads() -> None:
    assert read(NEAR).owner_cpu_s == 0.0
    there = asked(NEAR, n_shards=3)
    assert (there.reads, there.rounds) == (0.0, 1.0)
    assert there.owner_cpu_s == 3 * WALK.cpu_s
    assert there.bytes < read(NEAR, n_shards=3).bytes


def test_memory_that_cannot_be_read_takes_forever() -> None:
    closed = Link(math.inf, 1.0, 1.0, 1e-3)
    assert read(closed).seconds == math.inf
    assert cheapest([read(closed), asked(closed)]).algorithm == "scatter-gather"


# ---- what a search needs, guessed ----


@given(st.integers(1, 100), st.integers(1, 1000), st.integers(1, 32))
def test_a_walk_needs_more_with_ef_and_fewer_rounds_with_beam(k: int, ef: int, beam: int) -> None:
    here, wider, more = guess_walk(k, ef, beam, 512), guess_walk(k, ef, beam + 1, 512), guess_walk(k, 2 * ef, beam, 512)
    assert here.reads >= k
    assert here.bytes == here.reads * 512
    assert wider.rounds <= here.rounds
    assert wider.reads == here.reads
    assert more.reads >= here.reads
    assert more.cpu_s >= here.cpu_s


@given(st.integers(1, 2000), st.integers(1, 1000))
def test_no_more_lists_are_read_than_there_are(n_probe: int, n_lists: int) -> None:
    needs = guess_lists(10, n_probe, n_lists, 1e6, 1e4, 512)
    every = guess_lists(10, n_lists, n_lists, 1e6, 1e4, 512)
    assert needs.rounds == 2.0
    assert needs.reads <= every.reads
    assert needs.bytes <= every.bytes
    assert (needs == every) == (n_probe >= n_lists)


# ---- monotone ----

POSITIVE = {"allow_nan": False, "allow_infinity": False}
NEEDS = st.builds(
    Needs,
    reads=st.floats(0, 1e4, **POSITIVE),
    rounds=st.floats(1, 200, **POSITIVE),
    bytes=st.floats(0, 1e8, **POSITIVE),
    cpu_s=st.floats(0, 1e-2, **POSITIVE),
)
LINKS = st.builds(
    Link,
    rtt_s=st.floats(1e-7, 1, **POSITIVE),
    reads_per_s=st.floats(1, 1e8, **POSITIVE),
    bytes_per_s=st.floats(1e3, 1e11, **POSITIVE),
    rpc_s=st.floats(1e-6, 1, **POSITIVE),
)
ROUNDING = 1 + 1e-12


@settings(deadline=None)
@given(
    st.lists(st.tuples(LINKS, st.floats(0, 1)), min_size=1, max_size=4),
    NEEDS,
    st.integers(1, 5000),
    st.integers(1, 64),
    st.floats(1, 100),
)
def test_nothing_gets_cheaper_by_needing_more_of_worse_links(
    shards: list[tuple[Link, float]], needs: Needs, n_queries: int, n_threads: int, factor: float
) -> None:
    links, shares = [link for link, _ in shards], [share for _, share in shards]

    def seconds(links: list[Link] = links, needs: Needs = needs, n: int = n_queries, threads: int = n_threads) -> float:
        return predict_read("cotra", needs, links, shares, n, threads).seconds

    def asked_s(links: list[Link] = links, needs: Needs = needs, n: int = n_queries) -> float:
        return predict_asked("scatter-gather", needs, links, shares, n).seconds

    here, there = seconds(), asked_s()
    assert 0 <= here < math.inf
    for name in ("reads", "rounds", "bytes", "cpu_s"):
        assert seconds(needs=replace(needs, **{name: factor * getattr(needs, name)})) * ROUNDING >= here
    assert asked_s(needs=replace(needs, cpu_s=factor * needs.cpu_s)) * ROUNDING >= there
    assert seconds([replace(link, rtt_s=factor * link.rtt_s) for link in links]) * ROUNDING >= here
    assert seconds([replace(link, bytes_per_s=link.bytes_per_s / factor) for link in links]) * ROUNDING >= here
    assert seconds([replace(link, reads_per_s=link.reads_per_s / factor) for link in links]) * ROUNDING >= here
    assert asked_s([replace(link, rpc_s=factor * link.rpc_s) for link in links]) * ROUNDING >= there
    assert seconds(n=2 * n_queries, threads=n_threads) * ROUNDING >= here
    assert asked_s(n=2 * n_queries) * ROUNDING >= there
    assert seconds(threads=2 * n_threads) <= here * ROUNDING


# ---- experience ----


def test_experience_replaces_the_guess_and_converges() -> None:
    experience = Experience()
    assert experience.of("walk", 10, 64, 4) is None
    first, then = Needs(100, 20, 1e5, 1e-4), Needs(50, 10, 5e4, 2e-4)
    experience.note("walk", 10, 64, 4, first)
    assert experience.of("walk", 10, 64, 4) == first
    gaps = []
    for _ in range(40):
        experience.note("walk", 10, 64, 4, then)
        seen = experience.of("walk", 10, 64, 4)
        assert seen is not None
        gaps.append(abs(seen.reads - then.reads))
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] == 25
    assert seen.reads == pytest.approx(50)
    assert seen.cpu_s == pytest.approx(2e-4)


def test_experience_may_be_told_later_and_then_once() -> None:
    experience, calls = Experience(), []

    def told(needs: Needs) -> Needs:
        calls.append(needs)
        return needs

    many = [Needs(float(reads), 10, 5e4, 2e-4) for reads in range(100)]
    for needs in many:
        experience.note("walk", 10, 64, 4, lambda needs=needs: told(needs))
    assert not calls
    seen = experience.of("walk", 10, 64, 4)
    assert seen is not None
    assert seen.reads == pytest.approx(98.0, abs=0.1)
    assert calls == many[-len(calls) :]
    assert len(calls) < 10  # those before would count for next to nothing
    assert experience.of("walk", 10, 64, 4) == seen


def test_experience_is_of_the_same_parameters() -> None:
    experience = Experience()
    experience.note("walk", 10, 64, 4, WALK)
    for key in (("lists", 10, 64, 4), ("walk", 11, 64, 4), ("walk", 10, 65, 4), ("walk", 10, 64, 5)):
        assert experience.of(*key) is None


def test_threads_may_share_experience() -> None:
    experience = Experience()
    threads = [
        threading.Thread(target=lambda: [experience.note("walk", 1, 1, 1, WALK) for _ in range(200)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert experience.of("walk", 1, 1, 1) == WALK


# ---- plans ----


def peer(link: Link, transport: str = "verbs", *, rpc: str = "", lists: bool = False) -> Any:
    info = SimpleNamespace(n_lists=250, list_bytes=10e6, entries=250_000)
    return SimpleNamespace(
        index=0,
        link=link,
        transport=transport,
        shard=SimpleNamespace(record_bytes=1024),
        capabilities=SimpleNamespace(transports={"verbs": "", "rpc": rpc}),
        lists=SimpleNamespace(info=info) if lists else None,
        number=None,
    )


def job(n: int = 1, mask: npt.NDArray[np.bool_] | None = None) -> Batch:
    return Batch(np.zeros((n, DIM), np.float32), 10, 64, 4, 0, 5.0, Stop(), None, mask)


def plan(
    *peers: Any, algorithm: str = "auto", owner_cpu: bool = False, explain: bool = False, work: Batch | None = None
) -> Plan:
    planner = Planner(peers, DIM, None)
    return planner.plan(algorithm, work or job(), 1, target_recall=0.99, owner_cpu=owner_cpu, explain=explain)


def ways(made: Plan) -> dict[str, Prediction]:
    return {prediction.algorithm: prediction for prediction in made.predictions}


class TestAuto:
    def test_owners_are_asked_where_they_may_be_and_it_is_quicker(self) -> None:
        assert plan(peer(NEAR), owner_cpu=True).algorithm == "cotra"
        assert plan(peer(FAR), owner_cpu=True).algorithm == "scatter-gather"
        assert plan(peer(FAR), owner_cpu=True).asked == {0}
        spared = plan(peer(FAR), peer(FAR))
        assert (spared.algorithm, spared.asked) == ("cotra", frozenset())
        assert not ways(spared)["scatter-gather"].allowed
        assert "CPU" in ways(spared)["scatter-gather"].why

    def test_each_shard_has_the_better_way(self) -> None:
        made = plan(peer(NEAR), peer(FAR), peer(NEAR), owner_cpu=True)
        assert (made.algorithm, made.asked) == ("cotra", {1})
        assert made.predictions[0].owner_cpu_s == pytest.approx(WALK.cpu_s)
        assert made.predictions[0].seconds <= ways(made)["scatter-gather"].seconds
        assert made.predictions[0].shards == 3

    def test_an_owner_that_refuses_rpc_is_read(self) -> None:
        made = plan(peer(FAR, rpc="not offered"), peer(FAR), owner_cpu=True)
        assert (made.algorithm, made.asked) == ("cotra", {1})
        assert "does not offer rpc" in ways(made)["scatter-gather"].why

    def test_what_cannot_be_read_is_asked_by_every_way(self) -> None:
        closed = peer(Link(math.inf, 0.0, 0.0, 1e-3), "rpc")
        for owner_cpu in (False, True):
            assert plan(closed, peer(NEAR), owner_cpu=owner_cpu).asked == {0}
            assert plan(closed, closed, owner_cpu=owner_cpu).asked == {0, 1}
        assert ways(plan(closed, closed))["scatter-gather"].allowed

    def test_two_rounds_on_a_slow_link(self) -> None:
        slow = [peer(FAR, lists=True) for _ in range(4)]
        made = plan(*slow)
        assert (made.algorithm, made.lists, made.asked) == ("spire", True, frozenset())
        assert made.predictions[0].rounds == 2.0
        without = plan(*slow[:3], peer(FAR))
        assert without.algorithm == "cotra"
        assert "has no inverted lists" in ways(without)["spire"].why

    def test_predictions_have_the_taken_one_first_and_each_once(self) -> None:
        for owner_cpu in (False, True):
            for link in (NEAR, FAR):
                made = plan(*(peer(link, lists=True) for _ in range(2)), owner_cpu=owner_cpu)
                assert made.predictions[0].algorithm == made.algorithm
                assert made.predictions[0].allowed
                assert sorted(ways(made)) == ["cotra", "scatter-gather", "spire"]
                allowed = [way for way in made.predictions if way.allowed]
                assert min(allowed, key=lambda way: way.seconds) == made.predictions[0]

    def test_what_was_seen_counts_more_than_guesses(self) -> None:
        planner = Planner([peer(FAR, lists=True)], DIM, None)

        def made() -> Plan:
            return planner.plan("auto", job(), 1, target_recall=0.99, owner_cpu=False, explain=False)

        assert made().algorithm == "spire"
        planner.experience.note("lists", 10, 64, 0, Needs(1e4, 2.0, 1e9, 1e-3))
        assert made().algorithm == "cotra"
        planner.experience.note("walk", 10, 64, 4, Needs(1e5, 5e3, 1e9, 1e-3))
        assert made().algorithm == "spire"

    def test_no_queries_and_no_shards(self) -> None:
        assert plan(peer(NEAR), work=job(0)).algorithm == "cotra"
        made = plan(peer(NEAR), peer(FAR), work=job(2, np.zeros((2, 2), bool)))
        assert made.predictions[0].shards == 0.0


class TestOneGraph:
    """Shards that are walked together: their owners never search, they expand nodes."""

    def made(self, *peers: Any, algorithm: str = "auto", owner_cpu: bool = False, n: int = 1) -> Plan:
        planner = Planner(peers, DIM, None, frozenset(range(len(peers))))
        return planner.plan(algorithm, job(n), 1, target_recall=0.99, owner_cpu=owner_cpu, explain=False)

    def test_what_cannot_be_read_is_pushed_to(self) -> None:
        closed = peer(Link(math.inf, 0.0, 0.0, 1e-3), "rpc")
        for algorithm, owner_cpu in (("auto", False), ("cotra", False), ("cotra", True)):
            plan = self.made(closed, peer(NEAR), peer(NEAR), algorithm=algorithm, owner_cpu=owner_cpu)
            assert (plan.algorithm, plan.pushed, plan.asked) == ("cotra", {0}, frozenset())

    def test_few_nodes_a_round_are_read_and_many_are_pushed(self) -> None:
        """CoTra's rule of thumb, on a link whose READs are few a second: 64 queries put more nodes into a round than one does."""
        slow = Link(rtt_s=170e-6, reads_per_s=5000, bytes_per_s=5e6, rpc_s=600e-6)
        reads = WALK.reads / 2
        for n, owner_cpu, is_pushed in ((1, True, False), (64, True, True), (64, False, False)):
            way = ways(self.made(peer(slow), peer(NEAR), owner_cpu=owner_cpu, n=n))["cotra"]
            assert way.owner_cpu_s == pytest.approx(reads * EXPANSION_S if is_pushed else 0)
            assert way.reads == pytest.approx(reads if is_pushed else 2 * reads)

    def test_a_lost_shard_is_in_no_plan(self) -> None:
        peers = [peer(NEAR), peer(NEAR, "lost"), peer(NEAR)]
        planner = Planner(peers, DIM, None, frozenset({0, 2}))
        for algorithm in ("auto", "cotra", "scatter-gather"):
            plan = planner.plan(algorithm, job(), 1, target_recall=0.99, owner_cpu=True, explain=True)
            assert 1 not in plan.asked | plan.pushed
        assert (
            planner.plan("cotra", job(), 1, target_recall=0.99, owner_cpu=False, explain=True).predictions[0].shards
            == 2
        )

    def test_a_prediction_of_pushes_is_of_owners_cpu(self) -> None:
        needs = pushed(WALK, DIM)
        expected = predict_pushed("cotra", needs, [NEAR, NEAR], [1.0, 1.0], 10)
        assert expected.reads == 0
        assert expected.owner_cpu_s == pytest.approx(2 * WALK.reads * EXPANSION_S)
        assert expected.seconds == pytest.approx(WALK.rounds * NEAR.rpc_s + 10 * WALK.reads * EXPANSION_S)
        assert expected.bytes < read(NEAR, n_shards=2).bytes / 2


class TestByName:
    @pytest.mark.parametrize("explain", [False, True])
    def test_a_name_is_binding(self, explain: bool) -> None:
        for name in ("cotra", "scatter-gather", "spire"):
            made = plan(peer(FAR, lists=True), algorithm=name, explain=explain)
            assert made.algorithm == name
            assert [way.algorithm for way in made.predictions[:1]] == ([name] if explain else [])
        assert plan(peer(FAR), algorithm="cotra", owner_cpu=True).asked == frozenset()

    @pytest.mark.parametrize("explain", [False, True])
    def test_what_cannot_be_had_says_why(self, explain: bool) -> None:
        for name, why in (
            ("spire", "spire: .* has no inverted lists"),
            ("compass", "compass: these shards are not the whole of a collection"),
            ("compass+spire", "compass: these shards"),
            ("walk", "algorithm must be one of auto, cotra, .* not 'walk'"),
            ("", "algorithm must be"),
        ):
            with pytest.raises(InvalidInputError, match=why):
                plan(peer(NEAR), algorithm=name, explain=explain)
        with pytest.raises(InvalidInputError, match="cannot be read"):
            plan(peer(NEAR, "rpc", lists=True), algorithm="spire", explain=explain)
