"""The pages of `examples/`, as their server runs them, in two windows of two users: in HTML and with React.

Chromium alone runs them: what they use of the client is tested in every browser.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import trio

from tests.browser.driver import Browser
from tests.client.cutting_relay import CuttingRelay, open_relay
from tests.postgres.sql import open_sql, wait_until
from tests.programs import find_module

SERVER = Path(__file__).parents[2] / "examples" / "serve.py"

pytestmark = pytest.mark.parametrize("running_browser", ["chromium"], indirect=True)

OPEN_WINDOWS = """
    window.frames_ = {};
    window.find = (user, selector) => frames_[user].contentDocument?.querySelector(selector);
    window.findAll = (user, selector) => [...frames_[user].contentDocument.querySelectorAll(selector)];
    window.texts = (user) => findAll(user, '#list .text').map(({ value }) => value).join();
    window.until = async (condition) => {
        for (const began = Date.now(); !condition();) {
            if (Date.now() - began > 30_000) {
                const shown = Object.values(frames_).map(({ contentDocument }) => contentDocument?.body.outerHTML);
                throw new Error(`${condition}: ${shown}`);
            }
            await new Promise((resolve) => setTimeout(resolve, 5));
        }
    };
    window.type = (user, selector, text) => {
        const input = find(user, selector);
        // React takes no notice of values that are set in any other way.
        Object.getOwnPropertyDescriptor(Object.getPrototypeOf(input), 'value').set.call(input, text);
        input.dispatchEvent(new Event('input', { bubbles: true }));
    };
    window.leave = (user, selector) => {
        const input = find(user, selector);
        for (const type of ['change', 'focusout']) input.dispatchEvent(new Event(type, { bubbles: true }));
    };
    window.enter = (user, selector, text) => {
        type(user, selector, text);
        leave(user, selector);
    };
    window.submit = (user, text) => {
        const input = find(user, 'form [name=text]');
        input.value = text;
        input.form.requestSubmit();
    };
    window.isOpen = (user) =>
        find(user, 'form:not([hidden]), .menu button') && find(user, '#state').textContent.includes(user);
    window.openWindow = (user) => {
        frames_[user] = document.body.appendChild(document.createElement('iframe'));
        frames_[user].src = `${args[0][user]}?user=${user}`;
    };
    Object.keys(args[0]).forEach(openWindow);
    await until(() => isOpen('ann') && isOpen('bob'));
"""

FIND_FOREIGN_REQUESTS = """
    const windows = Object.values(frames_).map(({ contentWindow }) => contentWindow);
    const requests = windows.flatMap(({ performance }) => performance.getEntriesByType('resource'));
    return requests.map(({ name }) => name).filter((name) => new URL(name).hostname !== location.hostname);
"""

WAITS_FOR_LOCK = """
    SELECT FROM pg_stat_activity
    WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE $1
"""

FORGE_WEBHOOK = """
    const body = JSON.stringify({ type: 'catbus.messages', data: { messages: [{ payload: { id: args[0] } }] } });
    const timestamp = `${Math.floor(Date.now() / 1000)}`;
    const statuses = [];
    for (const signature of ['', 'v1,K5oZfzN95Z9UVu1EsfQmfVNQhnkZ2pj9o9NDN/H/pI4=']) {
        const headers = { 'webhook-id': 'msg_1', 'webhook-timestamp': timestamp, 'webhook-signature': signature };
        statuses.push((await fetch('/orders/mail', { method: 'POST', body, headers })).status);
    }
    return statuses;
