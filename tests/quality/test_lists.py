"""Two rounds over inverted lists, all of which are read: estimates then are all that may lose an answer, on any data."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import pytest

from cotra_rdma import Shard
from helpers.lists import spire_of
from quality import families
from quality.measure import Truth

EVERY = 2**31


@pytest.mark.parametrize(
    "name",
    [
        "towns-2d",
        "clusters-32d",
        "earth-3d",
        "two-scales-32d",
        "one-point-8d",
        "ip-queries-x1-64d",
        "ip-queries-x0.01-64d",
        "ip-norms-100x-64d",
        "ip-large-items-64d",
        "cosine-cone-0.001-32d",
        "embeddings-384d",
        "one-hot-200d",
        "series-offset-10000-128d",
        "heavy-tailed-32d",
        "normal-1d",
        "normal-65d",
    ],
)
def test_recall_where_all_lists_are_read(name: str) -> None:
    family = families.make(name)
    truth = Truth.of(family, 10)
    with ExitStack() as stack:
        shard = stack.enter_context(
            Shard.build(family.base, metric=family.metric, M=4, ef_construction=10, n_threads=1, n_lists=40)
        )
        engine = stack.enter_context(spire_of(shard.arena))
        labels, _, _, stats = engine.search(np.ascontiguousarray(family.queries, np.float32), 10, EVERY)
    assert truth.recall(labels, 10) >= 0.985
    if name != "one-point-8d":  # all of its rows are equally near
        assert stats["reranked"].mean() < 200
