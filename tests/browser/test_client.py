"""The JavaScript client in real browsers: WebTransport, fallback to WebSocket without UDP, and the return from it."""

from __future__ import annotations

import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import trio

import catbus
from catbus.config import DatabaseSettings, DrainSettings, WebTransportSettings
from catbus.endpoints.webtransport import packet_router, webtransport_session
from tests.brokers import CONFIG, TOKEN
from tests.browser.driver import Browser
from tests.browser.test_webtransport import serving
from tests.chaos.udp_relay import UdpRelay

SECOND = 1000
"""Milliseconds."""

HEAD_START = 2 * SECOND
"""Milliseconds of head start for WebTransport. Generous, because two browsers and two replicas share one machine."""

PATIENT_OPTIONS = {"headStart": HEAD_START, "reconnectDelay": 50, "maxQueueSize": 1000}

CONNECT = """
    const { CatbusClient } = await import('/catbus.js');
    const [url, fallbackUrl, token, options] = args;
    window.client = new CatbusClient({ url, fallbackUrl, token, ...options });
    window.events = { states: [], transports: [], errors: [], goaways: 0 };
    client.onStateChange((state) => events.states.push(state));
    client.on('transport', (transport) => events.transports.push(transport));
    client.on('error', (error) => events.errors.push(error.message));
    client.on('goaway', () => events.goaways++);
    const began = performance.now();
    await client.connect();
    return { ms: performance.now() - began, transport: client.transport, id: client.id };
"""
SUBSCRIBE = """
    window.received = [];
    await client.subscribe(args[0], ({ seq, payload }) => received.push([seq, payload]), args[1] ?? {});
"""
UNTIL = """
    const began = Date.now();
    while (!(%s)) {
        if (Date.now() - began > 60_000) throw new Error(JSON.stringify([received.length, received.slice(-3), events]));
        await new Promise((resolve) => setTimeout(resolve, 5));
    }
    return true;
"""


@dataclass
class BrowserAndBroker:
    """A broker, a page of its origin, and a UDP relay between them, which can drop packets."""

    broker: catbus.Broker
    browser: Browser
    websocket: str
    webtransport: str
    relay: UdpRelay


def configuration(state: Path, **changes: object) -> catbus.Config:
    bound = WebTransportSettings(bind=("127.0.0.1:0",))
    return msgspec.structs.replace(CONFIG, state=str(state), webtransport=bound, **changes)


@asynccontextmanager
async def open_broker_and_page(browser: Browser, config: catbus.Config) -> AsyncIterator[BrowserAndBroker]:
    with trio.fail_after(100):
        async with serving(config) as (broker, origin), trio.open_nursery() as nursery:
            addresses = dict(broker.addresses)
            relay = UdpRelay(random.Random(1))
            await nursery.start(relay.run)
            relay.set_target(("127.0.0.1", int(addresses["webtransport"].rpartition(":")[2])))
            await browser.goto(f"{origin}/health")
            websocket = f"ws://{addresses['websocket']}/ws"
            yield BrowserAndBroker(broker, browser, websocket, f"https://127.0.0.1:{relay.port}", relay)
            nursery.cancel_scope.cancel()


async def test_client_prefers_webtransport_and_finds_the_certificate(browser: Browser, tmp_path: Path) -> None:
    async with open_broker_and_page(browser, configuration(tmp_path)) as setup:
        browser = setup.browser
        found = await browser.run(CONNECT, setup.webtransport, setup.websocket, TOKEN)
        assert (found["transport"], found["id"]) == ("webtransport", "alice")
        await browser.run(SUBSCRIBE, "web.*", {"stream": True, "datagrams": True})
        assert await browser.run("return (await client.publish('web.page', {n: 1})).seq") == 1
        assert await browser.run("return await client.publish('web.page', 2, {ephemeral: true})") == {}
        await browser.run(UNTIL % "received.length === 2")
        assert await browser.run("return received") == [[1, {"n": 1}], [None, 2]]
        assert await browser.run("return (await client.history('web.*')).messages.length") == 1
        assert await browser.run("return events.states") == ["connecting", "authenticating", "connected"]
        await browser.run("await client.disconnect()")
        while setup.broker.replica.sessions:
            await trio.sleep(0.01)


WORKER = """
    const source = `
        import { CatbusClient } from '${location.origin}/catbus.js';
        onmessage = async ({ data: [url, token, discovery] }) => {
            const client = new CatbusClient({ url, token, discovery });
            await client.connect();
            await client.subscribe('w.*', ({ payload }) => postMessage([client.transport, payload]));
            await client.publish('w.x', 'from a worker');
        };`;
    const worker = new Worker(URL.createObjectURL(new Blob([source], { type: 'text/javascript' })), { type: 'module' });
    const received = new Promise((resolve, reject) => {
        worker.onmessage = ({ data }) => resolve(data);
        worker.onerror = (error) => reject(error.message);
    });
    worker.postMessage(args);
    return await received;
"""


async def test_client_runs_in_a_worker(browser: Browser, tmp_path: Path) -> None:
    async with open_broker_and_page(browser, configuration(tmp_path)) as setup:
        discovery = setup.websocket.replace("ws:", "http:")
        received = await setup.browser.run(WORKER, setup.webtransport, TOKEN, discovery)
        assert received == ["webtransport", "from a worker"]


