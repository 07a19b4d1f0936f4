"""Revocations in the database: the functions and triggers of the schema, and how a replica follows the table."""

from __future__ import annotations

import random
import time
from math import inf
from typing import Any

import pytest
import trio

from catbus.auth.revocations import MAX_CLIENT_ID
from catbus.auth.token_errors import TokenRejected
from catbus.config import DatabaseSettings
from catbus.errors import PeerError, Unavailable
from catbus.postgres import PostgresLog
from catbus.postgres.access.asyncpg_bridge import DATABASE_ERRORS, DatabaseConnection, sqlstate
from catbus.postgres.notifications.encryption import ROLES_CHANNEL, NotificationKeys
from catbus.postgres.revocations import stored_revocations
from catbus.postgres.revocations.stored_revocations import StoredRevocations, revoke_client
from tests.log.harness import running
from tests.postgres.proxy import open_proxy
from tests.postgres.sql import open_sql, pids


def make_log(url: str) -> PostgresLog:
    return PostgresLog(DatabaseSettings(url=url, publish_timeout=20, connect_timeout=1))


async def table(sql: DatabaseConnection) -> dict[str, float]:
    return dict(
        await sql.fetch("SELECT client_id, extract(epoch FROM issued_before)::double precision FROM catbus.revocations")
    )


async def wait_equal(revocations: StoredRevocations, expected: dict[str, float]) -> None:
    """Wait until a replica knows exactly these revocations."""
    with trio.fail_after(20):
        while revocations._issued_before != expected:
            await trio.sleep(0.01)


# In the database


