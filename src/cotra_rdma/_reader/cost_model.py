"""The cost model behind `algorithm="auto"`: it predicts how long each way to search would take.

A prediction comes from what the links can do and from what an algorithm needs.
A link is measured when it is connected.
What an algorithm needs of a shard (READs, rounds, bytes, CPU) is what earlier searches with the same parameters needed.
Before the first search it is a guess from ef and beam.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

EXPANSION_S = 1e-6  # CPU of one expansion, until it was measured
ESTIMATE_S = 1e-8  # of one entry of an inverted list
READS_OF_EF = 0.8  # READs of a walk for each of ef, until they were counted
ENTRY_ROUNDS = 2.0
RERANKED_OF_K = 4.0
TOLD_BYTES = 200.0  # of a node that an owner expanded: 24, and 8 for each neighbour below the limit
_KEPT = 8  # searches that are noted and not asked about: older ones would count for 1 / 256


@dataclass(frozen=True, slots=True)
class Link:
    """How fast the path to a shard is.

    Attributes:
        rtt_s: one READ of 1 KiB, from post to completion, in seconds; infinite where memory cannot be read.
        reads_per_s: READs of 1 KiB, many in progress.
        bytes_per_s: of long READs.
        rpc_s: a call that the owner answers at once.
    """

    rtt_s: float
    reads_per_s: float
    bytes_per_s: float
    rpc_s: float


@dataclass(frozen=True, slots=True)
class Needs:
    """What a query needs of one shard, on average.

    Attributes:
        reads, rounds, bytes: over the wire; over RPC no reads and one round.
        cpu_s: CPU time of whoever searches, in seconds.
    """

    reads: float
    rounds: float
    bytes: float
    cpu_s: float

    def shared_by(self, n_shards: float) -> Needs:
        """Returns the part of each shard, if `n_shards` shards share these needs."""
        return Needs(self.reads / n_shards, self.rounds, self.bytes / n_shards, self.cpu_s / n_shards)


def guess_walk(k: int, ef: int, beam: int, record_bytes: float) -> Needs:
    """Guesses what a walk of a shard's graph needs, before the first walk."""
    reads = max(float(k), READS_OF_EF * ef)
    return Needs(reads, ENTRY_ROUNDS + reads / beam, reads * record_bytes, reads * EXPANSION_S)


def guess_lists(k: int, n_probe: int, n_lists: int, list_bytes: float, entries: float, vector_bytes: float) -> Needs:
    """Guesses what a shard's part of a search in inverted lists needs. n_lists, list_bytes and entries are of all shards."""
    lists = min(n_probe, n_lists) / n_lists
    reranked = RERANKED_OF_K * k
    read = lists * list_bytes + reranked * vector_bytes
    return Needs(min(n_probe, n_lists) + reranked, 2.0, read, lists * entries * ESTIMATE_S + reranked * EXPANSION_S)


def over_rpc(walk: Needs, dim: int, k: int) -> Needs:
    """Returns what the same walk needs if the owner makes it: one message there and one back."""
    return Needs(0.0, 1.0, 5.0 * dim + 12.0 * k + 100.0, walk.cpu_s)


def needs_of_reading(
    links: Sequence[Link], stats: npt.NDArray[np.void], searches: int, seconds: float, n_threads: int
) -> Needs:
    """Computes what a query needed of one shard, from a batch that was measured.

    Args:
        links: to the shards.
        stats: `STATS_DTYPE`[n_queries] of the batch.
        searches: the number of searches of one query in one shard.
        seconds: that the batch took.
        n_threads: threads that shared it.
    """
    reads, read_bytes, rounds = (float(stats[name].sum()) for name in ("reads", "read_bytes", "rounds"))
    n, rounds = len(links), rounds / len(stats)
    waited = rounds * max(link.rtt_s for link in links)  # what the wire took is not CPU time
    waited += max(max(reads / n / link.reads_per_s, read_bytes / n / link.bytes_per_s) for link in links)
    busy = max(seconds - waited, reads * EXPANSION_S / 10)
    return Needs(reads / searches, rounds, read_bytes / searches, busy * n_threads / searches)


def needs_of_asking(links: Sequence[Link], stats: npt.NDArray[np.void], searches: int, seconds: float) -> Needs:
    """Computes the same for owners that were asked. Each searched its own part, all at the same time."""
    own = max(seconds - max(link.rpc_s for link in links), 0.0) * len(links) / searches
    return Needs(0.0, 1.0, float(stats["read_bytes"].mean()), own)


