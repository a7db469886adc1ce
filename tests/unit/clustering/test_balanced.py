"""Partitions made slice by slice: every row in one part, no part too large, whatever the order of the rows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from cotra_rdma._clustering.balanced import (
    PartModel,
    capacity,
    cheapest,
    fill_slice,
    plan_slices,
    slice_of,
    train_parts,
)
from cotra_rdma.errors import InvalidInputError

Floats = npt.NDArray[np.float32]


def divided(model: PartModel, rows: Floats, n_slices: int) -> npt.NDArray[np.int32]:
    """The part of each row, as so many processes would decide it."""
    spans = [slice_of(len(rows), n_slices, number) for number in range(n_slices)]
    parts = [cheapest(model, rows[begin:end])[0] for begin, end in spans]
    counts = np.stack([np.bincount(part, minlength=model.n_parts) for part in parts])
    plan = plan_slices(counts, capacity(len(rows), model.n_parts))
    for number, (begin, end) in enumerate(spans):
        fill_slice(model, rows[begin:end], parts[number], counts, plan, number)
    return np.concatenate(parts)


@pytest.fixture(scope="module")
def clustered() -> Floats:
    """Clusters of very different sizes, so that the largest does not fit one part; sorted by cluster."""
    generator = np.random.default_rng(4)
    sizes = (1500, 700, 300, 200, 300)
    middles = generator.normal(0, 6, (len(sizes), 8))
    return np.repeat(middles, sizes, axis=0).astype(np.float32) + generator.normal(0, 1, (3000, 8)).astype(np.float32)


@pytest.mark.parametrize("n_slices", [1, 3, 5])
@pytest.mark.parametrize("is_sorted", [True, False])
def test_no_part_is_too_large_and_none_is_empty(clustered: Floats, n_slices: int, is_sorted: bool) -> None:
    rows = clustered if is_sorted else clustered[np.random.default_rng(1).permutation(len(clustered))]
    model = train_parts(rows, 5, seed=3)
    unpriced = PartModel("l2", model.centre, model.offsets, np.zeros(5, np.float32))
    for each in (model, unpriced):  # without prices, the largest cluster is far too large for a part
        sizes = np.bincount(divided(each, rows, n_slices), minlength=5)
        assert sizes.sum() == 3000
        assert sizes.min() > 0
        assert sizes.max() <= 660 == capacity(3000, 5)
    wanted = np.bincount(cheapest(unpriced, rows)[0], minlength=5)
    assert wanted.max() > 660  # or nothing was tested


def test_rows_that_fit_stay_where_they_are_cheapest(clustered: Floats) -> None:
    model = train_parts(clustered, 5, seed=3)
    found, best = divided(model, clustered, 5), cheapest(model, clustered)[0]
    over = np.flatnonzero(np.bincount(best, minlength=5) > 660)
    assert np.isin(best[found != best], over).all()
    assert (found == best).mean() > 0.9


def test_of_a_full_part_those_leave_that_lose_least() -> None:
    rows = np.concatenate([np.linspace(0, 4, 40), np.full(10, 10.0)]).astype(np.float32)[:, np.newaxis]
    model = PartModel("l2", np.zeros(1, np.float32), np.array([[0.0], [10.0]], np.float32), np.zeros(2, np.float32))
    assert np.bincount(cheapest(model, rows)[0]).tolist() == [40, 10]
    found = divided(model, rows, 1)
    assert found.tolist() == [0] * 27 + [1] * 23  # capacity 27: the 13 nearest to the other go


@pytest.mark.parametrize("n_parts", [3, 40])
@pytest.mark.parametrize("n_slices", [1, 4, 40])
def test_equal_vectors_fill_all_parts(n_parts: int, n_slices: int) -> None:
    rows = np.ones((40, 4), np.float32)
    sizes = np.bincount(divided(train_parts(rows, n_parts), rows, n_slices), minlength=n_parts)
    assert sizes.sum() == 40
    assert sizes.min() >= 1
    assert sizes.max() <= capacity(40, n_parts)


def test_plans_are_whole_whatever_is_wanted() -> None:
    generator = np.random.default_rng(9)
    for _ in range(300):
        n_slices, n_parts = generator.integers(1, 7, 2)
        counts = (
            generator.integers(0, 40, (n_slices, n_parts)) * (generator.random((n_slices, n_parts)) < 0.4)
        ).astype(np.int64)
        total = int(counts.sum())
        if total < n_parts:
            continue
        room = int(generator.integers(-(-total // n_parts), total + 1))
        plan = plan_slices(counts, room)
        assert (plan.demand.sum(axis=1) == counts.sum(axis=1)).all()
        assert (plan.demand.sum(axis=0) > 0).all()
        assert (plan.kept >= 0).all()
        assert (plan.kept <= plan.demand).all()
        assert (plan.spare >= 0).all()
        assert ((plan.kept + plan.spare).sum(axis=0) <= room).all()
        assert ((plan.kept + plan.spare).sum(axis=1) >= counts.sum(axis=1)).all()


def test_the_sum_of_the_slices_is_that_of_all(clustered: Floats) -> None:
    model = train_parts(clustered, 4, metric="cosine")
    unit = clustered / np.linalg.norm(clustered, axis=1, keepdims=True)
    np.testing.assert_allclose(cheapest(model, clustered)[1], unit.sum(axis=0, dtype=np.float64), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(("counts", "room"), [([[3, 4]], 3), ([[1, 0]], 9)])
def test_rows_that_do_not_fit_are_refused(counts: list[list[int]], room: int) -> None:
    with pytest.raises(InvalidInputError, match="rows do not fill 2 parts"):
        plan_slices(np.array(counts, np.int64), room)
