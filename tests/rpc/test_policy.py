"""Who may do what: rules by the names in certificates, which may change while an owner serves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import cotra_rdma
from cotra_rdma import BusyError, DeniedError, FormatError, InvalidInputError, Server, Shard, Tls
from cotra_rdma._owner.policy import Policy, PolicyFile, Rule
from cotra_rdma.protocol.certificates import make_certificate
from cotra_rdma.protocol.envelope import VShardEnvelope, VShardMessageType
from cotra_rdma.protocol.rpc_client import RpcClient
from cotra_rdma.protocol.tables import BuildExchangeRequest, BuildExchangeResponse
from helpers.begun import waited

Floats = npt.NDArray[np.float32]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("x", "policy.toml: Expected"),
        ("a = 1", "tables readers.NAME"),
        ("readers = 1", "tables readers.NAME"),
        ("readers.a = 1", "readers.a: is no table"),
        ('[readers.a]\ntransports = ["tcp"]', "transports = .* is no rule"),
        ('[readers.a]\ntransports = "rpc"', "transports = .* is no rule"),
        ("[readers.a]\nshards = [-1]", "shards = .* is no rule"),
        ("[readers.a]\nshards = [true]", "shards = .* is no rule"),
        ("[readers.a]\nqueue_pairs = true", "queue_pairs = .* is no rule"),
        ("[readers.a]\nbuild = 1", "build = .* is no rule"),
        ("[readers.a]\nbytes_per_s = 0", "bytes_per_s = 0 is no rule"),
        ("[readers.a]\nelse = 1", "else = 1 is no rule"),
    ],
)
def test_malformed_policies(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(text)
    with pytest.raises(FormatError, match=why):
        Policy.load(path)


def test_rules_by_name(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text('[readers.a]\nshards = [1]\nqueue_pairs = 3\n[readers."*"]\ntransports = ["rpc"]\n')
    policy = Policy.load(path)
    assert policy.rule_of(["x", "a"]) == Rule(shards=frozenset({1}), queue_pairs=3)
    assert policy.rule_of(["x"]) == policy.rule_of(["*"]) == Rule(frozenset({"rpc"}))
    assert policy.rule_of([]) is None  # who shows no certificate
    assert Policy({}).rule_of(["a"]) is None
    with pytest.raises(InvalidInputError, match="cannot be read"):
        PolicyFile(tmp_path / "gone")


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as parts:
        yield parts


@pytest.fixture
def certificates(tmp_path: Path) -> dict[str, Tls]:
    names = ("owner", "friend", "stranger")
    return {name: make_certificate(tmp_path / "keys", name, ["127.0.0.1"]) for name in names}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "policy.toml"
    path.write_text("[readers.friend]\n")
    return path


@pytest.fixture
def policy(path: Path, stack: ExitStack) -> PolicyFile:
    return stack.enter_context(PolicyFile(path))


@pytest.fixture
def server(words: Floats, certificates: dict[str, Tls], policy: PolicyFile, stack: ExitStack) -> Server:
    shard = stack.enter_context(Shard.build(words[:300], metric="cosine"))
    return stack.enter_context(
        cotra_rdma.serve(shard, transports=("shm", "rpc"), tls=certificates["owner"], policy=policy, number=1)
    )


def test_only_who_is_named_is_answered(server: Server, certificates: dict[str, Tls], words: Floats) -> None:
    with cotra_rdma.connect(server.address, "rpc", tls=certificates["friend"]) as cluster:
        assert cluster.search(words[:1], k=1).ids.tolist() == [[0]]
    with pytest.raises(DeniedError, match=r"stranger, 127.0.0.1 may not read this shard"):
        cotra_rdma.connect(server.address, tls=certificates["stranger"])


@pytest.mark.parametrize("rule", ["shards = [0]", "transports = []"])
def test_what_a_rule_does_not_allow(
    server: Server, certificates: dict[str, Tls], path: Path, policy: PolicyFile, words: Floats, rule: str
) -> None:
    write(path, policy, f"[readers.friend]\n{rule}\n")
    with pytest.raises(cotra_rdma.CotraError, match=r"may not|not allowed by the owner's policy"):
        cotra_rdma.connect(server.address, tls=certificates["friend"])


def test_a_path_that_is_not_allowed_is_passed_over(
    server: Server, certificates: dict[str, Tls], path: Path, policy: PolicyFile, words: Floats
) -> None:
    write(path, policy, '[readers.friend]\ntransports = ["rpc"]\n')
    with cotra_rdma.connect(server.address, tls=certificates["friend"]) as cluster:
        assert cluster.transports == ("rpc",)
        assert "not allowed by the owner's policy" in cluster.passed_over[0]["shm"]
        assert cluster.search(words[:1], k=1).ids.tolist() == [[0]]


def test_who_is_taken_out_is_denied_from_then_on_and_nobody_else(
    server: Server, certificates: dict[str, Tls], path: Path, policy: PolicyFile, words: Floats, stack: ExitStack
) -> None:
    write(path, policy, "[readers.friend]\n[readers.stranger]\n")
    friend, stranger = (
        stack.enter_context(cotra_rdma.connect(server.address, "rpc", tls=certificates[name]))
        for name in ("friend", "stranger")
    )
    stranger.search(words[:1])
    write(path, policy, "[readers.friend]\n")
    with pytest.raises(DeniedError):
        stranger.search(words[:1])
    assert friend.search(words[:1], k=1).ids.tolist() == [[0]]
    path.write_text("no policy")  # changes nothing
    assert friend.search(words[:1], k=1).ids.tolist() == [[0]]
    with pytest.raises(DeniedError):
        stranger.search(words[:1])


def test_who_is_over_its_rate_is_told_to_come_later_and_nobody_else(
    server: Server, certificates: dict[str, Tls], path: Path, policy: PolicyFile, words: Floats, stack: ExitStack
) -> None:
    write(path, policy, "[readers.friend]\nbytes_per_s = 1000\n[readers.stranger]\n")
    friend, stranger = (
        stack.enter_context(cotra_rdma.connect(server.address, "rpc", tls=certificates[name]))
        for name in ("friend", "stranger")
    )

    def searches_until_refused() -> None:
        while True:
            friend.search(words[:100])  # far more than its bytes of two seconds

    with pytest.raises(BusyError, match=r"friend, 127.0.0.1 has moved as many bytes .*: try again in \d+.\d s"):
        searches_until_refused()
    assert stranger.search(words[:1], k=1).ids.tolist() == [[0]]
    write(path, policy, "[readers.friend]\n")
    assert friend.search(words[:1], k=1).ids.tolist() == [[0]]


def test_tables_of_builders_are_for_those_who_may_build(
    server: Server, certificates: dict[str, Tls], path: Path, policy: PolicyFile
) -> None:
    request = VShardEnvelope(
        2, VShardMessageType.VECTOR_BUILD_EXCHANGE_REQUEST, 0, 0, 0, BuildExchangeRequest.empty(0, {}).encode()
    )
    with RpcClient(server.address, tls=certificates["friend"]) as client:
        with pytest.raises(DeniedError, match=r"friend, 127.0.0.1 may not build here"):
            client.call(request)
        write(path, policy, "[readers.friend]\nbuild = true\n")
        assert "takes no tables" in BuildExchangeResponse.decode(client.call(request).payload).message


def test_a_policy_takes_certificates(words: Floats, policy: PolicyFile) -> None:
    with Shard.build(words[:50]) as shard, pytest.raises(InvalidInputError, match="it takes tls"):
        cotra_rdma.serve(shard, policy=policy)


def write(path: Path, policy: PolicyFile, text: str) -> None:
    """Replaces the file, and waits until it was read."""
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    wanted = Policy.load(fresh)
    fresh.replace(path)
    waited(lambda: policy._policy == wanted)
