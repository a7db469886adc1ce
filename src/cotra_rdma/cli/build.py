"""`cotra build`: builds a directory of shard files from a file of vectors."""

from __future__ import annotations

import contextlib
import functools
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from cotra_rdma._build.collection import build_collection
from cotra_rdma._build.machine import DEFAULT_TIMEOUT_S, build_on_machine
from cotra_rdma._build.processes import Usage
from cotra_rdma._collection.manifest import Collection
from cotra_rdma._native.list_engine import MAX_BITS
from cotra_rdma._routing.router import DEFAULT_TARGET
from cotra_rdma.cli import output
from cotra_rdma.cli.options import (
    ConstructionEf,
    Device,
    GidIndex,
    GraphM,
    GraphName,
    Json,
    MetricName,
    PartitionName,
    TlsCa,
    TlsCert,
    TlsKey,
    VectorTypeName,
    comma_list,
    tls_of,
)
from cotra_rdma.datasets import VectorFile, open_vectors

EPILOG = """**Examples**

cotra build base.fvecs index --shards 4

cotra build base.fvecs index --shards 16 --partition kmeans

cotra build base.fvecs index --shards 16 --graph global --processes 4

cotra build base.fvecs index --graph global --shards 2 --shard 1 --peers 10.0.0.1:7700,10.0.0.2:7700 (on 10.0.0.2)

cotra build glove-100-angular.hdf5 index --shards 2 --metric cosine --M 24 --ef-construction 400
"""


