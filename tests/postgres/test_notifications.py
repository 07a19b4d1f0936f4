"""Notifications as seen and forged by a role that may only connect."""

from __future__ import annotations

import binascii
import re
import subprocess
import sys
from base64 import b64decode
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest
import trio

import catbus
from catbus.auth.grants import Grants
from catbus.auth.role_tokens import role_key
from catbus.config import DatabaseSettings
from catbus.log import Entry
from catbus.postgres import PostgresLog
from catbus.postgres.access.asyncpg_bridge import DatabaseConnection
from catbus.postgres.listen import forged_notifications, notification_listener, polling_interval
from catbus.postgres.notifications.encryption import EPHEMERAL_CHANNEL, LOG_CHANNEL, ROLES_CHANNEL
from catbus.postgres.roles.role_store import open_roles
from tests.brokers import CONFIG, TOKEN
from tests.brokers import running as running_broker
from tests.log.harness import running
from tests.postgres.server import execute
from tests.postgres.sql import open_sql, wait_until

Heard = tuple[str, str]
"""The channel and payload of a notification."""


@pytest.fixture
def lowly_url(database_url: str) -> Iterator[str]:
    """The URL of the same database for a role without grants."""
    name = urlsplit(database_url).path[1:].replace("catbus_test", "lowly")
    execute(database_url, f"CREATE ROLE {name} LOGIN PASSWORD 'lowly'")
    parts = urlsplit(database_url)
    yield parts._replace(netloc=f"{name}:lowly@{parts.netloc.rpartition('@')[2]}").geturl()
    execute(database_url, f"DROP ROLE {name}")


@asynccontextmanager
async def listening(url: str) -> AsyncIterator[tuple[DatabaseConnection, list[Heard]]]:
    """A connection that records the notifications of all three channels."""
    heard: list[Heard] = []
    async with open_sql(url) as sql:
        for channel in (LOG_CHANNEL, EPHEMERAL_CHANNEL, ROLES_CHANNEL):
            await sql.listen(channel, lambda _, payload, channel=channel: heard.append((channel, payload)))
        yield sql, heard


async def has_come(heard: list[Heard], channel: str, number: int = 1) -> None:
    async def look() -> bool:
        return [each for each, _ in heard].count(channel) >= number

    await wait_until(look)


# Confidentiality


def decodings(text: str) -> Iterator[bytes]:
    """A text, and each of its words decoded from base64 and from hexadecimal digits."""
    yield text.encode()
    for word in re.findall(r"[A-Za-z0-9+/=_-]{8,}", text):
        for start in range(4):
            with suppress(binascii.Error, ValueError):
                yield b64decode(
                    word[start : len(word) - (len(word) - start) % 4], altchars=b"-_" if "-" in word else None
                )
        with suppress(ValueError):
            yield bytes.fromhex(word)


@asynccontextmanager
async def replica(config: catbus.Config) -> AsyncIterator[tuple[catbus.Broker, str]]:
    """A broker that is connected to its database, and its address."""
    async with running_broker(config) as (broker, address):
        await broker.replica.log.wait_open()
        yield broker, address


