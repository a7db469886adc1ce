"""The messages between the builders of one graph, and how builders that share a directory exchange them.

A message comes from another process, perhaps on another machine.
The decoder checks its types, and the receiver checks its values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from cotra_rdma.errors import FormatError
from cotra_rdma.protocol.envelope import decode_array, encode_array
from cotra_rdma.protocol.tables import BuildExchangeRequest, CentroidTable

# ---- the messages; arrays are the bytes of little-endian numbers ----


class Message(msgspec.Struct, frozen=True, tag_field="step"):
    """A message between builders. It is a MessagePack map, in which `step` names the kind."""


class HelloMessage(Message, frozen=True, tag="hello"):
    """What a builder is going to build.

    Attributes:
        spec: the parameters that all builders must share.
        generation: the generation that this builder would give the collection.
        rows: a digest of some rows of the input.
    """

    spec: dict[str, Any]
    generation: int
    rows: str


class PartitionMessage(Message, frozen=True, tag="train"):
    """The partition: the arrays of a `PartModel`, as float32."""

    centre: bytes
    offsets: bytes
    prices: bytes


class CountsMessage(Message, frozen=True, tag="count"):
    """What a slice of the rows would take.

    Attributes:
        counts: int64[n_shards], the rows of the slice for each shard.
        total: float64[dim], the sum of the slice's vectors.
    """

    counts: bytes
    total: bytes


class RowsMessage(Message, frozen=True, tag="divide"):
    """The rows of a slice that belong to the receiver: uint32, ascending, counted from the first row of the slice."""

    rows: bytes


class ImageMessage(Message, frozen=True, tag="build"):
    """A shard's own image. The shard's coarse table comes with the message. Fields of `ImageInfo` keep their names.

    Attributes:
        first_id: the smallest row number of the shard.
        centroid: float32[dim], the shard's centroid in the partition. Others use it to find their nodes near the shard.
    """

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


class EvidenceMessage(Message, frozen=True, tag="evidence"):
    """What Compass is fitted to, from one shard to the first builder.

    Attributes:
        scatter: float64[dim, dim], see `steps.scatter`.
        lists: int32[h], the list that holds each held-out vector. It is -1 if another shard holds the vector.
        gaps: float32[h, k], the distances to the nearest vectors of this shard.
        near: int32[h, k], the lists of these nearest vectors, -1 for none.
    """

    scatter: bytes
    lists: bytes
    gaps: bytes
    near: bytes


class LinksMessage(Message, frozen=True, tag="link"):
    """The size and checksum of a shard's finished image."""

    image_bytes: int
    image_checksum: int


class CalibrationMessage(Message, frozen=True, tag="calibrate"):
    """The calibration of Compass as JSON values, or None if there is none."""

    calibration: dict[str, Any] | None


AnyMessage: Any = (
    HelloMessage
    | PartitionMessage
    | CountsMessage
    | RowsMessage
    | ImageMessage
    | EvidenceMessage
    | LinksMessage
    | CalibrationMessage
)
"""All kinds together, for a decoder. `step` says which one a message is."""

M = TypeVar("M", bound=Message)


def step_of(kind: type[Message]) -> str:
    """Returns the name of a kind of messages, as it is in their maps."""
    return str(kind.__struct_config__.tag)


def array_of(raw: bytes, dtype: str, shape: tuple[int, ...], what: str) -> npt.NDArray[Any]:
    """Returns the numbers of a message as an array.

    Args:
        raw: the bytes of the numbers.
        dtype: the type of a number.
        shape: the expected shape.
        what: what the numbers are, for the error message.

    Raises:
        FormatError: the bytes do not fill the shape, or a number is not finite.
    """
    wanted = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if len(raw) != wanted:
        raise FormatError(f"{what}: {len(raw)} bytes were received where {list(shape)} numbers take {wanted}")
    found = np.frombuffer(raw, dtype).reshape(shape)
    if found.dtype.kind == "f" and not np.isfinite(found).all():
        raise FormatError(f"{what}: holds NaN or infinity")
    return found


# ---- the exchange ----


class Mail(Protocol):
    """How a builder exchanges messages with the others."""

    def send(self, message: Message, to: int | None = None, table: BuildExchangeRequest | None = None) -> None:
        """Sends a message to one builder, or to all builders and the sender itself.

        Args:
            message: the message.
            to: the receiver's number. None stands for all.
            table: the sender's coarse table, which goes with the message.
        """

    def receive(self, kind: type[M], sender: int) -> tuple[M, CentroidTable]:
        """Returns a builder's message of one kind, and the table that came with it. It may wait for the message.

        A message without a table comes with a table of no lists.

        Raises:
            FormatError: the message is malformed.
        """


class DirectoryMail:
    """Messages as files, for builders that share a directory.

    Such builders take turns: each step ends before the next one begins, so that nobody waits for a message.

    Args:
        directory: the directory.
        number: the number of this builder's shard.
    """

    def __init__(self, directory: Path, number: int) -> None:
        self._directory, self._number = directory, number

    def send(self, message: Message, to: int | None = None, table: BuildExchangeRequest | None = None) -> None:
        """Writes a message to a file. See `Mail`."""
        path = self._directory / f"{step_of(type(message))}-{self._number}-{'all' if to is None else to}"
        path.write_bytes(encode_array(message))
        if table is not None:
            path.with_suffix(".table").write_bytes(table.encode())

    def receive(self, kind: type[M], sender: int) -> tuple[M, CentroidTable]:
        """Reads a message from a file. See `Mail`."""
        path = self._directory / f"{step_of(kind)}-{sender}-{self._number}"
        if not path.is_file():
            path = self._directory / f"{step_of(kind)}-{sender}-all"
        message = decode_array(path.read_bytes(), kind, f"message {step_of(kind)} of shard {sender}")
        beside = path.with_suffix(".table")
        table = BuildExchangeRequest.decode(beside.read_bytes()).table if beside.is_file() else CentroidTable.empty()
        return message, table