"""


@asynccontextmanager
async def opened(browser: Browser, *, database: str = "memory", **pages: str) -> AsyncIterator[CuttingRelay]:
    """A page in a frame for each user. Yields the relay between the windows and the broker."""
    find_module(".bin/esbuild")  # The server needs it.
    with trio.fail_after(90):
        async with open_relay("http://127.0.0.1:0") as relay, trio.open_nursery() as nursery:
            environment = {
                **os.environ,
                "CATBUS_WS_BIND": "127.0.0.1:0",
                "CATBUS_PRESENCE_GRACE": "0.1",
                "CATBUS_URL": relay.url.replace("http:", "ws:") + "/ws",
                "CHARGE_SECONDS": "0",
                "DATABASE_URL": database,
                "EXAMPLES_BIND": "127.0.0.1:0",
                "PYTHONWARNINGS": "error",
            }
            start = partial(trio.run_process, [sys.executable, SERVER], env=environment, stdout=subprocess.PIPE)
            process: trio.Process = await nursery.start(start)
            assert process.stdout is not None
            output = b""
            while output.count(b"\n") < 2:
                data = await process.stdout.receive_some()
                assert data, output
                output += data
            printed = dict(line.split()[:2] for line in output.decode().splitlines())
            broker = urlsplit(printed["broker:"])
            relay.broker = str(broker.hostname), int(broker.port or 0)
            await browser.goto(printed["examples:"])
            await browser.run(OPEN_WINDOWS, pages)
            yield relay
            foreign = await browser.run(FIND_FOREIGN_REQUESTS)
            assert not foreign, foreign
            await browser.goto("about:blank")  # The pages must not reconnect to what has ended.
            process.send_signal(signal.SIGTERM)


async def test_list_is_shared_and_the_slower_of_two_edits_is_a_conflict(browser: Browser) -> None:
    script = """
        submit('ann', '<b>milk</b>');
        await until(() => texts('bob') === '<b>milk</b>');
        find('bob', '#list .check').click();
        await until(() => find('ann', '#list .done'));

        const collide = async (texts) => {
            await until(() => !findAll('ann', '.unsaved').length && !findAll('bob', '.unsaved').length);
            for (const [user, text] of Object.entries(texts)) type(user, '#list .text', text);
            for (const user in texts) leave(user, '#list .text');
            const inConflict = () => Object.keys(texts).filter((user) => find(user, '.conflict'));
            await until(() => inConflict().length);
            await until(() => findAll('ann', '.unsaved').length + findAll('bob', '.unsaved').length === 1);
            const [slower] = inConflict();
            const faster = slower === 'ann' ? 'bob' : 'ann';
            const why = find(slower, '.why').textContent;
            if (why !== `${faster} has changed it to “${texts[faster]}”, done.`) throw new Error(why);
            if (find(slower, '#list .why *')) throw new Error('text became HTML');
            return { slower, faster };
        };
        const both = (text) => until(() => texts('ann') === text && texts('bob') === text && !find('ann', '.unsaved')
            && !find('bob', '.unsaved'));
        let colliding = { ann: '<b>oat</b> milk', bob: '<b>no</b> milk' };
        let { slower, faster } = await collide(colliding);
        find(slower, '.keep').click();
        await both(colliding[slower]);
        colliding = { ann: 'tea', bob: 'coffee' };
        ({ slower, faster } = await collide(colliding));
        find(slower, '.take').click();
        await both(colliding[faster]);

        find('bob', '.remove').click();
        await both('');
    """
    async with opened(browser, ann="todo/", bob="todo/react.html"):
        await browser.run(script)


async def test_offline_edits_outlive_a_reload_and_arrive_later(browser: Browser) -> None:
    async with opened(browser, ann="todo/react.html", bob="todo/") as relay:
        await browser.run("""
            submit('ann', 'milk');
            await until(() => texts('bob') === 'milk');
            submit('ann', 'bread');
            await until(() => texts('bob') === 'milk,bread' && !find('ann', '.unsaved'));
        """)
        relay.drop_responses = 1_000_000
        relay.cut()
        await browser.run("""
            await until(() => ['ann', 'bob'].every((user) => find(user, '#state').textContent.includes('wait')));
            enter('ann', 'li:nth-child(1) .text', 'oat milk');
            enter('bob', 'li:nth-child(1) .text', 'no milk');
            enter('ann', 'li:nth-child(2) .text', 'brown bread');
            enter('ann', 'li:nth-child(2) .text', 'rye bread');
            submit('ann', 'eggs');
            await until(() => texts('bob') === 'no milk,bread' && texts('ann') === 'oat milk,rye bread,eggs');
            const before = frames_.ann.contentDocument;
            frames_.ann.contentWindow.location.reload();
            await until(() => frames_.ann.contentDocument !== before && find('ann', '#state')?.textContent);
        """)
        relay.drop_responses = 0
        await browser.run("""
            for (const user in frames_) frames_[user].contentWindow.dispatchEvent(new Event('online'));
            await until(() => isOpen('ann') && isOpen('bob'));
            await until(() => findAll('ann', '.unsaved').length + findAll('bob', '.unsaved').length === 1);
            await until(() => ['oat milk', 'no milk'].some((milk) => texts('bob') === `${milk},rye bread,eggs`));
            const slower = find('ann', '.conflict') ? 'ann' : 'bob';
            find(slower, '.conflict .keep').click();
            const milk = slower === 'ann' ? 'oat milk' : 'no milk';
            for (const user in frames_) {
                await until(() => texts(user) === `${milk},rye bread,eggs` && !find(user, '.unsaved'));
            }
        """)


async def test_chat_shows_who_is_here_what_they_say_and_who_is_typing(browser: Browser) -> None:
    script = """
        const people = (user) => findAll(user, '#people .name').map(({ textContent }) => textContent).join();
        const lines = (user) => findAll(user, '#messages li:not(.pending)').map((line) =>
            ['.name', '.said'].map((part) => line.querySelector(part).textContent).join(': ')).join();
        await until(() => people('ann') === 'ann,bob' && people('bob') === 'ann,bob');

        // Requests of a session are handled in order, so afterwards ann has all of her subscriptions.
        submit('ann', 'hello');
        await until(() => lines('ann') === 'ann: hello' && lines('bob') === 'ann: hello');
        type('bob', 'form [name=text]', 'I');
        await until(() => find('ann', '#typing').textContent === 'bob is typing …');
        submit('bob', 'I am <i>here</i>');
        const all = 'ann: hello,bob: I am <i>here</i>';
        await until(() => lines('ann') === all);
        // The message ends it at once, in the same turn of the loop.
        if (find('ann', '#typing').textContent) throw new Error('bob is still typing');
        await until(() => lines('bob') === all && !find('bob', '.pending'));
        if (find('bob', '#typing').textContent) throw new Error('bob is told that he is typing');
        const { CatbusClient } = await import('/catbus.js');
        const text = async (path) => (await fetch(path)).text();
        const cid = new CatbusClient({ url: await text('/broker'), token: await text('/token?user=cid') });
        await cid.connect();
        if ((await cid.history('typing.*')).messages.length) throw new Error('the log has signs of typing');
        await cid.disconnect();

        frames_.bob.remove();
        await until(() => people('ann') === 'ann');
        openWindow('bob');
        await until(() => people('ann') === 'ann,bob' && lines('bob') === all);
        type('ann', 'form [name=text]', 'w');
        await until(() => find('bob', '#typing').textContent === 'ann is typing …');
        submit('ann', 'welcome back');
        await until(() => lines('bob') === `${all},ann: welcome back`);
        if (find('bob', '#typing').textContent) throw new Error('ann is still typing');
    """
    async with opened(browser, ann="chat/", bob="chat/react.html"):
        await browser.run(script)


async def test_each_order_is_charged_once_although_the_worker_is_killed_and_a_webhook_mails_it(
    browser: Browser, database_url: str
) -> None:
    async def is_waiting(query: str) -> bool:
        return bool(await sql.fetch(WAITS_FOR_LOCK, query))

    place = """
        const wanted = args.join();
        const steps = (user) => ['.number', '.charged.reached', '.mailed.reached']
            .map((step) => findAll(user, `#orders ${step}`).length).join();
        find('ann', '.menu button').click();
        await until(() => steps('ann') === wanted && steps('bob') === wanted);
    """
    async with (
        open_sql(database_url) as sql,
        open_sql(database_url) as charges,
        open_sql(database_url) as outbox,
        opened(browser, database=database_url, ann="orders/", bob="orders/"),
    ):
        await browser.run(place, 1, 1, 1)
        # The worker has received the order, and waits before it inserts the charge.
        await charges.execute("BEGIN; LOCK TABLE shop.charges IN SHARE MODE")
        await browser.run(place, 2, 1, 1)
        await wait_until(partial(is_waiting, "INSERT INTO shop.charges%"))
        # It has inserted the charge, and waits before it commits.
        await outbox.execute("BEGIN; LOCK TABLE catbus.outbox_0, catbus.outbox_1 IN SHARE MODE")
        await charges.execute("ROLLBACK")
        await wait_until(partial(is_waiting, "SELECT shop.announce('charged'%"))
        await browser.run("find('ann', '#kill').click()")
        await browser.run("await until(() => find('ann', '#said').textContent.includes('was killed'))")
        await outbox.execute("ROLLBACK")
        await browser.run(place, 3, 3, 3)
        # A page that is opened later reads the table.
        await browser.run("frames_.bob.remove(); openWindow('bob'); await until(() => isOpen('bob'))")
        await browser.run(place, 4, 4, 4)
        # A webhook that the broker has not signed is rejected.
        assert await browser.run(FORGE_WEBHOOK, 4) == [401, 401]
        await browser.run(place, 5, 5, 5)
        rows = await sql.fetch("SELECT order_id, cents, worker FROM shop.charges ORDER BY order_id")
        assert [(number, cents) for number, cents, _ in rows] == [(number, 250) for number in range(1, 6)]
        # The process that was killed has charged only the first one.
        first, *others = [worker for _, _, worker in rows]
        assert first not in others


ASSISTANT = """
    window.ask = (user, question) => {
        const form = find(user, '#ask');
        form.elements.question.value = question;
        form.requestSubmit();
    };
    window.row = (user) => findAll(user, '#answers li:last-child')[0];
    window.stateOf = (user) => row(user)?.dataset.state;
    window.last = (user) => row(user)?.querySelector('.text').textContent ?? '';
    window.openDevice = async (name, user) => {
        frames_[name] = document.body.appendChild(document.createElement('iframe'));
        frames_[name].src = `assistant/?user=${user}`;
        await until(() => find(name, 'form:not([hidden])'));
    };
    window.generated = async (question) => {
        const body = JSON.stringify({ messages: [{ content: question }] });
        const answer = await (await fetch('/v1/chat/completions', { method: 'POST', body })).json();
        return answer.choices[0].message.content;
    };
