"""Arithmetic that is the same on every machine, and builds whose bytes are."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cotra_rdma._core.exact import exp, log, long_products, products, solve, widest


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e12])
def test_products_are_near(scale: float) -> None:
    generator = np.random.default_rng(0)
    rows, others = generator.standard_normal((50, 300)) * scale, generator.standard_normal((7, 300))
    rows[3], others[2] = 0, 0
    rows[4, 5] = 1e6 * scale
    exact = rows @ others.T
    lengths = np.abs(rows).max(axis=1)[:, np.newaxis] * np.abs(others).max(axis=1) * 300
    assert (np.abs(products(rows, others) - exact) <= 2.0**-19 * lengths).all()
    assert (np.abs(long_products(rows, others) - exact) <= 2.0**-19 * lengths).all()
    assert not products(rows, others)[3].any()


def test_the_order_of_components_does_not_matter() -> None:
    generator = np.random.default_rng(1)
    rows, others = generator.standard_normal((20, 4096)), generator.standard_normal((5, 4096))
    order = generator.permutation(4096)
    np.testing.assert_array_equal(products(rows, others), products(rows[:, order], others[:, order]))


def test_exponentials_and_logarithms() -> None:
    values = np.concatenate([np.linspace(-700, 700, 4001), [0.0, -0.0, 1e-300, -1e-300]])
    np.testing.assert_allclose(exp(values), [math.exp(value) for value in values], rtol=4e-15)
    assert exp(np.array([-1e9]))[0] == 0
    above = np.concatenate([np.geomspace(1e-300, 1e300, 3001), np.linspace(0.5, 2, 1001)])
    np.testing.assert_allclose(log(above), [math.log(value) for value in above], rtol=1e-14, atol=1e-15)


def test_equations_and_directions() -> None:
    generator = np.random.default_rng(2)
    half = generator.standard_normal((40, 40))
    matrix = half @ half.T + np.eye(40)
    right = generator.standard_normal(40)
    np.testing.assert_allclose(matrix @ solve(matrix, right), right, atol=1e-9)
    turned, _ = np.linalg.qr(generator.standard_normal((30, 30)))
    values = 2.0 ** -np.arange(30)
    found = widest(turned @ np.diag(values) @ turned.T, 4)
    np.testing.assert_allclose(np.abs((found * turned[:, :4].T).sum(axis=1)), 1, atol=1e-4)
    assert not widest(np.zeros((8, 8)), 2).any()


# ---- builds ----

BUILD = """
import sys
import numpy as np
from cotra_rdma._build.collection import build_collection
from cotra_rdma.datasets import open_vectors
knobs = {"M": 8, "ef_construction": 40, "n_threads": 1, "n_lists": 6}
with open_vectors(sys.argv[1]) as rows:
    build_collection(rows, sys.argv[2] + "/one", 2, metric="cosine", graph="global", **knobs)
    build_collection(rows, sys.argv[2] + "/apart", 2, partition="kmeans", **knobs)
"""
MACHINES = {
    "two threads": {"OPENBLAS_NUM_THREADS": "2"},
    "haswell": {"OPENBLAS_CORETYPE": "Haswell"},
    "zen": {"OPENBLAS_CORETYPE": "Zen"},
    "prescott": {"OPENBLAS_CORETYPE": "Prescott", "OPENBLAS_NUM_THREADS": "2"},
    "numpy without AVX-512": {
        "NPY_DISABLE_CPU_FEATURES": "AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL"
    },
}


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_build_is_the_same_bytes_whatever_blas_does(words: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", words[:500])
    found = {}
    for name, machine in {"one thread": {"OPENBLAS_NUM_THREADS": "1"}, **MACHINES}.items():
        out = tmp_path / name.replace(" ", "-")
        out.mkdir()
        env = {key: value for key, value in os.environ.items() if not key.startswith(("OPENBLAS", "NPY"))}
        command = [sys.executable, "-W", "ignore", "-c", BUILD, str(tmp_path / "rows.npy"), str(out)]
        subprocess.run(command, env=env | machine, check=True, capture_output=True, text=True)
        found[name] = files_of(out)
    expected = found.pop("one thread")
    assert len(expected) > 8
    for name, files in found.items():
        assert files.keys() == expected.keys(), name
        assert [path for path in expected if files[path] != expected[path]] == [], name