async def test_role_that_may_only_connect_receives_only_positions(database_url: str, lowly_url: str) -> None:
    large = "large-payload-" * 500
    shown = [
        b"top.secret",
        b"small-payload",
        b"large-payload",
        b"sql-payload",
        b"ephemeral-payload",
        b"alice",
        b"who-else",
    ]
    config = msgspec.structs.replace(CONFIG, database=DatabaseSettings(url=database_url))
    async with (
        listening(lowly_url) as (_, heard),
        replica(config) as (broker, address),
        catbus.connect(f"ws://{address}/ws", token=TOKEN) as bus,
        bus.subscribe("top.*") as messages,
        open_roles(DatabaseSettings(url=database_url)) as roles,
        open_sql(database_url) as sql,
    ):
        shown.append(broker.replica.log._writer._incarnation)  # type: ignore[attr-defined]
        for n in range(5):
            await bus.publish("top.secret", ["small-payload", n])
            await bus.publish("top.secret", ["ephemeral-payload", n], ephemeral=True)
        await bus.publish("top.secret", large)
        await bus.publish("top.secret", large, ephemeral=True)
        await sql.fetch("SELECT catbus.publish('top.secret', '\"sql-payload\"')")
        while True:
            if (await anext(messages)).payload == "sql-payload":
                break
        token, role = await roles.create("who-else", Grants(("top.secret",), ()))
        await roles.grant(role.handle, Grants(("top.*",)))
        await roles.revoke(role.handle, Grants(("top.*",)))
        await roles.delete(role.handle)
        shown += [
            token.encode(),
            b64decode(token.removeprefix("role-") + "==", altchars=b"-_"),
            role.key,
            role.handle.encode(),
        ]
        assert role_key(token) == role.key
        await has_come(heard, LOG_CHANNEL, 7)
        await has_come(heard, EPHEMERAL_CHANNEL, 4)
        await has_come(heard, ROLES_CHANNEL, 5)
        epoch = broker.replica.log.epoch
    ((seal,),) = await _fetch(database_url, "SELECT notification_secret FROM catbus.head")
    shown.append(seal.encode())
    for channel, payload in heard:
        for text in decodings(payload):
            for secret in shown:
                assert secret not in text, f"{secret!r} on {channel}: {payload}"
        assert re.fullmatch(
            {
                LOG_CHANNEL: rf"{epoch}:\d+:\d+ [A-Za-z0-9+/=]{{44}}( \d+ [A-Za-z0-9+/=]+)?",
                EPHEMERAL_CHANNEL: r"2::[A-Za-z0-9+/=]+",
                ROLES_CHANNEL: r"|(\*|[0-9a-f]{96}) [A-Za-z0-9+/=]{44}",
            }[channel],
            payload,
        ), payload


async def test_plaintext_is_searched_for_in_every_encoding() -> None:
    """The search of the test above finds plaintext."""
    key = bytes(range(32))
    assert any(b"top.secret" in text for text in decodings('e:1:1 0123 [[1,2,"top.secret",null,null,1]]'))
    assert any(key in text for text in decodings(key.hex()))
    assert any(b"top.secret" in text for text in decodings("x " + binascii.b2a_base64(b"1 top.secret").decode()))


async def _fetch(url: str, query: str) -> list[Any]:
    async with open_sql(url) as sql:
        return list(await sql.fetch(query))


# Forgeries


