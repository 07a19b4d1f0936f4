"""The collector of the metrics, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, GCCollector, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from ..replica import Replica
from .histogram import Histogram
from .metric_sources import Reading, read_sources
from .metric_table import GAUGE, HISTOGRAM, METRICS, MetricDeclaration

_process = CollectorRegistry()
ProcessCollector(registry=_process)
GCCollector(registry=_process)


def export_metrics(replica: Replica) -> tuple[bytes, str]:
    """Return the metrics of a replica and of its process in Prometheus's text format, and the content type.

    The format does not depend on an Accept header: the library raises an exception for some malformed ones.
    """
    registry = CollectorRegistry()
    registry.register(ReplicaCollector(replica))
    return generate_latest(registry) + generate_latest(_process), CONTENT_TYPE_LATEST


class ReplicaCollector(Collector):
    """Collects the metrics of one replica with its open endpoints."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica

    def describe(self) -> Iterable[Metric]:
        """Nothing: otherwise the registry would read all metrics when the collector is registered."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Read all metrics."""
        sources = read_sources(self._replica)
        for declared in METRICS.values():
            if samples := _samples(declared.read(sources)):
                yield _family(declared, samples)


def _samples(reading: Reading) -> dict[tuple[str, ...], float | Histogram]:
    """The values by those of the labels."""
    if reading is None:
        return {}
    if isinstance(reading, Mapping):
        return {(key,) if isinstance(key, str) else key: value for key, value in reading.items()}
    return {(): reading}


def _family(declared: MetricDeclaration, samples: Mapping[tuple[str, ...], float | Histogram]) -> Metric:
    if declared.kind == HISTOGRAM:
        family = HistogramMetricFamily(declared.name, declared.text, labels=declared.labels)
        for labels, found in samples.items():
            assert isinstance(found, Histogram)
            bounds = [*map(str, found.bounds), "+Inf"]
            family.add_metric(labels, list(zip(bounds, accumulate(found.counts), strict=True)), found.sum)
        return family
    kind = GaugeMetricFamily if declared.kind == GAUGE else CounterMetricFamily
    made = kind(declared.name, declared.text, labels=declared.labels)
    for labels, number in samples.items():
        assert not isinstance(number, Histogram)
        made.add_metric(labels, float(number))
    return made
