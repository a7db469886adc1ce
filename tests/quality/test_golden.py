"""Answers that were recorded: what changes them without meaning to is caught here.

The vectors are whole numbers, so their distances are exact on every CPU, and so are the graphs that hnswlib builds of them.
`python -m tests.quality.test_golden` records them again, for a change that means to change them.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cotra_rdma
from cotra_rdma import Shard
from cotra_rdma._build.collection import build_collection
from cotra_rdma._collection.manifest import shard_paths
from cotra_rdma._native.graph_engine import simd_level
from cotra_rdma.datasets import open_vectors

GOLDEN = Path(__file__).with_name("golden.json")
ROWS, QUERIES, DIM, N_SHARDS, K = 2400, 30, 24, 3, 10
KINDS = [(graph, metric) for graph in ("independent", "global") for metric in ("l2", "ip")]
COUNTS = ("expansions", "rounds", "reads", "read_bytes")


def answers_of(graph: str, metric: str, directory: Path) -> dict[str, Any]:
    """Builds three shards, or one graph of three, and searches them over shared memory."""
    rng = np.random.default_rng(17)
    np.save(directory / "base.npy", rng.integers(0, 200, (ROWS, DIM)).astype(np.float32))
    queries = rng.integers(0, 200, (QUERIES, DIM)).astype(np.float32)
    with open_vectors(directory / "base.npy") as vectors:
        build_collection(
            vectors,
            directory / "index",
            N_SHARDS,
            metric=metric,
            partition="kmeans",
            graph=graph,
            ef_construction=60,
            n_threads=1,
        )
    shards = [Shard.open(path) for path in shard_paths([directory / "index"])]
    servers = [cotra_rdma.serve(shard, transports=("shm", "rpc")) for shard in shards]
    try:
        with cotra_rdma.connect([server.address for server in servers], transport="shm") as cluster:
            found = cluster.search(queries, K, 32, beam=4)
    finally:
        for owner in (*servers, *shards):
            owner.close()
    return {
        "ids": found.ids.tolist(),
        "distances": found.distances.tolist(),
        "shards": found.shards.tolist(),
        "simd": simd_level(),
        "stats": {name: found.stats[name].tolist() for name in COUNTS},
    }


@pytest.mark.parametrize(("graph", "metric"), KINDS)
def test_answers_are_those_that_were_recorded(graph: str, metric: str, tmp_path: Path) -> None:
    golden = json.loads(GOLDEN.read_text())[f"{graph} {metric}"]
    found = answers_of(graph, metric, tmp_path)
    if found["simd"] != golden["simd"]:  # sums of estimates round differently, so walks may take other turns
        same = np.mean(np.array(found["ids"]) == np.array(golden["ids"]))
        assert same > 0.99
        return
    assert found == golden


if __name__ == "__main__":
    recorded = {}
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as made:
            recorded[" ".join(kind)] = answers_of(*kind, Path(made))
    GOLDEN.write_text(json.dumps(recorded) + "\n")
    sys.exit(0)
