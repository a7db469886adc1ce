"""A build's files are the same, byte for byte, with any BLAS, any number of its threads, and whatever numpy finds in the CPU."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

BUILD = """
import sys
from pathlib import Path
from cotra_rdma.collection import build_collection
from cotra_rdma.datasets import open_vectors

out = Path(sys.argv[2])
common = {"M": 8, "ef_construction": 40, "n_threads": 1, "seed": 3}
build_collection(open_vectors(sys.argv[1]), out / "graph", 3, graph="global", metric="cosine", n_lists=12, **common)
build_collection(open_vectors(sys.argv[1]), out / "kmeans", 3, partition="kmeans", metric="ip", n_lists=12, **common)
"""
# What numpy found in this CPU beyond what it needs: without it, other loops run.
FOUND = " ".join(np.show_config(mode="dicts")["SIMD Extensions"].get("found", []))
ENVIRONMENTS = [
    {"OPENBLAS_NUM_THREADS": "2"},
    {"OPENBLAS_CORETYPE": "Haswell"},
    {"OPENBLAS_CORETYPE": "Zen"},
    {"OPENBLAS_CORETYPE": "Prescott"},
    {"NPY_DISABLE_CPU_FEATURES": FOUND},
]


def digests(vectors: Path, out: Path, environment: dict[str, str]) -> dict[str, str]:
    """Of all files that a process of its own builds."""
    settings = os.environ | {"OPENBLAS_NUM_THREADS": "1"} | environment
    subprocess.run([sys.executable, "-c", BUILD, str(vectors), str(out)], env=settings, check=True)
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def vectors(words: npt.NDArray[np.float32], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vectors") / "vectors.npy"
    np.save(path, words[:1500])
    return path


@pytest.fixture(scope="module")
def expected(vectors: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return digests(vectors, tmp_path_factory.mktemp("expected"), {})


@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=lambda given: "-".join(*given.items()).replace(" ", "-"))
def test_a_build_does_not_depend_on_the_machines_libraries(
    vectors: Path, expected: dict[str, str], environment: dict[str, str], tmp_path: Path
) -> None:
    found = digests(vectors, tmp_path / "out", environment)
    assert len(found) == 2 * (3 * 2 + 1)
    assert [name for name in found if found[name] != expected[name]] == []
    assert found.keys() == expected.keys()
