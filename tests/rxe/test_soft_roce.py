"""The Soft-RoCE tier: the checks in guest/ run once, where an rxe device is, and each is reported here by name.

That is this machine when it has an active rxe device (`sudo sh tools/rxe_setup.sh` makes one where the kernel has rdma_rxe),
else a virtual machine that is booted for the purpose: see tools/rxe_vm.py and docs/contributing/testing.md.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest

from cotra_rdma import Shard
from cotra_rdma._build.collection import build_collection
from cotra_rdma._native.verbs import Device, devices
from cotra_rdma.datasets import open_vectors
from cotra_rdma.errors import VerbsUnavailableError
from helpers.tiers import cannot_run

ROOT = Path(__file__).parents[2]
GUEST = Path(__file__).with_name("guest")
TIMEOUT_S = 1500
VM_DEVICE = "rxe0"

pytestmark = [pytest.mark.rxe, pytest.mark.timeout(TIMEOUT_S + 300)]


def checks() -> list[str]:
    """Every check's name: its functions, and a class of the contract as one."""
    return [
        node.name
        for path in sorted(GUEST.glob("check_*.py"))
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name.startswith(("check_", "Test"))
    ]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one check went: `problem` is empty when it passed."""

    problem: str
    skipped: str


@dataclass(frozen=True, slots=True)
class Results:
    """Of all checks, by name, and the lines of what they measured."""

    outcomes: Mapping[str, list[Outcome]]
    figures: list[str]


def active_rxe_device() -> str | None:
    """The name of an rxe device with an active port, here."""
    try:
        names = [device.name for device in devices()]
    except VerbsUnavailableError:
        return None
    for name in names:
        driver = Path(f"/sys/class/infiniband/{name}/parent")  # only Soft-RoCE has it: its network interface
        if name.startswith("rxe") or driver.exists():
            with Device(name) as device:
                if any(device.port(number + 1).state == 4 for number in range(device.info.n_ports)):
                    return name
    return None


def load_vm() -> ModuleType:
    """tools/rxe_vm.py."""
    spec = importlib.util.spec_from_file_location("rxe_vm", ROOT / "tools" / "rxe_vm.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def prepare(out: Path, words: npt.NDArray[np.float32], queries: npt.NDArray[np.float32]) -> None:
    """Two shards of all 20,000 words, the queries, and a collection of 4,000 words with inverted lists; and all words as one
    graph, in one shard and in four, and as four graphs."""
    np.save(out / "small.npy", words[:4000])
    with open_vectors(out / "small.npy") as vectors:
        build_collection(vectors, out / "collection", 4, metric="cosine", partition="kmeans", n_lists=40)
    (out / "shards").mkdir()
    for part in range(2):
        rows = np.arange(10_000 * part, 10_000 * (part + 1))
        with Shard.build(words[rows], ids=rows, metric="cosine") as shard:
            shard.save(out / "shards" / f"shard-{part}.cotra")
    np.save(out / "all.npy", words)
    for name, n_shards, graph in (("graph-1", 1, "global"), ("graph-4", 4, "global"), ("apart-4", 4, "independent")):
        with open_vectors(out / "all.npy") as vectors:
            build_collection(vectors, out / name, n_shards, metric="cosine", graph=graph, partition="kmeans")
    np.save(out / "queries.npy", queries)


def run(config: pytest.Config, out: Path) -> int:
    """Runs the checks; their exit status."""
    device = active_rxe_device()
    where = out if device is not None else Path("/out")
    command = [
        *(sys.executable, "-B", "-m", "pytest", "-p", "no:cacheprovider", "-v", "--junitxml", str(where / "junit.xml")),
        *("-o", "python_files=check_*.py", "-o", "python_functions=check_* test_*"),
        *("-o", "pythonpath=tests tests/rxe/guest", "-W", "default", str(GUEST)),
    ]
    environment = {"COTRA_RXE_OUT": str(where), "COTRA_RXE_DEVICE": device or VM_DEVICE}
    if device is not None:
        with (out / "command.log").open("wb") as log:
            done = subprocess.run(
                ["timeout", str(TIMEOUT_S), *command],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                cwd=ROOT,
                check=False,
            )
        return done.returncode
    vm = load_vm()
    try:
        status: int = vm.run(command, out, timeout_s=TIMEOUT_S, environment=environment)
    except vm.CannotRunError as error:
        cannot_run(config, "rxe", f"no active rxe device here, and no virtual machine: {error}")
    if not (out / "status").exists():
        pytest.fail(f"the virtual machine ended without a result:\n{vm.console(out)[-4000:]}", pytrace=False)
    return status


def outcomes(junit: Path) -> dict[str, list[Outcome]]:
    """The outcomes in a JUnit file, by check."""
    found: dict[str, list[Outcome]] = {}
    for case in ElementTree.parse(junit).getroot().iter("testcase"):
        name = case.attrib["name"].partition("[")[0]
        owner = case.attrib["classname"].rpartition(".")[2]
        problems = [part.text or part.attrib["message"] for part in case if part.tag in ("failure", "error")]
        skips = [part.attrib["message"] for part in case if part.tag == "skipped"]
        key = owner if owner.startswith("Test") else name
        found.setdefault(key, []).append(Outcome("\n".join(problems), "\n".join(skips)))
    return found


@pytest.fixture(scope="session")
def run_there(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    words: npt.NDArray[np.float32],
    queries: npt.NDArray[np.float32],
) -> Results:
    out = tmp_path_factory.mktemp("rxe")
    prepare(out, words, queries)
    status = run(request.config, out)
    log = (out / "command.log").read_text("utf-8", "replace")
    if not (out / "junit.xml").exists():
        pytest.fail(f"the checks ended with status {status} and no report:\n{log[-6000:]}", pytrace=False)
    found = outcomes(out / "junit.xml")
    if not found.keys() >= set(checks()):
        pytest.fail(f"not every check ran (status {status}):\n{log[-6000:]}", pytrace=False)
    figures = (out / "figures.txt").read_text(encoding="utf-8") if (out / "figures.txt").exists() else ""
    return Results(found, figures.splitlines())


@pytest.mark.parametrize("check", checks())
def test_on_soft_roce(
    check: str, run_there: Results, request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> None:
    while run_there.figures:  # with the first check's report
        record_property("figure", run_there.figures.pop(0))
    results = run_there.outcomes
    problems = [outcome.problem for outcome in results[check] if outcome.problem]
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)
    skips = [outcome.skipped for outcome in results[check] if outcome.skipped]
    if skips:
        cannot_run(request.config, "rxe", "; ".join(skips))
