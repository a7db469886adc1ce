"""Exact answers, recall that counts ties, hnswlib's answers, and both systems on one graph."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import hnswlib
import numpy as np
import numpy.typing as npt

from cotra_rdma import Shard
from quality.families import Doubles, Family, Floats

Ids = npt.NDArray[np.int64]

SEED = 100
_ROUNDING = float(np.finfo(np.float32).eps)
_BLOCK = 1 << 24  # numbers at once


@dataclass(frozen=True, slots=True)
class Truth:
    """The exact distances of the nearest rows that may be returned, in float64."""

    family: Family
    nearest: Doubles = field(repr=False)
    """float64[n_queries, most]: ascending; infinite past the last row that may be returned."""
    allowed: npt.NDArray[np.bool_] | None = field(repr=False)

    @classmethod
    def of(cls, family: Family, most: int = 500, allowed: npt.NDArray[np.bool_] | None = None) -> Truth:
        """Compares every query with every row.

        Args:
            most: the largest k that will be asked for.
            allowed: bool[count]: which rows may be returned; None for all.
        """
        rows = np.arange(len(family.base)) if allowed is None else np.flatnonzero(allowed)
        kept = min(most, len(rows))
        nearest = np.full((len(family.queries), most), np.inf)
        if kept:
            base = _comparable(family, family.base[rows])
            queries = _comparable(family, family.queries)
            step = max(1, _BLOCK // len(rows))
            for begin in range(0, len(queries), step):
                part = slice(begin, begin + step)
                nearest[part, :kept] = _nearest(family.metric, base, queries[part], kept)
        return cls(family, nearest, allowed)

    def good(self, ids: Ids, k: int) -> npt.NDArray[np.int64]:
        """How many of each query's answers are among its k nearest: int64[n_queries].

        An answer counts if it is no farther than the exact k-th one, but for what float32 rounds, and counts once.

        Args:
            ids: int64[n_queries, at least k]; below 0 where there is no answer.
        """
        ids = ids[:, :k]
        exact = distances(self.family, ids)
        last = self.nearest[:, min(k, self.nearest.shape[1]) - 1]
        limit = np.where(np.isinf(last), np.inf, last + _tolerance(self.family, last))
        right = (ids >= 0) & (exact <= limit[:, np.newaxis])
        if self.allowed is not None:
            right &= self.allowed[ids]
        return np.array([len(set(row[kept].tolist())) for row, kept in zip(ids, right, strict=True)])

    def recall(self, ids: Ids, k: int) -> float:
        """The share of the k nearest that was found: of as many as there are."""
        there = np.isfinite(self.nearest[:, :k]).sum()
        return float(self.good(ids, k).sum() / there) if there else 1.0


def distances(family: Family, ids: Ids) -> Doubles:
    """The exact distances of answers: float64[n_queries, k], infinite where there is none."""
    base, queries = family.base, _comparable(family, family.queries)
    out = np.empty(ids.shape)
    for i, row in enumerate(ids):
        vectors = _comparable(family, base[row])
        if family.metric == "l2":
            out[i] = ((vectors - queries[i]) ** 2).sum(axis=1)
        else:
            out[i] = 1 - (vectors * queries[i]).sum(axis=1)
    out[ids < 0] = np.inf
    return out


def _comparable(family: Family, rows: Floats) -> Doubles:
    exact = rows.astype(np.float64)
    return exact / np.linalg.norm(exact, axis=1, keepdims=True) if family.metric == "cosine" else exact


def _nearest(metric: str, base: Doubles, queries: Doubles, k: int) -> Doubles:
    if metric != "l2":
        return np.sort(np.partition(1 - queries @ base.T, k - 1, axis=1)[:, :k], axis=1)
    centre = base.mean(axis=0)
    base, queries = base - centre, queries - centre
    squares, query_squares = (base**2).sum(axis=1), (queries**2).sum(axis=1)
    rough = query_squares[:, np.newaxis] - 2 * (queries @ base.T) + squares
    # A difference of large numbers: it only says which rows are worth an exact comparison.
    bound = 1e-13 * base.shape[1] ** 0.5 * (query_squares + squares.max())
    limit = np.partition(rough, k - 1, axis=1)[:, k - 1] + 2 * bound
    out = np.empty((len(queries), k))
    for i, query in enumerate(queries):
        near = base[rough[i] <= limit[i]]
        out[i] = np.sort(((near - query) ** 2).sum(axis=1))[:k]
    return out


def _tolerance(family: Family, last: Doubles) -> Doubles:
    """What float32 may get wrong of a distance."""
    relative = 1e-6 * np.abs(last)
    if family.metric == "l2":
        return relative + _ROUNDING * family.dim**0.5 * last
    if family.metric == "cosine":
        return relative + 2 * _ROUNDING
    lengths = np.linalg.norm(family.queries.astype(np.float64), axis=1)
    longest = np.linalg.norm(family.base.astype(np.float64), axis=1).max()
    return relative + _ROUNDING * (1 + np.minimum(lengths * longest, np.abs(last)))


# ---- hnswlib ----


def build_graph(family: Family, cache: Path | None = None) -> hnswlib.Index:
    """Builds hnswlib's index with one thread and a fixed seed, or loads it from the directory `cache`."""
    index = hnswlib.Index(family.metric, family.dim)
    file = None if cache is None else cache / f"{_fingerprint(family)}.hnsw"
    if file is not None and file.exists():
        index.load_index(str(file), max_elements=len(family.base))
        return index
    index.init_index(len(family.base), M=family.M, ef_construction=family.ef_construction, random_seed=SEED)
    index.add_items(family.base, np.arange(len(family.base)), num_threads=1)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        index.save_index(str(file))
    return index


