#!/usr/bin/env python3
"""Prints the sizes of images of random vectors: bench/sizes.py [DIM...]. They do not depend on the values."""

import sys

import numpy as np

from cotra_rdma import Shard

N = 5000


def main() -> None:
    """Prints a row for each dimension."""
    print("dim  code bits  padding dims  record bytes  image / raw float32")
    for dim in [int(word) for word in sys.argv[1:]] or [100, 128, 384, 768, 960, 1536]:
        vectors = np.random.default_rng(0).standard_normal((N, dim), np.float32)
        with Shard.build(vectors, ef_construction=20, vector_type="float16") as shard:
            info = shard.info
        ratio = info.image_bytes / vectors.nbytes
        print(f"{dim:4} {info.code_dim:10} {info.code_dim - dim:13} {info.record_bytes:13} {ratio:20.3f}")


main()
