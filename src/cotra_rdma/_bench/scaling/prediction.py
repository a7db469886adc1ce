"""Predicts the throughput and latency of many machines from what a query was measured to need.

This is a model, not a measurement.
Every machine owns a shard and answers an equal share of the queries.
Its throughput is that of the resource that runs out first: cores, the NIC's messages, or the link's bytes.
`docs/scaling.md` names each assumption, and says how far the model is off where it can be checked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cotra_rdma._build.graph_plan import MAX_NODES
from cotra_rdma._native.channel import FabricModel
from cotra_rdma.errors import InvalidInputError

MACHINES = (1, 2, 4, 8, 16, 32, 64)
VECTORS = (10**8, 10**9, 10**10)
ONE_GRAPH, ROUTED, SCATTER_GATHER = "one graph", "one graph, routed", "scatter-gather"
SYSTEMS = (ROUTED, ONE_GRAPH, SCATTER_GATHER)

# The bytes around a message's payload:
# Ethernet with preamble, FCS and gap 38 (IEEE 802.3), IPv4 20 (RFC 791), UDP 8 (RFC 768), BTH 12, ICRC 4,
# and RETH 16 in a READ's request or AETH 4 in its answer.
# Source: InfiniBand Architecture Specification, volume 1, chapter 9, and annex A17, RoCEv2.
# A READ is one packet, with an MTU of 4,096.
_PACKET_BYTES = 38 + 20 + 8
READ_REQUEST_BYTES = _PACKET_BYTES + 12 + 16 + 4
READ_ANSWER_BYTES = _PACKET_BYTES + 12 + 4 + 4
HIT_BYTES = 16  # the bytes of an answer in a message: an id, a distance and their framing


@dataclass(frozen=True, slots=True)
class Fit:
    """The line value = at_one + per_doubling * log2(n), by least squares.

    Attributes:
        at_one: the value at n = 1.
        per_doubling: what a doubling of n adds.
        error: the standard deviation of the residuals, with count - 2 degrees of freedom.
        count: the number of points.
        mean: the mean of the points' log2(n).
        spread: the sum of the squared distances of the points' log2(n) from the mean.
    """

    at_one: float
    per_doubling: float
    error: float
    count: int
    mean: float
    spread: float

    def at(self, n: float, errors: float = 0.0) -> float:
        """Returns the value at n plus so many standard errors of a new point there. It is at least 1."""
        return max(1.0, self.at_one + self.per_doubling * math.log2(n) + errors * self.standard_error(n))

    def standard_error(self, n: float) -> float:
        """Returns the standard error of a new point at n, if the line is true.

        Source: Draper and Smith, Applied Regression Analysis, section 1.4.
        """
        return self.error * math.sqrt(1 + 1 / self.count + (math.log2(n) - self.mean) ** 2 / self.spread)


def fit_log(n: Sequence[float], values: Sequence[float]) -> Fit:
    """Fits the line to values at numbers of vectors.

    Raises:
        InvalidInputError: there are fewer than 3 points, or all are at one n.
    """
    x, y = np.log2(np.asarray(n, np.float64)), np.asarray(values, np.float64)
    spread = float(np.square(x - x.mean()).sum())
    if len(x) < 3 or spread == 0:
        raise InvalidInputError(f"a fit needs at least 3 different numbers of vectors, not {len(set(x))}")
    slope = float(((x - x.mean()) * (y - y.mean())).sum()) / spread
    start = float(y.mean() - slope * x.mean())
    error = math.sqrt(float(np.square(y - start - slope * x).sum()) / (len(x) - 2))
    return Fit(start, slope, error, len(x), float(x.mean()), spread)


@dataclass(frozen=True, slots=True)
class Workload:
    """What a query needs at the recall that is wanted, and the bytes of a vector. All of it was measured.

    Attributes:
        expansions: the records that a walk expands, by the number of vectors.
        rounds: the rounds of READs, by the number of vectors.
        cpu_single_s: the CPU time of a query in one shard, without its expansions.
        cpu_fixed_s: the CPU time of a query in several shards, without its expansions.
        cpu_expansion_s: the CPU time of an expansion whose record is in memory.
        cpu_read_s: the CPU time that posting and completing a READ adds.
        record_bytes: the bytes of a READ.
        links: the places for neighbours in a record.
        vector_bytes: the bytes of an image, for each of its vectors.
        kept_bytes: the bytes of upper layers that each reader keeps of all shards, for each vector of the collection.
        halo_bytes: the bytes of others' records that a home keeps, for each of its own vectors.
        independent: the expansions of a walk in one of several independent shards, over `expansions` of as many
            vectors.
        remote_per_doubling: the share of a routed query's expansions that leave its home, for each doubling of
            machines.
        dim: the dimension of a query.
        k: the answers to a query.
    """

    expansions: Fit
    rounds: Fit
    cpu_single_s: float
    cpu_fixed_s: float
    cpu_expansion_s: float
    cpu_read_s: float
    record_bytes: float
    links: int
    vector_bytes: float
    kept_bytes: float
    halo_bytes: float
    independent: float
    remote_per_doubling: float
    dim: int
    k: int

    def remote_share(self, machines: int, *, routed: bool) -> float:
        """Returns the part of a query's expansions whose record another machine holds, so that they need a READ.

        Args:
            machines: the number of machines, m.
            routed: whether queries are routed to their homes. If not, the part is 1 - 1 / m.
        """
        anywhere = 1 - 1 / machines
        return min(anywhere, self.remote_per_doubling * math.log2(machines)) if routed else anywhere

    def number_bytes(self, vectors: float) -> int:
        """Returns how much a record grows if one graph has more nodes than 4-byte numbers can name.

        They then have 8 bytes.
        """
        return 4 * self.links if vectors > MAX_NODES else 0

    def expanding_s(self, machines: int, expansions: float) -> float:
        """Returns the CPU time of a query that needs no READs."""
        return (self.cpu_fixed_s if machines > 1 else self.cpu_single_s) + expansions * self.cpu_expansion_s


@dataclass(frozen=True, slots=True)
class Machine:
    """One of several equal machines.

    Attributes:
        cores: the cores that search.
        memory_bytes: the memory for a shard and upper layers.
    """

    cores: int = 16
    memory_bytes: float = 512e9


@dataclass(frozen=True, slots=True)
class Prediction:
    """What equal machines do together with one system.

    Attributes:
        system: one of `SYSTEMS`.
        machines: the number of machines.
        vectors: the number of vectors.
        qps: the queries a second of all machines.
        limit: what bounds them: "CPU", "messages" or "bandwidth".
        latency_s: the latency of a query alone: its round trips, its CPU time and its bytes on the link.
        reads: the READs of a query over the fabric.
        memory_bytes: the memory that a machine needs.
        fits: whether a machine has as much.
    """

    system: str
    machines: int
    vectors: float
    qps: float
    limit: str
    latency_s: float
    reads: float
    memory_bytes: float
    fits: bool


def throughput(
    cores: float, cpu_s: float, fabric: FabricModel, messages: float = 0.0, link_bytes: float = 0.0
) -> tuple[float, str]:
    """Computes the queries a second of one machine, and what bounds them.

    Args:
        cores: the cores that search.
        cpu_s: the CPU seconds of a query.
        fabric: the limits of the NIC and the link; 0 for no limit.
        messages: the messages that the NIC sends, answers and serves for each query.
        link_bytes: the bytes for each query, in the direction of the link that carries more.
    """
    limits = {"CPU": cores / cpu_s}
    if messages and fabric.reads_per_s:
        limits["messages"] = fabric.reads_per_s / messages
    if link_bytes and fabric.bytes_per_s:
        limits["bandwidth"] = fabric.bytes_per_s / link_bytes
    limit = min(limits, key=limits.__getitem__)
    return limits[limit], limit


def predict(
    system: str,
    workload: Workload,
    machine: Machine,
    fabric: FabricModel,
    machines: int,
    vectors: float,
    *,
    errors: float = 0.0,
) -> Prediction:
    """Predicts what equal machines do together.

    Args:
        system: one of `SYSTEMS`.
        workload: what a query needs.
        machine: one machine.
        fabric: the NIC and the link of a machine.
        machines: the number of machines.
        vectors: the number of vectors.
        errors: so many standard errors are added to the expansions and rounds of the fits.

    Raises:
        InvalidInputError: the system is unknown, there is no machine, or there are fewer vectors than machines.
    """
    if system not in SYSTEMS or machines < 1 or vectors < machines:
        raise InvalidInputError(
            f"there is no prediction for {system!r} with {machines} machines and {vectors:g} vectors"
        )
    if system == SCATTER_GATHER:
        return _scatter_gather(workload, machine, fabric, machines, vectors, errors)
    expansions = workload.expansions.at(vectors, errors)
    reads = expansions * workload.remote_share(machines, routed=system == ROUTED)
    cpu_s = workload.expanding_s(machines, expansions) + reads * workload.cpu_read_s
    record_bytes = workload.record_bytes + workload.number_bytes(vectors)
    # With equal loads, a machine serves as many READs as it starts. So it has twice the messages,
    # and each direction carries requests and answers.
    link_bytes = reads * (record_bytes + READ_REQUEST_BYTES + READ_ANSWER_BYTES)
    qps, limit = throughput(machine.cores, cpu_s, fabric, 2 * reads, link_bytes)
    latency_s = cpu_s
    if machines > 1:
        latency_s += workload.rounds.at(vectors, errors) * fabric.round_trip_s
        latency_s += reads * (record_bytes + READ_ANSWER_BYTES) / fabric.bytes_per_s if fabric.bytes_per_s else 0.0
    kept = workload.kept_bytes * vectors if machines > 1 else 0.0  # a single machine has them in its image
    halo = workload.halo_bytes if system == ROUTED and machines > 1 else 0.0
    memory = vectors / machines * (workload.vector_bytes + workload.number_bytes(vectors) + halo) + kept
    fits = memory <= machine.memory_bytes
    return Prediction(system, machines, vectors, machines * qps, limit, latency_s, reads, memory, fits)


def _scatter_gather(
    workload: Workload, machine: Machine, fabric: FabricModel, machines: int, vectors: float, errors: float
) -> Prediction:
    """Predicts scatter-gather: every machine walks its own graph for every query.

    Each machine gets one message and sends one back.
    Messages cost no CPU time here.
    """
    own = vectors / machines
    factor = workload.independent if machines > 1 else 1.0
    cpu_s = workload.expanding_s(1, factor * workload.expansions.at(own, errors))
    others = machines - 1
    exchanged = 4 * workload.dim + HIT_BYTES * workload.k + 2 * _PACKET_BYTES
    qps, limit = throughput(machine.cores, machines * cpu_s, fabric, 4 * others, others * exchanged)
    latency_s = cpu_s + (fabric.round_trip_s if others else 0.0)
    memory = own * (workload.vector_bytes + workload.number_bytes(own))
    fits = memory <= machine.memory_bytes
    return Prediction(SCATTER_GATHER, machines, vectors, machines * qps, limit, latency_s, 0.0, memory, fits)


def predict_all(workload: Workload, machine: Machine, fabric: FabricModel) -> list[Prediction]:
    """Predicts all of `VECTORS`, `MACHINES` and `SYSTEMS`."""
    return [
        predict(system, workload, machine, fabric, machines, vectors)
        for vectors in VECTORS
        for machines in MACHINES
        for system in SYSTEMS
    ]


FASTER = "a NIC of 10 times the messages, 4 times the bandwidth"


def faster(fabric: FabricModel) -> FabricModel:
    """Returns the fabric that `FASTER` describes."""
    return replace(fabric, reads_per_s=10 * fabric.reads_per_s, bytes_per_s=4 * fabric.bytes_per_s)


@dataclass(frozen=True, slots=True)
class Variation:
    """A prediction with one assumption changed.

    Attributes:
        what: the assumption.
        prediction: the prediction.
        speedup: its throughput over that of one machine under the same assumptions.
    """

    what: str
    prediction: Prediction
    speedup: float


def variations(
    workload: Workload,
    machine: Machine,
    fabric: FabricModel,
    machines: int = 16,
    vectors: float = 1e9,
    *,
    busiest: float = 1.0,
) -> list[Variation]:
    """Predicts a routed graph with one assumption changed at a time.

    Args:
        workload: what a query needs.
        machine: one machine.
        fabric: the NIC and the link of a machine.
        machines: the number of machines.
        vectors: the number of vectors.
        busiest: the load of the machine that has most, over the mean.
    """
    apart = replace(fabric, reads_per_s=2 * fabric.reads_per_s)
    cases = [
        ("as assumed", ROUTED, workload, machine, fabric, 0.0),
        ("queries not routed home", ONE_GRAPH, workload, machine, fabric, 0.0),
        ("4 times the cores", ROUTED, workload, replace(machine, cores=4 * machine.cores), fabric, 0.0),
        ("a quarter of the cores", ROUTED, workload, replace(machine, cores=max(1, machine.cores // 4)), fabric, 0.0),
        ("a READ takes the CPU 0.2 us more", ROUTED, _dearer(workload), machine, fabric, 0.0),
        ("READs that are served count nothing", ROUTED, workload, machine, apart, 0.0),
        (FASTER, ROUTED, workload, machine, faster(fabric), 0.0),
        ("expansions and rounds 2 standard errors above the fit", ROUTED, workload, machine, fabric, 2.0),
        ("expansions and rounds twice the fit", ROUTED, _doubled(workload), machine, fabric, 0.0),
    ]
    found = []
    for what, system, needs, kind, link, errors in cases:
        several = predict(system, needs, kind, link, machines, vectors, errors=errors)
        one = predict(ONE_GRAPH, needs, kind, link, 1, vectors, errors=errors)
        found.append(Variation(what, several, several.qps / one.qps))
    assumed = found[0]
    skewed = replace(assumed.prediction, qps=assumed.prediction.qps / busiest)
    found.append(
        Variation(f"the busiest home has {busiest:.2f} times the mean load", skewed, assumed.speedup / busiest)
    )
    return found


def _dearer(workload: Workload) -> Workload:
    return replace(workload, cpu_read_s=workload.cpu_read_s + 2e-7)


def _doubled(workload: Workload) -> Workload:
    twice = [
        replace(fit, at_one=2 * fit.at_one, per_doubling=2 * fit.per_doubling, error=2 * fit.error)
        for fit in (workload.expansions, workload.rounds)
    ]
    return replace(workload, expansions=twice[0], rounds=twice[1])


@dataclass(frozen=True, slots=True)
class Published:
    """A figure that others published: the throughput of some machines over that of `than`.

    Attributes:
        system: the name of the system.
        machines: the number of machines.
        than: what the throughput is compared to.
        vectors: the number of vectors; None if it is not told.
        low: the smallest ratio over the data sets.
        high: the largest ratio over the data sets.
        source: the paper.
    """

    system: str
    machines: int
    than: str
    vectors: float | None
    low: float
    high: float
    source: str


_COTRA, _BATANN = "arXiv 2507.06653, abstract", "arXiv 2512.09331, abstract"
PUBLISHED = (
    Published("CoTra", 16, "one machine", None, 9.8, 13.4, _COTRA),
    Published("CoTra", 16, "its best baseline", None, 2.12, 3.58, _COTRA),
    Published("BatANN", 10, "scatter-gather", 1e8, 6.21, 6.49, _BATANN),
    Published("BatANN", 10, "scatter-gather", 1e9, 2.5, 5.1, _BATANN),
)
"""What the abstracts say, at recall@10 0.95 (BatANN: recall 0.95), each on its own machines."""
