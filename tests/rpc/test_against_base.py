"""bench/against_base.py: two environments, each with an owner and a reader of its own, beside each other."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

SCRIPT = Path(__file__).parents[2] / "bench" / "against_base.py"


def against_base(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, "--a", sys.prefix, "--b", sys.prefix, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_version_beside_itself(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    base, queries = (rng.normal(size=(n, 32)).astype(np.float32) for n in (4000, 50))
    truth = np.argsort(np.square(base - queries[:, np.newaxis]).sum(axis=2))[:, :10]
    for name, array in (("base", base), ("queries", queries), ("gt", truth)):
        np.save(tmp_path / f"sift128_{name}.npy", array)
    options = [tmp_path, "--cache", tmp_path / "cache", "--sets", "sift128", "--repeats", 2, "--beam", 8]
    found = against_base(*options, "--ef", "10,400", "--json")
    assert found.returncode == 0, found.stderr
    rows = [json.loads(line) for line in found.stdout.splitlines()]
    assert [(row["dataset"], row["recall"], row["beam"]) for row in rows] == [
        ("sift128", 0.95, 8),
        ("sift128", 0.99, 8),
    ]
    for row in rows:
        assert row["reads_ratio"] == row["bytes_ratio"] == 1.0
        assert row["efs"] == [[10, 400], [10, 400]]
        for name in ("qps", "cpu_qps"):
            ratio = row[f"{name}_ratio"]
            assert min(row[name]) > 0
            assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
    kept = sorted((tmp_path / "cache").iterdir())
    assert [path.suffix for path in kept] == [".hnsw"]  # the graph, and no image

    changed = kept[0].stat().st_mtime_ns
    shown = against_base(*options, "--ef", "10,12")
    assert shown.returncode == 0, shown.stderr
    assert "| 0.99 | 8 | not on both curves" in shown.stdout
    assert kept[0].stat().st_mtime_ns == changed


def test_what_is_no_environment_is_named(tmp_path: Path) -> None:
    found = against_base(tmp_path, "--b", tmp_path, "--cache", tmp_path / "cache")
    assert found.returncode == 2
    assert f"{tmp_path} is not a virtual environment" in found.stderr
    assert against_base(tmp_path, "--sets", "deep1b").returncode == 2
