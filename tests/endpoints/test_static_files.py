"""The files that the broker serves: compressed, revalidated by their tags, and the console under a strict policy."""

from __future__ import annotations

import gzip
import re

import pytest

from catbus.endpoints.http.static_files import POLICY, console_files, javascript_modules
from tests.endpoints.test_http_connection import get, served


@pytest.mark.parametrize(
    "path", ["/catbus.js", "/catbus/core.js", "/console", "/console/main.js", "/console/console.css"]
)
async def test_file_is_compressed_for_clients_that_accept_it(path: str) -> None:
    async with served() as it:
        await it.peer.send(get(path))
        plain = await it.peer.response()
        assert "content-encoding" not in plain.headers
        assert plain.headers["vary"] == "accept-encoding"
        await it.peer.send(get(path, "Accept-Encoding: br, gzip"))
        zipped = await it.peer.response()
        assert zipped.headers["content-encoding"] == "gzip"
        assert gzip.decompress(zipped.body) == plain.body
        assert zipped.headers["etag"] != plain.headers["etag"]
        await it.peer.send(get(path, "Accept-Encoding: gzip", f"If-None-Match: {plain.headers['etag']}"))
        assert (await it.peer.response()).status == 200


async def test_console_may_load_and_connect_to_this_broker_alone() -> None:
    async with served() as it:
        for path in console_files():
            await it.peer.send(get(path))
            response = await it.peer.response()
            assert response.headers["content-security-policy"] == POLICY.format(
                sockets="ws://bus.example:8080 wss://bus.example:8080"
            )
            assert response.headers["referrer-policy"] == "no-referrer"
            assert response.headers["x-content-type-options"] == "nosniff"
        assert "unsafe" not in POLICY


async def test_files_of_the_console_share_a_route() -> None:
    async with served() as it:
        for path in console_files():
            await it.peer.send(get(path))
            await it.peer.response()
        await it.peer.send(get("/console/nothing.js"))
        assert (await it.peer.response()).status == 404
        assert it.registry.requests["/console", 200] == len(console_files())


def test_console_names_only_files_that_exist_and_no_other_host() -> None:
    """A page that needs another host would not work in a closed network."""
    files = console_files()
    page = files["/console"].plain.decode()
    assert {f"/{path}" for path in re.findall(r'(?:src|href)="(console/[^"]+)"', page)} <= set(files)
    for path, file in files.items():
        text = file.plain.decode()
        assert set(re.findall(r"https?://[\w.]+", text)) <= {"http://www.w3.org"}, path
        assert "innerHTML" not in text


def test_console_is_small() -> None:
    """All that a browser transfers to show it, the client included."""
    files = [*console_files().values(), *javascript_modules().values()]
    assert sum(len(file.compressed) for file in files) < 100_000
