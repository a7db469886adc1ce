"""One graph built on a machine for each shard, over loopback: the bytes of one process, and builders that are not well."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from cotra_rdma import CotraError, DeadlineError, FormatError, InvalidInputError, PeerError, Shard, TransportError
from cotra_rdma._build.collection import build_collection
from cotra_rdma._build.machine import build_on_machine
from cotra_rdma._build.mail import CountsMessage, HelloMessage, RowsMessage
from cotra_rdma._build.network_mail import NetworkMail
from cotra_rdma.datasets import open_vectors
from cotra_rdma.protocol.rpc_server import RpcServer
from cotra_rdma.protocol.tables import BuildExchangeRequest

Floats = npt.NDArray[np.float32]
N, N_SHARDS = 1500, 3
GONE = (PeerError, TransportError)  # who notices first tells; what it was doing then is a matter of chance
KNOBS: dict[str, Any] = {"metric": "cosine", "M": 8, "ef_construction": 40, "n_threads": 1}


@pytest.fixture(scope="module")
def source(words: Floats, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "base.npy"
    np.save(path, words[:N])
    return path


@pytest.fixture
def addresses() -> list[str]:
    """Free ports of loopback, one a builder."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(N_SHARDS)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]


@contextmanager
def builder(source: Path, out: Path, shard: int, addresses: list[str], *more: str) -> Iterator[subprocess.Popen[str]]:
    """`cotra build --shard` in a process of its own. Builders differ in BLAS's threads, which change nothing."""
    command = [
        sys.executable,
        "-P",
        "-m",
        "cotra_rdma.cli",
        "build",
        str(source),
        str(out),
        "--graph",
        "global",
        "--json",
    ]
    command += ["--shards", str(len(addresses)), "--shard", str(shard), "--peers", ",".join(addresses)]
    command += ["--metric", "cosine", "--M", "8", "--ef-construction", "40", "--threads", "1", "--timeout", "60", *more]
    env = dict(os.environ) | {"OPENBLAS_NUM_THREADS": str(1 + shard % 2)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("shared", [True, False], ids=["shared directory", "directories"])
def test_three_machines_make_the_bytes_of_one_process(
    source: Path, tmp_path: Path, addresses: list[str], shared: bool
) -> None:
    with open_vectors(source) as vectors:
        build_collection(vectors, tmp_path / "here", N_SHARDS, graph="global", **KNOBS, n_lists=12)
    outs = [tmp_path / "out" / ("all" if shared else str(number)) for number in range(N_SHARDS)]
    (tmp_path / "out").mkdir()
    with ExitStack() as stack:
        builders = [
            stack.enter_context(builder(source, outs[number], number, addresses, "--ivf", "12"))
            for number in range(N_SHARDS)
        ]
        for process in builders:
            said, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
            told = json.loads(said)
            assert told["builders"][0]["peak_bytes"] > 1 << 20
            assert len(told["shards"]) == N_SHARDS
    expected = {path.name: path.read_bytes() for path in (tmp_path / "here").iterdir()}
    for number, out in enumerate(outs):
        found = {path.name: path.read_bytes() for path in out.iterdir()}
        own = (f"shard-{number:03d}.cotra", f"shard-{number:03d}.coarse", "collection.json")
        assert found == (expected if shared else {name: expected[name] for name in own})


def test_a_builder_that_is_killed_ends_the_others(source: Path, tmp_path: Path, addresses: list[str]) -> None:
    with ExitStack() as stack:
        processes = [stack.enter_context(builder(source, tmp_path / str(n), n, addresses)) for n in (0, 1)]

        def kill(phase: str, _done: int) -> None:
            if phase == "build":
                processes[1].kill()

        with open_vectors(source) as vectors, pytest.raises(GONE, match=r"shard 1 \(") as caught:
            build_on_machine(vectors, tmp_path / "2", 2, addresses, **KNOBS, timeout_s=60, progress=kill)
        assert caught.value.shard == 1
        _, errors = processes[0].communicate(timeout=60)
        assert processes[0].returncode == 1
        error = json.loads(errors.splitlines()[-1])["error"]
        assert error["shard"] == 1
        assert error["type"] in [kind.__name__ for kind in GONE]
    assert not (tmp_path / "2").exists()
    assert not (tmp_path / "0").exists()


def test_a_builder_that_never_comes(source: Path, tmp_path: Path, addresses: list[str]) -> None:
    with open_vectors(source) as vectors, pytest.raises(DeadlineError, match=r"shard 1 \(.*has been silent") as caught:
        build_on_machine(vectors, tmp_path / "out", 0, addresses[:2], **KNOBS, timeout_s=0.2)
    assert caught.value.shard == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("knobs", "words_from", "reason"),
    [({"M": 9}, 0, "is built with M"), ({}, 1, "other vectors"), ({"ef_construction": 41}, 0, "ef_construction")],
)
def test_builders_that_build_something_else(
    source: Path,
    tmp_path: Path,
    addresses: list[str],
    words: Floats,
    knobs: dict[str, Any],
    words_from: int,
    reason: str,
) -> None:
    np.save(tmp_path / "other.npy", words[words_from : N + words_from])
    errors: list[CotraError] = []

    def build(path: Path, number: int, **knobs: Any) -> None:
        with open_vectors(path) as vectors:
            try:
                build_on_machine(
                    vectors, tmp_path / str(number), number, addresses[:2], **(KNOBS | knobs), timeout_s=30
                )
            except CotraError as error:
                errors.append(error)

    other = threading.Thread(target=build, args=(tmp_path / "other.npy", 1), kwargs=knobs)
    other.start()
    build(source, 0)
    other.join()
    assert [type(error) for error in errors] == [PeerError, PeerError]
    assert all(reason in str(error) for error in errors), errors
    assert not (tmp_path / "0").exists()
    assert not (tmp_path / "1").exists()


