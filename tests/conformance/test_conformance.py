"""The parts of `make conformance`, and a short form of it: one client through one proxy."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trustme
from trio_websocket import open_websocket_url

from tests.brokers import CONFIG, TOKEN, running
from tests.conformance import autobahn, proxies, third_party_clients
from tests.conformance.client_steps import codes, fragments, leaving, session
from tests.conformance.echo import serve_echo
from tests.conformance.event_stream_clients import (
    CURL,
    EVENTSOURCE,
    HTTP_CLIENT,
    HTTPX_SSE,
    EventStreamClient,
)
from tests.conformance.event_stream_steps import EventStreamUnderTest, at_once, killed, reconnect
from tests.conformance.network_paths import EVENT_STREAM_PATHS, NETWORK_PATHS, Certificates
from tests.programs import find_program


async def test_third_party_client_works_through_a_documented_proxy(tmp_path: Path) -> None:
    certificates = Certificates(tmp_path)
    with trio.fail_after(60):
        async with third_party_clients.CLIENTS["ws"]() as driver:
            async with NETWORK_PATHS["HAProxy"].open(driver, certificates, tmp_path) as (client, proxy):
                assert proxy is not None
                for step in (session, fragments, leaving, codes):
                    await step(client)
                found = await fetch(proxy.port, "/.well-known/catbus")
                assert json.loads(found)["websocket"] == "wss://bus.example.com/ws"
                modules = re.findall(r"from '\.(/catbus/\w+\.js)'", await fetch(proxy.port, "/catbus.js"))
                for path in modules:
                    assert "export" in await fetch(proxy.port, path)
                assert modules
                assert (await fetch(proxy.port, "/metrics")).startswith("<html>")
            assert proxy.versions() == {"HTTP/1.1"}


async def test_clients_of_event_streams_resume_when_they_are_killed_and_when_their_streams_end(tmp_path: Path) -> None:
    async def follow(client: EventStreamClient) -> None:
        async with EVENT_STREAM_PATHS["plain"].run_broker(certificates, tmp_path) as (broker, origin, _):
            stream = EventStreamUnderTest(client, f"{origin}/events?pattern=stream.*", None, broker)
            await killed(stream)
            await reconnect(stream)

    certificates = Certificates(tmp_path)
    async with trio.open_nursery() as nursery:
        for client in (HTTP_CLIENT, HTTPX_SSE, EVENTSOURCE):
            nursery.start_soon(follow, client)


@pytest.mark.parametrize("path", ["HAProxy", "HAProxy, default settings", "nginx, default settings"])
async def test_event_stream_passes_a_proxy_without_delay(tmp_path: Path, path: str) -> None:
    """Each message arrives before the next one is published, and a client that is killed resumes."""
    certificates = Certificates(tmp_path)
    async with EVENT_STREAM_PATHS[path].run_broker(certificates, tmp_path) as (broker, origin, _):
        url = f"{origin}/events?pattern=stream.*"
        stream = EventStreamUnderTest(CURL, url, certificates.ca(url), broker)
        await at_once(stream)
        await killed(stream)


async def fetch(port: int, path: str, *options: str, host: str = "bus.example.com") -> str:
    """The body of a response to a request for this host."""
    url = f"https://127.0.0.1:{port}{path}"
    command = [find_program("curl", "curl"), "--silent", "--insecure", "--header", f"Host: {host}", url, *options]
    return (await trio.run_process(command, capture_stdout=True)).stdout.decode()


@pytest.mark.parametrize("name", ["nginx", "HAProxy"])
async def test_pages_and_origins_pass_through_documented_proxies(name: str, tmp_path: Path) -> None:
    """A request waits for a message, and a page that the proxy serves publishes it. Pages of others may not."""
    settings = msgspec.structs.replace(CONFIG.websocket, allowed_origins=("https://listed.example",))
    config = msgspec.structs.replace(CONFIG, websocket=settings)
    certificate = trustme.CA().issue_cert("127.0.0.1")
    async with running(config) as (broker, address), proxies.run_proxy(name, [address], certificate, tmp_path) as proxy:
        pages: list[Any] = []
        host = f"127.0.0.1:{proxy.port}"

        async def wait() -> None:
            path = f"/messages?pattern=a&wait=30&access_token={TOKEN}"
            pages.append(json.loads(await fetch(proxy.port, path, host=host)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            while not broker.replica.message_pages.wake_ups:
                await trio.sleep(0.01)
            for origin, code in (("https://evil.example", "unauthorized"), (f"https://{host}", None)):
                options = ("-H", f"Origin: {origin}", "-H", f"Authorization: Bearer {TOKEN}")
                message = ("--data", '{"channel":"a","payload":7}')
                published = await fetch(proxy.port, "/publish", *options, *message, host=host)
                assert json.loads(published).get("code") == code
        assert [message["payload"] for message in pages[0]["messages"]] == [7]


@pytest.mark.parametrize("proxy", proxies.PROXIES)
def test_each_proxy_is_documented(proxy: str) -> None:
    language = {"Caddy": "caddyfile"}.get(proxy, proxy.lower())
    text = proxies.documented_configuration(language)
    for path in ("ws", "publish", "messages", "events", "catbus.js", "catbus/", ".well-known/catbus"):
        assert path in text.replace("\\", "")


async def test_echo_returns_every_frame_unchanged() -> None:
    async with serve_echo() as url, open_websocket_url(url) as socket:
        for message in ("", "grüße", b"\x00\xff", b"x" * 100_000):
            await socket.send_message(message)
            assert await socket.get_message() == message


def test_report_counts_verdicts_and_names_failed_cases() -> None:
    found: dict[str, dict[str, Any]] = {
        "1.1.1": {"behavior": "OK", "behaviorClose": "OK", "remoteCloseCode": 1000},
        "1.1.2": {"behavior": "OK", "behaviorClose": "FAILED", "remoteCloseCode": None},
        "9.1.4": {"behavior": "FAILED", "behaviorClose": "OK", "remoteCloseCode": 1009},
        "12.1.1": {"behavior": "UNIMPLEMENTED", "behaviorClose": "OK", "remoteCloseCode": 1000},
    }
    report = autobahn.parse_report(found)
    assert report.verdicts == Counter({"OK": 2, "FAILED": 1, "UNIMPLEMENTED": 1})
    assert report.failed == {"1.1.2": None, "9.1.4": 1009}
