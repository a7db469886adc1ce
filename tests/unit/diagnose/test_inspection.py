"""What `cotra info` tells, against what the images hold by the format page and by brute force over their records."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from cotra_rdma._build.collection import build_collection
from cotra_rdma._collection.manifest import MANIFEST, Collection
from cotra_rdma._collection.owners_file import OWNERS, add
from cotra_rdma._diagnose import inspection
from cotra_rdma._diagnose.graph_stats import RANGE_BYTES, GraphStats, degree_range, graph_stats
from cotra_rdma._diagnose.inspection import inspect_collection, inspect_files, inspect_owners
from cotra_rdma._native.image import ImageInfo
from cotra_rdma._shard.shard import Shard
from cotra_rdma.datasets import open_vectors
from cotra_rdma.errors import FormatError

N, N_SHARDS = 900, 3
RECORDS, NODE, COUNT = 4096, 4, 20


def made(path: Path, rows: npt.NDArray[np.float32], **options: Any) -> Path:
    np.save(path.parent / "base.npy", rows)
    with open_vectors(path.parent / "base.npy") as vectors:
        build_collection(vectors, path, N_SHARDS, M=4, ef_construction=30, n_threads=1, **options)
    return path


@pytest.fixture(scope="module")
def rows() -> npt.NDArray[np.float32]:
    generator = np.random.default_rng(3)
    centres = generator.normal(size=(12, 10))
    return (centres[generator.integers(0, 12, N)] + 0.5 * generator.normal(size=(N, 10))).astype(np.float32)


@pytest.fixture(scope="module")
def one_graph(rows: npt.NDArray[np.float32], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("one") / "index", rows, graph="global")


@pytest.fixture(scope="module")
def independent(rows: npt.NDArray[np.float32], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("many") / "index", rows)


@pytest.fixture
def index(one_graph: Path, tmp_path: Path) -> Path:
    """A copy of the one graph's collection, to be spoilt."""
    shutil.copytree(one_graph, tmp_path / "index")
    return tmp_path / "index"


def image(path: Path) -> tuple[ImageInfo, bytearray]:
    with Shard.open(path) as shard:
        return shard.info, bytearray(path.read_bytes())


def counted(info: ImageInfo, data: bytearray, shards: list[tuple[int, int]]) -> GraphStats:
    return graph_stats(info, lambda offset, length: data[offset : offset + length], shards)


