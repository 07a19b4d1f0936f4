"""What is published: the wheel and the npm package, built, installed where nothing else is, and used from there."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import trio

from tests.brokers import SECRET, TOKEN, running
from tests.programs import CLIENT, find_module, find_program

ROOT = Path(__file__).parent.parent
SOURCE = CLIENT / "src"
MODULES = [SOURCE / "catbus.js", *sorted((SOURCE / "catbus").glob("*.js"))]
"""What the broker serves: the JavaScript client, without what needs React."""
SKIPPED = (
    ".git",
    ".venv",
    "node_modules",
    "types",
    "*.egg-info",
    "__pycache__",
    ".*_cache",
    ".hypothesis",
    "build",
    "dist",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source distribution, as it is published."""
    directory = tmp_path_factory.mktemp("build")
    source = directory / "source"
    shutil.copytree(ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(*SKIPPED))
    command = [sys.executable, "-m", "build", "--outdir", directory / "dist", source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    [wheel] = (directory / "dist").glob("*.whl")
    assert len(list((directory / "dist").glob("*.tar.gz"))) == 1
    return wheel


def test_the_wheel_serves_from_where_nothing_else_is(wheel: Path, tmp_path: Path) -> None:
    # Without a pip of its own, and without the bytecode of what nothing imports, in a fraction of the time.
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    pip: list[str | Path] = [sys.executable, "-m", "pip", "--python", tmp_path / "venv", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "--no-compile", wheel], check=True)
    config = tmp_path / "catbus.toml"
    config.write_text('[websocket]\nbind = "127.0.0.1:0"\n[webtransport]\nbind = []\n[drain]\ndelay = 0\nwindow = 0\n')
    environment = {"PATH": os.defpath, "CATBUS_SECRET": SECRET}
    catbus = tmp_path / "venv/bin/catbus"
    with subprocess.Popen(
        [catbus, "run", "--config", config], env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True
    ) as broker:
        assert broker.stdout is not None
        [url] = next(event["urls"] for event in map(json.loads, broker.stdout) if event["event"] == "serving")
        told = subprocess.run(
            [catbus, "pub", "a", "1", "--url", url], env=environment, capture_output=True, text=True, check=True
        )
        assert told.stdout == '{"channel":"a","seq":1}\n'
        for module in MODULES:
            path = f"/{module.relative_to(SOURCE)}"
            with urllib.request.urlopen(url.replace("ws://", "http://").replace("/ws", path)) as answer:
                assert answer.headers["Content-Type"] == "text/javascript; charset=utf-8"
                assert answer.headers["Access-Control-Allow-Origin"] == "*"
                assert answer.read() == module.read_bytes()
        broker.send_signal(signal.SIGTERM)
        assert broker.wait(30) == 0


