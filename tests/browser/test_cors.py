"""Pages of other origins over HTTP in real browsers: they publish, wait and read if their origin is allowed."""

from __future__ import annotations

import msgspec
import trio

from catbus import Config
from tests.brokers import CONFIG, TOKEN
from tests.browser.driver import Browser
from tests.browser.test_webtransport import serving

USE = """
    const [url, token] = args;
    const authorization = `Bearer ${token}`;
    const {cursor} = await (await fetch(`${url}/messages?pattern=web.*`, {headers: {authorization}})).json();
    const query = `pattern=web.*&wait=30&since=${cursor}`;
    const waiting = fetch(`${url}/messages?${query}`, {headers: {authorization}}).then((it) => it.json());
    const published = await fetch(`${url}/publish`, {
        method: 'POST',
        headers: {authorization, 'Content-Type': 'application/json', 'Idempotency-Key': 'once'},
        body: JSON.stringify({channel: 'web.page', payload: {n: 1}}),
    });
    const page = await (await fetch(`${url}/messages?pattern=web.*&since=0&access_token=${token}`)).json();
    const wrong = await fetch(`${url}/messages?pattern=web.*`, {headers: {authorization: 'Bearer nobody'}});
    return {
        published: await published.json(),
        waited: (await waiting).messages.length,
        read: page.messages.map((each) => each.payload),
        wrong: [wrong.status, (await wrong.json()).code],
    };
"""
USED = {
    "published": {"seq": 1, "channel": "web.page"},
    "waited": 1,
    "read": [{"n": 1}],
    "wrong": [401, "unauthenticated"],
}
TRY = """
    const [url, token] = args;
    const body = JSON.stringify({channel: 'web.page', payload: {n: 1}});
    const requests = [
        fetch(`${url}/publish`, {method: 'POST', headers: {authorization: `Bearer ${token}`}, body}),
        fetch(`${url}/messages?pattern=web.*&access_token=${token}`),
        fetch(`${url}/metrics`),
    ];
    return (await Promise.allSettled(requests)).map((each) => each.status);
"""


def allowing(*origins: str) -> Config:
    return msgspec.structs.replace(CONFIG, websocket=msgspec.structs.replace(CONFIG.websocket, allowed_origins=origins))


async def test_page_uses_a_broker_of_another_origin_if_its_own_is_allowed(browser: Browser) -> None:
    with trio.fail_after(90):
        async with (
            serving(CONFIG) as (_, page),
            serving(allowing(page)) as (_, listed),
            serving(CONFIG) as (_, open_to_all),
            serving(allowing("https://other.example")) as (closed, other),
        ):
            await browser.goto(f"{page}/health")
            for url in (listed, open_to_all):
                assert await browser.run(USE, url, TOKEN) == USED
            assert await browser.run(TRY, other, TOKEN) == ["rejected"] * 3
            assert closed.replica.log.applied == 0
            assert (await browser.run(TRY, open_to_all, TOKEN))[2] == "rejected", "a page reads the metrics"
            # A page of the broker's own origin needs no place in its list.
            await browser.goto(f"{other}/health")
            assert await browser.run(USE, other, TOKEN) == USED
