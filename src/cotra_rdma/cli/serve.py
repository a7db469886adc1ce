"""`cotra serve`: publishes shards to readers until it is told to stop."""

from __future__ import annotations

import contextlib
import select
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from cotra_rdma._collection.manifest import coarse_of, place_of, shard_paths
from cotra_rdma._collection.owners_file import is_address
from cotra_rdma._owner.peering import DEFAULT_HALO, Peering, Walks
from cotra_rdma._owner.server import TRANSPORTS, Server
from cotra_rdma._owner.server import serve as serve_shard
from cotra_rdma._shard.shard import Shard
from cotra_rdma.cli import output
from cotra_rdma.cli.announce import announce_owners, announced_at
from cotra_rdma.cli.options import Device, GidIndex, Json, comma_list, transports
from cotra_rdma.errors import InvalidInputError
from cotra_rdma.protocol.tables import CentroidTable, CoarseRouteResponse

EPILOG = """**Examples**

cotra serve index --listen 0.0.0.0:7700

cotra serve index --shard 2 --shard 3 --listen 0.0.0.0:7702 --announce 10.0.0.1

cotra serve index/shard-000.cotra --listen 10.0.0.1:7700 --device mlx5_0 --gid-index 3 --transport verbs,rpc

cotra serve index --shard 0 --listen 10.0.0.1:7700 --walk

cotra serve index --shard 1 --listen 10.0.0.2:7700 --walk --peer 10.0.0.1:7700 --peer 10.0.0.2:7700 --halo 0.5

The first shard listens on PORT, the next on PORT + 1, and so on. While shards of a collection are served, they are
noted in owners.json beside its manifest, where `cotra search index` finds them. SIGTERM and Ctrl-C end it cleanly,
with status 0.

The last two are peers. Each walks the whole graph for the queries that `cotra search --algorithm home` sends it, with
its own records in place. The first finds the others in owners.json, also if they start later. The second is on a host
that has no directory in common with them.
"""


Shards = Annotated[
    list[Path],
    typer.Argument(metavar="SHARD", exists=True, help="Shard files, or directories that `cotra build` made."),
]
ShardOption = Annotated[
    list[int] | None,
    typer.Option(
        min=0,
        metavar="N",
        show_default=False,
        help="Serve only this shard of a collection, counted from 0. The files of others need not be here. May be "
        "repeated.",
    ),
]
Listen = Annotated[
    str, typer.Option(metavar="HOST:PORT", help="Where readers connect. PORT 0: a free port for each shard.")
]
Transport = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME[,NAME...]",
        show_default=False,
        help="The transports to offer: verbs, shm, rpc. May be repeated. Default: all that work here.",
    ),
]
Announce = Annotated[
    str | None,
    typer.Option(
        metavar="HOST[:PORT]",
        show_default=False,
        help="Where others reach this owner, if not at --listen. It is noted in owners.json. PORT is the first "
        "shard's.",
    ),
]
NoAnnounce = Annotated[
    bool,
    typer.Option("--no-announce", help="Leave owners.json alone. Readers then learn the address in another way."),
]
Walk = Annotated[
    bool,
    typer.Option(
        "--walk",
        help="Be a peer: also answer searches of the whole collection (`cotra search --algorithm home`), with the own "
        "records in place. The collection must be one graph (`cotra build --graph global`).",
    ),
]
Peer = Annotated[
    list[str] | None,
    typer.Option(
        metavar="ADDRESS",
        show_default=False,
        help="With --walk: HOST:PORT[,HOST:PORT...] of a shard's owners, once for each shard of the collection, in "
        "order. Entries for own shards are not used. Default: the owners in owners.json.",
    ),
]
Halo = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        metavar="SHARE",
        show_default=False,
        help="With --walk: keep the records of other shards that the own ones link to most often. Its size is a share "
        f"of the own shards' bytes. 0: none. Default: {DEFAULT_HALO}.",
    ),
]
UntilStdinCloses = Annotated[
    bool,
    typer.Option(
        "--until-stdin-closes", hidden=True, help="End when stdin ends, which is when the parent process does."
    ),
]


