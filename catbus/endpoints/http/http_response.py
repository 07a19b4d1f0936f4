"""One HTTP response, and the responses that several modules send."""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus

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


def text_response(status: int, text: str = "", headers: Headers = ()) -> HttpResponse:
    """Make a response with one line of text: `text`, or the name of the status."""
    return HttpResponse(status, (text or HTTPStatus(status).phrase.lower()).encode() + b"\n", headers)


def json_response(value: object, status: int = 200, headers: Headers = ()) -> HttpResponse:
    """Make a response with one line of JSON."""
    return HttpResponse(status, wire.to_json(value) + b"\n", headers, b"application/json")


UPGRADE_REQUIRED = text_response(
    426,
    "this is a WebSocket endpoint",
    [(b"upgrade", b"websocket"), (b"connection", b"upgrade"), (b"sec-websocket-version", b"13")],
)

TOO_MANY_CONNECTIONS = json_response(
    {"error": "this address has too many connections (limits.address_connections)", "code": ErrorCode.OVERLOADED},
    429,
    [(b"retry-after", b"5")],
)