@dataclass(frozen=True, slots=True)
class Prediction:
    """How long one way to search would take for a batch.

    Attributes:
        algorithm: its name.
        seconds: from call to answer.
        reads, rounds, bytes, owner_cpu_s, shards: of a query, over all the shards that it asks.
        allowed: whether `auto` may take it; `why` says why not.
    """

    algorithm: str
    seconds: float
    reads: float
    rounds: float
    bytes: float
    owner_cpu_s: float
    shards: float
    allowed: bool = True
    why: str = ""


def predict_read(
    algorithm: str, needs: Needs, links: Sequence[Link], shares: Sequence[float], n_queries: int, n_threads: int
) -> Prediction:
    """Predicts a one-sided search: rounds follow each other, and the busiest link or the CPU bounds the rest of the batch.

    Args:
        shares: for each link, the share of the queries that ask its shard.
    """
    wire = max(
        n_queries * share * max(needs.reads / link.reads_per_s, needs.bytes / link.bytes_per_s)
        for link, share in zip(links, shares, strict=True)
    )
    asked = sum(shares)
    cpu = n_queries * asked * needs.cpu_s / max(1, min(n_threads, n_queries))
    seconds = needs.rounds * max(link.rtt_s for link in links) + max(wire, cpu)
    return Prediction(algorithm, seconds, needs.reads * asked, needs.rounds, needs.bytes * asked, 0.0, asked)


def predict_asked(
    algorithm: str, needs: Needs, links: Sequence[Link], shares: Sequence[float], n_queries: int
) -> Prediction:
    """Predicts a search over RPC: one call to each owner, all at the same time. An owner searches with one thread."""
    slowest = max(link.rpc_s + n_queries * share * needs.cpu_s for link, share in zip(links, shares, strict=True))
    asked = sum(shares)
    return Prediction(algorithm, slowest, 0.0, 1.0, needs.bytes * asked, needs.cpu_s * asked, asked)


def pushed(walk: Needs, dim: int) -> Needs:
    """Returns what a walk needs of a shard whose owner expands its nodes.

    Each round has a message there, with the query, and a message back, with the neighbours of each node.
    """
    return replace(walk, bytes=4.0 * dim * walk.rounds + TOLD_BYTES * walk.reads, cpu_s=walk.reads * EXPANSION_S)


def predict_pushed(
    algorithm: str, needs: Needs, links: Sequence[Link], shares: Sequence[float], n_queries: int
) -> Prediction:
    """Predicts a walk whose nodes owners expand: in each round one message to each owner, all at the same time.

    CoTra's rule of thumb (arXiv 2507.06653): READs are quicker if the other side has at most about two nodes of a round,
    since a READ is one round trip and a message is two.
    With more nodes, READs take longer on a link that carries few of them.
    """
    busy = max(n_queries * share * needs.cpu_s for share in shares)
    asked = sum(shares)
    seconds = needs.rounds * max(link.rpc_s for link in links) + busy
    return Prediction(algorithm, seconds, 0.0, needs.rounds, needs.bytes * asked, needs.cpu_s * asked, asked)


def forbidden(prediction: Prediction, why: str) -> Prediction:
    """Returns the prediction, marked as one that must not be taken."""
    return replace(prediction, allowed=False, why=why)


def cheapest(predictions: Sequence[Prediction]) -> Prediction:
    """Returns the quickest prediction that is allowed, the first among equals."""
    return min((prediction for prediction in predictions if prediction.allowed), key=lambda p: p.seconds)


@dataclass(slots=True)
class Experience:
    """What searches needed so far, by method ("walk", "lists", "asked") and parameters. Any thread may use it."""

    _seen: dict[tuple[str, int, int, int], Needs] = field(default_factory=dict)
    _noted: defaultdict[tuple[str, int, int, int], deque[Needs | Callable[[], Needs]]] = field(
        default_factory=lambda: defaultdict(lambda: deque(maxlen=_KEPT))
    )
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, method: str, k: int, ef: int, beam: int, needs: Needs | Callable[[], Needs]) -> None:
        """Notes what a search needed. It counts as much as all searches before it.

        Args:
            needs: the needs, or a function that computes them when somebody asks. After most searches nobody does, so only
                the last few are kept.
        """
        with self._lock:
            self._noted[method, k, ef, beam].append(needs)

    def of(self, method: str, k: int, ef: int, beam: int) -> Needs | None:
        """What searches with these parameters needed; None before the first."""
        key = (method, k, ef, beam)
        with self._lock:
            for told in self._noted.pop(key, ()):
                needs = told if isinstance(told, Needs) else told()
                old = self._seen.get(key, needs)
                self._seen[key] = Needs(*((getattr(old, n) + getattr(needs, n)) / 2 for n in Needs.__slots__))
            return self._seen.get(key)
