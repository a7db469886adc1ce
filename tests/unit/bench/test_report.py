"""The report is one page of sound HTML; the environment is told as it is."""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from cotra_rdma._bench.build import measure_builds, payload_bytes
from cotra_rdma._bench.data import DataSet, distances
from cotra_rdma._bench.environment import Environment
from cotra_rdma._bench.libraries import FILTERED, LIBRARIES, check_libraries, load
from cotra_rdma._bench.report import write_report
from cotra_rdma._bench.runner import Plan, Point, run
from cotra_rdma._bench.summary import compare
from cotra_rdma._bench.tables import builds_table, cost_table, speed_table, summary_table, title
from cotra_rdma._diagnose.host import Host
from cotra_rdma._shard.shard import Shard
from cotra_rdma.errors import InvalidInputError

VOID = {"meta", "img"}
N, DIM, N_QUERIES = 2000, 16, 40


@pytest.fixture(params=["l2", "ip", "cosine"])
def data(request: pytest.FixtureRequest, tmp_path: Path) -> DataSet:
    rng = np.random.default_rng(4)
    base, queries = (rng.normal(size=(n, DIM)).astype(np.float32) for n in (N, N_QUERIES))
    truth = np.stack([np.argsort(distances(request.param, query, base))[:10] for query in queries])
    for name, array in (("base", base), ("queries", queries), ("gt", truth)):
        np.save(tmp_path / f"a<b_{name}.npy", array)
    return DataSet.open(tmp_path / "a<b")


@pytest.fixture(scope="module")
def environment() -> Environment:
    return Environment.now(["/usr/bin/cotra", "bench", "--dataset", "a<b"]).finished()


