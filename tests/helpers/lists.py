"""Readers of shards' inverted lists, for tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import numpy.typing as npt

from cotra_rdma import Arena
from cotra_rdma._native.channel import Channel
from cotra_rdma._native.list_engine import IvfTable, SpireEngine
from cotra_rdma._native.view import View

Open = Callable[[Arena], Channel]


@contextmanager
def spire_of(*arenas: Arena, open_channel: Open = Channel.shm, simd: int | None = None) -> Iterator[SpireEngine]:
    """An engine over images in this process, through channels that `open_channel` makes."""
    with ExitStack() as stack:
        channels = [stack.enter_context(open_channel(arena)) for arena in arenas]
        views = [stack.enter_context(View.open(channel)) for channel in channels]
        tables = [
            stack.enter_context(IvfTable.open(channel, view)) for channel, view in zip(channels, views, strict=True)
        ]
        yield stack.enter_context(SpireEngine.create(views, tables, channels, simd=simd))


def distances_to_all(rows: np.ndarray, queries: np.ndarray, metric: str) -> npt.NDArray[np.float64]:
    """float64[n_queries, n]"""
    q, x = queries.astype(np.float64), rows.astype(np.float64)
    if metric == "l2":
        return np.maximum((q**2).sum(1)[:, None] + (x**2).sum(1) - 2 * q @ x.T, 0)
    if metric == "cosine":
        q, x = (v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-30) for v in (q, x))
    return 1 - q @ x.T


def recall_of(
    labels: npt.NDArray[np.int64], exact: npt.NDArray[np.float64], rows: Sequence[int] | None = None
) -> float:
    """The part of the places in `labels` [n, k] (row numbers) that are as near as the k-th nearest; ties count.

    rows: those that may be found; None: all.
    """
    allowed = exact if rows is None else exact[:, list(rows)]
    k = min(labels.shape[1], allowed.shape[1])
    bound = np.partition(allowed, k - 1, axis=1)[:, k - 1 : k]
    found = np.take_along_axis(exact, labels[:, :k], axis=1)
    return float(((found <= bound + 1e-6 * (np.abs(exact).max() + 1)) & (labels[:, :k] >= 0)).mean())
