"""catbus.observability: the metrics that are served, their table in `docs/metrics.md`, and their values."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families

import catbus
import catbus.auth.grants
import catbus.auth.tokens
from catbus.config import DatabaseSettings, RetentionSettings, WebTransportSettings
from catbus.observability.histogram import Histogram
from catbus.observability.metric_table import METRICS, SECTIONS, MetricDeclaration
from tests.brokers import CONFIG, SECRET, TOKEN
from tests.endpoints.raw_peer import Peer
from tests.postgres.consumers import create
from tests.postgres.sql import open_sql
from tests.test_both_transports import discover

DOCUMENT = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text(encoding="utf-8")

Found = dict[str, dict[tuple[str, ...], float]]
"""Samples by name, and by the values of their labels."""


async def scrape(address: str) -> tuple[Found, dict[str, tuple[str, tuple[str, ...]]]]:
    """The samples, and the type and labels of each family."""
    host, _, port = address.rpartition(":")
    async with await trio.open_tcp_stream(host, int(port)) as stream:
        peer = Peer(stream)
        # An Accept header that cannot be parsed is ignored.
        headers = b"Host: x\r\nAccept: application/openmetrics-text;version=x\r\nConnection: close\r\n\r\n"
        await peer.send(b"GET /metrics HTTP/1.1\r\n" + headers)
        answer = await peer.response()
    assert answer.status == 200
    samples: Found = {}
    families: dict[str, tuple[str, tuple[str, ...]]] = {}
    for family in text_string_to_metric_families(answer.body.decode()):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels: tuple[str, ...] = ()
        for sample in family.samples:
            labels = tuple(name for name in sample.labels if name != "le")
            samples.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
        families[name] = (family.type, labels)
    return samples, families


@asynccontextmanager
async def serving(state: Path, url: str = "memory") -> AsyncIterator[tuple[catbus.Broker, str, str, str]]:
    """A broker with both endpoints: its address, and what a client needs for WebTransport."""
    config = msgspec.structs.replace(
        CONFIG,
        state=str(state),
        webtransport=WebTransportSettings(bind=("127.0.0.1:0",)),
        database=DatabaseSettings(url=url),
        retention=RetentionSettings(),
    )
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            broker = await nursery.start(catbus.serve, config)
            await broker.replica.log.wait_open()
            address = dict(broker.addresses)["websocket"]
            found = await discover(address)
            yield broker, address, found["webtransport"], found["certificate"]
            broker.stop()


def table(declarations: Sequence[MetricDeclaration]) -> str:
    """The table of a section in the document."""
    rows = []
    for declared in declarations:
        labels = ", ".join(f"`{label}`" for label in declared.labels)
        rows.append(f"| `{declared.name}` | {declared.kind} | {labels} | {declared.text} |")
    return "\n".join(["| Name | Type | Labels | Description |", "|---|---|---|---|", *rows, ""])


@pytest.mark.parametrize("title", SECTIONS)
def test_document_has_the_table_of_each_section(title: str) -> None:
    section = (DOCUMENT + "\n## ").partition(f"\n## {title}\n\n")[2].partition("\n## ")[0]
    assert section.strip() == table(SECTIONS[title]).strip()


def test_document_names_existing_metrics_and_no_others() -> None:
    named = {name for name in re.findall(r"`(catbus_\w+)", DOCUMENT) if not name.startswith("catbus_build")}
    assert named == METRICS.keys() - {"catbus_build_info"}


def test_names_follow_the_conventions_of_prometheus() -> None:
    """https://prometheus.io/docs/practices/naming/"""
    assert sum(map(len, SECTIONS.values())) == len(METRICS)
    for name, declared in METRICS.items():
        assert re.fullmatch(r"catbus(_[a-z]+)+", name)
        assert name.endswith("_total") == (declared.kind == "counter")
        assert declared.text.endswith(".")


