"""Session events: what is published when sessions open and close, and what is logged about them."""

from __future__ import annotations

import io
import json
import logging
import time
from contextlib import AsyncExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

import catbus
from catbus import Broker, CloseCode, Config
from catbus.auth.grants import Grants, Identity
from catbus.auth.role_tokens import make_role_token
from catbus.auth.tokens import Authenticator, sign, token_kind
from catbus.cli.log_configuration import configure_logging
from catbus.config import EventsSettings
from catbus.log import MemoryLog
from catbus.protocol.channels import check_channel, is_reserved
from catbus.protocol.wire_messages import Publish, check_payload
from catbus.replica import Replica
from catbus.session.session_events import (
    BATCH_INTERVAL,
    BATCH_SIZE,
    MAX_WAITING,
    PREFIX,
    SENDER,
    CloseEvent,
    LostEvents,
    OpenEvent,
    channel_of,
)
from catbus.session.session_log import (
    CLIENT_INTERVAL,
    CLIENT_LINES,
    LINES_BURST,
    LINES_PER_SECOND,
    MAX_CLIENTS,
    REFUSALS_BURST,
    LineLimit,
    SessionLog,
)
from tests.brokers import CONFIG, SECRET, running
from tests.endpoints.event_source import events as event_source
from tests.test_both_transports import running as running_both_transports
from tests.test_replica import objects, open_client
from tests.test_specification import blocks, quoted, section, table

EVENTS = msgspec.structs.replace(CONFIG, events=EventsSettings(sessions=True))
ADMIN_KEY = "an admin key of the tests"


def token(client_id: str | None, grants: Grants = Grants.ALL) -> str:
    return sign(SECRET, client_id=client_id, grants=grants)


def auth(client_id: str | None, grants: Grants = Grants.ALL) -> bytes:
    return objects({"type": "auth", "token": token(client_id, grants), "protocol": 1})


# Channels


@pytest.mark.parametrize(
    ("client_id", "end"),
    [
        ("alice", "alice"),
        ("team.bob_2-x", "team.bob_2-x"),
        ("3f2c9a1e-5b0d-4f6e-9a77-0c1d2e3f4a5b", "3f2c9a1e-5b0d-4f6e-9a77-0c1d2e3f4a5b"),
        ("_", "_"),
        (None, "-"),
        ("", "-"),
        ("alice@example.com", "-ff8d9819fc0e12bf0d24892e45987e249a28dce836a85cad60e28eaaa8c6d976"),
        ("-", "-3973e022e93220f9212c18d0d0c543ae7c309e46640da93a4a0314de999f5112"),
        ("*", "-684888c0ebb17f374298b65ee2807526c066094c701bcc7ebbe1c1095f494fc1"),
    ],
)
def test_channel_names_the_client(client_id: str | None, end: str) -> None:
    assert channel_of(client_id) == "_catbus.sessions." + end


def test_specification_describes_channels_and_payloads() -> None:
    text = section("Publishing").partition("### 9.3 ")[2]
    for row in table(text, "`client_id`"):
        for example in quoted(row["Example"]):
            if example.startswith(PREFIX):
                end = example.removeprefix(PREFIX)
                client_id = None if end == "-" else "alice@example.com" if end.startswith("-") else end
                assert channel_of(client_id) == example
    kinds = {kind.__struct_config__.tag: kind for kind in (OpenEvent, CloseEvent, LostEvents)}
    described: dict[Any, set[str]] = {tag: set() for tag in kinds}
    for row in table(text, "Field", "In"):
        for tag in described if row["In"] == "all" else quoted(row["In"]):
            described[tag] |= set(quoted(row["Field"]))
    assert described == {tag: {"event", *kind.__struct_fields__} for tag, kind in kinds.items()}
    [(_, example_payload)] = blocks("session-event", within=text)
    found = msgspec.json.decode(example_payload, type=CloseEvent, strict=True)
    assert msgspec.to_builtins(found) == json.loads(example_payload)
    assert found.code in list(CloseCode)


