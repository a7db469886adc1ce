"""The map, kept true: includes and imports point down it only."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CSRC, PACKAGE = ROOT / "csrc", ROOT / "src" / "cotra_rdma"

# A directory may include those before it, and itself.
C_LAYERS = ("include", "base", "layout", "distance", "pack", "verbs", "transport", "search")
# ... and of these two only this file: search reads through transport.h, and knows no transport.
VERBS_USERS = {"transport/verbs.c"}
# Modules of the package, lowest first; those of one row do not import each other.
LAYERS = (
    ("errors",),
    ("_native", "region", "wire", "queries", "datasets", "job", "expansions", "blocking"),
    ("payload", "sums"),
    ("arena", "messages", "expansion_messages", "rpc", "seam", "owner_process", "kmeans"),
    ("verbs", "handover", "dispatch", "coarse", "collection_messages", "owner_status", "partition", "build_mail"),
    ("channel", "compass", "build_network"),
    ("engine",),
    ("ivf", "global_graph", "graph_stats", "expander"),
    ("cost",),
    ("shard", "peer", "result", "scatter_gather", "benchmark_clock", "benchmark_data", "benchmark_transports"),
    ("lanes", "plan", "own", "halo", "benchmark", "benchmark_prediction", "graph_build"),
    ("build_processes", "replicas"),
    ("collection", "reach", "gather"),
    ("owners", "homes"),
    ("server", "cluster", "diagnosis", "benchmark_libraries", "benchmark_summary"),
    (
        "benchmark_systems",
        "benchmark_peers",
        "benchmark_build",
        "benchmark_plot",
        "verbs_diagnosis",
        "cotra",
        "algorithms",
        "inspection",
        "build_machine",
    ),
    ("benchmark_environment", "benchmark_tables", "benchmark_scaling", "peering"),
    ("benchmark_report", "benchmark_scaling_tables", "benchmark_scaling_plot"),
    ("cli",),
)
ABOVE_ALL = {"__init__"}
NATIVE_USERS = {"arena", "channel", "engine", "global_graph", "ivf", "shard", "sums", "verbs"}


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*["<]([^">]+)[">]', path.read_text(), re.M)


def sources() -> list[Path]:
    return sorted(path for path in CSRC.rglob("*") if path.suffix in (".c", ".h"))


def modules() -> dict[str, list[Path]]:
    """Files by module name; a subpackage is one module."""
    found: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        found.setdefault(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), []).append(path)
    return found


def imports(path: Path) -> set[str]:
    """The package's modules that a file imports when it runs (an import for annotations only is none)."""
    tree = ast.parse(path.read_text())
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the direction"
            assert node.module
            names = [node.module]
            if node.module == "cotra_rdma":
                names = [f"cotra_rdma.{alias.name}" for alias in node.names]
        for name in names:
            if name.split(".")[0] == "cotra_rdma" and id(node) not in hidden:
                found.add([*name.split("."), "__init__"][1])
    return found


LEVEL = {module: level for level, row in enumerate(LAYERS) for module in row}


def test_every_c_directory_is_on_the_map() -> None:
    assert {path.relative_to(CSRC).parts[0] for path in sources()} == set(C_LAYERS)


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(CSRC).as_posix())
def test_includes_point_down(path: Path) -> None:
    own = C_LAYERS.index(path.relative_to(CSRC).parts[0])
    for name in includes(path):
        layer = name.split("/")[0] if (CSRC / name).exists() else "include" if name == "cotra.h" else None
        if layer is not None:
            assert C_LAYERS.index(layer) <= own, f"{name} is above"
            assert (
                layer != "verbs" or own == C_LAYERS.index("verbs") or path.relative_to(CSRC).as_posix() in VERBS_USERS
            )
        if "infiniband" in name or "rdma/" in name:
            assert own == C_LAYERS.index("verbs") or path.relative_to(CSRC).as_posix() in VERBS_USERS


def test_search_knows_one_transport_header() -> None:
    for path in (CSRC / "search").iterdir():
        assert {name for name in includes(path) if name.startswith("transport/")} <= {"transport/transport.h"}


def test_the_public_header_stands_alone() -> None:
    assert includes(CSRC / "include" / "cotra.h") == ["stddef.h", "stdint.h"]


def test_every_module_is_on_the_map() -> None:
    assert set(modules()) == set(LEVEL) | ABOVE_ALL


@pytest.mark.parametrize("module", [module for row in LAYERS for module in row])
def test_imports_point_down(module: str) -> None:
    for path in modules()[module]:
        for name in imports(path) - {module}:
            if name == "_cotra":
                assert module == "_native"
                continue
            assert name not in ABOVE_ALL, f"{path.name} imports the package itself"
            assert LEVEL[name] < LEVEL[module], f"{module} imports {name}, which is not below it"


def test_the_compiled_module_has_one_importer() -> None:
    assert {module for module, paths in modules().items() if any("_cotra" in imports(p) for p in paths)} == {"_native"}
    users = {module for module, paths in modules().items() if any("_native" in imports(path) for path in paths)}
    assert users == NATIVE_USERS


def test_rpc_works_without_the_compiled_module() -> None:
    """Envelopes and payloads are made where the C part does not exist: nothing below rpc reaches for it."""
    seen, queue = set(), ["rpc", "wire", "messages", "expansion_messages", "collection_messages", "seam", "dispatch"]
    while queue:
        module = queue.pop()
        if module not in seen:
            seen.add(module)
            for path in modules()[module]:
                queue += imports(path)
    assert not seen & ({"_native", "_cotra", "__init__"} | NATIVE_USERS)


def test_importing_the_package_does_nothing_else() -> None:
    """No device is opened, no thread started, no library loaded."""
    code = (
        "import threading, cotra_rdma; assert threading.active_count() == 1;"
        "assert 'libibverbs' not in open('/proc/self/maps').read();"
        "import sys; assert 'pyverbs' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=300)