async def test_later_time_of_two_revocations_is_in_force(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        for issued_before, forget_after, in_force in (
            ("2020-01-02", "2021-01-01", "2020-01-02"),
            ("2020-01-03", "2022-01-01", "2020-01-03"),
            ("2020-01-01", "2020-02-01", "2020-01-03"),
        ):
            statement = f"SELECT catbus.revoke_client('a', '{issued_before}', '{forget_after}') = '{in_force}'"
            assert await sql.fetch(statement) == [(True,)]
        rows = await sql.fetch(
            "SELECT issued_before = '2020-01-03', forget_after = '2022-01-01' FROM catbus.revocations"
        )
        assert rows == [(True, True)]
        await sql.fetch("SELECT catbus.revoke_client('a', '2019-01-01')")
        assert await sql.fetch("SELECT forget_after FROM catbus.revocations WHERE forget_after < 'infinity'") == []


async def test_revocation_is_of_the_time_of_the_call(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await sql.execute("BEGIN")
        await sql.fetch("SELECT pg_sleep(0.01)")
        [(later,)] = await sql.fetch("SELECT catbus.revoke_client('a') > now()")
        assert later
        await sql.execute("COMMIT")


@pytest.mark.parametrize(
    "arguments", ["''", "NULL", "'a', NULL", "'a', now(), NULL", f"repeat('é', {MAX_CLIENT_ID // 2 + 1})"]
)
async def test_impossible_revocation_is_rejected(database_url: str, arguments: str) -> None:
    async with open_sql(database_url) as sql:
        with pytest.raises(DATABASE_ERRORS) as caught:
            await sql.fetch(f"SELECT catbus.revoke_client({arguments})")
        assert sqlstate(caught.value) == "22023"


async def test_longest_client_id_can_be_revoked(database_url: str) -> None:
    # Random, as an index compresses its entries.
    name = "".join(random.Random(1).choices("abcdefghijklmnopqrstuvwxyz0123456789", k=MAX_CLIENT_ID))
    async with open_sql(database_url) as sql:
        await sql.fetch("SELECT catbus.revoke_client($1)", name)
        assert list(await table(sql)) == [name]


async def test_one_grant_is_enough_to_revoke(database_url: str) -> None:
    name = f"revoker_{abs(hash(database_url))}"
    async with open_sql(database_url) as sql:
        await sql.execute(f"CREATE ROLE {name}; GRANT USAGE ON SCHEMA catbus TO {name}; SET ROLE {name}")
        with pytest.raises(DATABASE_ERRORS) as caught:
            await sql.fetch("SELECT catbus.revoke_client('a')")
        assert sqlstate(caught.value) == "42501"
        await sql.execute(f"RESET ROLE; GRANT EXECUTE ON FUNCTION catbus.revoke_client TO {name}; SET ROLE {name}")
        await sql.fetch("SELECT catbus.revoke_client('a')")
        for statement in ("SELECT * FROM catbus.revocations", "DELETE FROM catbus.revocations"):
            with pytest.raises(DATABASE_ERRORS) as caught:
                await sql.fetch(statement)
            assert sqlstate(caught.value) == "42501"
        await sql.execute(f"RESET ROLE; DROP OWNED BY {name}; DROP ROLE {name}")
        assert list(await table(sql)) == ["a"]


async def test_each_transaction_with_revocations_is_recorded_and_notified_once(database_url: str) -> None:
    async with open_sql(database_url) as sql, open_sql(database_url) as listening:
        heard: list[str] = []
        (secret,) = await sql.fetchrow("SELECT notification_secret FROM catbus.head")
        await listening.listen(
            ROLES_CHANNEL, lambda _, payload: heard.append(NotificationKeys(secret).verify(ROLES_CHANNEL, payload)[0])
        )
        for statement in (
            "SELECT catbus.revoke_client('a'), catbus.revoke_client('b')",
            "INSERT INTO catbus.revocations VALUES ('c', now())",
            "UPDATE catbus.revocations SET issued_before = '2020-01-01'",
            "DELETE FROM catbus.revocations WHERE client_id = 'a'",
            "TRUNCATE catbus.revocations",
        ):
            [before] = await sql.fetch("SELECT revocation_version, role_version FROM catbus.poll(0)")
            await sql.execute(statement)
            [after] = await sql.fetch("SELECT revocation_version, role_version FROM catbus.poll(0)")
            assert (after[0] != before[0], after[1] == before[1]) == (True, True), statement
            await listening.fetch("SELECT 1")
            assert heard == ["*"], statement
            heard.clear()
        await sql.execute("BEGIN; SELECT catbus.revoke_client('d'); ROLLBACK")
        assert await sql.fetch("SELECT count(*) FROM catbus.revocation_changes") == [(6,)]
        await listening.fetch("SELECT 1")
        assert heard == []


async def test_revocations_that_no_token_needs_are_deleted_together(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        for name, days in (("a", 1.5), ("b", 0.5), ("c", -1)):
            await sql.fetch(f"SELECT catbus.revoke_client('{name}', now(), now() - interval '{days} days')")
        await sql.fetch("SELECT catbus.revoke_client('d')")
        await sql.execute("INSERT INTO catbus.revocation_changes SELECT FROM generate_series(1, 120)")
        await sql.fetch("SELECT catbus.heartbeat('r', '{}')")
        assert set(await table(sql)) == {"a", "b", "c", "d"}, "no row is overdue for a day"
        assert await sql.fetch("SELECT count(*) FROM catbus.revocation_changes") == [(1,)]
        await sql.fetch("SELECT catbus.revoke_client('e', now(), now() - interval '3 days')")
        await sql.fetch("SELECT catbus.heartbeat('r', '{}')")
        assert set(await table(sql)) == {"b", "c", "d"}


# In a replica


async def test_replica_knows_earlier_revocations_when_it_is_open(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_revocations, "PAGE_ROWS", 3)
    async with open_sql(database_url) as sql:
        await sql.fetch("SELECT count(catbus.revoke_client(n::text)) FROM generate_series(1, 10) AS n")
        await sql.fetch("SELECT catbus.revoke_client('for ever', 'infinity')")
        log = make_log(database_url)
        async with running(log):
            await log.revocations.wait_known()
            expected = await table(sql)
            assert expected["for ever"] == inf
            assert (log.revocations._issued_before, len(log.revocations)) == (expected, 11)


async def test_replica_learns_of_revocations_at_once_and_reads_only_those(database_url: str) -> None:
    log, other = make_log(database_url), make_log(database_url)
    async with running(log), running(other), open_sql(database_url) as sql:
        await log.revocations.wait_known()
        await other.revocations.wait_known()
        reads, polls = log.revocations.reads, log._listener.polls
        in_force = await other.revocations.revoke("a", 1000.5)
        assert in_force == 1000.5
        with pytest.raises(TokenRejected):
            other.revocations.check("a", 1000.25)
        await sql.fetch("SELECT catbus.revoke_client('b', 'epoch'::timestamptz + interval '7.25 s')")
        await wait_equal(log.revocations, {"a": 1000.5, "b": 7.25})
        assert await other.revocations.revoke("a", 500.0) == 1000.5
        await sql.execute("UPDATE catbus.revocations SET issued_before = 'infinity' WHERE client_id = 'b'")
        await wait_equal(log.revocations, {"a": 1000.5, "b": inf})
        assert log.revocations.reads == reads
        assert log._listener.polls > polls


async def test_deleted_revocations_are_forgotten_by_replicas(database_url: str) -> None:
    log = make_log(database_url)
    async with running(log), open_sql(database_url) as sql:
        for name in "abc":
            await log.revocations.revoke(name, 5.0)
        await sql.execute("DELETE FROM catbus.revocations WHERE client_id = 'b'")
        await wait_equal(log.revocations, {"a": 5.0, "c": 5.0})
        await sql.execute("TRUNCATE catbus.revocations")
        await wait_equal(log.revocations, {})


async def test_poll_finds_revocations_without_a_notification(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("catbus.postgres.listen.notification_listener.NotificationListener._receive", lambda *_: None)
    log = make_log(database_url)
    async with running(log), open_sql(database_url) as sql:
        await log.revocations.wait_known()
        await sql.fetch("SELECT catbus.revoke_client('a', 'infinity')")
        await wait_equal(log.revocations, {"a": inf})


async def test_transaction_that_commits_late_is_not_missed(database_url: str) -> None:
    log = make_log(database_url)
    async with running(log), open_sql(database_url) as late, open_sql(database_url) as sql:
        await log.revocations.wait_known()
        # Its id is the smaller one, and a replica has read a newer revocation before it commits.
        await late.execute("BEGIN; SELECT catbus.revoke_client('late', 'infinity')")
        await sql.fetch("SELECT catbus.revoke_client('early', 'infinity')")
        await wait_equal(log.revocations, {"early": inf})
        reads = log.revocations.reads
        await late.execute("COMMIT")
        await wait_equal(log.revocations, {"early": inf, "late": inf})
        assert log.revocations.reads == reads, "its row was read alone"


async def test_rows_of_another_cluster_are_not_read_again_and_again(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await sql.execute(
            "ALTER TABLE catbus.revocations DISABLE TRIGGER stamp;"
            "INSERT INTO catbus.revocations "
            "SELECT n::text, now(), 'infinity', 4000000000000 FROM generate_series(1, 9) AS n;"
            "ALTER TABLE catbus.revocations ENABLE ALWAYS TRIGGER stamp"
        )
        log = make_log(database_url)
        async with running(log):
            await log.revocations.wait_known()
            assert len(log.revocations) == 9
            put: list[Any] = []
            log.revocations._put = put.append  # type: ignore[method-assign]
            await sql.fetch("SELECT catbus.revoke_client('a', 'infinity')")
            with trio.fail_after(10):
                while not put:
                    await trio.sleep(0.01)
            assert put == [{"a": inf}]


async def test_replica_equals_the_table_after_any_concurrent_changes(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is revoked, changed and deleted in whatever overlapping transactions, also more than a page at once."""
    monkeypatch.setattr(stored_revocations, "PAGE_ROWS", 5)
    monkeypatch.setattr(stored_revocations, "MIN_INTERVAL", 0)
    seed = random.randrange(2**32)
    print("seed", seed)
    chance = random.Random(seed)
    log = make_log(database_url)

    async def change() -> None:
        async with open_sql(database_url) as sql:
            for _ in range(25):
                statements = [
                    f"SELECT catbus.revoke_client('{chance.randint(1, 4)}')",
                    f"SELECT catbus.revoke_client('{chance.random()}')",
                    f"DELETE FROM catbus.revocations WHERE client_id = '{chance.randint(5, 9)}'",
                    "SELECT count(catbus.revoke_client(n::text)) FROM generate_series(5, 9) AS n",
                    "SAVEPOINT s; SELECT catbus.revoke_client('undone'); ROLLBACK TO s",
                ]
                end = chance.choice(["COMMIT", "COMMIT", "ROLLBACK"])
                await sql.execute("BEGIN")
                try:
                    for statement in chance.choices(statements, k=chance.randint(1, 4)):
                        await sql.execute(statement)
                        await trio.sleep(chance.random() / 100)
                except DATABASE_ERRORS as error:
                    if sqlstate(error) != "40P01":  # A deadlock ends the transaction.
                        raise
                    end = "ROLLBACK"
                await sql.execute(end)

    async with running(log), open_sql(database_url) as sql:
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(change)
        await wait_equal(log.revocations, await table(sql))


async def test_outage_keeps_what_is_known_and_delays_what_is_new(database_url: str) -> None:
    async with open_proxy(database_url) as proxy, open_sql(database_url) as sql:
        log = make_log(proxy.url)
        async with running(log):
            await log.revocations.wait_known()
            await log.revocations.revoke("a", 100.0)
            proxy.close()
            with pytest.raises(Unavailable):
                await log.revocations.revoke("b", 100.0)
            await sql.fetch("SELECT catbus.revoke_client('c', 'epoch'::timestamptz + interval '100 s')")
            await log.revocations.wait_known()
            with pytest.raises(TokenRejected):
                log.revocations.check("a", 99.0)
            log.revocations.check("c", 99.0)
            proxy.open()
            await wait_equal(log.revocations, {"a": 100.0, "c": 100.0})


async def test_revocations_are_unknown_until_the_database_was_read(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_revocations, "FIRST_READ_TIMEOUT", 0.01)
    async with open_proxy(database_url) as proxy:
        proxy.close()
        log = make_log(proxy.url)
        async with trio.open_nursery() as nursery:
            await nursery.start(log.run, NoFollower())
            with pytest.raises(Unavailable, match="has not been reached"):
                await log.revocations.wait_known()
            monkeypatch.undo()
            proxy.open()
            await log.revocations.wait_known()
            nursery.cancel_scope.cancel()


async def test_connection_that_is_lost_while_idle_delays_a_revocation_only(database_url: str) -> None:
    log = make_log(database_url)
    async with running(log), open_sql(database_url) as sql:
        await log.revocations.wait_known()
        for reader in await pids(sql, "%FROM catbus.revocations%"):
            await sql.fetch(f"SELECT pg_terminate_backend({reader}, 10000)")
        await sql.fetch("SELECT catbus.revoke_client('a', 'infinity')")
        await wait_equal(log.revocations, {"a": inf})


@pytest.mark.parametrize(
    ("client_id", "times"),
    [
        ("", (None, None)),
        ("a\0", (None, None)),
        ("\ud800", (None, None)),
        ("é" * (MAX_CLIENT_ID // 2 + 1), (None, None)),
        ("a", (-1.0, None)),
        ("a", (time.time() * 1000, None)),
        ("a", (float("nan"), None)),
        ("a", (None, 1e300)),
    ],
)
async def test_revocation_that_cannot_be_stored_is_an_error_of_the_caller(
    client_id: str, times: tuple[float | None, float | None]
) -> None:
    with pytest.raises(PeerError):
        await make_log("postgres://nowhere").revocations.revoke(client_id, *times)


async def test_command_revokes_through_a_connection_of_its_own(empty_database_url: str) -> None:
    settings = DatabaseSettings(url=empty_database_url)
    assert await revoke_client(settings, "a", 100.25, None) == 100.25
    assert await revoke_client(settings, "a", 50.0, 200.0) == 100.25
    assert await revoke_client(settings, "a", None, None) == pytest.approx(time.time(), abs=3600)
    assert await revoke_client(settings, "a", inf, inf) == inf


class NoFollower:
    """A follower of the log that ignores what it is told."""

    def __getattr__(self, _: str) -> Any:
        return lambda *_args, **_kwargs: None
