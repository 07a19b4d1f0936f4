"""One HTTP response, and the responses that several modules send."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus

from msgspec import Struct

from ...error_codes import ErrorCode
from ...protocol import wire_messages as wire
from .http_request import Headers


@dataclass(frozen=True, slots=True)
class HttpResponse:
    """A response with its body."""

    status: int
    body: bytes
    headers: Headers = ()
    type: bytes = b"text/plain; charset=utf-8"
    is_valid: Callable[[], bool] = field(default=lambda: True, compare=False)
    """Whether it may still be sent. If not, the connection is closed in the middle of the body."""


def text_response(status: int, text: str = "", headers: Headers = ()) -> HttpResponse:
    """Make a response with one line of text: `text`, or the name of the status."""
    return HttpResponse(status, (text or HTTPStatus(status).phrase.lower()).encode() + b"\n", headers)


def json_response(value: object, status: int = 200, headers: Headers = ()) -> HttpResponse:
    """Make a response with one line of JSON."""
    return HttpResponse(status, wire.to_json(value) + b"\n", headers, b"application/json")


class ErrorAnswer(Struct):
    """The body of a response that reports an error. `error` is for people."""

    error: str
    code: ErrorCode


CODES: Mapping[int, ErrorCode] = {
    403: ErrorCode.UNAUTHORIZED,
    404: ErrorCode.NOT_FOUND,
    405: ErrorCode.METHOD_NOT_ALLOWED,
    408: ErrorCode.AUTH_TIMEOUT,
    413: ErrorCode.TOO_LARGE,
    431: ErrorCode.TOO_LARGE,
    500: ErrorCode.INTERNAL,
    503: ErrorCode.UNAVAILABLE,
}
"""The error code of a status that comes from HTTP itself; `bad_message` for all others."""


def http_error(
    status: int, message: str = "", headers: Headers = (), *, code: ErrorCode | None = None, wait: float = 1.0
) -> HttpResponse:
    """Make the response that reports an error: `{"error": message, "code": code}`, with the headers that it requires.

    `message` is the name of the status, and `code` that of `CODES`, unless they are given. `wait` is the number of
    seconds until a retry can succeed.
    """
    body = ErrorAnswer(message or HTTPStatus(status).phrase.lower(), code or CODES.get(status, ErrorCode.BAD_MESSAGE))
    return json_response(body, status, [*retry_headers(status, wait), *headers])


def retry_headers(status: int, wait: float = 1.0) -> Headers:
    """Return the headers that a status requires. `wait` is the number of seconds until a retry can succeed."""
    match status:
        case 401:
            return [(b"www-authenticate", b'Bearer realm="catbus"')]
        case 429 | 503:
            return [(b"retry-after", b"%d" % math.ceil(wait))]
        case _:
            return ()


UPGRADE_REQUIRED = http_error(
    426,
    "this is a WebSocket endpoint",
    [(b"upgrade", b"websocket"), (b"connection", b"upgrade"), (b"sec-websocket-version", b"13")],
)

TOO_MANY_CONNECTIONS = http_error(
    429, "this address has too many connections (limits.address_connections)", code=ErrorCode.OVERLOADED, wait=5
)

REPLICA_FULL = http_error(503, "too many connections (limits.connections)", code=ErrorCode.OVERLOADED, wait=5)
