"""What the builders of one graph tell each other, and how: messages of type 54, whose map holds a step and its values.

All that is heard is checked here or by who uses it: it comes from another process, maybe on another machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from cotra_rdma.errors import FormatError
from cotra_rdma.protocol.tables import BuildExchangeRequest

T = TypeVar("T", bound=msgspec.Struct)


class Mail(Protocol):
    """How a builder tells the others, and hears them."""

    def tell(self, message: BuildExchangeRequest, to: int | None = None) -> None:
        """Tells one, or all; itself too."""

    def hear(self, step: str, sender: int) -> BuildExchangeRequest:
        """What `sender` told in a step. It may wait."""


class DirectoryMail:
    """Messages as files, for builders that share a directory and take turns: each step ends before the next begins."""

    def __init__(self, directory: Path, number: int) -> None:
        self._directory, self._number = directory, number

    def tell(self, message: BuildExchangeRequest, to: int | None = None) -> None:
        """Writes a file, for one or for all."""
        assert message.told is not None
        reader = "all" if to is None else str(to)
        (self._directory / f"{message.told['step']}-{self._number}-{reader}").write_bytes(message.encode())

    def hear(self, step: str, sender: int) -> BuildExchangeRequest:
        """Reads the file of an earlier step."""
        path = self._directory / f"{step}-{sender}-{self._number}"
        if not path.is_file():
            path = self._directory / f"{step}-{sender}-all"
        return BuildExchangeRequest.decode(path.read_bytes())


# ---- what is told; arrays as the bytes of little-endian numbers ----


class ToldModel(msgspec.Struct, frozen=True):
    """`train`: a `PartModel`."""

    step: str
    centre: bytes
    offsets: bytes
    prices: bytes


class ToldCounts(msgspec.Struct, frozen=True):
    """`count`: rows of the slice for each part, int64; the sum of the slice's vectors, float64[dim]."""

    step: str
    counts: bytes
    total: bytes


class ToldRows(msgspec.Struct, frozen=True):
    """`divide`, to one shard: which rows of the slice are its own, uint32, counted from the slice's first, ascending."""

    step: str
    rows: bytes


class ToldImage(msgspec.Struct, frozen=True):
    """`build`: the image that a shard built by itself, beside its coarse table. Its fields are those of `ImageInfo`, and:

    Attributes:
        first_id: the smallest row number.
        centroid: float32[dim] of the partition, by which others tell which of their nodes are near.
    """

    step: str
    count: int
    dim: int
    metric: str
    vector_type: str
    M: int
    degree: int
    seed: int
    image_checksum: int
    first_id: int
    centroid: bytes


class ToldEvidence(msgspec.Struct, frozen=True):
    """`build`, to the first: what Compass is fitted to.

    Attributes:
        scatter: float64[dim, dim].
        lists: int32[h], the list that each held-out vector is in; -1 where it is another shard's.
        gaps, near: float32 and int32[h, k]: the nearest of this shard's vectors to each, and their lists; -1 for none.
    """

    step: str
    scatter: bytes
    lists: bytes
    gaps: bytes
    near: bytes


class ToldLinks(msgspec.Struct, frozen=True):
    """`link`: the finished image."""

    step: str
    image_bytes: int
    image_checksum: int


class ToldCalibration(msgspec.Struct, frozen=True):
    """`calibrate`: of Compass, as JSON; None where there is none."""

    step: str
    calibration: dict[str, Any] | None


def told(message: BuildExchangeRequest, kind: type[T]) -> T:
    """A message's map as `kind`. Raises `FormatError`."""
    try:
        return msgspec.convert(message.told, kind, builtin_types=(bytes,))
    except msgspec.ValidationError as error:
        raise FormatError(f"shard {message.shard}, {kind.__name__}: {error}") from error


def numbers(raw: bytes, dtype: str, shape: tuple[int, ...], what: str) -> npt.NDArray[Any]:
    """An array of such a shape, each number finite. Raises `FormatError`."""
    wanted = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if len(raw) != wanted:
        raise FormatError(f"{what}: {len(raw)} bytes where {list(shape)} numbers take {wanted}")
    found = np.frombuffer(raw, dtype).reshape(shape)
    if found.dtype.kind == "f" and not np.isfinite(found).all():
        raise FormatError(f"{what}: holds NaN or infinity")
    return found
