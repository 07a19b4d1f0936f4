"""The metrics of several workers in one text."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from catbus.processes.merged_metrics import merge_metrics


def metrics_of(value: float, *, more: bool = False) -> bytes:
    registry = CollectorRegistry()
    Gauge("catbus_worker_up", "Up.", registry=registry).set(1)
    counter = Counter("catbus_things", "Things, with a { and a \\ in them.", ["kind"], registry=registry)
    for kind in ("plain", 'with "quotes", {braces} and a\nline'):
        counter.labels(kind).inc(value)
    Histogram("catbus_seconds", "Seconds.", registry=registry, buckets=(1, 2)).observe(value)
    if more:
        Gauge("catbus_more", "More.", registry=registry).set(value)
    return generate_latest(registry)


def samples(text: bytes) -> dict[tuple[str, ...], float]:
    families = list(text_string_to_metric_families(text.decode()))
    assert len({family.name for family in families}) == len(families)
    return {(sample.name, *sample.labels.values()): sample.value for family in families for sample in family.samples}


def test_each_sample_has_the_label_of_its_worker() -> None:
    parts = {0: metrics_of(1), 1: metrics_of(2, more=True)}
    expected = {
        (name, str(worker), *labels): value
        for worker, text in parts.items()
        for (name, *labels), value in samples(text).items()
    }
    assert samples(merge_metrics(parts)) == expected


def test_worker_that_does_not_answer_is_shown() -> None:
    for parts in ({0: None, 1: metrics_of(1)}, {1: metrics_of(1), 2: None}, {0: None}):
        merged = samples(merge_metrics(parts))
        for worker, text in parts.items():
            assert merged["catbus_worker_up", str(worker)] == (text is not None)


def test_headers_of_a_metric_come_once() -> None:
    lines = merge_metrics({0: None, 1: metrics_of(1), 2: metrics_of(2)}).decode().splitlines()
    headers = [line for line in lines if line.startswith("#")]
    assert len(headers) == len(set(headers))
    # A header after the first sample of its metric would be an error.
    assert lines[0].startswith("# HELP catbus_worker_up")
