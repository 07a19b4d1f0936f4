"""The page: a whole broker, its doors, and its end."""

from __future__ import annotations

import msgspec
import pytest
import trio

import catbus
from catbus import CloseCode, Code, Config
from catbus.config import Drain, Limits
from tests.brokers import CONFIG, TOKEN, running

async def test_a_message_goes_from_client_to_client_and_to_this_process() -> None:
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


async def test_without_doors_it_serves_its_own_process() -> None:
    with trio.fail_after(30):
        async with catbus.open_broker() as broker, broker.subscribe("orders.*") as messages:
            seq = await broker.publish("orders.42", {"status": "paid"})
            message = await anext(messages)
    assert (message.channel, message.payload, message.seq) == ("orders.42", {"status": "paid"}, seq)


async def test_in_process_a_slow_reader_is_late_and_loses_nothing() -> None:
    config = Config(limits=Limits(mailbox=2_000))
    with trio.fail_after(30):
        async with catbus.open_broker(config) as broker, broker.subscribe("a") as messages:
            for number in range(200):
                await broker.publish("a", number)
            assert broker.hub.delivery.statistics().late == 1
            assert [(await anext(messages)).payload for _ in range(200)] == list(range(200))
            assert messages.gaps == []


async def test_in_process_reading_begins_where_it_is_told_to() -> None:
    with trio.fail_after(30):
        async with catbus.open_broker() as broker:
            for number in range(5):
                await broker.publish("a", number)
            async with broker.subscribe("a", since=2) as messages:
                assert [(await anext(messages)).payload for _ in range(3)] == [2, 3, 4]
                assert messages.cursor == 5


async def test_what_retention_has_taken_is_announced() -> None:
    config = Config(limits=Limits(recent=1_000))
    with trio.fail_after(30):
        async with catbus.open_broker(config) as broker:
            for number in range(100):
                await broker.publish("a", "x" * 100 + str(number))
            async with broker.subscribe("a", since=1) as messages:
                first = await anext(messages)
                assert first.seq is not None
                [gap] = messages.gaps
                assert (gap.first, gap.last, gap.reason) == (2, first.seq - 1, "retention")


@pytest.mark.parametrize(("channel", "code"), [("a..b", Code.INVALID_CHANNEL), ("a.*", Code.INVALID_CHANNEL)])
async def test_in_process_a_bad_channel_is_refused(channel: str, code: Code) -> None:
    async with catbus.open_broker() as broker:
        with pytest.raises(catbus.Refused) as caught:
            await broker.publish(channel, 1)
    assert caught.value.code is code


async def test_an_ephemeral_message_has_no_seq() -> None:
    async with catbus.open_broker() as broker, broker.subscribe("a") as messages:
        assert await broker.publish("a", 1, ephemeral=True) is None
        assert (await anext(messages)).seq is None


async def test_stopping_answers_what_is_published_and_tells_everyone_to_come_back() -> None:
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            broker = await nursery.start(catbus.serve, CONFIG)
            url = f"ws://{broker.addresses[0][1]}/ws"
            async with catbus.connect(url, token=TOKEN) as bus, bus.subscribe("a") as messages:
                assert await bus.publish("a", 1) == 1
                broker.stop()
                assert (await anext(messages)).seq == 1
                with pytest.raises(catbus.Disconnected) as caught:
                    await anext(messages)
            assert caught.value.code == CloseCode.SHUTTING_DOWN
            with pytest.raises(catbus.Disconnected):
                async with catbus.connect(url, token=TOKEN):
                    pass


async def test_a_client_that_does_not_leave_does_not_hold_up_the_end() -> None:
    config = msgspec.structs.replace(CONFIG, drain=Drain(delay=0, window=0, deadline=0.2))
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            broker = await nursery.start(catbus.serve, config)
            host, _, port = broker.addresses[0][1].partition(":")
            stream = await trio.open_tcp_stream(host, int(port))
            await stream.send_all(b"POST /publish HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n")
            broker.stop()
    await stream.aclose()
