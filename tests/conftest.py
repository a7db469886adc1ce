"""What all tiers share: `--require`, real data, and small shards that are made once."""

from __future__ import annotations

import gc
import os
import sys
from importlib import resources
from pathlib import Path

# For the processes that tests start too. Before numpy is loaded: BLAS's threads spin while they wait for each other, and take
# half of the suite's time. And modules are compiled once, even where PYTHONDONTWRITEBYTECODE says otherwise.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("PYTHONPYCACHEPREFIX", str(Path(__file__).parents[1] / ".pytest_cache" / "bytecode"))
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import numpy as np
import numpy.typing as npt
import pytest

from cotra_rdma import Shard
from helpers.tiers import TIERS

Floats = npt.NDArray[np.float32]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require",
        action="append",
        choices=TIERS,
        default=[],
        metavar="TIER",
        help=f"fail, in place of skipping, where TIER ({', '.join(TIERS)}) cannot run; may be repeated",
    )


def pytest_configure(config: pytest.Config) -> None:
    sys.pycache_prefix, sys.dont_write_bytecode = os.environ["PYTHONPYCACHEPREFIX"], False  # of the tests themselves


def pytest_collection_finish() -> None:
    """The collector leaves alone what was imported and collected: to look through that each time is slow."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What tests measured and kept as a property "figure" is printed after the run, whichever process they ran in."""
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.getreports(outcome)]
    figures = [
        text for report in reports if report.when == "call" for name, text in report.user_properties if name == "figure"
    ]
    if figures:
        terminalreporter.section("figures")
        for line in figures:
            terminalreporter.write_line(str(line))


@pytest.fixture(scope="session")
def words() -> Floats:
    """The 20,000 most frequent words of GloVe: float32[20000, 100]."""
    with (resources.files("cotra_rdma") / "demo_data" / "vectors.npy").open("rb") as file:
        return np.load(file).astype(np.float32)


@pytest.fixture(scope="session")
def queries(words: Floats) -> Floats:
    """Vectors near those of words, but none of them: float32[200, 100]."""
    generator = np.random.default_rng(7)
    rows = words[generator.choice(len(words), 200, replace=False)]
    return (rows + 0.1 * generator.standard_normal(rows.shape)).astype(np.float32)


@pytest.fixture(scope="session")
def shards(words: Floats, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two shard files (cosine) of the first 4,000 words; ids are row numbers."""
    directory = tmp_path_factory.mktemp("shards")
    paths = []
    for part in range(2):
        rows = np.arange(2000 * part, 2000 * (part + 1))
        path = directory / f"shard-{part}.cotra"
        with Shard.build(words[rows], ids=rows, metric="cosine", ef_construction=100, n_threads=1) as shard:
            shard.save(path)
        paths.append(path)
    return paths


@pytest.fixture(scope="session")
def shard_with_lists(words: Floats, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard file of 1,000 words with ten inverted lists."""
    path = tmp_path_factory.mktemp("lists") / "shard.cotra"
    with Shard.build(words[:1000], M=4, ef_construction=20, n_threads=1, n_lists=10, ivf_bits=2) as shard:
        shard.save(path)
    return path