class Page(HTMLParser):
    """Collects tags and text, and checks that what is opened is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("name", LIBRARIES)
def test_every_library_finds_what_is_near_and_is_kept(data: DataSet, tmp_path: Path, name: str) -> None:
    pytest.importorskip(name)
    plan, kept, built = Plan(efs=(64,), threads=(1, 2), repeats=1), tmp_path / "index", []
    for _ in range(2):  # the second time it is read
        library = LIBRARIES[name](data, plan, kept, lambda what, done, total: built.append(done))
        assert kept.exists()
        points = run(data, [library], plan)
        assert [point.n_threads for point in points] == [1, 2]
        assert all(point.recall > 0.95 and point.p50_us == point.call_us for point in points)
        library.close()
    assert len(built) == 1


def test_a_library_that_is_missing_or_cannot_filter_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in set(LIBRARIES) - set(FILTERED):
        pytest.importorskip(name)
        with pytest.raises(InvalidInputError, match=f"{name} is measured without filters"):
            check_libraries(["hnswlib", name], M=16, filtered=True)
    for name, package in (("faiss", "faiss-cpu"), ("rabitqlib", "rabitqlib")):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(InvalidInputError, match=rf"{name} cannot be imported .*: pip install {package}$"):
            load(name)


def test_a_graph_that_rabitqlib_does_not_have_is_told(tmp_path: Path) -> None:
    pytest.importorskip("rabitqlib")
    check_libraries(["hnswlib", "rabitqlib"], M=32)
    with pytest.raises(InvalidInputError, match="a multiple of 32 links a node, not 2 M = 16"):
        check_libraries(["hnswlib", "rabitqlib"], M=8)
    few = np.random.default_rng(3).normal(size=(32, DIM)).astype(np.float32)
    truth = np.stack([np.argsort(distances("l2", vector, few))[:10] for vector in few])
    for name, array in (("base", few), ("queries", few), ("gt", truth)):
        np.save(tmp_path / f"few_{name}.npy", array)
    data = DataSet.open(tmp_path / "few")
    with pytest.raises(InvalidInputError, match="more than 2 M = 32 vectors, not 32"):
        LIBRARIES["rabitqlib"](data, Plan(), tmp_path / "index", lambda what, done, total: None)
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize("data", ["l2"], indirect=True)
def test_building_is_measured(data: DataSet) -> None:
    done: list[tuple[int, int]] = []
    plan = Plan(threads=(1, 2), repeats=2, M=8, ef_construction=20)
    rows = measure_builds(data, plan, lambda so_far, total: done.append((so_far, total)))
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [row.n_threads for row in rows] == [1, 2]
    for row in rows:
        assert row.seconds_min <= row.seconds <= row.seconds_max
        assert row.seconds_ratio.min <= row.seconds_ratio.median <= row.seconds_ratio.max
        assert row.raw_bytes == 4 * N * DIM
        assert row.image_bytes > N * row.record_bytes
        assert 0 <= row.record_padding_bytes < row.record_bytes
    assert len(builds_table(rows).rows) == 2


def test_the_bytes_of_a_record() -> None:
    with Shard.build(np.random.default_rng(1).normal(size=(50, 100)).astype(np.float32)) as shard:
        assert shard.info.record_bytes - payload_bytes(shard.info) == 16  # the vector's own, up to 32 bytes


@pytest.mark.parametrize("data", ["l2"], indirect=True)
def test_the_report_is_sound_and_refers_to_nothing(data: DataSet, tmp_path: Path, environment: Environment) -> None:
    pytest.importorskip("matplotlib")
    plan = Plan(efs=(16, 64), repeats=2)
    hnswlib = LIBRARIES["hnswlib"](data, plan, tmp_path / "index", lambda what, done, total: None)
    points: list[Point] = run(data, [hnswlib], plan)
    summary = summary_table(compare(points), points)
    path = tmp_path / "report.html"
    write_report(path, title(data, plan), environment, summary, [speed_table(points), cost_table(points)], points)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    assert {"script", "link", "iframe"}.isdisjoint(page.tags)
    assert "http:" not in text
    assert "https:" not in text
    sources = [value for name, value in page.attributes if name in ("src", "href")]
    assert len(sources) == 1
    assert (sources[0] or "").startswith("data:image/png;base64,")
    assert ("name", "viewport") in page.attributes
    assert "prefers-color-scheme: dark" in text
    assert "a<b: 2,000 x 16, l2" in page.text
    assert "cotra bench --dataset 'a<b'" in page.text
    assert "a<b" not in text
    assert "At equal recall" in page.text


def test_this_machines_environment(environment: Environment) -> None:
    assert environment.command == "cotra bench --dataset 'a<b'"
    assert environment.cores >= 1
    assert environment.load_at_end is not None
    assert environment.simd_used
    assert environment.versions["hnswlib"]
    assert set(environment.versions) >= {"cotra-rdma", "python", "numpy", *LIBRARIES}
    facts = environment.facts()
    assert all(facts.values())
    assert " to " in facts["load"]


def test_the_environment_is_read_where_the_kernel_tells_it(tmp_path: Path) -> None:
    files = {
        "proc/cpuinfo": "processor\t: 0\nmodel name\t: A CPU @ 3 GHz\nflags\t\t: fpu sse4_2 avx2 avx512f ht\n",
        "proc/meminfo": "HugePages_Total:       8\nHugePages_Free:        5\nHugepagesize:       2048 kB\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "performance\n",
        "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
        "sys/kernel/mm/transparent_hugepage/shmem_enabled": "always within_size [advise] never deny force\n",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    told = Environment.now(["-m", "bench"], Host(tmp_path, "6.1.0"))
    assert (told.cpu, told.simd_available) == ("A CPU @ 3 GHz", ("sse4_2", "avx2", "avx512f"))
    assert (told.kernel, told.scaling_governor) == ("6.1.0", "performance")
    assert (told.transparent_hugepage, told.shmem_hugepage) == ("madvise", "advise")
    assert told.hugetlb == "5 of 8 free, 2,048 KiB each"
    nothing = Environment.now(["cotra"], Host(tmp_path / "nowhere"))
    assert (nothing.scaling_governor, nothing.transparent_hugepage, nothing.simd_available) == ("none", "unknown", ())
    assert nothing.cpu
