"""The head of a request, and the rejection of heads that a proxy could read in another way."""

from __future__ import annotations

from urllib.parse import urlsplit

import h11

from .host_header import host_name
from .http_request import HttpRequest
from .http_response import HttpResponse, http_error

SINGLE_HEADERS = (b"authorization", b"idempotency-key")
"""Headers that may occur only once, because two would be ambiguous. h11 checks `Host` and `Content-Length`."""


def read_request_head(event: h11.Request) -> HttpRequest | HttpResponse:
    """Return the request with this head, or an error response. After an error, the connection cannot be read on.

    A proxy in front of the broker must see the same requests in a stream of bytes as the broker does. So a head is
    rejected if it gives the length of its body twice or in a way that its HTTP version does not have (RFC 9112,
    sections 6.1 and 6.3), or if it names two hosts (section 3.2).
    """
    headers = list(event.headers)
    names = [name for name, _ in headers]
    if not event.http_version.startswith(b"1."):
        return http_error(505)
    if b"transfer-encoding" in names and b"content-length" in names:
        return http_error(400, "`Transfer-Encoding` and `Content-Length` contradict each other")
    if b"transfer-encoding" in names and event.http_version < b"1.1":
        return http_error(400, "HTTP/1.0 has no `Transfer-Encoding`")
    if twice := next((name for name in SINGLE_HEADERS if names.count(name) > 1), None):
        return http_error(400, f"`{twice.decode().title()}` occurs twice")
    place = _split_target(event.target.decode("ascii"), dict(headers).get(b"host", b"").decode("latin-1"))
    if place is None:
        return http_error(400, "the host or the target is not valid")
    host, path, query = place
    method = event.method.decode("ascii")
    if path == "*" and method != "OPTIONS":
        return http_error(400, "`*` is for OPTIONS alone")
    return HttpRequest(method, path, headers, version=event.http_version, host=host, query=query)


def _split_target(target: str, host: str) -> tuple[str, str, str] | None:
    """Return the host, the path and the query of a target. An absolute target overrides the `Host` header."""
    if host and host_name(host) is None:
        return None
    if target.startswith("/") or target == "*":
        path, _, query = target.partition("?")
        return host, path, query
    try:
        parts = urlsplit(target)
    except ValueError:
        return None
    if parts.scheme not in ("http", "https") or host_name(parts.netloc) is None:
        return None
    return parts.netloc, parts.path or "/", parts.query
