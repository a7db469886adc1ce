"""What peers are worth, measured over four owners: homes with and without a halo, and each shard lost once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest

from cotra_rdma._bench.data import DataSet, nearest
from cotra_rdma._bench.runner import Plan
from cotra_rdma._bench.scaling.peers import Owners, measure_homes, measure_losses
from cotra_rdma._build.collection import build_collection
from cotra_rdma.errors import InvalidInputError

Floats = npt.NDArray[np.float32]
N, N_SHARDS, EF = 2000, 4, 48


@pytest.fixture(scope="module")
def data(words: Floats, queries: Floats, tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    directory = tmp_path_factory.mktemp("peers")
    arrays = {"base": words[:N], "queries": queries, "gt": nearest("cosine", queries, words[:N], 10)}
    for name, array in arrays.items():
        np.save(directory / f"small_{name}.npy", array)
    return DataSet.open(directory / "small", metric="cosine")


@pytest.fixture(scope="module")
def owners(data: DataSet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Owners]:
    directory = tmp_path_factory.mktemp("owners") / "index"
    knobs = {"M": 8, "ef_construction": 60, "n_threads": 1, "graph": "global"}
    build_collection(data.vectors, directory, N_SHARDS, metric="cosine", **knobs)  # type: ignore[arg-type]
    with Owners(directory, "shm") as found:
        yield found


def test_homes_hold_what_their_queries_need(owners: Owners, data: DataSet) -> None:
    told: list[tuple[int, int]] = []
    (alone, haloed), busiest = measure_homes(
        owners, data, Plan(), [16, EF], [0.0, 0.4], 0.95, lambda done, total: told.append((done, total))
    )
    homes = owners.whole.homes(data.queries)
    found = owners.whole.search(data.queries, 10, EF)
    assert (homes == found.shards[:, 0]).mean() > 0.6  # where the nearest is
    assert busiest == pytest.approx(np.bincount(homes).max() * N_SHARDS / len(homes))
    assert (alone.halo, alone.held, alone.held_bytes, alone.local) == (0, 0, 0, alone.own)
    assert haloed.own == alone.own
    assert 0.3 < alone.own < haloed.local < 1
    assert 0.3 < haloed.held <= 0.4
    assert haloed.held_bytes > haloed.held * 500
    assert told[-1] == (len(told), len(told))
    assert len(told) == 4 * len(np.unique(homes))


def test_a_recall_outside_of_the_sweep_is_that_of_its_end(owners: Owners, data: DataSet) -> None:
    (row,), _ = measure_homes(owners, data, Plan(), [10], [0.0], 0.1, lambda done, total: None)
    assert row.recall > 0.5


def test_a_lost_shard_costs_the_answers_that_it_held(owners: Owners, data: DataSet) -> None:
    rows = measure_losses(owners, data, Plan(repeats=1), EF, lambda done, total: None)
    assert [row.vectors for row in rows] == list(owners.whole.counts)
    assert sum(row.share for row in rows) == pytest.approx(1)
    for row in rows:
        assert 0 < row.recall_fall <= row.share + 0.01
        assert 0.5 < row.reads_ratio < 2
        assert min(row.time_ratio, row.cpu_ratio) > 0


def test_shards_without_homes(owners: Owners, data: DataSet) -> None:
    with pytest.raises(InvalidInputError, match="must be float32"):
        owners.whole.homes(np.zeros((3, 7), np.float32))
