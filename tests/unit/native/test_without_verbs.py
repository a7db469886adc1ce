"""A build without <infiniband/verbs.h>: it installs, imports and searches; and says why there is no verbs wherever it matters."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

PROGRAM = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("cotra_rdma._cotra", sys.argv[1])
module = sys.modules["cotra_rdma._cotra"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)

import numpy as np
import cotra_rdma
from cotra_rdma._native.verbs import compiled, devices
from cotra_rdma._diagnose.verbs import library_check

said = {"compiled": compiled(), "doctor": [library_check().status, library_check().remedy]}
try:
    devices()
except cotra_rdma.VerbsUnavailableError as error:
    said["devices"] = str(error)
rows = np.random.default_rng(0).standard_normal((100, 8), dtype=np.float32)
with cotra_rdma.Shard.build(rows, n_threads=1) as shard, cotra_rdma.serve(shard) as server:
    said["server"] = [server.exposed_region(), list(server.transports), server.unavailable["verbs"]]
    try:
        cotra_rdma.connect(server.address, transport="verbs")
    except cotra_rdma.VerbsUnavailableError as error:
        said["by name"] = str(error)
    with cotra_rdma.connect(server.address) as cluster:
        said["auto"] = [cluster.search(rows, k=1).ids[:, 0].tolist(), cluster.transports, cluster.passed_over[0]["verbs"]]
print("by name:", file=sys.stderr)
with cotra_rdma.Shard.build(rows, n_threads=1) as shard:
    cotra_rdma.serve(shard, transports=("verbs", "rpc")).close()
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    build = tmp_path_factory.mktemp("without-verbs")
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:/usr/bin:/usr/local/bin")
    if cmake is None:
        pytest.skip("cmake is missing")
    settings = ["-DCOTRA_VERBS=OFF", f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_BUILD_TYPE=Debug"]
    subprocess.run([cmake, "-S", str(ROOT), "-B", str(build), *settings], check=True, capture_output=True)
    subprocess.run([cmake, "--build", str(build), "--parallel", "2"], check=True, capture_output=True)
    return build / "_cotra.abi3.so"


def test_it_works_without_and_says_so(module: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(module)], capture_output=True, text=True, check=True)
    said = json.loads(done.stdout)
    assert said["compiled"] is False
    status, remedy = said["doctor"]
    assert status == "failed"
    assert "libibverbs-dev" in remedy
    region, transports, why = said["server"]
    assert region is None
    assert transports == ["shm", "rpc"]
    for text in (why, said["devices"], said["by name"], said["auto"][2]):
        assert "built without" in text, text
    unasked, named = done.stderr.split("by name:")
    assert unasked == ""  # who did not ask for it is not warned
    assert named.count("verbs is not offered: ") == 1
    assert said["auto"][:2] == [list(range(100)), ["shm"]]
