"""`EventSource` of real browsers: replicas that are killed, permissions that are withdrawn, pages of other origins."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import msgspec
import trio

import catbus
from catbus.auth.grants import Grants
from catbus.config import Config, DatabaseSettings, WebSocketSettings
from catbus.postgres.roles.role_store import open_roles
from tests.brokers import CONFIG, TOKEN, request, running
from tests.browser.driver import Browser
from tests.conformance.event_stream_clients import documented_example
from tests.conformance.proxies import run_proxy
from tests.postgres.processes import Replica, open_replicas, token

OPEN = """
    // Follow a stream by its name, and keep all that its source reports.
    const [name, url] = args;
    const source = new EventSource(url);
    const stream = { source, received: [], events: [], opened: 0, failed: 0 };
    (window.streams ??= {})[name] = stream;
    source.onopen = () => stream.opened++;
    source.onerror = () => stream.failed++;
    source.onmessage = ({ data, lastEventId }) => stream.received.push([lastEventId, JSON.parse(data).payload]);
    for (const event of ['live', 'gap', 'revoked', 'goaway', 'close']) {
        source.addEventListener(event, ({ data }) => stream.events.push([event, JSON.parse(data)]));
    }
"""
FOLLOW = """
    const [origin, ...tokens] = args;
    const received = [];
    streams.follow = { received, events: [] };
    follow(origin, 'a.*', async () => tokens.shift(), ({ seq, payload }) => received.push([seq, payload]), '0');
"""
UNTIL = """
    const began = Date.now();
    while (!(%s)) {
        if (Date.now() - began > 40_000) throw new Error(JSON.stringify(streams));
        await new Promise((resolve) => setTimeout(resolve, 5));
    }
"""
PUBLISH = """
    // Publish from the page, and return the response, or the name of the error if the browser hides it.
    try {
        const response = await fetch(args[0] + '/publish', {
            method: 'POST',
            headers: { Authorization: 'Bearer ' + args[1], 'Content-Type': 'application/json' },
            body: JSON.stringify({ channel: 'page.x', payload: 'hello' }),
        });
        return [response.status, await response.json()];
    } catch (error) {
        return error.name;
    }