client_ids = st.one_of(
    st.text(),
    st.text("a.-_*é\n", max_size=5),
    st.sampled_from(["x" * 238, "x" * 239, ".".join("x" * 30), ".".join("x" * 31), "x" * 5000, "a.", "-a"]),
    st.builds(lambda text: channel_of(text).removeprefix("_catbus.sessions."), st.text(min_size=1)),
)


@given(client_ids, client_ids)
def test_each_client_id_has_a_valid_channel_of_its_own(one: str, other: str) -> None:
    """Whatever characters it has, and however long it is: also if it looks like the channel of another client."""
    channel = channel_of(one)
    check_channel(channel)
    assert is_reserved(channel)
    assert (channel == channel_of(other)) == (one == other)


# What is published


async def read_events(broker: Broker, number: int) -> list[dict[str, Any]]:
    """Wait until so many events are in the log, and return them, each with its channel. All are the broker's."""
    async with broker.subscribe("_catbus.*", since=0) as messages:
        found = [await anext(messages) for _ in range(number)]
    assert {message.sender for message in found} <= {SENDER}
    return [{"channel": message.channel, **message.payload} for message in found]


@pytest.mark.parametrize("transport", ["websocket", "webtransport"])
async def test_open_and_close_of_a_session_are_published(tmp_path: Path, transport: str) -> None:
    """A subscription's own stream counts, too, also after its end."""
    async with running_both_transports(tmp_path, EVENTS) as (broker, websocket, found):
        webtransport = transport == "webtransport"
        url, ca = (found["webtransport"], found["certificate"]) if webtransport else (websocket, None)
        before = time.time() * 1000
        async with catbus.connect(url, token=token("alice"), ca=ca) as bus:
            async with bus.subscribe("a", stream=webtransport) as messages:
                for number in range(3):
                    await bus.publish("a", number)
                    await anext(messages)
            await bus.publish("b", 4)
        opened, closed = await read_events(broker, 2)
        common = {
            "channel": "_catbus.sessions.alice",
            "session": 1,
            "replica": broker.replica.id,
            "client_id": "alice",
            "transport": transport,
        }
        assert opened == {"event": "open", **common, "at": opened["at"]}
        assert before <= opened["at"] <= closed["at"] <= time.time() * 1000
        closing = {"code": None, "reason": "the connection ended", "messages_in": 4, "messages_out": 3}
        duration = closed["duration"]
        assert closed == {"event": "close", **common, **closing, "at": closed["at"], "duration": duration}
        assert 0 <= duration <= 60


async def test_open_and_close_of_an_event_stream_are_published() -> None:
    """Also of one that its grants do not allow: its token was valid."""
    async with running(EVENTS) as (broker, address):
        async with event_source(address, "pattern=a", token=token("alice")) as source:
            await broker.publish("a", 1)
            assert len(await source.seqs(1)) == 1
        narrow = token("bob", Grants(("b",), ()))
        async with event_source(address, "pattern=a", token=narrow) as source:
            assert source.status == 403
        found = await read_events(broker, 4)
    assert {event["transport"] for event in found} == {"sse"}
    assert [(event["client_id"], event["event"]) for event in found] == [
        (client_id, event) for client_id in ("alice", "bob") for event in ("open", "close")
    ]
    closed, refused = found[1], found[3]
    assert (closed["code"], closed["messages_out"]) == (None, 1)
    assert (refused["code"], refused["reason"]) == (4000, "no read grant covers this pattern")


async def test_log_has_a_line_when_an_event_stream_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "catbus.sessions")
    bad = sign("another secret of the tests", client_id="eve", grants=Grants.ALL)
    async with running() as (_, address), event_source(address, "pattern=a", token=bad) as source:
        assert source.status == 401
    [line] = lines(caplog)
    assert (line["event"], line["transport"], line["code"]) == ("session refused", "sse", 4001)
    assert bad not in repr([vars(record) for record in caplog.records])


async def test_nothing_is_published_unless_it_is_configured() -> None:
    assert Config().events == EventsSettings(sessions=False)
    async with running() as (broker, address):
        async with catbus.connect(f"ws://{address}/ws", token=token("alice")):
            pass
        while broker.replica.sessions:
            await trio.sleep(0.001)
        assert await broker.publish("a", 1) == 1


