"""catbus.endpoints.http.http_connection and catbus.endpoints.websocket.handshake"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import h11
import pytest
import trio
from trio.testing import MockClock, memory_stream_pair, wait_all_tasks_blocked

from catbus.config import Config, WebSocketSettings
from catbus.endpoints.connection_registry import ConnectionRegistry
from catbus.endpoints.http import http_connection
from catbus.endpoints.http.http_connection import (
    BODY_TIMEOUT,
    HEAD_TIMEOUT,
    IDLE_TIMEOUT,
    MAX_BODY_SIZE,
    MAX_HEAD_SIZE,
    SEND_TIMEOUT,
    serve_http_connection,
)
from catbus.endpoints.http.http_request import HttpRequest
from catbus.error_codes import ErrorCode
from catbus.limits.unauthenticated import TOO_MUCH, UnauthenticatedPeers
from tests.endpoints import raw_peer
from tests.endpoints.fake_replica import FakeReplica
from tests.endpoints.raw_peer import UPGRADE, Peer, Response, masked, patience


class Served:
    def __init__(self, replica: FakeReplica, registry: ConnectionRegistry, peer: Peer, ended: trio.Event) -> None:
        self.replica = replica
        self.registry = registry
        self.peer = peer
        self.ended = ended


@asynccontextmanager
async def served(
    replica: FakeReplica | None = None, *, pair: Any = memory_stream_pair, closed: bool = False
) -> AsyncIterator[Served]:
    replica, registry, ended = replica or FakeReplica(), ConnectionRegistry(), trio.Event()
    registry.closed = closed
    ours, theirs = pair()

    async def serve() -> None:
        await serve_http_connection(replica, registry, ours)
        await ours.aclose()
        ended.set()

    with patience():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            yield Served(replica, registry, Peer(theirs), ended)
            nursery.cancel_scope.cancel()


def get(path: str, *lines: str, method: str = "GET", version: str = "1.1") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/{version}", "Host: bus.example:8080", *lines, "", ""]).encode()


def post(path: str, body: bytes, *lines: str) -> bytes:
    return get(path, f"Content-Length: {len(body)}", *lines, method="POST") + body


async def test_oldest_unauthenticated_connections_are_evicted_when_they_hold_too_much() -> None:
    replica = FakeReplica()
    replica.unauthenticated = UnauthenticatedPeers(3000)
    async with served(replica) as first, served(replica) as second:
        for each, size in ((first, 1500), (second, 1000)):
            await each.peer.send(get("/health")[:-2] + b"X: " + b"x" * size)
            await wait_all_tasks_blocked()
        assert replica.unauthenticated.size > 2500
        await second.peer.send(b"x" * 500)
        answer = await first.peer.response()
        assert (answer.status, TOO_MUCH in answer.body.decode()) == (503, True)
        assert (replica.unauthenticated.evicted, replica.refusals) == (1, [ErrorCode.OVERLOADED])
        await second.peer.send(b"\r\n\r\n")
        assert (await second.peer.response()).status == 200
        await wait_all_tasks_blocked()
        assert replica.unauthenticated.size == 0


# Requests and responses

JSON = "application/json"
TEXT = "text/plain; charset=utf-8"

TOKEN = "Authorization: Bearer good"

NOT_ALLOWED = b'{"error":"method not allowed","code":"method_not_allowed"}\n'

REQUESTS = {
    "health": (get("/health"), 200, b"ok", {"content-type": TEXT, "content-length": "2"}),
    "query": (get("/health?probe=1"), 200, b"ok", {}),
    "absolute target": (get("http://bus.example/health?x"), 200, b"ok", {}),
    "ready": (get("/ready"), 200, b"ready\n", {}),
    "status": (
        get("/status", TOKEN),
        200,
        b'{"state":"ready"}\n',
        {"content-type": JSON, "cache-control": "no-store"},
    ),
    "status without a token": (
        get("/status"),
        401,
        b'{"error":"a token is needed: `Authorization: Bearer ...`","code":"unauthenticated"}\n',
        {},
    ),
    "status for who may not read everything": (
        get("/status", "Authorization: Bearer narrow"),
        403,
        b'{"error":"the status needs a grant to read `*`","code":"unauthorized"}\n',
        {},
    ),
    "discovery": (
        get("/.well-known/catbus"),
        200,
        b'{"protocol":"catbus.v1","websocket":"ws://bus.example:8080/ws"}\n',
        {"content-type": JSON, "access-control-allow-origin": "*", "cache-control": "no-store"},
    ),
    "discovery behind TLS": (
        get("/.well-known/catbus", "X-Forwarded-Proto: https"),
        200,
        b'{"protocol":"catbus.v1","websocket":"wss://bus.example:8080/ws"}\n',
        {},
    ),
    "discovery by an absolute target": (
        get("http://other.example/.well-known/catbus"),
        200,
        b'{"protocol":"catbus.v1","websocket":"ws://other.example/ws"}\n',
        {},
    ),
    "discovery behind proxies": (
        get("/.well-known/catbus", 'Forwarded: for=x;proto=https;host="other.example:8443", for=y;proto=http'),
        200,
        b'{"protocol":"catbus.v1","websocket":"wss://other.example:8443/ws"}\n',
        {},
    ),
    "publish": (
        post("/publish", b'{"channel":"a.b","payload":1}', TOKEN),
        200,
        b'{"seq":1,"channel":"a.b"}\n',
        {"content-type": JSON},
    ),
    "no token": (
        post("/publish", b""),
        401,
        b'{"error":"a token is needed: `Authorization: Bearer ...`","code":"unauthenticated"}\n',
        {"www-authenticate": 'Bearer realm="catbus"'},
    ),
    "publish without a body": (
        post("/publish", b"", TOKEN),
        400,
        b'{"error":"Input data was truncated","code":"bad_message"}\n',
        {},
    ),
    "publish with an empty chunked body": (
        get("/publish", TOKEN, "Transfer-Encoding: chunked", method="POST") + b"0\r\n\r\n",
        400,
        b'{"error":"Input data was truncated","code":"bad_message"}\n',
        {},
    ),
    "GET with a body": (get("/health", "Content-Length: 2") + b"{}", 200, b"ok", {}),
    "unknown path": (get("/nothing"), 404, b'{"error":"not found","code":"not_found"}\n', {"content-type": JSON}),
    "wrong method": (get("/health", method="DELETE"), 405, NOT_ALLOWED, {"allow": "GET, HEAD, OPTIONS"}),
    "GET publish": (get("/publish"), 405, NOT_ALLOWED, {"allow": "POST, OPTIONS"}),
    "WebSocket path": (
        get("/ws"),
        426,
        b'{"error":"this is a WebSocket endpoint","code":"bad_message"}\n',
        {"upgrade": "websocket"},
    ),
    "an offer of h2c": (
        get("/health", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk"),
        200,
        b"ok",
        {},
    ),
    "an offer of h2c with a body": (
        post("/publish", b'{"channel":"a.b","payload":1}', TOKEN, "Upgrade: h2c"),
        200,
        b'{"seq":1,"channel":"a.b"}\n',
        {},
    ),
}


@pytest.mark.parametrize("name", REQUESTS)
async def test_each_request_has_its_response(name: str) -> None:
    request, status, body, headers = REQUESTS[name]
    async with served() as it:
        await it.peer.send(request)
        response = await it.peer.response()
        assert (response.status, response.body) == (status, body)
        assert response.headers.items() >= headers.items()
        assert "date" in response.headers
        assert "close" not in response.headers.get("connection", "")
        await it.peer.send(get("/health"))
        assert (await it.peer.response()).status == 200


CODES = {
    401: "unauthenticated",
    404: "not_found",
    405: "method_not_allowed",
    408: "auth_timeout",
    413: "too_large",
    431: "too_large",
    503: "shutting_down",
}


def error_code(response: Response) -> str:
    """The code of a response that is an error in the form that all of them have."""
    error = json.loads(response.body)
    assert response.headers["content-type"] == JSON
    assert response.body.endswith(b"}\n")
    assert error.keys() == {"error", "code"}
    assert error["error"]
    assert ("retry-after" in response.headers) == (response.status in (429, 503))
    return str(error["code"])


BROKEN = {
    "not HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),
    "no host": (b"GET /health HTTP/1.1\r\n\r\n", 400),
    "two hosts": (get("/health", "Host: other.example"), 400),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "bad length": (get("/publish", "Content-Length: many", method="POST"), 400),
    "bad chunk": (get("/publish", "Transfer-Encoding: chunked", TOKEN, method="POST") + b"xyz\r\n", 400),
    "unknown coding": (get("/publish", "Transfer-Encoding: gzip", method="POST"), 501),
    "bad target": (get("http://[/health"), 400),
    "large head": (get("/health", "X: " + "x" * MAX_HEAD_SIZE), 431),
    "endless head": (b"GET /health HTTP/1.1\r\nX: " + b"x" * (MAX_HEAD_SIZE + 1), 431),
    "large body": (get("/publish", f"Content-Length: {MAX_BODY_SIZE + 1}", TOKEN, method="POST"), 413),
    "large chunks": (
        get("/publish", "Transfer-Encoding: chunked", TOKEN, method="POST")
        + b"100000\r\n" + b" " * MAX_BODY_SIZE + b"\r\n1\r\n \r\n",
        413,
    ),
    "no token for a body": (get("/publish", f"Content-Length: {MAX_BODY_SIZE}", method="POST"), 401),
    "unread body": (post("/nothing", b"{}"), 404),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
async def test_request_that_is_not_read_to_its_end_is_answered_and_closed(name: str, autojump_clock: MockClock) -> None:
    request, status = BROKEN[name]
    async with served() as it:
        await it.peer.send(request)
        response = await it.peer.response()
        assert response.status == status
        assert error_code(response) == CODES.get(status, "bad_message")
        assert response.headers["connection"] == "close"
        assert await it.peer.at_end()
        await it.ended.wait()
        assert it.registry.internal_errors == 0


@pytest.mark.parametrize("readiness", ["starting", "draining", "degraded", "ready"])
async def test_ready_reports_the_state(readiness: str) -> None:
    async with served() as it:
        it.replica.readiness = readiness
        await it.peer.send(get("/ready"))
        response = await it.peer.response()
        expected = {"degraded": (200, b"degraded: database\n"), "ready": (200, b"ready\n")}
        assert (response.status, response.body) == expected.get(readiness, (503, readiness.encode() + b"\n"))


@pytest.mark.parametrize(
    ("path", "status", "size"), [("/health", 200, "2"), ("/nothing", 404, "41"), ("/ws", 426, "62")]
)
async def test_head_is_get_without_the_body(path: str, status: int, size: str) -> None:
    async with served() as it:
        await it.peer.send(get(path, method="HEAD") + get("/health"))
        response = await it.peer.response(head=True)
        assert (response.status, response.headers["content-length"]) == (status, size)
        assert (await it.peer.response()).body == b"ok"


async def test_javascript_modules_are_revalidated_by_their_tags() -> None:
    """A browser revalidates a module by its tag, and gets a 304."""
    async with served() as it:
        for path in ("/catbus.js", "/catbus/core.js"):
            await it.peer.send(get(path))
            whole = await it.peer.response()
            assert (whole.status, whole.headers["content-type"]) == (200, "text/javascript; charset=utf-8")
            assert whole.headers["cache-control"] == "no-cache"
            for known in (whole.headers["etag"], f'"x", W/{whole.headers["etag"]}', "*"):
                await it.peer.send(get(path, f"If-None-Match: {known}"))
                response = await it.peer.response()
                assert (response.status, response.body, response.headers["etag"]) == (304, b"", whole.headers["etag"])
                assert response.headers["access-control-allow-origin"] == "*"
                assert "content-length" not in response.headers
            await it.peer.send(get(path, 'If-None-Match: "of another release"'))
            assert (await it.peer.response()).body == whole.body
        await it.peer.send(get("/catbus/nothing.js"))
        assert (await it.peer.response()).status == 404
        assert it.registry.requests["/catbus.js", 304] == 6


async def test_head_of_a_post_path_is_rejected() -> None:
    async with served() as it:
        await it.peer.send(get("/publish", method="HEAD"))
        assert (await it.peer.response(head=True)).headers["allow"] == "POST, OPTIONS"


@pytest.mark.parametrize(
    "target",
    [
        "/status?access_token=SECRET",
        "/status?acc%65ss_token=SECRET",
        "/status%3Faccess_token=SECRET",
        "/status%3faccess_token%3dSECRET",
        "/status;access_token=SECRET",
        "/status&access_token=SECRET",
        "/status#access_token=SECRET",
        "http://bus.example/status?access_token=SECRET",
        "http://bus.example/status#access_token=SECRET",
    ],
)
async def test_token_in_a_target_is_not_logged(target: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    secret = "sub-c2VjcmV0.c2ln"
    async with served() as it:
        await it.peer.send(get(target.replace("SECRET", secret)))
        await it.peer.response()
    lines = [str(record.__dict__) for record in caplog.records]
    assert any("/status" in line for line in lines)
    assert not any(secret in line for line in lines)


# Arrival of requests


async def test_pipelined_requests_are_answered_in_order() -> None:
    async with served() as it:
        paths = ["/health", "/ready", "/nothing", "/health"] * 20
        await it.peer.send(b"".join(get(path) for path in paths))
        statuses = [(await it.peer.response()).status for _ in paths]
        assert statuses == [200, 200, 404, 200] * 20


async def test_requests_may_be_split_at_every_byte() -> None:
    message = post("/publish", b'{"channel":"a.b","payload":1}', TOKEN) + get("/health")
    for split in range(1, len(message)):
        async with served() as it:
            await it.peer.send(message[:split])
            await wait_all_tasks_blocked()
            await it.peer.send(message[split:])
            assert (await it.peer.response()).body == b'{"seq":1,"channel":"a.b"}\n'
            assert (await it.peer.response()).body == b"ok"


async def test_requests_may_arrive_a_byte_at_a_time() -> None:
    async with served() as it:
        for byte in get("/health") * 2 + UPGRADE + masked(raw_peer.TEXT, b"hi"):
            await it.peer.send(bytes((byte,)))
            await wait_all_tasks_blocked()
        assert (await it.peer.response()).body == b"ok"
        assert (await it.peer.response()).body == b"ok"
        assert (await it.peer.response(head=True)).status == 101
        assert await it.peer.frame() == (raw_peer.TEXT, b"hi\n")


async def test_body_may_be_chunked() -> None:
    async with served() as it:
        await it.peer.send(
            get("/publish", "Transfer-Encoding: chunked", TOKEN, method="POST")
            + b'10\r\n{"channel":"a.b"\r\nd;x=y\r\n,"payload":1}\r\n0\r\nTrailer: x\r\n\r\n'
        )
        assert (await it.peer.response()).body == b'{"seq":1,"channel":"a.b"}\n'


async def test_client_that_expects_100_continue_gets_it() -> None:
    body = b'{"channel":"a.b","payload":1}'
    async with served() as it:
        request = post("/publish", body, TOKEN, "Expect: 100-continue")
        await it.peer.send(request.removesuffix(body))
        assert (await it.peer.response()).status == 100
        await it.peer.send(body)
        assert (await it.peer.response()).status == 200


@pytest.mark.parametrize(("path", "length", "status"), [("/nothing", 9, 404), ("/publish", MAX_BODY_SIZE + 1, 413)])
async def test_body_that_no_handler_reads_gets_no_100_continue(
    path: str, length: int, status: int, autojump_clock: MockClock
) -> None:
    async with served() as it:
        await it.peer.send(get(path, f"Content-Length: {length}", "Expect: 100-continue", TOKEN, method="POST"))
        response = await it.peer.response()
        assert (response.status, response.headers["connection"]) == (status, "close")
        assert await it.peer.at_end()


async def test_body_without_a_valid_token_gets_no_100_continue(autojump_clock: MockClock) -> None:
    async with served() as it:
        await it.peer.send(get("/publish", "Content-Length: 9", "Expect: 100-continue", method="POST"))
        response = await it.peer.response()
        assert (response.status, response.headers["connection"]) == (401, "close")


async def test_body_that_no_handler_reads_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    right = http_connection.HttpConnection._read_body

    async def read_body(self: http_connection.HttpConnection, request: HttpRequest, *, keep: bool = True) -> bytes:
        body = await right(self, request, keep=keep)
        kept.append(len(body))
        return body

    monkeypatch.setattr(http_connection.HttpConnection, "_read_body", read_body)
    async with served() as it:
        for size in (5, MAX_BODY_SIZE):
            await it.peer.send(get("/health", f"Content-Length: {size}") + b"x" * size)
            assert (await it.peer.response()).status == 200
    assert kept == [0, 0]


async def test_unauthenticated_connection_reads_one_head_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    right = h11.Connection.receive_data

    def receive_data(self: h11.Connection, data: bytes) -> None:
        read.append(len(data))
        right(self, data)

    monkeypatch.setattr(h11.Connection, "receive_data", receive_data)
    body = b"[" + b" " * 200_000 + b'{"channel":"a","payload":1}]'
    async with served() as refused:
        await refused.peer.send(post("/publish", body))
        assert (await refused.peer.response()).status == 401
    assert sum(read) <= http_connection.MAX_HEAD_SIZE
    read.clear()
    async with served() as it:
        await it.peer.send(post("/publish", body, "Authorization: Bearer good"))
        assert (await it.peer.response()).status == 200
    assert max(read) > read[0]
    assert read[0] <= http_connection.MAX_HEAD_SIZE


async def test_discovery_needs_a_host() -> None:
    async with served() as it:
        await it.peer.send(b"GET /.well-known/catbus HTTP/1.0\r\n\r\n")
        assert (await it.peer.response()).status == 400


@pytest.mark.parametrize("request_", [get("/health", version="1.0"), get("/health", "Connection: close")])
async def test_client_that_sends_connection_close_gets_one_response(request_: bytes) -> None:
    async with served() as it:
        await it.peer.send(request_)
        response = await it.peer.response()
        assert (response.body, response.headers["connection"]) == (b"ok", "close")
        assert await it.peer.at_end()
        await it.peer.stream.aclose()
        await it.ended.wait()


# Timeouts


async def test_silent_connection_is_closed(autojump_clock: MockClock) -> None:
    async with served() as it:
        assert await it.peer.at_end()
        assert trio.current_time() == pytest.approx(HEAD_TIMEOUT)


async def test_slow_head_is_rejected(autojump_clock: MockClock) -> None:
    async with served() as it:
        await it.peer.send(b"GET /health HTTP/1.1\r\n")
        with trio.move_on_after(HEAD_TIMEOUT + 1):
            while True:
                await trio.sleep(1)
                await it.peer.send(b"X: y\r\n")
        response = await it.peer.response()
        assert (response.status, response.headers["connection"]) == (408, "close")
        assert error_code(response) == "auth_timeout"


async def test_idle_connection_is_kept_open_for_a_while(autojump_clock: MockClock) -> None:
    async with served() as it:
        for _ in range(3):
            await it.peer.send(get("/health"))
            assert (await it.peer.response()).status == 200
            await trio.sleep(IDLE_TIMEOUT - 1)
        began = trio.current_time()
        assert await it.peer.at_end()
        assert trio.current_time() == pytest.approx(began + 1)


async def test_second_head_has_its_own_timeout(autojump_clock: MockClock) -> None:
    async with served() as it:
        await it.peer.send(get("/health"))
        await it.peer.response()
        await trio.sleep(IDLE_TIMEOUT - 1)
        await it.peer.send(b"GET /hea")
        await trio.sleep(HEAD_TIMEOUT - 1)
        await it.peer.send(get("/health")[8:])
        assert (await it.peer.response()).body == b"ok"


async def test_slow_body_is_rejected(autojump_clock: MockClock) -> None:
    async with served() as it:
        await it.peer.send(get("/publish", "Content-Length: 1000", TOKEN, method="POST"))
        with trio.move_on_after(BODY_TIMEOUT + 1):
            while True:
                await trio.sleep(1)
                await it.peer.send(b"x")
        assert (await it.peer.response()).status == 408


async def test_client_that_does_not_read_its_response_is_closed(autojump_clock: MockClock) -> None:
    async with served(pair=trio.testing.lockstep_stream_pair) as it:
        await it.peer.send(get("/health"))
        await it.ended.wait()
        assert trio.current_time() == pytest.approx(SEND_TIMEOUT)


async def test_client_that_disconnects_within_a_request_is_forgotten() -> None:
    for sent in [b"", b"GET /hea", post("/publish", b"{}")[:-1]]:
        async with served() as it:
            await it.peer.send(sent)
            await it.peer.stream.aclose()
            await it.ended.wait()
            assert it.registry.internal_errors == 0


# Upgrades


async def test_upgrade_may_be_the_second_request_of_a_connection() -> None:
    async with served() as it:
        await it.peer.send(get("/health"))
        assert (await it.peer.response()).status == 200
        await it.peer.upgrade()
        await it.peer.send(masked(raw_peer.TEXT, b"hi"))
        assert await it.peer.frame() == (raw_peer.TEXT, b"hi\n")


async def test_upgrade_and_frames_may_arrive_together() -> None:
    async with served() as it:
        await it.peer.send(get("/health") + UPGRADE + masked(raw_peer.TEXT, b"hi") + masked(raw_peer.BINARY, b"there"))
        assert (await it.peer.response()).status == 200
        assert (await it.peer.response(head=True)).status == 101
        assert await it.peer.frame() == (raw_peer.TEXT, b"hi\n")
        assert await it.peer.frame() == (raw_peer.TEXT, b"there\n")


@pytest.mark.parametrize("split", range(1, len(UPGRADE) + 8, 3))
async def test_upgrade_may_be_split_anywhere(split: int) -> None:
    message = UPGRADE + masked(raw_peer.TEXT, b"hi")
    async with served() as it:
        await it.peer.send(message[:split])
        await wait_all_tasks_blocked()
        await it.peer.send(message[split:])
        assert (await it.peer.response(head=True)).status == 101
        assert await it.peer.frame() == (raw_peer.TEXT, b"hi\n")


def changed(old: str, new: str) -> bytes:
    assert old.encode() in UPGRADE
    return UPGRADE.replace(old.encode(), new.encode())


UPGRADES = {
    "HTTP/1.0": (changed("HTTP/1.1", "HTTP/1.0"), 426),
    "with a body": (changed("Upgrade: W", "Content-Length: 2\r\nUpgrade: W") + b"{}", 400),
    "with chunks": (changed("Upgrade: W", "Transfer-Encoding: chunked\r\nUpgrade: W") + b"0\r\n\r\n", 400),
    "POST": (changed("GET", "POST"), 405),
    "another path": (changed("/ws", "/wss"), 404),
    "a path that is something else": (changed("/ws", "/health"), 404),
    "no Connection": (changed("keep-alive, Upgrade", "keep-alive"), 400),
    "another version": (changed("Version: 13", "Version: 8"), 426),
    "two versions": (changed("Version: 13", "Version: 13\r\nSec-WebSocket-Version: 8"), 426),
    "no key": (changed("Sec-WebSocket-Key", "X-Key"), 400),
    "a short key": (changed("dGhlIHNhbXBsZSBub25jZQ==", "dGhl"), 400),
    "not a key": (changed("dGhlIHNhbXBsZSBub25jZQ==", "dGhl!HNhbXBsZSBub25jZQ=="), 400),
    "two keys": (changed("Sec-WebSocket-Key", "Sec-WebSocket-Key: x\r\nSec-WebSocket-Key"), 400),
    "Upgrade to something else": (changed("WebSocket\r\n", "h2c\r\n"), 426),
}


@pytest.mark.parametrize("name", UPGRADES)
async def test_invalid_upgrades_are_rejected(name: str) -> None:
    request, status = UPGRADES[name]
    async with served() as it:
        await it.peer.send(request)
        response = await it.peer.response()
        assert response.status == status
        assert error_code(response) == CODES.get(status, "bad_message")
        if status == 426:
            assert response.headers["sec-websocket-version"] == "13"
            assert response.headers["upgrade"] == "websocket"
        assert it.replica.sessions == []


@pytest.mark.parametrize(
    "request_",
    [
        changed("WebSocket\r\n", "h2c, websocket\r\n"),
        changed("keep-alive, Upgrade", "UPGRADE"),
        changed("/ws", "/ws?token=x"),
        changed("Upgrade: W", "Content-Length: 0\r\nUpgrade: W"),
        changed("bus.example", "straße.example".encode("idna").decode() + ".." * 40),
        changed("Upgrade: W", "Cookie: a=b\r\nSec-WebSocket-Extensions: permessage-deflate\r\nUpgrade: W"),
    ],
)
async def test_valid_upgrades_have_many_forms(request_: bytes) -> None:
    async with served() as it:
        await it.peer.upgrade(request_)
        await wait_all_tasks_blocked()
        assert len(it.replica.sessions) == 1


@pytest.mark.parametrize(
    ("allowed", "origin", "status"),
    [
        ((), "https://evil.example", 101),
        (("https://good.example",), "https://good.example", 101),
        (("https://good.example",), None, 101),
        (("https://good.example",), "https://evil.example", 403),
        (("https://good.example",), "https://good.example.evil.example", 403),
        (("https://good.example",), "HTTPS://good.example", 403),
        (("https://good.example",), "null", 403),
        (("https://good.example",), "http://bus.example", 101),  # the console, which the broker itself serves
    ],
)
async def test_upgrade_is_allowed_by_its_origin(allowed: tuple[str, ...], origin: str | None, status: int) -> None:
    async with served(FakeReplica(Config(websocket=WebSocketSettings(allowed_origins=allowed)))) as it:
        await it.peer.send(changed("Upgrade: W", f"Origin: {origin}\r\nUpgrade: W") if origin else UPGRADE)
        assert (await it.peer.response(head=status == 101)).status == status


# Internal errors, and stopping


async def test_failed_request_is_answered_and_the_connection_continues() -> None:
    async with served() as it:
        del it.replica.readiness
        await it.peer.send(get("/ready") + get("/health"))
        response = await it.peer.response()
        assert (response.status, response.body) == (500, b'{"error":"internal server error","code":"internal"}\n')
        assert (await it.peer.response()).status == 200
        assert it.registry.internal_errors == 1


async def test_closing_ends_idle_connections_and_lets_others_finish(autojump_clock: MockClock) -> None:
    async with served() as it:
        await it.peer.send(get("/health"))
        await it.peer.response()
        await wait_all_tasks_blocked()
        it.registry.close()
        assert await it.peer.at_end()
        await it.ended.wait()
    async with served() as it:
        await it.peer.send(b"GET /hea")
        await wait_all_tasks_blocked()
        it.registry.close()
        await it.peer.send(get("/health")[8:])
        response = await it.peer.response()
        assert (response.body, response.headers["connection"]) == (b"ok", "close")
        assert await it.peer.at_end()


async def test_no_websocket_is_opened_after_closing(autojump_clock: MockClock) -> None:
    async with served() as it:
        await it.peer.send(UPGRADE[:9])
        await wait_all_tasks_blocked()
        it.registry.close()
        await it.peer.send(UPGRADE[9:])
        response = await it.peer.response()
        assert (response.status, error_code(response)) == (503, "shutting_down")


async def test_connection_accepted_just_before_closing_is_closed(autojump_clock: MockClock) -> None:
    async with served(closed=True) as it:
        assert await it.peer.at_end()
        assert trio.current_time() == 0
