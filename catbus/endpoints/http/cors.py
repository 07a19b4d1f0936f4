"""CORS (WHATWG Fetch, section 3.3): the pages that may use the HTTP paths, and what a browser is told about it. Pure.

| `websocket.allowed_origins` | pages of these origins | of the broker's own origin | of other origins |
|---|---|---|---|
| some | yes, also with credentials | yes | 403 |
| none | | yes | yes, without credentials |

The broker itself uses no cookies. `ANY_PAGE` and `NO_PAGE` are exceptions.
"""

from __future__ import annotations

from collections.abc import Collection

from .forwarded_headers import forwarded_origin
from .http_request import Headers, HttpRequest
from .http_response import HttpResponse, http_error

ANY_PAGE = frozenset({"/catbus.js", "/.well-known/catbus", "/openapi.json"})
"""Routes for the pages of all origins: they need no token and change nothing."""
NO_PAGE = frozenset({"/metrics"})
"""Routes that need no token, and are for operators alone: a page that an operator visits must not read them."""

MAX_AGE = 7200
"""Seconds for which a browser may keep the response to a preflight request."""

_ALLOWED_HEADERS = b"Authorization, Cache-Control, Content-Type, Idempotency-Key, Last-Event-ID"


def origin_listed(request: HttpRequest, origins: Collection[str]) -> bool:
    """Whether a request is from a page of one of these origins, or from no page. Without `origins`, all are allowed.

    Only browsers send an `Origin`, so a request without one does not come from a page.
    """
    origin = request.header(b"origin")
    return not origin or not origins or origin.decode("latin-1") in origins


def check_origin(request: HttpRequest, route: str | None, origins: Collection[str]) -> HttpResponse | None:
    """Return an error response if the page that a request is from may not use the route, else None."""
    if route in ANY_PAGE or origin_listed(request, origins) or _same_origin(request):
        return None
    return http_error(403, "this origin is not allowed")


def cors_headers(request: HttpRequest, route: str | None, origins: Collection[str]) -> Headers:
    """Return the headers that let a page read a response, if its origin is allowed."""
    exposed = (b"access-control-expose-headers", b"Retry-After")
    if route in ANY_PAGE or (not origins and route not in NO_PAGE):
        return [(b"access-control-allow-origin", b"*"), exposed]
    vary = (b"vary", b"Origin")
    if route in NO_PAGE or not request.header(b"origin") or not origin_listed(request, origins):
        return [vary]
    allow = (b"access-control-allow-origin", request.header(b"origin"))
    return [vary, allow, (b"access-control-allow-credentials", b"true"), exposed]


def preflight_headers(request: HttpRequest, methods: bytes, origins: Collection[str]) -> Headers:
    """Return what a preflight request asks: the allowed methods and headers; nothing for another `OPTIONS` request."""
    if not request.header(b"access-control-request-method"):
        return []
    headers = [
        (b"access-control-allow-methods", methods),
        (b"access-control-allow-headers", _ALLOWED_HEADERS),
        (b"access-control-max-age", b"%d" % MAX_AGE),
    ]
    if origins and request.header(b"access-control-request-private-network") == b"true":
        # A page of the Internet asks for a broker in a private network (Private Network Access).
        headers.append((b"access-control-allow-private-network", b"true"))
    return headers


def _same_origin(request: HttpRequest) -> bool:
    """Whether the page has the origin of the broker, as the browser or else the `Host` says.

    A page can set neither `Sec-Fetch-Site` nor `Host`, and needs a preflight request before it can set the headers of
    proxies. Browsers send `Sec-Fetch-Site` to https and to their own machine only. The schemes are not compared: the
    broker does not know the scheme of a proxy that does not name it.
    """
    site = request.header(b"sec-fetch-site")
    if site:
        return site in (b"same-origin", b"none")
    _, host = forwarded_origin(request, tls=False)
    return bool(host) and request.header(b"origin").decode("latin-1").partition("://")[2] == host
