"""A collection that is carried: served shard by shard from processes of their own, found by its owners.json, searched, told."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from cotra_rdma._build.collection import build_collection
from cotra_rdma._collection.manifest import MANIFEST
from cotra_rdma._collection.owner_probe import ask_owners
from cotra_rdma._collection.owners_file import OWNERS, add, load
from cotra_rdma._diagnose.inspection import inspect_collection, inspect_owners
from cotra_rdma._owner.child_process import OwnerProcess
from cotra_rdma.datasets import open_vectors

Floats = npt.NDArray[np.float32]
N, N_SHARDS = 1500, 3
HERE = ("shm", "rpc")


def cotra(*arguments: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cotra_rdma.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == status, done.stderr
    return done


def answer(*arguments: object, status: int = 0) -> Any:
    return json.loads(cotra(*arguments, "--json", status=status).stdout)


@pytest.fixture(scope="module")
def built(words: Floats, queries: Floats, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,500 words in three shards of one graph; beside it queries and their exact neighbours."""
    path = tmp_path_factory.mktemp("built")
    np.save(path / "base.npy", words[:N])
    np.save(path / "queries.npy", queries[:50])
    unit = words[:N] / np.linalg.norm(words[:N], axis=1, keepdims=True)
    np.save(path / "gt.npy", np.argsort(-queries[:50] @ unit.T, axis=1)[:, :10])
    with open_vectors(path / "base.npy") as vectors:
        build_collection(
            vectors, path / "index", N_SHARDS, metric="cosine", M=8, ef_construction=60, graph="global", n_threads=1
        )
    return path


@pytest.fixture
def index(built: Path, tmp_path: Path) -> Path:
    """A copy of the collection: who serves it writes into its directory."""
    shutil.copytree(built / "index", tmp_path / "index")
    return tmp_path / "index"


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as owners:
        yield owners


def served(stack: ExitStack, index: Path, *shards: int) -> OwnerProcess:
    """An owner that is ready, so that the next one is noted after it."""
    owner = stack.enter_context(OwnerProcess([index], shards=shards, transports=HERE, announce=True))
    owner.wait_ready()
    return owner


def only_shard(index: Path, number: int, to: Path) -> Path:
    """What the owner of one shard needs."""
    to.mkdir()
    for name in (MANIFEST, f"shard-{number:03d}.cotra", f"shard-{number:03d}.coarse"):
        shutil.copy(index / name, to)
    return to


def test_served_by_three_searched_by_the_manifest(built: Path, index: Path, tmp_path: Path, stack: ExitStack) -> None:
    owners = [served(stack, index, number) for number in range(N_SHARDS)]
    addresses = [owner.addresses[0] for owner in owners]
    assert load(index) == {number: [address] for number, address in enumerate(addresses)}
    (tmp_path / "reader").mkdir()
    for name in (MANIFEST, OWNERS):
        shutil.copy(index / name, tmp_path / "reader")
    asked = ("--queries", built / "queries.npy", "--ground-truth", built / "gt.npy")
    for path in (index, tmp_path / "reader" / MANIFEST):
        found = answer("search", path, *asked)
        assert found["recall"] > 0.95
        assert found["transports"] == dict.fromkeys(addresses, "shm")
        assert (found["coverage"], found["failures"]) == (1.0, {})
    told = answer("info", index)
    assert told["problems"] == []
    for shard, address in zip(told["shards"], addresses, strict=True):
        (owner,) = shard["owners"]
        assert (owner["address"], owner["answers"], owner["generation"]) == (address, True, 1)
        assert (owner["transports"], owner["problem"]) == (list(HERE), "")
        assert 0 < owner["latency_us"] < 1e6
    for owner in owners:
        owner.close()
    assert load(index) == {}


