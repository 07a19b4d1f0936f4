"""Role changes, from the statement to the replicas."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from catbus.auth.grants import Grants
from catbus.config import DatabaseSettings
from catbus.postgres import PostgresLog
from catbus.postgres.access.asyncpg_bridge import DatabaseConnection
from catbus.postgres.notifications.encryption import ROLES_CHANNEL, NotificationKeys
from catbus.postgres.roles.role_changes import MIN_INTERVAL, RoleChanges
from catbus.postgres.roles.role_store import RoleStore
from tests.log.harness import running
from tests.postgres.sql import open_sql, pids
from tests.postgres.test_role_lookup import make_role


class Ear:
    """The notifications on the channel of roles, and the number of changes."""

    def __init__(self, connection: DatabaseConnection) -> None:
        self.connection = connection
        self.heard: list[str] = []
        """The content of each notification: the key of a role, or `*`, or nothing, for earlier releases."""
        self.seal = NotificationKeys("")

    async def take(self) -> tuple[int, set[str]]:
        """The number of changes, and the notifications received so far."""
        # Notifications arrive before the reply to the next statement.
        ((version,),) = await self.connection.fetch("SELECT count(*) FROM catbus.role_changes")
        await wait_all_tasks_blocked(0.01)
        heard, self.heard = self.heard, []
        assert ("" in heard) == bool(heard)
        return version, set(heard) - {""}

    def hear(self, _pid: int, payload: str) -> None:
        shown = self.seal.verify(ROLES_CHANNEL, payload)[0] if payload else ""
        self.heard.append(shown if len(shown) < 2 else self.seal.unmask_role(shown).hex())


@asynccontextmanager
async def ear(url: str) -> AsyncIterator[Ear]:
    async with open_sql(url) as connection:
        ear = Ear(connection)
        (secret,) = await connection.fetchrow("SELECT notification_secret FROM catbus.head")
        ear.seal = NotificationKeys(secret)
        await connection.listen(ROLES_CHANNEL, ear.hear)
        yield ear


# In the database


async def test_role_change_is_recorded_and_notified(database_url: str) -> None:
    key = (await make_role(database_url)).hex()
    await make_role(database_url)
    async with ear(database_url) as listening, open_sql(database_url) as sql:
        version, _ = await listening.take()
        roles = RoleStore(sql)
        await roles.grant(key, Grants(("c",)))
        assert await listening.take() == (version + 1, {key})
        await roles.revoke(key, Grants(("c",)))
        assert await listening.take() == (version + 2, {key})
        await roles.delete(key)
        assert await listening.take() == (version + 3, {key})
        for number, statement in enumerate(
            (
                "UPDATE catbus.roles SET client_id = 'x'",
                "UPDATE catbus.role_grants SET pattern = 'x' WHERE pattern = 'b'",
                "TRUNCATE catbus.role_grants",
                "TRUNCATE catbus.roles CASCADE",
            ),
            version + 4,
        ):
            await sql.execute(statement)
            assert await listening.take() == (number, {"*"}), statement


async def test_transaction_counts_once_and_a_rolled_back_one_never(database_url: str) -> None:
    keys = [(await make_role(database_url)).hex() for _ in range(5)]
    async with ear(database_url) as listening, open_sql(database_url) as sql:
        version, _ = await listening.take()
        await sql.execute("BEGIN")
        for key in keys:
            await sql.execute(f"DELETE FROM catbus.roles WHERE key = '\\x{key}'")
        assert await listening.take() == (version, set())
        await sql.execute("ROLLBACK")
        assert await listening.take() == (version, set())
        await sql.execute("BEGIN")
        for key in keys:
            await sql.execute(f"DELETE FROM catbus.roles WHERE key = '\\x{key}'")
        await sql.execute("COMMIT")
        assert await listening.take() == (version + 1, set(keys))


async def test_statement_that_changes_nothing_is_not_recorded(database_url: str) -> None:
    key = (await make_role(database_url)).hex()
    async with ear(database_url) as listening, open_sql(database_url) as sql:
        version, _ = await listening.take()
        ((read,),) = await sql.fetch("SELECT min(pattern) FROM catbus.role_grants WHERE permission = 'read'")
        await RoleStore(sql).grant(key, Grants((read,)))
        await sql.execute("DELETE FROM catbus.role_grants WHERE pattern = 'nobody.has.this'")
        await sql.execute("DELETE FROM catbus.roles WHERE client_id = 'nobody'")
        assert await listening.take() == (version, set())


async def test_grants_inserted_together_for_one_role_are_notified_once(database_url: str) -> None:
    key = (await make_role(database_url)).hex()
    async with ear(database_url) as listening, open_sql(database_url) as sql:
        version, _ = await listening.take()
        await RoleStore(sql).grant(key, Grants(tuple(f"many.{n}" for n in range(200))))
        await listening.connection.fetch("SELECT 1")
        assert listening.heard == [key, ""]
        assert await listening.take() == (version + 1, {key})


async def test_transactions_that_change_roles_do_not_wait_for_one_another(database_url: str) -> None:
    one, other = [(await make_role(database_url)).hex() for _ in range(2)]
    async with open_sql(database_url) as first, open_sql(database_url) as second:
        await first.execute(f"BEGIN; DELETE FROM catbus.roles WHERE key = '\\x{one}'")
        await second.execute(f"BEGIN; DELETE FROM catbus.roles WHERE key = '\\x{other}'")
        await second.execute("COMMIT")
        await first.execute("COMMIT")


async def test_late_commit_of_a_change_is_new_to_every_replica(database_url: str) -> None:
    async def look() -> str:
        ((version,),) = await sql.fetch("SELECT role_version FROM catbus.poll(0)")
        return str(version)

    keys = [(await make_role(database_url)).hex() for _ in range(2)]
    async with open_sql(database_url) as sql, open_sql(database_url) as late:
        seen = [await look()]
        await late.execute(f"BEGIN; DELETE FROM catbus.roles WHERE key = '\\x{keys[0]}'")
        assert await look() == seen[-1]
        for _ in range(120):
            await sql.execute("INSERT INTO catbus.role_changes DEFAULT VALUES")
        seen.append(await look())
        await sql.fetch("SELECT catbus.compact_role_changes()")
        seen.append(await look())
        await late.execute("COMMIT")
        seen += [await look()]
        assert len(set(seen)) == 4, "a compaction is a change for everyone, too"
        assert await sql.fetch("SELECT count(*) FROM catbus.role_changes") == [(2,)]


READERS = (
    "catbus.position()",
    "catbus.fingerprint(1)",
    "catbus.poll(0)",
    "catbus.outbox_pending()",
    "catbus.retention_due(1, 1)",
    "catbus.list_deleted_ranges(0, 10)",
    "catbus.deleted_range_report()",
)


@pytest.mark.parametrize("call", READERS)
async def test_reading_function_changes_nothing(database_url: str, call: str) -> None:
    async with open_sql(database_url) as sql:
        await sql.execute("INSERT INTO catbus.role_changes SELECT FROM generate_series(1, 120)")
        await sql.execute(f"BEGIN READ ONLY; SELECT FROM {call}; COMMIT")


async def test_heartbeat_compacts_the_changes(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await sql.execute("INSERT INTO catbus.role_changes SELECT FROM generate_series(1, 120)")
        await sql.fetch("SELECT catbus.heartbeat('r', '{}')")
        assert await sql.fetch("SELECT count(*) FROM catbus.role_changes") == [(1,)]


async def test_change_of_many_roles_is_notified_once(database_url: str) -> None:
    async with ear(database_url) as listening, open_sql(database_url) as sql:
        await sql.execute(
            "INSERT INTO catbus.roles (key) SELECT sha256(n::text::bytea) FROM generate_series(1, 2000) AS n;"
            "INSERT INTO catbus.role_grants SELECT key, 'read', 'a' FROM catbus.roles"
        )
        _, heard = await listening.take()
        assert heard == {"*"}


async def test_database_role_with_no_other_right_may_change_roles(database_url: str) -> None:
    """An application that manages roles has rights on two tables, and needs none on what the triggers use."""
    name = f"keeper_{abs(hash(database_url))}"
    key = await make_role(database_url)
    async with ear(database_url) as listening, open_sql(database_url) as sql:
        version, _ = await listening.take()
        await sql.execute(
            f"CREATE ROLE {name}; GRANT USAGE ON SCHEMA catbus TO {name};"
            f"GRANT SELECT, INSERT, UPDATE, DELETE ON catbus.roles, catbus.role_grants TO {name}; SET ROLE {name}"
        )
        await sql.execute(f"DELETE FROM catbus.role_grants WHERE role = '\\x{key.hex()}'")
        await sql.execute(f"RESET ROLE; DROP OWNED BY {name}; DROP ROLE {name}")
        assert await listening.take() == (version + 1, {key.hex()})


# In the replica


async def test_notified_change_names_roles_and_a_polled_one_may_concern_any(autojump_clock: MockClock) -> None:
    changes = RoleChanges()
    changes.note_role(b"\xab" * 32)
    changes.note_role(b"\xcd" * 32)
    assert await changes.wait() == {b"\xab" * 32, b"\xcd" * 32}
    changes.note_version("e", "1")
    assert await changes.wait() is None
    changes.note_version("e", "1")
    with trio.move_on_after(1) as scope:
        await changes.wait()
    assert scope.cancelled_caught
    for epoch, version in (("e", "2"), ("e", "1"), ("f", "1")):
        changes.note_role(b"\xab" * 32)
        changes.note_version(epoch, version)
        changes.note_role(b"\xab" * 32)
        assert await changes.wait() is None


async def test_repeatedly_notified_change_is_looked_up_seldom(autojump_clock: MockClock) -> None:
    """A recorded notification is sent as fast as possible. The first lookup does not wait."""
    changes, taken = RoleChanges(), []

    async def take() -> None:
        while True:
            assert await changes.wait() == {b"\xab" * 32}
            taken.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take)
        await wait_all_tasks_blocked()
        began = trio.current_time()
        for _ in range(1000):
            changes.note_role(b"\xab" * 32)
            await trio.sleep(0.001)
        nursery.cancel_scope.cancel()
    assert taken[0] == began
    assert len(taken) <= 1 / MIN_INTERVAL + 1
    assert all(later - earlier >= MIN_INTERVAL - 1e-9 for earlier, later in pairwise(taken))


async def test_names_are_dropped_when_there_are_too_many() -> None:
    changes = RoleChanges()
    for number in range(3000):
        changes.note_role(number.to_bytes(32))
    assert await changes.wait() is None


async def test_replica_learns_of_a_change_at_once(database_url: str) -> None:
    key = await make_role(database_url)
    log = PostgresLog(DatabaseSettings(url=database_url))
    async with running(log), open_sql(database_url) as sql:
        await log.roles.wait_changes()
        before = log.roles.changes
        await RoleStore(sql).grant(key.hex(), Grants(("c",)))
        with trio.fail_after(5):
            assert await log.roles.wait_changes() == {key}
        assert log.roles.changes > before
        assert log.roles.checked <= trio.current_time()


async def test_poll_finds_a_change_without_a_notification(database_url: str) -> None:
    log = PostgresLog(DatabaseSettings(url=database_url))
    async with running(log), open_sql(database_url) as sql:
        await log.roles.wait_changes()
        await sql.execute("INSERT INTO catbus.role_changes DEFAULT VALUES")
        with trio.fail_after(10):
            assert await log.roles.wait_changes() is None


async def test_next_connection_finds_a_change_without_a_listener(database_url: str) -> None:
    key = await make_role(database_url)
    log = PostgresLog(DatabaseSettings(url=database_url))
    async with running(log), open_sql(database_url) as sql:
        await log.roles.wait_changes()
        (listener,) = await pids(sql, "%catbus.poll%")
        # In one transaction, which leaves hardly any time to connect in between.
        await sql.execute(
            f"SELECT pg_terminate_backend({listener}, 10000); DELETE FROM catbus.roles WHERE key = '\\x{key.hex()}'"
        )
        with trio.fail_after(10):
            while (keys := await log.roles.wait_changes()) is not None:
                assert keys == {key}
