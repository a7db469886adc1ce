"""Records as Python takes them apart are those that C validates and reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cotra_rdma import Shard
from cotra_rdma._core.record_layout import ELEMENTS, HEAD, NO_NODE, heads_of, links_of, records_of, round_up, vectors_of
from cotra_rdma._native.library import check, ffi, lib, new_error


def node_by_c(shard: Shard, node: int) -> tuple[np.ndarray, int, int]:
    """The own vector float32[dim], label and flags of a node, by the C shim."""
    info, err = shard.arena.info, new_error()
    vector, label, flags = ffi.new("float[]", shard.dim), ffi.new("int64_t *"), ffi.new("uint32_t *")
    memory = ffi.cast("void *", info.addr)
    check(lib.cotra_image_get_node(memory, info.len, node, vector, label, flags, err), err)
    return np.frombuffer(ffi.buffer(vector), np.float32), label[0], flags[0]


@pytest.mark.parametrize("vector_type", ["float32", "float16", "uint8"])
@pytest.mark.parametrize(("dim", "M"), [(1, 2), (7, 5), (64, 16), (100, 17)])
def test_both_languages_say_the_same(vector_type: str, dim: int, M: int) -> None:
    rows = np.random.default_rng(dim).integers(0, 200, (90, dim)).astype(np.float32)
    ids = np.arange(90) * 3 + 5
    with Shard.build(rows, ids=ids, M=M, ef_construction=30, n_threads=1, vector_type=vector_type) as shard:
        info = shard.info
        with shard.arena.view() as image:
            records = records_of(image, info)
            heads, vectors, links = heads_of(records), vectors_of(records, info), links_of(records, info)
            del records
        assert vectors.dtype == ELEMENTS[vector_type]
        assert links.shape == (90, round_up(info.degree, 32))
        np.testing.assert_array_equal(heads["node"], np.arange(90))
        np.testing.assert_array_equal(heads["generation"], info.generation)
        used = np.arange(links.shape[1]) < heads["count"][:, np.newaxis]
        assert (links[used] < 90).all()
        assert (links[~used] == NO_NODE).all()
        for node in range(90):
            vector, label, flags = node_by_c(shard, node)
            np.testing.assert_array_equal(vectors[node].astype(np.float32), vector)
            assert (heads["label"][node], heads["flags"][node]) == (label, flags)


def test_the_head_is_that_of_the_shim() -> None:
    header = (Path(__file__).parents[3] / "csrc" / "format" / "image.h").read_text()
    fields = header.split("typedef struct cotra_record_head {")[1].split("}")[0]
    kinds = {"uint32_t": "<u4", "int64_t": "<i8", "uint16_t": "<u2", "float": "<f4"}
    lines = [line.split(";")[0].split() for line in fields.splitlines() if ";" in line]
    assert [(name, kinds[kind]) for kind, name in lines] == HEAD.descr
