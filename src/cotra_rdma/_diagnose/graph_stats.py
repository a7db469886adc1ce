"""Statistics of a shard's graph: degrees, levels, and the shards that its links lead into.

The layout of an image is in docs/reference/format.md.
Records are read in ranges, from a file or over a channel.
Every number is checked before it is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cotra_rdma._core.record_layout import DELETED, NO_NODE, heads_of, links_of, round_up
from cotra_rdma._native.image import ImageInfo
from cotra_rdma.errors import FormatError

Read = Callable[[int, int], Any]
"""Returns the bytes [offset, offset + length) of an image as a buffer, or raises an error."""

Progress = Callable[[int], None]
"""Called with the number of records that were read so far."""

RANGE_BYTES = 8 << 20


@dataclass(frozen=True, slots=True, eq=False)
class GraphStats:
    """The statistics of a shard's graph.

    Attributes:
        degrees: int64[degree + 1], the nodes with 0, 1, ... links on level 0.
        levels: int64[max_level + 1], the nodes on level 0, 1, ...
        links_to: int64[n], the links on level 0 into each of the shards that `graph_stats` was given.
        links_elsewhere: the links into other shards.
        links_inside: the links into the shard itself.
    """

    degrees: npt.NDArray[np.int64]
    levels: npt.NDArray[np.int64]
    links_to: npt.NDArray[np.int64]
    links_elsewhere: int
    links_inside: int

    @property
    def links(self) -> int:
        """The number of links on level 0."""
        return int(self.degrees @ np.arange(len(self.degrees)))

    @property
    def cross_share(self) -> float:
        """The share of links that lead into other shards; 0 if there are no links."""
        return 1 - self.links_inside / self.links if self.links else 0.0


def degree_range(degrees: npt.NDArray[np.int64]) -> tuple[int, float, int]:
    """Returns the smallest, the median and the largest degree of a histogram that holds at least one node."""
    there = np.flatnonzero(degrees)
    upto, n = np.cumsum(degrees), int(degrees.sum())
    low, high = np.searchsorted(upto, [(n - 1) // 2, n // 2], side="right")
    return int(there[0]), float(low + high) / 2, int(there[-1])


def graph_stats(
    info: ImageInfo,
    read: Read,
    shards: Sequence[tuple[int, int]],
    progress: Progress | None = None,
    *,
    range_bytes: int = RANGE_BYTES,
) -> GraphStats:
    """Reads all records of an image, and counts what they hold.

    Args:
        info: the header of the image, which was validated.
        read: reads the image.
        shards: for each shard of the graph the number of its first node and the number of its nodes.
            Shards must not overlap.
            A shard that is not known has 0 nodes.
            The image's own shard may be among them.
        progress: see `Progress`.
        range_bytes: the bytes to read at once. At least one record is read.

    Raises:
        FormatError: a record or the navigation section is malformed.
        Exception: what `read` raises.
    """
    known = [(first, first + count, position) for position, (first, count) in enumerate(shards) if count]
    bases, ends, positions = np.array(sorted(known), np.int64).reshape(-1, 3).T
    degrees = np.zeros(info.degree + 1, np.int64)
    links_to = np.zeros(len(shards), np.int64)
    inside = elsewhere = deleted = 0
    step = max(1, range_bytes // info.record_bytes)
    for begin in range(0, info.count, step):
        rows = np.arange(begin, min(begin + step, info.count))
        heads, numbers = _records(info, read, rows)
        degrees += np.bincount(heads["count"], minlength=len(degrees))
        deleted += int(np.count_nonzero(heads["flags"] & DELETED))
        inside += int(np.count_nonzero((numbers >= info.graph_base) & (numbers < info.graph_base + info.count)))
        at = np.searchsorted(bases, numbers, side="right") - 1
        found = np.flatnonzero(at >= 0)
        found = found[numbers[found] < ends[at[found]]]
        links_to += np.bincount(positions[at[found]], minlength=len(shards))
        elsewhere += len(numbers) - len(found)
        if progress:
            progress(int(rows[-1]) + 1)
    if deleted != info.deleted_count:
        raise FormatError(f"{deleted} records are of deleted nodes, but the header says {info.deleted_count}")
    return GraphStats(degrees, _levels(info, read), links_to, elsewhere, inside)


def _records(
    info: ImageInfo, read: Read, rows: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.void], npt.NDArray[np.int64]]:
    """Reads and checks some records that follow each other.

    Returns:
        The heads of the records, and the numbers of all their neighbours as int64[n].
    """
    begin, n, size = int(rows[0]), len(rows), info.record_bytes
    records = np.frombuffer(read(info.records_offset + begin * size, n * size), np.uint8).reshape(n, size)
    heads, numbers = heads_of(records), links_of(records, info)
    used = np.arange(numbers.shape[1]) < heads["count"][:, None]
    for what, bad in (
        ("the number of another node", heads["node"] != rows),
        (f"more than {info.degree} neighbours", heads["count"] > info.degree),
        ("a negative label", heads["label"] < 0),
        ("another generation than the header", heads["generation"] != info.generation % 2**32),
        (
            f"a neighbour beyond the graph's {info.graph_count} nodes",
            ((numbers >= info.graph_count) & used).any(axis=1),
        ),
        ("a neighbour in a place that is not used", ((numbers != NO_NODE) & ~used).any(axis=1)),
    ):
        if bad.any():
            raise FormatError(f"record {begin + int(bad.argmax())} has {what}")
    return heads, numbers[used].astype(np.int64)


def _levels(info: ImageInfo, read: Read) -> npt.NDArray[np.int64]:
    """Counts the nodes on each level. In the navigation section, an upper node has one row for each of its levels."""
    levels = np.zeros(info.max_level + 1, np.int64)
    levels[0] = info.count
    n = info.upper_count
    if n == 0:
        return levels
    at = info.nav_offset + round_up(4 * info.dim, 8) + round_up(4 * n, 8)
    heights = np.diff(np.frombuffer(read(at, 4 * (n + 1)), "<u4").astype(np.int64))
    if heights.min() < 1 or heights.max() != info.max_level:
        raise FormatError(
            f"the upper nodes reach from level {heights.min()} to {heights.max()}, not from 1 to {info.max_level}"
        )
    levels[1:] = n - np.cumsum(np.bincount(heights, minlength=info.max_level + 1))[: info.max_level]
    return levels
