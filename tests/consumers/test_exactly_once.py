"""A short form of `python -m tests.consumers`, and its checker."""

from __future__ import annotations

import pytest

from .exactly_once import compare, run

SEED = 24


def test_every_message_has_one_effect_while_processes_are_killed(database_url: str) -> None:
    report = run(database_url, 6, SEED)
    assert report.errors == []
    assert report.published > 50
    assert report.faults.total() > 5


def test_worker_that_moves_the_cursor_before_the_effect_is_found(database_url: str) -> None:
    """Whether a kill falls between the two depends on chance, so workers are killed for longer."""
    report = run(database_url, 6, SEED, early=True)
    assert any("have no effect" in error for error in report.errors)


@pytest.mark.parametrize(
    ("effects", "error"),
    [
        ([(1, "a", "1"), (2, "a", "2"), (3, "b", "3")], None),
        ([(1, "a", "1"), (3, "b", "3")], "no effect: [2]"),
        ([(1, "a", "1"), (2, "a", "2"), (2, "a", "2"), (3, "b", "3")], "too many: [2]"),
        ([(2, "a", "2"), (1, "a", "1"), (3, "b", "3")], "wrong order"),
    ],
)
def test_checker_finds_what_is_wrong(effects: list[tuple[int, str, str]], error: str | None) -> None:
    found = [*compare([(1, "a", "1"), (2, "a", "2"), (3, "b", "3")], effects)]
    assert len(found) == (error is not None)
    assert all(error is not None and error in text for text in found)
