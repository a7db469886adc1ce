"""One family at a time: its data, hnswlib's graph of it, the same graph packed, and the exact answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cotra_rdma import Shard
from quality import families
from quality.measure import Case, Truth, build_graph


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where graphs are kept: some families differ in their queries alone."""
    return tmp_path_factory.mktemp("graphs")


@pytest.fixture(scope="module", params=families.names())
def case(request: pytest.FixtureRequest, cache: Path) -> Iterator[Case]:
    family = families.make(request.param)
    index = build_graph(family, cache if family.name.startswith("ip-queries") else None)
    with Shard.from_hnswlib(index, n_threads=1) as shard:
        yield Case(family, index, shard, Truth.of(family, most=100))