@pytest.fixture
async def replica(nursery: trio.Nursery) -> Replica:
    """A replica that publishes session events, with a log in memory. Its task for them does not run."""
    config = Config(events=EventsSettings(sessions=True))
    replica = Replica(config, MemoryLog(), Authenticator([SECRET], admin_key=ADMIN_KEY))
    await nursery.start(replica.log.run, replica.delivery)
    return replica


async def history(replica: Replica) -> list[dict[str, Any]]:
    entries, _ = await replica.log.history("_catbus.*", before=None, limit=20_000)
    return [json.loads(entry.payload) for entry in entries]


async def test_session_that_is_never_authenticated_is_not_published(replica: Replica, nursery: trio.Nursery) -> None:
    nursery.start_soon(replica.session_events.run)
    silent, refused = open_client(replica), open_client(replica)
    await refused.receive(objects({"type": "auth", "token": "sub-x.y", "protocol": 1}))
    assert refused.closing is not None
    for client in (silent, refused):
        client.end()
    await wait_all_tasks_blocked()
    assert await history(replica) == []


async def test_renewed_token_does_not_open_the_session_again(replica: Replica, nursery: trio.Nursery) -> None:
    nursery.start_soon(replica.session_events.run)
    client = open_client(replica)
    for _ in range(3):
        await client.receive(auth("alice"))
    await client.receive(auth("bob"))
    client.end()
    client.end()
    with trio.fail_after(5):
        await replica.session_events.flush()
    assert [event["event"] for event in await history(replica)] == ["open", "close"]


async def test_close_says_why_the_broker_closed_the_session(replica: Replica, nursery: trio.Nursery) -> None:
    nursery.start_soon(replica.session_events.run)
    client = open_client(replica)
    await client.receive(auth("alice"))
    client.close(CloseCode.REVOKED, "the role was deleted")
    client.end()
    with trio.fail_after(5):
        await replica.session_events.flush()
    _, closed = await history(replica)
    assert (closed["code"], closed["reason"]) == (4403, "the role was deleted")


async def test_stopping_replica_publishes_the_ends_of_its_sessions() -> None:
    clients = 20
    async with trio.open_nursery() as nursery:
        broker = await nursery.start(catbus.serve, EVENTS)
        [(_, address)] = broker.addresses
        async with AsyncExitStack() as stack:
            for number in range(clients):
                link = catbus.connect(f"ws://{address}/ws", token=token(f"client-{number}"), reconnect=False)
                await stack.enter_async_context(link)
            broker.stop()
            with trio.fail_after(30):
                while broker.replica.sessions or broker.replica.log.available:
                    await trio.sleep(0.001)
    found = await history(broker.replica)
    closed = [event for event in found if event["event"] == "close"]
    assert {event["client_id"] for event in closed} == {f"client-{number}" for number in range(clients)}
    assert {event["code"] for event in closed} <= {CloseCode.SHUTTING_DOWN, None}
    assert len(found) == 2 * clients


# Many events


def storm(replica: Replica, number: int) -> None:
    """Publish as many events: sessions that open."""
    events = replica.session_events
    client = open_client(replica)
    client.session.identity = Identity("alice", Grants.ALL, None)
    opened = replica.sessions[client]
    for _ in range(number):
        events.opened(opened)