Source = Annotated[
    Path,
    typer.Argument(
        metavar="INPUT",
        exists=True,
        dir_okay=False,
        help="Vectors of any float dtype or uint8: .npy, .fvecs, .bvecs (these may be larger than memory), or "
        "ann-benchmarks .hdf5.",
    ),
]
OutDir = Annotated[Path, typer.Argument(metavar="OUT_DIR", file_okay=False, help="The directory of the shard files.")]
Shards = Annotated[int, typer.Option("--shards", min=1, metavar="N", help="The number of shards.")]
Partition = Annotated[
    PartitionName | None,
    typer.Option(
        help="How rows are split. range: equal ranges. kmeans: neighbours stay together, so that a query need not ask "
        "every shard; no shard is over 1.1 times the mean. Default: kmeans for one graph, else range."
    ),
]
Graph = Annotated[
    GraphName,
    typer.Option(
        help="independent: each shard has a graph of its own. global: the shards are linked to one graph, so that a "
        "query is one walk over all of them."
    ),
]
Ivf = Annotated[
    int,
    typer.Option(
        "--ivf",
        min=0,
        metavar="N",
        help="The number of inverted lists over all shards, for searches in two rounds (SPIRE). About one for 100 "
        "vectors is usual. 0: none.",
    ),
]
IvfBits = Annotated[
    int, typer.Option("--ivf-bits", min=1, max=MAX_BITS, help="The bits a dimension of the codes in inverted lists.")
]
VectorType = Annotated[
    VectorTypeName,
    typer.Option(
        help="The type of stored vectors. auto: uint8 and float16 as they are, others as float32. float16 rounds. "
        "uint8 must be exact."
    ),
]
Metric = Annotated[MetricName | None, typer.Option(help="The metric. Default: what an HDF5 file says, else l2.")]
Seed = Annotated[int, typer.Option(min=0, help="The seed of the graph's levels and of the rotation of codes.")]
Threads = Annotated[int, typer.Option(min=0, help="The number of threads. 0: one for each core.")]
Dataset = Annotated[
    str | None, typer.Option(metavar="NAME", help="The data set in an HDF5 file. Default: train.", show_default=False)
]
Processes = Annotated[
    int,
    typer.Option(
        min=0,
        metavar="P",
        help="For one graph: the builder processes on this host, each of which builds one shard at a time. "
        "--threads is for each of them. 0: this process builds.",
    ),
]
Shard = Annotated[
    int | None,
    typer.Option(
        "--shard",
        min=0,
        metavar="I",
        help="Build only this shard of one graph, 0 to N - 1. The builders at --peers build the others at the same "
        "time. INPUT must be the same everywhere.",
        show_default=False,
    ),
]
Peers = Annotated[
    list[str],
    typer.Option(
        metavar="HOST:PORT[,HOST:PORT...]",
        help="With --shard: the addresses of all builders, in the order of their shards, with this one's.",
        show_default=False,
    ),
]
Listen = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="With --shard: where to listen. Default: this builder's address in --peers.",
        show_default=False,
    ),
]
Timeout = Annotated[
    float,
    typer.Option(
        min=0.001, help="With --shard: the longest wait for another builder, also before it starts, in seconds."
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace a collection that is already in OUT_DIR.")]


@output.verb
def build(
    source: Source,
    out_dir: OutDir,
    shards: Shards = 1,
    partition: Partition = None,
    graph: Graph = GraphName.INDEPENDENT,
    ivf: Ivf = 0,
    ivf_bits: IvfBits = 2,
    vector_type: VectorType = VectorTypeName.AUTO,
    metric: Metric = None,
    M: GraphM = 16,
    ef_construction: ConstructionEf = 200,
    seed: Seed = 100,
    threads: Threads = 0,
    dataset: Dataset = None,
    processes: Processes = 0,
    shard: Shard = None,
    peers: Peers = [],  # noqa: B006 (typer copies it)
    listen: Listen = None,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
    device: Device = None,
    gid_index: GidIndex = None,
    force: Force = False,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_ca: TlsCa = None,
    as_json: Json = False,
) -> None:
    """Build graph shards from a file of vectors.

    Ids are row numbers. A failed run leaves OUT_DIR as it was.
    """
    addresses = comma_list(peers)
    _check_machine(shard, shards, addresses, processes, listen, graph, partition)
    begin = time.perf_counter()
    used: list[Usage] = []
    with (
        _sigterm_is_an_interrupt(),
        open_vectors(source, dataset) as vectors,
        _progress(vectors, shards, shard, quiet=as_json) as progress,
    ):
        graphs: dict[str, Any] = {
            "metric": metric.value if metric else vectors.metric or "l2",
            "M": M,
            "ef_construction": ef_construction,
            "seed": seed,
            "n_threads": threads,
            "n_lists": ivf,
            "ivf_bits": ivf_bits,
            "vector_type": vector_type.value,
            "force": force,
        }
        if shard is None:
            graphs |= {"partition": partition and partition.value, "graph": graph.value, "processes": processes}
            collection = build_collection(vectors, out_dir, shards, **graphs, progress=progress, usage=used.append)
        else:
            graphs |= {"listen": listen, "device": device, "gid_index": gid_index, "timeout_s": timeout}
            graphs["tls"] = tls_of(tls_cert, tls_key, tls_ca)
            told = functools.partial(progress, shard)
            collection = build_on_machine(vectors, out_dir, shard, addresses, **graphs, progress=told)
    built = (collection, out_dir, used or [Usage.of_this_process()], time.perf_counter() - begin)
    _print_json(*built) if as_json else _print(*built, shard)


@contextlib.contextmanager
def _progress(
    vectors: VectorFile, n_shards: int, shard: int | None, *, quiet: bool
) -> Iterator[Callable[[int, str, int], None]]:
    """Shows a bar on stderr while shards are built.

    Yields:
        What to call with the number of a shard, the phase of its build, and the vectors that are done.
        A number below 0 stands for all shards.
    """
    with output.progress_bar("vectors", disable=quiet) as bar:
        task = bar.add_task("", total=vectors.count if shard is None else vectors.count // n_shards)
        yield lambda number, phase, done: bar.update(
            task, completed=done, description=output.phase_of(number, n_shards, phase)
        )


@contextlib.contextmanager
def _sigterm_is_an_interrupt() -> Iterator[None]:
    """SIGTERM cleans up as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _print_json(collection: Collection, out_dir: Path, used: list[Usage], seconds: float) -> None:
    compass = collection.calibration
    output.print_json(
        {
            "out_dir": str(out_dir),
            "seconds": seconds,
            **collection.summary(),
            "compass_shards": compass.expected(DEFAULT_TARGET) if compass else float(len(collection.shards)),
            "builders": [asdict(builder) for builder in used],
        }
    )


def _print(collection: Collection, out_dir: Path, used: list[Usage], seconds: float, shard: int | None) -> None:
    entries = [entry for number, entry in enumerate(collection.shards) if shard in (None, number)]
    output.print_table(
        ("shard", ">vectors", ">first id", ">size"),
        (
            (
                str(out_dir / entry.name),
                f"{entry.count:,}",
                f"{entry.first_id:,}",
                output.human_bytes(entry.image_bytes),
            )
            for entry in entries
        ),
    )
    output.out.print(
        f"{collection.count:,} x {collection.dim} vectors, {collection.metric}, M={collection.M}, "
        f"ef_construction={collection.ef_construction}: {seconds:.1f} s, {collection.count / seconds:,.0f} vectors/s",
    )
    output.out.print(
        f"{len(used)} {'builders' if len(used) > 1 else 'builder'}: {sum(builder.cpu_s for builder in used):.1f} s of "
        f"CPU, {output.human_bytes(max(builder.peak_bytes for builder in used))} of memory at most"
    )
    if collection.calibration is not None:
        expected, shards = collection.calibration.expected(DEFAULT_TARGET), len(collection.shards)
        output.out.print(
            f"Compass: {expected:.1f} of {shards} shards hold {DEFAULT_TARGET:.0%} of a query's neighbours"
            if expected < shards
            else "Compass: every query asks all shards; with --partition kmeans it could leave some out",
        )


def _check_machine(
    shard: int | None,
    shards: int,
    addresses: list[str],
    processes: int,
    listen: str | None,
    graph: GraphName,
    partition: PartitionName | None,
) -> None:
    if shard is None:
        if addresses or listen:
            raise typer.BadParameter("needs --shard", param_hint="--peers" if addresses else "--listen")
        return
    if not addresses:
        raise typer.BadParameter("needs --peers, the addresses of all builders", param_hint="--shard")
    if processes:
        raise typer.BadParameter("does not go with --shard, which builds in this process", param_hint="--processes")
    if graph != GraphName.GLOBAL or partition == PartitionName.RANGE:
        raise typer.BadParameter("is for one graph: use --graph global and --partition kmeans", param_hint="--shard")
    if len(addresses) != shards:
        raise typer.BadParameter(f"names {len(addresses)} addresses for {shards} shards", param_hint="--peers")
    if shard >= shards:
        raise typer.BadParameter(f"{shard} is not in the range 0 to {shards - 1}", param_hint="--shard")
