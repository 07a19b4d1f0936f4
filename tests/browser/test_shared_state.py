"""A to-do list and its readers in two windows: retained messages, compare-and-set, and presence in real browsers."""

from __future__ import annotations

from pathlib import Path

import msgspec
import trio

from catbus.config import PresenceSettings
from tests.brokers import TOKEN
from tests.browser.driver import Browser
from tests.browser.test_webtransport import configuration, serving

OPEN_WINDOWS = """
    // Two windows of one page, each with a client of its own.
    window.windows = [];
    for (const name of ['left', 'right']) {
        const frame = document.body.appendChild(document.createElement('iframe'));
        frame.src = '/health';
        await new Promise((resolve) => { frame.onload = resolve; });
        const { CatbusClient } = await frame.contentWindow.eval("import('/catbus.js')");
        const client = new CatbusClient({ url: args[0], token: args[1], reconnectDelay: 50 });
        await client.connect();
        const todos = await client.retained('todo.*');
        const people = await client.presence('room');
        const changes = [];
        todos.onChange(({ channel, message }) => changes.push([channel, message?.payload ?? null]));
        people.onChange(({ action, member }) => changes.push([action, member.sessions]));
        windows.push({ frame, client, todos, people, changes });
        await client.join('room', { name });
    }
    window.until = async (condition) => {
        const began = Date.now();
        while (!condition()) {
            if (Date.now() - began > 30_000) {
                throw new Error(`${condition}: ${JSON.stringify(windows.map(({ changes }) => changes))}`);
            }
            await new Promise((resolve) => setTimeout(resolve, 5));
        }
    };
"""
USE_THE_LIST = """
    const [left, right] = windows;
    const shown = ({ todos }) => JSON.stringify([...todos].map(([channel, { payload }]) => [channel, payload]));
    await left.client.publish('todo.1', 'milk', { retain: true, expect: 0 });
    await left.client.publish('todo.2', 'bread', { retain: true });
    await until(() => right.todos.size === 2 && left.todos.size === 2);
    // Both change the same thing: one of them is told so, and which message is there.
    const { seq } = left.todos.get('todo.1');
    const results = await Promise.allSettled([
        left.client.publish('todo.1', 'oat milk', { retain: true, expect: seq }),
        right.client.publish('todo.1', 'no milk', { retain: true, expect: seq }),
    ]);
    const winner = results.find(({ status }) => status === 'fulfilled').value;
    const loser = results.find(({ status }) => status === 'rejected').reason;
    await right.client.publish('todo.2', null, { retain: true });
    await until(() => windows.every(({ todos }) => todos.size === 1 && todos.get('todo.1').seq === winner.seq));
    const removal = ([channel, payload]) => channel === 'todo.2' && payload === null;
    const removed = windows.every(({ changes }) => changes.some(removal));
    return [loser.code, loser.seq === winner.seq, shown(left) === shown(right), removed];
"""


async def test_two_windows_share_a_list_and_see_each_other(browser: Browser, tmp_path: Path) -> None:
    config = msgspec.structs.replace(configuration(tmp_path), presence=PresenceSettings(grace=0.1))
    with trio.fail_after(90):
        async with serving(config) as (broker, origin):
            await browser.goto(f"{origin}/health")
            websocket = f"ws://{dict(broker.addresses)['websocket']}/ws"
            await browser.run(OPEN_WINDOWS, websocket, TOKEN)
            used = await browser.run(USE_THE_LIST)
            assert used == ["conflict", True, True, True]
            # A map that is opened later begins with the state.
            later = "const map = await windows[1].client.retained('*'); return [...map.keys()]"
            assert await browser.run(later) == ["todo.1"]
            # Both windows have the same client_id, so they are one member with two sessions. One of them closes.
            sessions = "windows[0].people.get('room')?.[0].sessions"
            await browser.run(f"await until(() => {sessions} === 2)")
            await browser.run("windows[1].frame.remove()")
            await browser.run(f"await until(() => {sessions} === 1)")
            info = await browser.run("return (await windows[0].client.members('room')).members")
            assert [(member["clientId"], member["sessions"], member["info"]) for member in info] == [
                ("alice", 1, {"name": "left"})
            ]