"""


def events_url(origin: str, token: str, pattern: str, **parameters: object) -> str:
    return f"{origin}/events?{urlencode({'pattern': pattern, 'access_token': token, **parameters})}"


async def answered(address: str, path: str = "/events") -> dict[int, int]:
    """How many requests for a path the broker has answered, by status."""
    text = (await request(address, "/metrics")).body.decode()
    found = re.findall(rf'^catbus_http_requests_total{{path="{path}",status="(\d+)"}} (\d+)', text, re.MULTILINE)
    return {int(status): int(number) for status, number in found}


async def has_session(replica: Replica) -> bool:
    report = await request(urlsplit(replica.url).netloc, "/api/sessions", token("admin"))
    return '"sse"' in report.body.decode()


async def test_event_source_loses_nothing_when_its_replica_is_killed(
    browser: Browser, tmp_path: Path, database_url: str
) -> None:
    """1,000 messages through nginx with its default settings, while the replica of the stream is killed."""
    with trio.fail_after(60):
        async with open_replicas(database_url, 2) as replicas:
            addresses = [urlsplit(replica.url).netloc for replica in replicas]
            async with run_proxy("nginx", addresses, None, tmp_path) as proxy:
                await browser.goto(f"{proxy.origin}/health")
                await browser.run(OPEN, "load", events_url(proxy.origin, token("page"), "load.*", since=0))
                await browser.run(UNTIL % "streams.load.opened")
                [killed] = [replica for replica in replicas if await has_session(replica)]
                [other] = [replica for replica in replicas if replica is not killed]
                async with catbus.connect(other.url, token=token("publisher")) as bus, trio.open_nursery() as nursery:

                    @nursery.start_soon
                    async def publish() -> None:
                        for first in range(1, 1001, 5):
                            await bus.publish_many([("load.x", number) for number in range(first, first + 5)])

                    await browser.run(UNTIL % "streams.load.received.length > 100")
                    killed.kill()
                await browser.run(UNTIL % "streams.load.received.length >= 1000")
                received = await browser.run("return streams.load.received")
                opened = await browser.run("return streams.load.opened")
                assert await has_session(other)
    ids = [last_id.partition(".") for last_id, _ in received]
    assert [(int(seq), payload) for (seq, _, _), (_, payload) in zip(ids, received, strict=True)] == [
        (number, number) for number in range(1, 1001)
    ]
    assert len({epoch for _, _, epoch in ids}) == 1
    assert opened == 2


async def test_event_source_with_a_withdrawn_token_ends_for_good(browser: Browser, database_url: str) -> None:
    """Deleted roles and a role without grants: each source reconnects once, is rejected, and stays closed.

    The example of the documentation opens a new source with a new token, and resumes.
    """
    settings = DatabaseSettings(url=database_url)
    async with running(msgspec.structs.replace(CONFIG, database=settings)) as (broker, address):
        origin = f"http://{address}"
        await browser.goto(f"{origin}/health")
        async with open_roles(settings) as roles:
            grants = Grants(("a.*",))
            tokens = {name: await roles.create("page", grants) for name in ("deleted", "without grants", "replaced")}
            for name in ("deleted", "without grants"):
                await browser.run(OPEN, name, events_url(origin, tokens[name][0], "a.*", since=0))
            await browser.run(OPEN, "other", events_url(origin, TOKEN, "a.*", since=0))
            await browser.run(documented_example("EventSource") + FOLLOW, origin, tokens["replaced"][0], TOKEN)
            await broker.publish("a.x", 1)
            await browser.run(UNTIL % "Object.values(streams).every(({ received }) => received.length === 1)")
            await roles.delete(tokens["deleted"][1].handle)
            await roles.delete(tokens["replaced"][1].handle)
            await roles.revoke(tokens["without grants"][1].handle, grants)
        ended = "streams['deleted'].source.readyState === 2 && streams['without grants'].source.readyState === 2"
        await browser.run(UNTIL % ended)
        while (before := await answered(address)).get(401) != 2:
            await trio.sleep(0.05)
        assert before[403] == 1
        while len(opened := [session.id for session in broker.sessions if session.subscriptions]) != 2:
            await trio.sleep(0.01)
        # Sources that may reconnect do so, and meanwhile the others could have done so, too.
        assert await broker.replica.disconnect_client("alice") == 2
        while any(session.id in opened for session in broker.sessions):
            await trio.sleep(0.01)
        await broker.publish("a.x", 2)
        await browser.run(UNTIL % "streams.other.received.length === 2 && streams.follow.received.length === 2")
        after = await answered(address)
        assert after[200] > before[200]
        assert (after[401], after[403]) == (2, 1)
        events = await browser.run("return Object.values(streams).map(({ events }) => events.map(([name]) => name))")
        received = await browser.run("return Object.values(streams).map(({ received }) => received.map(([, n]) => n))")
        codes = await browser.run("return [0, 1].map((n) => Object.values(streams)[n].events.at(-1)[1].code)")
    assert events == [["live", "revoked", "close"], ["live", "revoked", "close"], ["live", "close", "live"], []]
    assert received == [[1], [1], [1, 2], [1, 2]]
    assert codes == [4403, 4403]


def allowing(*origins: str) -> Config:
    websocket = WebSocketSettings(bind=("127.0.0.1:0",), allowed_origins=origins)
    return msgspec.structs.replace(CONFIG, websocket=websocket)


async def test_page_of_another_origin_publishes_and_subscribes_if_it_is_allowed(browser: Browser) -> None:
    async with (
        running() as (_, page),
        running(allowing(f"http://{page}")) as (_, listing),
        running() as (_, open_to_all),
        running(allowing("https://page.example")) as (closed, refusing),
    ):
        await browser.goto(f"http://{page}/health")
        for name, address in {"listing": listing, "open": open_to_all}.items():
            origin = f"http://{address}"
            await browser.run(OPEN, name, events_url(origin, TOKEN, "page.*", since=0))
            assert await browser.run(PUBLISH, origin, TOKEN) == [200, {"seq": 1, "channel": "page.x"}]
            await browser.run(UNTIL % f"streams.{name}.received.length === 1")
            # The request has `Authorization`, so the browser sent a preflight request before it.
            assert await answered(address, "/publish") == {200: 1, 204: 1}
        origin = f"http://{refusing}"
        assert await browser.run(PUBLISH, origin, TOKEN) == "TypeError"
        await browser.run(OPEN, "refused", events_url(origin, TOKEN, "page.*", since=0))
        await browser.run(UNTIL % "streams.refused.source.readyState === 2")
        assert await browser.run("return streams.refused.opened") == 0
        assert await answered(refusing) == {403: 1}
        assert 200 not in await answered(refusing, "/publish")
        assert closed.replica.delivery.position == 0
