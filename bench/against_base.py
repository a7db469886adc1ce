"""Measures two installed versions of cotra-rdma beside each other, on the same graphs, in one interleaved run.

    python bench/against_base.py --a BASE/.venv --b .venv DATA_DIR

Each version has a virtual environment and a worker process of its own.
A worker opens its own image of one hnswlib graph, since image formats may differ.
It has an owner process serve the image, and reads that over shm.
The workers search by turns: A B, then B A, and so on.
A ratio is of two searches that follow each other, so a noisy machine is noisy for both.
On a shared machine, ratios of CPU time say more than those of the wall clock.
With the same environment twice, the ratios show how far noise goes.

The table shows each version at recall 0.95 and 0.99 of its own curve of recall over ef.
It is linear between the two points around the recall, as in `cotra bench`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

M, EF_CONSTRUCTION, SEED, K = 16, 200, 100, 10
SETS = {"sift128": "l2", "glove100": "cosine", "embed384": "cosine"}
TARGETS = (0.95, 0.99)
EFS = (12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768)


# ---- the worker: it runs in one of the environments, and carries out lines of JSON ----


def work() -> None:
    """Reads commands from stdin, and answers each with one line on stdout, until stdin ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # so that nothing that a library prints is taken for an answer
    worker = Worker()
    try:
        for line in sys.stdin:
            command = json.loads(line)
            answer = getattr(worker, command.pop("do"))(**command)
            print(json.dumps(answer), file=out, flush=True)
    finally:
        worker.close()


class Worker:
    """One version of the package: an image, its owner, and a reader of it."""

    def __init__(self) -> None:
        self.owner: subprocess.Popen[bytes] | None = None
        self.cluster: Any = None

    def graph(self, data: str, name: str, metric: str, path: str) -> None:
        """Builds and keeps the hnswlib graph that both versions pack."""
        import hnswlib
        import numpy as np

        base = np.load(f"{data}/{name}_base.npy").astype(np.float32)
        index = hnswlib.Index(space=metric, dim=base.shape[1])
        index.init_index(len(base), M=M, ef_construction=EF_CONSTRUCTION, random_seed=SEED)
        index.add_items(base)
        index.save_index(f"{path}.part")
        Path(f"{path}.part").replace(path)

    def open(self, data: str, name: str, metric: str, path: str, image: str) -> dict[str, Any]:
        """Packs the graph to an image in this version's format, serves it and connects."""
        import hnswlib
        import numpy as np

        from cotra_rdma import Shard, connect

        self.close()
        self.queries = np.load(f"{data}/{name}_queries.npy").astype(np.float32)
        self.truth = [set(row) for row in np.load(f"{data}/{name}_gt.npy")[:, :K].tolist()]
        index = hnswlib.Index(space=metric, dim=self.queries.shape[1])
        index.load_index(path)
        with Shard.from_hnswlib(index) as shard:
            shard.save(image)
        command = [sys.executable, "-P", "-m", "cotra_rdma.cli", "serve", image, "--json", "--until-stdin-closes"]
        command += ["--listen", "127.0.0.1:0", "--transport", "shm,rpc", "--no-announce"]
        self.owner = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.owner.stdout is not None
        ready = json.loads(self.owner.stdout.readline())
        self.cluster = connect([ready["shards"][0]["address"]], transport="shm")
        return {"bytes": os.path.getsize(image)}

    def search(self, ef: int, beam: int, threads: int, repeats: int) -> dict[str, Any]:
        """Searches all queries some times.

        Returns:
            The seconds of each time by the wall clock and by this process's CPU clock, the recall, and the cost.
        """
        wall, cpu = [], []
        for _ in range(repeats):
            begin, cpu_begin = time.perf_counter(), time.process_time()
            result = self.cluster.search(self.queries, k=K, ef=ef, beam=beam, n_threads=threads)
            wall.append(time.perf_counter() - begin)
            cpu.append(time.process_time() - cpu_begin)
        found = sum(len(truth.intersection(ids)) for truth, ids in zip(self.truth, result.ids.tolist(), strict=True))
        return {
            "wall_s": wall,
            "cpu_s": cpu,
            "queries": len(self.queries),
            "recall": found / (K * len(self.queries)),
            "reads": float(result.stats["reads"].mean()),
            "bytes": float(result.stats["read_bytes"].mean()),
        }

    def close(self) -> None:
        """Disconnects, and ends the owner."""
        if self.cluster is not None:
            self.cluster.close()
            self.cluster = None
        if self.owner is not None:
            assert self.owner.stdin is not None
            self.owner.stdin.close()
            self.owner.wait(30)
            self.owner = None


# ---- the run: it tells the workers by turns what to do ----


