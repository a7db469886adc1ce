"""What a collection over many machines would do: throughput and latency from what a query was measured to need.

A model, not a measurement. Every machine owns a shard and answers an equal share of the queries; its throughput is that of the
resource that runs out first: cores, the NIC's messages, the link's bytes. `docs/scaling.md` names each assumption and says how
far the model is off where it can be checked.
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

# Bytes around a message's payload. Ethernet with preamble, FCS and gap 38 (IEEE 802.3), IPv4 20 (RFC 791), UDP 8 (RFC 768);
# BTH 12, ICRC 4, and RETH 16 of a READ's request or AETH 4 of its answer (InfiniBand Architecture Specification, volume 1,
# chapter 9, and annex A17, RoCEv2). One packet a READ: an MTU of 4,096.
_PACKET_BYTES = 38 + 20 + 8
READ_REQUEST_BYTES = _PACKET_BYTES + 12 + 16 + 4
READ_ANSWER_BYTES = _PACKET_BYTES + 12 + 4 + 4
HIT_BYTES = 16  # of an answer by message: an id and a distance, and what tells them apart


@dataclass(frozen=True, slots=True)
class Fit:
    """value = at_one + per_doubling * log2(n), by least squares over `count` points.

    error: standard deviation of what the line leaves, with count - 2 degrees of freedom. mean, spread: of the points' log2(n),
    the latter as the sum of squares: how sure the line is far away from them.
    """

    at_one: float
    per_doubling: float
    error: float
    count: int
    mean: float
    spread: float

    def at(self, n: float, errors: float = 0.0) -> float:
        """The value at n, plus so many standard errors of a new point there; never below 1."""
        return max(1.0, self.at_one + self.per_doubling * math.log2(n) + errors * self.standard_error(n))

    def standard_error(self, n: float) -> float:
        """Of a new point at n, were the line true (Draper and Smith, Applied Regression Analysis, section 1.4)."""
        return self.error * math.sqrt(1 + 1 / self.count + (math.log2(n) - self.mean) ** 2 / self.spread)


def fit_log(n: Sequence[float], values: Sequence[float]) -> Fit:
    """The line through values at numbers of vectors. Raises `InvalidInputError` for fewer than 3 points, or all at one n."""
    x, y = np.log2(np.asarray(n, np.float64)), np.asarray(values, np.float64)
    spread = float(np.square(x - x.mean()).sum())
    if len(x) < 3 or spread == 0:
        raise InvalidInputError(f"a line with an error needs 3 numbers of vectors, not {len(set(x))}")
    slope = float(((x - x.mean()) * (y - y.mean())).sum()) / spread
    start = float(y.mean() - slope * x.mean())
    error = math.sqrt(float(np.square(y - start - slope * x).sum()) / (len(x) - 2))
    return Fit(start, slope, error, len(x), float(x.mean()), spread)


@dataclass(frozen=True, slots=True)
class Workload:
    """What a query needs at the recall wanted, and a vector's bytes; all measured.

    Attributes:
        expansions: records that a walk looks at, by number of vectors; rounds: of READs, likewise.
        cpu_single_s, cpu_fixed_s: CPU time of a query beside its expansions, in one shard and in several.
        cpu_expansion_s: of one expansion, its record at hand. cpu_read_s: what posting and completing a READ adds.
        record_bytes: of a READ. links: places for neighbours in it.
        vector_bytes: of an image, for each of its vectors. kept_bytes: of the upper layers, which every reader keeps of all
            shards, for each vector of the collection. halo_bytes: of records of others that a home keeps, for each of its own.
        independent: expansions of a walk of one of several independent shards, over `expansions` of as many vectors.
        remote_per_doubling: share of a routed query's expansions that leave its home machine, for each doubling of the machines.
        dim, k: of a query and its answer.
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
        """The part of a query's expansions that are another machine's: READs. Not routed: of m machines, 1 - 1 / m."""
        anywhere = 1 - 1 / machines
        return min(anywhere, self.remote_per_doubling * math.log2(machines)) if routed else anywhere

    def number_bytes(self, vectors: float) -> int:
        """What a record grows by where one graph has more nodes than the format's numbers: 8 bytes each in place of 4."""
        return 4 * self.links if vectors > MAX_NODES else 0

    def expanding_s(self, machines: int, expansions: float) -> float:
        """CPU time of a query that is answered without READs."""
        return (self.cpu_fixed_s if machines > 1 else self.cpu_single_s) + expansions * self.cpu_expansion_s


