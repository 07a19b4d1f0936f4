"""A check of the npm package in a new Vite application with React and TypeScript, as a developer would begin.

    make check-npm

Packs the package, makes the application from Vite's template, installs the package, and builds the application with the
strictest settings of TypeScript. Then it uses the application in Chromium and Firefox, with a real broker. It needs the
network, for the current releases of Vite and React, so no test runs it.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlencode

import trio

from tests.brokers import TOKEN, running
from tests.browser.driver import PROGRAMS, open_browser

CLIENT = Path(__file__).parents[2] / "clients" / "javascript"
STRICT = ["--strict", "--exactOptionalPropertyTypes", "--noUncheckedIndexedAccess"]
APPLICATION = """
import { useEffect, useState } from 'react';
import type { ReactNode } from 'react';
import { CatbusClient, RefusedError } from '@catbus/client';
import type { Message } from '@catbus/client';
import { CatbusProvider, useConnectionState, useMessages, usePublish, useSubscription } from '@catbus/client/react';

interface Note { text: string }

const url = new URLSearchParams(location.search).get('url') ?? 'ws://localhost:8080/ws';
const token = async (): Promise<string> => {
  const found = new URLSearchParams(location.search).get('token');
  if (found === null) throw new RefusedError('signed_out', 'nobody is signed in');
  return found;
};

/** Connects the client only after the effects of the children have run. */
function Connected({ children }: { children: ReactNode }) {
  const [client] = useState(() => new CatbusClient({ url, token }));
  const [ready, setReady] = useState(false);
  useEffect(() => setReady(true), []);
  return <CatbusProvider client={client} connect={ready}>{children}</CatbusProvider>;
}

function Notes({ last }: { last?: number }) {
  const { messages, live, error } = useMessages<Note>('notes.*', last === undefined ? {} : { last });
  const [newest, setNewest] = useState<Message<Note>>();
  useSubscription<Note>('notes.*', (message) => setNewest(message));
  const state = useConnectionState();
  const publish = usePublish();
  return (
    <main>
      <p>{state} {live ? 'live' : error?.message} {newest?.payload.text}</p>
      <ul>{messages.map(({ seq, payload }) => <li key={seq}>{payload.text}</li>)}</ul>
      <button onClick={() => void publish('notes.a', { text: 'new' })}>publish</button>
    </main>
  );
}

export default function App() {
  return <Connected><Notes last={20} /><Notes /></Connected>;
}
"""


def run(*command: str, cwd: Path) -> None:
    print("+", *command, flush=True)
    subprocess.run(command, cwd=cwd, check=True)


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def served(directory: Path) -> Iterator[str]:
    """Serve the files of a directory, and yield the URL."""
    handler = partial(QuietHandler, directory=directory)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


USE = """
const until = async (condition) => {
  while (!condition()) await new Promise((resolve) => setTimeout(resolve, 20));
};
const rooms = () => [...document.querySelectorAll('main')];
await until(() => rooms().length === 2 && rooms().every((room) => room.textContent.includes('connected live')));
document.querySelector('button').click();
await until(() => rooms().every((room) => room.querySelector('li')?.textContent === 'new'));
return rooms().map((room) => room.textContent);
"""
"""Wait until both components of the page are live, publish by a click, and wait until both show the message."""


async def use(url: str) -> None:
    """Open the application in each browser, beside a broker of its own."""
    for name in PROGRAMS:
        with open_browser(name) as browser:
            browser.open_page()
            async with running() as (_, address):
                await browser.goto(url + "?" + urlencode({"url": f"ws://{address}/ws", "token": TOKEN}))
                with trio.fail_after(30):
                    print(f"used in {name}: {await browser.run(USE)}", flush=True)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="catbus-npm-") as place:
        directory = Path(place)
        run("npm", "pack", "--silent", "--pack-destination", place, cwd=CLIENT)
        [package] = directory.glob("*.tgz")
        run("npm", "create", "--yes", "vite@latest", "application", "--", "--template", "react-ts", cwd=directory)
        application = directory / "application"
        run("npm", "install", "--silent", "--no-audit", "--no-fund", str(package), cwd=application)
        (application / "src" / "App.tsx").write_text(APPLICATION)
        run("npx", "tsc", "--noEmit", "--project", "tsconfig.app.json", *STRICT, cwd=application)
        run("npm", "run", "build", cwd=application)
        installed = json.loads((application / "package-lock.json").read_text())["packages"]
        versions = {name: installed[f"node_modules/{name}"]["version"] for name in ("vite", "react", "typescript")}
        sizes = {file.name: file.stat().st_size for file in (application / "dist" / "assets").glob("*.js")}
        print(f"built with {versions}: {sizes}", flush=True)
        with served(application / "dist") as url:
            trio.run(use, url)


if __name__ == "__main__":
    main()
