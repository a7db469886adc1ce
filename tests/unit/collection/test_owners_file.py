"""owners.json: what many owners of one directory note at once is all there, and what is malformed is refused."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from cotra_rdma._build.collection import build_collection
from cotra_rdma._collection.manifest import MANIFEST, Collection
from cotra_rdma._collection.owners_file import OWNERS, add, addresses_of, load, misfit, prune, remove
from cotra_rdma.datasets import open_vectors
from cotra_rdma.errors import FormatError, InvalidInputError
from cotra_rdma.protocol.regions import ShardFields

HEAD = {"format": "cotra-owners", "format_version": 1}


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A collection of three shards."""
    path = tmp_path_factory.mktemp("owned")
    np.save(path / "base.npy", np.random.default_rng(1).normal(size=(60, 4)).astype(np.float32))
    with open_vectors(path / "base.npy") as vectors:
        build_collection(vectors, path / "index", 3, n_threads=1)
    return path / "index"


def test_owners_come_and_go(tmp_path: Path) -> None:
    assert load(tmp_path) == {}
    add(tmp_path, [(2, "10.0.0.1:7700"), (0, "10.0.0.1:7701")])
    add(tmp_path, [(2, "[fe80::1%eth0]:7700")])
    assert load(tmp_path) == {0: ["10.0.0.1:7701"], 2: ["10.0.0.1:7700", "[fe80::1%eth0]:7700"]}
    remove(tmp_path, [(2, "10.0.0.1:7700"), (0, "nobody:1"), (5, "10.0.0.1:7701")])
    assert load(tmp_path) == {0: ["10.0.0.1:7701"], 2: ["[fe80::1%eth0]:7700"]}
    remove(tmp_path, [(0, "10.0.0.1:7701"), (2, "[fe80::1%eth0]:7700")])
    assert json.loads((tmp_path / OWNERS).read_text()) == {**HEAD, "shards": {}}


def test_an_address_serves_one_shard(tmp_path: Path) -> None:
    """What a killed owner left goes when another listens where it did."""
    add(tmp_path, [(0, "a:1"), (1, "a:2"), (1, "b:1")])
    add(tmp_path, [(2, "a:1"), (1, "a:2")])
    assert load(tmp_path) == {1: ["b:1", "a:2"], 2: ["a:1"]}


def test_a_file_that_says_so_already_is_not_written_again(tmp_path: Path) -> None:
    add(tmp_path, [(0, "a:1")])
    before = (tmp_path / OWNERS).stat().st_ino
    add(tmp_path, [(0, "a:1")])
    remove(tmp_path, [(1, "a:1")])
    assert (tmp_path / OWNERS).stat().st_ino == before


def test_concurrent_owners_lose_nothing(tmp_path: Path) -> None:
    """Six processes, each with ten shards that come one by one, of which the odd ones go again."""
    program = (
        "import sys; from cotra_rdma._collection.owners_file import add, remove\n"
        "me = int(sys.argv[2])\n"
        "for n in range(10):\n"
        "    add(sys.argv[1], [(n, f'host{me}:{n + 1}')])\n"
        "    if n % 2: remove(sys.argv[1], [(n, f'host{me}:{n + 1}')])\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path), str(me)]) for me in range(6)]
    assert [process.wait(60) for process in running] == [0] * 6
    found = load(tmp_path)
    assert {number: sorted(addresses) for number, addresses in found.items()} == {
        number: [f"host{me}:{number + 1}" for me in range(6)] for number in range(0, 10, 2)
    }


def test_killed_owners_of_this_host_are_pruned(tmp_path: Path) -> None:
    """Where nobody listens, at an address of this host; what cannot be told from here stays."""
    with socket.create_server(("127.0.0.1", 0)) as alive, socket.create_server(("127.0.0.1", 0)) as dies:
        here, gone = (f"127.0.0.1:{server.getsockname()[1]}" for server in (alive, dies))
        elsewhere = ["192.0.2.1:7700", "[2001:db8::1]:7700", "owner.example:7700"]
        add(tmp_path, [(0, here), (0, gone), *((1, address) for address in elsewhere)])
        assert prune(tmp_path) == []
        dies.close()
        add(tmp_path, [(2, gone)])
        assert prune(tmp_path) == [gone]
        assert load(tmp_path) == {0: [here], 1: elsewhere}


def test_a_lock_that_is_not_given_back(tmp_path: Path) -> None:
    with (tmp_path / ".owners.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(TimeoutError, match="another process"):
            add(tmp_path, [(0, "a:1")], lock_timeout_s=0.05)
    add(tmp_path, [(0, "a:1")])
    assert load(tmp_path) == {0: ["a:1"]}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "malformed"),
        (b"\xff\xfe", "malformed"),
        (b"[" * 100_000, "malformed"),
        (b"null", "no cotra-owners"),
        (b"{}", "no cotra-owners"),
        (json.dumps({**HEAD, "shards": []}).encode(), "no cotra-owners"),
        (json.dumps({**HEAD, "format_version": 2, "shards": {}}).encode(), "version 2"),
        (b'{"format": "cotra-owners", "format_version": NaN, "shards": {}}', "version nan"),
        *(
            (json.dumps({**HEAD, "shards": {number: ["a:1"]}}).encode(), "not a shard's number")
            for number in ("", "-1", "01", "1.0", "x", "\u0663", "9" * 5000)
        ),
        *(
            (json.dumps({**HEAD, "shards": {"0": addresses}}).encode(), "needs a list")
            for addresses in ("a:1", None, {"a:1": 1})
        ),
        *(
            (json.dumps({**HEAD, "shards": {"0": ["a:1", address]}}).encode(), "is not HOST:PORT")
            for address in (
                *(
                    "",
                    "a",
                    "a:",
                    ":1",
                    "a:0",
                    "a:65536",
                    "a:1\n",
                    "a b:1",
                    "fe80::1:1",
                    "[x]:1",
                    "a:\u0661",
                    "../a:1",
                    "a..b:1",
                ),
                *("tcp://a:1", "a" * 400 + ":1", 7, None, ["a:1"]),
            )
        ),
    ],
)
def test_malformed_files_are_refused_and_stay(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / OWNERS).write_bytes(content)
    with pytest.raises(FormatError, match=reason):
        load(tmp_path)
    with pytest.raises(FormatError, match=reason):
        add(tmp_path, [(0, "a:1")])
    assert (tmp_path / OWNERS).read_bytes() == content


