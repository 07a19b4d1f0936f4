"""What there is on the WebSocket port beside WebSocket: which path answers what."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from ...errors import ErrorCode, PeerError
from .discovery import discovery
from .error_responses import error_response
from .forwarded_headers import origin_of
from .http_request import HttpRequest, bearer_token
from .http_response import UPGRADE_REQUIRED, HttpResponse, json, line
from .javascript_client import script, scripts
from .publish_request import publish

if TYPE_CHECKING:
    from ...replica import Replica

Handler = Callable[["Replica", HttpRequest], Awaitable[HttpResponse]]


async def health(replica: Replica, request: HttpRequest) -> HttpResponse:
    """Alive, whatever else may be wrong. Exactly `ok`, which programs compare it with."""
    return HttpResponse(200, b"ok")


async def ready(replica: Replica, request: HttpRequest) -> HttpResponse:
    """Whether new clients should be sent here.

    A database that is away does not change that, nor does a hole in the log: all replicas share them, and taking all of
    them out of service would make an outage of a pause.
    """
    match replica.readiness:
        case "ready":
            return line(200, "ready")
        case "degraded":
            return line(200, f"degraded: {replica.log.problem}")
        case other:
            return line(503, other)


async def metrics(replica: Replica, request: HttpRequest) -> HttpResponse:
    """What is counted and measured, for Prometheus."""
    found = replica.scrape()
    if found is None:
        return line(503, "this replica exports no metrics")
    body, content_type = found
    return HttpResponse(200, body, type=content_type.encode())


async def status(replica: Replica, request: HttpRequest) -> HttpResponse:
    """How this replica is, for who may read everything."""
    try:
        identity = await replica.authenticate(bearer_token(request), request.network)
        if not identity.grants.may_read("*"):
            raise PeerError(ErrorCode.UNAUTHORIZED, "only who may read `*` is told")
    except PeerError as error:
        return error_response(replica, error)
    return json(replica.report(), headers=[(b"cache-control", b"no-store")])


async def discover(replica: Replica, request: HttpRequest) -> HttpResponse:
    """Where the other ways in are, by the name under which this one was reached."""
    secure, host = origin_of(request, tls=replica.config.websocket.tls)
    if not host:
        return line(400, "the request does not say which host it is for")
    made = None if replica.certificates is None else replica.certificates.self_made(datetime.now(UTC))
    return json(
        discovery(host, replica.webtransport_port, made, secure=secure),
        headers=[(b"access-control-allow-origin", b"*"), (b"cache-control", b"no-store")],
    )


async def websocket(replica: Replica, request: HttpRequest) -> HttpResponse:
    """A plain request where there is only WebSocket."""
    return UPGRADE_REQUIRED


ROUTES: dict[str, dict[str, Handler]] = {
    "/health": {"GET": health},
    "/ready": {"GET": ready},
    "/status": {"GET": status},
    "/metrics": {"GET": metrics},
    "/catbus.js": {"GET": script},
    "/.well-known/catbus": {"GET": discover},
    "/publish": {"POST": publish},
    "/ws": {"GET": websocket},
}


def route_of(path: str) -> str | None:
    """The route that serves a path; all modules of the JavaScript client have one."""
    if path in ROUTES:
        return path
    return "/catbus.js" if path in scripts() else None


def find(method: str, path: str) -> Handler | HttpResponse:
    """Who answers a request, or the answer if there is nobody. What can be asked for with GET can be with HEAD."""
    route = route_of(path)
    methods = None if route is None else ROUTES[route]
    if methods is None:
        return line(404)
    handler = methods.get("GET" if method == "HEAD" else method)
    if handler is None:
        allowed = ", ".join("GET, HEAD" if name == "GET" else name for name in methods)
        return line(405, headers=[(b"allow", allowed.encode())])
    return handler
