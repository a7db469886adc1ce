"""The `cotra` command as a user types it: build, serve in a process of its own, search it, stop it."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from cotra_rdma._bench.data import distances
from cotra_rdma._bench.scaling.scale import FABRIC
from cotra_rdma._owner.child_process import OwnerProcess
from cotra_rdma.cli import app
from cotra_rdma.errors import PeerError

N, DIM, N_QUERIES = 3000, 24, 50
COTRA = (sys.executable, "-m", "cotra_rdma.cli")


def cotra(*arguments: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*COTRA, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == status, done.stderr
    return done


def refused(*arguments: object) -> Result:
    """The command in this process: what it refuses is not a matter of processes, and a start takes longer than to refuse."""
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [*map(str, arguments)])


def answer(*arguments: object) -> Any:
    return json.loads(cotra(*arguments, "--json").stdout)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, queries and ground truth, and an index of two shards."""
    path = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(5)
    base, queries = (rng.normal(size=(n, DIM)).astype(np.float32) for n in (N, N_QUERIES))
    truth = np.stack([np.argsort(distances("l2", query, base))[:10] for query in queries])
    for name, array in (("base", base), ("queries", queries), ("gt", truth)):
        np.save(path / f"small_{name}.npy", array)
    answer("build", path / "small_base.npy", path / "index", "--shards", 2, "--threads", 1)
    return path


@pytest.fixture(scope="module")
def served(data: Path) -> Iterator[OwnerProcess]:
    """The owner of both shards."""
    with OwnerProcess([data / "index"], transports=("shm", "rpc")) as owner:
        yield owner


