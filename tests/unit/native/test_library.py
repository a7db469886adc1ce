"""The binding: every struct agrees with C, and handles hold what they need, whatever the order in which things close."""

from __future__ import annotations

import gc
import itertools
import random
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotra_rdma import Arena, ClosedError, CompletionError, CotraError, FabricModel, MemlockError, Shard
from cotra_rdma._core.stats import STATS_DTYPE
from cotra_rdma._native.channel import Channel
from cotra_rdma._native.graph_engine import Engine
from cotra_rdma._native.library import Handle, check, ffi, lib, new_error
from cotra_rdma._native.list_engine import SPIRE_STATS_DTYPE
from cotra_rdma._native.view import View
from helpers.properties import fixed

HEADER = Path(__file__).parents[3] / "csrc" / "include" / "cotra.h"
STRUCTS = re.findall(r"^typedef struct (cotra_\w+) \{", HEADER.read_text(), re.M)
OPAQUE = re.findall(r"^typedef struct (cotra_\w+) \1;", HEADER.read_text(), re.M)
FUNCTIONS = re.findall(
    r"^(?:int|void|uint32_t|uint64_t|const char \*|const void \*)\s?\*?(cotra_\w+)\(", HEADER.read_text(), re.M
)


# ---- the declarations ----


def test_the_header_was_read() -> None:
    assert {"cotra_error", "cotra_image_info", "cotra_query_stats", "cotra_model_params"} <= set(STRUCTS)
    assert {"cotra_arena", "cotra_engine"} <= set(OPAQUE)
    assert set(STRUCTS) | set(OPAQUE) == {name for name in ffi.list_types()[0] if name.startswith("cotra_")} - {
        "cotra_status"
    }
    assert len(FUNCTIONS) > 40


@pytest.mark.parametrize("name", STRUCTS)
def test_structs_agree_with_c(name: str) -> None:
    """cffi compares a struct with the compiler's only when it is used."""
    assert ffi.sizeof(name) > 0
    value = ffi.new(f"{name} *")
    for field, _ in ffi.typeof(name).fields:
        assert ffi.offsetof(name, field) >= 0
        getattr(value, field)


@pytest.mark.parametrize("name", OPAQUE)
def test_opaque_types_are_pointers_only(name: str) -> None:
    assert ffi.cast(f"{name} *", 0) == ffi.NULL
    with pytest.raises((ffi.error, TypeError)):
        ffi.sizeof(name)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_there(name: str) -> None:
    assert callable(getattr(lib, name))


@pytest.mark.parametrize(
    ("dtype", "struct"), [(STATS_DTYPE, "cotra_query_stats"), (SPIRE_STATS_DTYPE, "cotra_spire_stats")]
)
def test_stats_are_the_c_struct(dtype: np.dtype, struct: str) -> None:
    fields = {name: field.offset for name, field in ffi.typeof(struct).fields}
    assert {name: dtype.fields[name][1] for name in dtype.names} == fields
    assert dtype.itemsize == ffi.sizeof(struct)


# ---- a status and its exception ----


def statuses() -> list[tuple[str, int]]:
    return [(name, getattr(lib, name)) for name in dir(lib) if name.startswith("COTRA_ERR_")]


@pytest.mark.parametrize(("name", "status"), statuses())
def test_every_error_has_an_exception(name: str, status: int) -> None:
    err = new_error()
    expected = MemoryError if status == lib.COTRA_ERR_NO_MEMORY else CotraError
    with pytest.raises(expected, match=re.escape(ffi.string(lib.cotra_status_name(status)).decode())) as caught:
        check(status, err)  # no message: the status has a name
    if isinstance(caught.value, CotraError):
        assert caught.value.shard is None
        if status != lib.COTRA_ERR_SYSTEM:
            assert type(caught.value) is not CotraError


def test_every_status_is_named_once() -> None:
    names = [ffi.string(lib.cotra_status_name(status)).decode() for _, status in statuses()]
    names += [ffi.string(lib.cotra_status_name(status)).decode() for status in (0, 1, 999, -999)]
    assert len(set(names)) == len(names) - 1  # 999 and -999 are both unknown


def test_what_an_error_carries() -> None:
    err = ffi.new(
        "cotra_error *",
        {"shard": 3, "sys_errno": 110, "wc_status": 12, "vendor_error": 0x81, "message": b"READ \xff broke"},
    )
    with pytest.raises(CompletionError, match="READ \ufffd broke") as caught:
        check(lib.COTRA_ERR_COMPLETION, err)
    error = caught.value
    assert (error.shard, error.sys_errno, error.wc_status, error.vendor_error) == (3, 110, 12, 0x81)
    with pytest.raises(MemlockError) as locked:
        check(lib.COTRA_ERR_MEMLOCK, err)
    assert (locked.value.shard, locked.value.sys_errno) == (3, 110)
    with pytest.raises(CotraError):
        check(-12345, new_error())
    assert [check(status, err) for status in (0, 1, 7)] == [0, 1, 7]


def test_destroying_nothing_is_allowed() -> None:
    for name in ("arena_destroy", "packer_destroy", "device_close", "qp_destroy", "channel_close", "view_close"):
        getattr(lib, f"cotra_{name}")(ffi.NULL)
    lib.cotra_engine_destroy(ffi.NULL)
    assert lib.cotra_mr_destroy(ffi.NULL, ffi.NULL) == 0