@output.verb
def serve(
    shards: Shards,
    shard: ShardOption = None,
    listen: Listen = "127.0.0.1:0",
    device: Device = None,
    gid_index: GidIndex = None,
    transport: Transport = None,
    announce: Announce = None,
    no_announce: NoAnnounce = False,
    walk: Walk = False,
    peer: Peer = None,
    halo: Halo = None,
    until_stdin_closes: UntilStdinCloses = False,
    as_json: Json = False,
) -> None:
    """Serve shards: readers READ their memory, or ask over RPC if they cannot.

    With --json, it prints one line when it is ready: {"address", "shards", "region", "transports"}.
    All but "shards" describe the first shard.
    With --walk, it also prints a line {"walks"} whenever the paths to the shards of the collection change.
    """
    offered = None if transport is None else transports(transport, TRANSPORTS)
    host, port = _host_port(listen)
    if announce is not None and no_announce:
        raise typer.BadParameter("contradicts --no-announce", param_hint="--announce")
    if not walk and (peer or halo is not None):
        raise typer.BadParameter("needs --walk", param_hint="--peer" if peer else "--halo")
    peers = None if not peer else [_addresses(text) for text in peer]
    reached = None if announce is None else announced_at(announce)
    with _StopSignals() as stop, contextlib.ExitStack() as stack:
        served, servers = [], []
        paths = shard_paths(shards, None if shard is None else list(dict.fromkeys(shard)))
        numbers = _own_numbers(paths) if walk else []
        peering = None
        if walk:
            share = DEFAULT_HALO if halo is None else halo
            told = partial(_tell_walks, as_json=as_json)
            peering = Peering(paths[0].parent, peers, halo=share, device=device, gid_index=gid_index, changed=told)
        if port and port + len(paths) - 1 > 65535:
            raise typer.BadParameter(
                f"{len(paths)} shards from port {port} on need ports beyond 65535", param_hint="--listen"
            )
        for position, path in enumerate(paths):
            opened = stack.enter_context(Shard.open(path))
            coarse = _coarse(path)
            address = f"{host}:{port + position if port else 0}"
            server = stack.enter_context(
                serve_shard(opened, address, transports=offered, device=device, gid_index=gid_index, coarse=coarse)
            )
            servers.append(server)
            served.append(_describe(path, opened, server))
        if peering is not None:
            stack.enter_context(peering)
        noted: list[str | None] = [None] * len(paths)
        if not no_announce:
            noted = announce_owners(stack, paths, [entry["address"] for entry in served], reached)
        for entry, at in zip(served, noted, strict=True):
            entry["announced"] = at
        _print_ready(served, as_json=as_json)
        if peering is not None:
            peering.start(dict(zip(numbers, servers, strict=True)))
        stop.wait(until_stdin_closes)


class _StopSignals:
    """Ends the block at SIGTERM or SIGINT by `typer.Exit(0)`, so that everything the block opened is closed.

    The wake-up socket notices a signal that arrives just before the wait begins.
    """

    def __enter__(self) -> _StopSignals:
        self._wakes, self._wake = socket.socketpair()
        self._wake.setblocking(False)
        signal.set_wakeup_fd(self._wake.fileno())
        self._old = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _stop(self, _number: int, _frame: object) -> None:
        for number in self._old:
            signal.signal(number, signal.SIG_IGN)
        raise typer.Exit(0)

    def wait(self, until_stdin_closes: bool) -> None:
        """Waits for a signal, or for the end of stdin."""
        stdin = [sys.stdin] if until_stdin_closes else []
        while not set(stdin) & set(select.select([self._wakes, *stdin], [], [])[0]):
            pass

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(-1)
        for number, old in self._old.items():
            signal.signal(number, old)
        self._wake.close()
        self._wakes.close()


def _host_port(listen: str) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise typer.BadParameter(f"{listen!r} is not HOST:PORT", param_hint="--listen")
    return host, int(port)


def _addresses(text: str) -> list[str]:
    found = comma_list([text])
    if not found or not all(map(is_address, found)):
        raise typer.BadParameter(f"{text!r} is not HOST:PORT[,HOST:PORT...]", param_hint="--peer")
    return found


def _own_numbers(paths: Sequence[Path]) -> list[int]:
    """Returns the numbers of a peer's shards, which must be of one collection."""
    places = [place_of(path) for path in paths]
    numbers = [place[1] for place in places if place is not None]
    if len(numbers) < len(paths) or len({path.parent for path in paths}) != 1 or len(set(numbers)) < len(numbers):
        raise InvalidInputError("--walk needs shards of one collection, each given once")
    return numbers


def _tell_walks(walks: Walks, *, as_json: bool) -> None:
    if as_json:
        output.print_json({"walks": list(walks)})
        return
    paths = (f"{at} {path}" for at, path in enumerate(walks))
    output.out.print(f"Walks shards: {', '.join(paths)}.", soft_wrap=True)


def _coarse(path: Path) -> bytes | None:
    """Returns the message that describes a shard of a collection, by which readers decide whether to ask it."""
    found = coarse_of(path)
    if found is None:
        return None
    table, collection = found
    return CoarseRouteResponse(0, "", CentroidTable.of(table, "float16"), collection).encode()


def _describe(path: Path, shard: Shard, server: Server) -> dict[str, Any]:
    region = server.exposed_region()
    return {
        "path": str(path),
        "address": server.address,
        "count": len(shard),
        "dim": shard.dim,
        "metric": shard.metric,
        "region": None if region is None else asdict(region),
        "transports": list(server.transports),
    }


def _print_ready(served: list[dict[str, Any]], *, as_json: bool) -> None:
    if not served:
        raise InvalidInputError("there is no shard to serve")
    if as_json:
        first = served[0]
        keys = ("address", "region", "transports")
        output.print_json({**{key: first[key] for key in keys}, "shards": served})
        return
    output.print_table(
        ("shard", ">vectors", ">dim", "metric", "address", "paths", "memory region (addr, rkey, len)"),
        (
            (
                shard["path"],
                f"{shard['count']:,}",
                str(shard["dim"]),
                shard["metric"],
                shard["address"],
                ", ".join(shard["transports"]),
                "none: no verbs device"
                if (r := shard["region"]) is None
                else f"{r['addr']:#x}, {r['rkey']:#x}, {r['len']:,}",
            )
            for shard in served
        ),
    )
    output.out.print("Ready. Ctrl-C ends it.")
