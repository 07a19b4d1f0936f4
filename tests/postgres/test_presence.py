"""Presence in PostgreSQL: the statements of the schema, and how replicas write and follow the table."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from catbus.config import DatabaseSettings
from catbus.errors import PeerError, Unavailable
from catbus.postgres import PostgresLog
from catbus.postgres.access.asyncpg_bridge import DatabaseConnection, open_bridge
from catbus.postgres.access.query_connection import QueryConnection
from catbus.postgres.presence.presence_table import PresenceTable
from catbus.presence import Member, PresenceAction
from catbus.presence.batches import PresenceBatch
from catbus.presence.mirror import Mirror
from catbus.presence.own_members import Membership
from catbus.presence.table_follower import ChangesPage, TableFollower
from tests.log.harness import RecordingFollower
from tests.postgres.bouncer import open_bouncer
from tests.postgres.clusters import open_served_cluster
from tests.postgres.sql import open_sql, pids, wait_until
from tests.presence.watchers import RecordingWatcher

ROOT = Path(__file__).parents[2]
LOST = 30
"""Seconds within which the members of a killed replica are announced as gone."""


def make_log(url: str, **options: float) -> PostgresLog:
    return PostgresLog(DatabaseSettings(url=url), **options)  # type: ignore[arg-type]


@asynccontextmanager
async def open_log(url: str, **options: float) -> AsyncIterator[PostgresLog]:
    """A replica, which is gone at once at the end, like one that is killed."""
    log = make_log(url, **options)
    async with trio.open_nursery() as nursery:
        await nursery.start(log.run, RecordingFollower())
        yield log
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def open_table(url: str) -> AsyncIterator[PresenceTable]:
    async with open_bridge() as bridge:
        yield PresenceTable(QueryConnection(partial(bridge.connect, url)))


def batch(number: int, *memberships: Membership, begins: bool = False, ends_below: int | None = None) -> PresenceBatch:
    return PresenceBatch(number, memberships, begins, ends_below)


async def rows(sql: DatabaseConnection) -> list[tuple[str, int]]:
    """The members and states of all rows."""
    return [tuple(row) for row in await sql.fetch("SELECT member, state FROM catbus.presence ORDER BY member")]


async def test_members_are_seen_on_all_replicas(database_url: str) -> None:
    async with open_log(database_url) as first, open_log(database_url) as second:
        one, other = first.presence, second.presence
        watcher = RecordingWatcher(other, "room.*")
        one.join(1, "room.a", "alice", b'{"name":"Alice"}')
        one.join(2, "room.a", "alice", None)
        one.join(3, "room.b", None, None)
        other.join(1, "room.a", "bob", None)
        other.join(1, "hall", "bob", None)
        await watcher.wait_names(**{"alice": 2, "bob": 1, "-": 1})
        [alice] = [member for member in watcher.members.values() if member.client_id == "alice"]
        assert (alice.channel, alice.sessions, alice.info, alice.session) == ("room.a", 2, b'{"name":"Alice"}', None)
        page = await one.members("room.*", limit=2)
        rest = await one.members("room.*", page.next, limit=2)
        assert [*page.members, *rest.members] == watcher.present()
        assert rest.next is None
        assert [member.channel for member in (await one.members("*", limit=1000)).members] == [
            "hall",
            "room.a",
            "room.a",
            "room.b",
        ]
        with pytest.raises(PeerError):
            await one.members("*", "nonsense")
        one.leave(1, "room.a", explicit=True)
        one.leave(2, "room.a", explicit=True)
        await watcher.wait_names(**{"bob": 1, "-": 1})
        assert watcher.left == ["alice"]


async def test_latest_info_counts_on_every_replica(database_url: str) -> None:
    async with open_log(database_url) as first, open_log(database_url) as second:
        watcher = RecordingWatcher(first.presence, "a")
        first.presence.join(1, "a", "alice", b"1")
        await watcher.wait_names(alice=1)
        second.presence.join(1, "a", "alice", b"2")
        await watcher.wait_names(alice=2)
        first.presence.join(1, "a", "alice", b"3")
        await watcher.wait_until(lambda watcher: [each.info for each in watcher.members.values()] == [b"3"])
        assert [member.info for member in (await second.presence.members("a")).members] == [b"3"]


async def test_reserved_channels_have_to_be_named(database_url: str) -> None:
    async with open_log(database_url) as log:
        everything, named = RecordingWatcher(log.presence, "*"), RecordingWatcher(log.presence, "_catbus.sessions")
        log.presence.join(1, "_catbus.sessions", "alice", None)
        log.presence.join(1, "a", "alice", None)
        await everything.wait_names(alice=1)
        await named.wait_names(alice=1)
        assert [member.channel for member in everything.members.values()] == ["a"]
        assert [member.channel for member in (await log.presence.members("*")).members] == ["a"]
        assert [member.channel for member in (await log.presence.members("_catbus.*")).members] == ["_catbus.sessions"]


async def test_replica_without_presence_costs_nothing(database_url: str) -> None:
    async with open_log(database_url) as writing, open_log(database_url) as idle, open_sql(database_url) as sql:
        writing.presence.join(1, "a", "alice", None)
        await writing.presence.flush()
        async with open_log(database_url) as watching:
            watcher = RecordingWatcher(watching.presence, "a")
            await watcher.wait_names(alice=1)
        assert writing.presence.statistics().reads == 0
        figures = idle.presence.statistics()
        assert (figures.writes, figures.reads) == (0, 0)
        assert len(await pids(sql, "%catbus.write_presence%")) == 1


# The order of versions


class Reader:
    """Follows the table as a replica does that watches the channel `a`, and keeps what it has read."""

    def __init__(self, table: PresenceTable) -> None:
        self.seen: set[tuple[str, int]] = set()
        self._table = table
        self._mirror = Mirror(10.0)
        self._mirror.watch("a", self)
        self._follower = TableFollower(self._mirror)

    def begin_members(self, pattern: str) -> None: ...

    def note_member(self, pattern: str, action: PresenceAction, member: Member) -> None: ...

    async def read(self) -> None:
        steps = self._follower.read(0.0)
        request = next(steps, None)
        while request is not None:
            page = await self._table.read(request)
            found = page.changes if isinstance(page, ChangesPage) else page.memberships
            self.seen |= {(membership.replica, membership.session) for membership in found}
            try:
                request = steps.send(page)
            except StopIteration:
                request = None


async def test_reader_misses_nothing_of_three_writers(database_url: str) -> None:
    writers, batches = 3, 150
    left = writers

    async def write(number: int) -> None:
        nonlocal left
        async with open_table(database_url) as table:
            for each in range(1, batches + 1):
                joined = Membership(f"r{number}", each, "a", f"client{each}")
                first, _ = await table.write(f"r{number}", batch(each, joined, begins=each == 1))
                assert first is not None
        left -= 1

    async with open_table(database_url) as table, trio.open_nursery() as nursery:
        reader = Reader(table)
        for number in range(writers):
            nursery.start_soon(write, number)
        while left:
            await reader.read()
        await reader.read()
    assert len(reader.seen) == writers * batches


@pytest.mark.parametrize("locked", [True, False])
async def test_batch_waits_for_an_earlier_one_that_is_not_committed(database_url: str, locked: bool) -> None:
    """So that its greater version is not read first. Without the lock, a reader misses the earlier one."""
    write = """
        SELECT catbus.write_presence($1, 1, true, NULL, '{a}', '{cx}', '{1}', '{x}', ARRAY[NULL::text], '{0}', '{0}')
    """
    async with (
        open_sql(database_url) as early,
        open_sql(database_url) as late,
        open_sql(database_url) as sql,
        open_table(database_url) as table,
    ):
        if not locked:
            function = "CREATE OR REPLACE FUNCTION catbus.lock_presence() RETURNS void LANGUAGE sql AS 'SELECT'"
            await sql.execute(function)
        await table.write("another", batch(1, begins=True))
        reader = Reader(table)
        await reader.read()
        await early.execute("BEGIN")
        await early.fetch(write, "early")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(late.fetch, write, "late")
            if locked:
                await wait_until(partial(is_waiting, sql))
            else:
                await wait_until(partial(has_rows, sql, [("cx", 0)]))
            await reader.read()
            assert reader.seen == (set() if locked else {("late", 1)})
            await early.execute("COMMIT")
        await reader.read()
        assert reader.seen == ({("early", 1), ("late", 1)} if locked else {("late", 1)})


async def is_waiting(sql: DatabaseConnection) -> bool:
    """Whether a batch waits for the lock."""
    [[number]] = await sql.fetch("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
    return bool(number)


async def test_late_batch_does_not_undo_a_newer_one(database_url: str) -> None:
    joined = Membership("r", 1, "a", "alice")
    async with open_table(database_url) as table, open_sql(database_url) as sql:
        assert (await table.write("r", batch(1, begins=True)))[0] is not None
        assert (await table.write("r", batch(3)))[0] is not None
        assert await table.write("r", batch(2, joined)) == (None, False)
        assert await table.write("r", batch(2, joined, begins=True)) == (None, False)
        assert await rows(sql) == []
        assert (await table.write("r", batch(4, joined)))[0] is not None
        assert await rows(sql) == [("calice", 0)]


async def test_replica_that_begins_again_ends_what_it_does_not_write(database_url: str) -> None:
    async with open_table(database_url) as table, open_sql(database_url) as sql:
        await table.write("r", batch(1, Membership("r", 1, "a", "x"), Membership("r", 2, "a", "y"), begins=True))
        first, _ = await table.write("r", batch(2, Membership("r", 1, "a", "x"), begins=True))
        assert await rows(sql) == [("cx", 0), ("cy", 0)]
        assert (await table.write("r", batch(3, ends_below=first)))[1] is False
        assert await rows(sql) == [("cx", 0), ("cy", 1)]


async def test_texts_that_postgresql_cannot_store_harm_nobody_else(database_url: str) -> None:
    async with open_log(database_url) as log:
        watcher = RecordingWatcher(log.presence, "a")
        log.presence.join(1, "a", "nul\0", None)
        log.presence.join(2, "a", "half\ud800", b'"\\ud800"')
        log.presence.join(3, "a", "long" * 5000, b"\xff")
        log.presence.join(4, "a", "alice", None)
        await watcher.wait_until(lambda watcher: len(watcher.members) == 4)


# Replicas that are lost


async def test_ended_and_lost_memberships_are_purged(database_url: str) -> None:
    """A reader that was away for so long reads everything again, and an expelled replica writes everything again."""
    async with open_log(database_url) as first, open_log(database_url) as second, open_sql(database_url) as sql:
        watcher = RecordingWatcher(second.presence, "a")
        first.presence.join(1, "a", "alice", None)
        first.presence.join(1, "a.b", "alice", None)
        await watcher.wait_names(alice=1)
        await sql.execute("BEGIN")
        await sql.execute("SELECT catbus.lock_presence()")
        await sql.execute("UPDATE catbus.presence_replicas SET last_heartbeat = now() - interval '2 minutes'")
        await sql.execute("SELECT catbus.purge_presence()")
        assert await rows(sql) == [("calice", 1), ("calice", 1)]
        await sql.execute("UPDATE catbus.presence SET changed = now() - interval '2 minutes'")
        await sql.execute("SELECT catbus.purge_presence()")
        assert await rows(sql) == []
        [[purged, newest]] = await sql.fetch(
            "SELECT purged, newest FROM catbus.presence_changes(0, true, '{}', '{}', 1)"
        )
        assert purged == newest
        await sql.execute("COMMIT")
        await wait_until(partial(has_rows, sql, [("calice", 0), ("calice", 0)]))
        await watcher.wait_names(alice=1)
        assert [action for action, _ in watcher.events] in ([], ["join"])


async def has_rows(sql: DatabaseConnection, expected: list[tuple[str, int]]) -> bool:
    return await rows(sql) == expected


async def test_member_of_a_killed_replica_is_gone_within_30_seconds_once(database_url: str) -> None:
    """Another one comes back within the grace, and is never gone."""
    async with open_log(database_url) as first, open_log(database_url) as second:
        watchers = [RecordingWatcher(log.presence, "room.*") for log in (first, second)]
        command = [sys.executable, "-m", "tests.postgres.presence_process", database_url, "alice", "bob", "carol"]
        process = await trio.lowlevel.open_process(command, cwd=ROOT, stdout=subprocess.PIPE)
        try:
            assert process.stdout is not None
            with trio.fail_after(60):
                assert (await process.stdout.receive_some()).startswith(b"written")
            for watcher in watchers:
                await watcher.wait_names(alice=1, bob=1, carol=1)
        finally:
            process.kill()
            await process.wait()
        killed = trio.current_time()
        second.presence.join(1, "room.a", "carol", None)
        for watcher in watchers:
            await watcher.wait_until(lambda watcher: len(watcher.left) >= 2, LOST + 30)
        assert trio.current_time() - killed < LOST
        for watcher in watchers:
            await watcher.wait_names(carol=1)
            assert sorted(str(name) for name in watcher.left) == ["alice", "bob"]
        page = await first.presence.members("*")
        assert [member.client_id for member in page.members] == ["carol"]


@pytest.mark.parametrize("stops", ["killed", "stopped"])
async def test_nobody_is_gone_when_postgresql_restarts(stops: str) -> None:
    with open_served_cluster() as cluster:
        async with open_log(cluster.url) as first, open_log(cluster.url) as second:
            watcher = RecordingWatcher(second.presence, "a")
            for session in range(20):
                first.presence.join(session, "a", f"client{session}", None)
                second.presence.join(session, "a", "shared", None)
            await watcher.wait_until(lambda watcher: len(watcher.members) == 21)
            await trio.to_thread.run_sync(cluster.kill if stops == "killed" else cluster.stop)
            with pytest.raises(Unavailable):
                await first.presence.members("a")
            first.presence.leave(0, "a", explicit=True)
            first.presence.leave(1, "a", explicit=False)
            second.presence.join(99, "a", "client1", None)
            await trio.to_thread.run_sync(cluster.start)
            first.presence.join(100, "a", "new", None)
            await watcher.wait_until(lambda watcher: "new" in watcher.names, 60)
            # Longer than members are held.
            await watcher.wait_until(lambda watcher: len(watcher.left) == 1, 60)
            async with open_sql(cluster.url) as sql:
                [[number]] = await sql.fetch("SELECT count(*) FROM catbus.presence WHERE state = 0")
            assert number == 40
            assert watcher.left == ["client0"]
            assert len(watcher.members) == 21


async def test_presence_through_a_pooler_arrives_by_polling(database_url: str) -> None:
    async with open_bouncer(database_url) as bouncer, open_log(bouncer.url) as first, open_log(bouncer.url) as second:
        watcher = RecordingWatcher(second.presence, "*")
        first.presence.join(1, "a", "alice", b"1")
        await watcher.wait_names(alice=1)
        first.presence.leave(1, "a", explicit=True)
        await watcher.wait_names()
        assert second.statistics().notifications == 0


async def test_notifications_are_hints(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without polls, a notification announces a change. A forged one is rejected."""
    monkeypatch.setattr("catbus.postgres.presence.presence_reader.POLL_INTERVAL", 1000.0)
    async with open_log(database_url) as first, open_log(database_url) as second, open_sql(database_url) as sql:
        watcher = RecordingWatcher(second.presence, "a")
        await watcher.wait_names()
        first.presence.join(1, "a", "alice", None)
        await watcher.wait_names(alice=1)
        reads = second.presence.statistics().reads
        for payload in ("99999999", "99999999 " + "x" * 44, "x" * 7000):
            await sql.fetch("SELECT pg_notify('catbus_presence', $1)", payload)
        await wait_until(partial(has_rejected, second, 3))
        assert second.presence.statistics().reads == reads


async def has_rejected(log: PostgresLog, number: int) -> bool:
    return log.statistics().rejected == number
