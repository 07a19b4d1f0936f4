"""The console in real browsers: signing in, what each token sees, every view, and what axe finds."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio

import catbus
from catbus.auth.grants import Grants
from catbus.auth.tokens import sign
from catbus.config import DatabaseSettings, PresenceSettings
from tests.brokers import CONFIG, SECRET
from tests.browser.driver import Browser
from tests.browser.test_webtransport import serving
from tests.postgres.sql import open_sql

AXE = Path(__file__).parents[2] / "clients" / "javascript" / "node_modules" / "axe-core" / "axe.min.js"
ADMINISTRATOR = sign(SECRET, client_id="operator", grants=Grants.ADMIN)
READER = sign(SECRET, client_id="reader", grants=Grants(read=("room.*",)))

PREPARE = """
    window.violations = [];
    document.addEventListener('securitypolicyviolation', ({ violatedDirective, blockedURI }) => {
        violations.push(`${violatedDirective} ${blockedURI}`);
    });
    window.find = (selector, text = '') => {
        const found = [...document.querySelectorAll(selector)];
        return found.find(({ textContent }) => textContent.includes(text));
    };
    window.until = async (condition) => {
        for (const began = Date.now(); !condition();) {
            if (Date.now() - began > 30_000) throw new Error(`${condition}: ${document.body.innerText}`);
            await new Promise((resolve) => setTimeout(resolve, 5));
        }
        return condition();
    };
    window.show = async (view, text) => {
        location.hash = view;
        await until(() => find('h1') && find('nav a[aria-current]')?.hash === `#${view.split('?')[0]}`);
        if (text) await until(() => find('main', text));
    };
    window.fill = (values, form = 'main form') => {
        const { elements } = document.querySelector(form);
        for (const [name, value] of Object.entries(values)) elements[name].value = value;
        document.querySelector(form).requestSubmit();
    };
    window.confirm = () => true;
    window.alert = (text) => violations.push(`alert ${text}`);
"""
SIGN_IN = """
    await until(() => find('input[name=token]'));
    fill({ token: args[0] });
    await until(() => find('nav:not([hidden]) a') || find('.error'));
    return [...document.querySelectorAll('nav:not([hidden]) a, .error')].map(({ textContent }) => textContent);
"""
USE = """
    await show('overview', 'ready');
    await show('messages?pattern=room.*');
    await until(() => find('[role=status]', 'Subscribed'));
    const text = '<img src=x onerror=alert(1)>';
    find('summary').click();
    fill({ channel: 'room.7', payload: JSON.stringify({ text }) }, 'details form');
    await until(() => find('.good', 'Committed as 1') && find('td.value', text));
    fill({ channel: 'room.7', payload: 'no json' }, 'details form');
    await until(() => find('details .error', 'not JSON'));

    await show('channels', 'room');
    await until(() => find('.tree a', '7'));
    find('.tree a', '7').click();
    await until(() => location.hash === '#messages?pattern=room.7' && find('td.value', text));

    await show('retained?pattern=*', 'No channel');
    find('button', 'New').click();
    fill({ channel: 'theme', payload: '"dark"' }, 'dialog form');
    await until(() => !find('dialog') && find('td.value', 'dark'));
    find('td button', 'Edit').click();
    const { CatbusClient } = await import('/catbus.js');
    const other = new CatbusClient({ url: `ws://${location.host}/ws`, token: args[0] });
    await other.connect();
    await other.publish('theme', 'light', { retain: true });
    fill({ payload: '"blue"' }, 'dialog form');
    await until(() => find('dialog .error', 'Somebody else'));
    find('dialog button', 'Cancel').click();
    await until(() => find('td.value', 'light'));
    find('td button', 'Remove').click();
    await until(() => find('main', 'No channel'));

    await other.join('room.7', { name: 'Ada' });
    await show('presence?pattern=*', 'Ada');
    await other.disconnect();
    await until(() => find('main', 'Nobody'));

    const guest = async () => {
        const headers = { authorization: `Bearer ${args[0]}` };
        return (await (await fetch('/api/sessions?client_id=guest', { headers })).json()).sessions[0]?.id;
    };
    const before = await guest();
    await show('sessions', 'guest');
    find('tr', 'guest').querySelector('button').click();
    for (let after = before; after === before || after === undefined;) after = await guest();
    return violations;