@pytest.mark.parametrize("transport", ["shm", "rpc"])
def test_build_serve_search(data: Path, served: OwnerProcess, tmp_path: Path, transport: str) -> None:
    ready = served.wait_ready()
    assert ready["address"] == ready["shards"][0]["address"]
    assert ready["region"] is None
    assert ready["transports"] == ["shm", "rpc"]
    assert [shard["count"] for shard in ready["shards"]] == [N // 2, N // 2]
    asked = (*served.addresses, "--queries", data / "small_queries.npy", "--ef", 128, "--transport", transport)
    summary = answer("search", *asked, "--ground-truth", data / "small_gt.npy", "--out", tmp_path / "found.npz")
    assert summary["recall"] > 0.95
    assert summary["transports"] == dict.fromkeys(served.addresses, transport)
    assert summary["coverage"] == 1.0
    assert summary["qps"] > 0
    assert 0 < summary["p50_us"] <= summary["p99_us"]
    assert summary["cached_records_per_query"] == 0
    if transport == "shm":
        assert summary["reads_per_query"] >= summary["rounds_per_query"] > 1
        assert summary["bytes_per_query"] > summary["reads_per_query"]
        again = answer("search", *asked, "--cache-bytes", 10**7)
        read = again["reads_per_query"] + again["cached_records_per_query"]
        assert read == pytest.approx(summary["reads_per_query"])
        assert again["reads_per_query"] < 0.9 * summary["reads_per_query"]
    with np.load(tmp_path / "found.npz") as found:
        ids, near = found["ids"], found["distances"]
    assert (ids.dtype, ids.shape, near.dtype) == (np.int64, (N_QUERIES, 10), np.float32)
    base, queries = (np.load(data / f"small_{name}.npy") for name in ("base", "queries"))
    np.testing.assert_allclose(near[0], distances("l2", queries[0], base[ids[0]]), rtol=1e-4)
    assert answer("search", *asked, "--out", tmp_path / "found.npy")["recall"] is None
    fields = np.load(tmp_path / "found.npy")
    np.testing.assert_array_equal(fields["id"], ids)
    np.testing.assert_array_equal(fields["distance"], near)
    assert "recall@10" in cotra("search", *asked).stdout
    assert (summary["incomplete"], summary["coverage"]) == (0, 1.0)
    bounded = (*asked, "--max-expansions", 12)
    cut_short = answer("search", *bounded, "--out", tmp_path / "cut.npz")
    assert (cut_short["incomplete"], cut_short["coverage"]) == (N_QUERIES, 0.0)
    with np.load(tmp_path / "cut.npz") as found:
        assert found["incomplete"].all()
    assert f"{N_QUERIES:,} queries" in cotra("search", *bounded).stdout


@pytest.fixture(scope="module")
def clustered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of vectors in groups, in an index of three shards with neighbours together, and inverted lists."""
    path = tmp_path_factory.mktemp("clustered")
    rng = np.random.default_rng(6)
    centres = rng.normal(size=(24, DIM))
    base, queries = (
        (centres[rng.integers(0, 24, n)] + 0.3 * rng.normal(size=(n, DIM))).astype(np.float32)
        for n in (1800, N_QUERIES)
    )
    truth = np.stack([np.argsort(distances("l2", query, base))[:10] for query in queries])
    for name, array in (("base", base), ("queries", queries), ("gt", truth)):
        np.save(path / f"{name}.npy", array)
    knobs = ("--shards", 3, "--partition", "kmeans", "--ivf", 30, "--ivf-bits", 4, "--threads", 1)
    built = answer("build", path / "base.npy", path / "index", *knobs)
    assert (built["partition"], sum(shard["count"] for shard in built["shards"])) == ("kmeans", 1800)
    assert 1 <= built["compass_shards"] < 2
    return path


@pytest.fixture(scope="module")
def served_clusters(clustered: Path) -> Iterator[OwnerProcess]:
    """The owner of the three shards with lists."""
    with OwnerProcess([clustered / "index"], transports=("shm", "rpc")) as owner:
        yield owner


def test_algorithms(clustered: Path, served_clusters: OwnerProcess) -> None:
    asked = ("search", *served_clusters.addresses, "--queries", clustered / "queries.npy")
    asked += ("--ground-truth", clustered / "gt.npy")
    for algorithm, path, rounds, options in (
        ("spire", "shm", 2, ("--ef", 15)),
        ("compass+scatter-gather", "rpc", 1, ()),
        ("compass", "shm", None, ("--explain", "--target-recall", 0.95)),
    ):
        found = answer(*asked, "--algorithm", algorithm, *options)
        assert found["algorithm"] == algorithm
        assert found["recall"] > 0.9
        assert (found["coverage"], found["failures"]) == (1.0, {})
        assert found["transports"] == dict.fromkeys(served_clusters.addresses, path)
        assert found["rounds_per_query"] == rounds if rounds else found["rounds_per_query"] > 2
        assert found["shards_per_query"] < 2 if algorithm.startswith("compass") else found["shards_per_query"] == 3
        ways = [way["algorithm"] for way in found["predictions"]]
        assert sorted(ways) == (["cotra", "scatter-gather", "spire"] if "--explain" in options else [])
    expected = found["predictions"]
    assert expected[0]["algorithm"] == "cotra"
    assert set(expected[0]) == {
        *("algorithm", "seconds", "reads", "rounds", "bytes", "owner_cpu_s", "shards", "allowed", "why"),
    }
    (gathered,) = (way for way in expected if way["algorithm"] == "scatter-gather")
    assert (gathered["allowed"], gathered["why"]) == (False, "the owners' CPU is not to be used")
    assert expected[0]["shards"] == pytest.approx(found["shards_per_query"])
    failed = cotra(*asked, "--algorithm", "hnsw", "--json", status=1)
    assert "algorithm must be one of auto, cotra" in json.loads(failed.stderr)["error"]["message"]


def test_explain(clustered: Path, served_clusters: OwnerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # no cell is broken
    asked = ("search", *served_clusters.addresses, "--queries", clustered / "queries.npy", "--explain")
    shown = cotra(*asked, "--algorithm", "auto").stdout
    lines = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in shown.splitlines()]
    columns = ["way", "batch, ms", "READs", "rounds", "KiB", "owners' CPU, us", "shards", ""]
    rows = [line for line in lines[lines.index(columns) + 1 :] if len(line) == len(columns)]
    expected = [row[0].removesuffix(", expected") for row in rows[:3]]
    assert sorted(expected) == ["cotra", "scatter-gather", "spire"]
    assert rows[0][-1] == "taken"
    assert rows[expected.index("scatter-gather")][-1] == "the owners' CPU is not to be used"
    assert all(float(row[1].replace(",", "")) >= 0 for row in rows)
    (measured,) = rows[3:]
    done = measured[0].removesuffix(", measured")
    assert done in (expected[0], "compass" if expected[0] == "cotra" else f"compass+{expected[0]}")
    assert ["algorithm", done] in lines
    assert measured[5] == "-"  # nobody measures the owners' CPU from here


def test_allow_partial(clustered: Path) -> None:
    """An owner that refuses to search is a shard that fails."""
    files = [clustered / "index" / f"shard-{number:03d}.cotra" for number in range(3)]
    with (
        OwnerProcess(files[:2], transports=("shm", "rpc")) as willing,
        OwnerProcess(files[2:], transports=("shm",)) as refusing,
    ):
        addresses = [*willing.addresses, *refusing.addresses]
        asked = ("search", *addresses, "--queries", clustered / "queries.npy", "--algorithm", "scatter-gather")
        failed = json.loads(cotra(*asked, "--json", status=1).stderr)["error"]
        assert (failed["type"], failed["shard"]) == ("PartialResultError", 2)
        assert failed["message"].startswith("1 of 3 shards failed: shard 2 ")
        partial = answer(*asked, "--allow-partial")
        assert partial["coverage"] == pytest.approx(2 / 3)
        assert list(partial["failures"]) == refusing.addresses
        assert "does not offer rpc" in partial["failures"][addresses[2]]
        shown = cotra(*asked, "--allow-partial").stdout
        assert f"no answer from {addresses[2]}" in shown
        assert "67% of the shards" in shown


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_serve_cleanly(data: Path, number: signal.Signals) -> None:
    command = [*COTRA, "serve", str(data / "index"), "--json", "--transport", "shm,rpc"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["shards"]
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
        assert (process.returncode, errors) == (0, b"")


def test_an_owner_process_ends_with_the_one_that_started_it(data: Path) -> None:
    program = (
        "import sys; from cotra_rdma._owner.child_process import OwnerProcess; "
        "owner = OwnerProcess(sys.argv[1:], transports=('rpc',)); owner.wait_ready(); assert owner.cpu_s() > 0; "
        "print(owner.pid, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(data / "index")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        owner = os.pidfd_open(int(parent.stdout.readline()))
        parent.kill()
    ended, _, _ = select.select([owner], [], [], 30)
    os.close(owner)
    assert ended


def test_an_owner_that_cannot_start_says_why(data: Path) -> None:
    with (
        OwnerProcess([data / "small_base.npy"], transports=("rpc",)) as owner,
        pytest.raises(PeerError, match=r"did not start: .*small_base\.npy"),
    ):
        owner.wait_ready()


def test_verbs_by_name_where_there_is_none_says_why(data: Path, served: OwnerProcess) -> None:
    failed = cotra(
        *("search", *served.addresses, "--queries", data / "small_queries.npy", "--transport", "verbs", "--json"),
        status=1,
    )
    assert "verbs" in json.loads(failed.stderr)["error"]["message"]


def test_doctor_names_the_path_that_works(served: OwnerProcess) -> None:
    report = json.loads(cotra("doctor", "--peer", served.addresses[0], "--json", status=1).stdout)
    (peer,) = (check for check in report["checks"] if check["name"].startswith("peer"))
    assert peer["status"] == "failed"
    assert "shm" in peer["seen"]
    (owner,) = (check for check in report["checks"] if check["name"].startswith("owner"))
    assert owner["status"] == "ok"
    assert re.match(r"answers in \d+ us, and offers shm, rpc$", owner["seen"])


@pytest.mark.parametrize(("address", "why"), [("127.0.0.1:1", "nobody listens there"), ("nonsense", "HOST:PORT")])
def test_doctor_tells_an_owner_that_cannot_be_reached_from_a_path_that_does_not_work(address: str, why: str) -> None:
    report = json.loads(cotra("doctor", "--peer", address, "--json", status=1).stdout)
    about = [check for check in report["checks"] if address in check["name"]]
    assert [(check["name"], check["status"]) for check in about] == [(f"owner {address}", "failed")]
    assert why in about[0]["seen"]


def test_bench(data: Path, tmp_path: Path) -> None:
    transports = ("shm", "rpc", "local", "model:rtt=0", "model:rtt=5us")
    done = cotra(
        *("bench", "--dataset", data / "small", "--ef", "16,64", "--transport", ",".join(transports)),
        *("--repeats", 2, "--cache", tmp_path, "--json"),
    )
    first, *rows, last = map(json.loads, done.stdout.splitlines())
    assert first["environment"]["command"].startswith("cotra bench --dataset")
    assert [(row["system"], row["transport"]) for row in rows[:6]] == [
        ("hnswlib", None),
        *(("cotra", transport) for transport in transports),
    ]
    assert len(rows) == 12
    by_path = {row["transport"]: row for row in rows[6:]}
    assert len({by_path[path]["recall"] for path in transports}) == 1
    assert by_path["shm"]["owner_cpu_us_per_query"] < by_path["rpc"]["owner_cpu_us_per_query"]
    for path in set(transports) - {"rpc"}:
        assert by_path[path]["batch_overhead"] > 0
        assert by_path[path]["overhead_us"] > 0
        assert by_path[path]["p50_us"] < by_path[path]["call_us"]
    assert by_path["rpc"]["batch_overhead"] is None
    assert by_path["model:rtt=5us"]["latency_model_ratio"] > 0.5
    assert by_path["model:rtt=0"]["latency_model_ratio"] is None
    assert len(last["summary"]) == 12
    assert len(list(tmp_path.iterdir())) == 2


def test_bench_with_a_cache_of_records(data: Path, tmp_path: Path) -> None:
    command = ["bench", "--dataset", data / "small", "--ef", 16, "--transport", "shm,local,rpc,model:rtt=1us"]
    command += ["--cache-bytes", "0,200000,30%", "--queries-zipf", "1:300", "--compare", "none", "--repeats", 1]
    _, *rows, last = map(json.loads, cotra(*command, "--cache", tmp_path, "--json").stdout.splitlines())
    assert [row["transport"] for row in rows] == [*["shm"] * 3, *["local"] * 3, "rpc", *["model:rtt=1us"] * 3]
    for none, some, most in (rows[:3], rows[3:6], rows[7:]):
        assert (none["cache_bytes"], some["cache_bytes"]) == (0, 200_000)
        assert none["recall"] == some["recall"] == most["recall"]
        assert 0 == none["cached_records_per_query"] < some["cached_records_per_query"]
        assert none["reads_per_query"] > some["reads_per_query"] > most["reads_per_query"]
    assert len({line["cache_bytes"] for line in last["summary"]}) == 3


def test_bench_beside_every_library(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("faiss", "usearch", "rabitqlib"):
        pytest.importorskip(name)
    command = ["bench", "--dataset", data / "small", "--rows", 2000, "--ef", "16,128"]
    command += ["--repeats", 2, "--threads", "1,2", "--cache", tmp_path]
    command += ["--compare", "hnswlib,faiss,usearch,rabitqlib", "--transport", "local", "--inflight", "0,4"]
    command += ["--build", "--ef-construction", 40, "--report", tmp_path / "report.html"]
    _, *rows, last = map(json.loads, cotra(*command, "--json").stdout.splitlines())
    assert [row["build"]["n_threads"] for row in rows[-2:]] == [1, 2]
    assert len(rows) == 2 * 2 * 6 + 2
    assert {row["n"] for row in rows[:-2]} == {2000}
    assert all(row["recall"] > 0.9 for row in rows[:-2] if row["ef"] == 128)
    reached = [line for line in last["summary"] if line["qps"] and line["system"] == "cotra"]
    for line in reached:
        assert all(ratio["min"] <= ratio["median"] <= ratio["max"] for ratio in line["qps_ratios"].values())
    assert (tmp_path / "report.html").stat().st_size > 10_000
    monkeypatch.setenv("COLUMNS", "200")
    shown = cotra(*command).stdout
    assert "Recall and speed" in shown
    assert "x usearch" in shown
    assert "x rabitqlib" in shown
    assert "of them padding" in shown


def test_bench_scaling(data: Path, tmp_path: Path) -> None:
    command = ["bench", "--scaling", "--dataset", data / "small", "--rows", 1600, "--shards", 2, "--ef", "16,32,64,128"]
    command += ["--repeats", 1, "--ef-construction", 60, "--machine", "8:64", "--local-share", 0.75, "--halo", 0.3]
    command += ["--cache", tmp_path / "cache", "--plot", tmp_path / "scaling.svg"]
    first, *rows, last = map(json.loads, cotra(*command, "--json").stdout.splitlines())
    assert first["environment"]["command"].startswith("cotra bench --scaling")
    graph = ("cotra, one graph", 2)
    assert {(row["algorithm"], row["shards"], row["transport"]) for row in rows} == {
        (None, 1, None),
        *((name, n, path) for name, n in (("cotra", 1), graph) for path in ("shm", FABRIC, "model:rtt=0")),
        ("cotra", 2, "shm"),
    }
    study = last["scaling"]
    one, ours, alone = study["rows"]
    assert [(row["shards"], row["one_graph"]) for row in study["rows"]] == [(1, True), (2, True), (2, False)]
    assert one["home_share"] == 1
    assert 0.5 < ours["home_share"] < 1
    assert alone["cost"]["reads"] > 1.2 * ours["cost"]["reads"]
    assert alone["cost"]["distances"] > 1.2 * ours["cost"]["distances"]
    assert ours["fabric"]["reads"] == ours["cost"]["reads"]  # over any transport the same
    assert ours["fabric"]["p50_us"] > 2 * ours["fabric"]["rounds"]
    reads = [row["cost"]["reads"] for row in study["sizes"]]
    assert [row["vectors"] for row in study["sizes"]] == [100, 200, 400, 800, 1600]
    assert reads == sorted(reads)
    assert study["targets"][0]["measured"] == pytest.approx(ours["cost"]["reads"] / one["cost"]["reads"])
    assert [target["bound"] for target in study["targets"]] == [*["<="] * 4, *[">="] * 2, *["<="] * 2]
    for target in study["targets"]:
        less = target["measured"] <= target["limit"]
        assert target["met"] == (less if target["bound"] == "<=" else not less)
    bare, haloed = study["homes"]
    assert (bare["halo"], bare["held"], haloed["halo"]) == (0, 0, 0.3)
    assert 0.25 < haloed["held"] <= 0.3
    assert 0.4 < bare["local"] == bare["own"] == haloed["own"] < haloed["local"] < 1
    assert sum(row["vectors"] for row in study["losses"]) == 1600
    assert study["machine"] == {"cores": 8, "memory_bytes": 64e9}
    assert study["workload"]["remote_per_doubling"] == pytest.approx(0.25)
    assert len(study["predictions"]) == 63
    assert (tmp_path / "scaling.svg").read_text(encoding="utf-8").startswith("<?xml")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--filter", 0.5, "--threads", "1,2"), "leave out --filter, --threads"),
        (("--transport", "shm,verbs"), "one path and one modelled fabric"),
        (("--transport", "shm,model:rtt=0"), "a model with a round trip"),
        (("--machine", "16"), "is not CORES:GB"),
        (("--halo", "0.5,-1"), "is no list of shares"),
        (("--halo", "inf"), "is no list of shares"),
        (("--shards", "1"), "several numbers of shards"),
        (("--rows", 900), "900 vectors are too few"),
        (("--plot", "curves.gif"), "its name must end in .png"),
    ],
)
def test_bench_refuses_a_study_before_it_measures(
    data: Path, tmp_path: Path, options: tuple[object, ...], reason: str
) -> None:
    done = refused("bench", "--scaling", "--dataset", data / "small", "--cache", tmp_path / "none", *options)
    assert done.exit_code in (1, 2)
    assert reason in done.stderr
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--rows", 3001), "has 3000 vectors, but the first 3001 are wanted"),
        (("--plot", "curves.gif"), "its name must end in .png"),
        (("--report", "report.pdf"), "its name must end in .html"),
        (("--transport", "model:rtt=5"), "'model:rtt=5' is not verbs"),
    ],
)
def test_bench_refuses_before_it_measures(data: Path, tmp_path: Path, options: tuple[object, ...], reason: str) -> None:
    failed = refused("bench", "--dataset", data / "small", "--cache", tmp_path / "none", *options, "--json")
    assert failed.exit_code == 1
    assert reason in json.loads(failed.stderr)["error"]["message"]
    assert not (tmp_path / "none").exists()
