"""A graph image's header."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from cotra_rdma._core.constants import METRICS, VECTOR_TYPES
from cotra_rdma._native.arena import Arena
from cotra_rdma._native.library import check, ffi, lib, new_error


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """A graph image's header. `code_dim`: bits of a neighbour's code; `degree`: links of a node on level 0; `ivf_bytes`: of the
    section of inverted lists, 0 where there is none; `graph_id`: of the graph over all shards that the shard is a part of, 0
    for its own, `graph_count` its nodes, and `graph_base` the number of the shard's first node in it."""

    image_bytes: int
    count: int
    deleted_count: int
    upper_count: int
    generation: int
    seed: int
    nav_offset: int
    nav_bytes: int
    records_offset: int
    image_checksum: int
    ivf_offset: int
    ivf_bytes: int
    record_bytes: int
    dim: int
    code_dim: int
    metric: str
    vector_type: str
    M: int
    degree: int
    ef_construction: int
    max_level: int
    entry_node: int
    format_version: int
    graph_id: int
    graph_count: int
    graph_base: int

    @classmethod
    def of_arena(cls, arena: Arena, *, full: bool = False) -> Self:
        """Of the image in an arena, which is validated: `full`: every record too. Raises `FormatError`, `ChecksumError`."""
        raw, err, info = ffi.new("cotra_image_info *"), new_error(), arena.info
        check(lib.cotra_image_validate(ffi.cast("void *", info.addr), info.len, full, raw, err), err)
        return cls.from_c(raw)

    @classmethod
    def from_c(cls, raw: Any) -> Self:
        """From a `cotra_image_info *`."""
        return cls(
            image_bytes=raw.image_bytes,
            count=raw.count,
            deleted_count=raw.deleted_count,
            upper_count=raw.upper_count,
            generation=raw.generation,
            seed=raw.seed,
            nav_offset=raw.nav_offset,
            nav_bytes=raw.nav_bytes,
            records_offset=raw.records_offset,
            image_checksum=raw.image_checksum,
            ivf_offset=raw.ivf_offset,
            ivf_bytes=raw.ivf_bytes,
            record_bytes=raw.record_bytes,
            dim=raw.dim,
            code_dim=raw.code_dim,
            metric=METRICS[raw.metric],
            vector_type=VECTOR_TYPES[raw.vector_type],
            M=raw.M,
            degree=raw.degree,
            ef_construction=raw.ef_construction,
            max_level=raw.max_level,
            entry_node=raw.entry_node,
            format_version=raw.format_version,
            graph_id=raw.graph_id,
            graph_count=raw.graph_count,
            graph_base=raw.graph_base,
        )
