"""`cotra build`: a file of vectors -> a directory of shard files."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from cotra_rdma.cli import output
from cotra_rdma.cli.options import ConstructionEf, GraphM, GraphName, Json, MetricName, PartitionName, VectorTypeName
from cotra_rdma.collection import build_collection
from cotra_rdma.compass import DEFAULT_TARGET
from cotra_rdma.datasets import open_vectors
from cotra_rdma.ivf import MAX_BITS

EPILOG = """**Examples**

cotra build base.fvecs index --shards 4

cotra build base.fvecs index --shards 16 --partition kmeans

cotra build base.fvecs index --shards 16 --graph global

cotra build glove-100-angular.hdf5 index --shards 2 --metric cosine --M 24 --ef-construction 400
"""


@output.verb
def build(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="INPUT",
            exists=True,
            dir_okay=False,
            help="Vectors, of any float dtype or uint8: .npy, .fvecs, .bvecs (these may be larger than memory) or "
            "ann-benchmarks .hdf5.",
        ),
    ],
    out_dir: Annotated[Path, typer.Argument(metavar="OUT_DIR", file_okay=False, help="Where the shard files go.")],
    shards: Annotated[
        int, typer.Option("--shards", min=1, metavar="N", help="Shard files to split the rows over.")
    ] = 1,
    partition: Annotated[
        PartitionName | None,
        typer.Option(
            help="How rows are split: equal ranges, or neighbours together (no shard over 1.1 times the mean), so that "
            "a query need not ask every shard. Default: kmeans for one graph, else range."
        ),
    ] = None,
    graph: Annotated[
        GraphName,
        typer.Option(
            help="independent: each shard has a graph of its own. global: the shards are linked to one graph, and a "
            "query is one walk over all of them."
        ),
    ] = GraphName.INDEPENDENT,
    ivf: Annotated[
        int,
        typer.Option(
            "--ivf",
            min=0,
            metavar="N",
            help="Inverted lists beside the graphs, over all shards, for searches in two rounds (SPIRE); 0: none. About "
            "one for 100 vectors is usual.",
        ),
    ] = 0,
    ivf_bits: Annotated[
        int, typer.Option("--ivf-bits", min=1, max=MAX_BITS, help="Bits a dimension of the codes in those lists.")
    ] = 2,
    vector_type: Annotated[
        VectorTypeName,
        typer.Option(
            help="How vectors are held. auto: uint8 and float16 as they are (not for cosine), others as float32. float16 "
            "rounds; uint8 must be exact."
        ),
    ] = VectorTypeName.AUTO,
    metric: Annotated[
        MetricName | None, typer.Option(help="Distance. Default: what an HDF5 file says, else l2.")
    ] = None,
    M: GraphM = 16,
    ef_construction: ConstructionEf = 200,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the graph's levels and of the code's rotation.")] = 100,
    threads: Annotated[int, typer.Option(min=0, help="Threads; 0: one for each core.")] = 0,
    dataset: Annotated[
        str | None, typer.Option(metavar="NAME", help="Data set of an HDF5 file. Default: train.", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a collection that is in OUT_DIR already.")] = False,
    as_json: Json = False,
) -> None:
    """Build graph shards from a file of vectors.

    Ids are row numbers. A failed run leaves OUT_DIR as it was.
    """
    begin = time.perf_counter()
    with open_vectors(source, dataset) as vectors, output.progress_bar("vectors", disable=as_json) as bar:
        task = bar.add_task("", total=vectors.count)

        def progress(shard: int, phase: str, done: int) -> None:
            bar.update(task, completed=done, description=phase if shard < 0 else f"shard {shard + 1}/{shards} {phase}")

        collection = build_collection(
            vectors,
            out_dir,
            shards,
            metric=metric.value if metric else vectors.metric or "l2",
            M=M,
            ef_construction=ef_construction,
            seed=seed,
            n_threads=threads,
            partition=partition.value if partition else None,
            graph=graph.value,
            n_lists=ivf,
            ivf_bits=ivf_bits,
            vector_type=vector_type.value,
            force=force,
            progress=progress,
        )
    seconds = time.perf_counter() - begin
    if as_json:
        compass = collection.calibration
        expected = compass.expected(DEFAULT_TARGET) if compass else float(shards)
        output.print_json(
            {"out_dir": str(out_dir), "seconds": seconds, **collection.summary(), "compass_shards": expected}
        )
        return
    output.print_table(
        ("shard", ">vectors", ">first id", ">size"),
        (
            (
                str(out_dir / shard.name),
                f"{shard.count:,}",
                f"{shard.first_id:,}",
                output.human_bytes(shard.image_bytes),
            )
            for shard in collection.shards
        ),
    )
    output.out.print(
        f"{collection.count:,} x {collection.dim} vectors, {collection.metric}, M={M}, "
        f"ef_construction={ef_construction}: {seconds:.1f} s, {collection.count / seconds:,.0f} vectors/s",
    )
    if collection.calibration is not None:
        expected = collection.calibration.expected(DEFAULT_TARGET)
        output.out.print(
            f"Compass: {expected:.1f} of {shards} shards hold {DEFAULT_TARGET:.0%} of a query's neighbours"
            if expected < shards
            else "Compass: every query asks all shards; --partition kmeans lets it leave some out",
        )