async def test_endpoint_serves_all_declared_metrics_with_their_labels(tmp_path: Path, database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await create(sql)
    async with serving(tmp_path, database_url) as (_, address, _, _):
        families: Mapping[str, tuple[str, tuple[str, ...]]] = {}
        # Before the first request no request has been answered, and at first no consumer was measured.
        while "catbus_consumer_gaps" not in families or "catbus_http_requests_total" not in families:
            _, families = await scrape(address)
    ours = {name: family for name, family in families.items() if name.startswith("catbus_")}
    assert ours == {name: (declared.kind, declared.labels) for name, declared in METRICS.items()}
    assert "process_resident_memory_bytes" in families


async def test_metrics_count_sessions_subscriptions_and_messages(tmp_path: Path, database_url: str) -> None:
    async with (
        serving(tmp_path, database_url) as (_, address, quic, certificate),
        catbus.connect(f"ws://{address}/ws", token=TOKEN) as one,
        catbus.connect(quic, token=TOKEN, ca=certificate) as other,
        one.subscribe("orders.*") as here,
        other.subscribe("orders.*") as there,
        other.subscribe("orders.1") as exact,
    ):
        for _ in range(10):
            await one.publish("orders.1", {"text": "x" * 100})
        for messages in (here, there, exact):
            for _ in range(10):
                await anext(messages)
        await one.ping()
        samples, _ = await scrape(address)
    assert samples["catbus_state"] == {("starting",): 0, ("ready",): 1, ("degraded",): 0, ("draining",): 0}
    assert samples["catbus_sessions"] == {("websocket",): 1, ("webtransport",): 1, ("sse",): 0}
    assert samples["catbus_sessions_opened_total"] == {("websocket",): 1, ("webtransport",): 1, ("sse",): 0}
    assert samples["catbus_subscriptions"] == {("live",): 3, ("lagging",): 0}
    assert samples["catbus_subscribed_patterns"] == {(): 2}
    assert samples["catbus_publishes_total"] == {(): 10}
    assert samples["catbus_deliveries_total"] == {(): 30}
    assert samples["catbus_log_head"] == samples["catbus_log_applied"] == {(): 10}
    assert samples["catbus_commit_messages_sum"] == {(): 10}
    assert samples["catbus_commit_messages_count"] == samples["catbus_commit_duration_seconds_count"] == {(): 10}
    assert samples["catbus_publish_latency_seconds_count"] == {(): 10}
    assert 0 < samples["catbus_publish_latency_seconds_sum"][()] < 30
    assert samples["catbus_delivery_latency_seconds_count"][()] > 0
    assert samples["catbus_sent_bytes_total"][("websocket",)] > 10 * 100
    assert samples["catbus_sent_bytes_total"][("webtransport",)] > 20 * 100
    assert samples["catbus_received_bytes_total"][("websocket",)] > 10 * 100
    assert samples["catbus_quic_handshakes_started_total"] == {(): 1}
    assert samples["catbus_quic_handshakes_completed_total"] == {(): 1}
    assert samples["catbus_startup_seconds"][()] > 0
    assert samples["catbus_listener_polling"] == {(): 0}
    assert set(samples["catbus_errors_sent_total"].values()) == {0}


async def test_errors_are_counted_by_code_over_websocket_and_http(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, address, _, _):
        reader = catbus.auth.tokens.sign(SECRET, client_id="bob", grants=catbus.auth.grants.Grants(read=("a",)))
        async with catbus.connect(f"ws://{address}/ws", token=reader) as bus:
            for _ in range(2):
                with pytest.raises(catbus.Refused, match="no write grant"):
                    await bus.publish("a", 1)
        host, _, port = address.rpartition(":")
        async with await trio.open_tcp_stream(host, int(port)) as stream:
            peer = Peer(stream)
            body = b'{"channel":"a","payload":1}'
            head = f"Authorization: Bearer {reader}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            await peer.send(b"POST /publish HTTP/1.1\r\nHost: x\r\n" + head.encode() + body)
            assert (await peer.response()).status == 403
        samples, _ = await scrape(address)
    counted = {code: number for (code,), number in samples["catbus_errors_sent_total"].items() if number}
    assert counted == {"unauthorized": 3}
    assert samples["catbus_http_requests_total"][("/publish", "403")] == 1
    assert samples["catbus_sessions"][("websocket",)] == 0


def test_histogram_counts_by_upper_bounds() -> None:
    found = Histogram((1, 2))
    for value in (0.5, 1, 1.5, 2, 7):
        found.observe(value)
    assert (found.counts, found.sum, found.count) == ([2, 2, 1], 12, 5)
