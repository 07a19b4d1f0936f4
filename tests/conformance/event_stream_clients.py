"""Clients of event streams that others wrote, and the examples of `docs/server-sent-events.md`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import trio

from tests.brokers import TOKEN
from tests.browser.driver import Browser, open_browser
from tests.programs import CLIENT, find_module, find_program
from tests.server_sent_events import EventParser

PROGRAMS = Path(__file__).with_name("clients")
DOCUMENT = Path(__file__).parents[2] / "docs" / "server-sent-events.md"

CertificateAuthority = str | None
"""The file of the authority that signed the broker's certificate; None without TLS."""


@dataclass(frozen=True)
class Message:
    """A message as a client received it."""

    last_id: str
    """The `id` up to which the stream is complete."""
    seq: int
    payload: Any


Receive = Callable[[], Awaitable[Message]]
"""Waits for the next message."""


@dataclass(frozen=True)
class EventStreamClient:
    """A client that opens a stream with a URL and the last `id` that it received, or an empty text.

    The context is killed at its end.
    """

    open: Callable[[str, str, CertificateAuthority], AbstractAsyncContextManager[Receive]]
    reconnects: bool = True
    """Whether the client reconnects by itself."""


def documented_example(name: str) -> str:
    """The code block of `docs/server-sent-events.md` below the comment that names it."""
    [found] = re.findall(rf"^<!-- test: {name} -->\n```\w+\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    return str(found)


@asynccontextmanager
async def run_program(
    command: list[str], ca: CertificateAuthority, receive: Callable[[bytes], list[Message]]
) -> AsyncIterator[Receive]:
    """Run a program until the context ends. `receive` finds the messages in its output."""
    environment: Mapping[str, str] = {**os.environ, "CATBUS_TOKEN": TOKEN}
    if ca is not None:
        # For Python's ssl, httpx and Go; for curl; and for Node.
        environment = {**environment, "SSL_CERT_FILE": ca, "CURL_CA_BUNDLE": ca, "NODE_EXTRA_CA_CERTS": ca}
    received: deque[Message] = deque()
    run = partial(trio.run_process, command, stdout=subprocess.PIPE, check=False, env=environment)
    async with trio.open_nursery() as nursery:
        process: trio.Process = await nursery.start(run)
        assert process.stdout is not None
        stdout = process.stdout

        async def next_message() -> Message:
            while not received:
                data = await stdout.receive_some()
                assert data, "the client has ended"
                received.extend(receive(bytes(data)))
            return received.popleft()

        try:
            yield next_message
        finally:
            process.kill()


def parse_events() -> Callable[[bytes], list[Message]]:
    """Return a parser of event streams, which finds their messages."""
    parser = EventParser()
    return lambda data: [
        Message(event.last_id, event.data["seq"], event.data["payload"])
        for event in parser.feed(data)
        if event.type == "message"
    ]


def parse_lines() -> Callable[[bytes], list[Message]]:
    """Return a parser of lines, each with an `id` and the data of a message."""
    rest = b""

    def feed(data: bytes) -> list[Message]:
        nonlocal rest
        *lines, rest = (rest + data).split(b"\n")
        pairs = [line.decode().split(" ", 1) for line in lines]
        return [Message(last_id, (found := json.loads(text))["seq"], found["payload"]) for last_id, text in pairs]

    return feed


def open_curl(url: str, last_id: str, ca: CertificateAuthority) -> AbstractAsyncContextManager[Receive]:
    headers = [f"Authorization: Bearer {TOKEN}", *([f"Last-Event-ID: {last_id}"] if last_id else [])]
    command = [find_program("curl", "curl"), "--no-buffer", "--silent", "--show-error"]
    return run_program([*command, *(part for each in headers for part in ("-H", each)), url], ca, parse_events())


def program_client(find: Callable[[], list[str]]) -> EventStreamClient:
    """A client in a program that takes a URL and maybe the last `id`, and prints a line for each message."""
    return EventStreamClient(
        lambda url, last_id, ca: run_program([*find(), url, *([last_id] if last_id else [])], ca, parse_lines())
    )


def eventsource_command() -> list[str]:
    find_module("eventsource")
    return [find_program("nodejs", "node"), str(PROGRAMS / "events.mjs"), str(CLIENT / "package.json")]


@asynccontextmanager
async def go_client() -> AsyncIterator[EventStreamClient]:
    program = await trio.to_thread.run_sync(build_go_example)
    yield program_client(lambda: [program])


def build_go_example() -> str:
    """Build the documented example, unless it is built already. Returns the program.

    The first time takes minutes, because Go compiles its libraries.
    """
    go = find_program("golang-go", "go")
    directory = Path(sys.prefix) / "go"
    directory.mkdir(exist_ok=True)
    source, program = directory / "follow.go", directory / "follow"
    if not program.exists() or source.read_text() != documented_example("Go"):
        source.write_text(documented_example("Go"))
        subprocess.run([go, "build", "-o", program, source], check=True)
    return str(program)


EVENT_SOURCE = """
    const source = new EventSource(args[0]);
    window.received = [];
    source.onmessage = ({ data, lastEventId }) => received.push([lastEventId, JSON.parse(data)]);
"""
NEXT = """
    while (!received.length) await new Promise((resolve) => setTimeout(resolve, 5));
    return received.shift();
"""


def browser_client(browser: Browser) -> EventStreamClient:
    """An `EventSource`, with its token in the URL. A new page cannot set `Last-Event-ID`, so it sends `since`."""

    @asynccontextmanager
    async def open_page(url: str, last_id: str, _: CertificateAuthority) -> AsyncIterator[Receive]:
        async def next_message() -> Message:
            found, message = await browser.run(NEXT)
            return Message(found, message["seq"], message["payload"])

        await browser.goto(url.partition("/events")[0] + "/catbus.js")
        since = f"&since={last_id}" if last_id else ""
        await browser.run(EVENT_SOURCE, f"{url}&access_token={TOKEN}{since}")
        yield next_message
        browser.open_page()

    return EventStreamClient(open_page)


@asynccontextmanager
async def use(client: EventStreamClient) -> AsyncIterator[EventStreamClient]:
    yield client


def in_browser(name: str) -> Callable[[], AbstractAsyncContextManager[EventStreamClient]]:
    @asynccontextmanager
    async def run() -> AsyncIterator[EventStreamClient]:
        with open_browser(name, any_certificate=True) as opened:
            opened.open_page()
            yield browser_client(opened)

    return run


CURL = EventStreamClient(open_curl, reconnects=False)
HTTP_CLIENT = program_client(lambda: [sys.executable, "-c", documented_example("Python")])
HTTPX_SSE = program_client(lambda: [sys.executable, str(PROGRAMS / "events_httpx_sse.py")])
EVENTSOURCE = program_client(eventsource_command)

EVENT_STREAM_CLIENTS: Mapping[str, Callable[[], AbstractAsyncContextManager[EventStreamClient]]] = {
    "curl": lambda: use(CURL),
    "Python http.client": lambda: use(HTTP_CLIENT),
    "httpx-sse": lambda: use(HTTPX_SSE),
    "eventsource": lambda: use(EVENTSOURCE),
    "Go net/http": go_client,
    "EventSource of Chromium": in_browser("chromium"),
    "EventSource of Firefox": in_browser("firefox"),
}
