"""The WebSocket handshake: which upgrade requests are accepted, and the request head that trio-websocket gets."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Collection

from ..http.cors import check_origin
from ..http.http_request import HttpRequest
from ..http.http_response import UPGRADE_REQUIRED, HttpResponse, http_error

PATH = "/ws"


def is_websocket_upgrade(request: HttpRequest) -> bool:
    """Whether a request asks for a WebSocket. Other upgrades, and all in HTTP/1.0, are ignored, as RFC 9110 allows."""
    return request.version >= b"1.1" and b"websocket" in _header_tokens(request, b"upgrade")


def check_upgrade(request: HttpRequest, origins: Collection[str]) -> HttpResponse | None:
    """Return an error response if an upgrade request is rejected, else None. Pages are allowed as for other paths."""
    if request.path != PATH:
        return http_error(404, f"WebSocket is at {PATH}")
    if request.method != "GET":
        return http_error(405, headers=[(b"allow", b"GET, HEAD")])
    if request.has_body:
        return http_error(400, "a request for a WebSocket has no body")
    if b"upgrade" not in _header_tokens(request, b"connection"):
        return http_error(400, "`Connection: Upgrade` is missing")
    if request.header(b"sec-websocket-version") != b"13":
        return UPGRADE_REQUIRED
    if not _is_key(request.header(b"sec-websocket-key")):
        return http_error(400, "`Sec-WebSocket-Key` is not 16 bytes in base64")
    return check_origin(request, PATH, origins)


def minimal_request_head(request: HttpRequest) -> bytes:
    """Return the head of an accepted request with only the headers that the handshake needs."""
    return (
        b"GET %b HTTP/1.1\r\nHost: catbus\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: %b\r\n\r\n"
    ) % (PATH.encode(), request.header(b"sec-websocket-key"))


def _header_tokens(request: HttpRequest, name: bytes) -> set[bytes]:
    return {token.strip().lower() for token in request.header(name).split(b",")}


def _is_key(value: bytes) -> bool:
    try:
        return len(base64.b64decode(value, validate=True)) == 16
    except binascii.Error:
        return False
