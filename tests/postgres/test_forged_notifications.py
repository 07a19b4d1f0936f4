"""Forged notifications: how often they are logged, and when a replica stops listening."""

from __future__ import annotations

from math import inf

import pytest
from structlog.testing import CapturingLogger

from catbus.observability.loggers import REPEAT_INTERVAL
from catbus.postgres.listen import forged_notifications
from catbus.postgres.listen.forged_notifications import (
    FIRST_PAUSE,
    FLOOD_COUNT,
    FLOOD_POLL_TIME,
    LONGEST_PAUSE,
    ForgedNotifications,
)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> CapturingLogger:
    logger = CapturingLogger()
    monkeypatch.setattr(forged_notifications, "logger", logger)
    return logger


def flood(forged: ForgedNotifications, number: int = FLOOD_COUNT) -> None:
    for _ in range(number):
        forged.note()


def test_forged_notifications_are_logged_once_per_interval_with_their_count(said: CapturingLogger) -> None:
    forged = ForgedNotifications()
    forged.note_poll(0.0, 0.0)
    assert said.calls == []
    for second in range(int(REPEAT_INTERVAL * 2) + 1):
        flood(forged, 7)
        forged.note_poll(float(second), 0.0)
    assert [call.kwargs["count"] for call in said.calls] == [7, 7 * REPEAT_INTERVAL, 7 * REPEAT_INTERVAL]
    forged.note_poll(inf, 0.0)
    assert len(said.calls) == 3, "nothing has come since"
    assert forged.rejected == 7 * (REPEAT_INTERVAL * 2 + 1)


def test_many_forged_notifications_cause_one_poll() -> None:
    forged = ForgedNotifications()
    assert [forged.note() for _ in range(3 * FLOOD_COUNT)].count(True) == 1
    forged.note_poll(0.0, 0.0)
    assert [forged.note() for _ in range(FLOOD_COUNT)] == [False] * (FLOOD_COUNT - 1) + [True]


@pytest.mark.parametrize(
    ("number", "took", "listens"),
    [
        (FLOOD_COUNT, FLOOD_POLL_TIME, False),
        (FLOOD_COUNT - 1, FLOOD_POLL_TIME, True),
        (FLOOD_COUNT, FLOOD_POLL_TIME / 2, True),
    ],
)
def test_listening_stops_when_a_flood_has_delayed_a_poll(number: int, took: float, listens: bool) -> None:
    forged = ForgedNotifications()
    flood(forged, number)
    forged.note_poll(100.0, took)
    assert forged.may_listen(100.0) == listens
    assert forged.floods == (not listens)
    assert forged.may_listen(100.0 + FIRST_PAUSE)


def test_repeated_floods_lengthen_the_pauses() -> None:
    forged, now = ForgedNotifications(), 0.0
    pauses = []
    for _ in range(8):
        flood(forged)
        forged.note_poll(now, FLOOD_POLL_TIME)
        began = now
        while not forged.may_listen(now):
            now += FIRST_PAUSE
        pauses.append(now - began)
    assert pauses == [min(FIRST_PAUSE * 2**n, LONGEST_PAUSE) for n in range(8)]
    now += 2 * LONGEST_PAUSE
    flood(forged)
    forged.note_poll(now, FLOOD_POLL_TIME)
    assert forged.may_listen(now + FIRST_PAUSE), "and as before after a long rest"
