"""catbus.observability.loggers: log events that may repeat."""

from __future__ import annotations

from typing import Any

import pytest

from catbus.observability.audit_log import log_admin_call
from catbus.observability.loggers import REPEAT_INTERVAL, RateLimitedLog


class Lines:
    def __init__(self, burst: int = 1) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []
        self.rate_limited = RateLimitedLog(lambda event, **fields: self.lines.append((event, fields)), burst=burst)


def test_repeated_event_is_logged_once_per_interval_with_the_number_of_repetitions() -> None:
    lines = Lines()
    logged = [lines.rate_limited.log(now, "down", n=now) for now in range(int(2 * REPEAT_INTERVAL) + 1)]
    assert logged.count(True) == 3
    assert lines.lines == [
        ("down", {"n": 0}),
        ("down", {"n": 60, "repeated": 59}),
        ("down", {"n": 120, "repeated": 59}),
    ]


def test_event_of_another_kind_is_logged_at_once_and_digits_do_not_change_the_kind() -> None:
    lines = Lines()
    for kind in ("port 1", "port 22", "disk", "port 3", "disk"):
        lines.rate_limited.log(0, "down", kind=kind)
    assert len(lines.lines) == 2


def test_burst_is_logged_in_each_interval() -> None:
    lines = Lines(burst=3)
    for now in range(int(REPEAT_INTERVAL) + 10):
        lines.rate_limited.log(now, "down")
    assert len(lines.lines) == 6
    assert lines.lines[3] == ("down", {"repeated": 57})


def test_traceback_of_an_exception_is_logged_once() -> None:
    lines, error = Lines(), KeyError("ours")
    for now in (0, 1, REPEAT_INTERVAL):
        lines.rate_limited.log(now, "failed", exception=error)
    assert lines.lines == [("failed", {"exc_info": error}), ("failed", {"error": "KeyError: 'ours'", "repeated": 1})]


def test_number_of_remembered_events_is_bounded() -> None:
    lines = Lines()
    for n in range(1000):
        lines.rate_limited.log(0, "down", kind="x" * n)
    assert len(lines.rate_limited._events) <= 64


def test_call_of_an_administrator_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "catbus.audit")
    log_admin_call("POST", "/api/clients/eve/disconnect", 200, client_id="alice", address="10.0.0.1", sessions=2)
    [line] = caplog.records
    assert (line.name, line.levelname, line.message) == ("catbus.audit", "INFO", "an administrator's call")
    found = {name: getattr(line, name) for name in ("method", "path", "status", "client_id", "address", "sessions")}
    assert found == {
        "method": "POST",
        "path": "/api/clients/eve/disconnect",
        "status": 200,
        "client_id": "alice",
        "address": "10.0.0.1",
        "sessions": 2,
    }


def test_call_that_only_reads_is_a_line_for_debugging(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "catbus.audit")
    log_admin_call("GET", "/api/sessions", 200, client_id="alice", address="10.0.0.1")
    assert [line.levelname for line in caplog.records] == ["DEBUG"]
