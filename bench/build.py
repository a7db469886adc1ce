"""Measures what a build of one graph costs, beside one hnswlib index of the same vectors.

    python bench/build.py base.npy --metric l2 --shards 16
    python bench/build.py base.npy --metric l2 --shards 4,8,16 --rows-per-shard 6250

Each line is a build by itself, with one thread a process.
The CPU time is that of all builder processes, from their start on.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from cotra_rdma._build.collection import build_collection
from cotra_rdma._build.processes import Usage
from cotra_rdma.datasets import open_vectors

HNSWLIB = """
import sys, time, hnswlib, numpy as np
rows = np.load(sys.argv[1], mmap_mode="r")[: int(sys.argv[2])]
index = hnswlib.Index(space=sys.argv[3], dim=rows.shape[1])
index.init_index(len(rows), M=16, ef_construction=200, random_seed=100)
for begin in range(0, len(rows), 4096):
    index.add_items(np.asarray(rows[begin : begin + 4096], np.float32), num_threads=1)
print(time.process_time())
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vectors", type=Path, help="a .npy file")
    parser.add_argument("--metric", default="l2")
    parser.add_argument("--shards", default="16", help="numbers of shards, with commas")
    parser.add_argument("--rows-per-shard", type=int, default=0, help="0: all rows")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    rows = len(np.load(options.vectors, mmap_mode="r"))
    print("shards      rows hnswlib s  build s  ratio  s/shard  peak MiB image MiB")
    for n_shards in map(int, options.shards.split(",")):
        count = min(rows, options.rows_per_shard * n_shards or rows)
        command = [sys.executable, "-c", HNSWLIB, str(options.vectors), str(count), options.metric]
        whole_s = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        used: list[Usage] = []
        begin = time.process_time()
        with open_vectors(options.vectors) as vectors, tempfile.TemporaryDirectory(dir="/var/tmp") as out:
            built = build_collection(
                vectors.first(count),
                out,
                n_shards,
                metric=options.metric,
                graph="global",
                n_threads=1,
                processes=options.processes,
                usage=used.append,
            )
        cpu_s = sum(builder.cpu_s for builder in used) + time.process_time() - begin
        peak, image = max(builder.peak_bytes for builder in used), max(shard.image_bytes for shard in built.shards)
        print(
            f"{n_shards:6} {count:9,} {whole_s:9.1f} {cpu_s:8.1f} {cpu_s / whole_s:6.2f} {cpu_s / n_shards:8.2f} "
            f"{peak / 2**20:9.0f} {image / 2**20:9.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
