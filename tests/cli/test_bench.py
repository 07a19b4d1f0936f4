"""`catbus bench`: what it measures, and what it says of a broker that loses, repeats or reorders."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from catbus.cli.commands import bench
from catbus.cli.load_report import PERCENTILES, Latencies, LoadReport, Receipts
from tests.cli.conftest import Command, Running

LOAD = ("bench", "--rate", "500", "--seconds", "0.2", "--publishers", "2", "--channels", "3", "--subscribers", "6")


def run(catbus: Command, broker: Running, *options: str) -> tuple[int, dict[str, Any]]:
    done = catbus(*LOAD, "--url", broker.url, "--json", *options)
    return done.status, json.loads(done.output)


def test_everything_is_published_and_delivered(catbus: Command, broker: Running) -> None:
    status, report = run(catbus, broker)
    assert (status, report["published"], report["delivered"], report["rejected"]) == (0, 100, 200, {})
    assert (report["lost"], report["repeated"], report["disordered"]) == (0, 0, 0)
    assert report["published_per_second"] == pytest.approx(500, rel=0.9)
    for times in (report["acknowledgement_seconds"], report["delivery_seconds"]):
        assert 0 < times["p50"] <= times["p99"] <= times["max"]


def test_table_is_for_people(catbus: Command, broker: Running) -> None:
    done = catbus(*LOAD, "--ephemeral", "--url", broker.url)
    assert done.status == 0
    assert "published  100" in done.output
    assert "0 lost, 0 repeated, 0 out of order" in done.output


@pytest.mark.parametrize("mistake", ["lost", "repeated", "disordered"])
def test_broken_promise_is_found(
    catbus: Command, broker: Running, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    def note(self: Receipts, number: int, seq: int | None) -> None:
        assert seq is not None
        match mistake, number:
            case "lost", 7:
                return
            case "repeated", 7:
                right(self, number, seq)
            case "disordered", 7:
                seq -= 20
        right(self, number, seq)

    right = Receipts.note
    monkeypatch.setattr(Receipts, "note", note)
    monkeypatch.setattr(bench, "PATIENCE", 0.1)
    status, report = run(catbus, broker)
    assert (status, report[mistake]) == (1, 6), "one message of each channel, for two subscribers"


def test_rejected_publishes_are_counted_by_their_code(catbus: Command, broker: Running) -> None:
    granted = catbus("grant", "-p", "read", "bench.*", "--client-id", "reader")
    status, report = run(catbus, broker, "--token", granted.output.strip())
    assert (status, report["published"], report["rejected"]) == (1, 0, {"unauthorized": 100})


def test_wrong_prefix_is_an_error(catbus: Command) -> None:
    done = catbus("bench", "--prefix", "no channel")
    assert (done.status, "--prefix" in done.errors) == (2, True)


@given(st.lists(st.floats(1e-5, 90), min_size=1, max_size=200))
def test_percentiles_are_at_most_five_percent_too_high(times: list[float]) -> None:
    latencies = Latencies()
    for each in times:
        latencies.observe(each)
    ordered = sorted(times)
    for percent in PERCENTILES:
        exact = ordered[max(0, -(-len(times) * percent // 100).__int__() - 1)]
        found = latencies.percentile(percent)
        assert found is not None
        assert exact <= found <= exact * 1.051
    assert sum(count for _, count in latencies.rows()) == len(times)


def test_nothing_measured_is_not_zero() -> None:
    nothing = LoadReport(1.0, 0, 0, 0, 0, 0, {}, Latencies(), Latencies(), durable=True)
    assert nothing.to_json()["delivery_seconds"] == dict.fromkeys(["p50", "p90", "p99", "p99.9", "max"])
    assert "-" in "\n".join(nothing.lines())
