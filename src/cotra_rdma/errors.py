"""Every exception that the package raises on purpose. One base; below it, what a caller would handle differently."""

from __future__ import annotations

from typing import Any, Protocol


class CotraError(Exception):
    """The base of all errors of this package.

    Attributes:
        shard: the position (in the order given to `connect`) of the shard it concerns, or None.
        sys_errno: the errno behind it, or 0.
    """

    def __init__(self, message: str, *, shard: int | None = None, sys_errno: int = 0) -> None:
        super().__init__(message)
        self.shard = shard
        self.sys_errno = sys_errno


class InvalidInputError(CotraError, ValueError):
    """A value of the caller's is out of its range: a wrong dimension, NaN in a vector, duplicate ids, k > ef."""


class FormatError(CotraError, ValueError):
    """Bytes that are not a graph image, envelope or data set of ours, or malformed ones."""


class ChecksumError(FormatError):
    """A checksum does not match: the bytes are torn or corrupt."""


class LossyVectorError(InvalidInputError):
    """A vector cannot be held exactly by the vector type that was asked for."""


class VerbsUnavailableError(CotraError):
    """RDMA was asked for by name and cannot be had; the message says why and what to do."""


class DeviceNotFoundError(VerbsUnavailableError):
    """libibverbs is there, but the device, port or GID is not."""


class MemlockError(CotraError, PermissionError):
    """RLIMIT_MEMLOCK is too small to pin the memory; the message has the number and the line to change."""


class TransportError(CotraError, ConnectionError):
    """A peer cannot be reached, or a path to it broke."""


class CompletionError(TransportError):
    """A work request completed in error.

    Attributes:
        wc_status: `enum ibv_wc_status` of the completion.
        vendor_error: the provider's own code beside it.
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
    """Time ran out: before a peer answered, or before a search was over."""


class BusyError(TransportError):
    """An owner has too much to do to take this request now; it may be sent again, a little later."""


class BoundsError(CotraError, IndexError):
    """An offset and length outside the memory region."""


class ClosedError(CotraError):
    """The object was closed."""


class SearchCancelledError(CotraError):
    """A search was given up before its end: by `Stop.set`, or because who asked for it is gone."""


class StaleShardError(FormatError):
    """A record is of another generation than the header that was read: the shard was rebuilt; connect again."""


class PeerError(CotraError):
    """A peer answered a request with an error; the message is the peer's."""


class PartialAnswer(Protocol):
    """What a `SearchResult` and a `SeamResult` have in common."""

    @property
    def ids(self) -> Any:
        """int64[n_queries, k], -1 in empty places; of a `SeamResult` int64[k]."""

    @property
    def distances(self) -> Any:
        """float32 likewise."""

    @property
    def coverage(self) -> float:
        """The share of the shards that answered."""


class PartialResultError(TransportError):
    """Some shards did not answer, and a partial answer was not asked for; the message names them.

    Attributes:
        result: what the others answered: a `SearchResult`, whose `failures` say why, or a `SeamResult`, whose `outcomes` do.
    """

    def __init__(self, message: str, result: PartialAnswer, *, shard: int | None = None) -> None:
        super().__init__(message, shard=shard)
        self.result = result

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (str(self), self.result), {"shard": self.shard, "sys_errno": self.sys_errno}
