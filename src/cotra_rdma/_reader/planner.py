"""Plans how a batch is searched: which shards each query asks, by what path, and what `algorithm="auto"` takes."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cotra_rdma._reader.batch import Batch
from cotra_rdma._reader.connection import LOST, ONE_SIDED, Connection
from cotra_rdma._reader.cost_model import (
    Experience,
    Needs,
    Prediction,
    cheapest,
    forbidden,
    guess_lists,
    guess_walk,
    over_rpc,
    predict_asked,
    predict_pushed,
    predict_read,
    pushed,
)
from cotra_rdma._routing.router import Router
from cotra_rdma.errors import FormatError, InvalidInputError, TransportError

log = logging.getLogger(__name__)

ALGORITHMS = ("auto", "cotra", "home", "scatter-gather", "spire", "compass", "compass+scatter-gather", "compass+spire")
_FULL = 0.9  # of the shards: a selection of more is not worth having


class Plan(NamedTuple):
    """What a search will do.

    Attributes:
        algorithm: its name.
        mask: bool[n_queries, n_shards]: which shards each query asks; None: all.
        lists: whether inverted lists are read and not graphs.
        asked: positions of the shards whose owners search them, over RPC.
        pushed: positions of the shards of one graph whose owners expand nodes for the walk, over RPC; the others are read.
        homes: int64[n_queries]: the shard whose owner searches all shards for the query; None where this side does.
        here: how this side searches the queries that no home answers; only beside `homes`.
        predictions: of every way that was considered, the one taken first; empty unless "auto" or an explanation wanted them.
    """

    algorithm: str
    mask: npt.NDArray[np.bool_] | None
    lists: bool
    asked: frozenset[int]
    pushed: frozenset[int] = frozenset()
    homes: npt.NDArray[np.int64] | None = None
    predictions: tuple[Prediction, ...] = ()
    here: Plan | None = None


class Planner:
    """Makes plans for one cluster's shards."""

    def __init__(
        self,
        connections: Sequence[Connection],
        dim: int,
        router: Router | None,
        walked: frozenset[int] = frozenset(),
        *,
        one_graph: bool = False,
    ) -> None:
        """Plans for these shards.

        Args:
            connections: to all shards; looked at again by `refresh`.
            dim: of their vectors.
            router: of `router_of`. walked: of `walked_of`.
            one_graph: whether all shards are of one graph, however many have an owner.
        """
        self._connections = connections
        self._dim = dim
        self._one_graph = one_graph
        self.router = router
        self._lock = threading.Lock()
        self.experience = Experience()
        self._refresh(walked)

    def refresh(self) -> None:
        """Looks at the owners again, after some were replaced or lost. Any thread may call it."""
        with self._lock:
            if self.router is None:  # Compass takes the whole collection, which may be there only now
                self.router = router_of(self._connections)
            self._refresh(walked_of(self._connections))

    def _refresh(self, walked: frozenset[int]) -> None:
        here = range(len(self._connections))
        self._n_walked = max(1, len(walked))
        self._every = frozenset(at for at in here if self._connections[at].transport != LOST)
        unread = frozenset(at for at in self._every if self._connections[at].transport not in ONE_SIDED)
        self._pushed = unread & walked
        self._closed = unread - walked

    def plan(
        self, algorithm: str, batch: Batch, n_threads: int, *, target_recall: float, owner_cpu: bool, explain: bool
    ) -> Plan:
        """Plans a search.

        Raises:
            InvalidInputError: the algorithm is unknown, or these shards cannot be searched by it.
        """
        if algorithm not in ALGORITHMS:
            raise InvalidInputError(f"algorithm must be one of {', '.join(ALGORITHMS)}, not {algorithm!r}")
        if not self._every:  # nothing to plan: why is told with the answer
            return Plan(algorithm, batch.mask, False, frozenset())
        if algorithm == "home" and self._one_graph and batch.mask is not None:
            algorithm = "cotra"  # homes are told no mask: the walk is made here, and the result says so
        if algorithm == "home":
            here = Plan("cotra", batch.mask, False, self._closed, self._pushed)
            return Plan(algorithm, batch.mask, False, frozenset(), homes=self.homes(batch), here=here)
        if algorithm == "cotra" and not explain:  # nothing to plan
            return Plan(algorithm, batch.mask, False, self._closed, self._pushed)
        mask = batch.mask
        # A walk over one graph leaves out shards by itself.
        routes = not self._one_graph and self._calibrated_for(batch)
        if algorithm.startswith("compass") or (algorithm == "auto" and routes):
            mask = self._selection(batch, target_recall, required=algorithm != "auto")
        predictions: tuple[Prediction, ...] = ()
        base = algorithm.removeprefix("compass").removeprefix("+") or "cotra"
        if base == "spire" and (why := self._no_lists(batch)):
            raise InvalidInputError(f"spire: {why}")
        if algorithm == "auto" or explain:
            auto = algorithm == "auto"
            lists_mask = batch.mask if auto else mask
            considered = self._predictions(batch, mask, lists_mask, n_threads, owner_cpu, mixed=owner_cpu and auto)
            chosen = cheapest(considered) if algorithm == "auto" else next(p for p in considered if p.algorithm == base)
            predictions = (chosen, *(p for p in considered if p is not chosen))
            base = chosen.algorithm
            if algorithm == "auto" and base == "spire":
                mask = batch.mask  # its lists are chosen over all shards: Compass in front would only cost recall
        asked, others = self._asked(base, batch, mask, n_threads, owner_cpu and algorithm == "auto")
        routed = mask is not batch.mask
        name = ("compass" if base == "cotra" else f"compass+{base}") if routed else base
        return Plan(name, mask, base == "spire", asked, others, predictions=predictions)

    def homes(self, batch: Batch) -> npt.NDArray[np.int64]:
        """Finds the home of each query: of the shards with an owner, the one that has most of the query's neighbourhood.

        If shards were missing at `connect`, the home is the shard of the nearest list in the coarse tables.
        The calibration is for all tables together.

        Raises:
            InvalidInputError: the shards are not one graph, or the batch has a mask.
            TransportError: no shard has an owner.
        """
        if not self._one_graph or batch.mask is not None:
            raise InvalidInputError("home: takes shards of one graph, and no mask of shards")
        there = sorted(self._every)
        if not there:
            raise TransportError("home: no shard has an owner")
        tables = [table for at in there if (table := self._connections[at].coarse) is not None]
        if self.router is None and len(tables) < len(there):
            raise InvalidInputError("home: owners have no coarse tables of a collection: cotra build makes them")
        if self.router is None:
            router = Router(tables, None, self._connections[there[0]].shard.metric)
            return np.array(there)[router.nearest(batch.queries)]
        shares = self.router.shares(batch.queries)[:, [connection.number or 0 for connection in self._connections]]
        shares[:, [at for at in range(len(self._connections)) if at not in self._every]] = -1.0
        homes: npt.NDArray[np.int64] = shares.argmax(axis=1)
        return homes

    def _selection(self, batch: Batch, target_recall: float, *, required: bool) -> npt.NDArray[np.bool_] | None:
        """Returns the shards that Compass takes for each query. It is the batch's own mask if Compass would take almost all."""
        away = [
            str(at)
            for at, connection in enumerate(self._connections)
            if connection.transport == LOST and connection.coarse is None
        ]
        if self.router is None and away:
            raise TransportError(
                f"compass: takes the tables of all shards, and had none of shard {', '.join(away)} yet, which has no owner"
            )
        if self.router is None:
            raise InvalidInputError(
                "compass: these shards are not the whole of a collection with coarse tables: cotra build makes them"
            )
        numbers = [connection.number or 0 for connection in self._connections]
        among = None
        open_to = _may_answer(batch)
        if open_to is not None:
            among = np.empty_like(open_to)
            among[:, numbers] = open_to
        if batch.filters is not None:  # where the rows are that may be returned, Compass does not know
            may = _may_answer(batch)
            return may if required else batch.mask
        mask = self.router.select(batch.queries, target_recall, among)[:, numbers]
        most = mask.size if batch.mask is None else batch.mask.sum()
        return mask if required or mask.sum() < _FULL * most else batch.mask

    def _calibrated_for(self, batch: Batch) -> bool:
        """Whether Compass was measured for such a batch: without filters, and for this k."""
        calibration = None if self.router is None else self.router.calibration
        return calibration is not None and batch.k <= calibration.k and batch.filters is None

    def _no_lists(self, batch: Batch) -> str:
        """Returns why inverted lists cannot be searched, or "" if they can."""
        if batch.most is not None:
            return "max_expansions is a bound of walks"
        for connection in (self._connections[at] for at in self._every):
            if connection.transport not in ONE_SIDED:
                return f"{connection} cannot be read"
            if connection.lists is None:
                return f"{connection} has no inverted lists (cotra build --ivf)"
        return ""

    def _walk(self, batch: Batch) -> Needs:
        record = float(np.mean([connection.shard.record_bytes for connection in self._connections]))
        known = self.experience.of("walk", batch.k, batch.ef, batch.beam)
        return known or guess_walk(batch.k, batch.ef, batch.beam, record).shared_by(self._n_walked)

    def _over_rpc(self, batch: Batch, walk: Needs) -> Needs:
        known = self.experience.of("asked", batch.k, batch.ef, batch.beam)
        return known or over_rpc(walk.shared_by(1 / self._n_walked), self._dim, batch.k)

    def _lists(self, batch: Batch) -> Needs:
        """Returns what a query needs of all shards together. It reads as many lists for however many shards it is."""
        known = self.experience.of("lists", batch.k, batch.ef, 0)
        if known is not None:
            return known
        infos = [connection.lists.info for connection in self._connections if connection.lists is not None]
        return guess_lists(
            batch.k,
            batch.ef,
            sum(info.n_lists for info in infos),
            sum(info.list_bytes for info in infos),
            sum(info.entries for info in infos),
            float(np.mean([connection.shard.record_bytes for connection in self._connections])),
        )

    def _shares(self, mask: npt.NDArray[np.bool_] | None) -> npt.NDArray[np.float64]:
        return np.ones(len(self._connections)) if mask is None or not len(mask) else mask.mean(axis=0)

    def _predictions(
        self,
        batch: Batch,
        mask: npt.NDArray[np.bool_] | None,
        lists_mask: npt.NDArray[np.bool_] | None,
        n_threads: int,
        owner_cpu: bool,
        *,
        mixed: bool,
    ) -> list[Prediction]:
        n, shares, walk = len(batch.queries), self._shares(mask), self._walk(batch)
        links = [connection.link for connection in self._connections]
        readable = any(connection.transport in ONE_SIDED for connection in self._connections)
        others, by_push = map(sorted, self._asked("cotra", batch, mask, n_threads, mixed))
        read = sorted(self._every.difference(others, by_push))
        rpc = self._over_rpc(batch, walk)
        found = []
        walked, parts = [], []
        if read:
            walked.append(predict_read("cotra", walk, [links[at] for at in read], shares[read].tolist(), n, n_threads))
        if by_push:
            told = pushed(walk, self._dim)
            walked.append(predict_pushed("cotra", told, [links[at] for at in by_push], shares[by_push].tolist(), n))
        if walked:
            parts.append(_in_turn(walked))
        if others:
            parts.append(predict_asked("cotra", rpc, [links[at] for at in others], shares[others].tolist(), n))
        found.append(_together(parts))
        every = sorted(self._every)
        links, shares = [links[at] for at in every], shares[every]
        gathered = predict_asked("scatter-gather", rpc, links, shares.tolist(), n)
        there = [self._connections[at] for at in every]
        refusing = [str(connection) for connection in there if connection.capabilities.transports.get("rpc")]
        if refusing:
            gathered = forbidden(gathered, f"{refusing[0]} does not offer rpc")
        elif not owner_cpu and readable:
            gathered = forbidden(gathered, "the owners' CPU is not to be used")
        found.append(gathered)
        if not (why := self._no_lists(batch)):
            whole, parts_of = self._lists(batch), self._shares(lists_mask)[every]
            asked = max(float(parts_of.sum()), 1e-9)
            each = Needs(whole.reads / asked, whole.rounds, whole.bytes / asked, whole.cpu_s / asked)
            found.append(predict_read("spire", each, links, parts_of.tolist(), n, n_threads))
        elif any(connection.lists is not None for connection in self._connections):
            found.append(Prediction("spire", float("inf"), 0, 2, 0, 0, 0, allowed=False, why=why))
        return found

    def _asked(
        self, base: str, batch: Batch, mask: npt.NDArray[np.bool_] | None, n_threads: int, mixed: bool
    ) -> tuple[frozenset[int], frozenset[int]]:
        """Returns the shards that are asked over RPC, and the shards of one graph whose owners expand nodes.

        If `mixed` is set, the first include shards that can be read and that are quicker to ask.
        """
        every = self._every
        if base == "scatter-gather":
            return every, frozenset()
        if not mixed or base != "cotra":
            return self._closed, self._pushed
        walk, shares, n = self._walk(batch), self._shares(mask), len(batch.queries)
        one_walk = self._n_walked > 1
        needs = pushed(walk, self._dim) if one_walk else self._over_rpc(batch, walk)
        slow = set()
        for at in every - self._closed - self._pushed:
            share, link = [float(shares[at])], [self._connections[at].link]
            offered = not self._connections[at].capabilities.transports.get("rpc")
            read = predict_read("", walk, link, share, n, n_threads)
            other = predict_pushed("", needs, link, share, n) if one_walk else predict_asked("", needs, link, share, n)
            if offered and other.seconds < read.seconds:
                slow.add(at)
        if one_walk:
            return self._closed, self._pushed | slow
        # To ask all of them is "scatter-gather".
        return (self._closed if slow | self._closed == every else self._closed | slow), self._pushed