@dataclass(frozen=True, slots=True)
class Machine:
    """One of equal machines: cores that search, and bytes of memory for shard and upper layers."""

    cores: int = 16
    memory_bytes: float = 512e9


@dataclass(frozen=True, slots=True)
class Prediction:
    """Of one system over machines of one kind, together.

    Attributes:
        qps: queries a second of all machines; limit: what bounds it: "CPU", "messages", "bandwidth".
        latency_s: of a query alone: rounds, their round trips, CPU time, bytes on the link.
        reads: over the fabric, a query. memory_bytes: of a machine; fits: whether it has as many.
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
    """Queries a second of one machine, and what bounds them.

    Args:
        cpu_s: CPU seconds of a query. messages: that its NIC handles for each query, sent, answered and served.
        link_bytes: for each query, in the direction of the link that carries more.
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
    """What `machines` of a kind do together with so many vectors; `errors`: with so many standard errors more of expansions and
    rounds than the fits say.

    Raises `InvalidInputError` for a system that is none of `SYSTEMS`, no machine, or fewer vectors than machines.
    """
    if system not in SYSTEMS or machines < 1 or vectors < machines:
        raise InvalidInputError(f"no prediction for {system!r} with {machines} machines and {vectors:g} vectors")
    if system == SCATTER_GATHER:
        return _scatter_gather(workload, machine, fabric, machines, vectors, errors)
    expansions = workload.expansions.at(vectors, errors)
    reads = expansions * workload.remote_share(machines, routed=system == ROUTED)
    cpu_s = workload.expanding_s(machines, expansions) + reads * workload.cpu_read_s
    record_bytes = workload.record_bytes + workload.number_bytes(vectors)
    # With equal loads a machine serves as many READs as it starts: twice the messages; each way requests and answers.
    link_bytes = reads * (record_bytes + READ_REQUEST_BYTES + READ_ANSWER_BYTES)
    qps, limit = throughput(machine.cores, cpu_s, fabric, 2 * reads, link_bytes)
    latency_s = cpu_s
    if machines > 1:
        latency_s += workload.rounds.at(vectors, errors) * fabric.round_trip_s
        latency_s += reads * (record_bytes + READ_ANSWER_BYTES) / fabric.bytes_per_s if fabric.bytes_per_s else 0.0
    kept = workload.kept_bytes * vectors if machines > 1 else 0.0  # one machine has them in its image
    halo = workload.halo_bytes if system == ROUTED and machines > 1 else 0.0
    memory = vectors / machines * (workload.vector_bytes + workload.number_bytes(vectors) + halo) + kept
    fits = memory <= machine.memory_bytes
    return Prediction(system, machines, vectors, machines * qps, limit, latency_s, reads, memory, fits)


def _scatter_gather(
    workload: Workload, machine: Machine, fabric: FabricModel, machines: int, vectors: float, errors: float
) -> Prediction:
    """Every machine walks its own graph for every query; one message there and one back. A message costs no CPU time here."""
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
    """All of `VECTORS`, `MACHINES` and `SYSTEMS`."""
    return [
        predict(system, workload, machine, fabric, machines, vectors)
        for vectors in VECTORS
        for machines in MACHINES
        for system in SYSTEMS
    ]


FASTER = "a NIC of 10 times the messages, 4 times the bandwidth"


def faster(fabric: FabricModel) -> FabricModel:
    """See `FASTER`."""
    return replace(fabric, reads_per_s=10 * fabric.reads_per_s, bytes_per_s=4 * fabric.bytes_per_s)


@dataclass(frozen=True, slots=True)
class Variation:
    """One assumption changed: the prediction, and its throughput over that of one machine under the same assumptions."""

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
    """What the prediction for a routed graph becomes where one assumption is another; `busiest`: the load of the machine that has
    most, over the mean."""
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
    """A figure of others: throughput of so many machines over that of `than`, from `low` to `high` over their data sets."""

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
"""At 0.95 recall@10 (BatANN: 0.95 recall), each on its own machines: what the abstracts say, no more."""
