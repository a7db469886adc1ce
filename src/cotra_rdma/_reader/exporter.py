"""Exports what clusters have counted to Prometheus."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from cotra_rdma._core.prometheus import add_latencies, prometheus
from cotra_rdma._reader.cluster import Cluster
from cotra_rdma._reader.metrics import ClusterMetrics, OwnerMetrics

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

_SUMS = {
    "reads": ("reads", "Records that were READ."),
    "rounds": ("rounds", "Rounds of READs, of the shard with most, summed over the queries."),
    "read_bytes": ("read_bytes", "Bytes that were READ, and of messages of searches and pushes."),
    "expansions": ("expansions", "Records that were expanded."),
    "pushed": ("pushed_nodes", "Nodes that their shards' owners expanded."),
    "own": ("own_records", "Records of this process's own shards, used in place."),
    "cached_records": ("cached_records", "Records that a cache had, in place of as many READs."),
    "cache_hits": ("upper_layer_nodes", "Nodes of upper layers that were looked at without a READ."),
    "incomplete": ("incomplete_walks", "Walks that max_expansions ended."),
    "latency_ns": ("query_seconds", "The queries' latencies, summed."),
}
"""For each field of `SearchResult.stats` the name of its metric, and what it counts."""
_OWNER = ("cluster", "shard", "address")


def register_metrics(clusters: Cluster | Mapping[str, Cluster], registry: CollectorRegistry | None = None) -> Any:
    """Exports what clusters count to Prometheus: docs/howto/metrics.md lists it.

    A cluster is held weakly. One that nobody holds any more is exported no more.

    Args:
        clusters: a cluster; or several by the names that they have in the label `cluster`.
        registry: of `prometheus_client`; None: its default. A registry takes one call of this function.

    Returns:
        The collector, for `registry.unregister`.

    Raises:
        InvalidInputError: the package `prometheus-client` is missing.
    """
    client = prometheus()
    named = clusters if isinstance(clusters, Mapping) else {"": clusters}
    held = {name: weakref.ref(cluster) for name, cluster in named.items()}

    def alive() -> dict[str, Cluster]:
        return {name: cluster for name, ref in held.items() if (cluster := ref()) is not None}

    collector = ReaderCollector(alive)
    (client.REGISTRY if registry is None else registry).register(collector)
    return collector


class ReaderCollector:
    """A collector of `prometheus_client`. It asks the clusters when it is asked."""

    def __init__(self, clusters: Callable[[], Mapping[str, Cluster]]) -> None:
        """`clusters`: gives those there are, by their names."""
        self._clusters = clusters

    def collect(self) -> Iterator[Metric]:
        """As prometheus_client's collectors."""
        families = _Families()
        for name, cluster in self._clusters().items():
            families.add(name, cluster.metrics())
        yield from families


class _Families:
    """The metrics of readers."""

    def __init__(self) -> None:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        def counter(name: str, text: str, *labels: str) -> Any:
            return CounterMetricFamily(f"cotra_reader_{name}", text, labels=labels)

        def gauge(name: str, text: str, *labels: str) -> Any:
            return GaugeMetricFamily(f"cotra_reader_{name}", text, labels=labels)

        self._searches = counter("searches", "Batches, by how they ended.", "cluster", "outcome")
        self._queries = counter("queries", "Queries, by how their batches ended.", "cluster", "outcome")
        self._search_seconds = HistogramMetricFamily(
            "cotra_reader_search_seconds", "From a batch's arrival to its answer.", labels=("cluster",)
        )
        self._sums = {field: counter(name, text, "cluster") for field, (name, text) in _SUMS.items()}
        self._followed = counter("followed", "How often the cluster went on to other images.", "cluster")
        self._lost = gauge("lost_shards", "Shards without an owner.", "cluster")
        self._info = gauge(
            "owner_info", "1, with how it stands.", *_OWNER, "state", "path", "lineage", "generation", "checksum"
        )
        self._away = gauge("owner_away", "1 as long as the owner is away.", *_OWNER)
        self._since = gauge("owner_since_seconds", "Unix time since when it is connected to, or away.", *_OWNER)
        self._counts = {
            name: counter(f"owner_{name}", text, *_OWNER)
            for name, text in (
                ("connections", "RPC connections that were opened to it."),
                ("resent", "Calls that it refused unread, and that were sent again."),
                ("replaced", "How often it failed and another owner took its place."),
            )
        }
        self._renewals = counter("lease_renewals", "Renewals of the lease.", *_OWNER, "outcome")
        self._failures = counter("owner_failures", "How often a search could not go on over it.", *_OWNER, "error")
        self._calls = counter(
            "calls", "Calls over RPC, by message type and how they ended.", *_OWNER, "type", "outcome"
        )
        self._call_seconds = HistogramMetricFamily(
            "cotra_reader_call_seconds", "From a call to its answer.", labels=(*_OWNER, "type")
        )

    def add(self, name: str, told: ClusterMetrics) -> None:
        """Adds a cluster."""
        for family, counts in ((self._searches, told.searches), (self._queries, told.queries)):
            for outcome, count in counts.items():
                family.add_metric([name, outcome], count)
        add_latencies(self._search_seconds, [name], told.search_latencies)
        for field, family in self._sums.items():
            family.add_metric([name], told.stats[field] / 1e9 if field == "latency_ns" else told.stats[field])
        self._followed.add_metric([name], told.followed)
        self._lost.add_metric([name], len(told.lost))
        for owner in told.owners:
            self._add_owner([name, str(owner.shard), owner.address], owner)

    def _add_owner(self, at: list[str], owner: OwnerMetrics) -> None:
        image = owner.image
        which = ("", "", "") if image is None else (f"{image[0]:016x}", str(image[1]), f"{image[2]:016x}")
        self._info.add_metric([*at, owner.state, owner.path, *which], 1)
        self._away.add_metric(at, owner.state == "away")
        self._since.add_metric(at, owner.since)
        for name, family in self._counts.items():
            family.add_metric(at, getattr(owner, name))
        self._renewals.add_metric([*at, "ok"], owner.renewed)
        self._renewals.add_metric([*at, "failed"], owner.not_renewed)
        for error, count in owner.failures.items():
            self._failures.add_metric([*at, error], count)
        for kind, by_outcome in owner.calls.items():
            for outcome, count in by_outcome.items():
                self._calls.add_metric([*at, kind, outcome], count)
        for kind, latencies in owner.call_latencies.items():
            add_latencies(self._call_seconds, [*at, kind], latencies)

    def __iter__(self) -> Iterator[Metric]:
        for family in vars(self).values():
            yield from family.values() if isinstance(family, dict) else (family,)