def _may_answer(batch: Batch) -> npt.NDArray[np.bool_] | None:
    """Returns which shards each query is for, bool[n_queries, n_shards], without shards whose filter lets no row through.

    None stands for all shards.
    """
    if batch.filters is None:
        return batch.mask
    some = np.array([bitmap is None or any(bitmap) for bitmap in batch.filters])
    return np.tile(some, (len(batch.queries), 1)) if batch.mask is None else batch.mask & some


def _in_turn(parts: Sequence[Prediction]) -> Prediction:
    """Predicts a walk over several kinds of shards. Each of its rounds waits for the READs and then for the messages."""
    return replace(_together(parts), seconds=sum(part.seconds for part in parts))


def _together(parts: Sequence[Prediction]) -> Prediction:
    """Predicts parts of a search that run at the same time."""
    return Prediction(
        parts[0].algorithm,
        max(part.seconds for part in parts),
        sum(part.reads for part in parts),
        max(part.rounds for part in parts),
        sum(part.bytes for part in parts),
        sum(part.owner_cpu_s for part in parts),
        sum(part.shards for part in parts),
    )


def walked_of(connections: Sequence[Connection]) -> frozenset[int]:
    """Returns the positions of the shards that one walk goes through: they are of one graph, and are read or pushed to."""
    there = [
        connection for connection in connections if connection.transport in ONE_SIDED or connection.view is not None
    ]
    graphs = {connection.shard.graph_id for connection in there}
    if len(graphs) != 1 or graphs == {0}:
        return frozenset()
    return frozenset(connection.index for connection in there)


def router_of(connections: Sequence[Connection]) -> Router | None:
    """Returns Compass over these shards, numbered as in their collection; None if they are not a whole collection."""
    by_number = {connection.number: connection for connection in connections}
    tables = [by_number[at].coarse for at in range(len(connections)) if at in by_number]
    known = [table for table in tables if table is not None]
    told = {connection.calibration for connection in connections}
    if len(known) != len(connections) or len(connections) < 2 or len(told) != 1:
        return None
    try:
        return Router(known, told.pop(), connections[0].shard.metric)
    except FormatError as error:
        log.info("Compass is off: %s", error)
        return None
