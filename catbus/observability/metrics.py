"""The collector of the metrics, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, GCCollector, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from ..replica import Replica
from .histogram import Histogram
from .metric_sources import Reading, read_sources
from .metric_table import GAUGE, HISTOGRAM, METRICS, MetricDeclaration


class Metrics(Collector):
    """The metrics of a replica with its endpoints, and of its process."""

    def __init__(self, replica: Replica, endpoints: Mapping[str, Any]) -> None:
        self._replica = replica
        self._endpoints = endpoints
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)
        GCCollector(registry=self._registry)

    def scrape(self) -> tuple[bytes, str]:
        """The metrics in Prometheus's text format, and its content type.

        The Accept header is not passed on: the library raises an exception for an odd one, and every scraper reads
        this format.
        """
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def describe(self) -> Iterable[Metric]:
        """Nothing: otherwise the registry would read all metrics when the collector is registered."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Read all metrics."""
        sources = read_sources(self._replica, self._endpoints)
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
