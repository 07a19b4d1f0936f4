"""Real browsers over WebTransport: certificate hashes, replicas, streams of subscriptions, datagrams, closing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

import catbus
from catbus import Broker, CloseCode, Config
from catbus.config import DatabaseSettings, WebTransportSettings
from catbus.endpoints.webtransport import first_version_spacing, packet_router, webtransport_session
from catbus.endpoints.webtransport.udp_socket import UdpSocket
from catbus.webtransport import quic_configuration as webtransport_configuration
from tests.brokers import CONFIG, TOKEN
from tests.browser.driver import Browser

CONNECT = Path(__file__).with_name("page.js").read_text(encoding="utf-8")


@asynccontextmanager
async def serving(config: Config) -> AsyncIterator[tuple[Broker, str]]:
    """Run a broker with both transports. Yields it and its HTTP origin."""
    async with trio.open_nursery() as nursery:
        broker = await nursery.start(catbus.serve, config)
        await broker.replica.log.wait_open()
        yield broker, f"http://{dict(broker.addresses)['websocket']}"
        broker.stop()


def configuration(state: Path, database: DatabaseSettings | None = None) -> Config:
    return msgspec.structs.replace(
        CONFIG,
        state=str(state),
        webtransport=WebTransportSettings(bind=("127.0.0.1:0",)),
        database=database or DatabaseSettings(),
    )


async def test_page_publishes_and_receives_from_another_replica(
    browser: Browser, tmp_path: Path, database_url: str
) -> None:
    config = configuration(tmp_path, DatabaseSettings(url=database_url))
    with trio.fail_after(90):
        async with serving(config) as (_, origin), serving(config) as (_, other):
            await browser.goto(f"{origin}/health")
            hello, subscribed = await browser.run(CONNECT, TOKEN, True)
            assert (hello["type"], hello["client_id"], subscribed["type"]) == ("auth_ok", "alice", "subscribed")
            await browser.run("await bus.send({type: 'publish', channel: 'web.page', payload: {n: 1}, id: 1})")
            heard = [await browser.run("return await bus.receive()") for _ in range(2)]
            assert {message["type"] for message in heard} == {"message", "published"}
            url = other.replace("http://", "ws://") + "/ws"
            async with catbus.connect(url, token=TOKEN) as bus:
                seq = await bus.publish("web.service", "from another replica, over WebSocket")
            message = await browser.run("return await bus.receive()")
            assert (message["seq"], message["channel"]) == (seq, "web.service")


async def test_close_codes_pass_in_both_directions(browser: Browser, tmp_path: Path) -> None:
    with trio.fail_after(90):
        async with serving(configuration(tmp_path)) as (broker, origin):
            await browser.goto(f"{origin}/health")
            await browser.run(CONNECT, TOKEN, True)
            assert len(broker.replica.sessions) == 1
            await browser.run("bus.session.close({closeCode: 7, reason: 'enough'}); await bus.session.closed")
            while broker.replica.sessions:
                await trio.sleep(0.01)
            await browser.run(CONNECT, TOKEN, True)
            await browser.run("bus.ending = bus.session.closed")
            broker.stop()
            info = await browser.run("const i = await bus.ending; return [i.closeCode, i.reason]")
            assert info == [CloseCode.SHUTTING_DOWN, "the replica is stopping"]


async def test_150_subscriptions_have_streams_of_their_own(browser: Browser, tmp_path: Path) -> None:
    with trio.fail_after(90):
        async with serving(configuration(tmp_path)) as (broker, origin):
            await browser.goto(f"{origin}/health")
            await browser.run(CONNECT, TOKEN, True)
            await browser.run(
                "await bus.send(...Array.from({length: 150}, (_, n) => "
                "({type: 'subscribe', pattern: `own.s${n}`, stream: true, id: n})))"
            )
            await browser.run("await bus.waitFor(() => bus.lines.length + Object.keys(bus.streams).length === 150)")
            own, rest = await browser.run("return [bus.streams, bus.lines.splice(0)]")
            # The browser limits the number of streams. The remaining subscriptions use the stream of the session.
            assert 90 <= len(own) <= 100
            assert all(lines[0]["stream"] for lines in own.values())
            assert not any("stream" in line for line in rest)
            assert sorted(line["id"] for line in [*rest, *(lines[0] for lines in own.values())]) == list(range(150))
            for number in range(150):
                await broker.publish(f"own.s{number}", number)
            await browser.run(
                "await bus.waitFor(() => bus.lines.length === args[0] &&"
                " Object.values(bus.streams).every((lines) => lines.length === 2))",
                len(rest),
            )
            own, rest = await browser.run("return [bus.streams, bus.lines]")
            heard = {pattern: lines[1] for pattern, lines in own.items()} | {line["pattern"]: line for line in rest}
            assert {line["pattern"]: line["payload"] for line in heard.values()} == {
                f"own.s{number}": number for number in range(150)
            }


async def test_ephemeral_messages_arrive_as_datagrams(browser: Browser, tmp_path: Path) -> None:
    with trio.fail_after(90):
        async with serving(configuration(tmp_path)) as (broker, origin):
            await browser.goto(f"{origin}/health")
            await browser.run(CONNECT, TOKEN, True)
            await browser.run("await bus.send({type: 'subscribe', pattern: 'pointer.*', datagrams: true})")
            assert (await browser.run("return await bus.receive()"))["type"] == "subscribed"
            for number in range(5):
                await broker.publish("pointer.mouse", [number, number], ephemeral=True)
            await broker.publish("pointer.mouse", "x" * 2000, ephemeral=True)
            # A message that does not fit into a datagram arrives on the stream.
            assert (await browser.run("return await bus.receive()"))["payload"] == "x" * 2000
            datagrams = await browser.run("await bus.waitFor(() => bus.datagrams.length === 5); return bus.datagrams")
            assert sorted(message["payload"] for message in datagrams) == [[number, number] for number in range(5)]
            assert {message["pattern"] for message in datagrams} == {"pointer.*"}


async def test_objects_may_be_split_anywhere(browser: Browser, tmp_path: Path) -> None:
    with trio.fail_after(90):
        async with serving(configuration(tmp_path)) as (_, origin):
            await browser.goto(f"{origin}/health")
            await browser.run(CONNECT, TOKEN, True)
            # Three objects in one write, then one object in as many writes as it has bytes; no newline in any of them.
            await browser.run("await bus.send(...[1, 2, 3].map((seq) => ({type: 'ping', seq})))")
            await browser.run(
                "for (const byte of new TextEncoder().encode(JSON.stringify({type: 'ping', seq: 4, pad: 'ü}{'})))"
                " await bus.writer.write(new Uint8Array([byte]))"
            )
            pongs: list[int] = []
            heard: dict[str, Any] = {}
            # One `head` may replace several that were not sent yet.
            while len(pongs) < 4 or heard.get("type") != "head":
                heard = await browser.run("return await bus.receive()")
                pongs += [heard["seq"]] if heard["type"] == "pong" else []
            assert pongs == [1, 2, 3, 4]


def drop_packets(port: UdpSocket, most: int) -> list[Any]:
    with suppress(BlockingIOError):
        while port._socket.recv(1 << 16):
            pass
    return []


async def test_page_notices_a_vanished_broker(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webtransport_configuration, "IDLE_TIMEOUT", 3.0)
    with trio.fail_after(90):
        async with serving(configuration(tmp_path)) as (broker, origin):
            await browser.goto(f"{origin}/health")
            await browser.run(CONNECT, TOKEN, True)
            with monkeypatch.context() as silence:
                # From here on every packet is dropped, in both directions.
                silence.setattr(UdpSocket, "receive", drop_packets)
                silence.setattr(UdpSocket, "send", lambda self, datagrams, to: None)
                ending = await browser.run("return await bus.session.closed.catch((error) => error.name)")
                assert ending == "WebTransportError"
                # The broker notices the vanished browser as well.
                while broker.replica.sessions:
                    await trio.sleep(0.05)


async def test_wrong_token_closes_with_its_code(browser: Browser, tmp_path: Path) -> None:
    with trio.fail_after(90):
        async with serving(configuration(tmp_path)) as (_, origin):
            await browser.goto(f"{origin}/health")
            # A page cannot read the rest of a stream after the session has closed, so the close repeats the error.
            await browser.run(CONNECT, "sub-wrong", False)
            info = await browser.run("const i = await bus.session.closed; return [i.closeCode, i.reason]")
            assert info == [CloseCode.UNAUTHENTICATED, "the token is not valid"]


FIRST_VERSION = """
const found = await (await fetch('/.well-known/catbus')).json();
const value = Uint8Array.from(atob(found.certificate_hash), (c) => c.charCodeAt(0));
const session = new WebTransport(found.webtransport, {serverCertificateHashes: [{algorithm: 'sha-256', value}]});
await session.ready;
const stream = await session.createBidirectionalStream();
const writer = stream.writable.getWriter(), reader = stream.readable.getReader();
const say = (message) => writer.write(new TextEncoder().encode(JSON.stringify(message)));
const hear = async () => JSON.parse(new TextDecoder().decode((await reader.read()).value));
"""
"""A client of the first protocol version, which takes the data of one read as one object."""


async def test_first_version_page_reads_one_object_at_a_time(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a machine that is busy with other tests, the page may not read for longer than the default spacing.
    monkeypatch.setattr(first_version_spacing, "SPACING", (0.5, 0.5))
    with trio.fail_after(90):
        async with serving(configuration(tmp_path)) as (_, origin):
            await browser.goto(f"{origin}/health")
            heard = await browser.run(
                FIRST_VERSION + "say({type: 'auth', token: args[0]}); say({type: 'subscribe', pattern: 'a.*'});"
                "say({type: 'publish', channel: 'a.b', payload: 'to myself'}); say({type: 'ping', seq: 1});"
                "return [await hear(), await hear(), await hear(), await hear(), await hear()]",
                TOKEN,
            )
            assert [message["type"] for message in heard[:2]] == ["auth_ok", "subscribed"]
            assert {message["type"] for message in heard[2:]} == {"message", "published", "pong"}


async def test_no_object_for_a_first_version_page_is_split(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page receives more than its ring buffer of 64 KiB holds, and requests each object after the previous one."""
    # The page has read an object when it requests the next one.
    monkeypatch.setattr(first_version_spacing, "SPACING", (0.0, 0.0))
    with trio.fail_after(90):
        async with serving(configuration(tmp_path)) as (_, origin):
            await browser.goto(f"{origin}/health")
            # The page publishes again only after it has received an object.
            heard = await browser.run(
                FIRST_VERSION + "say({type: 'auth', token: args[0]}); await hear();"
                "say({type: 'subscribe', pattern: 'a.*'}); await hear(); const heard = [];"
                "for (let n = 0; n < 90; n++) {"
                " say({type: 'publish', channel: 'a.b', payload: [n, 'x'.repeat(700 + n)], ack: false});"
                " heard.push(await hear()); }"
                "return heard.map((message) => message.payload[0])",
                TOKEN,
            )
            assert heard == list(range(90))


async def test_stream_with_a_cancelled_reader_ends_alone(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chromium then sends STOP_SENDING. Firefox sends nothing, and stops reading."""
    monkeypatch.setattr(webtransport_session, "STALL_TIMEOUT", 1.0)
    monkeypatch.setattr(packet_router, "PING_INTERVAL", 1.0)
    with trio.fail_after(90):
        async with serving(configuration(tmp_path)) as (broker, origin):
            await browser.goto(f"{origin}/health")
            await browser.run(CONNECT, TOKEN, True)
            await browser.run("bus.cancelling = true")
            await browser.run("await bus.send({type: 'subscribe', pattern: 'own.*', stream: true})")
            await browser.run("await bus.waitFor(() => bus.cancelled)")
            while len(broker.replica.delivery._by_send_queue) > 1:
                await broker.publish("own.x", "x" * 60_000)
                await trio.sleep(0.005)
            line = await browser.run("return await bus.receive()")
            assert (line["type"], line["pattern"]) == ("unsubscribed", "own.*")
            seq = await broker.publish("web.page", "still here")
            while (line := await browser.run("return await bus.receive()"))["type"] != "message":
                pass
            assert (line["seq"], line["payload"]) == (seq, "still here")
            assert len(broker.replica.sessions) == 1
