"""The JavaScript client in real browsers: WebTransport, WebSocket where no UDP gets through, and moving in between."""

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
"""For WebTransport, where a test is about it: two browsers and two replicas on one machine can take their time."""

PATIENT = {"headStart": HEAD_START, "reconnectDelay": 50, "maxQueueSize": 1000}

CONNECT = """
    const { CatbusClient } = await import('/catbus.js');
    const [url, fallbackUrl, token, options] = args;
    window.client = new CatbusClient({ url, fallbackUrl, token, ...options });
    window.told = { states: [], transports: [], errors: [], goaways: 0 };
    client.onStateChange((state) => told.states.push(state));
    client.on('transport', (transport) => told.transports.push(transport));
    client.on('error', (error) => told.errors.push(error.message));
    client.on('goaway', () => told.goaways++);
    const began = performance.now();
    await client.connect();
    return { ms: performance.now() - began, transport: client.transport, id: client.id };
"""
SUBSCRIBE = """
    window.heard = [];
    await client.subscribe(args[0], ({ seq, payload }) => heard.push([seq, payload]), args[1] ?? {});
"""
UNTIL = """
    const began = Date.now();
    while (!(%s)) {
        if (Date.now() - began > 60_000) throw new Error(JSON.stringify([heard.length, heard.slice(-3), told]));
        await new Promise((resolve) => setTimeout(resolve, 5));
    }
    return true;
"""


@dataclass
class Place:
    """A broker, a page of its origin, and the way of its datagrams, which can be closed."""

    broker: catbus.Broker
    browser: Browser
    websocket: str
    webtransport: str
    relay: UdpRelay


def configuration(state: Path, **changes: object) -> catbus.Config:
    bound = WebTransportSettings(bind=("127.0.0.1:0",))
    return msgspec.structs.replace(CONFIG, state=str(state), webtransport=bound, **changes)


@asynccontextmanager
async def open_place(browser: Browser, config: catbus.Config) -> AsyncIterator[Place]:
    with trio.fail_after(100):
        async with serving(config) as (broker, origin), trio.open_nursery() as nursery:
            addresses = dict(broker.addresses)
            relay = UdpRelay(random.Random(1))
            await nursery.start(relay.run)
            relay.set_target(("127.0.0.1", int(addresses["webtransport"].rpartition(":")[2])))
            await browser.goto(f"{origin}/health")
            websocket = f"ws://{addresses['websocket']}/ws"
            yield Place(broker, browser, websocket, f"https://127.0.0.1:{relay.port}", relay)
            nursery.cancel_scope.cancel()


async def test_client_prefers_webtransport_and_finds_the_certificate(browser: Browser, tmp_path: Path) -> None:
    async with open_place(browser, configuration(tmp_path)) as place:
        browser = place.browser
        found = await browser.run(CONNECT, place.webtransport, place.websocket, TOKEN)
        assert (found["transport"], found["id"]) == ("webtransport", "alice")
        await browser.run(SUBSCRIBE, "web.*", {"stream": True, "datagrams": True})
        assert await browser.run("return (await client.publish('web.page', {n: 1})).seq") == 1
        assert await browser.run("return await client.publish('web.page', 2, {ephemeral: true})") == {}
        await browser.run(UNTIL % "heard.length === 2")
        assert await browser.run("return heard") == [[1, {"n": 1}], [None, 2]]
        assert await browser.run("return (await client.history('web.*')).messages.length") == 1
        assert await browser.run("return told.states") == ["connecting", "authenticating", "connected"]
        await browser.run("await client.disconnect()")
        while place.broker.replica.sessions:
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
    const heard = new Promise((resolve, reject) => {
        worker.onmessage = ({ data }) => resolve(data);
        worker.onerror = (error) => reject(error.message);
    });
    worker.postMessage(args);
    return await heard;
"""


async def test_client_runs_in_a_worker(browser: Browser, tmp_path: Path) -> None:
    async with open_place(browser, configuration(tmp_path)) as place:
        discovery = place.websocket.replace("ws:", "http:")
        heard = await place.browser.run(WORKER, place.webtransport, TOKEN, discovery)
        assert heard == ["webtransport", "from a worker"]


async def test_client_connects_within_a_second_without_udp(browser: Browser, tmp_path: Path) -> None:
    """Where nobody listens, and where every packet is swallowed."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as swallowing:
        swallowing.bind(("127.0.0.1", 0))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as gone:
            gone.bind(("127.0.0.1", 0))
            closed = gone.getsockname()[1]
        async with open_place(browser, configuration(tmp_path)) as place:
            for port in (closed, swallowing.getsockname()[1]):
                found = await place.browser.run(CONNECT, f"https://127.0.0.1:{port}", place.websocket, TOKEN)
                assert found["transport"] == "websocket"
                assert found["ms"] < SECOND
                print(f"connected by WebSocket in {found['ms']:.0f} ms")
                # It is remembered: the next time costs no head start.
                again = await place.browser.run(CONNECT, f"https://127.0.0.1:{port}", place.websocket, TOKEN)
                assert again["transport"] == "websocket"
                assert again["ms"] < found["ms"] + 100


