"""Where a request ends and the next one begins: RFC 9112, and the ways in which two readers can be made to disagree.

Each case is what one side of a real socket sends, with one more request behind it. It says which status answers the
first, and whether the second is taken as a request.
"""

from __future__ import annotations

import re

import pytest
import trio

from catbus.endpoints.http.http_connection import MAX_HEAD_SIZE
from tests.brokers import TOKEN, running
from tests.endpoints.raw_peer import UPGRADE

BODY = b'{"channel":"a.b","payload":1}'
SIZE = b"%d" % len(BODY)
CHUNKS = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
NEXT = b"GET /next HTTP/1.1\r\nHost: a\r\n\r\n"
OPEN, CLOSED = True, False

Case = tuple[bytes, int, bool]


def get(*lines: bytes, body: bytes = b"", start: bytes = b"GET /health HTTP/1.1", host: bytes = b"Host: a") -> bytes:
    return b"\r\n".join([start, *([host] if host else []), *lines, b"", body])


def post(*lines: bytes, body: bytes = BODY, start: bytes = b"POST /publish HTTP/1.1") -> bytes:
    return get(b"Authorization: Bearer " + TOKEN.encode(), *lines, body=body, start=start)


def chunked(body: bytes, coding: bytes = b"Transfer-Encoding: chunked") -> bytes:
    return post(coding, body=body)


