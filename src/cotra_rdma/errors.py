"""Every exception that the package raises on purpose.

There is one base class, and below it a class for each case that a caller would handle differently.
"""

from __future__ import annotations

from typing import Any, Protocol


class CotraError(Exception):
    """The base of all errors of this package.

    Attributes:
        shard: the shard that the error concerns, by its position in the list given to `connect`. None if it concerns
            none.
        sys_errno: the errno behind the error, or 0.
    """

    def __init__(self, message: str, *, shard: int | None = None, sys_errno: int = 0) -> None:
        super().__init__(message)
        self.shard = shard
        self.sys_errno = sys_errno


class InvalidInputError(CotraError, ValueError):
    """A value from the caller is out of its range: a wrong dimension, NaN in a vector, duplicate ids, or k > ef."""


class FormatError(CotraError, ValueError):
    """Bytes are malformed, or are not a graph image, envelope or data set at all."""


class ChecksumError(FormatError):
    """A checksum does not match: the bytes are torn or corrupt."""


class LossyVectorError(InvalidInputError):
    """The vector type that was asked for cannot store a vector exactly."""


class VerbsUnavailableError(CotraError):
    """RDMA was asked for by name and is not available. The message says why, and what to do."""


class DeviceNotFoundError(VerbsUnavailableError):
    """libibverbs is installed, but the device, port or GID does not exist."""


class MemlockError(CotraError, PermissionError):
    """RLIMIT_MEMLOCK is too small to pin the memory. The message has the number and the line to change."""


class TransportError(CotraError, ConnectionError):
    """An owner or builder cannot be reached, or the path to it broke."""


class CompletionError(TransportError):
    """A work request completed with an error.

    Attributes:
        wc_status: the `enum ibv_wc_status` of the completion.
        vendor_error: the provider's own error code.
    """

    def __init__(
        self,
        message: str,
        *,
        shard: int | None = None,
        sys_errno: int = 0,
        wc_status: int = 0,
        vendor_error: int = 0,
    ) -> None:
        super().__init__(message, shard=shard, sys_errno=sys_errno)
        self.wc_status = wc_status
        self.vendor_error = vendor_error


class DeadlineError(TransportError, TimeoutError):
    """Time ran out before an answer came, or before a search ended."""


class BusyError(TransportError):
    """An owner has too much to do to take this request now. The request may be sent again, a little later."""


class BoundsError(CotraError, IndexError):
    """An offset and length are outside the memory region."""


class ClosedError(CotraError):
    """The object is closed."""


class SearchCancelledError(CotraError):
    """A search was stopped early, by `Stop.set` or because its caller is gone."""


class StaleShardError(FormatError):
    """The shard was built again: an owner serves another image, or a record is of another generation. Connect again."""


class PeerError(CotraError):
    """An owner or builder answered a request with an error. The message is its own."""


class DeniedError(PeerError):
    """An owner's policy does not allow what was asked."""


class PartialAnswer(Protocol):
    """What a `SearchResult` and a `SeamResult` have in common."""

    @property
    def ids(self) -> Any:
        """int64[n_queries, k], with -1 in empty places. For a `SeamResult`, int64[k]."""

    @property
    def distances(self) -> Any:
        """float32 of the same shape as `ids`."""

    @property
    def coverage(self) -> float:
        """The share of the shards that answered."""


class PartialResultError(TransportError):
    """Some shards did not answer, and a partial answer was not allowed. The message names the shards.

    Attributes:
        result: the answer of the other shards. It is a `SearchResult`, whose `failures` give the reasons, or a
            `SeamResult`, whose `outcomes` do.
    """

    def __init__(self, message: str, result: PartialAnswer, *, shard: int | None = None) -> None:
        super().__init__(message, shard=shard)
        self.result = result

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (str(self), self.result), {"shard": self.shard, "sys_errno": self.sys_errno}
