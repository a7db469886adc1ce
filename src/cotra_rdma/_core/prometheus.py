"""What the exporters of owners and of readers share. `prometheus_client` is imported when it is first needed."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

from cotra_rdma._core.request_counts import LATENCY_S, Latencies
from cotra_rdma.errors import InvalidInputError

if TYPE_CHECKING:
    from prometheus_client.core import HistogramMetricFamily


def prometheus() -> ModuleType:
    """The module `prometheus_client`. Raises `InvalidInputError` if the package is missing."""
    try:
        import prometheus_client
    except ImportError as error:
        raise InvalidInputError(
            "metrics need the package prometheus-client: pip install 'cotra-rdma[metrics]'"
        ) from error
    return prometheus_client


def add_latencies(family: HistogramMetricFamily, labels: Sequence[str], latencies: Latencies) -> None:
    """Adds a histogram."""
    total, buckets = 0, []
    for bound, count in zip((*map(str, LATENCY_S), "+Inf"), latencies.counts, strict=True):
        total += count
        buckets.append((bound, total))
    family.add_metric(labels, buckets, latencies.total_s)
