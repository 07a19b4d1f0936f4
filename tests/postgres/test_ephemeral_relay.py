"""The ephemeral relay on a real PostgreSQL: messages reach all other replicas at most once, and in order."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock

import catbus
from catbus import Broker, Config
from catbus.config import DatabaseSettings
from catbus.log import EPHEMERAL_SIZE, Entry, RecentMessages
from catbus.postgres import PostgresLog
from catbus.postgres.access.asyncpg_bridge import DatabaseConnection
from catbus.postgres.ephemeral import ephemeral_relay
from catbus.postgres.ephemeral.encoding import EphemeralEncoder, encode_message
from catbus.postgres.ephemeral.ephemeral_relay import EphemeralRelay
from catbus.postgres.follow.log_tail import LogTail
from catbus.postgres.notifications.encryption import EPHEMERAL_CHANNEL
from tests.brokers import CONFIG, TOKEN
from tests.brokers import running as running_broker
from tests.endpoints.raw_peer import Peer, masked
from tests.log.harness import TEST_TIMEOUT, Publisher, RecordingFollower, running
from tests.postgres.proxy import open_proxy
from tests.postgres.sql import open_sql, wait_until

ALICE = b"alice-----------"
SHORT = 50
"""Number of short messages that fit into one statement."""


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep messages longer: on a busy machine a connection may take longer than their maximum age."""
    monkeypatch.setattr(ephemeral_relay, "MAX_WAIT", TEST_TIMEOUT)


def make(url: str) -> PostgresLog:
    return PostgresLog(DatabaseSettings(url=url, publish_timeout=20))


def message(payload: object, **fields: Any) -> Entry:
    return Entry(0, 1_763_912_345_678, "a.b", json.dumps(payload).encode(), **fields)


def payloads(follower: RecordingFollower) -> list[object]:
    return [json.loads(entry.payload) for entry in follower.messages]


async def heard(follower: RecordingFollower, last: object) -> list[object]:
    """Wait until the follower has received `last`, and return all payloads."""
    await follower.wait_until(lambda self: bool(self.messages) and json.loads(self.messages[-1].payload) == last)
    return payloads(follower)


async def until(log: PostgresLog, reached: Callable[[Any], bool]) -> None:
    """Poll the statistics until a condition holds."""

    async def look() -> bool:
        return reached(log.statistics())

    await wait_until(look)


@asynccontextmanager
async def two(
    url: str, other_url: str | None = None
) -> AsyncIterator[tuple[PostgresLog, RecordingFollower, RecordingFollower]]:
    """Two replicas: the log of the first, and the followers of both."""
    one, other = make(other_url or url), make(url)
    async with running(one) as (here, _), running(other) as (there, _):
        await until(one, lambda _: one.available and other.available)
        yield one, here, there


async def test_message_reaches_the_follower_of_every_other_replica(database_url: str) -> None:
    one, other, third = make(database_url), make(database_url), make(database_url)
    entry = message({"text": "é☃𝄞", "n": 1e30}, sender='o"brien\n☃', origin=ALICE)
    async with running(one) as (here, _), running(other) as (there, _), running(third) as (elsewhere, _):
        one.broadcast(entry)
        for follower in (there, elsewhere):
            await heard(follower, {"text": "é☃𝄞", "n": 1e30})
            assert follower.messages == [entry]
        # Notifications arrive in one order, so the replica's own message would precede this one.
        other.broadcast(message("back"))
        assert await heard(here, "back") == ["back"]
        assert await heard(elsewhere, "back") == [{"text": "é☃𝄞", "n": 1e30}, "back"]
        assert payloads(there) == [{"text": "é☃𝄞", "n": 1e30}]
        assert here.entries == there.entries == []
        assert one.applied == 0
        await until(one, lambda statistics: statistics.ephemeral_sent == statistics.ephemeral_received == 1)
        assert one.statistics().ephemeral_dropped == 0


