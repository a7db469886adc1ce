"""Programs that behave badly towards an owner: `python attackers.py NAME HOST:PORT`.

Each prints "begun", and goes on until it is killed.
"""

from __future__ import annotations

import itertools
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np

from cotra_rdma.protocol.envelope import VShardEnvelope, VShardMessageType
from cotra_rdma.protocol.regions import WANT_VIEW, RegionRequest, encode_region
from cotra_rdma.protocol.search import SearchRequest

DIM = 100
MIB = 1 << 20


def channel(address: str) -> grpc.Channel:
    return grpc.insecure_channel(
        address, [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
    )


def call(of: grpc.Channel, name: str, messages: Iterator[bytes]) -> Any:
    return of.stream_unary(f"/cotra.Owner/{name}", None, None).future(messages, timeout=600)


def envelope(kind: int, payload: bytes) -> bytes:
    return VShardEnvelope(2, VShardMessageType(kind), 0, 0, 0, payload).encode()


def search(n: int, k: int = 10, ef: int = 64) -> bytes:
    return envelope(50, SearchRequest("", np.ones((n, DIM), np.float32), k, ef).encode())


def view() -> bytes:
    return envelope(56, encode_region(RegionRequest(WANT_VIEW, "greedy")))


def begun() -> None:
    print("begun", flush=True)


def again(work: Callable[[], object]) -> None:
    """Whatever the owner makes of it, once more."""
    while True:
        try:
            work()
        except grpc.RpcError:
            time.sleep(0.001)


def in_threads(n: int, work: Callable[[], object]) -> None:
    for _ in range(n):
        threading.Thread(target=again, args=(work,), daemon=True).start()
    begun()
    threading.Event().wait()


def endless(address: str) -> None:
    """One request that never ends: envelope after envelope."""
    of = [channel(address) for _ in range(8)]
    turn = itertools.count()
    in_threads(8, lambda: call(of[next(turn) % 8], "Work", itertools.repeat(bytes(4 * MIB))).result())


def large(address: str) -> None:
    """As many large requests at once as connections allow."""
    of, message = [channel(address) for _ in range(20)], search(9_000)
    turn = itertools.count()
    in_threads(100, lambda: call(of[next(turn) % 20], "Work", iter([message])).result())


def too_large(address: str) -> None:
    """Requests beyond the limit."""
    of, message = channel(address), bytes(64 * MIB)
    in_threads(4, lambda: call(of, "Work", iter([message])).result())


def unread(address: str) -> None:
    """Small requests for large answers, which nobody takes: who asked is stopped by the test."""
    of = [channel(address) for _ in range(10)]
    calls = [call(of[at % 10], "Control", iter([view()])) for at in range(300)]
    begun()
    for one in calls:
        one.exception()
    threading.Event().wait()


def trickle(address: str) -> None:
    """Requests that are begun and never ended."""

    def never() -> Iterator[bytes]:
        time.sleep(3600)
        yield b""

    of = [channel(address) for _ in range(40)]
    turn = itertools.count()
    in_threads(80, lambda: call(of[next(turn) % 40], "Work", never()).result())


def long(address: str) -> None:
    """Searches that take an owner's workers as long as they may."""
    of, message = [channel(address) for _ in range(8)], search(1000, 10, 2000)
    turn = itertools.count()
    in_threads(16, lambda: call(of[next(turn) % 8], "Work", iter([message])).result())


def costly(address: str) -> None:
    """Searches whose answers or costs pass the limits."""
    of = channel(address)
    messages = itertools.cycle([search(3000, 1000, 1000), search(1, 10, 2**20), search(4000, 10, 600), b"junk" * 1000])
    in_threads(4, lambda: call(of, "Work", iter([next(messages)])).result())


def idle(address: str) -> None:
    """Connections that say nothing, as many as this process may have, again and again."""
    host, port = address.rsplit(":", 1)
    held: list[socket.socket] = []
    said = False
    while True:
        try:
            held.append(socket.create_connection((host, int(port)), 1))
        except OSError:
            time.sleep(0.01)
        if len(held) >= 1200 and not said:
            said = True
            begun()
        if len(held) >= 1500:
            for one in held[:300]:
                one.close()
            del held[:300]


def junk(address: str) -> None:
    """Bytes that are no HTTP/2."""
    host, port = address.rsplit(":", 1)

    def work() -> None:
        try:
            with socket.create_connection((host, int(port)), 5) as one:
                one.sendall(np.random.default_rng().bytes(4096))
                one.recv(10)
        except OSError:
            time.sleep(0.01)

    in_threads(4, work)


if __name__ == "__main__":
    globals()[sys.argv[1]](sys.argv[2])
