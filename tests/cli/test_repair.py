"""`catbus repair`: reporting deleted messages, and letting subscriptions continue after them."""

from __future__ import annotations

import json
import re

import pytest
import trio

from catbus.cli.commands import repair as command
from catbus.postgres.access.migrations import version_update
from tests.postgres.sql import open_sql

from .conftest import Command


@pytest.fixture
def damaged(catbus: Command, database_url: str) -> str:
    """A database whose log of ten messages lacks 3 to 5 and 8."""
    assert catbus("init", "--database", database_url)[0] == 0

    async def damage() -> None:
        async with open_sql(database_url) as sql:
            await sql.execute(
                "INSERT INTO catbus.entries (slot, seq, at, channel, payload, producer, number) "
                "SELECT 0, n, 1, 'a', '1', '\\x00', n FROM generate_series(1, 10) AS n; "
                "DELETE FROM catbus.entries WHERE seq IN (3, 4, 5, 8)"
            )

    trio.run(damage)
    return database_url


def test_repair_reports_missing_messages_and_changes_nothing_without_apply(catbus: Command, damaged: str) -> None:
    for _ in range(2):
        status, output, errors = catbus("repair", "--database", damaged)
        assert (status, errors) == (1, "")
        lines = output.splitlines()
        assert lines[0].endswith(": searched messages 1 to 10")
        assert lines[1:4] == ["  3 to 5 (3)", "  8", "4 messages are missing, in 2 ranges"]
        assert "`catbus repair --apply`" in lines[4]
    assert '"4 messages were deleted by hand' in catbus("check", "--json", "--database", damaged)[1]
    status, output, errors = catbus("repair", "--apply", "--database", damaged)
    assert (status, errors) == (0, "")
    assert "deleted by hand" not in catbus("check", "--json", "--database", damaged)[1]
    assert "receive a gap" in output
    status, output, errors = catbus("repair", "--database", damaged)
    assert (status, errors) == (0, "")
    assert output.endswith("no messages are missing\n")


def test_json_output_has_all_ranges(catbus: Command, damaged: str) -> None:
    status, output, _ = catbus("repair", "--json", "--database", damaged)
    assert status == 1
    assert json.loads(output) == {"floor": 1, "head": 10, "missing": 4, "holes": [[3, 5], [8, 8]], "repaired": False}
    status, output, _ = catbus("repair", "--json", "--apply", "--database", damaged)
    assert (status, json.loads(output)["repaired"]) == (0, True)


def test_text_output_shows_only_the_first_ranges(
    catbus: Command, damaged: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "MAX_GAPS_SHOWN", 1)
    _, output, _ = catbus("repair", "--database", damaged)
    assert "  3 to 5 (3)\n  and 1 more ranges (--json shows all)\n" in output


def test_empty_log_has_no_missing_messages(catbus: Command, database_url: str) -> None:
    catbus("init", "--database", database_url)
    status, output, _ = catbus("repair", "--database", database_url)
    assert status == 0
    assert output.splitlines()[0].endswith(": the log is empty")


def test_schema_of_another_release_is_an_error_with_advice(catbus: Command, damaged: str) -> None:
    async def age() -> None:
        async with open_sql(damaged) as sql:
            await sql.execute(version_update(9))

    trio.run(age)
    status, output, errors = catbus("repair", "--database", damaged)
    assert (status, output) == (1, "")
    assert re.search(r"the schema has version 9, and this release needs \d+: `catbus init` brings it there", errors)


def test_help_explains_the_repair(catbus: Command) -> None:
    status, output, _ = catbus("repair", "--help")
    assert status == 0
    for word in ("--apply", "gap", "repair", "unknown", "Examples:"):
        assert word in output
