"""The head of a request: what it says, and which are refused because others could understand them otherwise."""

from __future__ import annotations

from urllib.parse import urlsplit

import h11

from .host_header import host_name
from .http_request import HttpRequest
from .http_response import HttpResponse, line

SINGLE = (b"authorization", b"idempotency-key")
"""Headers of which two would be a choice. h11 sees to `Host` and `Content-Length`."""


def read_head(event: h11.Request) -> HttpRequest | HttpResponse:
    """The request that begins with this head, or why there is none: then nothing after it can be understood.

    A proxy in front of the broker must see the same requests in a stream of bytes as the broker does. So a head that
    says twice how long its body is, or in a way that its version of HTTP does not know, is no request (RFC 9112,
    sections 6.1 and 6.3), and neither is one that could be for two hosts (section 3.2).
    """
    headers = list(event.headers)
    names = [name for name, _ in headers]
    if not event.http_version.startswith(b"1."):
        return line(505)
    if b"transfer-encoding" in names and b"content-length" in names:
        return line(400, "`Transfer-Encoding` and `Content-Length` contradict each other")
    if b"transfer-encoding" in names and event.http_version < b"1.1":
        return line(400, "HTTP/1.0 has no `Transfer-Encoding`")
    if twice := next((name for name in SINGLE if names.count(name) > 1), None):
        return line(400, f"`{twice.decode().title()}` stands in it twice")
    place = _place(event.target.decode("ascii"), dict(headers).get(b"host", b"").decode("latin-1"))
    if place is None:
        return line(400, "this is not a host, or not a target on it")
    host, path = place
    method = event.method.decode("ascii")
    if path == "*" and method != "OPTIONS":
        return line(400, "`*` is for OPTIONS alone")
    return HttpRequest(method, path, headers, version=event.http_version, host=host)


def _place(target: str, host: str) -> tuple[str, str] | None:
    """The host and the path, without the query, that a request is for. An absolute target overrides the `Host`."""
    if host and host_name(host) is None:
        return None
    if target.startswith("/") or target == "*":
        return host, target.partition("?")[0]
    try:
        parts = urlsplit(target)
    except ValueError:
        return None
    if parts.scheme not in ("http", "https") or host_name(parts.netloc) is None:
        return None
    return parts.netloc, parts.path or "/"
