"""The public names: which they are, where they live, and that each has a place in the API's pages."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
import types
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import pytest

import cotra_rdma
from cotra_rdma import lowlevel

ROOT = Path(__file__).parents[2]
PACKAGE = Path(cotra_rdma.__file__).parent
API_PAGES = sorted((ROOT / "docs" / "reference" / "api").glob("*.md"))

# Names may be added to these two lists.
# To take one away, or to rename one, breaks programs of others.
PACKAGE_NAMES = [
    "Arena",
    "BoundsError",
    "BusyError",
    "ChecksumError",
    "ClosedError",
    "Cluster",
    "ClusterMetrics",
    "CoTraRdma",
    "Collection",
    "Compass",
    "CompletionError",
    "CotraError",
    "DeadlineError",
    "DeniedError",
    "DeviceNotFoundError",
    "FabricModel",
    "FormatError",
    "InvalidInputError",
    "LossyVectorError",
    "MemlockError",
    "MemoryRegion",
    "OwnerMetrics",
    "OwnerProcess",
    "PartialResultError",
    "PeerError",
    "Peering",
    "QueuePairOptions",
    "ScatterGather",
    "SeamResult",
    "SearchCancelledError",
    "SearchResult",
    "Server",
    "Shard",
    "ShardOutcome",
    "ShardStatus",
    "Spire",
    "StaleShardError",
    "Stop",
    "Tls",
    "TransportError",
    "VectorShardSeam",
    "VerbsUnavailableError",
    "GrpcDispatch",
    "build_collection",
    "build_on_machine",
    "connect",
    "open_vectors",
    "pack_filter",
    "register",
    "register_metrics",
    "serve",
]
LOWLEVEL_NAMES = [
    "EXPANSION_DTYPE",
    "MORE_STATS_DTYPE",
    "OWNER_STATS_DTYPE",
    "PUSH_DTYPE",
    "STATS_DTYPE",
    "Arena",
    "Channel",
    "Device",
    "DeviceInfo",
    "Engine",
    "Expansions",
    "FabricModel",
    "Helper",
    "ImageIdentity",
    "ImageInfo",
    "IvfInfo",
    "IvfTable",
    "MemoryRegion",
    "QueuePair",
    "QueuePairAttributes",
    "QueuePairOptions",
    "RecordCache",
    "SpireEngine",
    "View",
    "devices",
    "merge",
    "pack_stats",
    "register",
    "simd_level",
    "unpack_stats",
]
PUBLIC_MODULES = ("errors", "datasets", "protocol", "seam")


def is_public(name: str) -> bool:
    return not any(part.startswith("_") for part in name.split("."))


def public_modules() -> list[str]:
    """Every module of `PUBLIC_MODULES`, and those below them: dotted names below the package."""
    names = [".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py")]
    names = [name.removesuffix(".__init__") for name in names]
    return sorted(name for name in names if name.split(".")[0] in PUBLIC_MODULES and is_public(name))


def own_names(module: types.ModuleType) -> list[str]:
    """The public classes and functions that a module defines itself."""
    kinds = (type, types.FunctionType)
    return [
        name
        for name, value in vars(module).items()
        if is_public(name) and isinstance(value, kinds) and value.__module__ == module.__name__
    ]


def imports_for_type_checkers() -> dict[str, str]:
    """What `cotra_rdma/__init__.py` imports below `if TYPE_CHECKING`: name -> home, a dotted name below the package."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    found = {}
    for block in tree.body:
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING":
            for node in block.body:
                if isinstance(node, ast.ImportFrom):
                    assert node.module
                    for alias in node.names:
                        assert alias.asname is None, alias.name
                        found[alias.name] = node.module.removeprefix("cotra_rdma.")
    return found


def resolve(path: str) -> Any:
    """The object that a directive `::: path` documents."""
    parts = path.split(".")
    value: Any = import_module(parts[0])
    for i, part in enumerate(parts[1:], 2):
        try:
            value = getattr(value, part)
        except AttributeError:
            value = import_module(".".join(parts[:i]))
    return value


@functools.cache
def documented() -> list[Any]:
    """The objects of all directives on the API's pages; of a module its public names too."""
    found = []
    for page in API_PAGES:
        for path in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
            value = resolve(path)
            found.append(value)
            if isinstance(value, types.ModuleType):
                found += [getattr(value, name) for name in own_names(value)]
    return found


def test_the_names_of_the_package() -> None:
    assert cotra_rdma.__all__ == sorted(PACKAGE_NAMES)


def test_the_names_of_lowlevel() -> None:
    assert sorted(lowlevel.__all__) == sorted(LOWLEVEL_NAMES)


def test_homes_imports_and_all_agree() -> None:
    homes = {name: home for home, names in cotra_rdma._HOMES.items() for name in names}
    assert homes == imports_for_type_checkers()
    assert sorted(homes) == cotra_rdma.__all__
    assert sum(len(names) for names in cotra_rdma._HOMES.values()) == len(homes), "a name has two homes"


@pytest.mark.parametrize("name", PACKAGE_NAMES)
def test_a_name_is_what_its_home_has(name: str) -> None:
    home = import_module(f"cotra_rdma.{cotra_rdma._HOME_OF[name]}")
    assert getattr(cotra_rdma, name) is getattr(home, name)
    assert getattr(cotra_rdma, name).__module__ == home.__name__, "the home only imports it"


@pytest.mark.parametrize("name", sorted(set(PACKAGE_NAMES) & set(LOWLEVEL_NAMES)))
def test_both_facades_have_the_same_object(name: str) -> None:
    assert getattr(cotra_rdma, name) is getattr(lowlevel, name)


def test_names_are_imported_when_they_are_first_used() -> None:
    """In a new process: here other tests have used them."""
    code = (
        "import sys, cotra_rdma\n"
        "loaded = {name for name in sys.modules if name.startswith('cotra_rdma.')}\n"
        "assert not loaded, loaded\n"
        "assert set(cotra_rdma.__all__) <= set(dir(cotra_rdma))\n"
        "for name in cotra_rdma.__all__:\n"
        "    assert name not in vars(cotra_rdma), name\n"
        "cotra_rdma.CotraError\n"
        "assert 'CotraError' in vars(cotra_rdma)\n"
        "assert 'cotra_rdma._native' not in sys.modules\n"
        "for name in cotra_rdma.__all__:\n"
        "    assert getattr(cotra_rdma, name) is vars(cotra_rdma)[name]\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'shard_of_glass'"):
        cotra_rdma.shard_of_glass  # noqa: B018


def test_the_version_is_that_of_the_installed_package() -> None:
    assert cotra_rdma.__version__ == metadata.version("cotra-rdma")


@pytest.mark.parametrize("name", PACKAGE_NAMES)
def test_every_name_of_the_package_is_on_an_api_page(name: str) -> None:
    assert any(value is getattr(cotra_rdma, name) for value in documented())


@pytest.mark.parametrize("name", LOWLEVEL_NAMES)
def test_every_name_of_lowlevel_is_on_an_api_page(name: str) -> None:
    assert any(value is getattr(lowlevel, name) for value in documented())


@pytest.mark.parametrize("name", public_modules())
def test_every_name_of_a_public_module_is_on_an_api_page(name: str) -> None:
    module, found = import_module(f"cotra_rdma.{name}"), documented()
    for own in own_names(module):
        assert any(value is getattr(module, own) for value in found), own


@pytest.mark.parametrize("name", public_modules())
def test_every_public_name_says_what_it_is(name: str) -> None:
    module = import_module(f"cotra_rdma.{name}")
    for own in own_names(module):
        assert (getattr(module, own).__doc__ or "").strip(), own