@pytest.mark.parametrize(
    ("shard", "peers", "reason"),
    [
        (0, ["127.0.0.1:1"], "two or more"),
        (2, ["127.0.0.1:1", "127.0.0.1:2"], "shard 2 of 2"),
        (0, ["127.0.0.1:1", "127.0.0.1:1"], "different addresses"),
        (0, ["127.0.0.1:0", "127.0.0.1:2"], "its port"),
        (0, ["127.0.0.1", "127.0.0.1:2"], "HOST:PORT"),
    ],
)
def test_places_that_make_no_sense(source: Path, tmp_path: Path, shard: int, peers: list[str], reason: str) -> None:
    with open_vectors(source) as vectors, pytest.raises(InvalidInputError, match=reason):
        build_on_machine(vectors, tmp_path / "out", shard, peers)
    assert not (tmp_path / "out").exists()


# ---- messages between builders ----


@pytest.fixture
def mails(addresses: list[str]) -> Iterator[list[NetworkMail]]:
    """A mail for each builder. Messages go in parts of 1000 bytes."""
    with ExitStack() as stack:
        made = []
        for number, address in enumerate(addresses):
            made.append(NetworkMail(number, addresses, timeout_s=20, part_bytes=1000))
            stack.callback(made[-1].close)
            stack.enter_context(RpcServer(address, made[-1].answer))
        for mail in made:
            mail.meet()
        yield made


def test_messages_arrive_whole_and_once(mails: list[NetworkMail]) -> None:
    counts = CountsMessage(np.random.default_rng(1).integers(0, 256, 12_345, np.uint8).tobytes(), b"")
    rows = RowsMessage(b"for 2")
    mails[0].send(counts)
    mails[0].send(counts)
    mails[1].send(rows, 2)
    for mail in mails:
        assert mail.receive(CountsMessage, 0)[0] == counts
        assert mail.receive(CountsMessage, 0)[0] == counts
    assert mails[2].receive(RowsMessage, 1)[0] == rows