"""

SHOWN = """
    const views = [...document.querySelectorAll('nav a')].map(({ textContent }) => textContent);
    return [location.href.includes('token'), views];
"""
SIGN_OUT = """
    location.hash = 'sessions'; // a view that this token does not have
    await until(() => find('nav a[aria-current]', 'Messages'));
    find('#sign-out').click();
    await until(() => find('input[name=token]'));
    return sessionStorage.length;
"""


REJECT = "BEGIN; SELECT catbus.receive('billing', 1); SELECT catbus.reject('billing', 1, 'no cents'); COMMIT"
USE_CONSUMERS = """
    await show('consumers', 'billing');
    find('main a', 'billing').click();
    await until(() => find('td.value', 'no cents'));
    find('td button', 'Publish again').click();
    await until(() => find('main', 'No message was rejected'));
    return violations;
"""


@asynccontextmanager
async def opened(browser: Browser, fragment: str = "", database: str = "memory") -> AsyncIterator[str]:
    """The console of a new broker. Yields the URL of its WebSocket."""
    settings = DatabaseSettings(url=database)
    config = msgspec.structs.replace(CONFIG, database=settings, presence=PresenceSettings(grace=0.1))
    with trio.fail_after(90):
        async with serving(config) as (broker, _):
            address = dict(broker.addresses)["websocket"]
            await browser.goto(f"http://{address}/console{fragment}")
            await browser.run(PREPARE)
            yield f"ws://{address}/ws"


async def test_administrator_uses_every_view(browser: Browser) -> None:
    async with opened(browser) as url:
        assert await browser.run(SIGN_IN, "wrong") == ["the token is not valid"]
        names = await browser.run(SIGN_IN, ADMINISTRATOR)
        assert names == ["Overview", "Channels", "Messages", "Retained", "Presence", "Sessions", "Consumers"]
        guest = sign(SECRET, client_id="guest", grants=Grants.ALL)
        async with catbus.connect(url, token=guest):
            assert await browser.run(USE, ADMINISTRATOR) == []


async def test_administrator_publishes_a_dead_letter_again(browser: Browser, database_url: str) -> None:
    async with (
        opened(browser, f"#token={ADMINISTRATOR}", database_url) as url,
        open_sql(database_url) as sql,
        catbus.connect(url, token=ADMINISTRATOR) as bus,
    ):
        await sql.execute("SELECT catbus.create_consumer('billing', 'orders.*')")
        await bus.publish("orders.7", {"note": "no cents"})
        await sql.execute(REJECT)
        assert await browser.run(USE_CONSUMERS) == []
        async with bus.subscribe("orders.*", since=1) as messages:
            assert (await anext(messages)).payload == {"note": "no cents"}


async def test_other_tokens_see_what_they_may_read(browser: Browser) -> None:
    async with opened(browser, f"#token={READER}"):
        await browser.run("await until(() => find('nav a'))")
        assert await browser.run(SHOWN) == [False, ["Messages", "Retained", "Presence"]]
        await browser.run("await show('retained?pattern=room.*', 'No channel')")
        await browser.run("await show('messages?pattern=*'); await until(() => find('.error', 'no read grant'))")
        assert await browser.run(SIGN_OUT) == 0


@pytest.mark.parametrize("running_browser", ["chromium"], indirect=True)
async def test_axe_finds_nothing(browser: Browser) -> None:
    """axe-core checks names, roles, contrast and structure of every view."""
    async with opened(browser, f"#token={ADMINISTRATOR}"):
        await browser.run("await until(() => find('nav a'))")
        await browser.run(AXE.read_text(encoding="utf-8"))
        for view in ("overview", "channels", "messages?pattern=*", "retained", "presence", "sessions", "consumers"):
            await browser.run("await show(args[0])", view)
            found = await browser.run(
                "return (await axe.run()).violations.map(({ id, nodes }) => [id, nodes.map(({ html }) => html)])"
            )
            assert found == [], view