async def test_largest_message_is_delivered(database_url: str) -> None:
    sender = "\x01é" * 300
    room = EPHEMERAL_SIZE - len("a.b") - len(msgspec.json.encode(sender)) - len('""')
    async with two(database_url) as (one, _, there):
        one.broadcast(message("x" * room, sender=sender, origin=ALICE))
        one.broadcast(message("x" * 8000))
        one.broadcast(message("end"))
        assert await heard(there, "end") == ["x" * room, "end"]
        await until(one, lambda statistics: (statistics.ephemeral_sent, statistics.ephemeral_dropped) == (2, 1))


async def test_burst_arrives_once_and_in_order_in_few_statements(database_url: str) -> None:
    count = 5000
    async with two(database_url) as (one, here, there):
        for n in range(count):
            one.broadcast(message(n))
        assert await heard(there, count - 1) == list(range(count))
        assert payloads(here) == []
        await until(one, lambda statistics: statistics.ephemeral_sent == count)
        assert one.statistics().ephemeral_dropped == 0
        assert one.statistics().ephemeral_statements <= 3


async def test_connection_is_opened_when_there_is_something_to_send(database_url: str) -> None:
    async with open_proxy(database_url) as proxy, two(database_url, proxy.url) as (one, _, there):
        before = proxy.accepted
        for n in range(3):
            one.broadcast(message(n))
            await heard(there, n)
        assert proxy.accepted == before + 1


async def test_two_replicas_send_to_each_other_at_once(database_url: str) -> None:
    one, other = make(database_url), make(database_url)
    async with running(one) as (here, alice), running(other) as (there, _):
        for n in range(300):
            one.broadcast(message(n))
            other.broadcast(message(n))
            await alice.publish_seq("a", b"%d" % n)
        assert await heard(there, 299) == await heard(here, 299) == list(range(300))
        await there.wait_for(300)


# Foreign notifications


@pytest.mark.parametrize(
    "forge",
    [
        lambda card: "",
        lambda card: "nonsense",
        lambda card: card,
        lambda card: card[:-4],
        lambda card: card.split(":")[0],
        lambda card: card[:40] + ("A" if card[40] != "A" else "B") + card[41:],
        lambda card: "another-epoch" + card[card.index(":") :],
        lambda card: card[:3] + "é" * 32,
    ],
    ids=["empty", "nonsense", "again", "cut short", "bare", "changed", "another epoch", "not ASCII"],
)
async def test_forged_notification_is_not_delivered(database_url: str, forge: Callable[[str], str]) -> None:
    cards: list[str] = []
    overheard = trio.Event()

    def hear(_: int, card: str) -> None:
        cards.append(card)
        overheard.set()

    one, other = make(database_url), make(database_url)
    async with running(one), running(other) as (there, publisher), open_sql(database_url) as sql:
        await sql.listen(EPHEMERAL_CHANNEL, hear)
        one.broadcast(message("first"))
        await heard(there, "first")
        await overheard.wait()
        await sql.fetch("SELECT pg_notify($1, $2)", EPHEMERAL_CHANNEL, forge(cards[0]))
        one.broadcast(message("second"))
        assert await heard(there, "second") == ["first", "second"]
        assert await publisher.publish_seq("a", b"1") == 1
        statistics = other.statistics()
        assert (statistics.ephemeral_received, statistics.failures, statistics.restarts) == (2, 0, 0)
        assert statistics.rejected == 1


async def test_log_notification_is_not_an_ephemeral_message(database_url: str) -> None:
    """Both are encrypted with the same secret."""
    hints: list[str] = []
    async with two(database_url) as (one, _, there), open_sql(database_url) as sql:
        await sql.listen("catbus", lambda _, payload: hints.append(payload))
        publisher = Publisher(one)
        await publisher.publish_seq("a", b"1")
        await there.wait_for(1)
        await wait_until(_is_there(hints))
        await sql.fetch("SELECT pg_notify($1, $2)", EPHEMERAL_CHANNEL, hints[0])
        one.broadcast(message("true"))
        assert await heard(there, "true") == ["true"]