def test_the_owner_of_one_shard_needs_no_other(index: Path, tmp_path: Path, stack: ExitStack) -> None:
    alone = only_shard(index, 1, tmp_path / "alone")
    owner = served(stack, alone, 1)
    assert owner.wait_ready()["shards"][0]["announced"] == owner.addresses[0]
    assert load(alone) == {1: owner.addresses}
    failed = json.loads(cotra("serve", alone, "--shard", 0, "--json", status=1).stderr)["error"]
    assert "shard-000.cotra" in failed["message"]
    failed = json.loads(cotra("serve", alone, "--json", status=1).stderr)["error"]
    assert "shard-000.cotra" in failed["message"]


def test_a_lost_owner(built: Path, index: Path, stack: ExitStack) -> None:
    """What a killed owner left is passed over where there is a replica, and named where there is none."""
    lost, *_ = owners = [served(stack, index, 0), served(stack, index, 1, 2), served(stack, index, 0)]
    gone, replica = lost.addresses[0], owners[2].addresses[0]
    os.kill(lost.pid, signal.SIGKILL)
    lost.close()
    assert load(index)[0] == [gone, replica]
    asked = ("search", index, "--queries", built / "queries.npy", "--ground-truth", built / "gt.npy")
    found = answer(*asked)
    assert found["recall"] > 0.95
    assert list(found["transports"]) == [replica, *owners[1].addresses]
    both = answer("search", f"{gone},{replica}", *owners[1].addresses, *asked[2:])
    assert both["transports"] == found["transports"]
    told = answer("info", index)
    assert [owner["answers"] for owner in told["shards"][0]["owners"]] == [False, True]
    assert told["problems"] == []
    owners[2].close()
    failed = json.loads(cotra(*asked, "--no-allow-partial", "--json", status=1).stderr)["error"]
    assert (failed["type"], failed["shard"]) == ("TransportError", 0)
    assert failed["message"].startswith(f"1 of 3 shards have no owner that answers: shard 0 ({gone}) cannot be reached")
    partial = answer(*asked)
    assert partial["coverage"] == pytest.approx(2 / 3)
    assert list(partial["failures"]) == ["shard 0"]
    assert partial["transports"] == {"shard 0": "lost", **dict.fromkeys(owners[1].addresses, "shm")}
    assert partial["recall"] < found["recall"]
    assert "no answer from shard 0" in cotra(*asked, "--allow-partial").stdout
    told = answer("info", index, status=1)
    assert told["problems"] == []
    assert [why.partition(":")[0] for why in told["unserved"]] == ["shard 0"]
    shown = cotra("info", index, status=1).stdout
    assert "not served: shard 0: no owner that can be used" in shown
    assert "does not fit" not in shown
    assert "no answer: " in shown
    assert "until `cotra serve` is started again on their host" in shown
    back = served(stack, index, 0)
    assert load(index)[0] == back.addresses  # the killed one's address is gone
    assert "no answer" not in cotra("info", index).stdout


def set_generation(index: Path, generation: int) -> None:
    raw = json.loads((index / MANIFEST).read_text())
    for entry in (raw, *raw["shards"]):
        entry["generation"] = generation
    (index / MANIFEST).write_text(json.dumps(raw))


def test_an_owner_of_another_generation_is_not_searched(built: Path, index: Path, stack: ExitStack) -> None:
    addresses = served(stack, index).addresses
    set_generation(index, 2)
    failed = json.loads(cotra("search", index, "--queries", built / "queries.npy", "--json", status=1).stderr)["error"]
    assert "serves generation 1, and the manifest has 2" in failed["message"]
    problems = inspect_collection(index).problems
    for number, address in enumerate(addresses):
        assert f"shard {number}: {address} serves generation 1, and the manifest has 2" in problems
    add(index, [(0, addresses[1])])  # a shard that is not that one
    set_generation(index, 1)
    found = inspect_collection(index)
    assert f"shard 0: {addresses[1]} serves" in "\n".join(found.problems)
    assert found.unserved == ["shard 1: no owner is noted in owners.json"]


