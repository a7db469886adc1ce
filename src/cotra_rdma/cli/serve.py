"""`cotra serve`: publishes shards to readers until it is told to stop."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from cotra_rdma._collection.manifest import place_of, shard_paths
from cotra_rdma._collection.owners_file import is_address
from cotra_rdma._owner.answers import TRANSPORTS
from cotra_rdma._owner.metrics import MetricsServer
from cotra_rdma._owner.peering import DEFAULT_HALO, Peering, Walks
from cotra_rdma._owner.policy import PolicyFile
from cotra_rdma._owner.server import Server
from cotra_rdma._owner.server import serve as serve_shard
from cotra_rdma._reader.cluster import Cluster
from cotra_rdma._shard.shard import Shard
from cotra_rdma.cli import output
from cotra_rdma.cli.announce import announce_owners, announced_at
from cotra_rdma.cli.options import (
    Device,
    GidIndex,
    Json,
    TlsCa,
    TlsCert,
    TlsKey,
    Tracing,
    comma_list,
    tls_of,
    transports,
)
from cotra_rdma.cli.reload import Reload, check_fits, coarse_payload
from cotra_rdma.cli.stop_signals import StopSignals
from cotra_rdma.errors import InvalidInputError

log = logging.getLogger(__name__)

_LOOK_S = 1.0
"""The interval, in seconds, at which it looks whether the collection was built again."""

EPILOG = """**Examples**

cotra serve index --listen 127.0.0.1:7700

cotra serve index --shard 2 --listen 10.0.0.1:7702 --tls-cert owner.pem --tls-key owner.key --tls-ca ca.pem

cotra serve index --shard 2 --shard 3 --listen 0.0.0.0:7702 --announce 10.0.0.1 --insecure

cotra serve index/shard-000.cotra --listen 10.0.0.1:7700 --device mlx5_0 --gid-index 3 --transport verbs,rpc

cotra serve index --shard 0 --listen 10.0.0.1:7700 --walk

cotra serve index --shard 1 --listen 10.0.0.2:7700 --walk --peer 10.0.0.1:7700 --peer 10.0.0.2:7700 --halo 0.5

Owners that are reached from other hosts show a certificate, and want one (`cotra certs`, COTRA_TLS_CERT, COTRA_TLS_KEY,
COTRA_TLS_CA), or say --insecure.

