"""`ImageIdentity`: which image a message is about."""

from __future__ import annotations

from typing import NamedTuple


class ImageIdentity(NamedTuple):
    """What tells one image from every other.

    Rows mean nothing without it: the same row of another image is another vector.
    So a request that names rows carries it, and the answer repeats it.

    Attributes:
        lineage: the id of the one graph that the shard is a part of; 0 if the shard has a graph of its own.
        generation: of the shard's build.
        checksum: of the image's bytes.
    """

    lineage: int
    generation: int
    checksum: int

    def __str__(self) -> str:
        return f"image {self.checksum:016x} of generation {self.generation}"