def test_the_clock_is_the_monotonic_one() -> None:
    times = [lib.cotra_clock_ns() for _ in range(1000)]
    assert times == sorted(times)


# ---- handles ----


class Node(Handle):
    """A handle whose destruction is written down."""

    def __init__(self, name: str, log: list[str], *parents: object) -> None:
        super().__init__(name, *parents)
        self.log = log

    def _destroy(self, ptr: Any) -> None:
        self.log.append(ptr)


PARENTS = {"device": (), "mr": ("device",), "qp": ("device",), "channel": ("qp", "mr"), "engine": ("channel",)}


def made(log: list[str]) -> dict[str, Node]:
    nodes: dict[str, Node] = {}
    for name, parents in PARENTS.items():
        nodes[name] = Node(name, log, *(nodes[parent] for parent in parents))
    return nodes


def assert_children_first(log: list[str]) -> None:
    assert sorted(log) == sorted(PARENTS)
    for child, parents in PARENTS.items():
        for parent in parents:
            assert log.index(child) < log.index(parent)


@pytest.mark.parametrize("order", list(itertools.permutations(PARENTS)), ids="-".join)
def test_children_are_destroyed_before_their_parents(order: tuple[str, ...]) -> None:
    log: list[str] = []
    nodes = made(log)
    for i, name in enumerate(order):
        nodes[name].close()
        nodes[name].close()
        assert nodes[name].closed
        with pytest.raises(ClosedError, match="Node is closed"):
            _ = nodes[name].ptr
        still_open = set(order[i + 1 :])
        assert not still_open & set(log)
    assert_children_first(log)


@fixed(25)
@given(order=st.permutations(list(PARENTS)), closed=st.sets(st.sampled_from(list(PARENTS))), cycle=st.booleans())
def test_any_order_of_the_garbage_collector(order: list[str], closed: set[str], cycle: bool) -> None:
    log: list[str] = []
    nodes = made(log)
    if cycle:  # found by the collector, all at once, in its own order
        ring = [*nodes.values()]
        for node, following in zip(ring, ring[1:] + ring[:1], strict=True):
            node.other = following  # type: ignore[attr-defined]
        del ring, node, following
    for name in order:
        if name in closed:
            nodes[name].close()
        del nodes[name]
    gc.collect()
    assert_children_first(log)


def test_a_destroy_that_fails_still_lets_go_of_its_parents() -> None:
    log: list[str] = []

    class Failing(Node):
        def _destroy(self, ptr: Any) -> None:
            super()._destroy(ptr)
            raise CotraError("dereg failed")

    parent = Node("parent", log)
    child = Failing("child", log, parent)
    parent.close()
    with pytest.raises(CotraError, match="dereg failed"):
        child.close()
    child.close()
    assert log == ["child", "parent"]


def test_a_handle_whose_making_failed() -> None:
    """__del__ runs on an object that __init__ never finished."""
    Node.__new__(Node).close()


def test_with_closes() -> None:
    log: list[str] = []
    with Node("a", log) as node:
        assert not node.closed
    assert (log, node.closed) == (["a"], True)


def test_threads_that_close_the_same_handles() -> None:
    for _ in range(50):
        log: list[str] = []
        nodes = list(made(log).values())
        start = threading.Barrier(4)

        def close_all(nodes: list[Node] = nodes, start: threading.Barrier = start) -> None:
            start.wait()
            for node in random.Random(threading.get_ident()).sample(nodes, len(nodes)):
                node.close()

        threads = [threading.Thread(target=close_all) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert_children_first(log)


@pytest.mark.parametrize("order", list(itertools.permutations(range(5))), ids=str)
def test_real_objects_in_any_order(words: np.ndarray, small: bytes, order: tuple[int, ...]) -> None:
    arena = Arena.wrap(bytearray(small))
    channel = Channel.shm(arena)
    model = Channel.model(channel, FabricModel())
    view = View.open(model)
    engine = Engine.create([view], [model])
    things: list[Any] = [arena, channel, model, view, engine]
    for place, i in enumerate(order):
        if i != 4 and 4 in order[place:]:  # the engine works as long as it is open itself
            assert engine.search(words[:2], 1, 4, 2)[0][0, :, 0].tolist() == [0, 1]
        things[i].close()
    for use in (lambda: arena.info, lambda: channel.info, lambda: model.read(0, 1), lambda: view.info):
        with pytest.raises(ClosedError):
            use()
    with pytest.raises(ClosedError):
        engine.search(words[:2], 1, 4, 2)


@pytest.fixture(scope="module")
def small(words: np.ndarray) -> bytes:
    with Shard.build(words[:50], n_threads=1) as shard, shard.arena.view() as view:
        return bytes(view)


def test_nothing_can_be_made_on_what_is_closed(small: bytes) -> None:
    arena = Arena.wrap(bytearray(small))
    channel = Channel.shm(arena)
    view = View.open(channel)
    arena.close()
    with pytest.raises(ClosedError):
        Channel.shm(arena)
    view.close()
    with pytest.raises(ClosedError):
        Engine.create([view], [channel])
    channel.close()
    for make in (lambda: View.open(channel), lambda: Channel.model(channel, FabricModel())):
        with pytest.raises(ClosedError):
            make()
