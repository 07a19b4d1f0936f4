"""Lines of the log that may come again and again."""

from __future__ import annotations

from typing import Any

from catbus.observability.loggers import REPEAT, Recurring


class Lines:
    def __init__(self, burst: int = 1) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []
        self.recurring = Recurring(lambda event, **fields: self.lines.append((event, fields)), burst=burst)


def test_a_line_comes_once_in_an_interval_with_the_number_of_those_that_did_not() -> None:
    lines = Lines()
    said = [lines.recurring.note(now, "down", n=now) for now in range(int(2 * REPEAT) + 1)]
    assert said.count(True) == 3
    assert lines.lines == [
        ("down", {"n": 0}),
        ("down", {"n": 60, "repeated": 59}),
        ("down", {"n": 120, "repeated": 59}),
    ]


def test_another_reason_is_another_line_and_digits_make_no_other_reason() -> None:
    lines = Lines()
    for reason in ("port 1", "port 22", "disk", "port 3", "disk"):
        lines.recurring.note(0, "down", kind=reason)
    assert len(lines.lines) == 2


def test_a_burst_is_logged_in_each_interval() -> None:
    lines = Lines(burst=3)
    for now in range(int(REPEAT) + 10):
        lines.recurring.note(now, "down")
    assert len(lines.lines) == 6
    assert lines.lines[3] == ("down", {"repeated": 57})


def test_the_traceback_of_an_exception_comes_once() -> None:
    lines, error = Lines(), KeyError("ours")
    for now in (0, 1, REPEAT):
        lines.recurring.note(now, "failed", exception=error)
    assert lines.lines == [("failed", {"exc_info": error}), ("failed", {"error": "KeyError: 'ours'", "repeated": 1})]


def test_no_more_is_remembered_than_there_is_room_for() -> None:
    lines = Lines()
    for n in range(10_000):
        lines.recurring.note(0, "down", kind="x" * n)
    assert len(lines.recurring._reasons) <= 64