The first shard listens on PORT, the next on PORT + 1, and so on. Shards of a collection are noted in owners.json beside
its manifest while they are served, so that `cotra search index` finds them. SIGTERM and Ctrl-C end it cleanly, with
status 0: requests in progress have --grace seconds. A collection that is built again (`cotra build --force`) is taken up
within a second, or at SIGHUP: readers follow, and no search fails.

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
Insecure = Annotated[
    bool,
    typer.Option(
        "--insecure", help="Listen beyond this host without TLS: whoever reaches the port may read the shards."
    ),
]
Grace = Annotated[
    float,
    typer.Option(
        min=0.0,
        max=3600.0,
        metavar="S",
        help="How long requests in progress may take after SIGTERM or Ctrl-C, in seconds; new ones are refused. A second "
        "signal ends them at once.",
    ),
]
Metrics = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        show_default=False,
        help="Answer /metrics (for Prometheus), /healthz and /readyz there, over HTTP.",
    ),
]
PolicyOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        show_default=False,
        help="TOML file of who may do what, by the names in certificates; read again when it changes.",
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
    insecure: Insecure = False,
    grace: Grace = 10.0,
    metrics: Metrics = None,
    policy: PolicyOption = None,
    tracing: Tracing = False,
    until_stdin_closes: UntilStdinCloses = False,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_ca: TlsCa = None,
    as_json: Json = False,
) -> None:
    """Serve shards: readers READ their memory, or ask over RPC if they cannot.

    With --json, it prints one line when it is ready: {"address", "shards", "region", "transports"}, and with --metrics also
    {"metrics"}. All but "shards" describe the first shard.
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
    tls = tls_of(tls_cert, tls_key, tls_ca)
    if tls is None and not _is_loopback(host):
        if not insecure:
            raise typer.BadParameter(
                f"{host} is reached from other hosts: give --tls-cert, --tls-key and --tls-ca, or --insecure",
                param_hint="--listen",
            )
        log.warning("served without TLS: whoever reaches %s may read the shards", listen)
    if policy is not None and tls is None:
        raise typer.BadParameter("is about the names in certificates: give --tls-cert too", param_hint="--policy")
    with StopSignals() as stop, contextlib.ExitStack() as stack:
        rules = None if policy is None else stack.enter_context(PolicyFile(policy))
        served, servers = [], []
        paths = shard_paths(shards, None if shard is None else list(dict.fromkeys(shard)))
        numbers = _own_numbers(paths) if walk else []
        peering = None
        if walk:
            share = DEFAULT_HALO if halo is None else halo
            told = partial(_tell_walks, as_json=as_json)
            peering = Peering(
                paths[0].parent,
                peers,
                halo=share,
                device=device,
                gid_index=gid_index,
                tls=tls,
                changed=told,
                tracing=tracing,
            )
        if port and port + len(paths) - 1 > 65535:
            raise typer.BadParameter(
                f"{len(paths)} shards from port {port} on need ports beyond 65535", param_hint="--listen"
            )
        for position, path in enumerate(paths):
            opened = stack.enter_context(Shard.open(path))
            check_fits(path, opened)
            coarse = coarse_payload(path)
            address = f"{host}:{port + position if port else 0}"
            server = stack.enter_context(
                serve_shard(
                    opened,
                    address,
                    transports=offered,
                    device=device,
                    gid_index=gid_index,
                    tls=tls,
                    coarse=coarse,
                    policy=rules,
                    number=_number_of(path),
                    tracing=tracing,
                )
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
        seen = None
        if metrics is not None:
            readers = partial(_readers_of, peering)
            seen = stack.enter_context(MetricsServer(metrics, servers, readers)).address
        _print_ready(served, seen, as_json=as_json)
        if peering is not None:
            peering.start(dict(zip(numbers, servers, strict=True)))
        stack.callback(_drain, servers, grace)
        reload = Reload(stack, paths, servers)
        while not stop.wait(until_stdin_closes, _LOOK_S):
            if stop.take_hangup() or reload.is_due():
                reload.now()


def _readers_of(peering: Peering | None) -> dict[str, Cluster]:
    """Returns the clusters of this process, by their names in metrics."""
    cluster = None if peering is None else peering.cluster
    return {} if cluster is None else {"peers": cluster}


def _number_of(path: Path) -> int | None:
    """Returns the number of a shard in its collection, or None if it is of no collection."""
    place = place_of(path)
    return None if place is None else place[1]


def _drain(servers: Sequence[Server], grace_s: float) -> None:
    """Refuses new requests of all servers, and lets those in progress end."""
    with ThreadPoolExecutor(max(1, len(servers)), "cotra-drain") as pool:
        ends = [pool.submit(server.drain, grace_s) for server in servers]
        try:
            wait(ends)
        except typer.Exit:  # a second signal
            for server in servers:
                server.drain(0.0)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


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


def _print_ready(served: list[dict[str, Any]], metrics: str | None, *, as_json: bool) -> None:
    if not served:
        raise InvalidInputError("there is no shard to serve")
    if as_json:
        first = served[0]
        keys = ("address", "region", "transports")
        seen = {} if metrics is None else {"metrics": metrics}
        output.print_json({**{key: first[key] for key in keys}, "shards": served, **seen})
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
    if metrics is not None:
        output.out.print(f"Metrics: http://{metrics}/metrics", soft_wrap=True)
    output.out.print("Ready. Ctrl-C ends it.")