def _is_there(things: list[str]) -> Callable[[], Any]:
    async def look() -> bool:
        return bool(things)

    return look


# At most once


async def test_message_delayed_by_an_outage_is_dropped_when_it_is_old(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_proxy(database_url) as proxy, two(database_url, proxy.url) as (one, _, there):
        one.broadcast(message("before"))
        await heard(there, "before")
        await until(one, lambda statistics: statistics.ephemeral_sent == 1)
        proxy.close()
        one.broadcast(message("lost"))
        await proxy.wait_refused()
        assert not one.available
        for n in range(SHORT):
            one.broadcast(message(n))
        monkeypatch.setattr(ephemeral_relay, "MAX_WAIT", 0.0)
        proxy.open()
        await until(one, lambda statistics: statistics.ephemeral_dropped == SHORT + 1)
        monkeypatch.setattr(ephemeral_relay, "MAX_WAIT", TEST_TIMEOUT)
        await until(one, lambda _: one.available)
        one.broadcast(message("after"))
        assert await heard(there, "after") == ["before", "after"]
        await until(one, lambda statistics: statistics.ephemeral_sent == 2)
        assert one.statistics().ephemeral_dropped == SHORT + 1


async def test_message_delayed_by_a_short_outage_is_delivered(database_url: str) -> None:
    async with open_proxy(database_url) as proxy, two(database_url, proxy.url) as (one, _, there):
        proxy.close()
        for n in range(SHORT):
            one.broadcast(message(n))
        await proxy.wait_refused()
        proxy.open()
        assert await heard(there, SHORT - 1) == list(range(SHORT))
        assert one.statistics().ephemeral_dropped == 0


async def test_message_in_doubt_is_not_sent_again(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection breaks between the commit and its reply."""
    fetchrow = DatabaseConnection.fetchrow
    failures = iter([OSError("the answer is lost")])

    async def lossy(self: DatabaseConnection, query: str, *args: object, **options: Any) -> Any:
        row = await fetchrow(self, query, *args, **options)
        if "pg_notify" in query and (failure := next(failures, None)):
            raise failure
        return row

    monkeypatch.setattr(DatabaseConnection, "fetchrow", lossy)
    async with two(database_url) as (one, _, there):
        one.broadcast(message("in doubt"))
        await until(one, lambda statistics: statistics.ephemeral_dropped == 1)
        one.broadcast(message("next"))
        assert await heard(there, "next") == ["in doubt", "next"]
        await until(one, lambda statistics: statistics.ephemeral_sent == 1)
        assert one.statistics().ephemeral_dropped == 1
        assert one.available


async def test_relay_gives_up_on_a_database_that_does_not_reply(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_proxy(database_url) as proxy, two(database_url, proxy.url) as (one, _, there):
        one.broadcast(message("before"))
        await heard(there, "before")
        await until(one, lambda statistics: statistics.ephemeral_sent == 1)
        monkeypatch.setattr(ephemeral_relay, "SEND_TIMEOUT", 0.2)
        proxy.block()
        one.broadcast(message("in doubt"))
        await until(one, lambda statistics: statistics.ephemeral_dropped == 1)
        proxy.cut()
        proxy.unblock()
        monkeypatch.setattr(ephemeral_relay, "SEND_TIMEOUT", TEST_TIMEOUT)
        one.broadcast(message("after"))
        assert (await heard(there, "after"))[-1] == "after"
        assert payloads(there).count("in doubt") <= 1


async def test_ephemeral_relay_does_not_delay_the_log(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The relay cannot connect, as when the database has no connection left."""
    one, other = make(database_url), make(database_url)

    async def refuse() -> DatabaseConnection:
        raise OSError("too many connections")

    connect = one._relay._connect
    monkeypatch.setattr(one._relay, "_connect", refuse)
    async with running(one) as (_, publisher), running(other) as (there, _):
        await until(one, lambda _: one.available)
        one.broadcast(message("late"))
        await until(one, lambda statistics: statistics.restarts >= 2)
        assert one.available
        assert await publisher.publish_seq("a", b"1") == 1
        monkeypatch.setattr(one._relay, "_connect", connect)
        assert await heard(there, "late") == ["late"]


async def test_full_notification_queue_is_left_alone(database_url: str) -> None:
    async with two(database_url) as (one, _, there), open_sql(database_url) as stopped, open_sql(database_url) as sql:
        await stopped.execute("LISTEN others")
        await stopped.execute("BEGIN; SELECT 1")
        for start in range(0, 1200, 70):
            await sql.execute(
                f"SELECT pg_notify('others', repeat('x', 7900) || i) FROM generate_series({start}, {start + 69}) AS i"
            )
            (usage,) = await sql.fetchrow("SELECT pg_notification_queue_usage()")
            if usage > 0.5:
                break
        else:
            pytest.skip("this server's queue of notifications is too big to be filled")
        one.broadcast(message("lost"))
        await until(one, lambda statistics: statistics.ephemeral_dropped == 1)
        await stopped.execute("ROLLBACK")
        await wait_until(lambda: _is_free(sql))
        one.broadcast(message("next"))
        assert await heard(there, "next") == ["next"]
        assert one.available


async def _is_free(sql: DatabaseConnection) -> bool:
    await sql.execute("NOTIFY others")
    (usage,) = await sql.fetchrow("SELECT pg_notification_queue_usage()")
    return bool(usage < 0.4)


# Batches


class Sent(DatabaseConnection):
    """A connection that records each statement and its time."""

    closed = False

    def __init__(self, tail: LogTail) -> None:
        self.tail = tail
        self.statements: list[tuple[float, list[object]]] = []
        self.connected = 0
        self._encoder = EphemeralEncoder()

    def terminate(self) -> None:
        pass

    async def connect(self) -> DatabaseConnection:
        self.connected += 1
        self.closed = False
        return self

    async def fetchrow(self, query: str, *args: Any, timeout: float = 0) -> Any:
        assert not self.closed
        tail = self.tail
        entries = [
            entry for card in args[1] for entry in self._encoder.decode(card, "epoch", tail.keys, tail.database_time())
        ]
        self.statements.append((round(trio.current_time(), 3), [json.loads(entry.payload) for entry in entries]))
        return ["off", "1s", len(args[1])]


async def test_first_message_is_sent_at_once_and_the_next_ones_in_a_batch(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    tail = LogTail(RecentMessages(0))
    connection = Sent(tail)
    tail.epoch = "epoch"
    relay = EphemeralRelay(connection.connect, tail)
    nursery.start_soon(relay.run, lambda: None)
    for begin in (1, 2):
        await trio.sleep_until(begin)
        assert connection.connected == begin - 1
        for n in range(25):
            relay.broadcast(message(n))
            await trio.sleep_until(begin + n / 1000 + 0.0005)
        await trio.sleep_until(begin + 0.5)
        assert connection.statements == [
            (begin, [0]),
            (begin + 0.01, list(range(1, 11))),
            (begin + 0.02, list(range(11, 21))),
            (begin + 0.03, list(range(21, 25))),
        ]
        connection.statements.clear()
        # The connection is lost silently; the next message uses another one.
        connection.closed = True
    assert relay.sent == 50


LARGE = message("x" * 1000)


@pytest.mark.parametrize(
    ("entry", "room"),
    [
        (message(1), ephemeral_relay.QUEUED_MESSAGES),
        (LARGE, ephemeral_relay.QUEUED_BYTES // len(encode_message(LARGE))),
    ],
    ids=["messages", "bytes"],
)
async def test_relay_queue_is_limited(
    entry: Entry, room: int, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    tail = LogTail(RecentMessages(0))
    connection = Sent(tail)
    relay = EphemeralRelay(connection.connect, tail)
    for _ in range(room + 5):
        relay.broadcast(entry)
    assert relay.dropped == 5
    tail.restart("epoch", 0, 1)
    nursery.start_soon(relay.run, lambda: None)
    await trio.sleep(0.1)
    assert [len(payloads) for _, payloads in connection.statements] == [room]
    assert (relay.sent, relay.dropped) == (room, 5)
    relay.broadcast(entry)
    await trio.sleep(0.1)
    assert relay.sent == room + 1, "there is room again"


async def test_old_messages_make_room_for_new_ones(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    tail = LogTail(RecentMessages(0))
    connection = Sent(tail)
    relay = EphemeralRelay(connection.connect, tail)
    nursery.start_soon(relay.run, lambda: None)
    for n in range(3):
        await trio.sleep(ephemeral_relay.MAX_WAIT * 1.1)
        for _ in range(ephemeral_relay.QUEUED_MESSAGES):
            relay.broadcast(message(n))
    tail.restart("epoch", 0, 1)
    await trio.sleep(0.1)
    assert [payloads for _, payloads in connection.statements] == [[2] * ephemeral_relay.QUEUED_MESSAGES]
    assert (relay.sent, relay.dropped) == (ephemeral_relay.QUEUED_MESSAGES, 2 * ephemeral_relay.QUEUED_MESSAGES)


# Complete brokers


@asynccontextmanager
async def replica(url: str) -> AsyncIterator[tuple[Broker, str]]:
    """A broker that is connected to its database, and its address."""
    config: Config = msgspec.structs.replace(CONFIG, database=DatabaseSettings(url=url))
    async with running_broker(config) as (broker, address):
        await broker.replica.log.wait_open()
        yield broker, address


async def test_message_reaches_sessions_of_another_replica(database_url: str) -> None:
    async with (
        replica(database_url) as (_, address),
        replica(database_url) as (broker, other_address),
        catbus.connect(f"ws://{address}/ws", token=TOKEN) as bus,
        catbus.connect(f"ws://{other_address}/ws", token=TOKEN) as other,
        bus.subscribe("cursors.*") as own,
        other.subscribe("cursors.*") as messages,
        broker.subscribe("cursors.*") as local,
    ):
        assert await bus.publish("cursors.alice", [12, 80], ephemeral=True) is None
        for received in (await anext(messages), await anext(local), await anext(own)):
            assert (received.channel, received.payload, received.seq) == ("cursors.alice", [12, 80], None)
            assert received.sender == "alice"
        assert await broker.publish("cursors.broker", 1, ephemeral=True) is None
        assert (await anext(own)).payload == 1
        assert (await anext(messages)).payload == 1
        assert await bus.publish("cursors.alice", "durable") == 1
        assert (await anext(messages)).seq == (await anext(own)).seq == 1


async def test_producer_without_echo_gets_no_echo_on_another_replica(database_url: str) -> None:
    async with (
        replica(database_url) as (_, address),
        replica(database_url) as (_, other_address),
        catbus.connect(f"ws://{address}/ws", token=TOKEN) as bus,
    ):
        host, _, port = other_address.rpartition(":")
        async with await trio.open_tcp_stream(host, int(port)) as stream:
            peer = Peer(stream)
            await peer.upgrade()
            auth = {"type": "auth", "token": TOKEN, "protocol": 1, "producer": bus.producer}
            await peer.send(masked(1, json.dumps([auth])[1:-1].encode() + b'{"type":"subscribe","pattern":"a"}'))
            heard: list[Any] = []
            while not heard or heard[-1]["type"] != "subscribed":
                heard += map(json.loads, (await peer.frame()).payload.splitlines())
            assert heard[0]["producer"] == bus.producer
            await bus.publish("a", "hidden", ephemeral=True, echo=False)
            await bus.publish("a", "shown", ephemeral=True)
            [received] = map(json.loads, (await peer.frame()).payload.splitlines())
            assert received["payload"] == "shown"