def test_who_gives_up_tells_all_why(mails: list[NetworkMail]) -> None:
    mails[0].fail(DeadlineError("shard 1 has been silent", shard=1))
    with pytest.raises(PeerError, match=r"shard 0 .* gave up: DeadlineError: shard 1 has been silent") as caught:
        mails[2].receive(CountsMessage, 1)
    assert caught.value.shard == 1
    with pytest.raises(PeerError, match="gave up"):
        mails[2].send(RowsMessage(b""))


def test_a_builder_that_was_started_anew_is_refused(mails: list[NetworkMail], addresses: list[str]) -> None:
    mails[0].send(HelloMessage({}, 1, ""))
    again = NetworkMail(0, addresses, timeout_s=20)
    with pytest.raises(PeerError, match="started anew") as caught:
        again.send(HelloMessage({}, 1, ""), 1)
    assert caught.value.shard == 1
    again.close()


def test_nobody_sends_in_the_name_of_a_builder_that_listens_elsewhere(addresses: list[str]) -> None:
    """Whoever is first: what counts is who answers at the builder's address."""
    with ExitStack() as stack:
        mails = [NetworkMail(number, addresses[:2], timeout_s=20) for number in (0, 1, 0)]
        for mail in mails:
            stack.callback(mail.close)
        for address, mail in zip(addresses, mails[:2], strict=False):
            stack.enter_context(RpcServer(address, mail.answer))
        thief = mails[2]
        with pytest.raises(DeadlineError, match="has not met this builder yet"):
            thief._call(1, thief._payload("divide", b""), 2.0)
        mails[0].meet()
        mails[1].meet()
        with pytest.raises(PeerError, match="started anew"):
            thief.send(RowsMessage(b"stolen"), 1)
        thief.fail(DeadlineError("stolen", shard=0))
        mails[0].send(RowsMessage(b"own"), 1)
        assert mails[1].receive(RowsMessage, 0)[0] == RowsMessage(b"own")


@pytest.mark.parametrize(
    ("sender", "fields"),
    [
        (0, {}),
        (3, {}),
        (1, {"part": 1}),
        (1, {"parts": 0}),
        (1, {"parts": 1 << 20}),
        (1, {"data": "text"}),
        (1, {"data": b"\xc1"}),
        (1, {"data": msgspec.msgpack.encode({"step": "divide"})}),
        (1, {"step": "count"}),
        (1, {"step": "failed", "data": b"\xc1"}),
        (1, {"run": None}),
    ],
)
def test_hostile_messages_are_refused(mails: list[NetworkMail], sender: int, fields: dict[str, Any]) -> None:
    rows = RowsMessage(b"1234")
    good = {"run": "a", "step": "divide", "part": 0, "parts": 1, "data": msgspec.msgpack.encode(rows)}
    with pytest.raises((FormatError, InvalidInputError)):
        mails[0].take(BuildExchangeRequest.empty(sender, good | {"run": mails[sender % N_SHARDS]._run} | fields))
    with pytest.raises(FormatError):
        mails[0].take(replace(BuildExchangeRequest.empty(1, good), told=None))
    mails[0].take(BuildExchangeRequest.empty(2, good | {"run": mails[2]._run}))
    assert mails[0].receive(RowsMessage, 2)[0] == rows


def test_a_shard_of_the_graph_can_be_searched(
    source: Path, tmp_path: Path, addresses: list[str], words: Floats
) -> None:
    """Two builders in one process, of which each publishes its own."""
    with open_vectors(source) as vectors:
        other = threading.Thread(
            target=build_on_machine, args=(vectors, tmp_path / "1", 1, addresses[:2]), kwargs=KNOBS | {"timeout_s": 60}
        )
        other.start()
        built = build_on_machine(vectors, tmp_path / "0", 0, addresses[:2], **KNOBS, timeout_s=60)
        other.join()
    assert (tmp_path / "0" / "collection.json").read_bytes() == (tmp_path / "1" / "collection.json").read_bytes()
    for number, entry in enumerate(built.shards):
        with Shard.open(tmp_path / str(number) / entry.name) as shard:
            labels = shard.labels()
            ids, _, _ = shard.search(words[labels[:50]], 1)
            assert (ids[:, 0] == labels[:50]).mean() > 0.9
