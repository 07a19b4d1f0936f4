"""The HTTP paths of the WebSocket port, and the handlers that are too short for modules of their own."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

from ...error_codes import ErrorCode
from ...errors import PeerError
from ..replica_interface import ReplicaInterface
from .discovery_document import discovery_document
from .error_responses import error_response
from .forwarded_headers import forwarded_origin
from .http_request import HttpRequest, bearer_token
from .http_response import UPGRADE_REQUIRED, HttpResponse, json_response, text_response
from .javascript_client import javascript_modules, serve_javascript
from .publish_request import publish

Handler = Callable[[ReplicaInterface, HttpRequest], Awaitable[HttpResponse]]


async def health(replica: ReplicaInterface, request: HttpRequest) -> HttpResponse:
    """Answer exactly `ok`, which programs compare with, while the process runs."""
    return HttpResponse(200, b"ok")


async def ready(replica: ReplicaInterface, request: HttpRequest) -> HttpResponse:
    """Answer whether a load balancer should send new clients to this replica.

    An unreachable database and a gap in the log do not change the answer: all replicas share them, and taking all
    replicas out of rotation would turn a pause into an outage.
    """
    match replica.readiness:
        case "ready":
            return text_response(200, "ready")
        case "degraded":
            return text_response(200, f"degraded: {replica.log.problem}")
        case other:
            return text_response(503, other)


async def metrics(replica: ReplicaInterface, request: HttpRequest) -> HttpResponse:
    """Answer with the metrics in the Prometheus format."""
    found = replica.scrape()
    if found is None:
        return text_response(503, "this replica exports no metrics")
    body, content_type = found
    return HttpResponse(200, body, type=content_type.encode())


async def status(replica: ReplicaInterface, request: HttpRequest) -> HttpResponse:
    """Answer with the state of this replica, to a client that may read every channel."""
    try:
        identity = await replica.authenticate(bearer_token(request), request.network)
        if not identity.grants.may_read("*"):
            raise PeerError(ErrorCode.UNAUTHORIZED, "the status needs a grant to read `*`")
    except PeerError as error:
        return error_response(replica, error)
    return json_response(replica.report(), headers=[(b"cache-control", b"no-store")])


async def discover(replica: ReplicaInterface, request: HttpRequest) -> HttpResponse:
    """Where the other ways in are, by the name under which this one was reached."""
    secure, host = forwarded_origin(request, tls=replica.config.websocket.tls)
    if not host:
        return text_response(400, "the request has no host")
    made = None if replica.certificates is None else replica.certificates.development(datetime.now(UTC))
    return json_response(
        discovery_document(host, replica.webtransport_port, made, secure=secure),
        headers=[(b"access-control-allow-origin", b"*"), (b"cache-control", b"no-store")],
    )


async def websocket(replica: ReplicaInterface, request: HttpRequest) -> HttpResponse:
    """Reject a request without an upgrade on a path that serves only WebSocket."""
    return UPGRADE_REQUIRED


ROUTES: dict[str, dict[str, Handler]] = {
    "/health": {"GET": health},
    "/ready": {"GET": ready},
    "/status": {"GET": status},
    "/metrics": {"GET": metrics},
    "/catbus.js": {"GET": serve_javascript},
    "/.well-known/catbus": {"GET": discover},
    "/publish": {"POST": publish},
    "/ws": {"GET": websocket},
}


def route_of(path: str) -> str | None:
    """Return the route that serves a path. All modules of the JavaScript client share one."""
    if path in ROUTES:
        return path
    return "/catbus.js" if path in javascript_modules() else None


def find_handler(method: str, path: str) -> Handler | HttpResponse:
    """Return the handler of a request, or a 404 or 405 response. Each path with GET also serves HEAD."""
    route = route_of(path)
    methods = None if route is None else ROUTES[route]
    if methods is None:
        return text_response(404)
    handler = methods.get("GET" if method == "HEAD" else method)
    if handler is None:
        allowed = ", ".join("GET, HEAD" if name == "GET" else name for name in methods)
        return text_response(405, headers=[(b"allow", allowed.encode())])
    return handler