CASES: dict[str, dict[str, Case]] = {
    "the length of a body": {
        "once": (post(b"Content-Length: " + SIZE), 200, OPEN),
        "with leading zeros": (post(b"Content-Length: 00" + SIZE), 200, OPEN),
        "twice the same": (post(b"Content-Length: " + SIZE, b"Content-Length: " + SIZE), 200, OPEN),
        "twice the same in a list": (post(b"Content-Length: %b, %b" % (SIZE, SIZE)), 200, OPEN),
        "two": (post(b"Content-Length: " + SIZE, b"Content-Length: 1"), 400, CLOSED),
        "two in a list": (post(b"Content-Length: %b, 1" % SIZE), 400, CLOSED),
        "plus": (post(b"Content-Length: +" + SIZE), 400, CLOSED),
        "minus": (post(b"Content-Length: -" + SIZE), 400, CLOSED),
        "space": (post(b"Content-Length: 2 9"), 400, CLOSED),
        "space before the colon": (post(b"Content-Length : " + SIZE), 400, CLOSED),
        "hexadecimal": (post(b"Content-Length: 0x1d"), 400, CLOSED),
        "underscore": (post(b"Content-Length: 2_9"), 400, CLOSED),
        "fraction": (post(b"Content-Length: 29.0"), 400, CLOSED),
        "digits of another script": (post("Content-Length: \u0662\u0669".encode()), 400, CLOSED),
        "nothing": (post(b"Content-Length:"), 400, CLOSED),
        "20 digits": (post(b"Content-Length: " + b"9" * 20), 413, CLOSED),
        "5000 digits": (post(b"Content-Length: " + b"9" * 5000), 400, CLOSED),
    },
    "length and coding": {
        "chunked and a length": (post(b"Transfer-Encoding: chunked", b"Content-Length: 4", body=CHUNKS), 400, CLOSED),
        "a length and chunked": (
            post(b"Content-Length: %d" % len(CHUNKS), b"Transfer-Encoding: chunked", body=CHUNKS), 400, CLOSED,
        ),
        "no length and chunked": (post(b"Content-Length: 0", b"Transfer-Encoding: chunked", body=CHUNKS), 400, CLOSED),
        "on GET": (get(b"Content-Length: 0", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n"), 400, CLOSED),
        "HTTP/1.0": (
            post(b"Transfer-Encoding: chunked", body=CHUNKS, start=b"POST /publish HTTP/1.0"), 400, CLOSED,
        ),
        "HTTP/1.0, to be kept": (
            post(b"Connection: keep-alive", b"Transfer-Encoding: chunked", body=CHUNKS,
                 start=b"POST /publish HTTP/1.0"), 400, CLOSED,
        ),
    },
    "the coding of a body": {
        "chunked": (chunked(CHUNKS), 200, OPEN),
        "in capitals": (chunked(CHUNKS, b"TRANSFER-ENCODING: CHUNKED"), 200, OPEN),
        "after a tab": (chunked(CHUNKS, b"Transfer-Encoding:\tchunked"), 200, OPEN),
        "on a folded line": (chunked(CHUNKS, b"Transfer-Encoding:\r\n chunked"), 200, OPEN),
        "after a vertical tab": (chunked(CHUNKS, b"Transfer-Encoding: \x0bchunked"), 400, CLOSED),
        "space before the colon": (chunked(CHUNKS, b"Transfer-Encoding : chunked"), 400, CLOSED),
        "twice": (post(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked", body=CHUNKS), 501, CLOSED),
        "twice in a list": (chunked(CHUNKS, b"Transfer-Encoding: chunked, chunked"), 501, CLOSED),
        "gzip, chunked": (chunked(CHUNKS, b"Transfer-Encoding: gzip, chunked"), 501, CLOSED),
        "chunked, identity": (chunked(CHUNKS, b"Transfer-Encoding: chunked, identity"), 501, CLOSED),
        "identity": (chunked(CHUNKS, b"Transfer-Encoding: identity"), 501, CLOSED),
        "xchunked": (chunked(CHUNKS, b"Transfer-Encoding: xchunked"), 501, CLOSED),
        "quoted": (chunked(CHUNKS, b'Transfer-Encoding: "chunked"'), 501, CLOSED),
        "with a parameter": (chunked(CHUNKS, b"Transfer-Encoding: chunked;a=b"), 501, CLOSED),
        "nothing": (chunked(CHUNKS, b"Transfer-Encoding:"), 501, CLOSED),
    },
    "chunks": {
        "extensions": (chunked(b"1d;a=b\r\n%b\r\n0;c\r\n\r\n" % BODY), 200, OPEN),
        "an extension with a line feed": (chunked(b"1d;a\n\r\n%b\r\n0\r\n\r\n" % BODY), 400, CLOSED),
        "a trailer that would be a head": (
            chunked(b"1d\r\n%b\r\n0\r\nContent-Length: 5\r\nHost: b\r\n\r\n" % BODY), 200, OPEN,
        ),
        "a trailer that is none": (chunked(b"1d\r\n%b\r\n0\r\nno trailer\r\n\r\n" % BODY), 400, CLOSED),
        "0x": (chunked(b"0x1d\r\n%b\r\n0\r\n\r\n" % BODY), 400, CLOSED),
        "plus": (chunked(b"+1d\r\n%b\r\n0\r\n\r\n" % BODY), 400, CLOSED),
        "minus": (chunked(b"-1\r\n%b\r\n0\r\n\r\n" % BODY), 400, CLOSED),
        "underscore": (chunked(b"1_d\r\n%b\r\n0\r\n\r\n" % BODY), 400, CLOSED),
        "space before": (chunked(b" 1d\r\n%b\r\n0\r\n\r\n" % BODY), 400, CLOSED),
        "no size": (chunked(b"\r\n%b\r\n0\r\n\r\n" % BODY), 400, CLOSED),
        "more than 64 bits": (chunked(b"1000000000000001d\r\n%b\r\n0\r\n\r\n" % BODY), 400, CLOSED),
        "zeros without end": (chunked(b"0" * 30 + b"1d\r\n%b\r\n0\r\n\r\n" % BODY), 400, CLOSED),
        "more data than its size": (chunked(b"1d\r\n%bXX\r\n0\r\n\r\n" % BODY), 400, CLOSED),
        "line feeds alone": (chunked(b"1d\n%b\n0\n\n" % BODY), 400, CLOSED),
        "a line feed after the size": (chunked(b"1d\n%b\r\n0\r\n\r\n" % BODY), 400, CLOSED),
        "carriage returns alone": (chunked(b"1d\r%b\r0\r\r" % BODY), 400, CLOSED),
    },
    "lines": {
        "line feeds alone": (b"GET /health HTTP/1.1\nHost: a\n\n", 200, OPEN),
        "carriage returns alone": (b"GET /health HTTP/1.1\rHost: a\r\r", 400, CLOSED),
        "a carriage return in a value": (get(b"X: a\rTransfer-Encoding: chunked"), 400, CLOSED),
        "an empty line first": (b"\r\n" + get(), 400, CLOSED),
        "a folded line": (get(b"X: a", b" b"), 200, OPEN),
        "a folded first line": (get(host=b" Host: a"), 400, CLOSED),
        "NUL in a value": (get(b"X: a\0b"), 400, CLOSED),
        "NUL in a name": (get(b"X\0: a"), 400, CLOSED),
        "space in a name": (get(b"X y: a"), 400, CLOSED),
        "space before a colon": (get(b"X : a"), 400, CLOSED),
        "no colon": (get(b"Xyz"), 400, CLOSED),
        "no name": (get(b": a"), 400, CLOSED),
        "Latin-1 in a value": (get(b"X: \xe4"), 200, OPEN),
    },
    "the first line": {
        "method in small letters": (get(start=b"get /health HTTP/1.1"), 405, OPEN),
        "method unknown": (get(start=b"BREW /health HTTP/1.1"), 405, OPEN),
        "method impossible": (get(start=b"G@T /health HTTP/1.1"), 400, CLOSED),
        "two spaces": (get(start=b"GET  /health HTTP/1.1"), 400, CLOSED),
        "tabs": (get(start=b"GET\t/health\tHTTP/1.1"), 400, CLOSED),
        "space in the target": (get(start=b"GET /he alth HTTP/1.1"), 400, CLOSED),
        "beyond ASCII": (get(start=b"GET /he\xe4lth HTTP/1.1"), 400, CLOSED),
        "HTTP/0.9": (b"GET /health\r\n\r\n", 400, CLOSED),
        "HTTP/1.0": (get(start=b"GET /health HTTP/1.0", host=b""), 200, CLOSED),
        "HTTP/1.0, to be kept": (get(b"Connection: keep-alive", start=b"GET /health HTTP/1.0"), 200, CLOSED),
        "HTTP/1.2": (get(start=b"GET /health HTTP/1.2"), 200, OPEN),
        "HTTP/2.0": (get(start=b"GET /health HTTP/2.0"), 505, CLOSED),
        "HTTP/01.1": (get(start=b"GET /health HTTP/01.1"), 400, CLOSED),
        "http/1.1": (get(start=b"GET /health http/1.1"), 400, CLOSED),
        "too long": (get(start=b"GET /%b HTTP/1.1" % (b"x" * MAX_HEAD_SIZE)), 431, CLOSED),
        "too many lines": (get(*[b"X: y"] * 3000), 431, CLOSED),
    },
    "whom it is for": {
        "no host": (get(host=b""), 400, CLOSED),
        "an empty host": (get(host=b"Host:"), 200, OPEN),
        "two hosts": (get(b"Host: a"), 400, CLOSED),
        "two words": (get(host=b"Host: a b"), 400, CLOSED),
        "a list": (get(host=b"Host: a, b"), 400, CLOSED),
        "a path": (get(host=b"Host: a/b"), 400, CLOSED),
        "a user": (get(host=b"Host: u@b"), 400, CLOSED),
        "a URL": (get(host=b"Host: http://b"), 400, CLOSED),
        "no such port": (get(host=b"Host: a:99999"), 400, CLOSED),
        "a port in letters": (get(host=b"Host: a:http"), 400, CLOSED),
        "IPv6": (get(host=b"Host: [::1]:8080"), 200, OPEN),
        "IPv6 without brackets": (get(host=b"Host: ::1"), 400, CLOSED),
        "markup": (get(host=b"Host: <script>"), 400, CLOSED),
        "an absolute target": (get(start=b"GET http://b/health HTTP/1.1"), 200, OPEN),
        "one for TLS": (get(start=b"GET HTTPS://b:443/health HTTP/1.1"), 200, OPEN),
        "one without a path": (get(start=b"GET http://b HTTP/1.1"), 404, OPEN),
        "one without a host": (get(start=b"GET http:///health HTTP/1.1"), 400, CLOSED),
        "one with a user": (get(start=b"GET http://u:p@b/health HTTP/1.1"), 400, CLOSED),
        "one of another scheme": (get(start=b"GET ftp://b/health HTTP/1.1"), 400, CLOSED),
        "one beside a wrong host": (get(start=b"GET http://b/health HTTP/1.1", host=b"Host: a b"), 400, CLOSED),
        "a host as the target": (get(start=b"GET a:80 HTTP/1.1"), 400, CLOSED),
        "a relative target": (get(start=b"GET health HTTP/1.1"), 400, CLOSED),
        "CONNECT": (get(start=b"CONNECT a:80 HTTP/1.1"), 400, CLOSED),
        "OPTIONS *": (get(start=b"OPTIONS * HTTP/1.1"), 404, OPEN),
        "GET *": (get(start=b"GET * HTTP/1.1"), 400, CLOSED),
        "two slashes": (get(start=b"GET //b/health HTTP/1.1"), 404, OPEN),
    },
    "bodies": {
        "on GET": (get(b"Content-Length: 5", body=b"hello"), 200, OPEN),
        "on GET, a request": (get(b"Content-Length: %d" % len(NEXT), body=NEXT), 200, OPEN),
        "on what nobody answers": (post(b"Content-Length: " + SIZE, start=b"POST /nothing HTTP/1.1"), 404, CLOSED),
        "asked for": (post(b"Expect: 100-continue", b"Content-Length: " + SIZE), 200, OPEN),
        "asked for, though there is none": (get(b"Expect: 100-continue"), 200, OPEN),
        "announced as a header of the connection": (
            post(b"Connection: content-length", b"Content-Length: " + SIZE), 200, OPEN,
        ),
        "the last": (post(b"Connection: close", b"Content-Length: " + SIZE), 200, CLOSED),
    },
    "what stands in a head once": {
        "two tokens": (post(b"Authorization: Bearer x", b"Content-Length: " + SIZE), 400, CLOSED),
        "two keys": (
            post(b"Idempotency-Key: a", b"Idempotency-Key: b", b"Content-Length: " + SIZE), 400, CLOSED,
        ),
    },
    "WebSocket": {
        "what is behind it": (UPGRADE, 101, CLOSED),
        "with a body": (UPGRADE.removesuffix(b"\r\n") + b"Content-Length: 5\r\n\r\nhello", 400, CLOSED),
        "with an empty body in chunks": (
            UPGRADE.removesuffix(b"\r\n") + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, CLOSED,
        ),
        "of another version": (UPGRADE.replace(b"Version: 13", b"Version: 12"), 426, OPEN),
    },
}  # fmt: skip


async def statuses(address: str, sent: bytes) -> list[int]:
    """Return the statuses of all responses on one connection, until the broker closes it."""
    host, _, port = address.rpartition(":")
    received = b""
    async with await trio.open_tcp_stream(host, int(port)) as stream:
        await stream.send_all(sent)
        await stream.send_eof()
        while part := await stream.receive_some():
            received += part
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", received)]


@pytest.mark.parametrize("kind", CASES)
async def test_requests_are_separated_as_the_rfc_requires(kind: str) -> None:
    async with running() as (_, address):
        for name, (sent, status, stays) in CASES[kind].items():
            found = [each for each in await statuses(address, sent + NEXT) if each != 100]
            assert found == ([status, 404] if stays else [status]), name


async def test_body_in_tiny_chunks_lets_other_tasks_run() -> None:
    """Each chunk is an event, and one read brings a thousand of them."""
    body = b'{"channel":"a.b","payload":"' + b"x" * 50_000 + b'"}'
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    steps = 0

    async def count() -> None:
        nonlocal steps
        while True:
            await trio.lowlevel.checkpoint()
            steps += 1

    async with running() as (_, address), trio.open_nursery() as nursery:
        nursery.start_soon(count)
        assert await statuses(address, chunked(chunks) + NEXT) == [200, 404]
        nursery.cancel_scope.cancel()
    assert steps > len(body) / 256
