"""Builds a collection: splits a data set into shards, builds each shard, and publishes all of them at once."""

from __future__ import annotations

import os
from collections.abc import Callable

from cotra_rdma._build.independent import build_independent
from cotra_rdma._build.processes import BuildProcesses, Usage
from cotra_rdma._build.publication import Publication
from cotra_rdma._build.spec import BuildSpec, Progress
from cotra_rdma._build.steps import GraphResult, build_here
from cotra_rdma._collection.manifest import GRAPHS, PARTITIONS, Collection, ShardFile
from cotra_rdma._shard.params import BuildParams
from cotra_rdma.datasets import VectorFile
from cotra_rdma.errors import InvalidInputError


def build_collection(
    vectors: VectorFile,
    directory: str | os.PathLike[str],
    n_shards: int = 1,
    *,
    metric: str = "l2",
    M: int = 16,
    ef_construction: int = 200,
    seed: int = 100,
    n_threads: int = 0,
    partition: str | None = None,
    graph: str = "independent",
    n_lists: int = 0,
    ivf_bits: int = 2,
    vector_type: str = "auto",
    force: bool = False,
    progress: Progress | None = None,
    processes: int = 0,
    usage: Callable[[Usage], None] | None = None,
) -> Collection:
    """Splits the rows of a file into shards, builds each shard, and writes the shards to a directory.

    The coarse tables of the shards and the manifest lie beside them.

    One shard is in memory at a time: its vectors while hnswlib builds, and then its image.
    Independent shards take 8 more bytes for each row of the data set.
    Inverted lists take a second copy of the image.
    The files are written to a temporary directory, and renamed when all are complete.
    So a build that fails leaves the directory as it was.

    Args:
        vectors: the data set. Row numbers become ids.
        directory: the directory of the collection. It is made if it is missing.
        n_shards: the number of shards, at most the number of rows.
        metric: as for `Shard.build`.
        M: as for `Shard.build`.
        ef_construction: as for `Shard.build`.
        seed: as for `Shard.build`.
        n_threads: as for `Shard.build`. With `processes`, it is the number of threads of each process.
        partition: "range" makes equal ranges of rows. "kmeans" keeps neighbours together, so that Compass can leave
            shards out; no shard is then larger than 1.1 times the mean. None stands for "kmeans" for one graph, and for
            "range" otherwise.
        graph: "independent" makes shards that are searched by themselves. "global" makes one graph over all shards
            (`cotra_rdma._build.cross_links`), so that a query is one walk.
        n_lists: the number of inverted lists beside the graphs, of all shards together. 0 stands for none.
        ivf_bits: the bits of each dimension in the lists' codes, 1 to 8.
        vector_type: the type in which vectors are stored, as for `Shard.build`.
        force: whether to replace a collection that is already in the directory.
        progress: called with (shard, phase, rows done). Rows are counted over the whole data set, anew for each of
            "build" and "pack" (counted as one), "border" and "relink". The last two are phases of one graph. For the
            phases "partition" and "calibrate" the shard is -1.
        processes: the number of builder processes on this host, for one graph. Each builds one shard at a time. 0
            builds in this process. The result is the same if each builder has one thread. `build_on_machine` builds on
            a machine for each shard.
        usage: called with the usage of each of these processes when its work is done.

    Returns:
        The collection.

    Raises:
        InvalidInputError: there is a collection already, or a value is out of its range.
        PeerError: a builder process ended before its work was done.
    """
    partition = check_build(vectors, n_shards, partition, graph, n_lists, processes)
    params = BuildParams(metric, M, ef_construction, seed, n_threads, n_lists, ivf_bits, vector_type)
    with Publication(directory, force=force) as publication:
        aside = publication.aside
        spec = BuildSpec(vectors.count, vectors.dim, n_shards, params, publication.generation)
        if graph == "independent" or n_shards == 1:
            collection = build_independent(spec, vectors, aside, partition, graph, progress)
        else:
            overall = progress and _Overall(progress)
            if processes:
                with BuildProcesses(processes, spec, vectors, aside, usage=usage) as pool:
                    result = pool.run(overall)
            else:
                result = build_here(spec, vectors, aside, overall)
            collection = of_graph(spec, result)
        return publication.publish(collection)


def check_build(
    vectors: VectorFile, n_shards: int, partition: str | None, graph: str, n_lists: int, processes: int = 0
) -> str:
    """Checks that the arguments of a build fit each other.

    Returns:
        The partition, with None replaced by the default.

    Raises:
        InvalidInputError: a value is out of its range, or does not fit the others.
    """
    if n_lists and not n_shards <= n_lists <= vectors.count:
        raise InvalidInputError(f"n_lists must be 0 or in [{n_shards}, {vectors.count}], not {n_lists}")
    if graph not in GRAPHS:
        raise InvalidInputError(f"graph must be one of {', '.join(GRAPHS)}, not {graph!r}")
    partition = partition or ("kmeans" if graph == "global" else "range")
    if partition not in PARTITIONS:
        raise InvalidInputError(f"partition must be one of {', '.join(PARTITIONS)}, not {partition!r}")
    if not 1 <= n_shards <= vectors.count:
        raise InvalidInputError(f"{vectors.count} rows cannot be split into {n_shards} shards")
    if graph == "global" and n_shards > 1 and partition != "kmeans":
        raise InvalidInputError("one graph over all shards needs neighbours together: use partition kmeans")
    if processes < 0:
        raise InvalidInputError(f"processes must be >= 0, not {processes}")
    if processes and (graph != "global" or n_shards < 2):
        raise InvalidInputError("builder processes can only build one graph over several shards (graph global)")
    return partition


def of_graph(spec: BuildSpec, result: GraphResult) -> Collection:
    """Makes the manifest of one graph."""
    shards = [
        ShardFile(
            f"shard-{number:03d}.cotra",
            shard.first_id,
            shard.count,
            shard.image_bytes,
            f"shard-{number:03d}.coarse",
            shard.base,
            spec.generation,
            shard.image_checksum,
            shard.centroid,
        )
        for number, shard in enumerate(result.shards)
    ]
    return spec.collection(shards, "kmeans", "global", result.calibration, result.graph_id)


class _Overall:
    """Reports the progress of a whole build, from the progress of each shard.

    Rows are summed over the shards. The phases "build", "link" and "pack" count as one.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._done: dict[str, dict[int, int]] = {}

    def __call__(self, number: int, phase: str, done: int) -> None:
        part = self._done.setdefault("build" if phase in ("link", "pack") else phase, {})
        part[number] = done
        self._progress(-1 if phase in ("partition", "calibrate") else number, phase, sum(part.values()))
