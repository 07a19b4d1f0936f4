"""`catbus erase`: counting, asking, erasing, and saying what is left."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from catbus.postgres.access.migrations import version_update
from catbus.postgres.maintenance import erasure
from tests.postgres.sql import open_sql

from .conftest import Command


@pytest.fixture
def filled(catbus: Command, database_url: str) -> str:
    """A database whose log has ten messages, one a second: odd ones of alice on `a.1`, even ones of bob on `a.2`."""

    async def fill() -> None:
        async with open_sql(database_url) as sql:
            await sql.execute(
                "INSERT INTO catbus.entries (slot, seq, at, channel, payload, producer, number, sender) "
                "SELECT 0, n, n * 1000, CASE n % 2 WHEN 1 THEN 'a.1' ELSE 'a.2' END, '1', '\\x00', n, "
                "CASE n % 2 WHEN 1 THEN 'alice' ELSE 'bob' END FROM generate_series(1, 10) AS n"
            )

    trio.run(fill)
    return database_url


def erased(url: str) -> list[int]:
    async def ask() -> list[int]:
        async with open_sql(url) as sql:
            (seqs,) = await sql.fetchrow("SELECT catbus.erased_seqs(0, 100)")
            return list(seqs)

    return trio.run(ask)


def test_dry_run_counts_and_changes_nothing(catbus: Command, filled: str) -> None:
    status, output, errors = catbus("erase", "a.*", "--sender", "alice", "--dry-run", "--database", filled)
    assert (status, errors) == (0, "")
    assert output.endswith(": 5 messages would be erased\n")
    assert erased(filled) == []


def test_selected_messages_are_erased_and_what_is_left_is_said(catbus: Command, filled: str) -> None:
    status, output, errors = catbus("erase", "a.1", "--before", "1970-01-01T01:00:05+01:00", "-y", "--database", filled)
    assert (status, errors) == (0, "")
    first, second = output.splitlines()
    assert first.endswith(": 2 messages were erased")
    for word in ("backups", "standbys", "write-ahead log", "free space"):
        assert word in second
    assert erased(filled) == [1, 3]
    status, output, _ = catbus("erase", "*", "--sender", "bob", "--yes", "--json", "--database", filled)
    assert json.loads(output) == {"found": 5, "erased": True, "unvacuumed": []}
    assert erased(filled) == [1, 2, 3, 4, 6, 8, 10]


def test_without_a_terminal_it_has_to_be_confirmed_by_an_option(
    catbus: Command, filled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    status, output, errors = catbus("erase", "a.*", "--database", filled)
    assert (status, output) == (2, "")
    assert "--yes" in errors
    assert erased(filled) == []


@pytest.mark.parametrize(("answer", "status", "seqs"), [("n", 130, []), ("y", 0, [1, 3, 5, 7, 9])])
def test_terminal_shows_the_number_and_asks(
    filled: str, tmp_path: Path, answer: str, status: int, seqs: list[int]
) -> None:
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "catbus", "erase", "a.1", "--database", filled],
        env={**os.environ, "CATBUS_STATE": str(tmp_path)},
        stdin=end,
        stdout=subprocess.PIPE,
        stderr=end,
    )
    os.close(end)
    shown = b""
    while not shown.endswith(b"[y/N]: "):
        shown += os.read(terminal, 1000)
    assert b"erase 5 messages for good?" in shown
    os.write(terminal, answer.encode() + b"\n")
    with process, os.fdopen(terminal, "rb", buffering=0):
        assert process.wait(60) == status
    assert erased(filled) == seqs


def test_open_transaction_delays_the_vacuum_and_is_reported(
    catbus: Command, filled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(erasure, "VACUUM_PATIENCE", 0.2)

    async def go() -> None:
        async with open_sql(filled) as sql:
            await sql.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT FROM catbus.entries")
            result = await trio.to_thread.run_sync(catbus, "erase", "a.1", "--yes", "--database", filled)
            assert result.status == 0
            assert "old rows stay in entries_0 until transactions from before have ended" in result.output

    trio.run(go)
    status, output, _ = catbus("erase", "a.1", "--yes", "--database", filled)
    assert status == 0
    assert ": 0 messages were erased" in output
    assert "old rows stay" not in output


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["a.*.b"], "not a pattern"),
        (["a", "--before", "yesterday"], "not a time with a time zone"),
        (["a", "--before", "2026-11-30T12:00:00"], "not a time with a time zone"),
        ([], "Missing argument 'PATTERN'"),
    ],
)
def test_wrong_usage_is_explained(catbus: Command, arguments: list[str], text: str) -> None:
    status, output, errors = catbus("erase", *arguments, "--yes", "--database", "postgres://nowhere/x")
    assert (status, output) == (2, "")
    assert text in errors


def test_schema_of_another_release_is_an_error_with_advice(catbus: Command, filled: str) -> None:
    async def age() -> None:
        async with open_sql(filled) as sql:
            await sql.execute(version_update(9))

    trio.run(age)
    status, output, errors = catbus("erase", "a", "--yes", "--database", filled)
    assert (status, output) == (1, "")
    assert "the schema has version 9" in errors


def test_help_says_what_is_not_erased(catbus: Command) -> None:
    status, output, _ = catbus("erase", "--help")
    assert status == 0
    for word in ("--dry-run", "duplicate", "backups", "docs/operations.md", "Examples:"):
        assert word in output
