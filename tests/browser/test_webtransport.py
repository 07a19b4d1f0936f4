"""Real Chromium over WebTransport: the certificate by its hash, messages from another replica, closing codes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import trio

import catbus
from catbus import Broker, CloseCode, Config
from catbus.config import Database, WebTransport
from tests.brokers import CONFIG, TOKEN
from tests.browser.chromium import open_browser

CONNECT = """
    const found = await (await fetch('/.well-known/catbus')).json();
    const value = Uint8Array.from(atob(found.certificate_hash), (c) => c.charCodeAt(0));
    const session = new WebTransport(found.webtransport, {serverCertificateHashes: [{algorithm: 'sha-256', value}]});
    await session.ready;
    const stream = await session.createBidirectionalStream();
    const writer = stream.writable.getWriter();
    const reader = stream.readable.pipeThrough(new TextDecoderStream()).getReader();
    let rest = '';
    const lines = [];
    window.bus = {
        session,
        say: (...messages) => writer.write(new TextEncoder().encode(messages.map((m) => JSON.stringify(m)).join(''))),
        hear: async () => {
            while (!lines.length) {
                const {value, done} = await reader.read();
                if (done) throw new Error('the stream has ended');
                rest += value;
                const parts = rest.split('\\n');
                rest = parts.pop();
                lines.push(...parts);
            }
            return JSON.parse(lines.shift());
        },
    };
    await bus.say({type: 'auth', token: args[0], protocol: 1}, {type: 'subscribe', pattern: 'web.*'});
    return [await bus.hear(), await bus.hear()];
"""


@asynccontextmanager
async def serving(config: Config) -> AsyncIterator[tuple[Broker, str]]:
    """A broker with both doors, and the origin of its HTTP."""
    async with trio.open_nursery() as nursery:
        broker = await nursery.start(catbus.serve, config)
        await broker.hub.log.wait_open()
        yield broker, f"http://{dict(broker.addresses)['websocket']}"
        broker.stop()


def configuration(state: Path, database: Database | None = None) -> Config:
    return msgspec.structs.replace(
        CONFIG,
        state=str(state),
        webtransport=WebTransport(bind=("127.0.0.1:0",)),
        database=database or Database(),
    )


async def test_a_page_publishes_and_hears_another_replica(tmp_path: Path, database_url: str) -> None:
    config = configuration(tmp_path, Database(url=database_url))
    with trio.fail_after(90):
        async with serving(config) as (_, origin), serving(config) as (_, other), open_browser() as browser:
            await browser.goto(f"{origin}/health")
            hello, subscribed = await browser.run(CONNECT, TOKEN)
            assert (hello["type"], hello["client_id"], subscribed["type"]) == ("auth_ok", "alice", "subscribed")
            await browser.run("await bus.say({type: 'publish', channel: 'web.page', payload: {n: 1}, id: 1})")
            heard = [await browser.run("return await bus.hear()") for _ in range(2)]
            assert {message["type"] for message in heard} == {"message", "published"}
            url = other.replace("http://", "ws://") + "/ws"
            async with catbus.connect(url, token=TOKEN) as bus:
                seq = await bus.publish("web.service", "from another replica, over WebSocket")
            message = await browser.run("return await bus.hear()")
            assert (message["seq"], message["channel"]) == (seq, "web.service")


async def test_closing_codes_pass_both_ways(tmp_path: Path) -> None:
    with trio.fail_after(90):
        async with serving(configuration(tmp_path)) as (broker, origin), open_browser() as browser:
            await browser.goto(f"{origin}/health")
            await browser.run(CONNECT, TOKEN)
            assert len(broker.hub.clients) == 1
            await browser.run("bus.session.close({closeCode: 7, reason: 'enough'}); await bus.session.closed")
            while broker.hub.clients:
                await trio.sleep(0.01)
            await browser.run(CONNECT, TOKEN)
            await browser.run("bus.ending = bus.session.closed")
            broker.stop()
            info = await browser.run("const i = await bus.ending; return [i.closeCode, i.reason]")
            assert info == [CloseCode.SHUTTING_DOWN, "the replica is stopping"]


async def test_a_wrong_token_closes_with_its_code(tmp_path: Path) -> None:
    with trio.fail_after(90):
        async with serving(configuration(tmp_path)) as (_, origin), open_browser() as browser:
            await browser.goto(f"{origin}/health")
            # What a page has not read when the session closes it never reads: so the closing says all of it again.
            ending = "const i = await bus.session.closed; return [i.closeCode, i.reason]"
            info = await browser.run(
                CONNECT.replace("return [await bus.hear(), await bus.hear()]", ending), "sub-wrong"
            )
            assert info == [CloseCode.UNAUTHENTICATED, "the token is not valid"]
