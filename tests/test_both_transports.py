"""One broker with WebSocket and WebTransport endpoints: clients of both transports get the same service."""

from __future__ import annotations

import base64
import json
import random
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest
import trio
import trio.testing

import catbus
from catbus import CloseCode, Config
from catbus.client import Backoff, Bus, Disconnected, Ended, GoAway, Reconnected, Transport
from catbus.client.broker_address import parse_address
from catbus.client.happy_eyeballs import PREFERENCE_TIME, TransportRace
from catbus.client.transport_interface import MAIN_STREAM
from catbus.client.websocket_transport import WebSocketTransport
from catbus.client.webtransport_transport import WebTransportTransport, make_configuration, open_webtransport
from catbus.config import DrainSettings, WebTransportSettings
from catbus.errors import PeerError
from catbus.protocol import wire_messages as wire
from catbus.protocol.json_splitter import JsonSplitter
from tests.brokers import CONFIG, TOKEN
from tests.chaos.udp_relay import UdpRelay
from tests.endpoints.raw_peer import Peer


@asynccontextmanager
async def running(state: Path, config: Config = CONFIG) -> AsyncIterator[tuple[catbus.Broker, str, dict[str, Any]]]:
    """A broker with both endpoints, its WebSocket URL, and its discovery document."""
    config = msgspec.structs.replace(config, state=str(state), webtransport=WebTransportSettings(bind=("127.0.0.1:0",)))
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            broker = await nursery.start(catbus.serve, config)
            addresses = dict(broker.addresses)
            assert set(addresses) == {"websocket", "webtransport"}
            yield broker, f"ws://{addresses['websocket']}/ws", await discover(addresses["websocket"])
            broker.stop()


async def discover(address: str) -> dict[str, Any]:
    host, _, port = address.rpartition(":")
    async with await trio.open_tcp_stream(host, int(port)) as stream:
        peer = Peer(stream)
        await peer.send(f"GET /.well-known/catbus HTTP/1.1\r\nHost: {address}\r\n\r\n".encode())
        found = json.loads((await peer.response()).body)
    assert isinstance(found, dict)
    return found


def transport(bus: Bus) -> Transport:
    [connection] = bus._supervisor._connections
    return connection._transport


async def test_message_reaches_clients_on_both_transports(tmp_path: Path) -> None:
    async with (
        running(tmp_path) as (_, websocket, found),
        catbus.connect(websocket, token=TOKEN) as one,
        catbus.connect(found["webtransport"], token=TOKEN, ca=found["certificate"]) as other,
        one.subscribe("a.*") as here,
        other.subscribe("a.*") as there,
    ):
        seqs = [await one.publish("a.b", 1), await other.publish("a.c", 2)]
        for messages in (here, there):
            assert [((m := await anext(messages)).seq, m.payload) for _ in seqs] == [(seqs[0], 1), (seqs[1], 2)]


async def test_goaway_has_a_delay_within_the_drain_window_on_both_transports(tmp_path: Path) -> None:
    """On either transport `goaway` names a delay within the window, and the close code permits a reconnect."""
    goaways: list[GoAway] = []
    ended: list[int | None] = []
    codes: list[int | None] = []

    async def stay(url: str, ca: str | None, *, task_status: trio.TaskStatus[None]) -> None:
        def record(event: object) -> None:
            if isinstance(event, Ended):
                ended.append(event.code)
            else:
                assert isinstance(event, GoAway)
                goaways.append(event)

        try:
            async with (
                catbus.connect(url, token=TOKEN, ca=ca, reconnect=False, on_event=record) as bus,
                bus.subscribe("a.*") as messages,
            ):
                task_status.started()
                await anext(messages)
        except Disconnected as end:
            codes.append(end.code)

    config = msgspec.structs.replace(CONFIG, drain=DrainSettings(delay=0, window=0.5, deadline=5))
    async with trio.open_nursery() as nursery, running(tmp_path, config) as (broker, websocket, found):
        for _ in range(5):
            await nursery.start(stay, websocket, None)
            await nursery.start(stay, found["webtransport"], found["certificate"])
        broker.stop()
    assert len(goaways) == 10
    assert all(0 <= goaway.reconnect_in <= 0.5 for goaway in goaways)
    assert len({goaway.reconnect_in for goaway in goaways}) > 1, "the clients reconnect at different times"
    assert codes == ended == [CloseCode.SHUTTING_DOWN] * 10


