"""A whole broker: its endpoints, its in-process API, and its shutdown."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
import trio

import catbus
from catbus import CloseCode, Config, ErrorCode
from catbus.client import GoAway
from catbus.config import DrainSettings, LimitSettings
from catbus.log import EPHEMERAL_SIZE
from tests.brokers import CONFIG, TOKEN, running
from tests.endpoints.raw_peer import Peer


async def test_message_goes_from_client_to_client_and_to_this_process() -> None:
    async with (
        running() as (broker, address),
        catbus.connect(f"ws://{address}/ws", token=TOKEN) as bus,
        bus.subscribe("orders.*") as messages,
        broker.subscribe("orders.*") as local,
    ):
        seq = await bus.publish("orders.42", {"status": "paid"})
        there, here = await anext(messages), await anext(local)
    assert (there.seq, there.payload, there.sender) == (seq, {"status": "paid"}, "alice")
    assert (here.seq, here.payload, here.sender) == (seq, {"status": "paid"}, "alice")


async def test_broker_without_endpoints_serves_its_own_process() -> None:
    with trio.fail_after(30):
        async with catbus.open_broker() as broker, broker.subscribe("orders.*") as messages:
            seq = await broker.publish("orders.42", {"status": "paid"})
            message = await anext(messages)
    assert (message.channel, message.payload, message.seq) == ("orders.42", {"status": "paid"}, seq)


async def test_slow_in_process_subscription_lags_and_loses_nothing() -> None:
    config = Config(limits=LimitSettings(send_queue=2_000))
    with trio.fail_after(30):
        async with catbus.open_broker(config) as broker, broker.subscribe("a") as messages:
            for number in range(200):
                await broker.publish("a", number)
            assert broker.replica.delivery.statistics().lagging == 1
            assert [(await anext(messages)).payload for _ in range(200)] == list(range(200))
            assert messages.gaps == []


async def test_unread_messages_of_an_in_process_subscription_are_dropped_with_it() -> None:
    with trio.fail_after(30):
        async with catbus.open_broker() as broker:
            async with broker.subscribe("a"):
                await broker.publish("a", 1)
                assert broker.replica.delivery.statistics().held > 0
            assert broker.replica.delivery.statistics().held == 0


async def test_in_process_subscription_gets_messages_that_were_withdrawn() -> None:
    config = Config(limits=LimitSettings(send_queue_total=4_000))
    with trio.fail_after(30):
        async with catbus.open_broker(config) as broker, broker.subscribe("a") as messages:
            for number in range(200):
                await broker.publish("a", number)
            assert broker.replica.delivery.statistics().withdrawals == 1
            assert [(await anext(messages)).payload for _ in range(200)] == list(range(200))


async def test_in_process_subscription_begins_after_since() -> None:
    with trio.fail_after(30):
        async with catbus.open_broker() as broker:
            for number in range(5):
                await broker.publish("a", number)
            async with broker.subscribe("a", since=2) as messages:
                assert [(await anext(messages)).payload for _ in range(3)] == [2, 3, 4]
                assert messages.cursor == 5


async def test_messages_dropped_by_retention_are_announced_as_a_gap() -> None:
    config = Config(limits=LimitSettings(recent=1_000))
    with trio.fail_after(30):
        async with catbus.open_broker(config) as broker:
            for number in range(100):
                await broker.publish("a", "x" * 100 + str(number))
            async with broker.subscribe("a", since=1) as messages:
                first = await anext(messages)
                assert first.seq is not None
                [gap] = messages.gaps
                assert (gap.first, gap.last, gap.reason) == (2, first.seq - 1, "retention")


@pytest.mark.parametrize(("channel", "code"), [("a..b", ErrorCode.INVALID_CHANNEL), ("a.*", ErrorCode.INVALID_CHANNEL)])
async def test_publishing_in_process_to_a_malformed_channel_is_rejected(channel: str, code: ErrorCode) -> None:
    async with catbus.open_broker() as broker:
        with pytest.raises(catbus.Refused) as caught:
            await broker.publish(channel, 1)
    assert caught.value.code is code


async def test_malformed_pattern_and_a_deeply_nested_payload_are_rejected_in_process() -> None:
    nested: list[object] = []
    for _ in range(100):
        nested = [nested]
    async with catbus.open_broker() as broker:
        with pytest.raises(catbus.Refused) as caught:
            async with broker.subscribe("a.*.b"):
                pass
        assert caught.value.code is ErrorCode.INVALID_PATTERN
        with pytest.raises(catbus.Refused) as caught:
            await broker.publish("a", nested)
        assert caught.value.code is ErrorCode.BAD_MESSAGE
        with pytest.raises(TypeError):
            await broker.publish("a", object())


async def test_ephemeral_message_has_no_seq() -> None:
    async with catbus.open_broker() as broker, broker.subscribe("a") as messages:
        assert await broker.publish("a", 1, ephemeral=True) is None
        assert (await anext(messages)).seq is None


async def test_stopping_broker_acknowledges_publishes_and_has_clients_reconnect() -> None:
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            broker = await nursery.start(catbus.serve, CONFIG)
            [url] = broker.urls
            async with catbus.connect(url, token=TOKEN, reconnect=False) as bus, bus.subscribe("a") as messages:
                assert await bus.publish("a", 1) == 1
                broker.stop()
                assert (await anext(messages)).seq == 1
                with pytest.raises(catbus.Disconnected) as caught:
                    await anext(messages)
            assert caught.value.code == CloseCode.SHUTTING_DOWN
            with pytest.raises(catbus.Disconnected):
                async with catbus.connect(url, token=TOKEN):
                    pass


async def test_connection_that_stays_open_does_not_delay_the_end_of_the_broker() -> None:
    config = msgspec.structs.replace(CONFIG, drain=DrainSettings(delay=0, window=0, deadline=0.2))
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            broker = await nursery.start(catbus.serve, config)
            host, _, port = broker.addresses[0][1].partition(":")
            stream = await trio.open_tcp_stream(host, int(port))
            await stream.send_all(b"POST /publish HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n")
            broker.stop()
    await stream.aclose()


async def test_draining_broker_tells_clients_when_to_reconnect() -> None:
    config = msgspec.structs.replace(CONFIG, drain=DrainSettings(delay=0, window=30, deadline=5))
    events: list[object] = []
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            broker = await nursery.start(catbus.serve, config)
            url = f"ws://{broker.addresses[0][1]}/ws"
            async with catbus.connect(url, token=TOKEN, reconnect=False, on_event=events.append) as bus:
                broker.stop()
                await bus.ping()
                assert broker.replica.readiness == "draining"
                assert await bus.publish("a", 1) == 1, "it serves its clients until they reconnect to another replica"
                async with catbus.connect(url, token=TOKEN, reconnect=False, on_event=events.append) as late:
                    await late.ping()
            # The broker ends when the last client has left.
    assert len(events) == 2
    for event in events:
        assert isinstance(event, GoAway)
        assert 0 <= event.reconnect_in <= 30


async def test_page_of_history_is_bounded_in_bytes() -> None:
    config = msgspec.structs.replace(CONFIG, limits=LimitSettings(message_size=1_000_000))
    async with running(config) as (broker, address), catbus.connect(f"ws://{address}/ws", token=TOKEN) as bus:
        for number in range(4):
            await broker.publish("a", str(number) * 600_000)
        page = await bus.history("a", limit=10)
        assert ([m.seq for m in page.messages], page.more) == ([4], True)
        await broker.publish("a", 5)
        page = await bus.history("a", limit=10)
        assert ([m.seq for m in page.messages], page.more) == ([4, 5], True)


async def post(address: str, body: bytes, *headers: str) -> tuple[int, Any]:
    """Send `POST /publish`, and return the status and the decoded body of the response."""
    host, _, port = address.rpartition(":")
    fields = ["Host: x", f"Authorization: Bearer {TOKEN}", f"Content-Length: {len(body)}", *headers]
    async with await trio.open_tcp_stream(host, int(port)) as stream:
        peer = Peer(stream)
        await peer.send("\r\n".join(["POST /publish HTTP/1.1", *fields, "", ""]).encode() + body)
        response = await peer.response()
    return response.status, json.loads(response.body)


async def test_echo_false_over_http_does_not_hide_a_message_from_others() -> None:
    async with running() as (broker, address), broker.subscribe("a") as messages:
        assert await post(address, b'{"channel":"a","payload":1,"echo":false}') == (200, {"seq": 1, "channel": "a"})
        assert (await anext(messages)).payload == 1


async def test_ephemeral_message_that_is_too_large_is_rejected_from_every_source() -> None:
    payload = "x" * EPHEMERAL_SIZE
    async with running() as (broker, address), catbus.connect(f"ws://{address}/ws", token=TOKEN) as bus:
        for publish in (bus.publish, broker.publish):
            with pytest.raises(catbus.Refused) as caught:
                await publish("a", payload, ephemeral=True)
            assert caught.value.code == ErrorCode.TOO_LARGE
        body = json.dumps({"channel": "a", "payload": payload, "ephemeral": True}).encode()
        status, response = await post(address, body)
        assert (status, response["code"]) == (413, "too_large")
        assert await bus.publish("a", payload) == 1, "the log accepts it, and the session continues"


async def test_request_with_an_idempotency_key_publishes_once() -> None:
    two = b'[{"channel":"a","payload":1},{"channel":"a","payload":1}]'
    first = [{"seq": 1, "channel": "a"}, {"seq": 2, "channel": "a"}]
    again = [{**result, "duplicate": True} for result in first]
    async with running() as (_, address):
        assert await post(address, two, "Idempotency-Key: k1") == (200, first)
        assert await post(address, two, "Idempotency-Key: k1") == (200, again)
        status, [other, _] = await post(address, two.replace(b"1", b"2", 1), "Idempotency-Key: k1")
        assert (status, other["code"]) == (409, "bad_message"), "another message under the same key"
        assert (await post(address, two, "Idempotency-Key: k2"))[1][0]["seq"] == 3
        assert (await post(address, two))[1][0]["seq"] == 5
        assert (await post(address, two, "Idempotency-Key: " + "k" * 256))[0] == 400
