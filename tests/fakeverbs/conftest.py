"""This tier's tests run in processes whose loader finds the fake libibverbs first; what they report is reported here.

The loader is asked once a process, so each kind of library needs a process of its own. A module names the one it wants:

    LIBRARY = "fake"     every symbol that csrc/verbs/verbs.h lists (the default)
              "old"      one of them only in another version than IBVERBS_1.1
              "broken"   a file that is no library

In such a process (`INSIDE` is in its environment) pytest runs the same files as ever; outside, `pytest_runtest_protocol` sends
it the tests that were selected, and replays its reports. A test that ends its process fails with what was printed; those after
it go on in a new one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import IO, Any

import pytest

from cotra_rdma._native.verbs import compiled
from helpers.fakeverbs import Fake
from helpers.tiers import cannot_run

HERE = Path(__file__).parent
SOURCES = HERE / "library"
INSIDE = "COTRA_FAKEVERBS_REPORTS"
OLD_SYMBOL = "ibv_query_gid"
TEST_TIMEOUT_S = 30
Reports = dict[str, list[pytest.TestReport]]
REPORTS = pytest.StashKey[Reports]()

# ---- outside: the libraries, and the processes that load them ----


@cache
def missing() -> str:
    """What this tier needs and does not find; "" when it can run."""
    if not compiled():
        return "cotra-rdma was built without <infiniband/verbs.h>: install libibverbs-dev (or rdma-core-devel), build again"
    if shutil.which("gcc") is None:
        return "gcc is missing: install it"
    include = "#include <infiniband/verbs.h>\n"
    if subprocess.run(["gcc", "-E", "-xc", "-"], input=include, text=True, capture_output=True, check=False).returncode:
        return "<infiniband/verbs.h> is missing: install libibverbs-dev (or rdma-core-devel)"
    return ""


def make_library(kind: str, directory: Path) -> None:
    """Puts a libibverbs.so.1 of that kind into the directory."""
    target = directory / "libibverbs.so.1"
    if kind == "broken":
        target.write_text("no library\n")
        return
    versions = "IBVERBS_1.1 { global: ibv_*; fake_*; local: *; };\n"
    if kind == "old":
        versions += f"IBVERBS_1.2 {{ global: {OLD_SYMBOL}; }} IBVERBS_1.1;\n"
    script = directory / "libibverbs.map"
    script.write_text(versions)
    flags = [
        "-std=gnu11",
        "-O1",
        "-g",
        "-Wall",
        "-Wextra",
        "-Wshadow",
        "-Wmissing-prototypes",
        "-Werror",
        "-shared",
        "-fPIC",
        "-pthread",
    ]
    link = ["-Wl,-soname,libibverbs.so.1", f"-Wl,--version-script={script}"]
    subprocess.run(["gcc", *flags, *link, *sorted(SOURCES.glob("*.c")), "-o", target], check=True)


def library_of(item: pytest.Item) -> str:
    module = item.getparent(pytest.Module)
    return str(getattr(module.obj if module else None, "LIBRARY", "fake"))


def run_inside(config: pytest.Config, directory: Path, nodeids: list[str]) -> Reports:
    """Runs tests in processes that load the directory's library, until each has reported."""
    reports: Reports = {nodeid: [] for nodeid in nodeids}
    waiting = nodeids
    while waiting:
        path = directory / "reports"
        path.write_text("")
        environment = dict(os.environ, LD_LIBRARY_PATH=str(directory), PYTHONFAULTHANDLER="1")
        environment[INSIDE] = str(path)
        options = ["-q", "-p", "no:cacheprovider", f"--timeout={TEST_TIMEOUT_S}", f"--rootdir={config.rootpath}"]
        command = [sys.executable, "-m", "pytest", *options, "-c", str(config.inipath), *waiting]
        done = subprocess.run(
            command, cwd=config.rootpath, env=environment, text=True, capture_output=True, check=False
        )
        running = ""
        for line in path.read_text().splitlines():
            data = json.loads(line)
            if "started" in data:
                running = data["started"]
                continue
            report = config.hook.pytest_report_from_serializable(config=config, data=data)
            if isinstance(report.longrepr, list):  # a skip's, a tuple before it was JSON
                report.longrepr = tuple(report.longrepr)
            reports[report.nodeid].append(report)
            if report.when == "teardown":
                running = ""
        waiting = [nodeid for nodeid in waiting if nodeid != running and not reports[nodeid]]
        if waiting or running:
            culprit = running or waiting.pop(0)
            said = f"its process ended with {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
            report = pytest.TestReport(culprit, (culprit, None, culprit.partition("::")[2]), {}, "failed", said, "call")
            reports[culprit] = [report]
    return reports


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    config = item.config
    if INSIDE in os.environ or HERE not in item.path.parents or missing():
        return None
    reports = config.stash.setdefault(REPORTS, {})
    if item.nodeid not in reports:
        kind = library_of(item)
        ours = [other for other in item.session.items if HERE in other.path.parents]
        with tempfile.TemporaryDirectory(prefix="cotra-fakeverbs-") as directory:
            make_library(kind, Path(directory))
            reports.update(
                run_inside(config, Path(directory), [other.nodeid for other in ours if library_of(other) == kind])
            )
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in reports[item.nodeid]:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if INSIDE not in os.environ and HERE in item.path.parents:
        cannot_run(item.config, "fakeverbs", missing())


# ---- inside ----


class Recorder:
    """Writes each report as a line."""

    def __init__(self, config: pytest.Config, file: IO[str]) -> None:
        self._config = config
        self._file = file

    def _write(self, data: dict[str, Any]) -> None:
        self._file.write(json.dumps(data) + "\n")
        self._file.flush()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write({"started": nodeid})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._write(self._config.hook.pytest_report_to_serializable(config=self._config, report=report))


def pytest_configure(config: pytest.Config) -> None:
    if INSIDE in os.environ:
        file = Path(os.environ[INSIDE]).open("a")  # noqa: SIM115 (as long as the process)
        config.add_cleanup(file.close)
        config.pluginmanager.register(Recorder(config, file))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    """The fake library's settings and faults; after the test no object of its may be left."""
    library = Fake(monkeypatch)
    library.reset()
    before = library.live_objects()  # what a test before this one, which failed by it, has left
    yield library
    library.heal()
    assert library.live_objects() in ("", before)
