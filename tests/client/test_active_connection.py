"""The tasks of a connection: reading, writing, keepalive, backpressure, cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import trio

from catbus.client import (
    Backoff,
    Bus,
    Disconnected,
    Refused,
    active_connection,
    connect,
    connection_supervisor,
    open_bus,
    subscription_manager,
)
from catbus.close_codes import CloseCode
from tests.client.scripted_broker import (
    AUTH_OK,
    EPOCH,
    Gone,
    Honest,
    Peer,
    Script,
    message,
    serve,
    talk,
    talk_in_memory,
    talk_to,
)

pytestmark = pytest.mark.anyio


def living_tasks(backend: str) -> int:
    if backend == "trio":
        return trio.lowlevel.current_statistics().tasks_living
    return len(asyncio.all_tasks())


async def settle() -> None:
    """Let everything happen that can happen in memory."""
    for _ in range(20):
        await anyio.sleep(0)


# Leaving


async def test_leaving_closes_the_connection_and_leaves_no_task(anyio_backend_name: str) -> None:
    closed: list[object] = []

    async def script(peer: Peer) -> None:
        try:
            await peer.linger()
        except Gone:
            closed.append(peer.closed)
            raise

    before = living_tasks(anyio_backend_name)
    async with talk_in_memory(Honest()) as (bus, pipe):
        assert await bus.publish("a", 1) == 101
    assert living_tasks(anyio_backend_name) == before
    assert pipe.closed == (1000, "")
    async with talk(script):
        pass
    assert closed == [(1000, "")]
    assert living_tasks(anyio_backend_name) == before


async def test_exception_of_the_block_leaves_it_unchanged() -> None:
    async with serve(Honest()) as url:
        with pytest.raises(LookupError):
            async with connect(url, token="t"):
                raise LookupError
        group = ExceptionGroup("several", [LookupError()])
        with pytest.raises(ExceptionGroup) as caught:
            async with connect(url, token="t"):
                raise group
        assert caught.value is group
        with pytest.raises(KeyboardInterrupt):
            async with connect(url, token="t"):
                raise KeyboardInterrupt


async def test_cancelled_block_closes_without_waiting() -> None:
    entered = anyio.Event()

    async def script(peer: Peer) -> None:
        # It never answers a Close frame.
        await anyio.sleep_forever()

    async def use() -> None:
        async with talk(script):
            entered.set()
            await anyio.sleep_forever()

    with anyio.fail_after(1):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(use)
            await entered.wait()
            tasks.cancel_scope.cancel()


async def test_closing_waits_only_briefly_for_the_close_frame(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("catbus.client.websocket_transport.CLOSE_TIMEOUT", 0.01)

    async def script(peer: Peer) -> None:
        await anyio.sleep_forever()

    with anyio.fail_after(1):
        async with talk(script):
            pass


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_cancellation_by_asyncio_is_supported(anyio_backend: str) -> None:
    async with serve(Honest()) as url:
        inside = asyncio.Event()

        async def use() -> None:
            async with connect(url, token="t") as bus, bus.subscribe("a") as messages:
                inside.set()
                async for _ in messages:
                    pass

        task = asyncio.create_task(use())
        await inside.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with connect(url, token="t") as bus:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0), bus.subscribe("a") as messages:
                    await anext(messages)
            assert await bus.publish("a", 1) == 101


# The end of the connection


async def test_broker_that_vanishes_during_a_request_is_a_disconnect() -> None:
    async def script(peer: Peer) -> None:
        await peer.expect("publish")
        await peer.stream.aclose()  # type: ignore[attr-defined]
        raise Gone

    async with talk(script) as bus:
        with pytest.raises(Disconnected) as caught:
            await bus.publish("a", 1)
        assert caught.value.code is None


async def test_client_reconnects_after_a_broker_vanishes(anyio_backend_name: str) -> None:
    broker = Honest()
    visits = 0

    async def script(peer: Peer) -> None:
        nonlocal visits
        visits += 1
        if visits > 1:
            await broker(peer)
        await peer.admit()
        await peer.subscribed()
        await peer.send(message(101, pattern="a", channel="a"))
        await peer.expect("publish")
        await peer.stream.aclose()  # type: ignore[attr-defined]
        raise Gone

    broker.append("a", None)
    before = living_tasks(anyio_backend_name)
    async with (
        serve(script) as url,
        connect(url, token="t", reconnect=Backoff(0.01, 0.1)) as bus,
        bus.subscribe("a") as messages,
    ):
        assert await bus.publish("a", "again") == 102
        assert [(await anext(messages)).seq for _ in range(2)] == [101, 102]
        assert [request.get("since") for request in broker.subscribes] == [101]
        assert [request["retry"] for request in broker.published] == [True]
    assert living_tasks(anyio_backend_name) == before


async def test_invalid_data_ends_the_connection() -> None:
    async with talk_in_memory(lambda peer: peer.write(b"nonsense")) as (bus, pipe):
        with pytest.raises(Disconnected, match="violated the protocol"):
            await bus.ping()
        await settle()
        assert pipe.closed is not None
        assert pipe.closed[0] == CloseCode.BAD_MESSAGE


async def test_exception_of_an_event_callback_closes_the_connection() -> None:
    def complain(_: object) -> None:
        raise LookupError

    async def script(peer: Peer) -> None:
        await peer.send({"type": "goaway", "reason": "", "reconnect_in": 1})

    with pytest.raises(ExceptionGroup) as caught:
        async with talk_in_memory(script, on_event=complain) as (bus, _):
            await bus.ping()
    assert caught.group_contains(LookupError)


async def test_missing_reply_to_a_ping_ends_the_connection() -> None:
    kinds: list[str] = []

    async def script(peer: Peer) -> None:
        while True:
            kinds.append((await peer.receive())["type"])

    async with talk_in_memory(script, keepalive=0.001, timeout=1) as (bus, pipe):
        with pytest.raises(Disconnected, match=r"no reply from the broker within 1 s"):
            await bus.publish("a", 1)
        await settle()
        assert pipe.closed == (CloseCode.UNRESPONSIVE, "no reply to a ping")
    assert "ping" in kinds


async def test_any_received_bytes_count_as_reply_to_a_ping() -> None:
    answered = anyio.Event()

    async def script(peer: Peer) -> None:
        pings = 0
        while pings < 3:
            request = await peer.receive()
            assert request["type"] == "ping"
            pings += 1
            await peer.send({"type": "weather"})
        answered.set()
        while True:
            request = await peer.receive()
            await peer.send({"type": "pong", "seq": request["seq"]})

    async with talk_in_memory(script, keepalive=0.001, timeout=0.5) as (bus, _):
        await answered.wait()
        await bus.ping()


# Cancellation


async def publish(bus: Bus) -> None:
    await bus.publish("other", "cancelled")


async def publish_many(bus: Bus) -> None:
    await bus.publish_many([("other", "cancelled")] * 3)


async def history(bus: Bus) -> None:
    await bus.history("a")


async def ping(bus: Bus) -> None:
    await bus.ping()


async def subscribe(bus: Bus) -> None:
    async with bus.subscribe("b") as messages:
        await anext(messages)


async def subscribe_since(bus: Bus) -> None:
    async with bus.subscribe("b", since=50) as messages:
        await anext(messages)


@asynccontextmanager
async def talk_on_a_socket(broker: Script) -> AsyncIterator[tuple[Bus, None]]:
    async with talk_to(broker) as bus:
        yield bus, None


@pytest.mark.parametrize("talk", [talk_in_memory, talk_on_a_socket])
@pytest.mark.parametrize("work", [publish, publish_many, history, ping, subscribe, subscribe_since])
async def test_cancelled_request_does_not_affect_other_requests(
    work: Callable[[Bus], Coroutine[Any, Any, None]],
    talk: Callable[[Script], AbstractAsyncContextManager[tuple[Bus, object]]],
) -> None:
    broker = Honest()
    async with talk(broker) as (bus, _), bus.subscribe("a") as messages:
        for steps in range(15):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(work, bus)
                for _ in range(steps):
                    await anyio.sleep(0)
                tasks.cancel_scope.cancel()
            seq = await bus.publish("a", steps)
            item = await anext(messages)
            assert (item.seq, item.payload) == (seq, steps)
            assert broker.log[-1] == {"channel": "a", "payload": steps, "seq": seq}
        assert [item.payload for item in (await bus.history("a")).messages] == list(range(15))


async def test_cancelled_iteration_loses_no_message() -> None:
    async with talk_to(Honest()) as bus, bus.subscribe("a") as messages:
        received: list[Any] = []

        async def iterate() -> None:
            async for item in messages:
                received.append(item.payload)  # noqa: PERF401  # cancelled half-way, a comprehension would lose them

        for number in range(200):
            with anyio.move_on_after(0 if number % 2 else 0.001):
                await iterate()
            await bus.publish("a", number)
        with anyio.move_on_after(0.01):
            await iterate()
        assert received == list(range(200))


async def test_cancelled_connect_leaves_nothing_open() -> None:
    opened = closed = 0

    async def script(peer: Peer) -> None:
        nonlocal opened, closed
        opened += 1
        try:
            await Honest()(peer)
        finally:
            closed += 1

    async with serve(script) as url:

        async def use() -> None:
            async with connect(url, token="t"):
                await anyio.sleep(0)

        for steps in range(60):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(use)
                for _ in range(steps):
                    await anyio.sleep(0)
                tasks.cancel_scope.cancel()
        assert opened > 10
        while closed < opened:
            await anyio.sleep(0)


async def test_publish_that_waits_for_a_blocked_socket_can_be_cancelled() -> None:
    async def script(peer: Peer) -> None:
        await peer.published(101)
        await peer.published(102)

    async with talk_in_memory(script) as (bus, pipe):
        assert await bus.publish("a", 1) == 101
        pipe.open_gate = False
        with anyio.move_on_after(0.001) as scope:
            await bus.publish_many([("a", "x" * 60_000)] * 10)
        assert scope.cancelled_caught
        with pytest.raises(TimeoutError), anyio.fail_after(0.001):
            await bus.publish("a", 1)


# Back pressure


async def test_full_queue_pauses_reading_until_it_has_room() -> None:
    async def script(peer: Peer) -> None:
        await peer.subscribed()
        for first in range(101, 1101, 10):
            await peer.send(*[message(seq) for seq in range(first, first + 10)])

    async with talk_in_memory(script) as (bus, _), bus.subscribe("a.*", buffer=30) as messages:
        queue = messages._queue
        await settle()
        assert len(queue.items) == 30
        for seq in range(101, 116):
            assert (await anext(messages)).seq == seq
        await settle()
        assert len(queue.items) == 35
        assert [(await anext(messages)).seq for _ in range(116, 1101)] == list(range(116, 1101))
        assert len(queue.items) == 0


async def test_iteration_of_a_full_queue_may_publish() -> None:
    """The reply stands behind more messages than the buffer holds."""
    broker = Honest()
    for number in range(500):
        broker.append("a", number)
    async with talk_in_memory(broker) as (bus, _), bus.subscribe("a", since=100, buffer=10) as messages:
        seen = []
        async for item in messages:
            seen.append(item.payload)
            await bus.publish("b", item.payload)
            if item.payload == 499:
                break
    assert seen == list(range(500))
    assert [request["payload"] for request in broker.published] == seen


async def test_reply_behind_more_messages_than_fit_still_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subscription_manager, "MAX_EXCESS_BYTES", 5_000)
    broker = Honest()
    for number in range(500):
        broker.append("a", number)
    async with talk_to(broker) as bus:
        async with bus.subscribe("a", since=100, buffer=10) as messages, bus.subscribe("other"):
            most = 0
            for number in range(500):
                item = await anext(messages)
                assert (item.seq, item.payload) == (101 + number, number)
                await bus.publish("b", number)
                most = max(most, len(messages._queue.items))
        await bus.ping()
    assert most < 100
    assert len(broker.subscribes) > 10
    assert all(request["epoch"] == EPOCH for request in broker.subscribes[2:])
    assert not broker.held


async def test_full_queue_pauses_reading_only_for_a_limited_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(active_connection, "MAX_READ_PAUSE", 0.001)
    broker = Honest()
    events: list[object] = []
    async with (
        talk_in_memory(broker, on_event=events.append) as (bus, pipe),
        bus.subscribe("a", buffer=2) as messages,
        bus.subscribe("b") as others,
    ):
        await bus.publish_many([("a", number) for number in range(10)])
        while not broker.unsubscribes:
            await anyio.sleep(0)
        await pipe.peer.send({"type": "goaway", "reason": "stopping", "reconnect_in": 1})
        while not events:
            await anyio.sleep(0)
        await bus.publish("b", "still here")
        assert (await anext(others)).payload == "still here"
        assert [(await anext(messages)).payload for _ in range(10)] == list(range(10))
        await bus.publish_many([("a", number) for number in range(10, 20)])
        assert [(await anext(messages)).payload for _ in range(10)] == list(range(10, 20))
    assert len(broker.subscribes) >= 3


async def test_full_queue_does_not_block_another_subscription() -> None:
    async def script(peer: Peer) -> None:
        await peer.subscribed()
        await peer.subscribed()
        for first in range(101, 201, 10):
            await peer.send(*[message(seq) for seq in range(first, first + 10)])
        await peer.send(message(201, "at last", "b", "b"))

    async with (
        talk_in_memory(script) as (bus, _),
        bus.subscribe("a.*", buffer=10) as full,
        bus.subscribe("b") as other,
    ):
        await settle()
        assert len(full._queue.items) < 30
        assert (await anext(other)).payload == "at last"
        assert [(await anext(full)).seq for _ in range(100)] == list(range(101, 201))


async def test_leaving_a_full_subscription_resumes_reading() -> None:
    async with talk_in_memory(Honest()) as (bus, _), bus.subscribe("b") as others:
        async with bus.subscribe("a", buffer=1):
            await bus.publish_many([("a", 1), ("a", 2), ("b", 3)])
        assert (await anext(others)).payload == 3


async def test_blocked_socket_makes_publishers_wait() -> None:
    async def script(peer: Peer) -> None:
        seq = 0
        while True:
            seq += 1
            await peer.published(seq)

    async with talk_in_memory(script) as (bus, pipe):
        pipe.open_gate = False
        protocol = bus._supervisor.protocol
        with anyio.move_on_after(0.01):
            await bus.publish_many([("a", "x" * 10_000)] * 500)
        assert 0 < protocol.outgoing_bytes <= connection_supervisor.MAX_UNSENT_BYTES + 11_000


async def test_lost_connection_wakes_tasks_that_wait_for_room() -> None:
    async def script(peer: Peer) -> None:
        await peer.expect("publish")
        await peer.close(4503, "away")

    async with talk_in_memory(script) as (bus, _):
        with pytest.raises(Disconnected, match="away"):
            await bus.publish_many([("a", "x" * 10_000)] * 5000)


# Authentication


async def test_rejected_token_raises_refused() -> None:
    async def script(peer: Peer) -> None:
        await peer.expect("auth")
        await peer.send({"type": "auth_error", "message": "forged", "code": "unauthenticated"})
        await peer.close(4001, "forged")

    async with serve(script) as url:
        with pytest.raises(Refused, match="forged"):
            async with connect(url, token="t"):
                pytest.fail("it was refused")


async def test_broker_that_closes_instead_of_replying_is_a_disconnect() -> None:
    async def script(peer: Peer) -> None:
        await peer.expect("auth")
        await peer.close(4503, "no database")

    async with serve(script) as url:
        with pytest.raises(Disconnected, match="no database") as caught:
            async with connect(url, token="t"):
                pytest.fail("it was closed")
        assert caught.value.code == 4503


async def test_broker_that_never_replies_is_a_disconnect() -> None:
    async with serve(lambda peer: anyio.sleep_forever()) as url:
        with pytest.raises(Disconnected, match=r"did not answer within 0\.05 s"):
            async with connect(url, token="t", timeout=0.05):
                pytest.fail("it did not answer")


async def test_reply_may_arrive_late_and_in_pieces() -> None:
    async def script(peer: Peer) -> None:
        await peer.expect("auth")
        line = str(AUTH_OK).replace("'", '"').encode()
        for at in range(len(line)):
            await peer.write(line[at : at + 1])

    async with serve(script) as url, connect(url, token="t") as bus:
        assert bus.client_id == "alice"


async def test_open_bus_accepts_any_transport() -> None:
    async with talk_in_memory(Honest()) as (_, pipe):
        pass
    assert pipe.closed is not None

    async def dial() -> Any:
        raise Disconnected("no way")

    with pytest.raises(Disconnected, match="no way"):
        async with open_bus(dial, token="t"):
            pytest.fail("there is no transport")