async def test_cursor_of_one_transport_resumes_over_the_other(tmp_path: Path) -> None:
    async with running(tmp_path) as (broker, websocket, found):
        async with (
            catbus.connect(found["webtransport"], token=TOKEN, ca=found["certificate"]) as bus,
            bus.subscribe("a") as messages,
        ):
            await broker.publish("a", 1)
            assert (await anext(messages)).payload == 1
            cursor, epoch = messages.cursor, messages.epoch
        await broker.publish("a", 2)
        async with catbus.connect(websocket, token=TOKEN) as bus, bus.subscribe("a", since=cursor, epoch=epoch) as more:
            assert (await anext(more)).payload == 2


async def test_certificate_hash_from_discovery_is_sufficient(tmp_path: Path) -> None:
    async with running(tmp_path) as (_, _, found):
        digest = base64.b64decode(found["certificate_hash"])
        async with catbus.connect(found["webtransport"], token=TOKEN, certificate_hash=digest) as bus:
            assert await bus.publish("a", 1) == 1
        with pytest.raises(catbus.Disconnected):
            async with catbus.connect(found["webtransport"], token=TOKEN, certificate_hash=bytes(32)):
                pass


async def test_large_bursts_pass_in_both_directions(tmp_path: Path) -> None:
    async with (
        running(tmp_path) as (_, _, found),
        catbus.connect(found["webtransport"], token=TOKEN, ca=found["certificate"]) as bus,
        bus.subscribe("a") as messages,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(bus.publish_many, [("a", [number, "x" * 2000]) for number in range(1500)])
        for number in range(1500):
            assert (await anext(messages)).payload[0] == number


@pytest.mark.parametrize("transport", ["websocket", "webtransport"])
async def test_subscription_streams_and_datagrams_deliver_the_same_messages(tmp_path: Path, transport: str) -> None:
    async with running(tmp_path) as (broker, _, found):
        for number in range(100):
            await broker.publish("a.b", number)
        ca = found["certificate"] if transport == "webtransport" else None
        async with (
            catbus.connect(found[transport], token=TOKEN, ca=ca) as bus,
            bus.subscribe("a.*", since=0, buffer=10, stream=True) as slow,
            bus.subscribe("*", stream=True, datagrams=True) as everything,
        ):
            assert await bus.publish("a.c", "x", ephemeral=True) is None
            await bus.publish("a.d", "y")
            assert [(await anext(everything)).payload for _ in range(2)] == ["x", "y"]
            # More messages have arrived than the buffer holds, so the client has paused the subscription.
            kept = [m.seq for m in [await anext(slow) for _ in range(102)] if m.seq is not None]
            assert kept[:100] == list(range(1, 101))
            async with bus.subscribe("b", stream=True) as other:
                await broker.publish("b", 1)
                assert (await anext(other)).payload == 1
            async with bus.subscribe("b", since=other.cursor, epoch=other.epoch, stream=True) as again:
                await broker.publish("b", 2)
                assert (await anext(again)).payload == 2
            assert [(await anext(everything)).seq for _ in range(2)] == [102, 103]


async def test_snapshots_arrive_on_the_streams_of_their_subscriptions(tmp_path: Path) -> None:
    """Each in several pages, because a stream of its own has room for an eighth of a send queue."""
    async with running(tmp_path) as (broker, _, found), trio.open_nursery() as nursery:
        for number in range(300):
            await broker.publish(f"a.n{number:03}", "x" * 500, retain=True)
        address = parse_address(found["webtransport"])
        transport = await open_webtransport(address, make_configuration(address, found["certificate"]))
        nursery.start_soon(transport.run)
        await transport.send(b'{"type":"auth","token":"%b","protocol":1}' % TOKEN.encode())
        for pattern in ("a.*", "*"):
            await transport.send(
                b'{"type":"subscribe","pattern":"%b","retained":true,"stream":true}' % pattern.encode()
            )
        splitters: dict[int, JsonSplitter[wire.ServerMessage]] = {}
        replies: dict[int, list[wire.ServerMessage]] = {}
        while sum(isinstance(each[-1], wire.Live) for each in replies.values() if each) < 2:
            chunk = await transport.receive()
            splitter = splitters.setdefault(chunk.stream, JsonSplitter(wire.decode_server, 1 << 20))
            received = replies.setdefault(chunk.stream, [])
            for reply in splitter.feed(chunk.data):
                assert not isinstance(reply, PeerError)
                received.append(reply)
        own = [each for stream, each in replies.items() if stream != MAIN_STREAM]
        assert len(own) == 2
        for subscribed, *pages, live in own:
            assert isinstance(subscribed, wire.Subscribed)
            assert subscribed.stream
            assert isinstance(live, wire.Live)
            snapshot = [page for page in pages if isinstance(page, wire.Retained)]
            assert [page.complete for page in snapshot] == [False] * (len(pages) - 1) + [True]
            assert [m.seq for page in snapshot for m in page.messages] == list(range(1, 301))
            assert len(pages) > 2
        await transport.aclose()
        nursery.cancel_scope.cancel()


async def test_many_subscription_streams_deliver(tmp_path: Path) -> None:
    async with running(tmp_path) as (broker, _, found):
        url, ca = found["webtransport"], found["certificate"]
        async with catbus.connect(url, token=TOKEN, ca=ca) as bus, AsyncExitStack() as stack:
            subscriptions = [
                await stack.enter_async_context(bus.subscribe(f"a{number}", stream=True)) for number in range(150)
            ]
            for _ in range(3):
                for number in range(150):
                    await broker.publish(f"a{number}", number)
            for number, messages in enumerate(subscriptions):
                assert [(await anext(messages)).payload for _ in range(3)] == [number] * 3


async def test_stopping_broker_sends_goaway_on_both_transports(tmp_path: Path) -> None:
    async def stay(url: str, ca: str | None, *, task_status: trio.TaskStatus[None]) -> None:
        async with (
            catbus.connect(url, token=TOKEN, ca=ca, reconnect=False) as bus,
            bus.subscribe("a") as messages,
        ):
            task_status.started()
            with pytest.raises(catbus.Disconnected) as caught:
                await anext(messages)
            assert caught.value.code == CloseCode.SHUTTING_DOWN

    async with running(tmp_path) as (broker, websocket, found), trio.open_nursery() as nursery:
        await nursery.start(stay, websocket, None)
        await nursery.start(stay, found["webtransport"], found["certificate"])
        broker.stop()


async def test_client_reconnects_over_websocket_without_webtransport(tmp_path: Path) -> None:
    async def use(url: str, fallback: str, ca: str, *, task_status: trio.TaskStatus[None]) -> None:
        async with (
            catbus.connect(url, fallback_url=fallback, token=TOKEN, ca=ca, reconnect=Backoff(0.1, 0.2)) as bus,
            bus.subscribe("a", stream=True) as messages,
        ):
            assert isinstance(transport(bus), WebTransportTransport)
            task_status.started()
            assert (await anext(messages)).payload == "before"
            assert (await anext(messages)).payload == "after"
            assert isinstance(transport(bus), WebSocketTransport)
            assert [gap.reason for gap in messages.gaps] == ["epoch"]

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            async with trio.open_nursery() as users:
                async with running(tmp_path) as (broker, websocket, found):
                    await users.start(use, found["webtransport"], websocket, found["certificate"])
                    await broker.publish("a", "before")
                    broker.stop()
                endpoint = catbus.config.WebSocketSettings(bind=(urlsplit(websocket).netloc,))
                again = await nursery.start(catbus.serve, msgspec.structs.replace(CONFIG, websocket=endpoint))
                await again.publish("a", "after")
            again.stop()


async def test_fallback_connects_at_once_when_udp_is_blocked(tmp_path: Path) -> None:
    async with running(tmp_path) as (_, websocket, found):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
            silent.bind(("127.0.0.1", 0))
            url = f"https://127.0.0.1:{silent.getsockname()[1]}"
            began = trio.current_time()
            async with catbus.connect(url, fallback_url=websocket, token=TOKEN, ca=found["certificate"]) as bus:
                assert isinstance(transport(bus), WebSocketTransport)
                assert await bus.publish("a", 1) == 1
            assert trio.current_time() - began < 3


@pytest.mark.parametrize("first", [0, 1])
async def test_connect_fails_when_neither_transport_answers(first: int) -> None:
    urls = ["ws://127.0.0.1:1/ws", "https://127.0.0.1:1"]
    with pytest.raises(catbus.Disconnected, match="cannot connect to"):
        async with catbus.connect(urls[first], fallback_url=urls[1 - first], token=TOKEN):
            pytest.fail("no broker listens there")


async def test_invalid_token_is_rejected_alike_on_both_transports(tmp_path: Path) -> None:
    async with running(tmp_path) as (_, websocket, found):
        for url, ca in ((websocket, None), (found["webtransport"], found["certificate"])):
            with pytest.raises(catbus.Refused) as caught:
                async with catbus.connect(url, token="sub-wrong", ca=ca):
                    pass
            assert caught.value.code is catbus.ErrorCode.UNAUTHENTICATED


def test_webtransport_outside_of_loopback_needs_a_certificate() -> None:
    config = Config(webtransport=WebTransportSettings(bind=("0.0.0.0:4433",)))
    assert not config.webtransport_served
    assert Config(webtransport=WebTransportSettings(bind=("0.0.0.0:4433",), cert="a", key="b")).webtransport_served


async def test_client_moves_to_webtransport_when_udp_works_again(tmp_path: Path) -> None:
    """No message is lost or repeated when the client publishes and receives during the move."""
    events: list[object] = []
    relay = UdpRelay(random.Random(1))
    async with running(tmp_path) as (broker, websocket, found), trio.open_nursery() as nursery:
        await nursery.start(relay.run)
        relay.set_target(("127.0.0.1", urlsplit(found["webtransport"]).port or 0))
        relay.loss = 1.0
        url = f"https://127.0.0.1:{relay.port}"
        began = trio.current_time()
        async with (
            catbus.connect(
                url,
                fallback_url=websocket,
                token=TOKEN,
                ca=found["certificate"],
                upgrade=0.2,
                timeout=1.0,
                on_event=events.append,
            ) as bus,
            bus.subscribe("a") as messages,
        ):
            assert bus.transport == "websocket"
            assert trio.current_time() - began < 1.0
            numbers = iter(range(1_000_000))

            async def publish() -> None:
                while bus.transport == "websocket" or len(answers) < 300:
                    answers.append(await bus.publish("a", next(numbers)))

            answers: list[int] = []
            async with trio.open_nursery() as publishing:
                publishing.start_soon(publish)
                while len(answers) < 100:
                    await trio.sleep(0.01)
                relay.loss = 0.0
            for number in range(len(answers)):
                message = await anext(messages)
                assert (message.seq, message.payload) == (answers[number], number)
            assert answers == list(range(1, len(answers) + 1))
            assert bus.transport == "webtransport"
            while len(broker.replica.sessions) > 1:
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    assert events == [Reconnected(moved=True)]


async def test_transport_that_connected_first_is_preferred_for_a_while(autojump_clock: trio.testing.MockClock) -> None:
    tried: list[str] = []

    class Attempt:
        def __init__(self, name: str, takes: float) -> None:
            self.name, self.takes = name, takes

        async def __call__(self) -> Any:
            tried.append(self.name)
            await trio.sleep(self.takes)
            return self

        async def aclose(self) -> None:
            pass

    slow, fast = Attempt("slow", 5), Attempt("fast", 1)
    race = TransportRace([slow, fast])
    for expected in (["slow", "fast"], ["fast", "slow"], ["fast", "slow"]):
        tried.clear()
        assert await race() is fast  # type: ignore[comparison-overlap]
        assert tried == expected
    await trio.sleep(PREFERENCE_TIME)
    tried.clear()
    await race()
    assert tried == ["slow", "fast"]
