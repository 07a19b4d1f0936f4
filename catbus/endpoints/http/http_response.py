"""One HTTP response, and the responses that several modules send."""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus

from ...errors import ErrorCode
from ...protocol import wire_messages as wire
from .http_request import Headers


@dataclass(frozen=True, slots=True)
class HttpResponse:
    """A whole response."""

    status: int
    body: bytes
    headers: Headers = ()
    type: bytes = b"text/plain; charset=utf-8"


def line(status: int, text: str = "", headers: Headers = ()) -> HttpResponse:
    """An answer of one plain line: `text`, or what the status is called."""
    return HttpResponse(status, (text or HTTPStatus(status).phrase.lower()).encode() + b"\n", headers)


def json(value: object, status: int = 200, headers: Headers = ()) -> HttpResponse:
    """An answer in JSON, on one line."""
    return HttpResponse(status, wire.to_json(value) + b"\n", headers, b"application/json")


UPGRADE_REQUIRED = line(
    426,
    "this is a WebSocket endpoint",
    [(b"upgrade", b"websocket"), (b"connection", b"upgrade"), (b"sec-websocket-version", b"13")],
)

CROWDED = json(
    {"error": "this address has too many connections (limits.address_connections)", "code": ErrorCode.OVERLOADED},
    429,
    [(b"retry-after", b"5")],
)