def test_a_file_without_end_is_refused(tmp_path: Path) -> None:
    add(tmp_path, [(0, "a:1")])
    os.truncate(tmp_path / OWNERS, (16 << 20) + 1)
    with pytest.raises(FormatError, match="more than 16777216 bytes"):
        load(tmp_path)


@pytest.mark.parametrize(("number", "address"), [(-1, "a:1"), (0, "a"), (0, "a:0"), (0, "tcp://a:1")])
def test_what_is_no_owner_is_not_noted(tmp_path: Path, number: int, address: str) -> None:
    with pytest.raises(InvalidInputError, match="HOST:PORT"):
        add(tmp_path, [(0, "a:1"), (number, address)])
    assert not (tmp_path / OWNERS).exists()


def test_addresses_of_a_carried_manifest(index: Path, tmp_path: Path) -> None:
    """Manifest and owners.json are all that a reader needs; leftovers of an earlier, larger collection are looked over."""
    (tmp_path / MANIFEST).write_bytes((index / MANIFEST).read_bytes())
    assert addresses_of(tmp_path) == [[], [], []]
    add(tmp_path, [(0, "a:1"), (2, "b:1"), (2, "c:1"), (3, "d:1")])
    for path in (tmp_path, tmp_path / MANIFEST, str(tmp_path)):
        assert addresses_of(path) == [["a:1"], [], ["b:1", "c:1"]]
    for path in (tmp_path / OWNERS, tmp_path / "nowhere", index / "shard-000.cotra"):
        with pytest.raises(FormatError, match="neither a directory"):
            addresses_of(path)
    os.remove(tmp_path / MANIFEST)
    with pytest.raises(FormatError, match=MANIFEST):
        addresses_of(tmp_path)


def test_owners_of_another_shard_are_told_apart(index: Path) -> None:
    collection = Collection.load(index)
    good = ShardFields(4, "l2", 20, 1, collection.shards[1].image_bytes, 0)
    assert misfit(collection, 1, good) == ""
    older = ShardFields(4, "l2", 20, 7, good.image_bytes, 0)
    assert misfit(collection, 1, older) == "generation 7, and the manifest has 1"
    entry = collection.shards[1]
    place = (collection.graph_id, entry.base, collection.count)
    told = ShardFields(4, "l2", 20, 1, good.image_bytes, 0, *place, entry.image_checksum)
    assert misfit(collection, 1, told) == ""
    assert entry.image_checksum is not None
    another = msgspec.structs.replace(told, image_checksum=entry.image_checksum ^ 1)
    assert "an image with checksum" in misfit(collection, 1, another)
    assert "nodes from 7 of graph" in misfit(collection, 1, msgspec.structs.replace(told, graph_base=7))
    for other in (
        ShardFields(5, "l2", 20, 1, good.image_bytes, 0),
        ShardFields(4, "ip", 20, 1, good.image_bytes, 0),
        ShardFields(4, "l2", 21, 1, good.image_bytes, 0),
        ShardFields(4, "l2", 20, 1, good.image_bytes + 64, 0),
    ):
        assert misfit(collection, 1, other).endswith(f"and the manifest has 20 x 4, l2, in {good.image_bytes}")
