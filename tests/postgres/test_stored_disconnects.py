"""Requests to disconnect clients in the database, and how a replica follows them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from catbus.auth.revocations import MAX_CLIENT_ID
from catbus.postgres import PostgresLog
from catbus.postgres.access.asyncpg_bridge import DATABASE_ERRORS, sqlstate
from tests.log.harness import TEST_TIMEOUT, running
from tests.postgres.sql import open_sql
from tests.postgres.test_stored_revocations import make_log


class Sessions:
    """Doubles of sessions, and a count of those that were to close."""

    def __init__(self, log: PostgresLog) -> None:
        self.closed: list[str] = []
        self._log = log

    def open(self, *names: str) -> None:
        for name in names:
            self._log.revocations.add(Session(self, name), name, 0.0)

    async def wait_closed(self, *names: str) -> None:
        """Wait until exactly these clients have been disconnected, in this order."""
        with trio.fail_after(TEST_TIMEOUT):
            while len(self.closed) < len(names):
                await trio.sleep(0.01)
        assert self.closed == list(names)


class Session:
    def __init__(self, sessions: Sessions, name: str) -> None:
        self._sessions = sessions
        self._name = name

    def disconnect(self) -> None:
        self._sessions.closed.append(self._name)

    def revoke_token(self) -> None:
        """Stay open."""


@asynccontextmanager
async def followed(url: str) -> AsyncIterator[tuple[PostgresLog, Sessions]]:
    """A log that is open, and sessions of a replica that follows it."""
    log = make_log(url)
    async with running(log), trio.open_nursery() as nursery:
        nursery.start_soon(log.revocations.run)
        await log.revocations.wait_known()
        yield log, Sessions(log)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("client_id", ["''", "NULL", f"repeat('é', {MAX_CLIENT_ID // 2 + 1})"])
async def test_impossible_client_id_is_rejected(database_url: str, client_id: str) -> None:
    async with open_sql(database_url) as sql:
        with pytest.raises(DATABASE_ERRORS) as caught:
            await sql.fetch(f"SELECT catbus.disconnect_client({client_id})")
    assert sqlstate(caught.value) == "22023"


async def test_one_grant_is_enough_to_disconnect(database_url: str) -> None:
    name = f"disconnecter_{abs(hash(database_url))}"
    async with open_sql(database_url) as sql:
        await sql.execute(f"CREATE ROLE {name}; GRANT USAGE ON SCHEMA catbus TO {name}; SET ROLE {name}")
        with pytest.raises(DATABASE_ERRORS) as caught:
            await sql.fetch("SELECT catbus.disconnect_client('a')")
        assert sqlstate(caught.value) == "42501"
        await sql.execute(f"RESET ROLE; GRANT EXECUTE ON FUNCTION catbus.disconnect_client TO {name}; SET ROLE {name}")
        await sql.fetch("SELECT catbus.disconnect_client('a')")
        await sql.execute(f"RESET ROLE; DROP OWNED BY {name}; DROP ROLE {name}")


async def test_requests_are_deleted_after_an_hour(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await sql.fetch("SELECT catbus.disconnect_client(name) FROM unnest('{a,b}'::text[]) AS name")
        await sql.execute(
            "UPDATE catbus.disconnects SET requested = now() - interval '61 minutes' WHERE client_id = 'a'"
        )
        await sql.fetch("SELECT catbus.forget_revocations()")
        assert await sql.fetch("SELECT client_id FROM catbus.disconnects") == [("b",)]


async def test_each_request_closes_the_sessions_of_its_client_once(database_url: str) -> None:
    """Also while an older transaction is open, so that replicas read the request again with later ones."""
    async with (
        followed(database_url) as (log, sessions),
        open_sql(database_url) as older,
        open_sql(database_url) as sql,
    ):
        await older.execute("BEGIN; SELECT pg_current_xact_id()")
        sessions.open("alice", "bob")
        assert await log.revocations.disconnect("alice") == 1
        await sessions.wait_closed("alice")
        await sql.fetch("SELECT catbus.disconnect_client('bob')")
        await sessions.wait_closed("alice", "bob")
        await log.revocations.disconnect("alice")
        await sessions.wait_closed("alice", "bob", "alice")
        await older.execute("ROLLBACK")


async def test_request_of_a_transaction_that_commits_late_is_not_missed(database_url: str) -> None:
    async with followed(database_url) as (log, sessions), open_sql(database_url) as late:
        sessions.open("alice", "bob")
        await late.execute("BEGIN; SELECT catbus.disconnect_client('alice')")
        await log.revocations.disconnect("bob")
        await sessions.wait_closed("bob")
        await late.execute("COMMIT")
        await sessions.wait_closed("bob", "alice")


async def test_earlier_requests_mean_nothing_in_another_epoch(database_url: str) -> None:
    """The replica reads all rows of what may be another database."""
    async with followed(database_url) as (log, sessions):
        sessions.open("alice", "bob")
        await log.revocations.disconnect("alice")
        await sessions.wait_closed("alice")
        await log.revocations.disconnect("bob")
        await sessions.wait_closed("alice", "bob")
        log.revocations.note_version("another", "")
        with trio.fail_after(TEST_TIMEOUT):
            while log.revocations._read_epoch != "another":
                await trio.sleep(0.01)
        await wait_all_tasks_blocked()
        assert sessions.closed == ["alice", "bob"]
