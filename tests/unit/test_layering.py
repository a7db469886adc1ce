"""The map, kept true: includes and imports point down it only, and nothing goes in a circle."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CSRC, PACKAGE = ROOT / "csrc", ROOT / "src" / "cotra_rdma"

# A directory may include those before it, and itself.
C_LAYERS = (
    "include",
    "base",
    "format",
    "kernels",
    "build",
    "verbs",
    "channel",
    "search",
    "search/graph",
    "search/lists",
)
# Only this file outside csrc/verbs: search reads through channel/channel.h, and knows no transport.
VERBS_USERS = {"channel/verbs.c"}
# Packages and top-level modules, lowest first. Those of one row do not import each other.
LAYERS = (
    ("errors",),
    ("_core",),
    ("datasets", "_native", "protocol", "_clustering"),
    ("_routing",),
    ("_shard", "_collection"),
    ("_reader",),
    ("_owner",),
    ("_diagnose", "seam", "_build"),
    ("_bench",),
    ("cli",),
)
ABOVE_ALL = {"__init__", "lowlevel"}
"""What users import. The package itself imports neither."""
NATIVE_USERS = {"_native", "_shard", "_build"}


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*["<]([^">]+)[">]', path.read_text(), re.M)


def sources() -> list[Path]:
    return sorted(path for path in CSRC.rglob("*") if path.suffix in (".c", ".h"))


def python_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    """The dotted name below the package; "" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """The package's modules that a file imports, also only for annotations; dotted names below the package."""
    known = {name_of(file) for file in python_files()} | {"_cotra"}
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the direction"
            assert node.module
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.split(".")[0] == "cotra_rdma":
                below = ".".join(name.split(".")[1:])
                found.add(below if below in known else below.rpartition(".")[0])
    return found - {name_of(path)}


def layer_of(name: str) -> str:
    return name.split(".")[0] or "__init__"


def c_layer_of(path: str) -> str:
    """The directory below csrc that a file is in."""
    return path.rpartition("/")[0]


LEVEL = {module: level for level, row in enumerate(LAYERS) for module in row}


def test_every_c_directory_is_on_the_map() -> None:
    assert {c_layer_of(path.relative_to(CSRC).as_posix()) for path in sources()} == set(C_LAYERS)


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(CSRC).as_posix())
def test_includes_point_down(path: Path) -> None:
    own = C_LAYERS.index(c_layer_of(path.relative_to(CSRC).as_posix()))
    for name in includes(path):
        layer = c_layer_of(name) if (CSRC / name).exists() else "include" if name == "cotra.h" else None
        if layer is not None:
            assert C_LAYERS.index(layer) <= own, f"{name} is above"
            assert (
                layer != "verbs" or own == C_LAYERS.index("verbs") or path.relative_to(CSRC).as_posix() in VERBS_USERS
            )
        if "infiniband" in name or "rdma/" in name:
            assert own == C_LAYERS.index("verbs") or path.relative_to(CSRC).as_posix() in VERBS_USERS


def test_no_includes_go_in_a_circle() -> None:
    """Neither of headers, nor of a header's or a source's stem with another's: `a.c` -> `b.h`, `b.c` -> `a.h` is one too."""
    graph: dict[str, set[str]] = {}
    for path in sources():
        stem = path.relative_to(CSRC).with_suffix("").as_posix()
        graph.setdefault(stem, set()).update(
            name.removesuffix(".h") for name in includes(path) if (CSRC / name).exists()
        )
        graph[stem].discard(stem)
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_search_knows_one_header_of_channels() -> None:
    used = {
        name for path in (CSRC / "search").rglob("*.[ch]") for name in includes(path) if name.startswith("channel/")
    }
    assert used == {"channel/channel.h"}


def test_the_public_header_stands_alone() -> None:
    assert includes(CSRC / "include" / "cotra.h") == ["stddef.h", "stdint.h"]


def test_every_package_is_on_the_map() -> None:
    assert {layer_of(name_of(path)) for path in python_files()} == set(LEVEL) | ABOVE_ALL


@pytest.mark.parametrize("path", python_files(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_down(path: Path) -> None:
    own = layer_of(name_of(path))
    if own in ABOVE_ALL:
        return
    for name in imports(path):
        other = layer_of(name)
        if other in ("_cotra", own):
            continue
        assert other not in ABOVE_ALL, f"{name} is for users"
        assert LEVEL[other] < LEVEL[own], f"{name} is not below {own}"


def test_no_imports_go_in_a_circle() -> None:
    graph = {name_of(path): imports(path) for path in python_files()}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_the_compiled_module_has_one_importer() -> None:
    files = {name_of(path): imports(path) for path in python_files()}
    assert {name for name, names in files.items() if "_cotra" in names} == {"_native.library"}
    assert {layer_of(name) for name, names in files.items() if "_native.library" in names} == NATIVE_USERS


def test_messages_are_made_without_the_compiled_module() -> None:
    """Envelopes and payloads are made where the C part does not exist."""
    reached, queue = set(), ["protocol"]
    while queue:
        layer = queue.pop()
        if layer not in reached:
            reached.add(layer)
            for path in python_files():
                if layer_of(name_of(path)) == layer:
                    queue += [layer_of(name) for name in imports(path)]
    assert reached == {"protocol", "_core", "errors"}


def test_importing_the_package_does_nothing_else() -> None:
    """No device is opened, no thread started, no library loaded."""
    code = (
        "import threading, cotra_rdma; assert threading.active_count() == 1;"
        "assert 'libibverbs' not in open('/proc/self/maps').read();"
        "import sys; assert 'pyverbs' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)
