"""`ImageInfo`: the header of a graph image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from cotra_rdma._core.constants import METRICS, VECTOR_TYPES
from cotra_rdma._core.image_identity import ImageIdentity
from cotra_rdma._native.arena import Arena
from cotra_rdma._native.library import check, ffi, lib, new_error


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """The header of a graph image.

    Attributes:
        image_bytes: the length of the image.
        count: the number of nodes.
        deleted_count: how many of them are deleted.
        upper_count: how many of them are on upper layers too.
        generation: grows when the shard is built again.
        seed: the seed of the build.
        nav_offset: where the navigation section begins, in bytes.
        nav_bytes: the length of the navigation section.
        records_offset: where the records begin, in bytes.
        image_checksum: the checksum of the image.
        ivf_offset: where the section of inverted lists begins, in bytes.
        ivf_bytes: the length of the section of inverted lists; 0 if there is none.
        record_bytes: the length of a record.
        dim: the dimension of the vectors.
        code_dim: the bits of a neighbour's code.
        metric: one of `METRICS`.
        vector_type: one of `VECTOR_TYPES`.
        M: the most links of a node on an upper layer.
        degree: the most links of a node on level 0.
        ef_construction: the `ef` of the searches of the build.
        max_level: the highest level of the graph.
        entry_node: the node where a descent begins.
        format_version: the version of the image format.
        graph_id: the id of the one graph that the shard is a part of; 0 if the shard has a graph of its own.
        graph_count: the number of nodes of that graph.
        graph_base: the number of the shard's first node in that graph.
    """

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

    @property
    def identity(self) -> ImageIdentity:
        """What tells this image from every other."""
        return ImageIdentity(self.graph_id, self.generation, self.image_checksum)

    @classmethod
    def of_arena(cls, arena: Arena, *, full: bool = False) -> Self:
        """Validates the image in an arena, and returns its header.

        Args:
            arena: holds the image.
            full: validate every record too.

        Raises:
            FormatError: the image is malformed.
            ChecksumError: a checksum is wrong.
        """
        raw, err, info = ffi.new("cotra_image_info *"), new_error(), arena.info
        check(lib.cotra_image_validate(ffi.cast("void *", info.addr), info.len, full, raw, err), err)
        return cls.from_c(raw)

    @classmethod
    def from_c(cls, raw: Any) -> Self:
        """Converts a `cotra_image_info *`."""
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