async def test_events_are_appended_in_batches_with_pauses(
    replica: Replica, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """Thousands of sessions that open at once need a few appends, and leave time between two of them."""
    storm(replica, 4 * BATCH_SIZE)
    began = trio.current_time()
    nursery.start_soon(replica.session_events.run)
    sizes, times = [0], []
    while sizes[-1] < 4 * BATCH_SIZE:
        await wait_all_tasks_blocked()
        if replica.log.applied > sizes[-1]:
            sizes.append(replica.log.applied)
            times.append(trio.current_time() - began)
        await trio.sleep(BATCH_INTERVAL / 4)
    assert sizes == [0, BATCH_SIZE, 2 * BATCH_SIZE, 3 * BATCH_SIZE, 4 * BATCH_SIZE]
    assert all(later - earlier >= BATCH_INTERVAL - 1e-6 for earlier, later in pairwise(times))
    assert replica.session_events.counts == {"published": 4 * BATCH_SIZE, "dropped": 0}


async def test_full_queue_drops_the_oldest_events_and_says_how_many(
    replica: Replica, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    storm(replica, 7)
    lost = open_client(replica)
    await lost.receive(auth("bob"))
    storm(replica, MAX_WAITING)
    assert replica.session_events.waiting == MAX_WAITING
    nursery.start_soon(replica.session_events.run)
    with trio.fail_after(60):
        await replica.session_events.flush()
    found = await history(replica)
    assert found[0] == {"event": "lost", "number": 8, "replica": replica.id, "at": found[0]["at"]}
    assert [event["client_id"] for event in found[1:]] == ["alice"] * MAX_WAITING
    assert replica.session_events.counts == {"published": MAX_WAITING + 1, "dropped": 8}
    entries, _ = await replica.log.history("_catbus.sessions.-", before=None, limit=10)
    assert len(entries) == 1


async def test_publishes_do_not_wait_behind_events(nursery: trio.Nursery) -> None:
    """A publish that is submitted after 500 events is among the first messages of the log."""
    replica = Replica(Config(events=EventsSettings(sessions=True)), MemoryLog(), Authenticator([SECRET]))
    storm(replica, BATCH_SIZE)
    nursery.start_soon(replica.session_events.run)
    await wait_all_tasks_blocked()
    outcomes: list[Any] = []

    async def publish() -> None:
        identity = Identity("carol", Grants.ALL, None)
        outcomes.extend(await replica.publish(identity, [Publish("a", check_payload(b"1"))]))

    nursery.start_soon(publish)
    await wait_all_tasks_blocked()
    await nursery.start(replica.log.run, replica.delivery)
    with trio.fail_after(5):
        await replica.session_events.flush()
    [committed] = outcomes
    assert committed.seq < BATCH_SIZE / 10


# Log lines


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """The fields of the lines about sessions."""
    names = ["client_id", "address", "session", "transport", "auth", "code", "reason", "duration"]
    names += ["messages_in", "messages_out", "left_out"]
    return [
        {"event": record.message, **{name: getattr(record, name) for name in names if hasattr(record, name)}}
        for record in caplog.records
        if record.name == "catbus.sessions"
    ]


async def test_log_has_a_line_when_a_session_opens_and_closes(
    replica: Replica, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "catbus.sessions")
    client = open_client(replica, "10.0.0.1")
    await client.receive(auth("alice"))
    await client.receive(objects({"type": "publish", "channel": "a", "payload": 1}))
    client.close(CloseCode.SHUTTING_DOWN, "the replica is stopping")
    client.end()
    opened, closed = lines(caplog)
    common = {"client_id": "alice", "address": "10.0.0.1", "session": 1, "transport": "test", "auth": "sub"}
    assert opened == {"event": "session opened", **common}
    assert closed == {
        "event": "session closed",
        **common,
        "code": int(CloseCode.SHUTTING_DOWN),
        "reason": "the replica is stopping",
        "duration": closed["duration"],
        "messages_in": 1,
        "messages_out": 0,
    }
    assert token("alice") not in repr([vars(record) for record in caplog.records])


async def test_log_has_a_line_when_a_session_is_refused(replica: Replica, caplog: pytest.LogCaptureFixture) -> None:
    """For a bad token as well as for none. A peer that leaves by itself has no line."""
    caplog.set_level(logging.INFO, "catbus.sessions")
    bad = sign("another secret of the tests", client_id="eve", grants=Grants.ALL)
    refused, silent, left = (open_client(replica, "10.0.0.2") for _ in range(3))
    await refused.receive(objects({"type": "auth", "token": bad, "protocol": 1}))
    silent.session.check_deadline(silent.session.deadline)
    for client in (refused, silent, left):
        client.end()
    found = lines(caplog)
    common = {"event": "session refused", "client_id": None, "address": "10.0.0.2", "transport": "test"}
    assert [{name: line[name] for name in common} for line in found] == [common] * 2
    assert [(line["session"], line["auth"], line["code"]) for line in found] == [
        (1, "sub", int(CloseCode.UNAUTHENTICATED)),
        (2, "", int(CloseCode.AUTH_TIMEOUT)),
    ]
    assert bad not in repr([vars(record) for record in caplog.records])


@pytest.mark.parametrize(
    ("given_token", "kind"),
    [
        (token("alice"), "sub"),
        (make_role_token(), "role"),
        ("eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJhIn0.c2ln", "jwt"),
        ("hunter2", "other"),
        ("", "other"),
    ],
    ids=["sub", "role", "jwt", "other", "empty"],
)
def test_kind_of_a_token_tells_nothing_of_it(given_token: str, kind: str) -> None:
    assert token_kind(given_token) == kind


async def test_log_names_the_admin_key_without_showing_it(replica: Replica, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "catbus.sessions")
    client = open_client(replica)
    await client.receive(objects({"type": "auth", "token": ADMIN_KEY, "protocol": 1}))
    client.end()
    assert [line["auth"] for line in lines(caplog)] == ["admin key"] * 2
    assert ADMIN_KEY not in repr([vars(record) for record in caplog.records])


async def test_kind_of_token_is_not_redacted() -> None:
    stream = io.StringIO()
    levels = {name: logging.getLogger(name).level for name in ("", "catbus")}
    handlers = logging.getLogger().handlers[:]
    configure_logging("catbus=info", "json", stream)
    try:
        SessionLog().opened(0.0, "alice", "10.0.0.1", auth="sub")
    finally:
        logging.getLogger().handlers[:] = handlers
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
    assert json.loads(stream.getvalue())["auth"] == "sub"


async def test_client_that_connects_without_end_cannot_flood_the_log(
    replica: Replica, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    """Other clients have their lines, and a later line has the number of those that were left out."""
    caplog.set_level(logging.INFO, "catbus.sessions")

    async def connect(client_id: str) -> None:
        client = open_client(replica, "10.0.0.1")
        await client.receive(auth(client_id))
        client.end()

    for _ in range(CLIENT_LINES):
        await connect("mallory")
    await connect("alice")
    found = lines(caplog)
    assert [line["client_id"] for line in found] == ["mallory"] * CLIENT_LINES + ["alice"] * 2
    assert [line.get("left_out") for line in found[-2:]] == [CLIENT_LINES, None]
    await trio.sleep(CLIENT_INTERVAL)
    await connect("mallory")
    assert len(lines(caplog)) == len(found) + 2


async def test_refused_peers_take_no_lines_from_others(
    replica: Replica, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    caplog.set_level(logging.INFO, "catbus.sessions")
    for number in range(LINES_BURST + 10):
        peer = open_client(replica, f"10.0.{number // 250}.{number % 250}")
        peer.close(CloseCode.AUTH_TIMEOUT, "no auth in time")
        peer.end()
    assert len(lines(caplog)) == REFUSALS_BURST
    client = open_client(replica, "10.0.0.1")
    await client.receive(auth("alice"))
    assert lines(caplog)[-1]["event"] == "session opened"


def test_all_lines_together_are_limited() -> None:
    limit = LineLimit(LINES_PER_SECOND, LINES_BURST)
    permitted = [limit.permits(f"client {number}", 1000.0) for number in range(2 * LINES_BURST)]
    assert permitted == [True] * LINES_BURST + [False] * LINES_BURST
    assert limit.left_out == LINES_BURST
    assert [limit.permits(f"later {number}", 1001.0) for number in range(2 * LINES_PER_SECOND)].count(True) == (
        LINES_PER_SECOND
    )


def test_memory_for_the_limits_is_bounded() -> None:
    limit = LineLimit(1e9, 1e9)
    permitted = [limit.permits(f"client {number}", 1000.0) for number in range(MAX_CLIENTS + 5)]
    assert permitted == [True] * MAX_CLIENTS + [False] * 5
    assert limit.permits("client 1", 1000.0)
    assert limit.permits("client x", 1000.0 + CLIENT_INTERVAL)


async def test_level_of_the_logger_turns_the_lines_off(replica: Replica, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "catbus.sessions")
    client = open_client(replica)
    await client.receive(auth("alice"))
    client.end()
    assert lines(caplog) == []