"""
WATCH_AN_ANSWER = """
    // Reloaded, and on a second device: no piece is missing or comes twice while it is written.
    window.whole = await generated('why?');
    window.shown = (name) => {
        const text = last(name);
        if (!whole.startsWith(text)) throw new Error(`${name}: ${text}`);
        return text.length;
    };
    ask('ann', 'why?');
    await until(() => shown('ann') > 20);
    frames_.ann.contentWindow.location.reload();
    await openDevice('phone', 'ann');
    await until(() => shown('ann') > 20 && shown('phone') > 20);
"""
ANSWER_IS_WHOLE = """
    await until(() => ['ann', 'phone'].every((name) => shown(name) === whole.length && stateOf(name) === 'done'));
    return last('bob');
"""
CANCEL = """
    ask('phone', 'and then?');
    await until(() => last('ann').length > 20 && last('ann').startsWith('You asked: and then?'));
    row('ann').querySelector('.cancel').click();
    for (const name of ['ann', 'phone']) await until(() => stateOf(name) === 'cancelled');
    const [text, whole] = [last('ann'), await generated('and then?')];
    return text.length > 20 && text === last('phone') && text !== whole && whole.startsWith(text);
"""
BEGIN_ANOTHER = "ask('ann', 'who?'); await until(() => last('ann').startsWith('You asked: who?'));"
IS_INTERRUPTED = """
    for (const name of ['ann', 'phone']) await until(() => stateOf(name) === 'interrupted');
    const whole = await generated('who?');
    if (!last('ann') || last('ann') !== last('phone') || !whole.startsWith(last('ann'))) throw new Error(last('ann'));
    // The next worker answers.
    ask('ann', 'again?');
    await until(() => stateOf('phone') === 'done');
    return last('phone') === await generated('again?');
"""


async def test_answers_of_the_assistant_survive_reloads_lost_connections_and_their_worker(
    browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKEN_SECONDS", "0.03")
    async with opened(browser, ann="assistant/", bob="assistant/") as relay:
        await browser.run(ASSISTANT)
        await browser.run(WATCH_AN_ANSWER)
        relay.cut()
        assert await browser.run(ANSWER_IS_WHOLE) == "", "bob sees the questions of ann"
        assert await browser.run(CANCEL)
        await browser.run(BEGIN_ANOTHER)
        os.kill(find_worker(), signal.SIGKILL)
        assert await browser.run(IS_INTERRUPTED)


def find_worker() -> int:
    """The process of the assistant's worker."""
    program = str(SERVER.parent / "assistant" / "worker.py")
    [found] = [
        int(directory.name)
        for directory in Path("/proc").iterdir()
        if directory.name.isdecimal() and program in (directory / "cmdline").read_text().split("\0")
    ]
    return found
