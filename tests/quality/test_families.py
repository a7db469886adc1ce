"""`ef` finds at least what it finds in hnswlib on the same graph, whatever the data is."""

from __future__ import annotations

import numpy as np
import pytest

from quality import families
from quality.measure import Case

MARGIN = 0.01 + 1e-9


@pytest.mark.parametrize("ef", [16, 32, 64, 128, 256, 512])
def test_recall_at_equal_ef(case: Case, ef: int) -> None:
    theirs, ours = case.recalls(10, ef)
    assert ours >= theirs - MARGIN


def test_recall_goes_to_that_of_the_graph(case: Case) -> None:
    theirs, ours = case.recalls(10, 1024)
    assert ours >= 0.999 * theirs


@pytest.mark.parametrize("k", [10, 32, 100])
def test_recall_where_ef_is_k(case: Case, k: int) -> None:
    theirs, ours = case.recalls(k, k)
    assert ours >= theirs - MARGIN


def test_every_place_is_filled_once(case: Case) -> None:
    for k, ef in ((10, 16), (100, 100)):
        ids = case.answers(k, ef)
        assert (ids >= 0).all()
        assert all(len(set(row)) == k for row in ids.tolist())


def test_a_family_is_the_same_each_time() -> None:
    for name in ("towns-2d", "embeddings-384d"):
        one, other = families.make(name), families.make(name)
        np.testing.assert_array_equal(one.base, other.base)
        np.testing.assert_array_equal(one.queries, other.queries)
    names = families.names()
    assert len(names) == len(set(names)) >= 20
    assert families.names("ip-*,sparse-*") == [name for name in names if name.startswith(("ip-", "sparse-"))]