class Version:
    """A worker process in one environment."""

    def __init__(self, label: str, environment: Path) -> None:
        python = environment / "bin" / "python"
        self.label = label
        command = [python, "-P", Path(__file__).resolve(), "--worker"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, do: str, **arguments: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps({"do": do, **arguments}), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the worker of version {self.label} ended in {do!r}: see above")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


def bracket(curve: Sequence[dict[str, Any]], target: float) -> tuple[int, int, float] | None:
    """Returns the two points of a curve around a recall, and the part of the way between them.

    It returns None if the curve does not pass the recall.
    """
    for i, (low, high) in enumerate(itertools.pairwise(curve)):
        if low["recall"] <= target <= high["recall"]:
            span = high["recall"] - low["recall"]
            return i, i + 1, (target - low["recall"]) / span if span else 0.0
    return None


def between(share: float, low: float, high: float) -> float:
    return low + share * (high - low)


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def compare(
    versions: Sequence[Version], efs: Sequence[int], beam: int, threads: int, repeats: int
) -> list[dict[str, Any]]:
    """Makes a row for each target recall."""
    curves = [[v("search", ef=ef, beam=beam, threads=threads, repeats=1) for ef in efs] for v in versions]
    rows = []
    for target in TARGETS:
        around = [bracket(curve, target) for curve in curves]
        row: dict[str, Any] = {"recall": target, "beam": beam}
        rows.append(row)
        if None in around:
            row["reached"] = [[curve[0]["recall"], curve[-1]["recall"]] for curve in curves]
            continue
        qps: dict[str, list[list[float]]] = {"wall_s": [[], []], "cpu_s": [[], []]}
        for repeat in range(repeats):
            seconds: list[list[dict[str, float]]] = [[], []]
            for end in (0, 1):  # the point below the target, then the one above
                for which in (0, 1) if repeat % 2 == 0 else (1, 0):
                    ef = efs[around[which][end]]  # type: ignore[index]
                    told = versions[which]("search", ef=ef, beam=beam, threads=threads, repeats=1)
                    seconds[which].append({clock: told["queries"] / told[clock][0] for clock in qps})
            for clock, which in itertools.product(qps, (0, 1)):
                low, high = (point[clock] for point in seconds[which])
                qps[clock][which].append(between(around[which][2], low, high))  # type: ignore[index]
        for clock, name in (("wall_s", "qps"), ("cpu_s", "cpu_qps")):
            row[name] = [statistics.median(values) for values in qps[clock]]
            row[f"{name}_ratio"] = spread([b / a for a, b in zip(*qps[clock], strict=True)])
        for name in ("reads", "bytes"):
            row[name] = [
                between(share, curve[low][name], curve[high][name])
                for curve, (low, high, share) in zip(curves, around, strict=True)  # type: ignore[misc]
            ]
            row[f"{name}_ratio"] = row[name][1] / row[name][0]
        row["efs"] = [[efs[low], efs[high]] for low, high, _ in around]  # type: ignore[misc]
    return rows


HEADER = (
    "| data | recall | beam | QPS A | QPS B | QPS ratio, wall clock | QPS ratio, CPU time | READs A | READs B | ratio "
    "| KiB A | KiB B | ratio |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def table_row(name: str, row: dict[str, Any]) -> str:
    cells = [name, f"{row['recall']:.2f}", f"{row['beam']}"]
    if "reached" in row:
        ends = (f"{label}: {low:.4f} to {high:.4f}" for label, (low, high) in zip("AB", row["reached"], strict=True))
        cells += [f"not on both curves ({', '.join(ends)}): other --ef", *[""] * 9]
    else:
        cells += [f"{qps:,.0f}" for qps in row["qps"]]
        for ratio in (row["qps_ratio"], row["cpu_qps_ratio"]):
            cells.append(f"{ratio['median']:.3f} ({ratio['min']:.3f}-{ratio['max']:.3f})")
        cells += [*(f"{reads:.1f}" for reads in row["reads"]), f"{row['reads_ratio']:.3f}"]
        cells += [*(f"{n_bytes / 1024:.1f}" for n_bytes in row["bytes"]), f"{row['bytes_ratio']:.3f}"]
    return f"| {' | '.join(cells)} |"


def numbers(text: str) -> list[int]:
    return sorted({int(part) for part in text.split(",")})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="directory of NAME_base.npy, NAME_queries.npy and NAME_gt.npy")
    parser.add_argument("--a", type=Path, required=True, help="virtual environment of the version to compare with")
    parser.add_argument("--b", type=Path, required=True, help="virtual environment of the version that is compared")
    parser.add_argument("--sets", default=",".join(SETS), help="data sets (default: %(default)s)")
    parser.add_argument("--ef", type=numbers, default=list(EFS), help="points of the curves (default: %(default)s)")
    parser.add_argument("--beam", type=numbers, default=[1, 8], help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=31, help="pairs of measurements (default: %(default)s)")
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path.home() / ".cache" / "cotra-rdma",
        help="where graphs are kept (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one row a line, as JSON")
    options = parser.parse_args()
    names = options.sets.split(",")
    for name in names:
        if name not in SETS:
            parser.error(f"--sets: {name!r} is not one of {', '.join(SETS)}")
    for environment in (options.a, options.b):
        if not (environment / "bin" / "python").exists():
            parser.error(f"{environment} is not a virtual environment: it has no bin/python")
    options.cache.mkdir(parents=True, exist_ok=True)
    if not options.json:
        print(
            f"A: {options.a}, B: {options.b}. "
            f"Ratios are B / A: median and range of {options.repeats} pairs.\n\n{HEADER}"
        )
    versions = [Version("A", options.a), Version("B", options.b)]
    try:
        with tempfile.TemporaryDirectory(dir=options.cache) as images:
            for name in names:
                data = {"data": str(options.data), "name": name, "metric": SETS[name]}
                graph = str(options.cache / f"{name}-{SETS[name]}-M{M}-efc{EF_CONSTRUCTION}-seed{SEED}.hnsw")
                if not Path(graph).exists():
                    versions[0]("graph", **data, path=graph)
                for version in versions:
                    version("open", **data, path=graph, image=f"{images}/{name}.{version.label}")
                for beam in options.beam:
                    for row in compare(versions, options.ef, beam, options.threads, options.repeats):
                        line = json.dumps({"dataset": name, **row}) if options.json else table_row(name, row)
                        print(line, flush=True)
    finally:
        for version in versions:
            version.close()


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        work()
    else:
        main()