async def test_client_replaces_lost_webtransport_and_returns_to_it_without_loss(
    browser: Browser, tmp_path: Path, database_url: str
) -> None:
    """5,000 messages, over WebTransport, then WebSocket, then WebTransport again."""
    config = configuration(tmp_path, database=DatabaseSettings(url=database_url))
    options = {
        "headStart": HEAD_START,
        "pingInterval": 200,
        "pingTimeout": 300,
        "reconnectDelay": 50,
        "upgradeInterval": 300,
    }
    async with open_place(browser, config) as place:
        browser = place.browser
        found = await browser.run(CONNECT, place.webtransport, place.websocket, TOKEN, options)
        assert found["transport"] == "webtransport"
        await browser.run(SUBSCRIBE, "load.*")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(publish, place.websocket, 5000)
            await browser.run(UNTIL % "heard.length > 1000")
            place.relay.loss = 1.0
            await browser.run(UNTIL % "client.transport === 'websocket'")
            place.relay.loss = 0.0
            await browser.run(UNTIL % "client.transport === 'webtransport'")
        await browser.run(UNTIL % "heard.length >= 5000")
        heard = await browser.run("return heard")
        told = await browser.run("return told")
    assert heard == [[number, number] for number in range(1, 5001)]
    assert told["transports"][:3] == ["webtransport", "websocket", "webtransport"]


async def publish(url: str, number: int) -> None:
    async with catbus.connect(url, token=TOKEN) as bus:
        for first in range(1, number + 1, 10):
            await bus.publish_many([("load.x", n) for n in range(first, first + 10)])
            await trio.sleep(0.01)


async def test_client_leaves_a_stopping_replica_without_loss(
    browser: Browser, tmp_path: Path, database_url: str
) -> None:
    """It says when to come back, and the client has moved before it ends: what it publishes and hears goes on."""
    config = configuration(
        tmp_path, database=DatabaseSettings(url=database_url), drain=DrainSettings(delay=0, window=2, deadline=20)
    )
    async with serving(config) as (other, _), open_place(browser, config) as place:
        browser, relay = place.browser, place.relay
        await browser.run(CONNECT, place.webtransport, place.websocket, TOKEN, PATIENT)
        await browser.run(SUBSCRIBE, "load.*")
        await browser.run(
            """
            window.answers = [];
            window.publishing = (async () => {
                for (let n = 0; n < 600; n++) {
                    answers.push(client.publish('load.x', n));
                    await new Promise((resolve) => setTimeout(resolve, 4));
                }
                return (await Promise.all(answers)).map(({ seq }) => seq);
            })();
            """
        )
        await browser.run(UNTIL % "heard.length > 50")
        # Who connects from now on comes to the other one; who is connected stays.
        relay.target = ("127.0.0.1", int(dict(other.addresses)["webtransport"].rpartition(":")[2]))
        place.broker.stop()
        await browser.run("publishing.then(() => window.published = true)")
        await browser.run(UNTIL % "window.published")
        seqs = await browser.run("return await publishing")
        await browser.run(UNTIL % "heard.length >= 600")
        heard = await browser.run("return heard")
        told = await browser.run("return told")
        assert len(other.replica.sessions) == 1
    assert seqs == list(range(1, 601))
    assert heard == [[number + 1, number] for number in range(600)]
    assert told["goaways"] == 1
    assert "reconnecting" not in told["states"]


FREEZE = """
    // A page that is frozen, or hangs: nothing is read of any stream until it goes on.
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
    # So much that no browser takes it all without its page.
    payload = "x" * 60_000
    async with open_place(browser, configuration(tmp_path)) as place:
        await browser.run(FREEZE)
        await browser.run(CONNECT, place.webtransport, place.websocket, TOKEN, PATIENT)
        await browser.run(SUBSCRIBE, "own.*", {"stream": True})
        await browser.run("freeze()")
        published = 0
        with trio.fail_after(60):
            # Its stream is given up, and with it the subscription; the session is not.
            while (delivery := place.broker.replica.delivery.statistics()).live or delivery.lagging:
                if delivery.live:
                    await place.broker.publish("own.x", payload)
                    published += 1
                await trio.sleep(0.005)
        assert len(place.broker.replica.sessions) == 1
        await browser.run("thaw()")
        await browser.run(UNTIL % f"heard.length >= {published}")
        assert await browser.run("return heard.map(([seq]) => seq)") == list(range(1, published + 1))
        assert await browser.run("return [told.states, told.errors]") == [
            ["connecting", "authenticating", "connected"],
            [],
        ]
