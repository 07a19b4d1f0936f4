"""Retained messages on a broker in this process: what clients publish, and what subscriptions to them get."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock

from catbus import Broker, Refused
from catbus.delivery.send_queue import SendQueue
from catbus.error_codes import ErrorCode
from catbus.errors import ConflictError
from catbus.protocol.wire_messages import ProtocolVersion
from catbus.session.driver import SessionDriver
from catbus.testing import TestBroker, open_test_broker
from tests.brokers import CONFIG, request, running
from tests.endpoints.event_source import events

Message = dict[str, Any]


class Wire:
    """A session of a broker in this process, and the objects that it is sent."""

    def __init__(self, broker: TestBroker) -> None:
        self.objects: list[Message] = []
        self.reading = True
        self.session: SessionDriver = broker.broker.replica.open_session(self, transport="websocket", network="test")
        self._streams: list[SendQueue] = []
        self._arrived = trio.Event()

    def flush(self) -> None:
        if not self.reading:
            return
        for item in self.session.send_queue.take():
            first = self.session.session.protocol is ProtocolVersion.FIRST
            lines = item if isinstance(item, bytes) else b"".join(item.first_version_lines) if first else item.lines
            self.objects += [json.loads(line) for line in lines.splitlines()]
        self._arrived.set()

    async def send(self, **message: Any) -> None:
        await self.session.receive(json.dumps(message).encode())

    async def next(self) -> Message:
        while not self.objects:
            self._arrived = trio.Event()
            await self._arrived.wait()
        return self.objects.pop(0)

    async def publish(self, channel: str, payload: Any, **fields: Any) -> Message:
        await self.send(type="publish", channel=channel, payload=payload, **fields)
        return await self.next()

    async def subscribe(self, pattern: str, **fields: Any) -> Message:
        await self.send(type="subscribe", pattern=pattern, **fields)
        return await self.next()

    async def snapshot(self, pattern: str) -> list[tuple[str, Any, int]]:
        """The messages of a snapshot up to its end."""
        messages: list[Message] = []
        while True:
            page = await self.next()
            assert (page["type"], page["pattern"]) == ("retained", pattern)
            messages += page["messages"]
            if page["complete"]:
                assert all(message["retain"] and "pattern" not in message for message in messages)
                return [(message["channel"], message["payload"], message["seq"]) for message in messages]


@asynccontextmanager
async def connected(broker: TestBroker, *, protocol: int = 1) -> AsyncIterator[Wire]:
    wire = Wire(broker)
    try:
        await wire.send(type="auth", token=broker.token("alice"), protocol=protocol)
        assert (await wire.next())["type"] == "auth_ok"
        yield wire
    finally:
        wire.session.end()


@pytest.fixture
async def broker(autojump_clock: MockClock) -> AsyncIterator[TestBroker]:
    async with open_test_broker() as broker:
        yield broker


async def test_publish_over_the_expected_message_succeeds_and_any_other_is_a_conflict(broker: TestBroker) -> None:
    async with connected(broker) as wire:
        assert (await wire.publish("a", 1, retain=True, expect=0, id=1))["seq"] == 1
        second = await wire.publish("a", 2, retain=True, expect=0, id=2)
        assert (second["type"], second["code"], second["seq"], second["id"]) == ("publish_error", "conflict", 1, 2)
        assert (await wire.publish("a", 2, retain=True, expect=1, id=3))["seq"] == 2
        assert (await wire.publish("a", 3, id=4))["seq"] == 3, "it changes no state"
        assert (await wire.publish("a", None, retain=True, expect=2, id=5))["seq"] == 4
        assert (await wire.publish("a", 4, retain=True, expect=4, id=6))["seq"] == 0
        repeated = await wire.publish("a", 2, retain=True, expect=1, id=3)
        assert (repeated["seq"], repeated["duplicate"]) == (2, True), "a retry is no conflict"


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"expect": 0}, "bad_message"),
        ({"retain": True, "ephemeral": True}, "bad_message"),
        ({"retain": True, "expect": 0, "ephemeral": True}, "bad_message"),
    ],
)
async def test_contradictory_publish_is_rejected(broker: TestBroker, fields: Message, code: str) -> None:
    async with connected(broker) as wire:
        await wire.subscribe("*")
        reply = await wire.publish("a", 1, id=1, **fields)
        assert (reply["type"], reply["code"], reply["id"]) == ("publish_error", code, 1)
        assert (await wire.publish("b", 1, id=2))["seq"] == 1, "nothing was published"


@pytest.mark.parametrize("fields", [{"retain": None}, {"retain": 1}, {"retain": True, "expect": -1}, {"expect": "1"}])
async def test_field_of_another_type_is_rejected(broker: TestBroker, fields: Message) -> None:
    async with connected(broker) as wire:
        reply = await wire.publish("a", 1, id=1, **fields)
        assert (reply["type"], reply["code"], reply["id"]) == ("error", "bad_message", 1)


async def test_of_two_publishes_with_the_same_expectation_one_succeeds(broker: TestBroker) -> None:
    outcomes: list[int | str] = []

    async def increment(expected: int) -> None:
        try:
            outcomes.append(await broker.broker.publish("a", expected, retain=True, expect=expected) or 0)
        except ConflictError as error:
            outcomes.append(f"conflict {error.seq}")

    for number in range(5):
        outcomes.clear()
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(increment, number)
        assert sorted(map(str, outcomes)) == [str(number + 1), *[f"conflict {number + 1}"] * 3]


async def test_subscription_gets_the_state_and_then_its_changes(broker: TestBroker) -> None:
    async with connected(broker) as wire:
        for channel, payload in [("a.b", 1), ("a.a", 2), ("b", 3), ("a.b", 4), ("a.c", 5), ("a.c", None)]:
            await broker.broker.publish(channel, payload, retain=True)
        await broker.broker.publish("a.a", "not retained")
        reply = await wire.subscribe("a.*", retained=True)
        assert (reply["type"], reply["seq"]) == ("subscribed", 7)
        assert await wire.snapshot("a.*") == [("a.a", 2, 2), ("a.b", 4, 4)]
        assert await wire.next() == {"type": "live", "pattern": "a.*", "seq": 7}
        await broker.broker.publish("a.a", None, retain=True)
        await broker.broker.publish("a.a", "not retained")
        change, other = await wire.next(), await wire.next()
        assert (change["payload"], change["retain"]) == (None, True)
        assert "retain" not in other


async def test_subscription_that_adds_the_retained_messages_has_no_hole(broker: TestBroker) -> None:
    """It continues at the cursor of the subscription that it replaces, which lags here."""
    async with connected(broker) as wire:
        for number in range(20):
            await broker.broker.publish("a", number)
        await broker.broker.publish("b", 1, retain=True)
        await wire.send(type="subscribe", pattern="*", since=0)
        wire.reading = False
        await wire.send(type="subscribe", pattern="*", retained=True)
        wire.reading = True
        wire.flush()
        found = [await wire.next()]
        while found[-1]["type"] != "live":
            found.append(await wire.next())
        assert [m["seq"] for m in found if m["type"] == "message"] == list(range(1, 22))
        kinds = [m["type"] for m in found]
        assert kinds.count("subscribed") == 2
        assert kinds.count("retained") == 1
        second = found[len(kinds) - 1 - kinds[::-1].index("subscribed")]
        page = found[kinds.index("retained")]
        assert page["messages"] == ([] if second["seq"] < 21 else page["messages"])


async def test_subscription_that_waits_for_the_replica_adds_the_retained_messages_at_the_replica_s_head(
    broker: TestBroker,
) -> None:
    async with connected(broker) as wire:
        await broker.broker.publish("a", 1, retain=True)
        await wire.subscribe("a", since=5)
        assert (await wire.subscribe("a", retained=True))["seq"] == 1
        assert await wire.snapshot("a") == [("a", 1, 1)]
        assert (await wire.next())["type"] == "live"
        await broker.broker.publish("a", 2)
        assert (await wire.next())["seq"] == 2


async def test_resumed_subscription_gets_no_snapshot(broker: TestBroker) -> None:
    async with connected(broker) as wire:
        await broker.broker.publish("a", 1, retain=True)
        await broker.broker.publish("a", 2, retain=True)
        await wire.subscribe("a", retained=True, since=1)
        assert (await wire.next())["seq"] == 2
        assert (await wire.next())["type"] == "live"
        await wire.subscribe("a", retained=True, since=1, epoch="another")
        assert (await wire.next())["type"] == "gap"
        assert await wire.snapshot("a") == []
        assert [(await wire.next())["seq"] for _ in range(2)] == [1, 2]


async def test_first_version_client_gets_no_snapshot(broker: TestBroker) -> None:
    async with connected(broker, protocol=0) as wire:
        await broker.broker.publish("a", 1, retain=True)
        assert await wire.subscribe("a", retained=True) == {"type": "subscribed", "pattern": "a"}
        await broker.broker.publish("a", 2, retain=True)
        message = await wire.next()
        assert message == {"type": "message", "channel": "a", "payload": 2}


async def test_revoked_subscription_gets_nothing_more_of_its_snapshot(broker: TestBroker) -> None:
    for number in range(2000):
        await broker.broker.publish(f"a.n{number}", "x" * 200, retain=True)
    async with connected(broker) as wire:
        wire.reading = False
        await wire.send(type="subscribe", pattern="a.*", retained=True)
        for _ in range(20):
            await trio.lowlevel.checkpoint()
        await wire.send(type="auth", token=broker.token("alice", read=("b",)))
        wire.reading = True
        wire.flush()
        await trio.sleep(1)
        assert [each["type"] for each in wire.objects] == ["subscribed", "auth_ok", "revoked"]


async def test_history_marks_retained_messages(broker: TestBroker) -> None:
    async with connected(broker) as wire:
        await broker.broker.publish("a", 1, retain=True)
        await broker.broker.publish("a", 2)
        await wire.send(type="history", pattern="a")
        assert [message.get("retain") for message in (await wire.next())["messages"]] == [True, None]


# In this process


async def test_embedding_program_reads_the_state_and_follows_it(broker: TestBroker) -> None:
    owner = broker.broker
    await owner.publish("a.b", {"n": 1}, retain=True, sender="bob")
    await owner.publish("a.c", 2, retain=True)
    await owner.publish("b", 3, retain=True)
    snapshot = await owner.retained("a.*")
    assert [(m.channel, m.payload, m.seq, m.sender, m.retain) for m in snapshot.messages] == [
        ("a.b", {"n": 1}, 1, "bob", True),
        ("a.c", 2, 2, None, True),
    ]
    await owner.publish("a.b", None, retain=True)
    async with owner.subscribe("a.*", since=snapshot.seq, epoch=snapshot.epoch) as changes:
        change = await anext(changes)
        assert (change.channel, change.payload, change.retain) == ("a.b", None, True)


async def test_embedding_program_gets_the_errors_of_a_client(broker: TestBroker) -> None:
    owner = broker.broker
    with pytest.raises(ConflictError) as conflict:
        await owner.publish("a", 1, retain=True, expect=7)
    assert (conflict.value.code, conflict.value.seq) == (ErrorCode.CONFLICT, 0)
    for options in ({"expect": 0}, {"retain": True, "ephemeral": True}):
        with pytest.raises(Refused) as refused:
            await owner.publish("a", 1, **options)  # type: ignore[arg-type]
        assert refused.value.code is ErrorCode.BAD_MESSAGE
    for expect in (-1, 2**63):
        with pytest.raises(ValueError, match="expect"):
            await owner.publish("a", 1, retain=True, expect=expect)
    with pytest.raises(Refused):
        await owner.retained("a.*.b")
    assert owner.replica.log.applied == 0


# HTTP


async def publish(address: str, body: Any) -> tuple[int, Any]:
    response = await request(address, "/publish", method="POST", body=json.dumps(body).encode())
    return response.status, json.loads(response.body)


async def retain(broker: Broker, *channels: str) -> None:
    for channel in channels:
        await broker.publish(channel, channel, retain=True)


async def test_conflict_over_http_has_the_status_409_and_the_present_seq() -> None:
    async with running() as (_, address):
        assert await publish(address, {"channel": "a", "payload": 1, "retain": True, "expect": 0}) == (
            200,
            {"seq": 1, "channel": "a"},
        )
        status, result = await publish(address, {"channel": "a", "payload": 2, "retain": True, "expect": 0})
        assert (status, result["code"], result["seq"]) == (409, "conflict", 1)
        status, results = await publish(
            address,
            [
                {"channel": "a", "payload": 2, "retain": True, "expect": 1},
                {"channel": "a", "payload": 3, "retain": True, "expect": 1},
                {"channel": "a", "payload": 4, "expect": 1},
                {"channel": "a", "payload": 5, "retain": True, "ephemeral": True},
            ],
        )
        assert status == 409
        assert results[0]["seq"] == 2
        assert [(each["code"], each.get("seq")) for each in results[1:]] == [
            ("conflict", 2),
            ("bad_message", None),
            ("bad_message", None),
        ]
        pages = json.loads((await request(address, "/messages?pattern=a")).body)
        assert [message["retain"] for message in pages["messages"]] == [True, True]


async def test_event_stream_begins_with_the_retained_messages() -> None:
    async with running() as (broker, address):
        await retain(broker, "a.b", "a", "b", "c")
        async with events(address, "pattern=a.*&pattern=a.b&pattern=a&retained=1") as source:
            pages = [await source.next(), await source.next()]
            assert [(page.type, page.last_id) for page in pages] == [("retained", "")] * 2
            assert [message["channel"] for page in pages for message in page.data["messages"]] == ["a.b", "a"]
            assert [page.data["complete"] for page in pages] == [False, True]
            assert all("pattern" not in page.data for page in pages)
            live = await source.next()
            assert (live.type, live.last_id) == ("live", f"4.{broker.replica.log.epoch}")
            await retain(broker, "a")
            assert (await source.next()).data["retain"]
        async with events(address, "pattern=a&retained=1", last_id=live.last_id) as source:
            assert (await source.next()).data["seq"] == 5


@pytest.mark.parametrize("query", ["retained=2", "retained=true", "retained=1&retained=1", "retained"])
async def test_wrong_value_of_retained_is_rejected(query: str) -> None:
    async with running() as (_, address):
        response = await request(address, f"/events?pattern=a&{query}")
        assert (response.status, json.loads(response.body)["code"]) == (400, "bad_message")


@pytest.fixture
def administrator() -> Any:
    key = "the-admin-key-of-the-tests"
    config = msgspec.structs.replace(CONFIG, auth=msgspec.structs.replace(CONFIG.auth, admin_key=key))
    return config, key


async def test_administrator_reads_the_retained_messages_in_pages(administrator: Any) -> None:
    config, key = administrator
    async with running(config) as (broker, address):
        await retain(broker, "b", "a.b", "a.a", "a.c")
        found: list[str] = []
        target = "/api/retained?pattern=a.*&limit=2"
        while target:
            response = await request(address, target, key)
            assert response.status == 200
            page = json.loads(response.body)
            found += [message["channel"] for message in page["messages"]]
            target = f"/api/retained?pattern=a.*&limit=2&after={page['next']}" if page["next"] else ""
        assert found == ["a.a", "a.b", "a.c"]
        [message] = json.loads((await request(address, "/api/retained?pattern=b", key)).body)["messages"]
        assert message == {"channel": "b", "payload": "b", "seq": 1, "at": message["at"], "retain": True}
        for query, code in {
            "pattern=a..b": "invalid_pattern",
            "after=*": "invalid_channel",
            "limit=0": "bad_message",
            "limit=1001": "bad_message",
            "since=1": "bad_message",
        }.items():
            response = await request(address, f"/api/retained?{query}", key)
            assert (response.status, json.loads(response.body)["code"]) == (400, code)


async def test_administrator_reads_messages_that_the_replica_has_not_delivered(
    administrator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A channel whose retained message was just replaced is not missing."""
    config, key = administrator
    async with running(config) as (broker, address):
        await retain(broker, "a", "b")
        monkeypatch.setattr(broker.replica.delivery, "apply", lambda entries: None)
        await broker.publish("a", "new", retain=True)
        messages = json.loads((await request(address, "/api/retained", key)).body)["messages"]
        assert [(message["seq"], message["payload"]) for message in messages] == [(3, "new"), (2, "b")]