USE = """
import { CatbusClient, DisconnectedError, RefusedError, Refused } from '@catbus/client';
import type { Message, Page, SubscriptionHandle } from '@catbus/client';
import type { Member, MembershipHandle, PresenceMap, RetainedMap } from '@catbus/client';
interface Note { text: string }
const client: CatbusClient = new CatbusClient({ url: 'wss://x/ws', token: async () => 't', headStart: 100 });
const stop: () => void = client.on('gap', (gap) => gap.to.toFixed());
const seq: Promise<number | undefined> = client.publish('a', { any: 'thing' }).then((answer) => answer.seq);
for await (const message of client.messages<Note>('a.*', { since: 1 })) message.payload.text.length;
const kept: string | undefined = undefined;
const handle: SubscriptionHandle = client.subscribe<Note>('a.*', async ({ payload, cursor }) => {
  payload.text.length + (cursor ?? '').length;
}, { since: kept, onGap: ({ from }) => from, onLive: () => {}, onEnd: (error) => error.message });
const { pattern, position }: { pattern: string, position: string | undefined } = await handle;
const page: Page<Note> = await client.history<Note>('a', { after: position, limit: 5 });
const last: Message<Note> | undefined = page.messages.at(-1);
await handle.ready;
await handle.close();
const notes: RetainedMap<Note> = await client.retained<Note>('note.*', { onEnd: (error) => error.message });
const removed: string[] = [];
const stopChanges: () => void = notes.onChange(({ channel, message }) => {
  removed.push(message?.payload.text ?? channel);
});
for (const [channel, { payload, seq, at, sender }] of notes) channel + payload.text + (seq - at) + (sender ?? '');
await client.publish('note.1', null, { retain: true, expect: notes.get('note.1')?.seq ?? 0 });
const people: PresenceMap<Note> = await client.presence<Note>('room');
const { members } = await client.members<Note>('room', { limit: 1 });
const first: Member<Note> | undefined = people.get('room')?.[0] ?? members[0];
const me: MembershipHandle = client.join('room', { text: 'x' });
await (await me).update();
await me.leave();
export { stop, seq, pattern, last, stopChanges, first, Refused, RefusedError, DisconnectedError };
"""
MISUSE = {
    "an option that there is not": "new CatbusClient({ url: 'wss://x/ws', token: 't', reconect: true });",
    "an event that there is not": "new CatbusClient({ url: 'wss://x/ws', token: 't' }).on('message', () => {});",
    "no token": "new CatbusClient({ url: 'wss://x/ws' });",
    "a payload of another type": "new CatbusClient({ url: 'wss://x/ws', token: 't' })"
    ".subscribe<{ n: number }>('a', ({ payload }) => payload.text);",
    "a retained payload of another type": "(await new CatbusClient({ url: 'wss://x/ws', token: 't' })"
    ".retained<{ n: number }>('a')).get('a')?.payload.text;",
    "an action that there is not": "(await new CatbusClient({ url: 'wss://x/ws', token: 't' })"
    ".presence('a')).onChange(({ action }) => action === 'left');",
    "a cursor that is none": "new CatbusClient({ url: 'wss://x/ws', token: 't' })"
    ".subscribe('a', () => {}, { since: {} });",
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the npm package in it, and nothing else but a WebSocket for Node."""
    npm = find_program("npm", "npm")
    websocket = find_module("ws")
    directory = tmp_path_factory.mktemp("npm")
    quiet = {"check": True, "stdout": subprocess.DEVNULL}
    subprocess.run([npm, "pack", "--silent", "--pack-destination", directory], cwd=CLIENT, **quiet)  # type: ignore[call-overload]
    [package] = directory.glob("*.tgz")
    (directory / "package.json").write_text('{"type": "module"}')
    command = [
        npm,
        "install",
        "--silent",
        "--offline",
        "--no-audit",
        "--no-fund",
        package,
        websocket,
    ]
    subprocess.run(command, cwd=directory, **quiet)  # type: ignore[call-overload]
    return directory


def test_the_npm_package_is_what_is_needed(installed: Path) -> None:
    package = installed / "node_modules" / "@catbus" / "client"
    files = {str(file.relative_to(package)) for file in package.rglob("*") if file.is_file()}
    modules = {str(file.relative_to(CLIENT)) for file in SOURCE.rglob("*.js")}
    types = {name.replace("src/", "types/").replace(".js", ".d.ts") for name in modules}
    assert files == {*modules, *types, "package.json", "README.md", "LICENSE"}


def test_its_modules_are_small_and_say_what_they_are_for() -> None:
    for module in SOURCE.rglob("*.js"):
        text = module.read_text()
        assert text.startswith("/**\n * "), module
        assert text.count("\n") < 400, module


SIZE = 18_200
"""Bytes, minified and gzipped: so that the client does not grow without anybody noticing."""


def test_it_is_small() -> None:
    command = [find_module(".bin/esbuild"), MODULES[0], "--bundle", "--minify", "--format=esm"]
    minified = subprocess.run(command, capture_output=True, check=True).stdout
    assert len(gzip.compress(minified, 9)) <= SIZE


def test_its_modules_are_those_that_the_broker_serves() -> None:
    static = ROOT / "catbus" / "static"
    assert [static / module.relative_to(SOURCE) for module in MODULES] == [
        static / "catbus.js",
        *sorted((static / "catbus").glob("*.js")),
    ]
    for module in MODULES:
        assert (static / module.relative_to(SOURCE)).resolve() == module


def compile_types(directory: Path, text: str) -> str:
    """Where there is no DOM, and where every declaration that is installed is checked too."""
    (directory / "use.ts").write_text(text)
    options = ["--strict", "--noEmit", "--module", "nodenext", "--target", "es2022", "--lib", "es2023"]
    options += ["--exactOptionalPropertyTypes", "--skipLibCheck", "false"]
    command = [find_program("nodejs", "node"), find_module("typescript/bin/tsc"), *options, "use.ts"]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False).stdout


def test_its_types_know_what_is_right(installed: Path) -> None:
    assert compile_types(installed, USE) == ""


@pytest.mark.parametrize("what", MISUSE)
def test_its_types_know_what_is_wrong(installed: Path, what: str) -> None:
    assert "error TS" in compile_types(installed, f"import {{ CatbusClient }} from '@catbus/client';\n{MISUSE[what]}\n")


RUN = """
import WebSocket from 'ws';
import { CatbusClient } from '@catbus/client';
const client = new CatbusClient({ url: process.env.URL, token: process.env.TOKEN, WebSocket });
await client.connect();
const heard = new Promise((resolve) => client.subscribe('a.*', resolve));
await client.publish('a.b', [1, 'ä']);
console.log(JSON.stringify((await heard).payload));
await client.disconnect();
"""


async def test_it_works_from_there(installed: Path) -> None:
    (installed / "run.js").write_text(RUN)
    async with running() as (_, address):
        environment = {"PATH": os.defpath, "URL": f"ws://{address}/ws", "TOKEN": TOKEN}
        command = [find_program("nodejs", "node"), installed / "run.js"]
        done = await trio.run_process(command, env=environment, capture_stdout=True)
    assert done.stdout == '[1,"ä"]\n'.encode()
