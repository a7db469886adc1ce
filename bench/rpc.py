"""What a call over RPC costs, beside a plain TCP echo in the same run: `python bench/rpc.py`.

Owner and reader are processes of their own, over loopback.
A call sends an envelope of 512 bytes, and gets one of 1 KiB, unless a row says otherwise.
The two are measured in turns, and a row gives medians over the turns.
"""

from __future__ import annotations

import argparse
import multiprocessing
import socket
import statistics
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection as Pipe

from cotra_rdma.protocol.envelope import WIRE_VERSION, VShardEnvelope, VShardMessageType
from cotra_rdma.protocol.rpc_client import RpcClient
from cotra_rdma.protocol.rpc_server import RpcServer

WORK = VShardMessageType.VECTOR_SCATTER_REQUEST
ROWS = ((512, 1024, 1), (512, 1024, 8), (512, 1 << 20, 1), (4 << 20, 1024, 1))
"""Bytes that are sent, bytes that are answered, threads."""


def envelope(kind: VShardMessageType, n_bytes: int) -> VShardEnvelope:
    return VShardEnvelope(WIRE_VERSION, kind, 0, 0, n_bytes, bytes(n_bytes))


def owner(pipe: Pipe) -> None:
    """Answers calls with as many bytes as `vshard_id` says, and echoes over TCP in the same way."""

    def handler(request: VShardEnvelope) -> VShardEnvelope:
        return envelope(WORK.response, request.source_node)

    def plain(listener: socket.socket) -> None:
        while True:
            peer, _ = listener.accept()
            threading.Thread(target=echo, args=(peer,), daemon=True).start()

    with RpcServer("127.0.0.1:0", handler) as server, socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=plain, args=(listener,), daemon=True).start()
        pipe.send((server.address, listener.getsockname()))
        pipe.recv()


def receive(peer: socket.socket, n_bytes: int) -> bytes:
    parts = []
    while n_bytes:
        parts.append(peer.recv(min(n_bytes, 1 << 20)))
        if not parts[-1]:
            raise EOFError
        n_bytes -= len(parts[-1])
    return b"".join(parts)


def echo(peer: socket.socket) -> None:
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while True:
        try:
            head = receive(peer, 8)
        except (EOFError, OSError):
            return
        receive(peer, int.from_bytes(head[:4], "little") - 8)
        peer.sendall(bytes(int.from_bytes(head[4:], "little")))


def timed(call: Callable[[], object], n_calls: int, n_threads: int) -> tuple[float, float, float]:
    """p50 and p99 in microseconds, and calls a second."""
    took: list[float] = []

    def work() -> None:
        mine = []
        for _ in range(n_calls):
            begin = time.perf_counter()
            call()
            mine.append(time.perf_counter() - begin)
        took.extend(mine)

    threads = [threading.Thread(target=work) for _ in range(n_threads)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - begin
    cuts = statistics.quantiles(took, n=100)
    return cuts[49] * 1e6, cuts[98] * 1e6, len(took) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5, help="times that each is measured (5)")
    parser.add_argument("--calls", type=int, default=400, help="calls of a thread in a turn (400)")
    options = parser.parse_args()
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=owner, args=(there,), daemon=True)
    process.start()
    address, plain = here.recv()
    local = threading.local()

    print(
        "| sent | answered | threads | RPC p50, us | p99, us | calls/s | TCP echo p50, us | p99, us | RPC / TCP, p50 |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    with RpcClient(address) as client:
        for sent, answered, n_threads in ROWS:
            request = VShardEnvelope(WIRE_VERSION, WORK, answered, 0, 0, bytes(sent - 28))
            message = sent.to_bytes(4, "little") + answered.to_bytes(4, "little") + bytes(sent - 8)

            def over_tcp(message: bytes = message, answered: int = answered) -> None:
                if not hasattr(local, "peer"):
                    local.peer = socket.create_connection(plain)
                    local.peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                local.peer.sendall(message)
                receive(local.peer, answered)

            def over_rpc(request: VShardEnvelope = request) -> None:
                client.call(request, 60_000)

            n_calls = max(20, options.calls // (1 + (sent + answered) // (1 << 18)))
            timed(over_rpc, 20, n_threads)
            turns = [
                (timed(over_rpc, n_calls, n_threads), timed(over_tcp, n_calls, n_threads)) for _ in range(options.turns)
            ]
            rpc, tcp = (
                [statistics.median(column) for column in zip(*side, strict=True)] for side in zip(*turns, strict=True)
            )
            print(
                f"| {sent:,} | {answered:,} | {n_threads} | {rpc[0]:,.0f} | {rpc[1]:,.0f} | {rpc[2]:,.0f} "
                f"| {tcp[0]:,.0f} | {tcp[1]:,.0f} | {rpc[0] / tcp[0]:.1f} |"
            )
    here.send(None)
    process.join()


if __name__ == "__main__":
    main()
