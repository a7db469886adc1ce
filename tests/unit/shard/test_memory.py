"""How much memory packing takes: at most the image and hnswlib's own index."""

from __future__ import annotations

import json
import subprocess
import sys

PROGRAM = """
import json, sys
import hnswlib, numpy as np
import cotra_rdma

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

rows = np.random.default_rng(0).standard_normal((40_000, 128), dtype=np.float32)
index = hnswlib.Index(space="l2", dim=128)
index.init_index(len(rows), M=16, ef_construction=20)
index.add_items(rows)
with cotra_rdma.Shard.build(rows[:2000]):  # what is loaded and started once is not the packer's
    pass
before = peak()
with cotra_rdma.Shard.from_hnswlib(index) as shard:
    print(json.dumps({"grown": peak() - before, "image": shard.info.image_bytes}))
"""


def test_packing_takes_the_image_and_little_more() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout)
    assert figures["grown"] <= 1.1 * figures["image"], figures
