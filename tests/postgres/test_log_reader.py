"""Pages of the log while the announced position and the table disagree."""

from __future__ import annotations

from typing import Any

import pytest

from catbus.log import LogPage
from catbus.postgres.follow.log_reader import MAX_CONFLICTS, LogReader


class Scripted:
    """A connection that returns the given results in order: rows of a page, or a position (head, floor)."""

    closed = False

    def __init__(self, *answers: list[Any]) -> None:
        self.answers = list(answers)

    async def fetch(self, query: str, *args: object, timeout: float) -> list[Any]:
        return self.answers.pop(0)


def reading(*answers: list[Any]) -> LogReader:
    async def connect() -> Any:
        return Scripted(*answers)

    return LogReader(connect)


def row(seq: int) -> tuple[int, int, str, str, None, None]:
    return (seq, 1000, "a", "1", None, None)


async def test_third_statement_finds_a_commit_between_two_statements() -> None:
    # 2 is announced while the log is empty; 1 and 2 are committed after the page was read.
    page = await reading([], [(2, 1)], [], [row(1), row(2)]).page(0, 2, 1000, 1 << 20)
    assert [entry.seq for entry in page.entries] == [1, 2]


async def test_false_announcement_gives_an_empty_page() -> None:
    assert await reading([], [(0, 1)]).page(0, 2, 1000, 1 << 20) == LogPage(0, 0, ())


async def test_entries_that_retention_has_removed_are_skipped() -> None:
    page = await reading([row(4)], [(4, 4)], [row(4)]).page(0, 4, 1000, 1 << 20)
    assert (page.after, page.last) == (3, 4)


async def test_reader_gives_up_on_a_table_that_lacks_entries() -> None:
    answers = [[], [(2, 1)], []] * MAX_CONFLICTS
    with pytest.raises(OSError, match="entries after 0"):
        await reading(*answers).page(0, 2, 1000, 1 << 20)
