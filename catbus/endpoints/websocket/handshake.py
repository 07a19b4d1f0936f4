"""Requests for a WebSocket: which of them are granted, and how they are handed on to the library."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Collection

from ..http.http_request import HttpRequest
from ..http.http_response import UPGRADE_REQUIRED, HttpResponse, line

PATH = "/ws"


def is_offered(request: HttpRequest) -> bool:
    """Whether a request asks for a WebSocket. Other offers are ignored, as they may be; so are all from HTTP/1.0."""
    return request.version >= b"1.1" and b"websocket" in _tokens(request, b"upgrade")


def refuse(request: HttpRequest, origins: Collection[str]) -> HttpResponse | None:
    """Why a request for a WebSocket is not granted, or None if it is. With no `origins`, all are welcome.

    Only a browser says which page it acts for, so a request that does not is from something else.
    """
    if request.path != PATH:
        return line(404, f"WebSocket is at {PATH}")
    if request.method != "GET":
        return line(405, headers=[(b"allow", b"GET, HEAD")])
    if request.has_body:
        return line(400, "a request for a WebSocket has no body")
    if b"upgrade" not in _tokens(request, b"connection"):
        return line(400, "`Connection: Upgrade` is missing")
    if request.header(b"sec-websocket-version") != b"13":
        return UPGRADE_REQUIRED
    if not _is_key(request.header(b"sec-websocket-key")):
        return line(400, "`Sec-WebSocket-Key` is not 16 bytes in base64")
    origin = request.header(b"origin")
    if origin and origins and origin.decode("latin-1") not in origins:
        return line(403, "this origin is not allowed")
    return None


def restated(request: HttpRequest) -> bytes:
    """The head of a granted request, with nothing in it but what the handshake needs."""
    return (
        b"GET %b HTTP/1.1\r\nHost: catbus\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: %b\r\n\r\n"
    ) % (PATH.encode(), request.header(b"sec-websocket-key"))


def _tokens(request: HttpRequest, name: bytes) -> set[bytes]:
    return {token.strip().lower() for token in request.header(name).split(b",")}


def _is_key(value: bytes) -> bool:
    try:
        return len(base64.b64decode(value, validate=True)) == 16
    except binascii.Error:
        return False
