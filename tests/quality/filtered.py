"""Filters by share and by correlation with the query, rows that are deleted, and hnswlib under both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import hnswlib
import numpy as np
import numpy.typing as npt

from quality.families import Doubles, Family, Floats, around
from quality.measure import Ids, ask_hnswlib

Rows = npt.NDArray[np.bool_]

SHARES = (0.5, 0.1, 0.01, 0.001)
CORRELATIONS = (-1.0, -0.5, 0.0, 0.5, 1.0)
DIM, CLUSTERS = 32, 40


@dataclass(frozen=True, slots=True)
class Grouped:
    """Vectors in clusters that overlap, and groups of queries. The queries of a group are of one cluster, and have one filter."""

    family: Family
    groups: tuple[Family, ...]
    """For each group the same vectors with its queries alone."""
    ranks: npt.NDArray[np.int64]
    """int64[n_groups, count]: of each row, how many are nearer to the middle of the group's queries."""

    def allowed(self, group: int, share: float, correlation: float) -> Rows:
        """Which rows a group's queries may have back.

        Args:
            share: of the rows.
            correlation: 1: the nearest rows; -1: the farthest ones, so that the neighbourhood of the queries is excluded; 0: any;
                between: by rank and by chance, the rank with this weight.
        """
        count = len(self.family.base)
        chance = np.random.default_rng([group, round(share * 1e6)]).random(count)
        rank = self.ranks[group] / count
        key = abs(correlation) * (rank if correlation > 0 else 1 - rank) + (1 - abs(correlation)) * chance
        return first(key, max(1, round(share * count)))


def first(key: Doubles, n: int) -> Rows:
    """Marks the n rows with the smallest keys."""
    marked = np.zeros(len(key), bool)
    marked[np.argsort(key, kind="stable")[:n]] = True
    return marked


def grouped(rows: int, n_groups: int, per_group: int) -> Grouped:
    """Makes the data."""
    random = np.random.default_rng(14160)
    centres = 1.5 * random.standard_normal((CLUSTERS, DIM))
    base, _ = around(random, centres, 1.0, rows, 0)
    parts = [around(random, centres[[i]], 1.0, 0, per_group)[1].astype(np.float32) for i in range(n_groups)]
    family = Family("grouped", "l2", base.astype(np.float32), np.concatenate(parts))
    order = [np.argsort(squares(family.base, part), kind="stable") for part in parts]
    return Grouped(
        family,
        tuple(replace(family, queries=part) for part in parts),
        np.argsort(np.array(order), axis=1, kind="stable"),
    )


def squares(base: Floats, queries: Floats) -> Doubles:
    """The squared distance of each row to the middle of the queries."""
    out = np.zeros(len(base))
    for column, middle in zip(base.T.astype(np.float64), queries.T.astype(np.float64), strict=True):
        out += (column - np.add.reduce(middle) / len(middle)) ** 2
    return out


# ---- more filters, and rows that are deleted ----


def _norms(data: Grouped) -> Doubles:
    return squares(data.family.base, data.family.base)


OTHERS: dict[str, Callable[[Grouped, int], Rows]] = {
    "all but the nearest 5 %": lambda data, group: data.ranks[group] >= data.ranks.shape[1] // 20,
    "the outermost 10 %": lambda data, group: first(-_norms(data), data.ranks.shape[1] // 10),
    "the innermost 10 %": lambda data, group: first(_norms(data), data.ranks.shape[1] // 10),
    "12 rows": lambda data, group: data.allowed(group, 12 / data.ranks.shape[1], 0.0),
    "4 rows": lambda data, group: data.allowed(group, 4 / data.ranks.shape[1], 0.0),
}
"""Which rows a group's queries may have back."""

DELETED: dict[str, Callable[[Grouped], Rows]] = {
    "90 % deleted": lambda data: data.allowed(0, 0.1, 0.0),
    "99 % deleted": lambda data: data.allowed(0, 0.01, 0.0),
    "the first group's nearest half deleted": lambda data: data.allowed(0, 0.5, -1.0),
    "all but 12 deleted": lambda data: data.allowed(0, 12 / data.ranks.shape[1], 0.0),
}
"""Which rows are left."""


# ---- hnswlib ----


@contextmanager
def only(index: hnswlib.Index, allowed: Rows) -> Iterator[None]:
    """Deletes all other rows from the index meanwhile: a filter of hnswlib's that calls no Python."""
    others = np.flatnonzero(~allowed).tolist()
    for row in others:
        index.mark_deleted(row)
    try:
        yield
    finally:
        for row in others:
            index.unmark_deleted(row)


def ask_with_filter(index: hnswlib.Index, queries: Floats, allowed: Rows, k: int, ef: int) -> Ids:
    """hnswlib's answers under its own filter: a function of Python's that it calls for each node it looks at."""
    passes = allowed.tolist()
    return padded(ask_hnswlib(index, queries, min(k, int(allowed.sum())), ef, passes.__getitem__), k)


def ask_among(index: hnswlib.Index, queries: Floats, left: int, k: int, ef: int) -> Ids:
    """hnswlib's answers where all but `left` rows are deleted."""
    return padded(ask_hnswlib(index, queries, min(k, left), ef), k)


def padded(ids: Ids, k: int) -> Ids:
    """The same with empty places up to k."""
    return np.pad(ids, ((0, 0), (0, k - ids.shape[1])), constant_values=-1)


def check_answers(ids: Ids, allowed: Rows) -> None:
    """All places for which there is a row are filled, once, with rows that may be returned."""
    there = min(ids.shape[1], int(allowed.sum()))
    assert ((ids[:, :there] < 0).mean(), (ids[:, there:] >= 0).mean() if there < ids.shape[1] else 0) == (0, 0)
    assert allowed[ids[:, :there]].all()
    assert all(len(set(row)) == there for row in ids[:, :there].tolist())