async def test_client_connects_within_a_second_without_udp(browser: Browser, tmp_path: Path) -> None:
    """Tries a closed UDP port, and a port that drops every packet."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent_port:
        silent_port.bind(("127.0.0.1", 0))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as unused_port:
            unused_port.bind(("127.0.0.1", 0))
            closed = unused_port.getsockname()[1]
        async with open_broker_and_page(browser, configuration(tmp_path)) as setup:
            for port in (closed, silent_port.getsockname()[1]):
                found = await setup.browser.run(CONNECT, f"https://127.0.0.1:{port}", setup.websocket, TOKEN)
                assert found["transport"] == "websocket"
                assert found["ms"] < SECOND
                print(f"connected by WebSocket in {found['ms']:.0f} ms")
                # The client remembers the failure, so the next attempt has no head start.
                again = await setup.browser.run(CONNECT, f"https://127.0.0.1:{port}", setup.websocket, TOKEN)
                assert again["transport"] == "websocket"
                assert again["ms"] < found["ms"] + 100


async def test_client_replaces_lost_webtransport_and_returns_to_it_without_loss(
    browser: Browser, tmp_path: Path, database_url: str
) -> None:
    """Receives 5,000 messages over WebTransport, then WebSocket, then WebTransport again."""
    config = configuration(tmp_path, database=DatabaseSettings(url=database_url))
    options = {
        "headStart": HEAD_START,
        "pingInterval": 200,
        "pingTimeout": 300,
        "reconnectDelay": 50,
        "upgradeInterval": 300,
    }
    async with open_broker_and_page(browser, config) as setup:
        browser = setup.browser
        found = await browser.run(CONNECT, setup.webtransport, setup.websocket, TOKEN, options)
        assert found["transport"] == "webtransport"
        await browser.run(SUBSCRIBE, "load.*")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(publish, setup.websocket, 5000)
            await browser.run(UNTIL % "received.length > 1000")
            setup.relay.loss = 1.0
            await browser.run(UNTIL % "client.transport === 'websocket'")
            setup.relay.loss = 0.0
            await browser.run(UNTIL % "client.transport === 'webtransport'")
        await browser.run(UNTIL % "received.length >= 5000")
        received = await browser.run("return received")
        events = await browser.run("return events")
    assert received == [[number, number] for number in range(1, 5001)]
    assert events["transports"][:3] == ["webtransport", "websocket", "webtransport"]


async def publish(url: str, number: int) -> None:
    async with catbus.connect(url, token=TOKEN) as bus:
        for first in range(1, number + 1, 10):
            await bus.publish_many([("load.x", n) for n in range(first, first + 10)])
            await trio.sleep(0.01)


async def test_client_leaves_a_stopping_replica_without_loss(
    browser: Browser, tmp_path: Path, database_url: str
) -> None:
    """The replica sends `goaway`. The client reconnects before the replica ends, and continues."""
    config = configuration(
        tmp_path, database=DatabaseSettings(url=database_url), drain=DrainSettings(delay=0, window=2, deadline=20)
    )
    async with serving(config) as (other, _), open_broker_and_page(browser, config) as setup:
        browser, relay = setup.browser, setup.relay
        await browser.run(CONNECT, setup.webtransport, setup.websocket, TOKEN, PATIENT_OPTIONS)
        await browser.run(SUBSCRIBE, "load.*")
        await browser.run(
            """
            window.replies = [];
            window.publishing = (async () => {
                for (let n = 0; n < 600; n++) {
                    replies.push(client.publish('load.x', n));
                    await new Promise((resolve) => setTimeout(resolve, 4));
                }
                return (await Promise.all(replies)).map(({ seq }) => seq);
            })();
            """
        )
        await browser.run(UNTIL % "received.length > 50")
        # New connections go to the other replica; present ones stay.
        relay.target = ("127.0.0.1", int(dict(other.addresses)["webtransport"].rpartition(":")[2]))
        setup.broker.stop()
        await browser.run("publishing.then(() => window.published = true)")
        await browser.run(UNTIL % "window.published")
        seqs = await browser.run("return await publishing")
        await browser.run(UNTIL % "received.length >= 600")
        received = await browser.run("return received")
        events = await browser.run("return events")
        assert len(other.replica.sessions) == 1
    assert seqs == list(range(1, 601))
    assert received == [[number + 1, number] for number in range(600)]
    assert events["goaways"] == 1
    assert "reconnecting" not in events["states"]


FREEZE = """
    // Simulates a frozen page: no stream is read until it resumes.
    const read = ReadableStreamDefaultReader.prototype.read;
    ReadableStreamDefaultReader.prototype.read = async function () {
        await window.frozen;
        return read.call(this);
    };
    window.freeze = () => { window.frozen = new Promise((resolve) => { window.thaw = resolve; }); };
"""


async def test_subscription_with_an_unread_stream_resumes_at_its_cursor(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webtransport_session, "STALL_TIMEOUT", 1.0)
    monkeypatch.setattr(packet_router, "PING_INTERVAL", 1.0)
    # More than a browser buffers while its page does not read.
    payload = "x" * 60_000
    async with open_broker_and_page(browser, configuration(tmp_path)) as setup:
        await browser.run(FREEZE)
        await browser.run(CONNECT, setup.webtransport, setup.websocket, TOKEN, PATIENT_OPTIONS)
        await browser.run(SUBSCRIBE, "own.*", {"stream": True})
        await browser.run("freeze()")
        published = 0
        with trio.fail_after(60):
            # The broker ends the stream and its subscription, and keeps the session.
            while (delivery := setup.broker.replica.delivery.statistics()).live or delivery.lagging:
                if delivery.live:
                    await setup.broker.publish("own.x", payload)
                    published += 1
                await trio.sleep(0.005)
        assert len(setup.broker.replica.sessions) == 1
        await browser.run("thaw()")
        await browser.run(UNTIL % f"received.length >= {published}")
        assert await browser.run("return received.map(([seq]) => seq)") == list(range(1, published + 1))
        assert await browser.run("return [events.states, events.errors]") == [
            ["connecting", "authenticating", "connected"],
            [],
        ]
