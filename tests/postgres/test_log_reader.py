"""Pages of the log while the announced position and the table disagree."""

from __future__ import annotations

from typing import Any

import pytest

from catbus.errors import Unavailable
from catbus.log import LogPage
from catbus.postgres.follow.log_reader import MAX_CONFLICTS, LogReader, OtherEpochError

EPOCH = "8f14e45f"


class Scripted:
    """A connection that returns the given results in order: rows of a page, or a position (epoch, head, floor)."""

    def __init__(self, *answers: list[Any]) -> None:
        self.answers = list(answers)
        self.closed = False

    def terminate(self) -> None:
        self.closed = True

    async def fetch(self, query: str, *args: object, timeout: float) -> list[Any]:
        return self.answers.pop(0)


def reading(*answers: list[Any]) -> LogReader:
    async def connect() -> Any:
        return Scripted(*answers)

    return LogReader(connect)


def row(seq: int) -> tuple[object, ...]:
    return (seq, 1000, "a", "1", None, None, None)


async def test_third_statement_finds_a_commit_between_two_statements() -> None:
    # 2 is announced while the log is empty; 1 and 2 are committed after the page was read.
    page = await reading([], [(EPOCH, 2, 1)], [], [row(1), row(2)]).page(EPOCH, 0, 2, 1000, 1 << 20)
    assert [entry.seq for entry in page.entries] == [1, 2]


async def test_false_announcement_gives_an_empty_page() -> None:
    assert await reading([], [(EPOCH, 0, 1)]).page(EPOCH, 0, 2, 1000, 1 << 20) == LogPage(0, 0, ())


async def test_entries_that_retention_has_removed_are_skipped() -> None:
    page = await reading([row(4)], [(EPOCH, 4, 4)], [row(4)]).page(EPOCH, 0, 4, 1000, 1 << 20)
    assert (page.after, page.last) == (3, 4)


async def test_reader_gives_up_on_a_table_that_lacks_entries() -> None:
    answers = [[], [(EPOCH, 2, 1)], []] * MAX_CONFLICTS
    with pytest.raises(OSError, match="entries after 0"):
        await reading(*answers).page(EPOCH, 0, 2, 1000, 1 << 20)


async def test_page_of_another_epoch_is_refused_and_its_connection_dropped() -> None:
    connections = [Scripted([], [("another", 9, 1)]), Scripted([row(1), row(2)])]

    async def connect() -> Any:
        return connections[0]

    reader = LogReader(connect)
    with pytest.raises(OtherEpochError):
        await reader.page(EPOCH, 0, 2, 1000, 1 << 20)
    assert connections.pop(0).closed
    assert (await reader.page(EPOCH, 0, 2, 1000, 1 << 20)).last == 2


async def test_retained_messages_of_another_log_are_refused_and_the_connection_dropped() -> None:
    connections = [Scripted([(False, None, None, None, None, None, None)]), Scripted([(True, "a", 1, 2, "3", None, 1)])]

    async def connect() -> Any:
        return connections[0]

    reader = LogReader(connect)
    with pytest.raises(Unavailable):
        await reader.retained(EPOCH, "*", None, 1, 10, 1 << 20)
    assert connections.pop(0).closed
    assert [entry.seq for entry in (await reader.retained(EPOCH, "*", None, 1, 10, 1 << 20)).entries] == [1]