def forgeries(heard: list[Heard]) -> Iterator[Heard]:
    """Forgeries that can be made from recorded notifications, beside sending them again."""
    for channel, payload in heard:
        for place in range(0, len(payload), 7):
            yield channel, payload[:place] + ("B" if payload[place] == "A" else "A") + payload[place + 1 :]
        for length in (1, len(payload) // 2, len(payload) - 1):
            yield channel, payload[:length]
        for other in {LOG_CHANNEL, EPHEMERAL_CHANNEL, ROLES_CHANNEL} - {channel}:
            yield other, payload
        yield channel, payload + " more"
    log = [payload.split(" ") for channel, payload in heard if channel == LOG_CHANNEL]
    for one, other in pairwise(log):
        yield LOG_CHANNEL, " ".join([one[0], *other[1:]])
        yield LOG_CHANNEL, " ".join([*one[:2], *other[2:]])
        yield LOG_CHANNEL, one[0]


async def test_forged_and_repeated_notifications_have_no_effect(database_url: str, lowly_url: str) -> None:
    one, other = (PostgresLog(DatabaseSettings(url=database_url, publish_timeout=20)) for _ in range(2))
    async with (
        running(one) as (_, publisher),
        running(other) as (there, _),
        listening(lowly_url) as (lowly, heard),
        open_roles(DatabaseSettings(url=database_url)) as roles,
    ):
        for n in range(3):
            await publisher.publish_seq("a", b'{"n": %d}' % n)
        one.broadcast(Entry(0, 1, "a", b'"ephemeral"'))
        await there.wait_until(lambda self: len(self.messages) == 1)
        _, role = await roles.create("x", Grants(("a",), ()))
        await roles.grant(role.handle, Grants(("b",)))
        await has_come(heard, LOG_CHANNEL, 3)
        await has_come(heard, ROLES_CHANNEL, 3)
        recorded = [(channel, payload) for channel, payload in heard if payload]
        forged = [each for each in forgeries(recorded) if each[1] and each not in recorded]
        before = other.statistics()

        sent = [*forged, *recorded, *recorded]
        await lowly.fetch(
            "SELECT pg_notify(f.channel, f.payload) FROM unnest($1::text[], $2::text[]) AS f (channel, payload)",
            [channel for channel, _ in sent],
            [payload for _, payload in sent],
        )
        assert await publisher.publish_seq("a", b"4") == 4
        await there.wait_for(4)
        one.broadcast(Entry(0, 2, "a", b'"end"'))
        await there.wait_until(lambda self: self.messages[-1].payload == b'"end"')
        assert [entry.seq for entry in there.entries] == [1, 2, 3, 4]
        assert [entry.payload for entry in there.messages] == [b'"ephemeral"', b'"end"']
        after = other.statistics()
        # PostgreSQL sends equal notifications of one transaction once.
        assert after.rejected - before.rejected == len(set(forged)) + 1, "and the ephemeral message that was recorded"
        assert (after.jumps, after.failures, after.restarts) == (before.jumps, 0, 0)


async def test_forged_position_is_neither_read_nor_taken_for_the_head(database_url: str, lowly_url: str) -> None:
    """A forged head would hide the originals of retries, which are searched from there on."""
    log = PostgresLog(DatabaseSettings(url=database_url, publish_timeout=20))
    async with running(log) as (_, publisher), open_sql(lowly_url) as lowly:
        await publisher.publish_seq("a", b"1")
        await lowly.fetch("SELECT pg_notify($1, $2)", LOG_CHANNEL, f"{log.epoch}:2:1000000")

        async def rejected() -> bool:
            return log.statistics().rejected == 1

        await wait_until(rejected)
        statistics = log.statistics()
        assert (statistics.announced, statistics.reads, statistics.jumps) == (1, 0, 0)


# Floods

FLOOD = """
import asyncio, sys
import asyncpg

async def flood(url, epoch, recorded):
    connection = await asyncpg.connect(url)
    number = 0
    print("begun", flush=True)
    while True:
        try:
            await connection.execute(f'''
                SELECT pg_notify('catbus', '{epoch}:' || i || ':' || i + 1000),
                       pg_notify('catbus', md5(i::text)),
                       pg_notify('catbus_ephemeral', '2::' || encode(sha256(i::text::bytea), 'base64')),
                       pg_notify('catbus_roles', encode(sha256(i::text::bytea), 'hex'))
                FROM generate_series({number}, {number + 500}) AS i''')
            for channel, payload in recorded:
                await connection.fetch("SELECT pg_notify($1, $2)", channel, payload)
        except asyncpg.ProgramLimitExceededError:
            pass  # The queue of notifications is full.
        number += 501

asyncio.run(flood(sys.argv[1], sys.argv[2], [tuple(each.split("=", 1)) for each in sys.argv[3:]]))
"""


@asynccontextmanager
async def flooding(url: str, epoch: str, recorded: list[Heard]) -> AsyncIterator[None]:
    """A separate process that sends notifications as fast as it can."""
    arguments = [f"{channel}={payload}" for channel, payload in recorded if payload]
    command = [sys.executable, "-c", FLOOD, url, epoch, *arguments]
    process = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert await process.stdout.receive_some(), "it has not begun"
        yield
        assert process.poll() is None, "it has not stopped before"
    finally:
        process.kill()
        await process.wait()


@pytest.mark.parametrize("slow", [forged_notifications.FLOOD_POLL_TIME, 0.0], ids=["as it is", "polling in any case"])
async def test_flood_of_forged_notifications_delays_nothing(
    database_url: str, lowly_url: str, slow: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(forged_notifications, "FLOOD_POLL_TIME", slow)
    one, other = (PostgresLog(DatabaseSettings(url=database_url, publish_timeout=20)) for _ in range(2))
    count = 30
    async with running(one) as (_, publisher), running(other) as (there, _):
        async with listening(lowly_url) as (_, heard):
            await publisher.publish_seq("a", b"0")
            one.broadcast(Entry(0, 1, "a", b'"ephemeral"'))
            await has_come(heard, EPHEMERAL_CHANNEL)
            await has_come(heard, LOG_CHANNEL)
        began, before = trio.current_time(), other.statistics()
        async with flooding(lowly_url, one.epoch, list(heard)):
            for n in range(1, count):
                assert await publisher.publish_seq("a", b"%d" % n) == n + 1
                await there.wait_for(n + 1)

            async def flooded() -> bool:
                found = other.statistics()
                return found.rejected > before.rejected + 2000 and found.floods >= (slow == 0)

            await wait_until(flooded)
            await publisher.publish_seq("a", b"%d" % count)
            await there.wait_for(count + 1)
        after, elapsed = other.statistics(), trio.current_time() - began
    assert there.texts == [str(n) for n in range(count + 1)]
    assert [entry.payload for entry in there.messages] == [b'"ephemeral"']
    assert after.failures == 0
    assert after.jumps - before.jumps <= count
    # Forged notifications do not make a replica poll more often than its own limit.
    assert (
        after.polls - before.polls
        <= elapsed / min(polling_interval.BUSY_INTERVAL, notification_listener._HINTED_POLL_INTERVAL) + 10
    )
    lines = [record for record in caplog.records if "check which roles" in record.getMessage()]
    assert 1 <= len(lines) <= 2, "one for each replica"
    assert len(caplog.records) < 20


async def test_repeated_notification_of_another_epoch_causes_few_polls(database_url: str, lowly_url: str) -> None:
    """The notification was recorded before the log was set back, and no replica knows its epoch now."""
    log = PostgresLog(DatabaseSettings(url=database_url, publish_timeout=20))
    async with running(log) as (_, publisher), open_sql(database_url) as sql, listening(lowly_url) as (lowly, heard):
        await sql.fetch("SELECT catbus.notify('catbus', 'unknown:1:1')")
        await sql.fetch("SELECT catbus.notify('catbus_roles', '*')")
        await has_come(heard, ROLES_CHANNEL)
        began, before = trio.current_time(), log.statistics()
        for _ in range(1000):
            for channel, payload in heard[:2]:
                await lowly.fetch("SELECT pg_notify($1, $2)", channel, payload)
        await publisher.publish_seq("a", b"1")
        after = log.statistics()
        assert after.notifications - before.notifications >= 2000
        assert (
            after.polls - before.polls
            <= (trio.current_time() - began) / notification_listener._HINTED_POLL_INTERVAL + 10
        )


# Replicas of the previous release


def earlier(epoch: str, channel: str, payload: str) -> object:
    """Read a notification as version 0.1 does, which does not know its signature; raise the same errors."""
    if channel == ROLES_CHANNEL:
        return bytes.fromhex(payload) or "any"
    head, _, rest = payload.partition(" ")
    rest.partition(" ")
    one, two, three = head.split(":")
    if channel == EPHEMERAL_CHANNEL:
        assert one != epoch, "it would have looked at the seal, and logged"
        return None
    assert one == epoch
    return int(two), int(three)


async def test_replicas_of_the_previous_release_learn_positions_and_role_changes(database_url: str) -> None:
    log = PostgresLog(DatabaseSettings(url=database_url, publish_timeout=20))
    async with (
        running(log) as (_, publisher),
        listening(database_url) as (sql, heard),
        open_roles(DatabaseSettings(url=database_url)) as roles,
    ):
        await publisher.publish_seq("a", b"1")
        await sql.fetch("SELECT catbus.publish('a', '2')")
        log.broadcast(Entry(0, 1, "a", b'"ephemeral"'))
        await roles.create("x", Grants(("a",), ()))
        await has_come(heard, LOG_CHANNEL, 2)
        await has_come(heard, EPHEMERAL_CHANNEL)
        await has_come(heard, ROLES_CHANNEL, 2)
        positions = [earlier(log.epoch, LOG_CHANNEL, payload) for channel, payload in heard if channel == LOG_CHANNEL]
        assert positions == [(1, 1), (2, 2)]
        assert {
            earlier(log.epoch, EPHEMERAL_CHANNEL, payload) for channel, payload in heard if channel == EPHEMERAL_CHANNEL
        } == {None}
        assert "any" in [earlier(log.epoch, ROLES_CHANNEL, payload) for channel, payload in heard if payload == ""]