def test_records_are_read_from_owners(index: Path, tmp_path: Path, stack: ExitStack) -> None:
    """The same figures whether a shard's file is here or its owner's memory is read."""
    addresses = served(stack, index).addresses
    (tmp_path / "reader").mkdir()
    for name in (MANIFEST, OWNERS):
        shutil.copy(index / name, tmp_path / "reader")
    here, there = inspect_collection(index), inspect_collection(tmp_path / "reader", records=True)
    named = inspect_owners([[address] for address in addresses], records=True)
    assert here.problems == there.problems == named.problems == []
    for shard, *others in zip(here.shards, there.shards, named.shards, strict=True):
        assert shard.graph is not None
        for other in others:
            assert (other.info, other.here) == (shard.info, False)
            assert other.graph is not None
            for name in ("degrees", "levels", "links_to"):
                np.testing.assert_array_equal(getattr(other.graph, name), getattr(shard.graph, name))
            assert other.graph.links_inside == shard.graph.links_inside
    told = answer("info", *addresses)
    assert (told["collection"], told["cross_share"], told["count"]) == (None, None, N)
    assert [shard["header"] for shard in told["shards"]] == [None] * N_SHARDS
    assert told["balance"] == here.balance


def test_memory_that_cannot_be_read_is_told(index: Path, stack: ExitStack) -> None:
    owner = stack.enter_context(OwnerProcess([index / "shard-000.cotra"], transports=("rpc",)))
    told = answer("info", owner.addresses[0], "--records", status=1)
    assert "cannot be read" in told["problems"][0]
    assert told["shards"][0]["count"] > 0
    assert not (index / OWNERS).exists()


def test_replicas_that_are_not_alike_are_told(index: Path, stack: ExitStack) -> None:
    one, other, _ = served(stack, index).addresses
    told = answer("info", f"{one},{other}", "127.0.0.1:1", status=1)
    assert f"shard 0: {other} serves another shard than {one}" in told["problems"]
    assert [why.startswith("shard 1 at 127.0.0.1:1: ") for why in told["unserved"]] == [True]


@pytest.mark.parametrize(
    ("options", "noted", "warning"),
    [
        (("--listen", "0.0.0.0:0", "--insecure"), None, "not noted in owners.json"),
        (("--listen", "0.0.0.0:0", "--insecure", "--no-announce"), None, "served without TLS"),
        (("--listen", "0.0.0.0:0", "--insecure", "--announce", "127.0.0.1"), "127.0.0.1:{port}", "served without TLS"),
        (("--announce", "[::1]:7000"), "[::1]:7000", ""),
        (("--announce", "index.example:70"), "index.example:70", ""),
    ],
)
def test_what_is_announced(index: Path, options: tuple[str, ...], noted: str | None, warning: str) -> None:
    command = [sys.executable, "-m", "cotra_rdma.cli", "serve", str(index), "--shard", "1", "--json"]
    command += ["--transport", "shm,rpc", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        (shard,) = json.loads(process.stdout.readline())["shards"]
        expected = noted and noted.format(port=shard["address"].rpartition(":")[2])
        found = load(index)
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=30)
    assert process.returncode == 0
    assert shard["announced"] == expected
    assert found == ({} if expected is None else {1: [expected]})
    assert load(index) == {}
    assert warning in told if warning else told == ""


def test_a_directory_that_cannot_be_written_is_served_all_the_same(index: Path) -> None:
    (index / OWNERS).write_text("{")  # whoever runs the tests could write into a directory that is read-only
    command = [sys.executable, "-m", "cotra_rdma.cli", "serve", str(index), "--json", "--transport", "shm,rpc"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        shards = json.loads(process.stdout.readline())["shards"]
        statuses = ask_owners([shard["address"] for shard in shards], 5.0)
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=30)
    assert [shard["announced"] for shard in shards] == [None] * N_SHARDS
    assert [status.problem for status in statuses] == [""] * N_SHARDS
    assert (process.returncode, told.count("\n")) == (0, 1)
    assert told.startswith("warning: not noted in ")
    assert (index / OWNERS).read_text() == "{"
