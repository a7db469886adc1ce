"""Owners in processes of their own, and how a check connects a queue pair with theirs."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cotra_rdma import MemoryRegion
from cotra_rdma._native.verbs import Device, QueuePair, QueuePairAttributes, QueuePairOptions
from cotra_rdma._owner.child_process import OwnerProcess
from cotra_rdma.protocol.envelope import WIRE_VERSION, VShardEnvelope, VShardMessageType, fields_of
from cotra_rdma.protocol.regions import (
    WANT_QUEUE_PAIR,
    QueuePairFields,
    RegionRequest,
    as_fields,
    decode_region_response,
    encode_region,
)
from cotra_rdma.protocol.rpc_client import RpcClient

OUT = Path(os.environ["COTRA_RXE_OUT"])
GENEROUS_S = 300.0  # for a search in a machine that is emulated, beside other work


def figure(line: str) -> None:
    """A measured figure, for the summary."""
    with (OUT / "figures.txt").open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")


def start(paths: list[Path], host: str, device_name: str) -> list[OwnerProcess]:
    """One owner process for each shard, on the device."""
    owners = [OwnerProcess([path], listen=f"{host}:0", device=device_name) for path in paths]
    for owner in owners:
        owner.wait_ready(GENEROUS_S)
    return owners


@contextmanager
def stopped(owners: list[OwnerProcess]) -> Iterator[None]:
    """Their processes do nothing meanwhile: what is found of them is found without them."""
    try:
        for owner in owners:
            os.kill(owner.pid, signal.SIGSTOP)
            assert os.WIFSTOPPED(os.waitpid(owner.pid, os.WUNTRACED)[1])
        yield
    finally:
        for owner in owners:
            os.kill(owner.pid, signal.SIGCONT)


def ask(address: str, local: QueuePairAttributes) -> tuple[QueuePairAttributes, MemoryRegion]:
    """Hands a queue pair's attributes over, as any peer would by message type 56; the owner's, and its region."""
    fields = as_fields(QueuePairFields, local)
    request = RegionRequest(WANT_QUEUE_PAIR, "a-check", fields)
    payload = encode_region(request)
    with RpcClient(address) as client:
        kind = VShardMessageType.VECTOR_MEM_REGION_REQUEST
        reply = client.call(VShardEnvelope(WIRE_VERSION, kind, 0, 0, 0, payload))
    answer = decode_region_response(reply.payload)
    assert answer.code == 0, answer.message
    assert answer.queue_pair is not None
    assert answer.region is not None
    return QueuePairAttributes(**fields_of(answer.queue_pair)), MemoryRegion(**fields_of(answer.region))


def connected(device: Device, address: str, host: str) -> tuple[QueuePair, MemoryRegion]:
    """A queue pair of this process, connected to an owner's; and the region that it may READ."""
    queue_pair = QueuePair(device, QueuePairOptions(peer_address=host))
    remote, region = ask(address, queue_pair.local)
    queue_pair.connect(remote)
    return queue_pair, region


class PyverbsOwner:
    """A process that registers an arena of ours through pyverbs: see pyverbs_owner.py."""

    def __init__(self, image: Path, device_name: str, gid_index: int) -> None:
        script = Path(__file__).with_name("pyverbs_owner.py")
        self.process = subprocess.Popen(
            [sys.executable, "-B", str(script), str(image), device_name, str(gid_index)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def tell(self, message: dict[str, Any]) -> dict[str, Any]:
        """Sends a line of JSON and waits for the answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the pyverbs owner ended"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def connect(self, queue_pair: QueuePair) -> MemoryRegion:
        """Connects its queue pair with ours."""
        local = dataclasses.asdict(queue_pair.local)
        local["gid"] = local["gid"].hex()
        answer = self.tell({"do": "connect", **local})
        remote = answer["queue_pair"]
        remote["gid"] = bytes.fromhex(remote["gid"])
        queue_pair.connect(QueuePairAttributes(**remote))
        return MemoryRegion(**answer["region"])

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(20)
        finally:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()