def links(info: ImageInfo, data: bytearray) -> list[list[int]]:
    """Each record's neighbours, one record after the other: by docs/reference/format.md, for float32 vectors."""
    found = []
    for node in range(info.count):
        record = data[RECORDS + node * info.record_bytes :][: info.record_bytes]
        n = int.from_bytes(record[COUNT : COUNT + 2], "little")
        at = 32 + -(-4 * info.dim // 32) * 32
        found.append(np.frombuffer(record[at : at + 4 * n], "<u4").tolist())
    return found


@pytest.mark.parametrize("range_bytes", [1, 20_000, RANGE_BYTES])
def test_links_are_counted_as_one_by_one(one_graph: Path, range_bytes: int) -> None:
    images = [image(one_graph / f"shard-{number:03d}.cotra") for number in range(N_SHARDS)]
    ranges = [(info.graph_base, info.count) for info, _ in images]
    crossing = 0
    for number, (info, data) in enumerate(images):
        seen = []
        found = graph_stats(
            info, lambda at, n, data=data: data[at : at + n], ranges[::-1], seen.append, range_bytes=range_bytes
        )
        lists = links(info, data)
        flat = [other for near in lists for other in near]
        assert found.links == len(flat)
        assert found.degrees.tolist() == np.bincount([len(near) for near in lists], minlength=info.degree + 1).tolist()
        into = [sum(first <= other < first + count for other in flat) for first, count in ranges]
        assert found.links_to.tolist() == into[::-1]
        assert (found.links_inside, found.links_elsewhere) == (into[number], 0)
        crossing += found.links - found.links_inside
        assert found.cross_share == pytest.approx(1 - into[number] / len(flat))
        assert seen[-1] == info.count
        alone = counted(info, data, [(0, 0), ranges[number]])
        assert alone.links_to.tolist() == [0, into[number]]
        assert alone.links_elsewhere == len(flat) - into[number]
        assert counted(info, data, []).links_elsewhere == len(flat)
        assert found.levels[0] == info.count
        assert (found.levels[1], len(found.levels)) == (info.upper_count, info.max_level + 1)
        assert (np.diff(found.levels) < 0).all()
        assert found.levels[-1] >= 1
    assert crossing > 0


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda record, info: record.__setitem__(slice(NODE, NODE + 1), b"\xff"), "another node"),
        (lambda record, info: record.__setitem__(slice(COUNT, COUNT + 2), b"\xff\xff"), "more than 32 neighbours"),
        (lambda record, info: record.__setitem__(slice(15, 16), b"\x80"), "negative label"),
        (lambda record, info: record.__setitem__(slice(24, 25), b"\x09"), "another generation"),
        (
            lambda record, info: record.__setitem__(slice(96, 100), info.graph_count.to_bytes(4, "little")),
            "beyond the graph's 900 nodes",
        ),
        (lambda record, info: record.__setitem__(slice(COUNT, COUNT + 2), b"\x01\x00"), "a place that is not used"),
        (
            lambda record, info: record.__setitem__(slice(16, 17), b"\x01"),
            "1 records are of deleted nodes, but the header says 0",
        ),
    ],
)
def test_malformed_records_are_refused(
    one_graph: Path, spoil: Callable[[bytearray, ImageInfo], None], reason: str
) -> None:
    info, data = image(one_graph / "shard-001.cotra")
    assert -(-4 * info.dim // 32) * 32 + 32 == 96  # where numbers begin
    at = RECORDS + 7 * info.record_bytes
    record = data[at : at + info.record_bytes]
    spoil(record, info)
    data[at : at + info.record_bytes] = record
    with pytest.raises(FormatError, match=reason) as told:
        counted(info, data, [(info.graph_base, info.count)])
    assert "record 7 " in str(told.value) or "deleted" in reason


def test_a_malformed_navigation_section_is_refused(one_graph: Path) -> None:
    info, data = image(one_graph / "shard-001.cotra")
    at = info.nav_offset + -(-4 * info.dim // 8) * 8 + -(-4 * info.upper_count // 8) * 8
    data[at + 4 : at + 8] = (0).to_bytes(4, "little")
    with pytest.raises(FormatError, match="upper node"):
        counted(info, data, [])


def test_a_file_that_becomes_shorter_is_refused(index: Path) -> None:
    path = index / "shard-000.cotra"
    with ExitStack() as stack:
        info, read = inspection._open_file(str(path), stack)
        path.write_bytes(path.read_bytes()[: RECORDS + info.record_bytes])
        with pytest.raises(FormatError, match=f"the file ends at byte {RECORDS + info.record_bytes}, "):
            graph_stats(info, read, [])


@pytest.mark.parametrize(
    ("degrees", "told"),
    [
        ([0, 0, 5], (2, 2, 2)),
        ([1, 0, 0, 1], (0, 1.5, 3)),
        ([1, 2, 0], (0, 1, 1)),
        ([2, 1, 1], (0, 0.5, 2)),
        ([1], (0, 0, 0)),
    ],
)
def test_degree_range(degrees: list[int], told: tuple[int, float, int]) -> None:
    assert degree_range(np.array(degrees)) == told
    values = np.repeat(np.arange(len(degrees)), degrees)
    assert told == (values.min(), np.median(values), values.max())


def test_a_whole_collection_fits(one_graph: Path, independent: Path) -> None:
    found = inspect_collection(one_graph)
    assert found.problems == []
    assert found.collection == Collection.load(one_graph)
    assert (found.count, len(found.shards)) == (N, N_SHARDS)
    counts = [entry.count for entry in found.collection.shards]
    assert found.balance == max(counts) / np.mean(counts)
    assert found.cross_share is not None
    assert 0 < found.cross_share < 1
    assert len(found.graph_ids) == 1
    assert found.graph_ids != [0]
    assert all(shard.here and not shard.owners and not shard.served for shard in found.shards)
    apart = inspect_collection(independent)
    assert (apart.problems, apart.cross_share, apart.graph_ids) == ([], 0.0, [0])
    (alone,) = inspect_files([one_graph / "shard-002.cotra"]).shards
    assert alone.graph is not None
    whole = found.shards[2].graph
    assert whole is not None
    assert alone.graph.links_elsewhere == whole.links - whole.links_inside == whole.links_to[:2].sum()


def test_a_carried_manifest_is_no_fault(index: Path) -> None:
    for path in index.glob("shard-*"):
        path.unlink()
    found = inspect_collection(index / MANIFEST)
    assert (found.problems, found.cross_share, found.count) == ([], None, N)
    assert [(shard.here, shard.info, shard.graph) for shard in found.shards] == [(False, None, None)] * N_SHARDS


def test_what_does_not_fit_is_told(index: Path, independent: Path) -> None:
    good = (index / "shard-001.cotra").read_bytes()

    def problems() -> str:
        return "\n".join(inspect_collection(index).problems)

    (index / "shard-001.cotra").write_bytes((independent / "shard-001.cotra").read_bytes())
    told = problems()
    assert "shard-001.cotra has a graph of its own, but the collection is one graph" in told
    assert "the shards are of different graphs" in told
    (index / "shard-001.cotra").write_bytes((index / "shard-000.cotra").read_bytes())
    told = problems()
    assert "shard-001.cotra holds" in told
    assert "shard-001.cotra hold the same nodes of one graph" in told
    assert f"nodes, but their graph has {N}" in told
    (index / "shard-001.cotra").write_bytes(good[:-1])
    assert "shard-001.cotra" in problems()
    spoilt = bytearray(good)
    spoilt[RECORDS + NODE] ^= 1
    (index / "shard-001.cotra").write_bytes(spoilt)
    assert "shard-001.cotra: record 0 has the number of another node" in problems()
    (index / "shard-001.cotra").write_bytes(good)
    raw = json.loads((index / MANIFEST).read_text())
    for entry in (raw, *raw["shards"]):
        entry["generation"] = 4
    (index / MANIFEST).write_text(json.dumps(raw))
    assert problems().count("holds generation 1, and the manifest has 4") == N_SHARDS


def test_owners_that_do_not_answer_are_told(index: Path) -> None:
    add(index, [(0, "127.0.0.1:1"), (2, "127.0.0.1:2")])
    found = inspect_collection(index)
    assert [len(shard.owners) for shard in found.shards] == [1, 0, 1]
    assert not any(shard.served for shard in found.shards)
    assert found.problems == []
    assert [why.partition(":")[0] for why in found.unserved] == ["shard 0", "shard 1", "shard 2"]
    assert "127.0.0.1:1" in found.unserved[0]
    assert "no owner is noted" in found.unserved[1]
    (told,) = inspect_owners([["127.0.0.1:1"]]).unserved
    assert told.startswith("shard 0 at 127.0.0.1:1: ")
    (index / OWNERS).write_text("{")
    assert [OWNERS in problem for problem in inspect_collection(index).problems] == [True]


def test_files_that_are_not_alike(one_graph: Path, independent: Path, tmp_path: Path) -> None:
    assert inspect_files(sorted(independent.glob("*.cotra"))).problems == []
    with Shard.build(np.ones((5, 3), np.float32), metric="ip", n_threads=1, generation=2) as shard:
        shard.save(tmp_path / "other.cotra")
    told = "\n".join(inspect_files([independent / "shard-000.cotra", tmp_path / "other.cotra"]).problems)
    for what in ("dim 10", "metric l2", "generation 1"):
        assert f"shard-000.cotra has {what}, but" in told
    mixed = inspect_files([one_graph / "shard-000.cotra", independent / "shard-001.cotra", tmp_path / "gone.cotra"])
    assert "graphs of their own" in mixed.problems[1]
    assert "gone.cotra" in mixed.problems[0]