def _fingerprint(family: Family) -> str:
    digest = hashlib.blake2b(np.ascontiguousarray(family.base), digest_size=8)
    digest.update(f"{family.metric} {family.dim} {family.M} {family.ef_construction} {SEED}".encode())
    return digest.hexdigest()


def ask_hnswlib(
    index: hnswlib.Index, queries: Floats, k: int, ef: int, passes: Callable[[int], bool] | None = None
) -> Ids:
    """hnswlib's answers: int64[n_queries, k], -1 in places that it leaves empty.

    Args:
        passes: a filter: whether an id may be returned.
    """
    index.set_ef(ef)
    try:
        return index.knn_query(queries, k, num_threads=1, filter=passes)[0].astype(np.int64)
    except RuntimeError:  # it raises where one query has fewer than k answers
        return np.array([_ask_for_one(index, query, k, passes) for query in queries])


def _ask_for_one(index: hnswlib.Index, query: Floats, k: int, passes: Callable[[int], bool] | None) -> Ids:
    best = np.empty(0, np.int64)
    low, high = 0, k  # it finds `low` answers, and no more than `high`
    while low < high:
        asked = (low + high + 1) // 2
        try:
            best = index.knn_query(query, asked, num_threads=1, filter=passes)[0][0].astype(np.int64)
            low = asked
        except RuntimeError:
            high = asked - 1
    return np.concatenate([best, np.full(k - len(best), -1, np.int64)])


@dataclass(frozen=True, slots=True)
class Case:
    """A family, and both systems on one graph."""

    family: Family
    index: hnswlib.Index = field(repr=False)
    shard: Shard
    truth: Truth = field(repr=False)

    def recalls(self, k: int, ef: int) -> tuple[float, float]:
        """recall@k of hnswlib and of cotra."""
        theirs = ask_hnswlib(self.index, self.family.queries, k, ef)
        return self.truth.recall(theirs, k), self.truth.recall(self.answers(k, ef), k)

    def answers(self, k: int, ef: int) -> Ids:
        """cotra's."""
        return self.shard.search(self.family.queries, k, ef)[0]
