"""The connections of an endpoint, and their log lines."""

from __future__ import annotations

import logging

import pytest
import trio
from trio.testing import MockClock

from catbus.endpoints.connection_registry import ConnectionRegistry
from catbus.observability.loggers import REPEAT_INTERVAL


async def test_repeated_internal_errors_are_counted_and_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    registry = ConnectionRegistry()
    for _ in range(1000):
        registry.log_internal_error("a request failed", KeyError("ours"))
    registry.log_internal_error("a session failed", KeyError("ours"))
    assert registry.internal_errors == 1001
    assert [record.getMessage() for record in caplog.records] == ["a request failed", "a session failed"]
    assert all(record.exc_info for record in caplog.records)


async def test_repeated_actions_of_peers_are_logged_once_per_minute(
    caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    registry = ConnectionRegistry()
    with caplog.at_level(logging.INFO):
        for _ in range(1000):
            registry.log_peer_event("a client does not read", seconds=60.0)
        await trio.sleep(REPEAT_INTERVAL + 1)
        registry.log_peer_event("a client does not read", seconds=60.0)
    assert [getattr(record, "repeated", 0) for record in caplog.records] == [0, 999]
