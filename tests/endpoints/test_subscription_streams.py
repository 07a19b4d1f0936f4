"""A subscription's own stream, and ephemeral messages as datagrams, over real UDP on loopback."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import trio
from hypothesis import example, given, settings
from hypothesis import strategies as st

from catbus.auth.grants import Grants
from catbus.auth.tokens import sign
from catbus.broker import OWNER
from catbus.close_codes import CloseCode
from catbus.endpoints.webtransport import webtransport_session
from catbus.protocol.wire_messages import Publish
from catbus.webtransport import ConnectionLimits
from tests.brokers import CONFIG, SECRET
from tests.endpoints.quic_server import Client, Own, Server, serving


async def publish(server: Server, channel: str, *payloads: object, **options: Any) -> None:
    raw = [msgspec.Raw(msgspec.json.encode(payload)) for payload in payloads]
    await server.replica.publish(OWNER, [Publish(channel, each, **options) for each in raw])


async def subscribe(client: Client, pattern: str, **options: object) -> Own:
    """Subscribe with an own stream, and return the stream."""
    client.say(type="subscribe", pattern=pattern, stream=True, **options)
    await client.until(lambda: any(is_for(own, pattern) and not own.ended for own in client.own.values()))
    return next(own for own in client.own.values() if is_for(own, pattern) and not own.ended)


def is_for(own: Own, pattern: str) -> bool:
    return bool(own.lines) and own.lines[0]["pattern"] == pattern


def number_of(client: Client, own: Own) -> int:
    return next(number for number, one in client.own.items() if one is own)


def seqs(lines: list[dict[str, Any]]) -> list[int]:
    return [line["seq"] for line in lines if line["type"] == "message"]


async def test_subscription_may_have_a_stream_of_its_own() -> None:
    async with serving() as server:
        client = await server.log_in("other.*")
        own = await subscribe(client, "a.*", id=7)
        [first] = own.lines
        assert first.pop("epoch") == server.replica.log.epoch
        assert first == {"type": "subscribed", "pattern": "a.*", "seq": 0, "stream": True, "id": 7}
        await publish(server, "a.b", 1, 2)
        await publish(server, "other.c", 3)
        await client.until(lambda: len(own.lines) == 3)
        assert [(line["pattern"], line["seq"]) for line in own.lines[1:]] == [("a.*", 1), ("a.*", 2)]
        message = await client.line()
        assert (message["pattern"], message["seq"]) == ("other.*", 3)
        assert not client.lines


async def test_subscription_with_since_catches_up_on_its_own_stream() -> None:
    async with serving() as server:
        await publish(server, "a.b", *range(300))
        client = await server.log_in()
        own = await subscribe(client, "a.*", since=10)
        await publish(server, "a.b", "new")
        await client.until(lambda: len(seqs(own.lines)) == 291)
        assert seqs(own.lines) == list(range(11, 302))
        assert [line["type"] for line in own.lines if line["type"] != "message"] == ["subscribed", "live"]


async def test_stream_ends_after_unsubscribed() -> None:
    async with serving() as server:
        client = await server.log_in()
        own = await subscribe(client, "a.*")
        await publish(server, "a.b", 1)
        client.say(type="unsubscribe", pattern="a.*", id=3)
        await client.until(lambda: own.ended)
        assert own.lines[-1] == {"type": "unsubscribed", "pattern": "a.*", "seq": 1, "id": 3}
        await publish(server, "a.b", 2)
        assert seqs(own.lines) == [1]
        assert server.replica.delivery.statistics().live == 0
        client.say(type="unsubscribe", pattern="a.*")
        assert (await client.line())["type"] == "subscribe_error"


async def test_stopping_the_stream_unsubscribes() -> None:
    async with serving() as server:
        client = await server.log_in()
        own = await subscribe(client, "a.*", id=7)
        client.connection.stop_sending(number_of(client, own), 0)
        client.transmit()
        own.ended = True
        assert await client.line() == {"type": "unsubscribed", "pattern": "a.*", "seq": 0}
        assert server.replica.delivery.statistics().live == 0
        again = await subscribe(client, "a.*")
        await publish(server, "a.b", 1)
        await client.until(lambda: seqs(again.lines) == [1])


async def test_subscribing_again_ends_the_old_stream() -> None:
    async with serving() as server:
        client = await server.log_in()
        old = await subscribe(client, "a.*")
        await publish(server, "a.b", 1)
        client.say(type="subscribe", pattern="a.*", stream=True)
        await client.until(lambda: len(client.own) == 2)
        new = client.own[max(client.own)]
        await publish(server, "a.b", 2)
        await client.until(lambda: seqs(new.lines) == [2] and old.ended)
        assert seqs(old.lines) == [1]
        client.say(type="subscribe", pattern="a.*")
        assert await client.line() == {
            "type": "subscribed",
            "pattern": "a.*",
            "seq": 2,
            "epoch": server.replica.log.epoch,
        }
        await client.until(lambda: new.ended)
        await publish(server, "a.b", 3)
        assert (await client.line())["seq"] == 3
        assert server.replica.delivery.statistics().live == 1


async def test_subscription_without_stream_credit_uses_the_session_stream() -> None:
    async with serving() as server:
        # Three of them are HTTP/3's own.
        client = await server.log_in(limits=ConnectionLimits(incoming_unidirectional=5))
        for pattern in ("a.*", "b.*"):
            await subscribe(client, pattern)
        client.say(type="subscribe", pattern="c.*", stream=True)
        assert await client.line() == {
            "type": "subscribed",
            "pattern": "c.*",
            "seq": 0,
            "epoch": server.replica.log.epoch,
        }
        await publish(server, "c.d", 1)
        assert (await client.line())["pattern"] == "c.*"
        # A stream that has ended makes room for another.
        client.say(type="unsubscribe", pattern="a.*")
        await client.until(lambda: any(own.ended for own in client.own.values()))
        await subscribe(client, "d.*")


async def test_unread_streams_delay_no_other_and_lose_nothing() -> None:
    payload = "x" * 20_000
    async with serving() as server:
        client = await server.log_in(
            "main.*", limits=ConnectionLimits(connection_window=4 << 20, incoming_unidirectional=20)
        )
        client.own_reads = False
        stuck = [await subscribe(client, f"stuck{number}.*") for number in range(8)]
        client.own_reads = True
        read = await subscribe(client, "read.*")
        for _ in range(40):
            for number in range(8):
                await publish(server, f"stuck{number}.a", payload)
        # Their unread data is more than the window of the connection.
        assert server.replica.delivery.statistics().lagging == 8
        for number in range(20):
            await publish(server, "read.a", number)
            await publish(server, "main.a", number)
            await client.until(lambda: len(seqs(read.lines)) == number + 1)  # noqa: B023
            assert (await client.line())["payload"] == number
        for number, own in enumerate(stuck):
            own.reads = True
            client.take(number_of(client, own))
            client.transmit()
            await client.until(lambda: len(seqs(own.lines)) == 40)  # noqa: B023
            assert seqs(own.lines) == list(range(number + 1, 321, 8))


async def test_every_stream_has_a_head_of_its_own() -> None:
    async with serving() as server:
        client = await server.log_in("main.*")
        own = await subscribe(client, "a.*")
        await publish(server, "elsewhere.b", 1)
        client.say(type="ping", seq=1)
        assert [(await client.line())["type"] for _ in range(2)] == ["pong", "head"]
        await client.until(lambda: len(own.lines) == 2)
        assert (own.lines[1]["type"], own.lines[1]["seq"]) == ("head", 1)
        # The head has not moved since.
        client.say(type="ping", seq=2)
        assert [(await client.line())["type"] for _ in range(2)] == ["pong", "head"]
        await publish(server, "a.b", 1)
        client.say(type="ping", seq=3)
        assert (await client.heard("head"))["seq"] == 2
        await client.until(lambda: len(own.lines) == 4)
        assert [line["type"] for line in own.lines[2:]] == ["message", "head"]


async def test_stream_of_a_lagging_subscription_has_no_head() -> None:
    async with serving() as server:
        client = await server.log_in()
        client.own_reads = False
        own = await subscribe(client, "a.*")
        for _ in range(40):
            await publish(server, "a.b", "x" * 20_000)
        for number in range(200):
            client.say(type="ping", seq=number)
            assert (await client.heard("head"))["seq"] == 40
        assert not [line for line in own.lines if line["type"] == "head"]
        [one] = server.replica.sessions
        [held] = one.session.subscriptions.values()
        assert held.send_queue.size <= held.send_queue.limit


async def test_revocation_ends_the_stream_with_revoked() -> None:
    async with serving() as server:
        client = await server.log_in()
        own = await subscribe(client, "a.*")
        kept = await subscribe(client, "b.*")
        narrower = sign(SECRET, client_id="alice", grants=Grants(("b.*",), ()))
        client.say(type="auth", token=narrower)
        assert (await client.line())["type"] == "auth_ok"
        await client.until(lambda: own.ended)
        assert own.lines[-1] == {"type": "revoked", "pattern": "a.*", "seq": 0}
        await publish(server, "b.c", 1)
        await client.until(lambda: seqs(kept.lines) == [1])


async def test_lines_on_all_streams_arrive_before_the_close() -> None:
    async with serving() as server:
        client = await server.log_in()
        owns = [await subscribe(client, f"{letter}.*") for letter in "abc"]
        for letter in "abc":
            await publish(server, f"{letter}.x", *["y" * 1000] * 50)
        server.replica.finish()
        assert await client.lost() == (CloseCode.SHUTTING_DOWN, "the replica is stopping")
        assert [len(seqs(own.lines)) for own in owns] == [50] * 3


async def test_first_version_client_has_one_stream() -> None:
    async with serving() as server:
        client = await server.log_in(protocol=None)
        client.say(type="subscribe", pattern="a.*", stream=True, datagrams=True)
        assert await client.line() == {"type": "subscribed", "pattern": "a.*"}
        await publish(server, "a.b", 1, ephemeral=True)
        assert (await client.line())["payload"] == 1
        assert not client.own


@pytest.mark.parametrize("stream", [False, True])
async def test_ephemeral_messages_arrive_as_datagrams_on_request(stream: bool) -> None:
    async with serving() as server:
        client = await server.log_in()
        client.say(type="subscribe", pattern="a.*", stream=stream, datagrams=True)
        await client.until(lambda: client.lines or client.own)
        client.lines.clear()
        await publish(server, "a.b", {"x": 1}, ephemeral=True)
        await client.until(lambda: client.datagrams)
        [datagram] = client.datagrams
        assert (datagram["type"], datagram["pattern"], datagram["payload"]) == ("message", "a.*", {"x": 1})
        assert "seq" not in datagram
        # A message that does not fit arrives on the stream, like every message of the log.
        await publish(server, "a.b", "y" * 1500, ephemeral=True)
        await publish(server, "a.b", "kept")
        lines = client.lines if not stream else client.own[max(client.own)].lines
        await client.until(lambda: len(lines) == 2 + stream)
        assert [line["payload"] for line in lines[stream:]] == ["y" * 1500, "kept"]
        assert len(client.datagrams) == 1


async def test_client_without_the_option_gets_no_datagrams() -> None:
    async with serving() as server:
        client = await server.log_in("a.*")
        await publish(server, "a.b", 1, ephemeral=True)
        assert (await client.line())["payload"] == 1
        assert not client.datagrams


async def test_datagram_is_not_echoed_to_a_client_without_echo() -> None:
    async with serving() as server:
        client, other = await server.log_in(), await server.log_in()
        for one in (client, other):
            one.say(type="subscribe", pattern="a.*", datagrams=True)
            await one.heard("subscribed")
        client.say(type="publish", channel="a.b", payload="mine", ephemeral=True, echo=False)
        client.say(type="publish", channel="a.b", payload="all", ephemeral=True)
        await other.until(lambda: len(other.datagrams) == 2)
        await client.until(lambda: client.datagrams)
        assert [datagram["payload"] for datagram in client.datagrams] == ["all"]


async def test_unsendable_datagrams_are_dropped_and_counted() -> None:
    async with serving() as server:
        client = await server.log_in()
        client.say(type="subscribe", pattern="a.*", datagrams=True)
        await client.heard("subscribed")
        [one] = server.replica.sessions
        client.deaf = True
        await publish(server, "a.b", *["z" * 900] * 2000, ephemeral=True)
        assert one.send_queue.rejected > 1500
        assert not one.send_queue


async def test_ping_flood_fills_no_send_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webtransport_session, "SUBSCRIPTION_QUEUE_DIVISOR", 512)
    config = msgspec.structs.replace(CONFIG, limits=msgspec.structs.replace(CONFIG.limits, send_queue=1 << 19))
    async with serving(config) as server:
        client = await server.log_in()
        client.own_reads = False
        await subscribe(client, "a.*")
        [one] = server.replica.sessions
        [held] = one.session.subscriptions.values()
        for number in range(500):
            await publish(server, "elsewhere.b", 1)
            client.say(type="ping", seq=number)
            await client.heard("pong")
            assert held.send_queue.size < held.send_queue.limit + 200


# Random operations on streams

patterns = st.sampled_from(["a.*", "b.*"])
steps = st.one_of(
    st.tuples(st.just("subscribe"), patterns, st.sampled_from([None, 0, 3, 20])),
    st.tuples(st.just("publish"), patterns, st.sampled_from([1, 5, 40])),
    st.tuples(st.sampled_from(["unsubscribe", "stop", "pause", "go on", "ping", "wait"]), patterns, st.none()),
)
LATE = [
    ("publish", "a.*", 40),
    ("subscribe", "a.*", 0),
    ("wait", "a.*", None),
    ("pause", "a.*", None),
    ("publish", "a.*", 40),
]


def complete(own: Own, owed: list[int], since: int | None) -> int:
    """Return the seq up to which a stream is complete. Fails if a message is missing, repeated or out of order."""
    cursor: int = own.lines[0]["seq"] if since is None else since
    for line in own.lines[1:]:
        told = [line["seq"]] if line["type"] == "message" else []
        if line["type"] in ("message", "live", "head"):
            assert [seq for seq in owed if cursor < seq <= line["seq"]] == told
            cursor = max(cursor, line["seq"])
    return cursor


@settings(max_examples=15)
@given(st.lists(steps, min_size=5, max_size=25))
@example([*LATE, ("subscribe", "a.*", 3), ("publish", "a.*", 5), ("ping", "a.*", None)])
@example([*LATE, ("unsubscribe", "a.*", None), ("subscribe", "a.*", 20), ("wait", "a.*", None), ("stop", "a.*", None)])
async def test_every_stream_delivers_everything_in_order(actions: list[tuple[str, str, Any]]) -> None:
    """No message is missing or repeated, and no `live` or `head` is ahead of the lines before it."""
    config = msgspec.structs.replace(CONFIG, limits=msgspec.structs.replace(CONFIG.limits, send_queue=1 << 16))
    limits = ConnectionLimits(connection_window=16 << 20, stream_window=1 << 14, incoming_unidirectional=60)
    async with serving(config, limits=ConnectionLimits(stream_unacknowledged=1 << 14)) as server:
        client = await server.log_in(limits=limits)
        owed: dict[str, list[int]] = {"a.*": [], "b.*": []}
        since: list[int | None] = []
        held: dict[str, int] = {}
        """The `id` of each request."""
        stopped: set[int] = set()
        newest = 0
        for action, pattern, detail in actions:
            numbers = [number for number, own in client.own.items() if is_for(own, pattern)]
            if action == "subscribe":
                held[pattern] = len(since)
                since.append(None if detail is None else min(detail, newest))
                client.say(type="subscribe", pattern=pattern, stream=True, since=since[-1], id=held[pattern])
            elif action == "unsubscribe":
                held.pop(pattern, None)
                client.say(type="unsubscribe", pattern=pattern)
            elif action == "publish":
                await publish(server, pattern.replace("*", "x"), *["x" * 3000] * detail)
                owed[pattern] += range(newest + 1, newest + detail + 1)
                newest += detail
            elif action == "ping":
                client.say(type="ping", seq=1)
            elif action == "wait":
                await trio.sleep(0.03)
            elif numbers and action == "stop":
                if client.connection.stop_sending(numbers[-1], 0):
                    stopped.add(numbers[-1])
                    if held.get(pattern) == client.own[numbers[-1]].lines[0]["id"]:
                        del held[pattern]
            elif numbers:
                client.own[numbers[-1]].reads = action == "go on"
        client.say(type="ping", seq=2)
        while (await client.heard("pong"))["seq"] != 2:
            pass
        for number, own in client.own.items():
            own.reads = True
            client.take(number)
        client.transmit()

        def all_told() -> bool:
            told = 0
            for number, own in client.own.items():
                if own.lines:
                    pattern, asked = own.lines[0]["pattern"], own.lines[0]["id"]
                    cursor = complete(own, owed[pattern], since[asked])
                    if held.get(pattern) == asked:
                        told += cursor >= max(owed[pattern], default=0)
                    elif not own.ended and number not in stopped:
                        return False
            statistics = server.replica.delivery.statistics()
            return told == statistics.live == len(held) and not statistics.lagging

        await client.until(all_told)
