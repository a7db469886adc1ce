"""`BuildParams`: what a graph and its inverted lists are built with."""

from __future__ import annotations

from dataclasses import dataclass

from cotra_rdma._clustering.kmeans import thread_count
from cotra_rdma._core.constants import METRICS, VECTOR_TYPES
from cotra_rdma._native.list_engine import MAX_BITS
from cotra_rdma.errors import InvalidInputError

_MAX_M = 512


@dataclass(frozen=True, slots=True)
class BuildParams:
    """What a graph and its inverted lists are built with.

    The HNSW parameters are those of Malkov and Yashunin ("Efficient and robust approximate nearest neighbor search
    using
    Hierarchical Navigable Small World graphs", section 4.1).

    Attributes:
        metric: "l2" (squared), "ip" (1 - inner product) or "cosine" (1 - cosine), as in hnswlib.
        M: the most links of a node on an upper layer. Level 0 has up to 2 M.
        ef_construction: the length of the list of candidates while the graph is built.
        seed: the seed of hnswlib's levels, of the codes' rotation and of k-means.
        n_threads: the threads of the build. 0 stands for all cores.
        n_lists: the number of inverted lists beside the graph. 0 stands for none.
        ivf_bits: the bits of each dimension in the lists' codes.
        vector_type: the type in which vectors are stored: "auto", "float32", "float16" or "uint8".

    Raises:
        InvalidInputError: a value is out of its range.
    """

    metric: str = "l2"
    M: int = 16
    ef_construction: int = 200
    seed: int = 100
    n_threads: int = 0
    n_lists: int = 0
    ivf_bits: int = 2
    vector_type: str = "auto"

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise InvalidInputError(f"metric must be one of {', '.join(METRICS)}, not {self.metric!r}")
        if not 2 <= self.M <= _MAX_M:
            raise InvalidInputError(f"M must be in [2, {_MAX_M}], not {self.M}")
        if self.ef_construction < 1:
            raise InvalidInputError(f"ef_construction must be at least 1, not {self.ef_construction}")
        if self.vector_type not in ("auto", *VECTOR_TYPES):
            raise InvalidInputError(f"vector_type must be auto, {', '.join(VECTOR_TYPES)}, not {self.vector_type!r}")
        check_lists(self.n_lists, self.ivf_bits)
        thread_count(self.n_threads)

    @property
    def threads(self) -> int:
        """The number of threads that `n_threads` stands for."""
        return thread_count(self.n_threads)


def check_lists(n_lists: int, bits: int, count: int | None = None) -> None:
    """Checks the parameters of inverted lists.

    Args:
        n_lists: the number of lists.
        bits: the bits of each dimension in the codes.
        count: the number of vectors that the lists share, if it is known.

    Raises:
        InvalidInputError: a value is out of its range.
    """
    if n_lists < 0:
        raise InvalidInputError(f"n_lists must be >= 0, not {n_lists}")
    if count is not None and n_lists > count:
        raise InvalidInputError(f"{count} vectors cannot make {n_lists} lists")
    if not 1 <= bits <= MAX_BITS:
        raise InvalidInputError(f"ivf_bits must be in [1, {MAX_BITS}], not {bits}")
